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


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("normed", ["", "norm", "weight", "1 + weight"])
def test_every_form(name: str, normed: str) -> None:
    spec, size = FORMS[name]
    norm = NormSpec(1e-5, normed == "1 + weight", torch.bfloat16) if normed else None
    weight = normal(size, seed=3) if "weight" in normed else None
    for n, (wide, dtype) in enumerate(((True, torch.float32), (False, torch.float32), (True, torch.bfloat16))):
        packed = normal(2, 11, 6, size, seed=n).bfloat16().transpose(1, 2)
        x = packed[:, 1:4] if n else packed.contiguous()  # heads of one projection of several, or [B, H, S, D]
        cos, sin = tables(spec, 1 + n % 2, wide, dtype)
        w = weight if weight is None or n else weight.bfloat16()
        assert rope.supports(x, cos, sin, spec, w) is None
        wanted = x.double()
        if norm is not None:
            exact = NormSpec(norm.eps, norm.add_one, torch.float64)
            wanted = reference.rms_norm(wanted, None if w is None else w.double(), exact)
        wanted = reference.rope(wanted, cos.double()[:, None], sin.double()[:, None], spec)
        got = rope.run(x, cos, sin, spec, norm, w)
        assert got.dtype == torch.bfloat16
        assert_close(got, wanted, 4e-3)


def test_what_it_does_not_take() -> None:
    x, (cos, sin) = normal(1, 2, 11, 64).bfloat16(), tables(RopeSpec(64), 1, True, torch.float32)
    for words, args in {
        "bfloat16": (x.float(), cos, sin, RopeSpec(64)),
        "to bfloat16": (x, cos, sin, RopeSpec(64, out_dtype=torch.float32)),
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


def flat(h: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[T, H, D], halves without a norm: loops are as fast."""
    return half(h[0].unflatten(-1, (-1, 64)), cos[:, None], sin[:, None])


@pytest.mark.parametrize("graph", [heads_first, tokens_first, flat])
def test_prefill_is_one_call_and_decode_fuses(graph: Any) -> None:
    """The third length's graph has symbolic sizes."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: graph(*a), backend="braze")
    kernels = []
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True), collect() as reports:
        for tokens in (160, 200, 333, 1):
            angle = normal(tokens, 32, seed=tokens).repeat(1, 2)
            h = normal(1, tokens, 8 * 64, seed=1).bfloat16()
            args = h, normal(64, seed=2).bfloat16(), angle.cos().bfloat16(), angle.sin().bfloat16()
            got = compiled(*args)
            assert_close(got, graph(*(a.double() for a in args)), 6e-3)
        kernels = [s.kernel for r in reports for s in r.sites]
    assert kernels == (["pointwise"] * 3 if graph is flat else ["cpp", "cpp", "pointwise"])


def test_it_is_there_when_asked_for() -> None:
    angle = normal(3, 32).repeat(1, 2)
    args = [t.bfloat16() for t in (normal(1, 3, 2 * 64), normal(64), angle.cos(), angle.sin())]
    for kernel in ("cpp", "pointwise", "auto"):
        torch._dynamo.reset()
        options = {"kernel": {"rope": kernel}, "require": ["rope"]}
        with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True), collect() as reports:
            got = torch.compile(lambda *a: heads_first(*a), backend="braze", options=options)(*args)
        assert_close(got, heads_first(*(a.double() for a in args)), 6e-3)
        assert [s.kernel for s in reports[0].sites] == ["cpp" if kernel == "cpp" else "pointwise"]
