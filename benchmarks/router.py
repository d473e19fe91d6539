"""Routers as models spell them: stock Inductor, braze's ATen composition and its kernel (C++ on CPU, Triton on a GPU).

Each provider is one graph of 8 routers, as layers of a model have them, without Dynamo's guards; microseconds a router. A CPU
is timed by calls of all providers in turn (least of the rounds), a GPU by replays of a CUDA graph (median).

    python benchmarks/router.py [--quick] [--json FILE]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._inductor.compile_fx import compile_fx
from torch.fx.experimental.proxy_tensor import make_fx

import braze  # noqa: F401  (defines the op)
from braze.kernels import aten, reference
from braze.kernels.spec import RouteSpec
from braze.kernels.triton import route as triton_route
from braze.lowering import inductor

Router = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
LAYERS = 8


def mixtral(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = torch.softmax(x, -1, dtype=torch.float32).topk(2)
    return weights / weights.sum(-1, keepdim=True), ids


def qwen3_moe(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = torch.softmax(x, -1, dtype=torch.float32).topk(8)
    return (weights / weights.sum(-1, keepdim=True)).to(x.dtype), ids


def olmoe(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = torch.softmax(x, -1, dtype=torch.float32).topk(8)
    return weights.to(x.dtype), ids


def gpt_oss(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    values, ids = x.topk(4)
    return values.softmax(-1, dtype=torch.float32).to(x.dtype), ids


def minimax_m2(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = x.sigmoid()
    ids = (scores + bias).topk(8, sorted=False).indices
    weights = scores.gather(1, ids)
    return weights / weights.sum(-1, keepdim=True), ids


def deepseek_v3(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = x.sigmoid()
    choice = scores + bias
    groups = choice.view(-1, 8, 32).topk(2, -1).values.sum(-1).topk(4, sorted=False).indices
    mask = choice.new_zeros(x.shape[0], 8).scatter(1, groups, 1).unsqueeze(-1).expand(-1, 8, 32).reshape(-1, 256)
    ids = choice.masked_fill(~mask.bool(), float("-inf")).topk(8, sorted=False).indices
    weights = scores.gather(1, ids)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5, ids


@dataclass(frozen=True)
class Family:
    """A model's own spelling of its router over `experts`, and what it is as a spec."""

    router: Router
    experts: int
    dtype: torch.dtype
    spec: RouteSpec
    bias: bool = False


FAMILIES = (
    Family(mixtral, 8, torch.bfloat16, RouteSpec(2, renorm="add", out_dtype=torch.float32)),
    Family(gpt_oss, 32, torch.bfloat16, RouteSpec(4, renorm="add")),
    Family(olmoe, 64, torch.bfloat16, RouteSpec(8)),
    Family(qwen3_moe, 128, torch.bfloat16, RouteSpec(8, renorm="add")),
    Family(minimax_m2, 256, torch.float32, RouteSpec(8, "sigmoid", "scores", renorm="add"), True),
    Family(
        deepseek_v3, 256, torch.float32,
        RouteSpec(8, "sigmoid", "scores", 8, 4, "top2", renorm="add", eps=1e-20, scale=2.5), True,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    family: str
    experts: int
    tokens: int
    provider: str
    microseconds: float
    speedup: float  # over stock


def providers(family: Family, device: str) -> dict[str, Router]:
    spec, attributes = family.spec, asdict(family.spec)

    def biased(bias: Tensor) -> Tensor | None:
        return bias if family.bias else None

    found: dict[str, Router] = {
        "stock": family.router,
        "aten": lambda x, bias: aten.route(x, biased(bias), spec),
    }
    if device == "cpu":
        found["cpp"] = lambda x, bias: torch.ops.braze.route(x, biased(bias), **attributes)
    else:
        found["triton"] = lambda x, bias: triton_route.launch(x, biased(bias), spec, start=inductor.start)
    return found


def layers(router: Router, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """The compiled graph that routes every input but the last, the bias."""

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(result for x in tensors[:-1] for result in router(x, tensors[-1]))

    graph = make_fx(run, tracing_mode="fake")(*inputs)
    compiled: Any = compile_fx(graph, list(inputs))
    return compiled  # type: ignore[no-any-return]


def check(results: Sequence[Tensor], family: Family, inputs: Sequence[Tensor]) -> None:
    """Weights as the reference has them, in order; ids may differ where choices are as good as equal."""
    bias = inputs[-1] if family.bias else None
    for weights, x in zip(results[::2], inputs[:-1], strict=True):
        exact, _ = reference.route(x.double(), bias, family.spec)
        difference = weights.double().sort(-1).values - exact.double().sort(-1).values
        assert difference.abs().max() < 1e-2 * exact.abs().max(), family.router.__name__


def cpu_times(functions: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, taken in zip(functions, times, strict=True):
            begin = time.perf_counter()
            for _ in range(5):
                function()
            taken.append((time.perf_counter() - begin) / 5)
    return [min(t) * 1e6 / LAYERS for t in times]


def gpu_time(function: Callable[[], Any], rounds: int) -> float:
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = function()
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / LAYERS)
    del kept
    return statistics.median(times)


def measure(family: Family, tokens: int, device: str, rounds: int) -> Iterator[Cell]:
    rng = torch.Generator().manual_seed(0)
    inputs = [torch.randn(tokens, family.experts, generator=rng).to(device, family.dtype) for _ in range(LAYERS)]
    inputs.append(torch.randn(family.experts, generator=rng).to(device))
    named = {name: layers(router, inputs) for name, router in providers(family, device).items()}
    for function in named.values():
        check(function(*inputs), family, inputs)
    calls = [lambda f=f: f(*inputs) for f in named.values()]  # type: ignore[misc]
    times = cpu_times(calls, rounds) if device == "cpu" else [gpu_time(call, rounds) for call in calls]
    for name, taken in zip(named, times, strict=True):
        yield Cell(
            family.router.__name__, family.experts, tokens, name, round(taken, 2), round(times[0] / taken, 2)
        )  # fmt: skip


def show(cells: Sequence[Cell], console: Console) -> None:
    names = list(dict.fromkeys(c.provider for c in cells))
    table = Table(title="Microseconds a router (times as fast as stock)")
    for column in ("router", "experts", "tokens", *names):
        table.add_column(column, justify="left" if column == "router" else "right")
    for row in dict.fromkeys((c.family, c.experts, c.tokens) for c in cells):
        own = [c for c in cells if (c.family, c.experts, c.tokens) == row]
        table.add_row(*map(str, row), *(f"{c.microseconds:.1f} ({c.speedup:.2f})" for c in own))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two routers, few rounds")
    parser.add_argument("--json", type=Path, help="write the cells there, too")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    families = [FAMILIES[3], FAMILIES[5]] if options.quick else FAMILIES
    tokens = (1, 512) if options.quick else (1, 16, 128, 512, 4096)
    cells = []
    with torch.no_grad():
        for family in families:
            for count in tokens:
                cells += measure(family, count, device, 5 if options.quick else 25)
    show(cells, Console())
    if options.json:
        options.json.write_text(json.dumps([asdict(c) for c in cells], indent=1) + "\n")


if __name__ == "__main__":
    main()
