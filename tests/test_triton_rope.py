"""The Triton kernel for q and k: on a GPU where there is one, else in Triton's interpreter where Triton is installed."""

import os

import pytest
import torch
from torch import Tensor

from braze import xpu_sim

GPU = torch.cuda.is_available()
# Where Triton is Intel's, tests/xpu_sim/test_rope.py runs the same cases.
SIMULATED = not GPU and xpu_sim.missing() is None
if not GPU and not SIMULATED:
    os.environ.setdefault("TRITON_INTERPRET", "1")

from braze.kernels import reference  # noqa: E402
from braze.kernels.spec import RopeSpec  # noqa: E402
from braze.kernels.triton import rope  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
needs_triton = pytest.mark.skipif(
    SIMULATED or not rope.HAVE_TRITON, reason="Triton is not installed, or runs on the XPU simulator instead"
)


def inputs(heads: int, size: int, layout: str, dtype: torch.dtype, seed: int) -> Tensor:
    """[2, heads, 3, size] over memory laid out as `layout` says."""
    generator = torch.Generator().manual_seed(seed)
    if layout == "bhsd":
        x = torch.randn(2, heads, 3, size, generator=generator)
    elif layout == "bshd":
        x = torch.randn(2, 3, heads, size, generator=generator).transpose(1, 2)
    else:  # a slice of a packed projection: heads do not end where rows do
        x = torch.randn(2, 3, heads + 2, size, generator=generator).transpose(1, 2)[:, 1:-1]
    return x.to(DEVICE, dtype)


def tables(width: int, dtype: torch.dtype, batch: int) -> tuple[Tensor, Tensor]:
    angle = torch.randn(batch, 3, width, generator=torch.Generator().manual_seed(7)).to(DEVICE)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def expected(
    x: Tensor, cos: Tensor, sin: Tensor, spec: RopeSpec, norm: rope.Norm | None, weight: Tensor | None
) -> Tensor:
    x = x.double()
    if norm is not None:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps)
        x = x if weight is None else x * (weight.double() + (1 if norm.add_one else 0))
    exact = RopeSpec(spec.rotary_dim, spec.start, spec.layout_in, spec.layout_out, spec.inverse)
    return reference.rope(x, cos.double()[:, None], sin.double()[:, None], exact)


def compare(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    spec: RopeSpec,
    norm: rope.Norm | None = None,
    in_place: bool = False,
    tile: int = rope.TILE,
) -> None:
    weights = (None, None) if norm is None else (norm.q_weight, norm.k_weight)
    wanted = [x if x is None else expected(x, cos, sin, spec, norm, w) for x, w in zip((q, k), weights, strict=True)]
    results = rope.launch(q, k, cos, sin, spec, norm, in_place, tile, rope.WARPS)
    for x, got, want in zip((q, k), results, wanted, strict=True):
        if x is None or got is None or want is None:
            assert x is got is want is None
            continue
        assert got.dtype == (spec.out_dtype or x.dtype)
        assert (got is x) == in_place
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error <= TOLERANCE[got.dtype], error


SPECS = [
    (RopeSpec(64), 64),
    (RopeSpec(80, inverse=True), 80),
    (RopeSpec(64, layout_in="interleaved", layout_out="interleaved"), 64),
    (RopeSpec(96, layout_in="interleaved"), 96),
    (RopeSpec(32, layout_out="interleaved"), 64),
    (RopeSpec(24, start=8), 48),
    (RopeSpec(64, start=128, layout_in="interleaved", layout_out="interleaved", inverse=True), 192),
    (RopeSpec(512, out_dtype=torch.float32), 512),
]


@needs_triton
@pytest.mark.parametrize(("spec", "size"), SPECS, ids=str)
@pytest.mark.parametrize("wide", [True, False], ids=["R", "R/2"])
def test_every_form(spec: RopeSpec, size: int, wide: bool) -> None:
    width = spec.rotary_dim if wide else spec.rotary_dim // 2
    for n, (layout, dtype) in enumerate((("bhsd", torch.bfloat16), ("bshd", torch.float32), ("packed", torch.float16))):
        q, k = inputs(5, size, layout, dtype, n), inputs(2, size, layout, dtype, n + 9)
        compare(q, k, *tables(width, dtype if wide else torch.float32, 1 + n % 2), spec)


@needs_triton
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_in_place_and_blocks_of_heads(layout: rope.Any) -> None:
    spec = RopeSpec(32, start=16, layout_in=layout, layout_out=layout)
    q, k = inputs(5, 64, "packed", torch.float32, 1), inputs(3, 64, "packed", torch.float32, 2)
    compare(q, k, *tables(32, torch.float32, 1), spec, in_place=True, tile=128)


@needs_triton
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("add_one", [False, True])
def test_norm_before_the_rotation(layout: rope.Any, add_one: bool) -> None:
    for size, start in ((64, 0), (80, 16)):
        spec = RopeSpec(64, start=start, layout_in=layout, layout_out=layout)
        weights = torch.randn(2, size, generator=torch.Generator().manual_seed(3)).to(DEVICE)
        norm = rope.Norm(1e-6, weights[0], weights[1], add_one)
        q, k = inputs(4, size, "bshd", torch.float32, 4), inputs(2, size, "bshd", torch.float32, 5)
        cos, sin = tables(64, torch.float32, 2)
        compare(q, k, cos, sin, spec, norm)
        compare(q.clone(), k.clone(), cos, sin, spec, norm, in_place=True)
        compare(q, None, cos, sin, spec, rope.Norm(1e-5))


def test_refusals_have_words() -> None:
    q, k = torch.randn(1, 4, 3, 64), torch.randn(1, 2, 3, 64)
    cos = torch.randn(1, 3, 64)
    reason = rope.supports(q, k, cos, cos, RopeSpec(64))
    assert reason in ("Triton is not installed", "Triton has no cpu backend here")
    with pytest.raises(ValueError, match="Triton"):
        rope.run(q, k, cos, cos, RopeSpec(64))


def test_reasons_on_fake_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rope, "HAVE_TRITON", True)
    with torch._subclasses.FakeTensorMode():

        def x(heads: int, size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.empty_strided(
                (1, heads, 3, size), (3 * heads * size, size, heads * size, 1), device="cuda", dtype=dtype
            )

        def table(width: int) -> Tensor:
            return torch.empty(1, 3, width, device="cuda")

        q, k, cos = x(4, 64), x(2, 64), table(64)
        half = RopeSpec(64)
        assert rope.supports(q, k, cos, cos, half) is None
        assert rope.supports(q, k, table(32), table(32), half) is None
        assert "columns" in str(rope.supports(q, k, table(16), table(16), half))
        assert "exceeds" in str(rope.supports(q, k, cos, cos, RopeSpec(64, start=2)))
        assert "in place" in str(rope.supports(q, k, cos, cos, RopeSpec(64, layout_in="interleaved"), in_place=True))
        assert "head sizes" in str(rope.supports(q, x(2, 32), cos, cos, half))
        assert "float" in str(rope.supports(x(4, 64, torch.float64), k, cos, cos, half))
        assert "contiguous" in str(rope.supports(q.transpose(2, 3), k.transpose(2, 3), cos, cos, RopeSpec(2)))
