"""Expert layers as they were written before transformers 5, a list of modules in a loop over the experts that were hit.

The layer runs eagerly, under stock torch.compile, which breaks its graph in the loop, and under `braze.fuse`, which takes the
loop out and leaves the weights where they are; on a GPU also with mode="reduce-overhead", a CUDA graph. Medians of whole
calls, the host's time included, the ways in turn; bfloat16.

    python benchmarks/loops.py [--json FILE] [--shape NAME ...] [--tokens N ...]
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from moe import SHAPES
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import one_hot, silu

import braze
from braze.tune import Shape

TOLERANCE = 2e-2  # beside the eager layer, in bfloat16 too


GPU = {name: SHAPES[name] for name in ("mixtral_8x7b", "qwen3_30b_a3b", "deepseek_v2_lite")}
CPU = {"mixtral": Shape(8, 2, 1024, 1792), "qwen3": Shape(32, 8, 1024, 512)}


class Expert(nn.Module):
    """SwiGLU of three linear layers."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Router and experts: each expert that was hit gets its tokens, and its results are added to theirs."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.top_k, self.count = shape.top_k, shape.experts
        self.router = nn.Linear(shape.hidden, shape.experts, bias=False)
        self.experts = nn.ModuleList(Expert(shape) for _ in range(shape.experts))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).float().softmax(-1).topk(self.top_k)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(x)
        mask = one_hot(ids, num_classes=self.count).permute(2, 1, 0)
        for e in mask.sum((1, 2)).nonzero():
            slot, token = torch.where(mask[e].squeeze(0))
            rows = self.experts[e](x[token]) * weights[token, slot, None]
            out.index_add_(0, token, rows.to(x.dtype))
        return out


@dataclass(frozen=True)
class Cell:
    """Milliseconds of a call; graph: of `braze.fuse` with mode="reduce-overhead", None on CPU."""

    shape: str
    tokens: int
    provider: str
    eager: float
    stock: float
    braze: float
    graph: float | None
    device: str


def twin(layer: Layer) -> Layer:
    """Another module with the same parameters."""
    return copy.deepcopy(layer, {id(p): p for p in layer.parameters()})


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def call_times(calls: Sequence[Callable[[Tensor], Tensor]], inputs: Sequence[Tensor], seconds: float) -> list[float]:
    """Median milliseconds of each, in turn for about so many seconds."""
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 3:
        for taken, call in zip(times, calls, strict=True):
            for x in inputs:
                wait(inputs[0].device.type)
                begin = time.perf_counter()
                call(x)
                wait(inputs[0].device.type)
                taken.append((time.perf_counter() - begin) * 1e3)
    return [statistics.median(taken) for taken in times]


def measure(name: str, layer: Layer, hidden: int, tokens: int, device: str, seconds: float) -> Cell:
    """One cell; AssertionError where a way's result is not the eager layer's."""
    torch._dynamo.reset()
    inputs = [torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16) for _ in range(3)]
    options: dict[str, Any] = {"require": ["moe"], "strict": True}
    calls: dict[str, Callable[[Tensor], Tensor]] = {"eager": layer, "stock": torch.compile(twin(layer))}
    calls["braze"] = braze.fuse(twin(layer), dynamic=False, **options)
    if device == "cuda":
        calls["graph"] = braze.fuse(twin(layer), dynamic=False, mode="reduce-overhead", **options)
    for way, call in calls.items():
        for x in inputs * 2:  # a CUDA graph is recorded at the second call
            want, got = layer.forward(x).double(), call(x).double()
            assert (got - want).norm() < TOLERANCE * want.norm(), (name, tokens, way)
    times = dict(zip(calls, call_times(list(calls.values()), inputs, seconds), strict=True))
    ms = {way: round(t, 4) for way, t in times.items()}
    return Cell(name, tokens, "braze", ms["eager"], ms["stock"], ms["braze"], ms.get("graph"), device)


def show(cells: Sequence[Cell], console: Console) -> None:
    table = Table(title="expert layers in loops, bfloat16: milliseconds of a call")
    for header in ("layer", "T", "eager", "stock", "braze", "braze, CUDA graph", "best of the others / braze"):
        table.add_column(header, justify="left" if header == "layer" else "right")
    for c in cells:
        best = min(c.braze, c.graph or c.braze)
        times = (f"{t:.3f}" if t else "" for t in (c.eager, c.stock, c.braze, c.graph))
        table.add_row(c.shape, str(c.tokens), *times, f"{min(c.eager, c.stock) / best:.2f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the cells to this file")
    parser.add_argument("--shape", nargs="*", choices=[*GPU, *CPU])
    parser.add_argument("--tokens", nargs="*", type=int)
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring for each cell")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = GPU if device == "cuda" else CPU
    cells: list[Cell] = []
    torch.manual_seed(0)
    with torch.no_grad():
        for name in options.shape or shapes:
            with torch.device(device):
                layer = Layer(shapes[name]).bfloat16().eval()
            for tokens in options.tokens or ((1, 8, 512, 4096) if device == "cuda" else (1, 8, 128)):
                cells.append(measure(name, layer, shapes[name].hidden, tokens, device, options.seconds))
                if options.json:
                    options.json.write_text(json.dumps([asdict(c) for c in cells], indent=1))
    show(cells, Console(width=130))


if __name__ == "__main__":
    main()
