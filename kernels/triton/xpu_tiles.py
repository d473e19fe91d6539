"""Tiles of the expert products on Intel GPUs: a roofline over what the machine code of each candidate holds.

A tile takes the longest of four times: its DPAS, its other instructions, its bytes through L1, and waiting for loads, which
resident tiles share. All tiles together take the longer of that and of memory's time, and a tenth of the shorter. The
candidates, their registers, DPAS and loads are in xpu_tiles.json, which benchmarks/xpu_tiles.py makes: none spills. Nothing
here was timed on a GPU.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from braze.kernels.triton.choose_config import Config, Problem, Tile

FILE = Path(__file__).with_name("xpu_tiles.json")
SHARED_BYTES = 128 * 1024  # of an Xe core's work groups
ENGINES = 8  # vector engines of an Xe core, each with a matrix engine
LINE_BYTES = 64  # that an Xe core reads through L1 in a cycle
OVERLAP = 0.1  # of the lesser of computing and reading is not hidden behind the other
COPY_LAUNCH = 4e-6  # seconds of one more launch


@dataclass(frozen=True)
class Gpu:
    """cores: Xe cores; clock: Hz; dpas: cycles of an 8x16x16 product of 16-bit numbers; bandwidth: bytes a second;
    wait: cycles from a load to its use that a prefetch leaves."""

    cores: int
    clock: float
    dpas: int
    bandwidth: float
    wait: int

    @property
    def flops(self) -> float:
        """Of 16-bit products, a second."""
        return self.cores * ENGINES * 2 * 8 * 16 * 16 / self.dpas * self.clock


#: One stack of a Max 1550, which is a device of its own to torch: half of the card's 3277 GB/s; 419 TFLOP/s. Arc B580: 117.
GPUS: Mapping[str, Gpu] = {
    "pvc": Gpu(cores=64, clock=1.6e9, dpas=8, bandwidth=1638e9, wait=400),
    "bmg": Gpu(cores=20, clock=2.85e9, dpas=16, bandwidth=456e9, wait=400),
}


@dataclass(frozen=True)
class Candidate:
    """A tile without a spill: registers 0 for 128 by the compiler's own choice; slm: bytes of shared memory; dpas and others:
    instructions of its loops a step, summed over the loops, for each warp."""

    rows: int
    columns: int
    inner: int
    warps: int
    registers: int
    slm: int
    dpas: int
    others: int


@lru_cache(maxsize=1)
def _facts() -> Mapping[str, Any]:
    return json.loads(FILE.read_text())  # type: ignore[no-any-return]


@lru_cache(maxsize=256)
def candidates(name: str, gpu: str) -> Sequence[Candidate]:
    """The tiles of a product, by its key in the file."""
    return [_candidate(entry, gpu) for entry in _facts().get(name, ())]


def _candidate(entry: Mapping[str, Any], gpu: str) -> Candidate:
    rows, columns, inner, warps = entry["tile"]
    loop = entry[gpu]
    others = loop["instructions"] - loop["dpas"]
    return Candidate(rows, columns, inner, warps, entry["registers"], entry["slm"], loop["dpas"], others)


@dataclass(frozen=True)
class Work:
    """One product: `tiles` of rows share `active` experts' weights [columns, inner]; element: bytes."""

    rows: int
    active: int
    columns: int
    inner: int
    element: int

    def row_tiles(self, rows: int) -> int:
        return self.active * math.ceil(self.rows / self.active / rows)


def seconds(c: Candidate, work: Work, gpu: Gpu, split: int = 1) -> float:
    """What the model expects of a product in these tiles, its inner dimension cut in `split`."""
    steps = math.ceil(work.inner / (c.inner * split))
    tiles = work.row_tiles(c.rows) * math.ceil(work.columns / c.columns) * split
    each = math.ceil(tiles / gpu.cores)  # of the busiest core
    threads = 64 if c.registers == 0 else 32
    resident = max(1, min(threads // c.warps, SHARED_BYTES // max(1, c.slm)))
    issued = max(c.dpas * gpu.dpas, c.others) * c.warps * steps / ENGINES
    through = (c.rows + c.columns) * c.inner * work.element * steps / LINE_BYTES
    waited = steps * gpu.wait
    core = max(each * max(issued, through), math.ceil(each / resident) * waited) / gpu.clock
    moved = work.active * work.columns * work.inner + work.rows * (work.inner + work.columns)
    parts = 8 * work.rows * work.columns * split if split > 1 else 0  # written and read in float32
    memory = work.element * moved / gpu.bandwidth
    return max(core, memory) + OVERLAP * min(core, memory) + parts / gpu.bandwidth


def choose(p: Problem, direct: bool) -> Config:
    """The tiles that the model likes best for a problem; on an Intel GPU that it does not know, those for an Arc."""
    return best(p, direct)[1]


def best(p: Problem, direct: bool) -> tuple[float, Config]:
    """(seconds that the model expects, config)."""
    return min(_configs(p, direct), key=lambda found: found[0])


def _configs(p: Problem, direct: bool) -> Iterator[tuple[float, Config]]:
    """(seconds, config) of the best pair of tiles for each number of rows and way to find rows."""
    name = p.device if p.device in GPUS else "bmg"
    gpu = GPUS[name]
    rows = max(1, p.tokens * p.top_k)
    active = min(p.experts, rows)
    first = Work(rows, active, p.intermediate * (2 if p.gated else 1), p.hidden, p.element)
    second = Work(rows, active, p.hidden, p.intermediate, p.element)
    for found in ("direct",) if direct else ("gathered", "copied"):
        firsts = candidates(_first(p, found), name)
        whole, parts = (candidates(_second(p, direct, split), name) for split in (1, 2))
        copy = 2 * rows * p.hidden * p.element / gpu.bandwidth + COPY_LAUNCH if found == "copied" else 0.0
        for size in {c.rows for c in firsts} & {c.rows for c in whole}:
            a = min((seconds(c, first, gpu), n, c) for n, c in enumerate(firsts) if c.rows == size)
            b = min(
                (seconds(c, second, gpu, split), split, n, c)
                for split in (1, 2, 4)
                for n, c in enumerate(whole if split == 1 else parts)
                if c.rows == size
            )
            tiles = _tile(a[-1], direct), _tile(b[-1], direct, b[1])
            yield a[0] + b[0] + copy, Config(size, direct, *tiles, found == "copied")


def _first(p: Problem, found: str) -> str:
    """The first product's key in the file; the loop without a gate is that of interleaved columns, and gate and up of two
    tensors are two loops as halves are in blocks."""
    layout = {"none": "interleaved", "apart": "halves"}.get(p.layout, p.layout)
    return f"first/{8 * p.element}/{layout}/{_reads(p)}/{found}"


def _second(p: Problem, direct: bool, split: int) -> str:
    """The second product's key in the file; partial sums are kept in float32."""
    result = 4 if split > 1 else max(p.result, p.element)
    return f"second/{8 * p.element}/{8 * result}/{_reads(p)}/{'direct' if direct else 'sorted'}"


def _reads(p: Problem) -> str:
    return p.reads if p.element == 2 else "pointers"


def names(p: Problem, config: Config) -> tuple[str, str]:
    """The keys of a config's two products in the file."""
    found = "direct" if config.direct else "copied" if config.permute else "gathered"
    return _first(p, found), _second(p, config.direct, config.second.split)


def _tile(c: Candidate, direct: bool, split: int = 1) -> Tile:
    return Tile(c.columns, c.inner, c.warps, 2, group=1 if direct else 8, split=split, registers=c.registers)
