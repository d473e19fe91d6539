"""How far a find reaches: operand order, casts, flat batches, sizes, integer types, and the graphs of whole models."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from braze.backend import collect
from braze.kernels.spec import RopeSpec
from braze.passes import rope
from braze.passes.elements import Sizes
from tests import rope_models, tiny
from tests.harness import Fused, assert_close, capture
from tests.test_rope_sites import CASES, HEADS, D, angles, exact, halves, interleaved, query

S = 7


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------- operand order


def partners(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def added(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    return torch.addcmul(x * c, partners(x), s)


def halves_added_to(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """Each half's own product, then the partner's added or taken away in place."""
    first, second = x.chunk(2, -1)
    c, s = c.chunk(2, -1)[0], s.chunk(2, -1)[0]
    return torch.cat(((first * c).addcmul_(second, s, value=-1), (second * c).addcmul_(first, s)), -1)


def negated_by_a_factor(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * c + torch.cat((second * -1, first), -1) * s


def step_by_step(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """In place, on a copy."""
    return x.clone().mul_(c).add_(partners(x) * s)


def less_the_opposite(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    return c * x - s * -partners(x)


ORDERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "tables first": lambda x, c, s: c * x + s * partners(x),
    "the partner's product first": lambda x, c, s: partners(x) * s + x * c,
    "one of each": lambda x, c, s: s * partners(x) + x * c,
    "less the opposite": less_the_opposite,
    "addcmul": added,
    "addcmul of halves": halves_added_to,
    "in place": step_by_step,
    "a sign as a factor": negated_by_a_factor,
    "the sine's sign": lambda x, c, s: x * c - partners(x) * -s,
}


@pytest.mark.parametrize("name", ORDERS)
def test_operand_order_says_nothing(name: str) -> None:
    turn = ORDERS[name]
    x, a = query(), angles()

    def rotate(x: Tensor, a: Tensor) -> Tensor:
        return turn(x, a.cos().repeat(1, 2), a.sin().repeat(1, 2))

    fused = Fused(rotate)
    got = fused(x, a)
    assert [f.form for f in fused.findings] == ["half"], fused.reasons
    assert_close(got, halves(x.double(), a.double()), 1e-6)


# ------------------------------------------------------------------------------------------------------ tables


def test_tables_in_the_querys_dtype_are_read_as_they_are() -> None:
    """No cast of a table is kept: the op has the bfloat16 tensors themselves."""
    x, a = query().bfloat16(), angles()
    args = x, a.cos().bfloat16(), a.sin().bfloat16()

    def rotate(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((first * c - second * s, second * c + first * s), -1)

    (gm,) = capture(rotate, *args)
    (site,), _ = rope.find(gm.graph, Sizes())
    assert [site.x, site.cos, site.sin] == gm.graph.find_nodes(op="placeholder")
    fused = Fused(rotate)
    assert_close(fused(*args), rotate(*(t.double() for t in args)), 8e-3)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions_of_either_integer_type(dtype: torch.dtype) -> None:
    """Rows of a cache of cosines and sines, in the order that positions say, for a flat batch."""
    x, cache, positions = normal(S, HEADS, D), normal(20, D, seed=1), torch.tensor([3, 0, 19, 7, 7, 1, 12], dtype=dtype)

    def rotate(x: Tensor, cache: Tensor, positions: Tensor) -> Tensor:
        cos, sin = cache[positions][:, None].chunk(2, -1)
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    fused = Fused(rotate)
    got = fused(x, cache, positions)
    assert [f.form for f in fused.findings] == ["half"], fused.reasons
    assert_close(got, rotate(x.double(), cache.double(), positions), 1e-6)


# --------------------------------------------------------------------------------------------- layouts and sizes


@pytest.mark.parametrize("name", CASES)
def test_a_flat_batch(name: str) -> None:
    """[T, H, D]: tokens of all sequences in a row."""
    wanted = CASES[name]

    def rotate(x: Tensor, a: Tensor) -> Tensor:
        return wanted.rotate(x.transpose(0, 1), a).transpose(0, 1)  # type: ignore[no-any-return]

    x, a = normal(S, HEADS, D), angles()
    fused = Fused(rotate)
    got = fused(x, a)
    assert [f.form for f in fused.findings] == [wanted.form], fused.reasons
    assert_close(got, exact(wanted.rotate, x.transpose(0, 1), a).transpose(0, 1), 1e-6)


@pytest.mark.parametrize("turn", [halves, interleaved])
@pytest.mark.parametrize(("size", "rotary"), [(32, 32), (80, 20), (96, 6), (128, 64), (192, 192), (256, 2), (512, 512)])
def test_every_head_size_and_even_rotary_size(turn: Callable[..., Tensor], size: int, rotary: int) -> None:
    def rotate(x: Tensor, a: Tensor) -> Tensor:
        return torch.cat((turn(x[..., :rotary], a), x[..., rotary:]), -1)

    x, a = normal(2, 2, S, size), normal(S, rotary // 2, seed=1)
    fused = Fused(rotate)
    got = fused(x, a)
    layout: Any = "half" if turn is halves or rotary == 2 else "interleaved"  # the two are one where there is one pair
    (call,) = [call for r in fused.results for call, _ in r.calls]
    assert RopeSpec(**call.kwargs) == RopeSpec(rotary, 0, layout, layout), fused.reasons
    assert_close(got, rotate(x.double(), a.double()), 1e-6)


# --------------------------------------------------------------------------------------------------- real models


@pytest.mark.parametrize("name", rope_models.ROTATIONS)
def test_a_whole_model(name: str) -> None:
    """Each layer's q and k, by the model's own tables, in the graph of the whole model."""
    forms = rope_models.ROTATIONS[name]
    model, ids = rope_models.build(name), tiny.tokens()

    def run(ids: Tensor, model: Any = model) -> Any:
        out = model(ids, use_cache=False)
        return out.logits if "logits" in out else out.last_hidden_state

    fused = Fused(run)
    got = fused(ids)
    assert sorted(f.form for f in fused.findings if f.kind == "rope") == sorted(forms), fused.reasons
    with torch.no_grad():
        assert_close(got, run(ids, tiny.as_float64(model)), 1e-5)


@pytest.mark.parametrize("name", rope_models.TOWERS)
def test_a_tower_of_pictures(name: str) -> None:
    """Axes of their own, tokens ahead of the picture that pass through, several rotations of one head."""
    *_, argument, shape, forms = rope_models.TOWERS[name]
    model, picture = rope_models.build_tower(name), normal(*shape)

    def run(picture: Tensor, model: Any = model) -> Any:
        return model(**{argument: picture}).last_hidden_state

    fused = Fused(run)
    got = fused(picture)
    assert [f.form for f in fused.findings if f.kind == "rope"] == forms, fused.reasons
    with torch.no_grad():
        assert_close(got, run(picture.double(), tiny.as_float64(model)), 1e-5)


# ----------------------------------------------------------------------------------------------- complex conjugates


def by_complex(x: Tensor, table: Tensor) -> Tensor:
    z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(z * table).flatten(-2)


def test_a_conjugated_table_turns_back() -> None:
    x, a = normal(1, 2, S, D), normal(S, D // 2, seed=1)
    fused = Fused(lambda x, c, s: by_complex(x, torch.complex(c, s).conj()))
    got = fused(x, a.cos(), a.sin())
    assert [f.form for f in fused.findings] == ["interleaved"], fused.reasons
    assert_close(by_complex(got.double(), torch.polar(torch.ones_like(a), a).to(torch.complex128)), x.double(), 1e-6)


def test_the_backward_pass_of_a_complex_rotation_is_one() -> None:
    """It is given the conjugated table itself, of which there is no view."""
    a, grads = normal(S, D // 2, seed=1), []
    with collect() as reports, torch._inductor.config.patch(force_disable_caches=True):
        for dtype, backend in ((torch.float32, "braze"), (torch.float64, "eager")):
            x = normal(1, 2, S, D).to(dtype).requires_grad_()
            table = torch.polar(torch.ones_like(a), a).to(dtype.to_complex())
            torch.compile(by_complex, backend=backend)(x, table).pow(3).sum().backward()
            grads.append(x.grad)
    assert [s.kind for r in reports for s in r.sites] == ["rope", "rope"] and not any(r.errors for r in reports)
    assert_close(*grads, 1e-5)
