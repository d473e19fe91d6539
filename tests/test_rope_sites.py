"""Rotations written by hand from their formulas, in every spelling: one normal form each, and the numbers unchanged.

The angles are random and each has its own value, so that a table read wrongly shows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from braze.kernels.spec import RopeSpec
from braze.passes import rope
from braze.passes.elements import Sizes
from tests.harness import Fused, assert_close, capture

B, HEADS, S, D = 2, 3, 7, 16
Rotation = Callable[..., Any]


def query(*shape: int) -> Tensor:
    return torch.randn(shape or (B, HEADS, S, D), generator=torch.Generator().manual_seed(0))


def angles(width: int = D // 2) -> Tensor:
    return torch.randn(S, width, generator=torch.Generator().manual_seed(1))


def halves(x: Tensor, a: Tensor) -> Tensor:
    """rotate_half with tables of the whole head, the two halves equal."""
    c, s = a.cos().repeat(1, 2), a.sin().repeat(1, 2)
    first, second = x.chunk(2, -1)
    return x * c + torch.cat((-second, first), -1) * s


def split_subtract(x: Tensor, a: Tensor) -> Tensor:
    first, second = x.split(x.shape[-1] // 2, -1)
    c, s = a.cos(), a.sin()
    return torch.cat((first * c - second * s, second * c + first * s), -1)


def sign_swapped(x: Tensor, a: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    c, s = a.cos(), a.sin()
    return torch.cat((first * c + second * s, second * c - first * s), -1)


def interleaved(x: Tensor, a: Tensor) -> Tensor:
    even, odd = x[..., ::2], x[..., 1::2]
    c, s = a.cos(), a.sin()
    return torch.stack((even * c - odd * s, odd * c + even * s), -1).flatten(-2)


def rotate_every_two(x: Tensor, a: Tensor) -> Tensor:
    c, s = a.cos().repeat_interleave(2, -1), a.sin().repeat_interleave(2, -1)
    return x * c + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * s


def complex_product(x: Tensor, a: Tensor) -> Tensor:
    z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(z * torch.polar(torch.ones_like(a), a)).flatten(-2).type_as(x)


def pairs_to_halves(x: Tensor, a: Tensor) -> Tensor:
    """DeepSeek's: neighbours come in, halves go out."""
    even, odd = x[..., ::2], x[..., 1::2]
    c, s = a.cos(), a.sin()
    return torch.cat((even * c - odd * s, odd * c + even * s), -1)


def leading(x: Tensor, a: Tensor) -> Tensor:
    return torch.cat((halves(x[..., :8], a[:, :4]), x[..., 8:]), -1)


def trailing(x: Tensor, a: Tensor) -> Tensor:
    return torch.cat((x[..., :10], interleaved(x[..., 10:], a[:, :3])), -1)


def in_place(x: Tensor, a: Tensor) -> Tensor:
    c, s = a.cos(), a.sin()
    out = torch.empty_like(x)
    out[..., :8] = x[..., :8] * c - x[..., 8:] * s
    out[..., 8:] = x[..., 8:] * c + x[..., :8] * s
    return out


@dataclass(frozen=True)
class Case:
    rotate: Rotation
    form: str
    spec: RopeSpec


def case(rotate: Rotation, form: str, rotary: int = D, **attributes: Any) -> Case:
    return Case(rotate, form, RopeSpec(rotary, out_dtype=torch.float32, **attributes))


NEIGHBOURS = {"layout_in": "interleaved", "layout_out": "interleaved"}
CASES = {
    "halves": case(halves, "half"),
    "split and subtract": case(split_subtract, "half"),
    "signs swapped": case(sign_swapped, "half, opposite angle", inverse=True),
    "neighbours": case(interleaved, "interleaved", **NEIGHBOURS),
    "rotate every two": case(rotate_every_two, "interleaved", **NEIGHBOURS),
    "complex": case(complex_product, "interleaved", **NEIGHBOURS),
    "neighbours in, halves out": case(pairs_to_halves, "interleaved to half", layout_in="interleaved"),
    "leading part": case(leading, "half, partial 8 of 16", 8),
    "trailing part": case(trailing, "interleaved, partial [10:16] of 16", 6, start=10, **NEIGHBOURS),
    "written into slices": case(in_place, "half"),
}


