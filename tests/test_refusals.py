"""What is almost a rotation or an expert block stays as it was, with a reason, and computes what it did."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from tests.harness import Fused

T, H, INNER, E, K = 6, 16, 12, 5, 2
Layer = Callable[..., Tensor]


def inputs() -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=rng) for s in ((T, H), (E, H), (E, 2 * INNER, H), (E, H, INNER), (E, H))]


def route(x: Tensor, router: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = (x @ router.T).softmax(-1).topk(K)
    return weights, ids


def gathered(
    x: Tensor,
    router: Tensor,
    w1: Tensor,
    w2: Tensor,
    bias: Tensor,
    *,
    columns: Callable[[Tensor], Any] = lambda h: h.chunk(2, -1),
    between: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda a, x, h: a,
    before: Callable[[Tensor, Tensor], Tensor] = lambda y, b: y,
    after: Callable[[Tensor, Tensor], Tensor] = lambda y, b: y,
    combine: Callable[[Tensor], Tensor] = lambda y: y.view(T, K, H).sum(1),
) -> Tensor:
    """A hand-written expert layer of gathered weights, with places to bend it."""
    weights, ids = route(x, router)
    e = ids.flatten()
    rows = x.repeat_interleave(K, 0)
    h = (w1[e] @ rows.unsqueeze(-1)).squeeze(-1)
    gate, up = columns(h)
    a = between(silu(gate) * up, rows, h)
    y = before((w2[e] @ a.unsqueeze(-1)).squeeze(-1), bias[e])
    return combine(after(y * weights.flatten()[:, None], bias[e]))


def test_the_layer_itself_is_found() -> None:
    fused = Fused(gathered)
    args = inputs()
    torch.testing.assert_close(fused(*args), gathered(*args), rtol=1e-4, atol=1e-4)
    assert fused.count("moe") == [1]
    assert "g*u*sigmoid(g)" in fused.findings[0].form


def test_a_bias_before_the_weight_belongs_to_the_block() -> None:
    fused = Fused(lambda *a: gathered(*a, before=lambda y, b: y + b))
    args = inputs()
    torch.testing.assert_close(fused(*args), gathered(*args, before=lambda y, b: y + b), rtol=1e-4, atol=1e-4)
    assert fused.count("moe") == [1]
    assert "biases b2" in fused.findings[0].form


BENT: dict[str, tuple[dict[str, Any], str]] = {
    "bias after the weight": ({"after": lambda y, b: y + b}, "not weighted as they are"),
    "columns neither halves nor interleaved": (
        {"columns": lambda h: (h[:, :INNER], h[:, INNER // 2 : INNER // 2 + INNER])},
        "neither halves nor interleaved",
    ),
    "activation of the input too": ({"between": lambda a, x, h: a * x[:, :INNER]}, "the activation depends on"),
    "activation of three columns": ({"between": lambda a, x, h: a + h[:, 3 : 3 + INNER]}, "depends on 3 elements"),
    "columns turned round": ({"between": lambda a, x, h: a + h.roll(1, 1)[:, :INNER]}, "depends on 3 elements"),
    "columns in an order that data decide": (
        {"between": lambda a, x, h: a + h[:, h[0].argsort()[:INNER]]},
        "an index that is not known",
    ),
    "rows of two tokens added up": ({"combine": lambda y: y.view(K, T, H).sum(0)}, "are no [tokens, slots]"),
    "a maximum instead of a sum": (
        {"combine": lambda y: y.view(T, K, H).amax(1)},
        "not linear in the second product's rows",
    ),
}


@pytest.mark.parametrize("name", BENT)
def test_a_bent_expert_block_is_refused(name: str) -> None:
    bend, reason = BENT[name]
    fused = Fused(lambda *a: gathered(*a, **bend))
    args = inputs()
    torch.testing.assert_close(fused(*args), gathered(*args, **bend), rtol=1e-5, atol=1e-5)
    assert fused.count("moe") == [0]
    assert any(reason in r for r in fused.reasons), fused.reasons
    for result in fused.results:
        assert all("test_refusals.py" in miss.source for miss in result.near_misses)


def test_an_intermediate_that_is_returned_is_kept() -> None:
    def layer(x: Tensor, router: Tensor, w1: Tensor, w2: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        kept: list[Tensor] = []
        out = gathered(x, router, w1, w2, bias, between=lambda a, x, h: kept.append(a) or a)  # type: ignore[func-returns-value]
        return out, kept[0]

    fused = Fused(layer)
    args = inputs()
    for got, expected in zip(fused(*args), layer(*args), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert fused.count("moe") == [0]
    assert any("is also" in r for r in fused.reasons)


def dense(
    x: Tensor, router: Tensor, w1: Tensor, w2: Tensor, bias: Tensor, *, fill: float = float("-inf"), sparse: bool = True
) -> Tensor:
    """Every expert on every token, scores on the input: Llama4's way."""
    logits = x @ router.T
    values, ids = logits.topk(K)
    scores = torch.full_like(logits, fill).scatter(1, ids, values) if sparse else logits
    rows = x[None] * scores.sigmoid().T[:, :, None]
    gate, up = (rows @ w1.transpose(1, 2)).chunk(2, -1)
    return ((silu(gate) * up) @ w2.transpose(1, 2)).sum(0)


@pytest.mark.parametrize(("fill", "sparse", "found"), [(float("-inf"), True, 1), (-1.0, True, 0), (0.0, False, 0)])
def test_dense_experts_are_sparse_only_where_the_rest_is_zero(fill: float, sparse: bool, found: int) -> None:
    fused = Fused(lambda *a: dense(*a, fill=fill, sparse=sparse))
    args = inputs()
    torch.testing.assert_close(fused(*args), dense(*args, fill=fill, sparse=sparse), rtol=1e-4, atol=1e-4)
    assert fused.count("moe") == [found]
    if not found:
        assert any("are no top-k" in r for r in fused.reasons)


# -------------------------------------------------------------------------------------------------- rotations


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def table(size: int = 16) -> tuple[Tensor, Tensor]:
    angle = torch.randn(7, size // 2, generator=torch.Generator().manual_seed(1)).repeat(1, 2)
    return angle.cos(), angle.sin()


ROTATIONS: dict[str, tuple[Layer, bool]] = {
    "half": (lambda x, c, s: x * c + rotate_half(x) * s, True),
    "opposite angle": (lambda x, c, s: x * c - rotate_half(x) * s, True),
    "both signs equal": (lambda x, c, s: x * c + x.roll(8, -1) * s, False),
    "wrong partner": (lambda x, c, s: x * c + torch.cat((-x[..., 8:].flip(-1), x[..., :8].flip(-1)), -1) * s, False),
    "three taps": (lambda x, c, s: x * c + (rotate_half(x) + x.roll(1, -1)) * s, False),
    "a table made of x": (lambda x, c, s: x * x.sum(-1, keepdim=True) + rotate_half(x) * s, False),
    "tokens mixed": (lambda x, c, s: x * c + rotate_half(x.roll(1, -2)) * s, False),
    "a scaled cosine": (lambda x, c, s: x * c * 2 + rotate_half(x) * s, False),
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_only_rotations_are_fused_as_rotations(name: str) -> None:
    rotate, found = ROTATIONS[name]
    x = torch.randn(2, 3, 7, 16, generator=torch.Generator().manual_seed(2))
    fused = Fused(rotate)
    torch.testing.assert_close(fused(x, *table()), rotate(x, *table()), rtol=1e-5, atol=1e-5)
    assert fused.count("rope") == [int(found)]
