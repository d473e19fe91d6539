"""Launches inside a graph that may overlap are told to Triton so, and only those; what a kernel writes stays known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from braze import xpu_sim
from braze.kernels.triton import compat
from braze.lowering import inductor
from tests import gathered
from tests.harness import assert_close

OPTION = "'launch_pdl': True"


class Layer(nn.Module):
    """Eight experts, two for each token, gathered; the second product's weight as it is or computed in the graph."""

    def __init__(self, made: bool) -> None:
        super().__init__()
        self.made = made
        self.router = nn.Linear(64, 8, bias=False)
        self.w1 = nn.Parameter(torch.randn(8, 96, 64) / 8)
        self.w2 = nn.Parameter(torch.randn(8, 64, 48) / 7)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(2)
        w2 = self.w2.cos() if self.made else self.w2
        return gathered.experts(x, weights, ids, self.w1, w2)


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("overlaps", [False, True])
def test_definitions(overlaps: bool, made: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "overlaps_launches", lambda device: overlaps)
    torch._dynamo.reset()
    model = Layer(made).eval()
    x = torch.randn(3, 64)
    run = torch.compile(model, backend="braze", dynamic=False, options={"strict": True, "require": ["moe", "router"]})
    with torch.no_grad(), xpu_sim.compiled_graphs("pvc"), torch._inductor.config.patch(force_disable_caches=True):
        got, (code,) = run_and_get_code(run, x)
    assert_close(got, model.double()(x.double()), 1e-5)
    # Of the router, the second product and the sum; the first product and a sort follow kernels that may not be braze's.
    kernels = {d.split("'")[0] for d in code.split("async_compile.triton('")[1:] if OPTION in d.split("'''")[1]}
    named = {k.rstrip("0123456789").rstrip("_") for k in kernels}
    expected = {"route_kernel"} | ({"moe_gemm", "moe_combine"} if not made else set())
    assert named == (expected if overlaps else set()), kernels


def test_not_where_inductors_own_launches_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "overlaps_launches", lambda device: True)
    assert inductor.overlaps_launches(torch.device("cuda"))
    with torch._inductor.config.patch({"triton.enable_pdl": True}):
        assert not inductor.overlaps_launches(torch.device("cuda"))
