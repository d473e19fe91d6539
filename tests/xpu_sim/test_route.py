"""The router as XPU code: every form it takes, on both kinds of GPU, against float64."""

from __future__ import annotations

import pytest
import torch

from braze import xpu_sim
from braze.kernels.spec import RouteSpec
from tests.harness import assert_close
from tests.test_router_sites import SPELLINGS, inputs, layer
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


@pytest.mark.parametrize("length", [1, 13])
def test_a_router_is_a_launch_in_the_graph(length: int) -> None:
    """The layer's router, found and lowered as on a GPU, inside what Inductor makes of the rest."""
    router, _ = SPELLINGS["deepseek_v3"]
    given = inputs(length)
    torch._dynamo.reset()
    options = {"require": ["router"], "kernel": {"moe": "aten"}, "strict": True}
    with torch.no_grad(), xpu_sim.compiled_graphs("pvc"), xpu_sim.record() as launches:
        got = torch.compile(layer(router), backend="braze", options=options, dynamic=False)(*given)
    assert [launch.kernel for launch in launches].count("route_kernel") == 1
    assert_close(got, layer(router)(*(v.double() for v in given)), 1e-5)
