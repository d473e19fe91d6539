"""Rotations as projects outside of transformers write them: tables of (cos, sin) pairs, views and signs written again at each
use, matrices of 2 x 2 that the graph fills, complex numbers made of halves, tables repeated for more tokens, rolled heads.

Each with one thing bent stays as it was, and says why.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from tests.harness import Fused, assert_close

B, HEADS, KV, S, D, ROOM = 2, 4, 2, 7, 16, 9
Rotation = Callable[[Tensor, Tensor], Tensor]


def heads(count: int = HEADS) -> Tensor:
    """[B, S, count, D]"""
    return torch.randn(B, S, count, D, generator=torch.Generator().manual_seed(count))


def angles() -> Tensor:
    """[ROOM, D/2]: more positions than there are tokens."""
    return torch.randn(ROOM, D // 2, generator=torch.Generator().manual_seed(0))


def of_pairs(x: Tensor, cache: Tensor) -> Tensor:
    """cache [ROOM, D/2, 2]: what belongs to a pair lies together, and is taken out anew for each of four products."""
    pairs = x.float().unflatten(-1, (-1, 2))
    now = cache[: x.shape[1]].view(1, x.shape[1], 1, D // 2, 2)
    first = pairs[..., 0] * now[..., 0] - pairs[..., 1] * now[..., 1]
    second = pairs[..., 1] * now[..., 0] + pairs[..., 0] * now[..., 1]
    return torch.stack((first, second), -1).flatten(3).to(x.dtype)


def pairs_of(a: Tensor) -> Tensor:
    return torch.stack((a.cos(), a.sin()), -1)


def negated_where_used(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Tables [ROOM, D/2], cut for each use, the sign before sin and not between products."""
    n = x.shape[1]
    a, b = x.chunk(2, -1)
    first = a * cos[None, :n, None] + b * sin[None, :n, None]
    return torch.cat((first, a * -sin[None, :n, None] + b * cos[None, :n, None]), -1)


