"""A dense MLP of one token on a GPU: braze beside stock torch.compile, and that with max-autotune, in one run.

Sizes of real models' MLPs and shared experts, bfloat16, gate and up apart. CUDA graphs over weights that together exceed the L2
cache, replayed in turn; medians. The floor reads each weight once at the H100's 3.35 TB/s.

    python benchmarks/mlp.py [--json FILE] [--shape NAME ...] [--repeats N]
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from braze.tune import L2_BYTES, graph_times

SHAPES = {  # hidden, inner
    "llama3_8b": (4096, 14336),
    "qwen3_1.7b": (2048, 6144),
    "smollm2_135m": (576, 1536),
    "llama4_scout shared": (5120, 8192),
    "qwen2_moe_a2.7b shared": (2048, 5632),
    "deepseek_v2_lite shared": (2048, 2816),
    "deepseek_v3 shared": (7168, 2048),
    "qwen3_next shared": (2048, 512),
}
BANDWIDTH = 3.35e12  # bytes a second


@dataclass(frozen=True)
class Cell:
    """Microseconds of each way."""

    shape: str
    tokens: int
    provider: str
    braze: float
    stock: float
    tuned: float
    floor: float


def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def ways() -> list[Callable[..., Tensor]]:
    """braze, stock, and stock with max-autotune; code of their own, so that none meets another's limit of recompilations."""
    torch._dynamo.reset()
    options: dict[str, Any] = {"require": ["mlp"], "strict": True}
    return [
        torch.compile(lambda *given: mlp(*given), backend="braze", dynamic=False, options=options),
        torch.compile(lambda *given: mlp(*given), dynamic=False),
        torch.compile(lambda *given: mlp(*given), dynamic=False, mode="max-autotune-no-cudagraphs"),
    ]


def measure(name: str, repeats: int) -> Cell:
    """One cell; AssertionError where a result is not the float64 one."""
    hidden, inner = SHAPES[name]
    size = 2 * 3 * hidden * inner
    x = torch.randn(1, hidden, device="cuda", dtype=torch.bfloat16)
    sizes = ((inner, hidden), (inner, hidden), (hidden, inner))
    sets = [
        (x, *(torch.randn(*s, device="cuda", dtype=torch.bfloat16) / s[1] ** 0.5 for s in sizes))
        for _ in range(2 + 2 * L2_BYTES // size)
    ]
    calls = ways()
    want = mlp(*(t.double() for t in sets[0]))
    for call in calls:
        error = ((call(*sets[0]).double() - want).norm() / want.norm()).item()
        assert error < 1e-2, (name, error)
    times = (round(t, 2) for t in graph_times(calls, sets, repeats))
    return Cell(name, 1, "braze", *times, round(size / BANDWIDTH * 1e6, 2))


def show(cells: Sequence[Cell], console: Console) -> None:
    table = Table(title=f"dense MLP of one token on {torch.cuda.get_device_name()}, bfloat16, microseconds")
    for header in ("shape", "braze", "stock (over braze)", "max-autotune (over braze)", "of floor"):
        table.add_column(header, justify="left" if header == "shape" else "right")
    for c in cells:
        others = (f"{t:.1f} ({t / c.braze:.2f})" for t in (c.stock, c.tuned))
        table.add_row(c.shape, f"{c.braze:.1f}", *others, f"{c.floor / c.braze:.2f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the cells to this file")
    parser.add_argument("--shape", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    cells: list[Cell] = []
    torch.manual_seed(0)
    with torch.no_grad():
        for name in options.shape:
            cells.append(measure(name, options.repeats))
            torch.cuda.empty_cache()
            if options.json:
                options.json.write_text(json.dumps([asdict(c) for c in cells], indent=1) + "\n")
    show(cells, Console(width=130))


if __name__ == "__main__":
    main()
