"""Machine code of every Triton kernel for Intel GPUs: compiles each with a recent ocloc and writes the table of docs/xpu.md.

A kernel is launched on the simulator at a small shape that specialises it as real shapes do (sizes divisible by 16), and
the SPIR-V of that launch is compiled for each GPU. Exits with 1 where a kernel spills or calls out.

    python benchmarks/xpu_native.py [--quick] [--json FILE] [--docs docs/xpu.md]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from braze import xpu_sim
from braze.kernels.spec import RopeSpec
from braze.kernels.triton import rope
from braze.xpu_sim import native, ocloc
from braze.xpu_sim.driver import Launch

DEVICES = ("pvc", "bmg")
BEGIN, END = "<!-- generated: benchmarks/xpu_native.py -->\n", "<!-- end -->\n"


@dataclass(frozen=True)
class Workload:
    """A call that launches kernels on the simulator, and the configuration it stands for, in words."""

    name: str
    call: Callable[[], Any]


@dataclass(frozen=True)
class Cell:
    """One kernel of one workload on one GPU."""

    workload: str
    launch: Launch
    code: native.NativeCode


def rope_workloads() -> Iterator[Workload]:
    def make(size: int, spec: RopeSpec, dtype: torch.dtype, norm: rope.Norm | None = None) -> Callable[[], Any]:
        q, k = (torch.randn(1, 16, heads, size).to(dtype).transpose(1, 2) for heads in (32, 16))
        angle = torch.randn(1, 16, spec.rotary_dim)
        tables = angle.cos().to(dtype), angle.sin().to(dtype)
        return lambda: rope.launch(q, k, *tables, spec, norm, False, rope.XPU_TILE, rope.XPU_WARPS)

    half = torch.bfloat16
    yield Workload("half, D 64", make(64, RopeSpec(64), half))
    yield Workload("half, D 128", make(128, RopeSpec(128), half))
    interleaved = RopeSpec(128, layout_in="interleaved", layout_out="interleaved")
    yield Workload("interleaved, D 128", make(128, interleaved, half))
    yield Workload("half, 64 of 128", make(128, RopeSpec(64), half))
    yield Workload("half, D 256", make(256, RopeSpec(256), half))
    weight = torch.randn(128).to(half)
    yield Workload("RMSNorm, half, D 128", make(128, RopeSpec(128), half, rope.Norm(1e-6, weight, weight)))


def workloads() -> Iterator[Workload]:
    yield from rope_workloads()


def measure(tools: ocloc.Tools, workload: Workload) -> Iterator[Cell]:
    with xpu_sim.device("pvc"), xpu_sim.record(run=False) as launches:
        workload.call()
    for launch in {launch.module: launch for launch in launches}.values():
        for device in DEVICES:
            yield Cell(workload.name, launch, native.compile_native(tools, launch.module, launch.flags, device))


COLUMNS = ("kernel", "case", "GPU", "warps", "registers", "spill", "calls", "SLM", "loop: DPAS / 2D / gathers / all")


def row(cell: Cell) -> tuple[str, ...]:
    loops = [f"{x.dpas} / {x.loads} / {x.gathers} / {x.instructions}" for x in cell.code.loops if x.dpas]
    code, launch = cell.code, cell.launch
    numbers = (launch.warps, code.registers, code.spill, code.calls, launch.shared)
    return (code.kernel, cell.workload, code.device, *map(str, numbers), "; ".join(loops) or "no loop with DPAS")


def markdown(cells: list[Cell]) -> str:
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *map(row, cells)]
    table = "\n".join(f"| {' | '.join(r)} |" for r in rows)
    clean = sum(not cell.code.problems() for cell in cells)
    return f"{clean} of {len(cells)} kernels without a spill or a call.\n\n{table}\n"


def write(path: Path, cells: list[Cell]) -> None:
    """Puts the table between its two marks in the document."""
    before, _, rest = path.read_text().partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"{path} has no {BEGIN.strip()} ... {END.strip()}")
    path.write_text(before + BEGIN + "\n" + markdown(cells) + "\n" + END + after)


def record(cell: Cell) -> dict[str, Any]:
    code = dataclasses.asdict(cell.code)
    return {"shape": cell.workload, "provider": "braze", "median": None, "ratio": None} | code | {
        "warps": cell.launch.warps, "slm": cell.launch.shared,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first case only")
    parser.add_argument("--json", type=Path, help="write the cells here")
    parser.add_argument("--docs", type=Path, help="the document to put the table into")
    options = parser.parse_args()
    tools = ocloc.fetch()
    chosen = list(workloads())[: 1 if options.quick else None]
    cells = [cell for workload in chosen for cell in measure(tools, workload)]
    table = Table(*COLUMNS, title="XPU machine code")
    for cell in cells:
        table.add_row(*row(cell))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps([record(cell) for cell in cells], indent=1))
    if options.docs:
        write(options.docs, cells)
    problems = [problem for cell in cells for problem in cell.code.problems()]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
