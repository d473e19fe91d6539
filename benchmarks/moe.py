"""Triton experts on an H100, against the best of vLLM, SGLang, triton_kernels and torch's grouped products in each cell.

Medians of CUDA-graph replays over inputs that together exceed the L2 cache. The peers' times and the roofline floors are
data (`peers_h100.json`: torch 2.11, triton 3.6, measured the same way on the same kind of GPU). ratio: the best peer's time
over ours. error: ||out - ref|| / ||ref||, ref in float64.

    python benchmarks/moe.py [--quick] [--json FILE] [--shape NAME ...] [--tokens N ...]
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from braze.kernels import reference
from braze.kernels.spec import MoeSpec
from braze.kernels.triton import moe
from braze.kernels.triton.choose_config import Config

PEERS = Path(__file__).with_name("peers_h100.json")
L2_BYTES = 50 * 2**20
SILU = MoeSpec()
SWIGLU_OAI = MoeSpec(
    "(Min(Max(u, -7.0), 7.0) + 1.0) * Min(g, 7.0) * sigmoid(1.702*Min(g, 7.0))", layout="interleaved"
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A model's experts: how many, how many a token has, their sizes."""

    experts: int
    top_k: int
    hidden: int
    intermediate: int
    spec: MoeSpec = SILU


SHAPES = {
    "mixtral_8x7b": Shape(8, 2, 4096, 14336),
    "llama4_scout": Shape(16, 1, 5120, 8192),
    "gpt_oss_20b": Shape(32, 4, 2880, 2880),
    "qwen3_30b_a3b": Shape(128, 8, 2048, 768),
    "deepseek_v2_lite": Shape(64, 6, 2048, 1408),
    "llama4_scout_wi": Shape(16, 1, 5120, 8192, MoeSpec(weight_on="input")),
    "gpt_oss_20b_oai": Shape(32, 4, 2880, 2880, SWIGLU_OAI),
}


@dataclass(frozen=True)
class Cell:
    """One measurement; median and eager (a call without a graph, the host's time included) in microseconds."""

    shape: str
    tokens: int
    provider: str
    median: float
    eager: float
    fraction_of_floor: float
    ratio: float
    peer: str
    error: float


def make_weights(shape: Shape, device: str = "cuda") -> tuple[Tensor, Tensor]:
    """w1 [E, 2I, H] and w2 [E, H, I] in bfloat16, of a size that keeps activations near 1."""
    e, h, i = shape.experts, shape.hidden, shape.intermediate
    w1 = torch.empty(e, 2 * i, h, device=device, dtype=torch.bfloat16).normal_(0, h**-0.5)
    w2 = torch.empty(e, h, i, device=device, dtype=torch.bfloat16).normal_(0, i**-0.5)
    return w1, w2


def make_tokens(shape: Shape, tokens: int, device: str = "cuda") -> tuple[Tensor, Tensor, Tensor]:
    """x [T, H], ids and weights [T, k] of a router whose logits are normal."""
    x = torch.randn(tokens, shape.hidden, device=device, dtype=torch.bfloat16)
    logits = torch.randn(tokens, shape.experts, device=device)
    values, ids = torch.softmax(logits, -1).topk(shape.top_k)
    return x, ids, values / values.sum(-1, keepdim=True)


def error(got: Tensor, x: Tensor, ids: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, spec: MoeSpec) -> float:
    """Relative error of the first 64 tokens, the reference in float64 one expert at a time."""
    n = min(64, x.shape[0])
    want = torch.zeros(n, x.shape[1], device=x.device, dtype=torch.float64)
    for e in ids[:n].unique().tolist():
        wide = MoeSpec(spec.activation, spec.layout, False, spec.weight_on, spec.scale, torch.float64)
        only = torch.where(ids[:n] == e, 0, 1)
        want += reference.moe(
            x[:n].double(), only, weights[:n].double(), w1[e : e + 1].double(), w2[e : e + 1].double(), None, None, wide
        )
    return ((got[:n].double() - want).norm() / want.norm()).item()


def graph_time(function: Callable[..., Any], sets: Sequence[tuple[Any, ...]], repeats: int) -> float:
    """Microseconds a call: the median over replays of one graph that calls the function on each set."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function(*sets[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in sets:
            function(*inputs)
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(sets))
    return statistics.median(times)


def eager_time(function: Callable[..., Any], inputs: tuple[Any, ...]) -> float:
    """Microseconds that one call takes the host, its launches queued and not waited for."""
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        function(*inputs)
        times.append((time.perf_counter() - begin) * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times)


def input_sets(shape: Shape, tokens: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Routings that together read more than the L2 cache holds of the weights."""
    read = min(shape.experts, tokens * shape.top_k) * shape.hidden * shape.intermediate * 6
    return [make_tokens(shape, tokens) for _ in range(max(2, min(16, 8 * L2_BYTES // read)))]


def measure(
    name: str, tokens: int, w1: Tensor, w2: Tensor, repeats: int, config: Config | None = None, check: bool = True
) -> Cell:
    """One cell; AssertionError where the result is not the reference's."""
    shape = SHAPES[name]
    peer = next(p for p in json.loads(PEERS.read_text()) if (p["shape"], p["tokens"]) == (name, tokens))
    sets = input_sets(shape, tokens)

    def call(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return moe.run(x, ids, weights, w1, w2, None, None, shape.spec, config=config)

    off = error(call(*sets[0]), *sets[0], w1, w2, shape.spec) if check else math.nan
    assert not off >= 6e-3, (name, tokens, off)
    median = graph_time(call, sets, repeats)
    eager = eager_time(call, sets[0])
    return Cell(
        name, tokens, "braze", round(median, 2), round(eager, 1), round(peer["floor_us"] / median, 3),
        round(peer["us"] / median, 3), peer["peer"], float(f"{off:.2e}"),
    )  # fmt: skip


def geomean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def show(cells: Sequence[Cell], console: Console) -> None:
    """The table, and the geometric mean of the ratios."""
    table = Table(title="MoE on an H100, bfloat16")
    for header in ("shape", "T", "us", "host us", "of floor", "best peer / ours", "best peer", "error"):
        table.add_column(header, justify="left" if header in ("shape", "best peer") else "right")
    for c in cells:
        table.add_row(
            c.shape, str(c.tokens), f"{c.median:.2f}", f"{c.eager:.0f}", f"{c.fraction_of_floor:.3f}",
            f"{c.ratio:.3f}", c.peer, f"{c.error:.1e}",
        )  # fmt: skip
    console.print(table)
    ratios = [c.ratio for c in cells]
    console.print(f"{len(cells)} cells: geometric mean {geomean(ratios):.3f}, worst {min(ratios):.3f}")


def main() -> None:
    peers = json.loads(PEERS.read_text())
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, and only 1, 32 and 2048 tokens")
    parser.add_argument("--json", type=Path, help="write the cells to this file")
    parser.add_argument("--shape", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="*", type=int, help="only these numbers of tokens")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    tokens = options.tokens or ([1, 32, 2048] if options.quick else sorted({p["tokens"] for p in peers}))
    console = Console(width=130)
    cells: list[Cell] = []
    torch.manual_seed(0)
    for name in options.shape:
        w1, w2 = make_weights(SHAPES[name])
        for m in tokens:
            if any((p["shape"], p["tokens"]) == (name, m) for p in peers):
                cells.append(measure(name, m, w1, w2, 10 if options.quick else 30))
                if options.json:
                    options.json.write_text(json.dumps([asdict(c) for c in cells], indent=1))
        del w1, w2
        torch.cuda.empty_cache()
    show(cells, console)


if __name__ == "__main__":
    main()
