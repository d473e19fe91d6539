"""The C++ router with the product before it: every form, every number of tokens, and when a graph has it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from braze.backend import collect
from braze.kernels import reference
from braze.kernels.cpp import gate
from braze.kernels.spec import RouteSpec
from tests.harness import assert_close
from tests.test_router_sites import SPELLINGS, experts, inputs, layer
from tests.test_triton_route import CASES, compare

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available()
    or gate.supports(torch.empty(1, 8), torch.empty(4, 8), None, None, torch.float32, RouteSpec(2)) is not None,
    reason="no C++ compiler, or a GPU whose tensors the shared cases use",
)


def of_logits(logits: Tensor, bias: Tensor | None, spec: RouteSpec) -> tuple[Tensor, Tensor]:
    """The kernel on tokens and weights whose products are these logits exactly: a token is a row of the identity."""
    rows = logits.reshape(-1, logits.shape[-1])
    parts = []
    for some in rows.split(gate.FEW):
        x = torch.eye(some.shape[0], 37, dtype=logits.dtype)
        w = torch.zeros(some.shape[1], 37, dtype=logits.dtype)
        w[:, : some.shape[0]] = some.T
        parts.append(gate.run(x, w, None, bias, logits.dtype, spec))
    weights, ids = (torch.cat(p) for p in zip(*parts, strict=True))
    return weights.reshape(*logits.shape[:-1], -1), ids.reshape(*logits.shape[:-1], -1)


@pytest.mark.parametrize(("spec", "number", "bias"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_router(spec: RouteSpec, number: int, bias: bool, dtype: torch.dtype) -> None:
    compare(spec, number, bias, dtype, of_logits)


def test_half_precision() -> None:
    compare(*CASES[0], torch.float16, of_logits)


def test_ties_take_the_lower_index() -> None:
    x = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0, 1.0, -1.0, 1.0]])
    assert of_logits(x, None, RouteSpec(5, "sigmoid"))[1].tolist() == [[1, 2, 4, 0, 5]]


@pytest.mark.parametrize("tokens", range(1, gate.FEW + 1))
@pytest.mark.parametrize(
    ("x_dtype", "w_dtype", "logits"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_products(tokens: int, x_dtype: torch.dtype, w_dtype: torch.dtype, logits: torch.dtype) -> None:
    """Sizes that are no multiple of a vector, rows with gaps, a bias of the product."""
    rng = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 250, generator=rng).to(x_dtype)[:, 7:210]
    w = torch.randn(37, 203, generator=rng).to(w_dtype)
    b = torch.randn(37, generator=rng)
    spec = RouteSpec(37, "sigmoid")  # all experts, by their logits
    weights, ids = gate.run(x, w, b, None, logits, spec)
    exact = (x.double() @ w.double().T + b.double()).sigmoid()
    assert_close(weights, exact.gather(1, ids), 1e-6 if logits == torch.float32 else 2e-2)
    assert torch.equal(ids.sort().values, torch.arange(37).expand(tokens, -1))
    assert (exact.gather(1, ids).diff(dim=1) < (1e-5 if logits == torch.float32 else 2e-2)).all()


def test_threads_change_nothing() -> None:
    rng = torch.Generator().manual_seed(0)
    x, w = torch.randn(3, 1024, generator=rng), torch.randn(256, 1024, generator=rng)
    before, results = torch.get_num_threads(), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            results.append(gate.run(x, w, None, None, torch.float32, RouteSpec(8)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0])
    exact, chosen = reference.route(x.double() @ w.double().T, None, RouteSpec(8))
    assert torch.equal(results[1][1], chosen)
    assert_close(results[1][0], exact, 1e-5)


def test_reasons() -> None:
    x, w, spec = torch.empty(2, 8), torch.empty(4, 8), RouteSpec(2)
    for args, reason in (
        ((torch.empty(9, 8), w, None, None, torch.float32, spec), "9 tokens"),
        ((torch.empty(0, 8), w, None, None, torch.float32, spec), "0 tokens"),
        ((x, torch.empty(8, 4).T, None, None, torch.float32, spec), "not contiguous"),
        ((x.double(), w, None, None, torch.float32, spec), "float64"),
        ((x, w, torch.empty(8)[::2], None, torch.float32, spec), "not contiguous"),
        ((x, w, None, None, torch.float64, spec), "float64"),
    ):
        assert reason in str(gate.supports(*args))


def site_of(run: Callable[..., Any], *given: Tensor, kernel: str = "auto") -> tuple[Any, Any]:
    """What the compiled function gives, and its router's finding."""
    torch._dynamo.reset()
    options = {"require": ["router"], "kernel": {"router": kernel}, "strict": True}
    with torch.no_grad(), collect() as reports, torch._inductor.config.patch(force_disable_caches=True):
        got = torch.compile(run, backend="braze", options=options, dynamic=False)(*given)
    (site,) = [s for r in reports for s in r.sites if s.kind == "router"]
    return got, site


