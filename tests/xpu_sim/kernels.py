"""Small Triton kernels, one for each thing the simulator must do as a GPU would."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add(x, y, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    tl.store(out + at, tl.load(x + at, mask=inside) + tl.load(y + at, mask=inside), mask=inside)


@triton.autotune([triton.Config({"BLOCK": 64}, num_warps=2), triton.Config({"BLOCK": 256}, num_warps=4)], key=["n"])
@triton.jit
def tuned_scale(x, out, n, factor, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n) * factor, mask=at < n)


@triton.jit
def softmax(x, out, columns, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    value = tl.load(x + row * stride + at, mask=at < columns, other=-float("inf")).to(tl.float32)
    weight = tl.exp(value - tl.max(value, 0))
    tl.store(out + row * columns + at, weight / tl.sum(weight, 0), mask=at < columns)


@triton.jit
def row_statistics(x, largest, where, running, rows: tl.constexpr, columns: tl.constexpr):
    row, column = tl.arange(0, rows)[:, None], tl.arange(0, columns)[None, :]
    value = tl.load(x + row * columns + column)
    tl.store(largest + tl.arange(0, rows), tl.max(value, 1))
    tl.store(where + tl.arange(0, rows), tl.argmax(value, 1))
    tl.store(running + row * columns + column, tl.cumsum(value, 1))


@triton.jit
def gather_rows(x, index, out, rows, columns, BM: tl.constexpr, BN: tl.constexpr):
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.arange(0, BN)
    source = tl.load(index + row, mask=row < rows, other=0)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    value = tl.load(x + source[:, None].to(tl.int64) * columns + column[None, :], mask=inside)
    tl.store(out + row[:, None] * columns + column[None, :], value, mask=inside)


@triton.jit
def histogram(index, weight, count, total, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    bucket = tl.load(index + at, mask=inside, other=0)
    tl.atomic_add(count + bucket, 1, mask=inside)
    tl.atomic_add(total + bucket, tl.load(weight + at, mask=inside, other=0.0), mask=inside)


@triton.jit
def extremes(x, least, most, swapped, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n, other=0)
    tl.atomic_min(least + tl.zeros_like(at), value, mask=at < n)
    tl.atomic_max(most + tl.zeros_like(at), value, mask=at < n)
    if tl.program_id(0) == 0:
        tl.atomic_cas(swapped, 7, 9)


@triton.jit
def transpose(x, out, M, N, BM: tl.constexpr, BN: tl.constexpr):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    tile = tl.load(x + m[:, None] * N + n[None, :], mask=(m < M)[:, None] & (n < N)[None, :])
    tl.store(out + n[:, None] * M + m[None, :], tl.trans(tile), mask=(n < N)[:, None] & (m < M)[None, :])


@triton.jit
def convert(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n).to(out.dtype.element_ty), mask=at < n)


@triton.jit
def matmul(
    a, b, c, M, N, K, pitch_b,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    TRANSPOSED: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr = "tf32",
):  # fmt: skip
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    accumulator = tl.zeros((BM, BN), tl.int32 if a.dtype.element_ty == tl.int8 else tl.float32)
    if BLOCKS:
        left = tl.make_block_ptr(a, (M, K), (K, 1), (m, 0), (BM, BK), (1, 0))
        if TRANSPOSED:
            right = tl.make_block_ptr(b, (K, N), (1, pitch_b), (0, n), (BK, BN), (0, 1))
        else:
            right = tl.make_block_ptr(b, (K, N), (pitch_b, 1), (0, n), (BK, BN), (1, 0))
        for _ in range(0, K, BK):
            accumulator = tl.dot(
                tl.load(left, boundary_check=(0, 1), padding_option="zero"),
                tl.load(right, boundary_check=(0, 1), padding_option="zero"),
                accumulator,
                input_precision=PRECISION,
            )
            left = tl.advance(left, (0, BK))
            right = tl.advance(right, (BK, 0))
        out = tl.make_block_ptr(c, (M, N), (N, 1), (m, n), (BM, BN), (1, 0))
        tl.store(out, accumulator.to(c.dtype.element_ty), boundary_check=(0, 1))
    else:
        row, column, k = m + tl.arange(0, BM), n + tl.arange(0, BN), tl.arange(0, BK)
        step, across = (1, pitch_b) if TRANSPOSED else (pitch_b, 1)
        for first in range(0, K, BK):
            inside = first + k < K
            x = tl.load(a + row[:, None] * K + first + k, mask=(row < M)[:, None] & inside, other=0)
            y = tl.load(b + (first + k)[:, None] * step + column * across, mask=inside[:, None] & (column < N), other=0)
            accumulator = tl.dot(x, y, accumulator, input_precision=PRECISION)
        at = row[:, None] * N + column
        tl.store(c + at, accumulator.to(c.dtype.element_ty), mask=(row < M)[:, None] & (column < N))


@triton.jit
def accumulate(index, value, total, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    bucket = tl.load(index + at, mask=inside, other=0)
    tl.atomic_add(total + bucket, tl.load(value + at, mask=inside, other=0), mask=inside)


@triton.jit
def bitwise(x, either, both, odd, last, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < n
    value = tl.load(x + at, mask=inside, other=0)
    zero = tl.zeros_like(at)
    tl.atomic_or(either + zero, value, mask=inside)
    tl.atomic_and(both + zero, value, mask=inside)
    tl.atomic_xor(odd + zero, value, mask=inside)
    tl.atomic_xchg(last, 77)


@triton.jit
def sorted_and_flipped(x, rising, flipped, rows: tl.constexpr, columns: tl.constexpr):
    at = tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :]
    value = tl.load(x + at)
    tl.store(rising + at, tl.sort(value, 1))
    tl.store(flipped + at, tl.flip(value, 1))
