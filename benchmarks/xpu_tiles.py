"""Tries tiles of the expert products on Intel's compilers and keeps those that spill nothing, with what their loops hold.

Every candidate is compiled for PVC and Battlemage in each form of a product: layout of gate and up, which of a weight's
dimensions is contiguous, how rows are found. Those that the cost model in kernels/triton/xpu_tiles.py then chooses for the
models' shapes are compiled with every epilogue too, and dropped where one spills; kernels/triton/xpu_tiles.json has the rest.
Takes a quarter of an hour; machine code is cached by content.

    python benchmarks/xpu_tiles.py [--jobs N]
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from braze import xpu_sim
from braze.kernels.spec import MoeSpec, WeightOn
from braze.kernels.triton import moe, xpu_tiles
from braze.kernels.triton.choose_config import DIRECT_ROWS, Config, Problem, Tile
from braze.kernels.triton.xpu_tiles import FILE, SHARED_BYTES
from braze.xpu_sim import native, ocloc
from braze.xpu_sim.driver import Launch
from braze.xpu_sim.workloads import MODELS, TOKENS

DEVICES = ("pvc", "bmg")
LARGE = "-cl-intel-256-GRF-per-thread"
#: With more spilled bytes than this every version of Intel's Triton builds a kernel anew with twice the registers.
REBUILT = 1087
PER_WARP = (128, 1024)  # elements of the accumulators: a DPAS result at least, a quarter of 256 registers at most
#: registers asked for -> elements of the accumulators, of a warp, that leave room for an epilogue; 0 stands for 128
HELD = {0: 256, 256: 1024}
LEAST = 32  # of the same where weights are read by pointers, which take registers of their own
#: how rows are found -> rows of a tile worth trying
ROWS = {"direct": (8, 16), "gathered": (16, 32, 64), "copied": (32, 64, 128, 256)}
#: A first product without a gate has the loop of an interleaved one, and less to do after it.
LAYOUTS = {
    "halves": "g*u*sigmoid(g)",
    "interleaved": "(Min(Max(u, -7.0), 7.0) + 1.0) * Min(g, 7.0) * sigmoid(1.702*Min(g, 7.0))",
}


@dataclass(frozen=True)
class Form:
    """What decides a product's loop besides its tile."""

    layout: str
    reads: str  # of weights: blocks of "rows" or "columns", or "pointers"
    found: str  # rows: "direct", "gathered" or "copied"
    dtype: torch.dtype

    @property
    def names(self) -> tuple[str, ...]:
        """The keys in the file of the first product, and of the second with its result in float32 and in x's dtype."""
        bits = self.dtype.itemsize * 8
        second = f"{self.reads}/{'direct' if self.found == 'direct' else 'sorted'}"
        return (
            f"first/{bits}/{self.layout}/{self.reads}/{self.found}",
            *(f"second/{bits}/{result}/{second}" for result in sorted({32, bits}, reverse=True)),
        )


def forms() -> Iterator[Form]:
    for layout, reads, found in itertools.product(LAYOUTS, ("rows", "columns"), ROWS):
        yield Form(layout, reads, found, torch.bfloat16)
    for layout, found in itertools.product(LAYOUTS, ("direct", "gathered")):
        yield Form(layout, "pointers", found, torch.bfloat16)
        yield Form(layout, "pointers", found, torch.float32)


def candidates(form: Form) -> Iterator[Config]:
    blocks = form.reads != "pointers"
    columns, inners = ((64, 128, 256), (32, 64)) if blocks else ((32, 64), (16, 32))
    for rows, n, inner, warps in itertools.product(ROWS[form.found], columns, inners, (4, 8, 16, 32)):
        if not (PER_WARP[0] if blocks else LEAST) <= rows * n // warps <= PER_WARP[1]:
            continue
        if (inner == 64 and rows > 32) or (rows > 32 and not blocks):
            continue
        if form.layout == "interleaved" and rows * n * 8 > SHARED_BYTES:
            continue
        tile = Tile(n, inner, warps, 2, group=1 if form.found == "direct" else 8)
        yield Config(rows, form.found == "direct", tile, tile, form.found == "copied")


@dataclass(frozen=True)
class Variant:
    """What changes a product's code apart from its form: bias, the side of the router's weight, sizes that tiles divide."""

    bias: torch.dtype | None = torch.bfloat16
    weight_on: WeightOn = "output"
    even: bool = True


VARIANTS = (
    Variant(),
    Variant(bias=None),
    Variant(bias=torch.float32, weight_on="input"),
    Variant(bias=None, weight_on="input"),
    Variant(even=False),
)


