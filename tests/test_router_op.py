"""`braze::route` itself: its composition against its reference, its fake kernel, and what it refuses."""

from dataclasses import asdict
from typing import Any

import pytest
import torch

import braze  # noqa: F401  (defines the op)
from braze.kernels import aten, reference
from braze.kernels.spec import RouteSpec
from tests.test_triton_route import CASES, compare


@pytest.mark.skipif(torch.cuda.is_available(), reason="the shared cases' tensors are on the GPU")
@pytest.mark.parametrize(("spec", "experts", "bias"), CASES, ids=str)
def test_composition(spec: RouteSpec, experts: int, bias: bool) -> None:
    compare(spec, experts, bias, torch.float32, aten.route)


@pytest.mark.parametrize(("spec", "experts", "bias"), CASES, ids=str)
def test_composition_in_float64(spec: RouteSpec, experts: int, bias: bool) -> None:
    rng = torch.Generator().manual_seed(1)
    logits = torch.randn(50, experts + spec.shared, generator=rng, dtype=torch.float64)
    b = torch.randn(experts, generator=rng) if bias else None
    weights, ids = aten.route(logits, b, spec)
    exact, chosen = reference.route(logits, b, spec)
    assert torch.equal(ids, chosen)
    torch.testing.assert_close(weights, exact, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("spec", [CASES[0][0], CASES[4][0], CASES[11][0]], ids=str)
def test_schema_and_fake_kernel(spec: RouteSpec) -> None:
    logits, bias = torch.randn(2, 3, 256 + spec.shared), torch.randn(256)
    torch.library.opcheck(torch.ops.braze.route.default, (logits, bias), asdict(spec))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"groups": 3}, "16 experts in 3 groups"),
        ({"groups": 16, "group_score": "top2", "top_groups": 4}, "top 2 of 1"),
        ({"groups": 8, "top_k": 3}, "3 of 2 experts"),
        ({"top_k": 17}, "17 of 16"),
        ({"shared": 2, "scoring": "sigmoid"}, "for 14 experts"),
    ],
)
def test_tensors_that_do_not_fit(changes: dict[str, Any], reason: str) -> None:
    attributes = {"top_k": 2, **changes}
    with pytest.raises(RuntimeError, match=reason):
        torch.ops.braze.route(torch.randn(4, 16), torch.randn(16), **attributes)


@pytest.mark.parametrize(
    "changes",
    [
        {"scoring": "tanh"}, {"renorm": "max"}, {"closed": "open"}, {"top_k": 0}, {"groups": 2, "top_groups": 3},
        {"shared": 1}, {"eps": -1.0},
    ],
)  # fmt: skip
def test_attributes_that_mean_nothing(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes)).replace("top_groups", "groups")):
        RouteSpec(**{"top_k": 2, **changes})
