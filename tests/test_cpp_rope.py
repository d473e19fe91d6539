"""The rotation in C++ on CPU against float64: every form, in heads of many sizes, by itself and inside compiled graphs."""

from typing import Any

import pytest
import torch
from torch import Tensor

import braze  # noqa: F401  (defines the op)
from braze.backend import collect
from braze.kernels import reference
from braze.kernels.cpp import rope
from braze.kernels.spec import NormSpec, RopeSpec
from braze.kernels.turning import Norm, Rows
from tests.harness import assert_close

BOTH = {"layout_in": "interleaved", "layout_out": "interleaved"}
FORMS: dict[str, tuple[RopeSpec, int]] = {
    "half": (RopeSpec(128), 128),
    "half of 32": (RopeSpec(32), 32),
    "half of 80, opposite": (RopeSpec(80, inverse=True), 80),
    "half of 512": (RopeSpec(512), 512),
    "leading": (RopeSpec(24), 96),
    "in the middle": (RopeSpec(70, start=5), 128),
    "two elements": (RopeSpec(2, start=30), 64),
    "neighbours": (RopeSpec(128, **BOTH), 128),  # type: ignore[arg-type]
    "neighbours, trailing, opposite": (RopeSpec(66, 30, inverse=True, **BOTH), 96),  # type: ignore[arg-type]
    "neighbours to halves": (RopeSpec(64, layout_in="interleaved"), 64),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tables(spec: RopeSpec, batch: int, wide: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[batch, 11, R or R/2]; those of pairs lie two apart, as a complex table's parts do."""
    width = spec.rotary_dim if wide else spec.rotary_dim // 2
    both = normal(batch, 11, width, 2, seed=7).to(dtype)
    return (both[..., 0].contiguous(), both[..., 1].contiguous()) if wide else (both[..., 0], both[..., 1])


def exact(x: Tensor, cos: Tensor, sin: Tensor, spec: RopeSpec, norm: Norm | None, weight: Tensor | None) -> Tensor:
    """[B, H, S, D] in float64"""
    x = x.double()
    if norm is not None:
        spec64 = NormSpec(norm.eps, norm.add_one, torch.float64)
        x = reference.rms_norm(x, None if weight is None else weight.double(), spec64)
    plain = RopeSpec(spec.rotary_dim, spec.start, spec.layout_in, spec.layout_out, spec.inverse)
    return reference.rope(x, cos.double()[:, None], sin.double()[:, None], plain)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("normed", ["", "norm", "weight", "1 + weight"])
def test_every_form(name: str, normed: str) -> None:
    """q and k together, of a projection of several or row-major, by tables of each kind."""
    spec, size = FORMS[name]
    weighted = "weight" in normed
    for n, (wide, dtype) in enumerate(((True, torch.float32), (False, torch.float32), (True, torch.bfloat16))):
        packed = normal(2, 11, 26, size, seed=n).bfloat16().transpose(1, 2)
        q, k = packed[:, 1:20], packed[:, 20:22]
        q, k = (q, k) if n else (q.contiguous(), k.contiguous())
        cos, sin = tables(spec, 1 + n % 2, wide, dtype)
        weights = [
            normal(size, seed=m).to(torch.bfloat16 if n else torch.float32) if weighted else None for m in (3, 4)
        ]
        norm = Norm(1e-5, *weights, normed == "1 + weight") if normed else None
        assert rope.supports(q, cos, sin, spec, weights[0]) is None
        got = rope.run(q, k, cos, sin, spec, norm=norm)
        for result, x, weight in zip(got, (q, k), weights, strict=True):
            assert result is not None and result.dtype == torch.bfloat16
            assert_close(result, exact(x, cos, sin, spec, norm, weight), 4e-3)
        alone, none = rope.run(q, None, cos, sin, spec, norm=norm)
        assert torch.equal(alone, got[0]) and none is None
        if spec.layout_in == spec.layout_out:
            rope.run(q, k, cos, sin, spec, norm=norm, outs=(q, k))
            assert torch.equal(q, got[0]) and torch.equal(k, got[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [2, 6, 32, 48, 80, 96, 112, 128, 192, 256, 320, 512])
@pytest.mark.parametrize(
    ("dtype", "out"), [(torch.float32, None), (torch.float16, None), (torch.bfloat16, torch.float32)]
)
def test_every_dtype_and_head_size(dtype: torch.dtype, out: torch.dtype | None, size: int) -> None:
    for spec in (RopeSpec(size, out_dtype=out), RopeSpec(max(2, size // 6 * 2), size // 3, out_dtype=out, **BOTH)):  # type: ignore[arg-type]
        q, k = (
            normal(2, 11, 3, size).to(dtype).transpose(1, 2),
            normal(2, 11, 1, size, seed=1).to(dtype).transpose(1, 2),
        )
        cos, sin = tables(spec, 2, True, dtype)
        norm = Norm(1e-6, normal(size, seed=2).to(dtype), normal(size, seed=3).to(dtype))
        for n in (None, norm):
            got = rope.run(q, k, cos, sin, spec, norm=n)
            for result, x, weight in zip(got, (q, k), (norm.q_weight, norm.k_weight), strict=True):
                assert result is not None and result.dtype == (out or dtype)
                bound = {torch.float32: 2e-6, torch.float16: 5e-4}.get(out or dtype, 4e-3)
                assert_close(result, exact(x, cos, sin, spec, n, weight), bound)


ROWS = [
    torch.tensor([6, 0, -3, 1, 2, 3, 4, 7, 8, 9, 10]),
    torch.tensor([6, 0, 5, 1, 2, 3, 4, 7, 8, 9, 10], dtype=torch.int32),
    None,
]


@pytest.mark.parametrize("index", ROWS, ids=str)
def test_rows_of_a_cache(index: Tensor | None) -> None:
    """k's tokens go to rows of a cache, whose other elements stay; q's as usual."""
    spec = RopeSpec(32)
    q, k = normal(2, 3, 11, 48), normal(2, 2, 11, 48, seed=1)
    cos, sin = tables(spec, 2, True, torch.float32)
    cache = normal(2, 16, 2, 48, seed=5)
    wanted = cache.double()
    rows = (
        Rows(cache, (16 * 96, 96, 48), 16, 4) if index is None else Rows(cache, (16 * 96, 96, 48), 16, 0, index, (0, 1))
    )
    turned = exact(k, cos, sin, spec, None, None).transpose(1, 2)
    wanted[:, torch.arange(4, 15) if index is None else index.long()] = turned
    got, whole = rope.run(q, k, cos, sin, spec, rows=rows)
    assert whole is cache
    torch.testing.assert_close(cache.double(), wanted, rtol=2e-6, atol=2e-6)
    assert_close(got, exact(q, cos, sin, spec, None, None), 2e-6)


def test_what_it_does_not_take() -> None:
    x, (cos, sin) = normal(1, 2, 11, 64).bfloat16(), tables(RopeSpec(64), 1, True, torch.float32)
    for words, args in {
        "float64": (x.double(), cos, sin, RopeSpec(64)),
        "to torch.float64": (x, cos, sin, RopeSpec(64, out_dtype=torch.float64)),
        "tables": (x, cos.double(), sin.double(), RopeSpec(64)),
        "widths": (x, cos[..., :20], sin[..., :20], RopeSpec(64)),
        "contiguous": (x.transpose(2, 3)[:, :, :, :11], cos, sin, RopeSpec(64)),
        "exceeds": (normal(1, 1, 2, 1024).bfloat16(), cos, sin, RopeSpec(64)),
    }.items():
        assert words in str(rope.supports(*args))


# ------------------------------------------------------------------------------------------------ in compiled graphs

EPS = 1e-6


def normed(x: Tensor, weight: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


def heads_first(h: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, H, S, D] of a projection, normed."""
    return half(normed(h.unflatten(-1, (-1, 64)), weight).transpose(1, 2), cos, sin)


def tokens_first(h: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, S, H, D]"""
    return neighbours(h.unflatten(-1, (-1, 64)), cos[:, None, :32], sin[:, None, :32])


def scaled(h: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[T, H, D], halves without a norm, and a product after them."""
    return half(h[0].unflatten(-1, (-1, 64)), cos[:, None], sin[:, None]) * weight


@pytest.mark.parametrize("graph", [heads_first, tokens_first, scaled])
def test_one_call_but_for_loops_that_go_on(graph: Any) -> None:
    """The third length's graph has symbolic sizes."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: graph(*a), backend="braze")
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True), collect() as reports:
        for tokens in (160, 200, 333, 1):
            angle = normal(tokens, 32, seed=tokens).repeat(1, 2)
            h = normal(1, tokens, 8 * 64, seed=1).bfloat16()
            args = h, normal(64, seed=2).bfloat16(), angle.cos().bfloat16(), angle.sin().bfloat16()
            got = compiled(*args)
            assert_close(got, graph(*(a.double() for a in args)), 6e-3)
    assert [s.kernel for r in reports for s in r.sites] == ["pointwise" if graph is scaled else "cpp"] * 3


def test_it_is_there_when_asked_for() -> None:
    angle = normal(3, 32).repeat(1, 2)
    args = [t.bfloat16() for t in (normal(1, 3, 2 * 64), normal(64), angle.cos(), angle.sin())]
    for kernel, chosen in (("cpp", "cpp"), ("pointwise", "pointwise"), ("auto", "pointwise")):
        torch._dynamo.reset()
        options = {"kernel": {"rope": kernel}, "require": ["rope"]}
        with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True), collect() as reports:
            got = torch.compile(lambda *a: scaled(*a), backend="braze", options=options)(*args)
        assert_close(got, scaled(*(a.double() for a in args)), 6e-3)
        assert [s.kernel for s in reports[0].sites] == [chosen]