def launch(form: Form, config: Config, name: str, variant: Variant = VARIANTS[0]) -> Launch:
    """The product of that name as it is launched for sizes that specialise it as real ones do."""
    odd = 1 if form.reads == "pointers" and form.dtype == torch.bfloat16 else 0 if variant.even else 16
    hidden, inner, experts = 1024 + odd, 512 + odd, 4
    tokens = 4 if config.direct else 64
    dtype = form.dtype
    w1, w2 = torch.empty(experts, 2 * inner, hidden, dtype=dtype), torch.empty(experts, hidden, inner, dtype=dtype)
    transposed = form.reads == "columns"
    if transposed:
        w1, w2 = w1.transpose(1, 2).contiguous(), w2.transpose(1, 2).contiguous()
    biases = [
        None if variant.bias is None else torch.empty(experts, n, dtype=variant.bias) for n in (2 * inner, hidden)
    ]
    x, ids = torch.empty(tokens, hidden, dtype=dtype), torch.zeros(tokens, 2, dtype=torch.int64)
    result = None if name.startswith("first") else torch.float32 if "/32/" in name[9:] else dtype
    spec = MoeSpec(LAYOUTS[form.layout], form.layout, transposed, variant.weight_on, out_dtype=result)
    with xpu_sim.device("pvc"), xpu_sim.record(run=False) as made:
        moe.launch(x, ids, torch.empty(tokens, 2), w1, w2, *biases, spec, config)
    return [one for one in made if one.kernel == "moe_gemm"][0 if name.startswith("first") else 1]


def facts(tools: ocloc.Tools, launch: Launch, tile: Tile, rows: int) -> dict[str, Any] | None:
    """The tile with what its code holds on each device; None where it spills, calls out or needs too much memory."""
    each = rows * tile.columns // tile.warps
    if launch.shared > SHARED_BYTES:
        return None
    for registers in (0, 256):
        codes = {d: native.compile_native(tools, launch.module, LARGE if registers else "", d) for d in DEVICES}
        if not any(code.problems() for code in codes.values()):
            break
        if registers or any(0 < code.spill <= REBUILT or code.calls for code in codes.values()):
            return None
    if each > HELD[registers]:
        return None
    loops = {d: main_loops(code) for d, code in codes.items()}
    return {
        "tile": [rows, tile.columns, tile.inner, tile.warps],
        "registers": registers,
        "slm": launch.shared,
        **{d: {k: sum(getattr(x, k) for x in found) for k in COUNTS} for d, found in loops.items()},
    }


COUNTS = ("dpas", "loads", "gathers", "slm", "instructions")


def main_loops(code: native.NativeCode) -> list[native.Loop]:
    """The loops over the inner dimension: those with DPAS, or the longest."""
    return [x for x in code.loops if x.dpas] or [max(code.loops, key=lambda x: x.instructions)]


def alone(config: Config, name: str) -> Config:
    """The config with one product's tile; the other's is small, so that what does not fit is this one."""
    small = Tile(32, 32, 4, 2)
    return replace(config, **{"second" if name.startswith("first") else "first": small})


def measure(job: tuple[Form, Config]) -> list[tuple[str, dict[str, Any] | None]]:
    """Facts of both products in one tile."""
    form, config = job
    tools = ocloc.fetch()
    found: list[tuple[str, dict[str, Any] | None]] = []
    for name in form.names:
        try:
            found.append((name, facts(tools, launch(form, alone(config, name), name), config.first, config.rows)))
        except OutOfResources:  # more shared memory than there is
            found.append((name, None))
    return found


def holds(job: tuple[str, Form, Config]) -> bool:
    """Whether a product's tile spills in no variant, with the registers that it was found with."""
    name, form, config = job
    tools = ocloc.fetch()
    flags = LARGE if config.first.registers else ""
    for variant in VARIANTS:
        try:
            made = launch(form, alone(config, name), name, variant)
        except OutOfResources:
            return False
        for device in DEVICES:
            if native.compile_native(tools, made.module, flags, device).problems():
                return False
            # With few spilled bytes it would stay as it is inside a graph, which can't ask for registers.
            if flags and 0 < native.compile_native(tools, made.module, "", device).spill <= REBUILT:
                return False
    return True


Kept = dict[str, dict[str, dict[str, Any]]]


