"""Machine code of compiled kernels, where the offline compiler was fetched (`python -m braze.xpu_sim.ocloc`)."""

from __future__ import annotations

import pytest
import torch

from braze import xpu_sim
from braze.xpu_sim import native, ocloc
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
