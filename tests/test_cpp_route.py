"""The C++ router: every form, on one thread and several, and when it is chosen."""

from typing import Any

import pytest
import torch

from braze.backend import collect
from braze.kernels import reference
from braze.kernels.cpp import route
from braze.kernels.spec import RouteSpec
from tests.harness import assert_close
from tests.test_router_sites import SPELLINGS, E, inputs, layer
from tests.test_triton_route import CASES, check_layouts, check_ties, compare

needs_compiler = pytest.mark.skipif(
    torch.cuda.is_available() or route.supports(torch.empty(2, 8), None, RouteSpec(2)) is not None,
    reason="no C++ compiler, or a GPU whose tensors the shared cases use",
)
SPEC = RouteSpec(8, "sigmoid", "scores", 8, 4, "top2", renorm="add", eps=1e-20, scale=2.5)


@needs_compiler
@pytest.mark.parametrize(("spec", "experts", "bias"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_router(spec: RouteSpec, experts: int, bias: bool, dtype: torch.dtype) -> None:
    assert route.supports(torch.empty(2, experts, dtype=dtype), None, spec) is None
    compare(spec, experts, bias, dtype, route.run)


@needs_compiler
def test_half_precision() -> None:
    compare(*CASES[0], torch.float16, route.run)


@needs_compiler
def test_ties_and_layouts() -> None:
    check_ties(route.run)
    check_layouts(route.run)


@needs_compiler
def test_many_tokens_on_several_threads() -> None:
    rng = torch.Generator().manual_seed(0)
    logits, bias = torch.randn(700, 256, generator=rng), torch.randn(256, generator=rng).to(torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 3):
            torch.set_num_threads(n)
            results.append(route.run(logits, bias, SPEC))
    finally:
        torch.set_num_threads(threads)
    exact, chosen = reference.route(logits.double(), bias, SPEC)
    for weights, ids in results:
        assert torch.equal(weights, results[0][0])
        assert (ids == chosen).double().mean() > 0.999  # scores nearer than float32 tells apart
        same = (ids == chosen).all(-1)
        assert_close(weights[same], exact[same], 5e-6)


def test_reasons() -> None:
    for logits, spec, reason in (
        (torch.empty(2, 8, dtype=torch.float64), RouteSpec(2), "float64"),
        (torch.empty(2, 8, device="meta"), RouteSpec(2), "not cpu"),
        (torch.empty(2, 8), RouteSpec(2, ids_dtype=torch.int16), "int16"),
        (torch.empty(2, 5000), RouteSpec(2), "exceed"),
        (torch.empty(2, 512), RouteSpec(65), "exceed"),
        (torch.empty(2, 512), RouteSpec(2, groups=128, top_groups=2), "groups exceed"),
    ):
        assert reason in str(route.supports(logits, None, spec))


@needs_compiler
@pytest.mark.parametrize(
    ("length", "forced", "kernel"),
    [(4, "auto", "cpp"), (12, "auto", "aten"), (route.WORTH // E, "auto", "cpp"), (route.WORTH // E, "aten", "aten")],
)
def test_chosen_where_it_pays(length: int, forced: str, kernel: str) -> None:
    router, _ = SPELLINGS["deepseek_v3"]
    given: Any = inputs(length)
    torch._dynamo.reset()
    options = {"require": ["router"], "kernel": {"router": forced}, "strict": True}
    with torch.no_grad(), collect() as reports, torch._inductor.config.patch(force_disable_caches=True):
        got = torch.compile(layer(router), backend="braze", options=options, dynamic=False)(*given)
    (site,) = [s for r in reports for s in r.sites if s.kind == "router"]
    assert site.kernel == kernel, site.why
    assert_close(got, layer(router)(*(v.double() for v in given)), 1e-5)
