"""Matrix products: DPAS and 2D block IO on pvc, neither on generic, within the rounding of the dtype either way."""

from __future__ import annotations

import re

import pytest
import torch
import triton

from braze import xpu_sim
from braze.xpu_sim import builtins, spirv
from braze.xpu_sim.split import split_loads, used_in_parts
from tests.xpu_sim import kernels

TARGETS = ["pvc", "generic"]
# Relative error (Frobenius) that one rounding of the operands and of the result allows.
BOUND = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4, torch.float32: 1e-3}


def multiply(target: str, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, tile=(32, 32, 32), **meta):  # type: ignore[no-untyped-def]
    """c = a b, `b` given as [K, N] or, for its transpose, as a view of [N, K]."""
    (m, k), n = a.shape, b.shape[1]
    transposed = b.stride(0) == 1
    bm, bn, bk = tile
    with xpu_sim.device(target):
        return kernels.matmul[(triton.cdiv(m, bm), triton.cdiv(n, bn))](
            a, b, c, m, n, k, b.stride(1 if transposed else 0), BM=bm, BN=bn, BK=bk, TRANSPOSED=transposed, **meta
        )


def error(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    expected = a.double() @ b.double()
    return float((c.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("blocks", [True, False], ids=["blocks", "pointers"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", TARGETS)
def test_half_precision(target: str, dtype: torch.dtype, blocks: bool) -> None:
    m, n, k = 70, 96, 128
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    c = torch.full((m, n), float("nan"), dtype=dtype)
    compiled = multiply(target, a, b, c, BLOCKS=blocks)
    assert error(c, a, b) < BOUND[dtype]
    assert ("matrix_mad" in compiled.asm["llir"]) == (target == "pvc")
    assert bool(re.search("2d_block_read", compiled.asm["llir"])) == (target == "pvc" and blocks)


@pytest.mark.parametrize("target", TARGETS)
def test_transposed_weights(target: str) -> None:
    a, weight = torch.randn(40, 96).bfloat16(), torch.randn(64, 96).bfloat16()
    c = torch.full((40, 64), float("nan"))
    multiply(target, a, weight.T, c, BLOCKS=True)
    assert error(c, a, weight.T) < 1e-6


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", [(1, 32, 32), (7, 33, 48), (33, 65, 40)])
def test_odd_shapes(target: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    a, b = torch.randn(m, k).half(), torch.randn(k, n).half()
    c = torch.full((m, n), float("nan"))
    multiply(target, a, b, c, BLOCKS=False)
    assert error(c, a, b) < 1e-6


@pytest.mark.parametrize("target", TARGETS)
def test_tf32(target: str) -> None:
    a, b = torch.randn(32, 64), torch.randn(64, 64)
    c = torch.full((32, 64), float("nan"))
    multiply(target, a, b, c, BLOCKS=True)
    assert error(c, a, b) < BOUND[torch.float32]
    assert (error(c, a, b) > 1e-5) == (target == "pvc")


@pytest.mark.parametrize("target", TARGETS)
def test_int8_is_exact(target: str) -> None:
    a, b = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((32, 64), (64, 64)))
    c = torch.zeros(32, 64, dtype=torch.int32)
    compiled = multiply(target, a, b, c, BLOCKS=True)
    assert torch.equal(c.long(), a.long() @ b.long())
    assert bool(re.search("2d_block_read.*_8b_", compiled.asm["llir"])) == (target == "pvc")


def test_surface_rule_of_the_hardware_is_an_error() -> None:
    storage = torch.randn(33 * 64).bfloat16()
    a, b = storage[16 : 16 + 32 * 64].view(32, 64), torch.randn(64, 64).bfloat16()
    assert a.data_ptr() % 64 == 32
    with pytest.raises(xpu_sim.SurfaceError, match=r"matmul.*base address is not aligned to 64 bytes"):
        multiply("pvc", a, b, torch.empty(32, 64), BLOCKS=True)
    aligned = a.clone()
    c = torch.full((32, 64), float("nan"))
    multiply("pvc", aligned, b, c, BLOCKS=True)  # the fault was taken: the next launch starts clean
    assert error(c, aligned, b) < 1e-6


def test_builtin_without_emulation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtins, "BODIES", [body for body in builtins.BODIES if body[0] is not builtins.DPAS])
    a, b = torch.randn(16, 32).half(), torch.randn(32, 32).half()
    with pytest.raises(xpu_sim.MissingBuiltin, match="does not emulate intel_sub_group_f16_f16_matrix_mad_k16"):
        multiply("pvc", a, b, torch.empty(16, 32), tile=(16, 32, 32), BLOCKS=False)


def test_long_vectors_are_split_for_the_cpu_compiler() -> None:
    a, b = torch.randn(32, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    c = torch.full((32, 64), float("nan"))
    compiled = multiply("pvc", a, b, c, BLOCKS=True)
    module = compiled.asm["spv"]
    long = used_in_parts(list(spirv.instructions(module)))
    assert long and not used_in_parts(list(spirv.instructions(split_loads(module))))
    assert error(c, a, b) < 1e-6
