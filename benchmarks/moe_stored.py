"""The same experts on a GPU with their weights stored in three ways, in one run, the replays of their CUDA graphs in turn.

- stacked: w1 [E, 2I, H] and w2 [E, H, I], as transformers 5 stores them: `braze.kernels.triton.moe.run`.
- apart: gate and up are two tensors [E, I, H].
- separate: gate, up and down of each expert are tensors of their own, 3 E of them (`torch.nn.Linear`s in a list), found by a
  table of addresses, which each call copies to the device (`braze.kernels.triton.separate`).
- in turn: the same tensors, one expert after the other (`braze.kernels.separate`), which waits for the counts of rows: no
  graph, time on the device's clock between calls that follow each other.

    python benchmarks/moe_stored.py [--json FILE] [--shape NAME ...] [--tokens N ...]
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from moe import SHAPES, error
from rich.console import Console
from rich.table import Table
from torch import Tensor

from braze.kernels import separate
from braze.kernels.triton import moe
from braze.kernels.triton import separate as triton_separate
from braze.kernels.triton.weights import Weights
from braze.tune import Shape, graph_times

NAMES = ("mixtral_8x7b", "qwen3_30b_a3b", "deepseek_v2_lite")
TOKENS = (1, 8, 128, 512, 2048, 8192)
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Cell:
    """Microseconds of each way."""

    shape: str
    tokens: int
    provider: str
    stacked: float
    apart: float
    separate: float
    in_turn: float


def ways(shape: Shape, w1: Tensor, w2: Tensor) -> list[Callable[..., Tensor]]:
    """Calls on weights stacked, apart, separate, and these one expert after the other."""
    spec = shape.spec
    gate, up = (w.contiguous() for w in w1.chunk(2, 1))
    firsts = [w.clone() for pair in zip(gate, up, strict=True) for w in pair]
    seconds = [w.clone() for w in w2]

    def stacked(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return moe.run(x, ids, weights, w1, w2, None, None, spec)

    def apart(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return moe.run(x, ids, weights, Weights(gate, up), w2, None, None, spec)

    def by_table(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return triton_separate.run(x, ids, weights, firsts, seconds, [], [], spec)

    def in_turn(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return separate.moe(x, ids, weights, firsts, seconds, [], [], spec)

    return [stacked, apart, by_table, in_turn]


def called_time(function: Callable[..., Any], sets: Sequence[tuple[Any, ...]], repeats: int) -> float:
    """Median microseconds of calls without a graph, each after the one before."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for n in range(repeats):
        function(*sets[n % len(sets)])
        events[n + 1].record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) * 1e3 for a, b in pairwise(events))


def measure(
    name: str, tokens: int, calls: Sequence[Callable[..., Tensor]], w1: Tensor, w2: Tensor, repeats: int
) -> Cell:
    """One cell; AssertionError where a result is not the reference's."""
    shape = SHAPES[name]
    sets = shape.sets(tokens)
    for call in calls:
        off = error(call(*sets[0]), *sets[0], w1, w2, shape.spec)
        assert off < TOLERANCE, (name, tokens, off)
    *graphs, in_turn = calls
    times = [*graph_times(graphs, sets, repeats), called_time(in_turn, sets, repeats)]
    return Cell(name, tokens, "braze", *(round(t, 2) for t in times))


def show(cells: Sequence[Cell], console: Console) -> None:
    table = Table(title=f"MoE on {torch.cuda.get_device_name()}, bfloat16, microseconds; in brackets over stacked")
    for header in ("shape", "T", "stacked", "apart", "separate", "in turn"):
        table.add_column(header, justify="left" if header == "shape" else "right")
    for c in cells:
        us = (f"{t:.1f} ({t / c.stacked:.2f})" for t in (c.apart, c.separate, c.in_turn))
        table.add_row(c.shape, str(c.tokens), f"{c.stacked:.1f}", *us)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the cells to this file")
    parser.add_argument(
        "--shape", nargs="*", default=list(NAMES), choices=[n for n in SHAPES if n != "gpt_oss_20b_oai"]
    )
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    parser.add_argument("--repeats", type=int, default=25)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    console = Console(width=130)
    cells: list[Cell] = []
    torch.manual_seed(0)
    for name in options.shape:
        w1, w2 = SHAPES[name].weights()
        calls = ways(SHAPES[name], w1, w2)
        for tokens in options.tokens:
            cells.append(measure(name, tokens, calls, w1, w2, options.repeats))
            if options.json:
                options.json.write_text(json.dumps([asdict(c) for c in cells], indent=1))
            torch.cuda.empty_cache()
        del w1, w2, calls
    show(cells, console)


if __name__ == "__main__":
    main()