def exact(rotate: Rotation, x: Tensor, a: Tensor) -> Tensor:
    """The formula in float64; the complex spelling's own cast is the neighbours' formula without one."""
    rotate = interleaved if rotate is complex_product else rotate
    return rotate(x.double(), a.double())  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CASES)
def test_every_spelling_has_its_normal_form(name: str) -> None:
    wanted = CASES[name]
    (gm,) = capture(wanted.rotate, query(), angles())
    sites, misses = rope.find(gm.graph, Sizes())
    assert [s.spec for s in sites] == [wanted.spec]
    assert misses == []
    (site,) = sites
    placeholders = gm.graph.find_nodes(op="placeholder")
    assert site.x in placeholders
    assert site.cos is not site.sin
    assert site.cos.meta["val"].shape[-1] in (wanted.spec.rotary_dim, wanted.spec.rotary_dim // 2)


@pytest.mark.parametrize("name", CASES)
def test_the_fused_graph_computes_the_same(name: str) -> None:
    wanted = CASES[name]
    x, a = query(), angles()
    fused = Fused(wanted.rotate)
    got = fused(x, a)
    assert [f.form for f in fused.findings] == [wanted.form], fused.reasons
    assert "agree" in fused.findings[0].proof
    assert "test_rope_sites.py" in fused.findings[0].source
    assert_close(got, exact(wanted.rotate, x, a), 1e-6)


@pytest.mark.parametrize("name", CASES)
def test_tokens_next_to_heads(name: str) -> None:
    """[B, S, H, D], the angles broadcast over heads in the middle, S growing: the second call's graph is dynamic."""
    wanted = CASES[name]

    def rotate(x: Tensor, a: Tensor) -> Tensor:
        return wanted.rotate(x.transpose(1, 2), a).transpose(1, 2)  # type: ignore[no-any-return]

    fused = Fused(rotate)
    for tokens in (S, 5, 11):
        x = query(B, tokens, HEADS, D)
        a = torch.randn(tokens, D // 2, generator=torch.Generator().manual_seed(tokens))
        assert_close(fused(x, a), exact(wanted.rotate, x.transpose(1, 2), a).transpose(1, 2), 1e-6)
    assert fused.count("rope") == [1, 1], fused.reasons
    assert {f.form for f in fused.findings} == {wanted.form}


def test_queries_and_keys_of_different_heads_feed_attention() -> None:
    """The rotations' outputs are rewired where they are used, not only where they are returned."""

    def scores(q: Tensor, k: Tensor, a: Tensor) -> Tensor:
        k = halves(k, a).repeat_interleave(3, 1)
        return halves(q, a) @ k.transpose(-1, -2)

    q, k, a = query(B, 6, S, D), query(B, 2, S, D), angles()
    fused = Fused(scores)
    got = fused(q, k, a)
    assert fused.count("rope") == [2]
    assert sorted(f.dims["shape"][1] for f in fused.findings) == [2, 6]
    assert_close(got, scores(q.double(), k.double(), a.double()), 1e-6)


def test_low_precision_is_rotated_in_float32() -> None:
    x, a = query().bfloat16(), angles()
    fused = Fused(lambda x, a: halves(x.float(), a).to(x.dtype))
    got = fused(x, a)
    assert got.dtype == torch.bfloat16
    assert [f.dims["dtype"] for f in fused.findings] == ["bfloat16"]
    assert_close(got, halves(x.double(), a.double()), 4e-3)


def test_one_rotation_after_another_is_two() -> None:
    """There and back again: neither takes the other's work for its own."""
    x, a = query(), angles()
    fused = Fused(lambda x, a: sign_swapped(halves(x, a).relu(), a))
    got = fused(x, a)
    assert sorted(f.form for f in fused.findings) == ["half", "half, opposite angle"]
    assert_close(got, sign_swapped(halves(x.double(), a.double()).relu(), a.double()), 1e-6)


def test_heads_of_different_layouts_are_rotated_each_in_its_own() -> None:
    def rotate(x: Tensor, a: Tensor) -> Tensor:
        return torch.cat((halves(x[:, :1], a), interleaved(x[:, 1:], a)), 1)

    x, a = query(), angles()
    fused = Fused(rotate)
    got = fused(x, a)
    assert sorted((f.form, f.dims["shape"][1]) for f in fused.findings) == [("half", 1), ("interleaved", 2)]
    assert_close(got, rotate(x.double(), a.double()), 1e-6)


def test_pairs_shuffled_before_the_rotation_are_turned_once() -> None:
    """DeepSeek's older spelling moves neighbours into halves with views first."""

    def rotate(x: Tensor, a: Tensor) -> Tensor:
        return halves(x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), a)

    x, a = query(), angles()
    fused = Fused(rotate)
    got = fused(x, a)
    assert fused.count("rope") == [1]
    assert_close(got, pairs_to_halves(x.double(), a.double()), 1e-6)


# ----------------------------------------------------------------------------------- where tables and heads are from


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def cosines_twice(x: Tensor, a: Tensor) -> Tensor:
    """Nothing merges what a model computes twice, unless it is trained."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * a.cos() - second * a.sin(), second * a.cos() + first * a.sin()), -1)


def yarn(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Tables from positions, scaled."""
    a = positions[:, None, :, None].to(inv_freq.dtype) * inv_freq
    a = torch.cat((a, a), -1)
    return turned(x, a.cos() * 1.2, a.sin() * 1.2)


def mrope(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Positions [3, B, S]; each axis turns sections of the head in one piece."""
    a = positions[..., None].to(inv_freq.dtype) * inv_freq
    a = torch.cat((a, a), -1)
    cos, sin = (
        torch.cat([part[n % 3] for n, part in enumerate(t.split([2, 3, 3] * 2, -1))], -1)[:, None]
        for t in (a.cos(), a.sin())
    )
    return turned(x, cos, sin)


def mrope_interleaved(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Each axis turns every third pair."""
    a = positions[..., None].to(inv_freq.dtype) * inv_freq
    mixed = a[0].clone()
    for axis in (1, 2):
        mixed[..., axis:6:3] = a[axis][..., axis:6:3]
    mixed = torch.cat((mixed, mixed), -1)[:, None]
    return turned(x, mixed.cos(), mixed.sin())


def cached(x: Tensor, cache: Tensor, positions: Tensor) -> Tensor:
    """[T, H, D], its tables rows of a cache of cosines and sines side by side."""
    cos, sin = cache[positions].chunk(2, -1)
    first, second = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def packed(qkv: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Equal heads side by side in one projection."""
    q, k, v = qkv.view(B, S, 3, HEADS, D).unbind(2)
    return halves(q.transpose(1, 2), a), halves(k.transpose(1, 2), a), v


def packed_unequal(qkv: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.split([4 * D, 2 * D, 2 * D], -1)
    q, k = q.view(B, S, 4, D).transpose(1, 2), k.view(B, S, 2, D).transpose(1, 2)
    return halves(q, a), interleaved(k, a), v


def learned(x: Tensor, a: Tensor, weight: Tensor) -> Tensor:
    """Coefficients that differ from head to head."""
    c, s = a.cos().repeat(1, 2) * weight[:, None], a.sin().repeat(1, 2) * weight[:, None]
    return turned(x, c, s)


def into_a_slice(x: Tensor, a: Tensor) -> Tensor:
    x = x.clone()
    x[..., 4:12] = interleaved(x[..., 4:12], a[:, :4])
    return x


def in_float64(x: Tensor, a: Tensor) -> Tensor:
    return halves(x.double(), a.double()).to(x.dtype)


def shuffled(x: Tensor, a: Tensor) -> Tensor:
    """DeepSeek's: neighbours moved into halves with views."""
    return halves(x.view(B, HEADS, S, D // 2, 2).transpose(4, 3).reshape(B, HEADS, S, D), a)


POSITIONS = torch.randint(0, 9, (3, B, S), generator=torch.Generator().manual_seed(3))
FREQUENCIES = torch.rand(D // 2, generator=torch.Generator().manual_seed(4))
OTHER = torch.randn(S, D // 2, generator=torch.Generator().manual_seed(5))
PASSED: dict[str, tuple[Rotation, tuple[Tensor, ...], list[str]]] = {
    "cosines written twice": (cosines_twice, (query(), angles()), ["half"]),
    "tables passed in": (turned, (query(), angles().repeat(1, 2).cos(), angles().repeat(1, 2).sin()), ["half"]),
    "yarn, positions in the graph": (yarn, (query(), POSITIONS[0], FREQUENCIES), ["half"]),
    "yarn, positions in int32": (yarn, (query(), POSITIONS[0].int(), FREQUENCIES), ["half"]),
    "mrope": (mrope, (query(), POSITIONS, FREQUENCIES), ["half"]),
    "mrope interleaved": (mrope_interleaved, (query(), POSITIONS, FREQUENCIES), ["half"]),
    "rows of a cache": (cached, (query(S, HEADS, D), torch.randn(20, D), POSITIONS[0, 0]), ["half"]),
    "packed q, k and v": (packed, (query(B, S, 3 * HEADS * D), angles()), ["half"] * 2),
    "packed, heads unequal": (packed_unequal, (query(B, S, 8 * D), angles()), ["half", "interleaved"]),
    "coefficients of a head": (learned, (query(), angles(), query(HEADS, D)), ["half"]),
    "into a slice": (into_a_slice, (query(), angles()), ["interleaved, partial [4:12] of 16"]),
    "float64": (in_float64, (query(), angles()), ["half"]),
    "shuffled with views": (shuffled, (query(), angles()), ["interleaved to half"]),
    "one token": (halves, (query(B, HEADS, 1, D), angles()[:1]), ["half"]),
    "one head": (halves, (query(B, 1, S, D), angles()), ["half"]),
    "two one after the other": (lambda x, a, b: halves(halves(x, a), b), (query(), angles(), OTHER), ["half"] * 2),
    "two side by side": (
        lambda x, a, b: torch.cat((halves(x[..., :8], a[:, :4]), interleaved(x[..., 8:], b[:, :4])), -1),
        (query(), angles(), OTHER),
        ["half", "interleaved"],
    ),
}


@pytest.mark.parametrize("name", PASSED)
def test_wherever_tables_and_heads_are_from(name: str) -> None:
    rotate, inputs, forms = PASSED[name]
    fused = Fused(rotate)
    got = fused(*inputs)
    assert sorted(f.form for f in fused.findings) == forms, fused.reasons
    assert fused.reasons == []
    exact = rotate(*(t.double() if t.is_floating_point() else t for t in inputs))
    pairs = zip(got, exact, strict=True) if isinstance(got, tuple) else ((got, exact),)
    for a, b in pairs:
        assert_close(a, b, 2e-6)


# --------------------------------------------------------------------------------------------------- refusals


def bent(
    x: Tensor,
    a: Tensor,
    *,
    signs: tuple[int, int] = (-1, 1),
    partner: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda first, second: (second, first),
) -> Tensor:
    """The formula of halves, with places to bend it. partner: what sin multiplies in each half."""
    first, second = x.chunk(2, -1)
    to_first, to_second = partner(first, second)
    c, s = a.cos(), a.sin()
    return torch.cat((first * c + to_first * s * signs[0], second * c + to_second * s * signs[1]), -1)


def ring(x: Tensor, a: Tensor) -> Tensor:
    """Five elements turned in a ring: two taps each, and no pairs."""
    part, a = x[..., :5], a[:, :5]
    after = torch.cat((part[..., 1:], part[..., :1]), -1)
    return torch.cat((part * a.cos() - after * a.sin(), x[..., 5:]), -1)


def swapped(t: Tensor) -> Tensor:
    """[0, 1, 2, ...] -> [1, 0, 3, 2, ...] along the last dimension."""
    return torch.stack((t[..., 1::2], t[..., ::2]), -1).flatten(-2)


def next_token(t: Tensor) -> Tensor:
    return torch.cat((t[..., 1:, :], t[..., :1, :]), -2)


REFUSED: dict[str, tuple[Rotation, str]] = {
    "both signs negative": (lambda x, a: bent(x, a, signs=(-1, -1)), "the signs of the two halves are not opposite"),
    "both signs positive": (lambda x, a: bent(x, a, signs=(1, 1)), "the signs of the two halves are not opposite"),
    "odd rotary size": (ring, "the rotary size 5 is odd"),
    "partners swapped": (
        lambda x, a: bent(x, a, partner=lambda first, second: (swapped(second), swapped(first))),
        "its pairs are neither halves nor neighbours",
    ),
    "the next token's partner": (
        lambda x, a: bent(x, a, partner=lambda first, second: (next_token(second), next_token(first))),
        "",
    ),
    "three taps": (
        lambda x, a: bent(x, a, partner=lambda first, second: (second + swapped(first), first + swapped(second))),
        "",
    ),
    "one tap in both coefficients": (
        lambda x, a: bent(x, a, partner=lambda first, second: (second + first, first + second)),
        "a coefficient is a sum of several terms",
    ),
    "a partner twice as large": (
        lambda x, a: bent(x, a, partner=lambda first, second: (second * 2, first * 2)),
        "",
    ),
    "a partner squared": (
        lambda x, a: bent(x, a, partner=lambda first, second: (second * second, first * first)),
        "",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_rotation_stays_as_it_was(name: str) -> None:
    rotate, reason = REFUSED[name]
    x, a = query(), angles()
    fused = Fused(rotate)
    got = fused(x, a)
    assert fused.count("rope") == [0], [f.form for f in fused.findings]
    assert any(reason in r for r in fused.reasons) or not reason, fused.reasons
    assert_close(got, rotate(x.double(), a.double()), 1e-6)


def test_the_formula_that_is_bent_is_a_rotation() -> None:
    """What gives the refusals above their meaning."""
    x, a = query(), angles()
    fused = Fused(bent)
    assert_close(fused(x, a), halves(x.double(), a.double()), 1e-6)
    assert [f.form for f in fused.findings] == ["half"]


def test_a_scaled_table_is_a_table_like_any_other() -> None:
    """YaRN scales both tables; the op asks nothing of them, so a scale of one alone is theirs too."""

    def rotate(x: Tensor, a: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        c, s = a.cos() * 1.5, a.sin() * 0.5
        return torch.cat((first * c - second * s, second * c + first * s), -1)

    x, a = query(), angles()
    fused = Fused(rotate)
    assert_close(fused(x, a), rotate(x.double(), a.double()), 1e-6)
    assert [f.form for f in fused.findings] == ["half"]


def test_a_rotation_that_is_computed_twice_is_one() -> None:
    def turned(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((first * c - second * s, second * c + first * s), -1)

    def both(x: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return turned(x, c, s) * 2, turned(x, c, s).sum(-1)

    def changed(x: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        x = x * 1.0
        first = turned(x, c, s)
        x.add_(1)
        return first, turned(x, c, s)

    args = (query(), angles().cos(), angles().sin())
    for f, number in ((both, 1), (changed, 2)):
        fused = Fused(f)
        for got, exact in zip(fused(*args), f(*(t.double() for t in args)), strict=True):
            assert_close(got, exact, 1e-6)
        assert fused.count("rope") == [number]
