"""Inductor pads products whose sizes are not aligned on a GPU: made to do so here, what is found is what was found without."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor.fx_passes import pad_mm
from torch.nn.functional import silu

from tests.harness import Fused, assert_close
from tests.test_expert_loops import Gated, Loop

T, H, INNER, E, K = 9, 34, 18, 5, 2
PAD = torch.ops.aten.constant_pad_nd.default


@pytest.fixture(autouse=True)
def padded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    told: list[Any] = []
    monkeypatch.setattr(pad_mm, "should_pad", lambda match, *_, **__: told.append(match) or True)
    return told


def gathered(x: Tensor, router: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    weights, ids = (x @ router).softmax(-1).topk(K)
    which = ids.flatten()
    gate, up = torch.bmm(x.repeat_interleave(K, 0).unsqueeze(1), w1[which]).chunk(2, -1)
    y = torch.bmm(silu(gate) * up, w2[which]).squeeze(1)
    return (y * weights.flatten()[:, None]).view(T, K, H).sum(1)


def dense(x: Tensor, router: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    weights, ids = (x @ router).softmax(-1).topk(K)
    scores = torch.zeros(T, E, dtype=x.dtype).scatter(1, ids, weights)
    gate, up = torch.bmm(x.expand(E, T, H), w1).chunk(2, -1)
    return (torch.bmm(silu(gate) * up, w2) * scores.t()[..., None]).sum(0)


@pytest.mark.parametrize("layer", [gathered, dense])
def test_batched_products(layer: Any, padded: list[Any]) -> None:
    rng = torch.Generator().manual_seed(0)
    given = [torch.randn(s, generator=rng) / s[-2] ** 0.5 for s in ((T, H), (H, E), (E, H, 2 * INNER), (E, INNER, H))]
    fused = Fused(layer, dynamic=False)
    assert_close(fused(*given), layer(*(t.double() for t in given)), 2e-6)
    assert padded
    assert fused.count("moe") == fused.count("router") == [1], fused.reasons


@pytest.mark.parametrize("bias", [False, True])
def test_loops_and_biases(bias: bool, padded: list[Any]) -> None:
    layer = Loop(expert=Gated, bias=bias)
    x = torch.randn(7, layer.router.in_features)
    fused = Fused(layer, dynamic=False)
    got = fused(x)
    assert_close(got, layer.double()(x.double()).detach(), 2e-6)
    assert padded
    assert fused.count("moe") == [1], fused.reasons


def test_what_is_not_fused_is_padded_again(padded: list[Any]) -> None:
    graphs: list[fx.Graph] = []
    net = nn.Sequential(nn.Linear(H, 50), nn.Tanh(), nn.Linear(50, 21, bias=False), nn.Linear(21, 21))
    x = torch.randn(9, H)
    fused = Fused(net, dynamic=False, after=lambda graph: graphs.append(graph))
    got = fused(x)
    assert_close(got, net.double()(x.double()).detach(), 2e-6)
    assert len(padded) >= 3
    pads = graphs[0].find_nodes(op="call_function", target=PAD)
    assert len(pads) == 6
    products = [n for n in graphs[0].nodes if n.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)]
    assert all(s % 4 == 0 for n in products for s in n.meta["val"].shape)
