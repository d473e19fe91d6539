"""Inductor makes plain products of batched ones with one batch on a GPU: made to do so here, one token's experts are found."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.fx_passes import joint_graph
from torch.nn.functional import silu

from tests.harness import Fused, assert_close

H, INNER, E = 34, 18, 5
aten = torch.ops.aten


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint_graph, "check_device", lambda *_, **__: True)


def gathered(x: Tensor, router: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor, k: int) -> Tensor:
    """Each token's weights are gathered; gate's and up's columns are halves."""
    weights, ids = (x @ router).softmax(-1).topk(k)
    weights = weights / weights.sum(-1, keepdim=True)
    g, u = torch.einsum("th,tknh->tkn", x, w1[ids]).chunk(2, -1)
    return torch.einsum("tki,tkhi,tk->th", silu(g) * u, w2[ids], weights)


def biased(x: Tensor, router: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor, k: int) -> Tensor:
    """With biases; gate's and up's columns alternate."""
    values, ids = (x @ router).topk(k)
    h = torch.einsum("bh,benh->ben", x, w1[ids]) + b1[ids]
    h = silu(h[..., ::2]) * h[..., 1::2]
    y = torch.einsum("bei,behi->beh", h, w2[ids]) + b2[ids]
    return torch.einsum("beh,be->bh", y, values.softmax(-1))


def parameters() -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    sizes = ((H, E), (E, 2 * INNER, H), (E, H, INNER), (E, 2 * INNER), (E, H))
    return [torch.randn(s, generator=rng) / s[-1] ** 0.5 for s in sizes]


@pytest.mark.parametrize("layer", [gathered, biased])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("tokens", [1, 3])
def test_gathered_weights(layer: Any, k: int, tokens: int) -> None:
    given = [torch.randn(tokens, H, generator=torch.Generator().manual_seed(1)), *parameters()]
    fused = Fused(lambda *t: layer(*t, k), dynamic=False)
    assert_close(fused(*given), layer(*(t.double() for t in given), k), 3e-6)
    assert fused.count("moe") == [1], fused.reasons


def test_what_is_not_fused_is_plain_again() -> None:
    graphs: list[fx.Graph] = []

    def net(x: Tensor, w: Tensor) -> Tensor:
        y = torch.bmm(torch.bmm(x, w).tan(), w.transpose(1, 2))
        return torch.bmm(y.expand(2, -1, -1), w.transpose(1, 2).expand(2, -1, -1).transpose(1, 2).cos())

    rng = torch.Generator().manual_seed(0)
    given = [torch.randn(s, generator=rng) / 6 for s in ((1, 7, 34), (1, 34, 18))]
    fused = Fused(net, dynamic=False, after=graphs.append)
    assert_close(fused(*given), net(*(t.double() for t in given)), 2e-6)
    count = {op: len(graphs[0].find_nodes(op="call_function", target=op.default)) for op in (aten.mm, aten.bmm)}
    assert count == {aten.mm: 2, aten.bmm: 1}