@pytest.mark.parametrize("spelling", ["softmax first", "deepseek_v3"])
@pytest.mark.parametrize(("tokens", "taken"), [(1, True), (gate.FEW, True), (gate.FEW + 1, False)])
def test_in_a_graph(spelling: str, tokens: int, taken: bool) -> None:
    router, _ = SPELLINGS[spelling]
    given: Any = inputs(tokens)
    got, site = site_of(layer(router), *given)
    assert ("the product included" in site.why) == taken, site.why
    assert_close(got, layer(router)(*(v.double() for v in given)), 1e-5)


def test_widened_and_with_a_bias() -> None:
    """bfloat16 tokens and weights, widened before the product as DeepSeek does; a bias in the product as GPT-OSS does."""
    router, _ = SPELLINGS["deepseek_v3"]

    def run(x: Tensor, w: Tensor, bias: Tensor, w1: Tensor, w2: Tensor, b: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(x.float(), w.float(), b)
        weights, ids = router(logits, bias)
        return experts(x.float(), weights, ids, w1.float(), w2.float())

    given = (*inputs(2, torch.bfloat16), torch.randn(16, generator=torch.Generator().manual_seed(1)))
    got, site = site_of(run, *given)
    assert "the product included" in site.why, site.why
    assert_close(got, run(*given), 1e-5)


def test_parts_of_larger_tensors() -> None:
    """The last tokens of a sequence, one layer's part of stacked routers: nothing begins where its memory does."""
    router, _ = SPELLINGS["deepseek_v3"]

    def run(x: Tensor, w: Tensor, bias: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return layer(router)(x[3:5], w[1], bias[1], w1, w2)

    x, w, bias, w1, w2 = inputs(5)
    given = (x, torch.stack((w + 1, w)), torch.stack((bias + 1, bias)), w1, w2)
    got, site = site_of(run, *given)
    assert "the product included" in site.why, site.why
    assert_close(got, run(*(v.double() for v in given)), 1e-5)


def test_logits_that_are_read_elsewhere_stay() -> None:
    router, _ = SPELLINGS["deepseek_v3"]

    def run(x: Tensor, w: Tensor, bias: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
        logits = x @ w.T
        weights, ids = router(logits, bias)
        return experts(x, weights, ids, w1, w2), logits

    given: Any = inputs(2)
    (got, logits), site = site_of(run, *given)
    assert site.kernel == "aten"
    assert_close(logits, given[0].double() @ given[1].double().T, 1e-5)
    assert_close(got, run(*(v.double() for v in given))[0], 1e-5)


def test_refused_on_demand() -> None:
    router, _ = SPELLINGS["deepseek_v3"]
    _, site = site_of(layer(router), *inputs(1), kernel="aten")
    assert (site.kernel, site.why) == ("aten", "asked for")