def write(kept: Kept, tried: int) -> None:
    lines = ",\n".join(
        f' "{name}": [\n  ' + ",\n  ".join(json.dumps(e) for e in entries.values()) + "\n ]"
        for name, entries in sorted(kept.items())
    )
    FILE.write_text(f'{{\n "tried": {tried},\n "ocloc": "{ocloc.fetch().version.split()[-1]}",\n{lines}\n}}\n')
    xpu_tiles._facts.cache_clear()
    xpu_tiles.candidates.cache_clear()


def problems() -> Iterator[Problem]:
    """The models' shapes, few tokens and many; the other forms and dtypes at a size of their own."""
    for case, tokens, gpu in itertools.product(MODELS.values(), TOKENS, DEVICES):
        reads = "columns" if case.spec.transposed else "rows"
        sizes = (tokens, case.top_k, case.experts, case.hidden, case.intermediate)
        yield Problem(*sizes, True, 2, gpu, 64, case.spec.layout, reads)
    for tokens, gpu, layout, reads in itertools.product((1, 64, 4096), DEVICES, LAYOUTS, ("rows", "columns")):
        for result in (2, 4):
            yield Problem(tokens, 4, 32, 4096, 4096, True, 2, gpu, 64, layout, reads, result)
    for element, tokens, layout in itertools.product((2, 4), (1, 4096), LAYOUTS):
        for result in (2, 4):
            yield Problem(tokens, 2, 8, 1024, 1024, True, element, "bmg", 20, layout, "pointers", result)


def chosen() -> set[tuple[str, str]]:
    """(product, tile) that the model chooses for these problems."""
    found = set()
    for p in problems():
        config = xpu_tiles.choose(p, p.tokens * p.top_k <= DIRECT_ROWS)
        for name, tile in zip(xpu_tiles.names(p, config), (config.first, config.second), strict=True):
            found.add((name, tile_key(config.rows, tile)))
    return found


def tile_key(rows: int, tile: Tile) -> str:
    return f"{rows}x{tile.columns}x{tile.inner} {tile.warps}"


def refine(kept: Kept, tried: int, pool: Any) -> Kept:
    """Of the tiles those that the model chooses and that spill in no variant; where one does, the model chooses again."""
    by_name = {name: form for form in forms() for name in form.names}
    verified: set[tuple[str, str]] = set()
    while new := chosen() - verified:
        jobs = []
        for name, key in sorted(new):
            rows, columns, inner, warps = kept[name][key]["tile"]
            registers, direct = kept[name][key]["registers"], name.endswith("direct")
            tile = Tile(columns, inner, warps, 2, group=1 if direct else 8, registers=registers)
            jobs.append((name, by_name[name], Config(rows, direct, tile, tile, name.endswith("copied"))))
        for (name, key), fine in zip(sorted(new), pool.map(holds, jobs, chunksize=1), strict=True):
            if fine:
                verified.add((name, key))
            else:
                del kept[name][key]
        write(kept, tried)
        print(f"{len(verified)} tiles hold in every variant", flush=True)
    used = chosen()
    return {name: {k: e for k, e in tiles.items() if (name, k) in used} for name, tiles in kept.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument(
        "--refine", action="store_true", help="only drop, of the tiles in the file, those that spill somewhere"
    )
    options = parser.parse_args()
    ocloc.fetch()
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        kept, tried = read() if options.refine else sweep(pool)
        print(f"{sum(map(len, kept.values()))} of {tried} tiles without a spill on {' and '.join(DEVICES)}", flush=True)
        write(kept, tried)
        write(refine(kept, tried, pool), tried)


def sweep(pool: Any) -> tuple[Kept, int]:
    """All candidates that spill in no form, and how many were tried."""
    jobs = [(form, config) for form in forms() for config in candidates(form)]
    kept: Kept = {}
    tried: set[tuple[str, str]] = set()
    for n, ((_, config), found) in enumerate(zip(jobs, pool.imap(measure, jobs, chunksize=4), strict=True)):
        for name, entry in found:
            tried.add((name, tile_key(config.rows, config.first)))
            if entry is not None:
                kept.setdefault(name, {})[tile_key(config.rows, config.first)] = entry
        if n % 20 == 0:
            print(f"{n} of {len(jobs)}", flush=True)
    return kept, len(tried)


def read() -> tuple[Kept, int]:
    """What the file has."""
    found = json.loads(FILE.read_text())
    tiles = {name: entries for name, entries in found.items() if isinstance(entries, list)}
    return {name: {"{}x{}x{} {}".format(*e["tile"]): e for e in entries} for name, entries in tiles.items()}, found[
        "tried"
    ]


if __name__ == "__main__":
    main()
