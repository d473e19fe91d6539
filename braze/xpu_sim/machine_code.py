"""Machine code of every Triton kernel for Intel GPUs: what `braze doctor --xpu` checks and docs/xpu.md shows.

Each workload is launched on the simulator without being run, and the SPIR-V of its launches compiled for the GPU whose tiles
it was launched with. Workloads whose launches are the same code are one row. What was compiled is kept by content.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from braze import xpu_sim
from braze.xpu_sim import native, ocloc
from braze.xpu_sim.driver import Launch
from braze.xpu_sim.workloads import Workload

DEVICES = ("pvc", "bmg")
COLUMNS = ("kernel", "case", "GPU", "warps", "registers", "spill", "calls", "SLM", "loop: DPAS / 2D / gathers / all")
NAMES = 3  # of a row's workloads that are written out
PRODUCT = "moe_gemm"


@dataclass(frozen=True)
class Cell:
    """One kernel on one GPU, and the workloads that launch it."""

    workloads: tuple[Workload, ...]
    launch: Launch
    code: native.NativeCode

    @property
    def shipped(self) -> bool:
        """Whether a model's shape is given these tiles."""
        return any(workload.shipped for workload in self.workloads)

    def problems(self) -> list[str]:
        """What forbids to ship the kernel, in words."""
        found = self.code.problems()
        loops = [loop for loop in self.code.loops if loop.dpas]
        if self.launch.kernel == PRODUCT and any(workload.matrix for workload in self.workloads):
            if not loops:
                found.append(f"{self.code.kernel} has no DPAS in a loop on {self.code.device}")
            if not all(loop.loads for loop in loops):
                found.append(f"{self.code.kernel} has a loop without 2D block loads on {self.code.device}")
        return [f"{self.workloads[0].name}: {problem}" for problem in found]


def launches(
    workloads: Iterable[Workload], device: str
) -> dict[tuple[bytes, str], tuple[Launch, tuple[Workload, ...]]]:
    """What the workloads launch, each code once, with those that launch it."""
    found: dict[tuple[bytes, str], tuple[Launch, tuple[Workload, ...]]] = {}
    for workload in workloads:
        with xpu_sim.device(device), xpu_sim.record(run=False) as made:
            workload.call()
        for launch in made:
            key = launch.module, launch.flags
            known = found.get(key, (launch, ()))[1]
            found[key] = launch, known if workload in known else (*known, workload)
    return found


def cells(
    tools: ocloc.Tools, workloads: Sequence[Workload], devices: Sequence[str] = DEVICES, jobs: int = 2
) -> Iterator[Cell]:
    """The code of every kernel on every GPU, in order; RuntimeError where ocloc refuses one."""
    with ThreadPoolExecutor(jobs) as pool:
        for device in devices:
            found = launches(workloads, device).values()

            def compiled(launch: Launch, device: str = device) -> native.NativeCode:
                return native.compile_native(tools, launch.module, launch.flags, device)

            for (launch, who), code in zip(found, pool.map(compiled, (x for x, _ in found)), strict=True):
                yield Cell(who, launch, code)


def row(cell: Cell) -> tuple[str, ...]:
    """A cell as the table shows it."""
    loops = [f"{x.dpas} / {x.loads} / {x.gathers} / {x.instructions}" for x in cell.code.loops if x.dpas]
    code, launch = cell.code, cell.launch
    names = [workload.name for workload in cell.workloads]
    more = [f"{len(names) - NAMES} more"] if len(names) > NAMES else []
    numbers = (launch.warps, code.registers, code.spill, code.calls, launch.shared)
    case = "; ".join(names[:NAMES] + more)
    return (code.kernel, case, code.device, *map(str, numbers), "; ".join(loops) or "no loop with DPAS")


def summary(found: Sequence[Cell]) -> str:
    """How many kernels, and how many of them are clean, by GPU."""
    lines = []
    for device in dict.fromkeys(cell.code.device for cell in found):
        here = [cell for cell in found if cell.code.device == device]
        clean = sum(not cell.problems() for cell in here)
        tiles = sum(cell.shipped and cell.launch.kernel == PRODUCT for cell in here)
        kinds = len({cell.launch.kernel for cell in here})
        lines.append(
            f"{device}: {len(here)} codes of {kinds} kernels compiled, {clean} without a spill or a call and with what their "
            f"loops must have; {tiles} of them are products in the tiles of the five models' shapes."
        )
    return "\n".join(lines)


def record(cell: Cell) -> dict[str, object]:
    """A cell for a JSON file."""
    return {"cases": [w.name for w in cell.workloads], "shipped": cell.shipped, "problems": cell.problems()} | {
        **dataclasses.asdict(cell.code), "warps": cell.launch.warps, "slm": cell.launch.shared,
    }  # fmt: skip
