"""Triton experts on an H100, against the best of vLLM, SGLang, triton_kernels and torch's grouped products in each cell.

Medians of CUDA-graph replays over inputs that together exceed the L2 cache. The peers' times and the roofline floors are
data (`peers_h100.json`: torch 2.11, triton 3.6, measured the same way on the same kind of GPU). The floor is the longer of
the bytes (the weights of the experts that the drawn ids name, x and the result, once) at 3.0 TB/s and the operations at 790
TFLOP/s. ratio: our fraction of the floor over the best peer's, which is the ratio of times where the ids drawn name as many
experts. error: ||out - ref|| / ||ref||, ref in float64.

The same forms in one run: `benchmarks/moe_beside.py`.

    python benchmarks/moe.py [--quick] [--json FILE] [--shape NAME ...] [--tokens N ...]
    python benchmarks/moe.py --untuned [--json FILE]: what the model chooses, as if the shapes had not been tuned
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

from braze import tune
from braze.kernels import reference
from braze.kernels.spec import MoeSpec
from braze.kernels.triton import moe
from braze.kernels.triton.choose_config import Config, choose_config, model
from braze.tune import Shape, graph_time

BYTES_PER_US, FLOPS_PER_US = 3.0e6, 790e6
PEERS = Path(__file__).with_name("peers_h100.json")
SWIGLU_OAI = MoeSpec(
    "(Min(Max(u, -7.0), 7.0) + 1.0) * Min(g, 7.0) * sigmoid(1.702*Min(g, 7.0))", layout="interleaved"
)  # fmt: skip


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


def floor(shape: Shape, sets: Sequence[tuple[Tensor, Tensor, Tensor]]) -> float:
    """Microseconds below which no kernel can be, on average over the sets."""
    size = 3 * shape.hidden * shape.intermediate
    times = []
    for x, ids, _ in sets:
        moved = 2 * (ids.unique().numel() * size + 2 * x.numel())
        times.append(max(moved / BYTES_PER_US, 2 * ids.numel() * size / FLOPS_PER_US))
    return statistics.fmean(times)


def measure(
    name: str, tokens: int, w1: Tensor, w2: Tensor, repeats: int, config: Config | None = None, check: bool = True
) -> Cell:
    """One cell; AssertionError where the result is not the reference's."""
    shape = SHAPES[name]
    peer = next(p for p in json.loads(PEERS.read_text()) if (p["shape"], p["tokens"]) == (name, tokens))
    sets = shape.sets(tokens)

    def call(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return moe.run(x, ids, weights, w1, w2, None, None, shape.spec, config=config)

    off = error(call(*sets[0]), *sets[0], w1, w2, shape.spec) if check else math.nan
    assert not off >= 6e-3, (name, tokens, off)
    median = graph_time(call, sets, repeats)
    eager = eager_time(call, sets[0])
    fraction = floor(shape, sets) / median
    return Cell(
        name, tokens, "braze", round(median, 2), round(eager, 1), round(fraction, 3),
        round(fraction * peer["us"] / peer["floor_us"], 3), peer["peer"], float(f"{off:.2e}"),
    )  # fmt: skip


@dataclass(frozen=True)
class Untuned:
    """Microseconds of the shipped config and of the model's, their replays in turn; model: its config."""

    shape: str
    tokens: int
    tuned: float
    untuned: float
    model: str


def measure_untuned(name: str, tokens: int, w1: Tensor, w2: Tensor, repeats: int) -> Untuned:
    """The config that is shipped beside the one that the model would choose."""
    shape = SHAPES[name]
    problem = tune.problem(shape, tokens)
    configs = (choose_config(problem), model(problem))

    def call(config: Config) -> Callable[..., Any]:
        return lambda x, ids, weights: moe.run(x, ids, weights, w1, w2, None, None, shape.spec, config=config)

    tuned, untuned = tune.graph_times([call(c) for c in configs], shape.sets(tokens), repeats)
    return Untuned(name, tokens, round(tuned, 2), round(untuned, 2), short(configs[1]))


def short(config: Config) -> str:
    """A config in a few words."""
    tiles = (f"{t.columns}x{t.inner} w{t.warps} s{t.stages}" for t in (config.first, config.second))
    return f"{config.rows} rows{', direct' if config.direct else ''}: {', '.join(tiles)}"


def show_untuned(cells: Sequence[Untuned], console: Console) -> None:
    table = Table(title="Tiles of the model beside tuned ones")
    for header in ("shape", "T", "tuned us", "model's us", "tuned / model's", "the model's"):
        table.add_column(header, justify="left" if header in ("shape", "the model's") else "right")
    for c in cells:
        table.add_row(
            c.shape, str(c.tokens), f"{c.tuned:.1f}", f"{c.untuned:.1f}", f"{c.tuned / c.untuned:.3f}", c.model
        )
    console.print(table)
    ratios = [c.tuned / c.untuned for c in cells]
    console.print(f"{len(cells)} cells: geometric mean {geomean(ratios):.3f}, worst {min(ratios):.3f}")


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
    parser.add_argument("--untuned", action="store_true", help="the model's tiles beside the shipped ones")
    parser.add_argument("--json", type=Path, help="write the cells to this file")
    parser.add_argument("--shape", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="*", type=int, help="only these numbers of tokens")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    tokens = options.tokens or ([1, 32, 2048] if options.quick else sorted({p["tokens"] for p in peers}))
    console = Console(width=130)
    cells: list[Any] = []
    torch.manual_seed(0)
    take = measure_untuned if options.untuned else measure
    for name in options.shape:
        w1, w2 = SHAPES[name].weights()
        for m in tokens:
            if any((p["shape"], p["tokens"]) == (name, m) for p in peers):
                cells.append(take(name, m, w1, w2, 10 if options.quick else 30))
                if options.json:
                    options.json.write_text(json.dumps([asdict(c) for c in cells], indent=1))
        del w1, w2
        torch.cuda.empty_cache()
    (show_untuned if options.untuned else show)(cells, console)


if __name__ == "__main__":
    main()