def matrices(a: Tensor, swapped: bool = False, doubled: bool = False) -> Tensor:
    """[S, D/2, 2, 2], made of two axes' angles in float64."""
    a = a[:S].double()
    parts = []
    for one in a.split((D // 8, D // 2 - D // 8), -1):
        last = (2 * one).cos() if doubled else one.cos()
        rows = torch.stack((one.cos(), one.sin() if swapped else -one.sin(), one.sin(), last), -1)
        parts.append(rows.unflatten(-1, (2, 2)).float())
    return torch.cat(parts, -3)


def by_matrices(x: Tensor, m: Tensor) -> Tensor:
    pairs = x.float().transpose(1, 2).reshape(B, -1, S, D // 2, 1, 2)
    turned = m[..., 0] * pairs[..., 0] + m[..., 1] * pairs[..., 1]
    return turned.reshape(B, -1, S, D).to(x.dtype)


def complex_halves(x: Tensor, table: Tensor) -> Tensor:
    z = torch.complex(*x.float().chunk(2, -1)) * table[:S, None]
    return torch.cat((z.real, z.imag), -1).to(x.dtype)


def repeated(x: Tensor, table: Tensor, part: int = S - 1) -> Tensor:
    """Three tokens' complex table for six tokens; the last token is not turned."""
    turned = x[:, :part].clone()
    z = torch.view_as_complex(turned.float().unflatten(-1, (-1, 2)))
    z = z * table[: part // 2, None].repeat(2, 1, 1)
    out = x.clone()
    out[:, :part] = torch.view_as_real(z).flatten(3)
    return out


def rolled(x: Tensor, a: Tensor, by: int = D // 2) -> Tensor:
    """The sign of sin stands in the table that the graph makes."""
    cos, sin = a[:S, None].cos().repeat(1, 1, 2), torch.cat((-a[:S, None].sin(), a[:S, None].sin()), -1)
    return x * cos + torch.roll(x, by, -1) * sin


def flipped(x: Tensor, a: Tensor) -> Tensor:
    sin = torch.stack((-a[:S, None].sin(), a[:S, None].sin()), -2)
    pairs = x.unflatten(-1, (2, D // 2))
    return (pairs * a[:S, None, None].cos() + pairs.flip(-2) * sin).flatten(-2)


FOUND: dict[str, tuple[Rotation, str]] = {
    "tables of pairs": (lambda x, a: of_pairs(x, pairs_of(a)), "interleaved"),
    "signs and slices at each use": (lambda x, a: negated_where_used(x, a.cos(), a.sin()), "half, opposite angle"),
    "matrices made in the graph": (lambda x, a: by_matrices(x, matrices(a)), "interleaved"),
    "complex numbers of halves": (lambda x, a: complex_halves(x, torch.polar(torch.ones_like(a), a)), "half"),
    "e to the power of i a": (lambda x, a: complex_halves(x, torch.exp(1j * a)), "half"),
    "a complex table repeated": (lambda x, a: repeated(x, torch.polar(torch.ones_like(a), a)), "interleaved"),
    "rolled": (rolled, "half"),
    "flipped": (flipped, "half"),
}


def exact(rotate: Rotation, x: Tensor, a: Tensor) -> Tensor:
    """In float64, but for what the rotation itself does in float32."""
    return rotate(x.double(), a.double()).double()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", FOUND)
def test_rotations_as_projects_write_them(name: str, dtype: torch.dtype) -> None:
    rotate, form = FOUND[name]
    x, y, a = heads().to(dtype), heads(KV).to(dtype), angles()
    fused = Fused(lambda x, y, a: (rotate(x, a), rotate(y, a)))
    got = fused(x, y, a)
    assert fused.count("rope") == [2], fused.reasons
    assert {f.form for f in fused.findings} == {form}
    for out, source in zip(got, (x, y), strict=True):
        assert_close(out, exact(rotate, source, a), 1e-6 if dtype == torch.float32 else 2.0**-6)


@pytest.mark.parametrize("make", (pairs_of, lambda a: (a.cos(), a.sin())))
def test_tables_that_are_given(make: Callable[[Tensor], Any]) -> None:
    tables = make(angles())
    rotate = of_pairs if isinstance(tables, Tensor) else lambda x, t: negated_where_used(x, *t)
    fused = Fused(rotate)
    got = fused(heads(), tables)
    assert fused.count("rope") == [1], fused.reasons
    wide = make(angles().double())
    assert_close(got, rotate(heads().double(), wide).double(), 1e-6)


def test_a_norm_before_tables_cut_at_each_use() -> None:
    rotate = lambda x, a: negated_where_used(rms_norm(x, (D,)), a.cos(), a.sin())  # noqa: E731
    fused = Fused(rotate)
    got = fused(heads(), angles())
    assert [f.form for f in fused.findings] == ["half, opposite angle, rms_norm before (eps 1.19209e-07)"]
    # float64's own epsilon is another, and too small to show
    assert_close(got, rotate(heads().double(), angles().double()), 1e-6)


def pairs_the_wrong_way(x: Tensor, a: Tensor) -> Tensor:
    pairs, now = x.unflatten(-1, (-1, 2)), pairs_of(a)[None, :S, None]
    first = pairs[..., 0] * now[..., 0] - pairs[..., 1] * now[..., 1]
    return torch.stack((first, pairs[..., 1] * now[..., 1] + pairs[..., 0] * now[..., 0]), -1).flatten(3)


def scaled_by_position(x: Tensor, a: Tensor) -> Tensor:
    """xPos: the tables are multiplied by one of the positions after they were by the head."""
    scale = (torch.arange(S) - 3)[:, None, None].exp().to(x.dtype)
    p, q = x.chunk(2, -1)
    cos, sin = a[:S, None].cos(), a[:S, None].sin()
    return torch.cat((p * cos * scale - q * sin * scale, q * cos * scale + p * sin * scale), -1)


REFUSED: dict[str, tuple[Rotation, str]] = {
    "matrices that are symmetric": (lambda x, a: by_matrices(x, matrices(a, swapped=True)), "not opposite"),
    "matrices of two angles": (lambda x, a: by_matrices(x, matrices(a, doubled=True)), "no table holds"),
    "rolled by a quarter": (lambda x, a: rolled(x, a, D // 4), "pairs are neither halves nor neighbours"),
    "cos and sin exchanged in one row": (pairs_the_wrong_way, ""),
    "a scale of the positions": (scaled_by_position, "a product of several tensors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_bent_stays_as_it_was_and_says_why(name: str) -> None:
    rotate, reason = REFUSED[name]
    fused = Fused(rotate)
    got = fused(heads(), angles())
    assert fused.count("rope") == [0], [f.form for f in fused.findings]
    assert any(reason in r for r in fused.reasons) or not reason, fused.reasons
    assert_close(got, exact(rotate, heads(), angles()), 1e-6)


def test_matrices_that_are_given_could_be_anything() -> None:
    """That they turn shows in their values only, which a graph does not know."""
    fused = Fused(by_matrices)
    got = fused(heads(), matrices(angles()))
    assert fused.count("rope") == [0]
    assert fused.reasons == ["the signs of the two halves are not opposite, as far as they show"]
    assert_close(got, by_matrices(heads(), matrices(angles())).double(), 1e-6)
