"""What a GPU does apart from matrix products: masks, reductions, scans, gathers, atomics, shared memory, conversions."""

from __future__ import annotations

import functools

import pytest
import torch
import triton

from braze import xpu_sim
from tests.xpu_sim import kernels

pytestmark = pytest.mark.parametrize("target", ["pvc", "generic"])
NAN = float("nan")


def grid(n: int, block: int) -> tuple[int]:
    return (triton.cdiv(n, block),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.float64])
def test_add(target: str, dtype: torch.dtype) -> None:
    n = 1003
    x, y = (torch.randn(n) * 9).to(dtype), (torch.randn(n) * 9).to(dtype)
    out = torch.zeros(n, dtype=dtype)
    with xpu_sim.device(target):
        kernels.add[grid(n, 128)](x, y, out, n, BLOCK=128)
    assert torch.equal(out, x + y)


def test_zero_copy_writes_a_view_in_place(target: str) -> None:
    base = torch.zeros(300)
    view = base[16:]
    with xpu_sim.device(target):
        kernels.add[grid(100, 64)](torch.ones(100), torch.ones(100), view, 100, BLOCK=64)
    assert torch.equal(base, torch.where((torch.arange(300) >= 16) & (torch.arange(300) < 116), 2.0, 0.0))


def test_autotune_runs_every_config(target: str) -> None:
    x = torch.randn(1000)
    out = torch.full((1000,), NAN)
    kernels.tuned_scale.cache.clear()
    with xpu_sim.device(target):
        kernels.tuned_scale[lambda meta: grid(1000, meta["BLOCK"])](x, out, 1000, 0.5)
    assert torch.equal(out, x * 0.5)
    assert len(kernels.tuned_scale.configs_timings) == 2


@pytest.mark.parametrize("columns", [1, 37, 257])
def test_softmax(target: str, columns: int) -> None:
    x = torch.randn(5, columns) * 4
    out = torch.full((5, columns), NAN)
    with xpu_sim.device(target):
        kernels.softmax[(5,)](x, out, columns, x.stride(0), BLOCK=triton.next_power_of_2(columns))
    torch.testing.assert_close(out.double(), torch.softmax(x.double(), -1), rtol=2e-5, atol=1e-7)


def test_row_statistics(target: str) -> None:
    x = torch.randn(8, 64)
    largest, where, running = torch.full((8,), NAN), torch.full((8,), -1, dtype=torch.int32), torch.full((8, 64), NAN)
    with xpu_sim.device(target):
        kernels.row_statistics[(1,)](x, largest, where, running, 8, 64)
    assert torch.equal(largest, x.amax(1))
    assert torch.equal(where.long(), x.argmax(1))
    torch.testing.assert_close(running.double(), x.double().cumsum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gather_rows(target: str, dtype: torch.dtype) -> None:
    x = torch.randn(11, 45).to(dtype)
    index = torch.randint(0, 11, (29,))
    out = torch.full((29, 45), NAN, dtype=dtype)
    with xpu_sim.device(target):
        kernels.gather_rows[grid(29, 8)](x, index, out, 29, 45, BM=8, BN=64)
    assert torch.equal(out, x[index])


def test_atomic_sums(target: str) -> None:
    n = 777
    index, weight = torch.randint(0, 10, (n,)), torch.randn(n)
    count, total = torch.zeros(10, dtype=torch.int32), torch.zeros(10)
    with xpu_sim.device(target):
        kernels.histogram[grid(n, 128)](index, weight, count, total, n, BLOCK=128)
    assert torch.equal(count.long(), torch.bincount(index, minlength=10))
    expected = torch.zeros(10, dtype=torch.float64).index_add_(0, index, weight.double())
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-4)


def test_atomic_extremes_and_exchange(target: str) -> None:
    x = torch.randint(-1000, 1000, (500,), dtype=torch.int32)
    least, most, swapped = (torch.tensor([v], dtype=torch.int32) for v in (0, 0, 7))
    with xpu_sim.device(target):
        kernels.extremes[grid(500, 128)](x, least, most, swapped, 500, BLOCK=128)
    assert (least.item(), most.item(), swapped.item()) == (x.min().item(), x.max().item(), 9)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64], ids=str)
def test_atomic_sums_of_each_type(target: str, dtype: torch.dtype) -> None:
    n = 300
    index, value = torch.randint(0, 7, (n,)), (torch.randn(n) * 100).to(dtype)
    value = value * 2**40 if dtype == torch.int64 else value
    total = torch.zeros(7, dtype=dtype)
    with xpu_sim.device(target):
        kernels.accumulate[grid(n, 128)](index, value, total, n, BLOCK=128)
    exact = torch.zeros(7, dtype=torch.float64 if dtype.is_floating_point else torch.int64)
    exact.index_add_(0, index, value.to(exact.dtype))
    torch.testing.assert_close(total.to(exact.dtype), exact, rtol=1e-5, atol=1e-3 if dtype.is_floating_point else 0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_atomic_bits(target: str, dtype: torch.dtype) -> None:
    x = torch.randint(0, 2**30, (100,), dtype=dtype)
    either, both, odd, last = (torch.tensor([v], dtype=dtype) for v in (0, -1, 0, 0))
    with xpu_sim.device(target):
        kernels.bitwise[(1,)](x, either, both, odd, last, 100, BLOCK=128)
    for got, combine in ((either, int.__or__), (both, int.__and__), (odd, int.__xor__)):
        assert got.item() == functools.reduce(combine, x.tolist())
    assert last.item() == 77


def test_exchange_between_lanes(target: str) -> None:
    x = torch.randn(4, 64)
    rising, flipped = torch.full((4, 64), NAN), torch.full((4, 64), NAN)
    with xpu_sim.device(target):
        kernels.sorted_and_flipped[(1,)](x, rising, flipped, 4, 64)
    assert torch.equal(rising, x.sort(1).values) and torch.equal(flipped, x.flip(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_transpose_through_shared_memory(target: str, dtype: torch.dtype) -> None:
    x = torch.randn(50, 70).to(dtype)
    out = torch.full((70, 50), NAN, dtype=dtype)
    with xpu_sim.device(target):
        compiled = kernels.transpose[(2, 3)](x, out, 50, 70, BM=32, BN=32)
    assert compiled.metadata.shared > 0
    assert torch.equal(out, x.T)


@pytest.mark.parametrize(
    ("source", "result"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float16, torch.float8_e5m2),
        (torch.float8_e5m2, torch.float16),
        (torch.float8_e4m3fn, torch.bfloat16),
        (torch.float8_e5m2, torch.float32),
        (torch.float8_e4m3fn, torch.float32),
        (torch.bfloat16, torch.float8_e4m3fn),
        (torch.float32, torch.int8),
    ],
    ids=str,
)
def test_convert(target: str, source: torch.dtype, result: torch.dtype) -> None:
    x = (torch.randn(333) * 3).to(source)
    out = torch.zeros(333, dtype=result)
    with xpu_sim.device(target):
        kernels.convert[grid(333, 128)](x, out, 333, BLOCK=128)
    assert torch.equal(out.double(), x.to(result).double())


def test_empty_grid_does_nothing(target: str) -> None:
    out = torch.ones(4)
    with xpu_sim.device(target):
        kernels.add[(0,)](out, out, out, 4, BLOCK=64)
    assert torch.equal(out, torch.ones(4))


def test_interpreter_is_refused(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"), xpu_sim.device(target):
        pass
