"""The pointwise lowering of braze::rope under plain Inductor, against the float64 reference."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import metrics
from torch._inductor.utils import fresh_cache

import braze  # noqa: F401  (defines the op)
from braze.kernels import reference
from braze.kernels.spec import RopeSpec
from braze.lowering.lower import register

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    register()
    register()
    with fresh_cache():
        yield


def rope(x: Tensor, cos: Tensor, sin: Tensor, spec: RopeSpec) -> Tensor:
    return torch.ops.braze.rope(
        x, cos, sin, rotary_dim=spec.rotary_dim, start=spec.start, layout_in=spec.layout_in,
        layout_out=spec.layout_out, inverse=spec.inverse, out_dtype=spec.out_dtype,
    )  # fmt: skip


def inputs(shape: tuple[int, ...], width: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x as [B, H, S, D] over memory [B, S, H, D]; tables [B, 1, S, width] whose columns all differ."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, tokens, size = shape
    x = torch.randn(batch, tokens, heads, size, generator=generator).transpose(1, 2).to(dtype)
    angle = torch.randn(batch, 1, tokens, width, generator=generator)
    return x, angle.cos(), angle.sin()


def check(got: Tensor, x: Tensor, cos: Tensor, sin: Tensor, spec: RopeSpec) -> None:
    exact = RopeSpec(spec.rotary_dim, spec.start, spec.layout_in, spec.layout_out, spec.inverse)
    expected = reference.rope(x.double(), cos.double(), sin.double(), exact)
    dtype = spec.out_dtype or x.dtype
    assert got.dtype == dtype
    assert got.shape == expected.shape
    error = (got.double() - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE[dtype], error


CASES = [
    RopeSpec(64),
    RopeSpec(64, inverse=True),
    RopeSpec(64, layout_in="interleaved", layout_out="interleaved"),
    RopeSpec(64, layout_in="interleaved", layout_out="interleaved", inverse=True),
    RopeSpec(64, layout_in="interleaved"),
    RopeSpec(64, layout_out="interleaved"),
    RopeSpec(24, start=8),
    RopeSpec(32),
    RopeSpec(32, start=32),
    RopeSpec(32, start=16, layout_in="interleaved", layout_out="interleaved"),
    RopeSpec(32, layout_in="interleaved", inverse=True),
    RopeSpec(64, out_dtype=torch.float32),
]


@pytest.mark.parametrize("spec", CASES, ids=str)
@pytest.mark.parametrize("wide", [True, False], ids=["R", "R/2"])
def test_every_form(spec: RopeSpec, wide: bool) -> None:
    width = spec.rotary_dim if wide else spec.rotary_dim // 2
    for n, dtype in enumerate((torch.bfloat16, torch.float32)):
        args = inputs((2, 3, 5, 64), width, dtype, n)
        torch._dynamo.reset()
        compiled = torch.compile(lambda x, c, s: rope(x, c, s, spec), dynamic=False)
        check(compiled(*args), *args, spec)


def test_half_precision_tables_and_head_sizes() -> None:
    for size in (80, 96, 128, 256):
        spec = RopeSpec(size)
        x, cos, sin = inputs((1, 2, 3, size), size, torch.float16)
        args = x, cos.half(), sin.half()
        torch._dynamo.reset()
        check(torch.compile(lambda x, c, s, spec=spec: rope(x, c, s, spec), dynamic=False)(*args), *args, spec)


def test_float64_is_computed_in_float64() -> None:
    spec = RopeSpec(64)
    x, cos, sin = inputs((1, 2, 3, 64), 64, torch.float32)
    args = x.double(), cos.double(), sin.double()
    torch._dynamo.reset()
    got = torch.compile(lambda x, c, s: rope(x, c, s, spec))(*args)
    assert torch.allclose(got, reference.rope(*args, spec), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_symbolic_sizes_compile_once(layout: Any) -> None:
    spec = RopeSpec(64, layout_in=layout, layout_out=layout)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(lambda x, c, s: rope(x, c, s, spec), dynamic=True, backend=counter)
    for batch, tokens in ((2, 5), (3, 17), (4, 40)):
        args = inputs((batch, 3, tokens, 64), 64, torch.bfloat16, tokens)
        check(compiled(*args), *args, spec)
    assert counter.frame_count == 1


def test_tables_without_batch_and_head_dimensions() -> None:
    spec = RopeSpec(64)
    x, cos, sin = inputs((1, 3, 5, 64), 64, torch.float32)
    args = x, cos[0, 0], sin[0, 0]
    torch._dynamo.reset()
    check(torch.compile(lambda x, c, s: rope(x, c, s, spec))(*args), *args, spec)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_one_kernel_with_neighbours_on_both_sides(layout: Any) -> None:
    spec = RopeSpec(64, layout_in=layout, layout_out=layout)
    x, cos, sin = inputs((1, 4, 16, 64), 64, torch.bfloat16)
    bias = torch.randn(64)

    def block(x: Tensor, bias: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rope(x.float() + bias, cos, sin, spec).to(torch.float16)

    torch._dynamo.reset()
    metrics.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        got = torch.compile(block, dynamic=False)(x, bias, cos, sin)
    if torch.__version__ >= "2.12" or layout == "half":  # the scheduler of 2.11 keeps pairs apart
        assert metrics.generated_kernel_count == 1
    expected = reference.rope(x.double() + bias, cos.double(), sin.double(), spec)
    assert (got.double() - expected).abs().max() <= 2e-3 * expected.abs().max()


def test_the_write_into_a_cache_fuses_by_itself() -> None:
    """In loops a rotation is what is written: no buffer between."""
    spec = RopeSpec(64)
    x, cos, sin = inputs((1, 2, 5, 64), 64, torch.float32)
    cache, rows = torch.zeros(1, 2, 9, 64), torch.tensor([3, 1, 8, 0, 5])

    def block(x: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, rows: Tensor) -> None:
        cache.index_copy_(2, rows, rope(x, cos, sin, spec))

    torch._dynamo.reset()
    metrics.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        torch.compile(block, dynamic=False)(x, cos, sin, cache, rows)
    assert metrics.generated_kernel_count == 1
    check(cache[:, :, rows], x, cos, sin, spec)
