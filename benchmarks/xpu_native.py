"""Writes the tables of docs/xpu.md: machine code of every Triton kernel for Intel GPUs, and the tiles that the model chooses.

`braze doctor --xpu` makes the same check for a user. Exits with 1 where a kernel spills, calls out, or lacks DPAS or 2D block
loads where it must have them.

    python benchmarks/xpu_native.py [--quick] [--json FILE] [--launches FOLDER] [--docs docs/xpu.md]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from braze.kernels.triton import xpu_tiles
from braze.kernels.triton.choose_config import DIRECT_ROWS, Problem, Tile
from braze.xpu_sim import machine_code, ocloc
from braze.xpu_sim.machine_code import COLUMNS, Cell, row
from braze.xpu_sim.workloads import MODELS, TOKENS, workloads

BEGIN, END = "<!-- generated: benchmarks/xpu_native.py -->\n", "<!-- end -->\n"
CHOICES = ("experts", "tokens", "GPU", "rows of x", "first", "second", "model us", "of roofline")


def choices() -> Iterator[tuple[str, ...]]:
    """The tiles of each model's shape, what the model expects of them, and the roofline's share of that."""
    for gpu_name, gpu in xpu_tiles.GPUS.items():
        for name, case in MODELS.items():
            gated = case.spec.layout != "none"
            reads = "columns" if case.spec.transposed else "rows"
            for tokens in TOKENS:
                p = Problem(
                    tokens, case.top_k, case.experts, case.hidden, case.intermediate, gated, 2, gpu_name, gpu.cores,
                    case.spec.layout, reads,
                )  # fmt: skip
                rows = tokens * case.top_k
                taken, config = xpu_tiles.best(p, rows <= DIRECT_ROWS)
                weights = case.hidden * case.intermediate * (3 if gated else 2)
                read = 2 * min(case.experts, rows) * weights / gpu.bandwidth
                floor = max(read, 2 * rows * weights / gpu.flops)
                how = "by ids" if config.direct else "copied" if config.permute else "gathered"
                tiles = (tile(config.rows, t) for t in (config.first, config.second))
                yield name, str(tokens), gpu_name, how, *tiles, f"{taken * 1e6:.0f}", f"{floor / taken:.2f}"


def tile(rows: int, t: Tile) -> str:
    more = (f", split {t.split}" if t.split > 1 else "") + (f", {t.registers} registers" if t.registers else "")
    return f"{rows} x {t.columns} x {t.inner}, {t.warps} warps{more}"


def lines(header: Sequence[str], rows: Iterator[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(r)} |" for r in (header, ["---"] * len(header), *rows))


def ran(folder: Path) -> str:
    """How many kernels the simulator's tests executed, by target: each code once."""
    found = {tuple(launch) for file in folder.glob("*.json") for launch in json.loads(file.read_text())}
    targets = sorted({target for _, target, _ in found})
    counts = (
        f"{target}: {sum(t == target for _, t, _ in found)} codes of {len({k for k, t, _ in found if t == target})} kernels"
        for target in targets
    )
    return f"Executed by the tests, and compared with float64: {'; '.join(counts)} (Inductor's own kernels among them)."


def markdown(cells: list[Cell], executed: str) -> str:
    summary = "\n".join(f"- {line}" for line in [*machine_code.summary(cells).splitlines(), executed] if line)
    return f"{summary}\n\n{lines(CHOICES, choices())}\n\n{lines(COLUMNS, map(row, cells))}\n"


def write(path: Path, text: str) -> None:
    """Puts the tables between their two marks in the document."""
    before, _, rest = path.read_text().partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"{path} has no {BEGIN.strip()} ... {END.strip()}")
    path.write_text(before + BEGIN + "\n" + text + "\n" + END + after)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first cases only")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at work together (default 2)")
    parser.add_argument("--json", type=Path, help="write the cells here")
    parser.add_argument("--launches", type=Path, help="what the simulator's tests launched (make xpu-table)")
    parser.add_argument("--docs", type=Path, help="the document to put the tables into")
    options = parser.parse_args()
    chosen = list(workloads())[: 4 if options.quick else None]
    cells = list(machine_code.cells(ocloc.fetch(), chosen, jobs=options.jobs))
    table = Table(*COLUMNS, title="XPU machine code")
    for cell in cells:
        table.add_row(*row(cell))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps([machine_code.record(cell) for cell in cells], indent=1))
    if options.docs:
        write(options.docs, markdown(cells, ran(options.launches) if options.launches else ""))
    problems = [problem for cell in cells for problem in cell.problems()]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
