"""The router as XPU code: every form it takes, on both kinds of GPU, against float64."""

from __future__ import annotations

import pytest
import torch

from braze import xpu_sim
from braze.kernels.spec import RouteSpec
from tests.test_triton_route import CASES, check_layouts, check_ties, compare

TARGETS = ["pvc", "generic"]


@pytest.mark.parametrize(("spec", "experts", "bias"), CASES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_every_router(target: str, spec: RouteSpec, experts: int, bias: bool) -> None:
    with xpu_sim.device(target), xpu_sim.record() as launches:
        compare(spec, experts, bias, torch.float32 if target == "pvc" else torch.bfloat16)
    assert [launch.kernel for launch in launches] == ["route_kernel"]


@pytest.mark.parametrize("target", TARGETS)
def test_ties_and_layouts(target: str) -> None:
    with xpu_sim.device(target):
        check_ties()
        check_layouts()
