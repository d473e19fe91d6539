"""Machine code of compiled kernels, where the offline compiler was fetched (`python -m braze.xpu_sim.ocloc`)."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from braze import xpu_sim
from braze.cli import main
from braze.xpu_sim import machine_code, native, ocloc
from braze.xpu_sim.workloads import workloads
from tests.xpu_sim import kernels

TOOLS = ocloc.installed()
needs_tools = pytest.mark.skipif(TOOLS is None, reason="no recent ocloc here: run python -m braze.xpu_sim.ocloc")


def launch_matmul(grf_mode: str) -> xpu_sim.driver.Launch:
    a, b, c = torch.randn(64, 64).bfloat16(), torch.randn(64, 128).bfloat16(), torch.empty(64, 128).bfloat16()
    with xpu_sim.device("pvc"), xpu_sim.record() as launches:
        kernels.matmul[(2, 2)](
            a, b, c, 64, 128, 64, 128, BM=32, BN=64, BK=32, TRANSPOSED=False, BLOCKS=True, grf_mode=grf_mode
        )  # fmt: skip
    (launch,) = launches
    return launch


def test_record_keeps_what_was_launched() -> None:
    launch = launch_matmul("large")
    assert (launch.kernel, launch.target, launch.grid, launch.warps) == ("matmul", "pvc", (2, 2, 1), 4)
    assert "256-GRF" in launch.flags


@needs_tools
@pytest.mark.parametrize("device", ["pvc", "bmg"])
def test_matmul_uses_the_matrix_engine_and_block_loads(device: str) -> None:
    assert TOOLS is not None
    launch = launch_matmul("large")
    code = native.compile_native(TOOLS, launch.module, launch.flags, device)
    assert code.problems() == []
    assert code.registers == 256
    (loop,) = code.loops
    assert loop.dpas >= 8 and loop.loads >= 2 and loop.gathers == 0 and loop.scratch == 0


#: a representative of each kernel and of each way that the expert products read rows and weights
SUBSET = (
    "half, D 128", "RMSNorm, half, D 256", "softmax, 128 experts, bfloat16", "4096 rows, 128 experts, tiles of 64, int32",
    "halves, rows by ids", "interleaved transposed, bias bf16, sorted", "halves transposed, many rows", "halves, fp32, sorted",
    "qwen3, 8 tokens", "gpt_oss, 2048 tokens",
)  # fmt: skip


@needs_tools
@pytest.mark.parametrize("device", machine_code.DEVICES)
def test_kernels_neither_spill_nor_call(device: str) -> None:
    """All of them are in docs/xpu.md, which `braze doctor --xpu` checks."""
    assert TOOLS is not None
    chosen = [workload for workload in workloads() if workload.name in SUBSET]
    assert len(chosen) == len(SUBSET)
    found = list(machine_code.cells(TOOLS, chosen, [device]))
    assert [problem for cell in found for problem in cell.problems()] == []
    kinds = {cell.launch.kernel for cell in found}
    assert kinds >= {"rope_kernel", "route_kernel", "moe_sort", "moe_count", "moe_place", "moe_permute", "moe_gemm"}
    assert any(cell.shipped for cell in found) and not all(cell.shipped for cell in found)


@needs_tools
def test_what_is_wrong_is_said() -> None:
    """A workload that needs the matrix engine, of a kernel made for a GPU that has none."""
    assert TOOLS is not None
    workload = next(w for w in workloads() if w.name == "halves, rows by ids")
    with xpu_sim.device("generic"), xpu_sim.record(run=False) as launches:
        workload.call()
    product = next(launch for launch in launches if launch.kernel == "moe_gemm")
    code = native.compile_native(TOOLS, product.module, product.flags, "pvc")
    (problem, *_) = machine_code.Cell((workload,), product, dataclasses.replace(code, spill=0, calls=0)).problems()
    assert problem == "halves, rows by ids: moe_gemm has no DPAS in a loop on pvc"


@needs_tools
def test_doctor_answers_with_a_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    few = [workload for workload in workloads() if workload.name in SUBSET[:1]]
    monkeypatch.setattr("braze.xpu_sim.workloads.workloads", lambda: iter(few))
    assert main(["doctor", "--xpu"]) == 0
    assert "pvc: 1 codes of 1 kernels compiled, 1 without a spill" in capsys.readouterr().out
    monkeypatch.setattr(native.NativeCode, "problems", lambda code: ["rope_kernel spills 64 bytes"])
    assert main(["doctor", "--xpu"]) == 1
    assert "half, D 128: rope_kernel spills 64 bytes" in capsys.readouterr().out


def test_doctor_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(xpu_sim, "missing", lambda: "the XPU simulator needs triton: pip install 'braze[xpu-verify]'")
    assert main(["doctor", "--xpu"]) == 2
    assert "braze[xpu-verify]" in capsys.readouterr().err


def test_loops_and_spills_are_read_off_the_assembly() -> None:
    assembly = """L0:
        mov (16|M0) r1.0<1>:d 0:w
L16:
        send.ugm (1|M0) r3 r166 null:0 0x0 0x03F00203 {$4} // wr:1+0, rd:31; load_block2d.ugm.d16.a64
        send.ugm (1|M0) null r168 null:0 0x0 0x02080203 {$6} // wr:1+0, rd:0; load_block2d.ugm.d16.a64.ca.ca
        dpas.8x8 (16|M0) r4:f r4:f r35:bf r3.0:bf {$5}
        send.slm (16|M0) null r9 null:0 0x0 0x0 // wr:1+0, rd:0; store.slm.d32.a32
(W&f0.0) jmpi L16
        call (1|M0) r5 L999
"""
    code = native.summarise("k", "pvc", "grf_count: 128\n spill_size: 64\n", assembly)
    assert code.loops == (native.Loop(5, dpas=1, loads=1, prefetches=1, gathers=0, slm=1, scratch=0),)
    assert code.problems() == ["k spills 64 bytes on pvc", "k makes 1 external calls on pvc"]
