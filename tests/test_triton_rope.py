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


def compare_one_batch() -> None:
    """One batch, heads that fill their blocks and heads that do not."""
    for spec, heads in ((RopeSpec(64), (4, 2)), (RopeSpec(48), (4, 3)), (RopeSpec(32, start=16), (5, 2))):
        q, k = (inputs(h, 64 if spec.start else spec.rotary_dim, "bshd", torch.float32, h)[1:] for h in heads)
        compare(q, k, *tables(spec.rotary_dim, torch.float32, 1), spec)


@needs_triton
@pytest.mark.parametrize("near", [True, False])
def test_one_batch_and_heads_far_apart(monkeypatch: pytest.MonkeyPatch, near: bool) -> None:
    monkeypatch.setattr(rope, "_near", lambda *_: near)
    compare_one_batch()


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


def compare_rows(layout: str, index: Tensor | None, size: int = 32, rotary: int = 32) -> None:
    """k's tokens go to rows of a cache, whose other elements stay; q's as usual."""
    spec = RopeSpec(rotary)
    q, k = inputs(3, size, "bshd", torch.float32, 1), inputs(2, size, "bshd", torch.float32, 2)
    cos, sin = tables(rotary, torch.float32, 2)
    cache = torch.randn(2, 8, 2, size, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    if layout == "flat":  # a row for each token of the whole batch
        strides, steps, flat = (0, 2 * size, size), (3, 1), cache.view(16, 2, size)
    else:
        strides, steps = (16 * size, 2 * size, size), (0, 1)
    want_cache, want = cache.double(), expected(k, cos, sin, spec, None, None).transpose(1, 2)
    if layout == "flat" and index is not None:
        want_cache.view(16, 2, size)[index.long()] = want.reshape(6, 2, size)
        rows = rope.Rows(cache, strides, flat.shape[0], 0, index, steps)
    elif index is not None:
        want_cache[:, index.long()] = want
        rows = rope.Rows(cache, strides, 8, 0, index, steps)
    else:
        want_cache[:, 4:7] = want
        rows = rope.Rows(cache, strides, 8, 4)
    turned, whole = rope.launch(q, k, cos, sin, spec, None, False, rope.TILE, rope.WARPS, rows=rows)
    assert whole is cache
    torch.testing.assert_close(cache.double(), want_cache, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(turned.double(), expected(q, cos, sin, spec, None, None), rtol=2e-6, atol=2e-6)


ROWS = [
    ("batch", torch.tensor([6, 0, -3])),
    ("batch", torch.tensor([6, 0, 5], dtype=torch.int32)),
    ("batch", None),
    ("flat", torch.tensor([15, 3, 0, 8, 7, -2])),
]


@needs_triton
@pytest.mark.parametrize(("layout", "index"), ROWS, ids=str)
@pytest.mark.parametrize("rotary", [32, 24])
def test_rows_of_a_cache(layout: str, index: Tensor | None, rotary: int) -> None:
    compare_rows(layout, None if index is None else index.to(DEVICE), 32, rotary)


@needs_triton
def test_a_row_beyond_the_cache_writes_nothing() -> None:
    """Where assertions are off; compiled graphs have them on."""
    q, k = inputs(3, 32, "bshd", torch.float32, 1), inputs(2, 32, "bshd", torch.float32, 2)
    cos, sin = tables(32, torch.float32, 2)
    cache = torch.randn(4, 8, 2, 32, device=DEVICE)
    before = cache.clone()
    rows = rope.Rows(cache[1:3], (512, 64, 32), 8, 0, torch.tensor([8, -9, 100], device=DEVICE), (0, 1))
    rope.launch(q, k, cos, sin, RopeSpec(32), None, False, rope.TILE, rope.WARPS, rows=rows)
    assert torch.equal(cache, before)


@pytest.mark.skipif(not GPU, reason="needs a GPU; tests/xpu_sim/test_rope_places.py has such graphs")
@pytest.mark.parametrize("rotary", [64, 32])
def test_a_graph_in_place_and_into_a_cache(rotary: int) -> None:
    def block(
        h: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, index: Tensor
    ) -> tuple[Tensor, Tensor]:
        q, k = ((h @ w).unflatten(-1, (-1, 64)).transpose(1, 2) for w in (wq, wk))

        def turn(x: Tensor) -> Tensor:
            part, rest = x[..., :rotary], x[..., rotary:]
            a, b = part.chunk(2, -1)
            return torch.cat((part * cos + torch.cat((-b, a), -1) * sin, rest), -1)

        cache.index_copy_(2, index, turn(k))
        return torch.nn.functional.scaled_dot_product_attention(turn(q), cache, cache, enable_gqa=True), cache

    for tokens in (5, 1):
        angle = torch.rand(tokens, rotary // 2, device=DEVICE).repeat(1, 2) * 6
        h, wq, wk = (torch.randn(*s, device=DEVICE) / 8 for s in ((2, tokens, 96), (96, 256), (96, 128)))
        args = (
            h,
            wq,
            wk,
            angle.cos(),
            angle.sin(),
            torch.randn(2, 2, 9, 64, device=DEVICE),
            torch.arange(2, 2 + tokens).to(DEVICE),
        )
        wide = [x.double() if x.is_floating_point() else x for x in args]
        want = block(*wide)
        torch._dynamo.reset()
        with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
            fused = torch.compile(lambda *a: block(*a), backend="braze", dynamic=False, options={"require": ["rope"]})
            got = fused(*args)
        for a, b in zip((*got, args[5]), (*want, wide[5]), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3)


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
