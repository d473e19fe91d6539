"""`braze tune`: measures tiles for the Triton experts on this device and keeps the best of each number of tokens.

A product's time hardly depends on the other product's tile: one sweep over tiles of the first and one over tiles of the
second, for each number of rows that a tile may have, instead of all pairs. What was measured is written at once and skipped
by the next run.
"""

import argparse
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from braze.kernels.spec import MoeSpec
from braze.kernels.triton import compat, moe
from braze.kernels.triton.choose_config import Config, Problem, Tile, apart, choose_config, user_folder

L2_BYTES = 50 * 2**20
SHARED_BYTES = 227 * 2**10
TOKENS = (1, 8, 32, 128, 512, 2048, 8192)


@dataclass(frozen=True)
class Shape:
    """A model's experts: how many, how many a token has, their sizes, and what they compute."""

    experts: int
    top_k: int
    hidden: int
    intermediate: int
    spec: MoeSpec = MoeSpec()
    dtype: torch.dtype = torch.bfloat16

    def weights(self) -> tuple[Tensor, Tensor]:
        """Random w1 and w2 of a size that keeps activations near 1."""
        e, h, i = self.experts, self.hidden, self.intermediate
        n = i if self.spec.layout == "none" else 2 * i
        first, second = ((e, h, n), (e, i, h)) if self.spec.transposed else ((e, n, h), (e, h, i))
        device = torch.accelerator.current_accelerator()
        w1 = torch.empty(first, device=device, dtype=self.dtype).normal_(0, h**-0.5)
        return w1, torch.empty(second, device=device, dtype=self.dtype).normal_(0, i**-0.5)

    def tokens(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Random x [T, H], ids and weights [T, k] of a router whose logits are normal."""
        device = torch.accelerator.current_accelerator()
        x = torch.randn(count, self.hidden, device=device, dtype=self.dtype)
        values, ids = torch.softmax(torch.randn(count, self.experts, device=device), -1).topk(self.top_k)
        return x, ids, values / values.sum(-1, keepdim=True)

    def sets(self, count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Routings that together read more of the weights than the L2 cache holds."""
        used = min(self.experts, count * self.top_k)
        read = used * self.hidden * self.intermediate * 3 * self.dtype.itemsize
        return [self.tokens(count) for _ in range(max(2, min(16, 8 * L2_BYTES // read)))]


def captured(function: Callable[..., Any], sets: Sequence[tuple[Any, ...]], pool: Any = None) -> torch.cuda.CUDAGraph:
    """A CUDA graph that calls the function on each set, replayed once."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function(*sets[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for inputs in sets:
            function(*inputs)
    graph.replay()
    return graph


def replay_time(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds of one replay."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def graph_time(function: Callable[..., Any], sets: Sequence[tuple[Any, ...]], repeats: int) -> float:
    """Microseconds a call: the median over replays of one CUDA graph that calls the function on each set."""
    graph = captured(function, sets)
    return statistics.median(replay_time(graph) for _ in range(repeats)) / len(sets)


def graph_times(functions: Sequence[Callable[..., Any]], sets: Sequence[tuple[Any, ...]], repeats: int) -> list[float]:
    """`graph_time` of each function, infinite where it fails, their replays taken in turn: a GPU that has become warm
    is slower by more than tiles differ."""
    pool = torch.cuda.graph_pool_handle()
    graphs: list[torch.cuda.CUDAGraph | None] = []
    for function in functions:
        try:
            graphs.append(captured(function, sets, pool))
        except Exception:  # too much shared memory, say
            torch.cuda.synchronize()
            graphs.append(None)
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for taken, graph in zip(times, graphs, strict=True):
            taken.append(replay_time(graph) / len(sets) if graph is not None else float("inf"))
    return [statistics.median(taken) for taken in times]


def tile_rows(p: Problem) -> list[int]:
    """Numbers of rows a tile may have, from how many rows an expert has on average."""
    each = p.tokens * p.top_k / min(p.experts, p.tokens * p.top_k)
    wanted = [(16, 0, 24), (32, 14, 48), (64, 28, 260), (128, 100, 1e9)]
    return [rows for rows, low, high in wanted if low <= each <= high]


def tiles(rows: int, direct: bool) -> list[Tile]:
    """Tiles worth measuring for `rows` rows."""
    if rows == 16:
        few = [(128, 128, 8, 3), (64, 256, 4, 3), (32, 256, 4, 3), (64, 128, 4, 4), (64, 128, 4, 5), (32, 128, 4, 4)]
        boxes = [(64, 128, 4, 4), (128, 128, 4, 4), (64, 256, 4, 3), (128, 128, 8, 4)]
        found = [Tile(*t) for t in few] + [Tile(*t, descriptors=True) for t in boxes]
    elif rows == 32:
        boxes = [(64, 128, 4, 4), (128, 128, 4, 3), (128, 64, 4, 5), (64, 256, 4, 3), (128, 128, 8, 3), (256, 64, 8, 4)]
        found = [Tile(*t, descriptors=True) for t in boxes] + [Tile(64, 128, 4, 4)]
    elif rows == 64:
        boxes = [(128, 64, 4, 4), (256, 64, 4, 4), (128, 128, 4, 3), (256, 64, 8, 4)]
        found = [Tile(*t, descriptors=True) for t in boxes]
        found += [Tile(128, 64, 4, 4, programs=2, descriptors=True), Tile(256, 64, 4, 4, programs=1, descriptors=True)]
    else:
        wide = [(256, 64, 8, 3), (256, 64, 8, 4)]
        found = [Tile(*t, group=16, descriptors=True, halves=h) for t in wide for h in (False, True)]
        found += [Tile(*t, group=16, programs=1, descriptors=True) for t in wide]
        found += [Tile(128, 64, 4, 3, group=16, descriptors=True, halves=True)]
        found += [Tile(128, 64, 4, 3, group=16, programs=2, descriptors=True)]
    if direct:
        found = [t for t in found if not t.programs]
    return [t for t in found if (rows + t.columns) * t.inner * 2 * t.stages <= SHARED_BYTES]


def vector_tiles(p: Problem) -> tuple[list[Tile], list[Tile]]:
    """Tiles of both products worth measuring for `vector`: rows of weights, elements of each at a time, and warps."""
    pair = 2 if p.gated else 1
    up = [(4, 1024, 4), (8, 512, 4), (8, 512, 8), (2, 1024, 4), (2, 2048, 4), (4, 2048, 8), (4, 512, 4)]
    down = [(8, 1024, 4), (8, 512, 4), (16, 512, 8), (16, 256, 2), (32, 256, 4), (16, 256, 4), (8, 512, 2)]
    slots = 1 << (p.top_k - 1).bit_length()
    seconds = [Tile(max(1, rows // slots), inner, warps, 1) for rows, inner, warps in down]
    return [Tile(pair * cols, inner, warps, 1) for cols, inner, warps in up], seconds


def sweeps(p: Problem) -> list[tuple[list[Config], list[Config]]]:
    """For each kind of tile rows, configs that differ in the first product's tile, and in the second's."""
    found = []
    if apart(p):
        firsts, seconds = vector_tiles(p)
        found.append(
            ([Config(1, True, t, seconds[0]) for t in firsts], [Config(1, True, firsts[0], t) for t in seconds])
        )
    for rows in tile_rows(p):
        for direct in (True, False):
            if (direct and p.tokens * p.top_k > 64) or (not direct and p.tokens * p.top_k <= 16):
                continue
            choices = tiles(rows, direct)
            if p.tokens == 1:  # making a descriptor takes the host as long as the kernels take
                choices = [t for t in choices if not t.descriptors] + [Tile(32, 128, 2, 4)]
            splits = (1, 2, 4) if direct and p.tokens == 1 else (1, 2) if direct and p.tokens <= 8 else (1,)
            base = choices[0]
            first = [Config(rows, direct, t, base) for t in choices]
            second = [Config(rows, direct, base, replace(t, split=s)) for t in choices for s in splits]
            found.append((first, second))
    return found


def problem(shape: Shape, tokens: int) -> Problem:
    device = torch.device(torch.accelerator.current_accelerator() or "cpu")
    return Problem(
        tokens, shape.top_k, shape.experts, shape.hidden, shape.intermediate, shape.spec.layout != "none",
        shape.dtype.itemsize, compat.device_name(device), compat.processors(device),
        vector=not shape.spec.transposed,
    )  # fmt: skip


def _compile(job: tuple[Shape, int, list[Config]]) -> None:
    """Runs configs once, in a process of its own: the compiled kernels land in Triton's cache on disk."""
    shape, tokens, configs = job
    torch.manual_seed(0)
    w1, w2 = shape.weights()
    inputs = shape.tokens(tokens)
    for config in configs:
        try:
            moe.run(*inputs, w1, w2, None, None, shape.spec, config=config)
        except Exception:
            continue
    torch.cuda.synchronize()


def compile_ahead(jobs: Sequence[tuple[Shape, int, list[Config]]], processes: int) -> None:
    """Compiles in parallel what is about to be measured."""
    pieces = [(shape, tokens, configs[n : n + 6]) for shape, tokens, configs in jobs for n in range(0, len(configs), 6)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for _ in pool.imap_unordered(_compile, pieces):
            pass


def best(shape: Shape, tokens: int, weights: tuple[Tensor, Tensor], repeats: int = 9) -> tuple[Config, float]:
    """The fastest config of this many tokens, the one in use among them, and its time in microseconds."""
    sets = shape.sets(tokens)
    w1, w2 = weights

    def call(config: Config) -> Callable[..., Any]:
        return lambda x, ids, w: moe.run(x, ids, w, w1, w2, None, None, shape.spec, config=config)

    def ranked(configs: Sequence[Config], repeats: int) -> list[tuple[float, int]]:
        return sorted(zip(graph_times([call(c) for c in configs], sets, repeats), range(len(configs)), strict=True))

    finals = [choose_config(problem(shape, tokens))]
    for firsts, seconds in sweeps(problem(shape, tokens)):
        a, b = ([configs[n] for _, n in ranked(configs, repeats)[:2]] for configs in (firsts, seconds))
        finals += [replace(x, second=y.second) for x in a for y in b]
    taken, n = ranked(finals, 2 * repeats)[0]
    return finals[n], taken


def tune(shape: Shape, counts: Sequence[int], folder: Path, console: Console) -> None:
    """Measures what `folder` lacks for these numbers of tokens, and writes it there."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{problem(shape, 1).device}.json"
    known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    key = problem(shape, 1).shape
    missing = [t for t in counts if str(t) not in known.get(key, {})]
    with Progress(console=console) as progress:
        task = progress.add_task(f"{key}: compiling", total=len(missing) + 1)
        jobs = [(shape, t, [c for pair in sweeps(problem(shape, t)) for cs in pair for c in cs]) for t in missing]
        compile_ahead(jobs, max(1, min(14, (os.cpu_count() or 1) - 1)))
        progress.advance(task)
        weights = shape.weights()
        for tokens in missing:
            progress.update(task, description=f"{key}: {tokens} tokens")
            config, taken = best(shape, tokens, weights)
            cells = known.setdefault(key, {}) | {str(tokens): asdict(config)}
            known[key] = dict(sorted(cells.items(), key=lambda cell: int(cell[0])))
            file.write_text(json.dumps(known, indent=1) + "\n")
            progress.console.print(f"{key} {tokens} tokens: {taken:.1f} us  {config}", soft_wrap=True)
            progress.advance(task)


def main(argv: Sequence[str] | None = None) -> int:
    """`braze tune`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="braze tune", description=__doc__)
    parser.add_argument("--experts", type=int, required=True)
    parser.add_argument("--top-k", type=int, required=True)
    parser.add_argument("--hidden", type=int, required=True)
    parser.add_argument("--intermediate", type=int, required=True)
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--layout", choices=("halves", "interleaved", "none"), default="halves")
    parser.add_argument("--transposed", action="store_true", help="weights are [E, H, N] and [E, I, H]")
    parser.add_argument("--folder", type=Path, default=user_folder(), help="where the JSON goes (default: %(default)s)")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("tuning measures with CUDA graphs: it needs a CUDA device")
    spec = MoeSpec(layout=args.layout, transposed=args.transposed)
    if args.layout == "none":
        spec = replace(spec, activation="g*sigmoid(g)")
    shape = Shape(args.experts, args.top_k, args.hidden, args.intermediate, spec, getattr(torch, args.dtype))
    tune(shape, args.tokens, args.folder, Console())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
