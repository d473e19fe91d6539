"""Experts whose weights are E tensors each, by the Triton kernels: where addresses change, in CUDA graphs, and refusals."""

from typing import Any

import pytest
import torch
from torch import Tensor

from braze.kernels import reference
from braze.kernels.spec import MoeSpec
from braze.kernels.triton import separate
from tests.harness import assert_close
from tests.test_expert_loops import H, Loop

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
needs_device = pytest.mark.skipif(not GPU, reason="no GPU")
EXPERTS, HIDDEN, INNER, K = 6, 128, 64, 2


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_weights_may_change_and_move(mode: str) -> None:
    """Also where the launches are in a CUDA graph, which has the addresses that it was recorded with."""
    layer, exact = Loop().to(DEVICE), Loop().to(DEVICE).double()
    options = {"require": ["moe"], "triton.cudagraphs": mode == "reduce-overhead"}
    compiled = torch.compile(layer, backend="braze", options=options)

    def check() -> None:
        exact.load_state_dict(layer.state_dict())
        x = torch.randn(9, H, device=DEVICE)
        assert_close(compiled(x).clone(), exact(x.double()), 2e-5)

    with torch.no_grad():
        for _ in range(4):
            check()
        layer.experts[1].gate.weight.mul_(3.0)
        check()
        moved = [p.clone() for p in layer.parameters()]
        for p, other in zip(layer.parameters(), moved, strict=True):
            p.data = other.mul_(0.5)
        for _ in range(4):
            check()


def lists(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    first = [torch.randn(INNER, HIDDEN, device=DEVICE, dtype=dtype) / 11 for _ in range(2 * EXPERTS)]
    return first, [torch.randn(HIDDEN, INNER, device=DEVICE, dtype=dtype) / 8 for _ in range(EXPERTS)]


def routed(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    weights, ids = torch.rand(tokens, EXPERTS, device=DEVICE).topk(K)
    return torch.randn(tokens, HIDDEN, device=DEVICE, dtype=dtype), ids, weights


def exact(x: Tensor, ids: Tensor, weights: Tensor, w1: list[Tensor], w2: list[Tensor]) -> Tensor:
    stacked = torch.stack([torch.cat(pair) for pair in zip(w1[::2], w1[1::2], strict=True)]).double()
    return reference.moe(x.double(), ids, weights.double(), stacked, torch.stack(w2).double(), None, None, MoeSpec())


@needs_device
def test_an_address_that_is_not_aligned() -> None:
    """Such experts are computed one after the other."""
    w1, w2 = lists(torch.bfloat16)
    shifted = torch.empty(INNER * HIDDEN + 1, device=DEVICE, dtype=torch.bfloat16)[1:].view(INNER, HIDDEN)
    w1[3] = shifted.copy_(w1[3])
    given = routed(7, torch.bfloat16)
    assert_close(torch.ops.braze.moe_separate(*given, w1, w2, [], []), exact(*given, w1, w2), 6e-3)


@needs_device
def test_other_weights_of_the_same_sizes() -> None:
    """A plan is kept for the sizes, and a table for the addresses."""
    for tokens in (1, 40, 1, 40):
        w1, w2 = lists(torch.bfloat16)
        given = routed(tokens, torch.bfloat16)
        assert_close(torch.ops.braze.moe_separate(*given, w1, w2, [], []), exact(*given, w1, w2), 6e-3)


def test_tables_are_looked_up_by_their_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(separate, "MOST", 2)
    kept: dict[Any, Tensor] = {}
    monkeypatch.setattr(separate, "_tables", kept)
    for addresses in ((1, 2), (3, 4), (1, 2), (5, 6)):
        assert separate._table(addresses, torch.device("cpu")).tolist() == list(addresses)
    assert list(kept) == [(5, 6)]


def test_experts_that_differ_are_refused() -> None:
    w1, w2 = lists(torch.bfloat16)
    given = routed(3, torch.bfloat16)
    w2[4] = w2[4].t().contiguous().t()
    assert "w2" in str(separate.supports(*given, w1, w2, [], [], MoeSpec()))
