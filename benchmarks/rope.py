"""RoPE on q and k: eager, stock torch.compile, braze's pointwise lowering and its Triton kernel, against a copy of the bytes.

A GPU is timed by CUDA graphs over input sets that together exceed its L2 cache; a CPU by calls of all providers in turn.
ratio is the copy's time over the provider's: 1.0 is the speed of a copy.

    python benchmarks/rope.py [--quick] [--json FILE] [--tune]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import braze  # noqa: F401  (defines the op)
from braze.kernels.spec import RopeSpec
from braze.kernels.triton import rope as triton_rope
from braze.lowering.lower import register

Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]
L2_BYTES = 50 * 2**20


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + rotate_half(x) * sin


def partial(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotary = cos.shape[-1]
    return torch.cat((half(x[..., :rotary], cos, sin), x[..., rotary:]), dim=-1)


def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.float()
    turned = torch.stack((-wide[..., 1::2], wide[..., ::2]), dim=-1).flatten(-2)
    return (wide * cos + turned * sin).to(x.dtype)


def complex_product(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)


def interleaved_to_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    batch, heads, tokens, size = x.shape
    return half(x.view(batch, heads, tokens, size // 2, 2).transpose(4, 3).reshape(x.shape), cos, sin)


@dataclass(frozen=True)
class Variant:
    """A model's own spelling of a rotation of heads of `size`, and what it is as a spec; width of the tables."""

    name: str
    size: int
    spec: RopeSpec
    width: int
    eager: Rotate
    table_dtype: torch.dtype = torch.bfloat16


VARIANTS = (
    Variant("llama half", 128, RopeSpec(128), 128, half),
    Variant("llama half 64", 64, RopeSpec(64), 64, half),
    Variant("partial 64 of 256", 256, RopeSpec(64), 64, partial),
    Variant("cohere interleaved", 128, RopeSpec(128, 0, "interleaved", "interleaved"), 128, interleaved, torch.float32),
    Variant("llama4 complex", 128, RopeSpec(128, 0, "interleaved", "interleaved"), 64, complex_product, torch.float32),
    Variant("deepseek_v3 interleave", 64, RopeSpec(64, 0, "interleaved", "half"), 64, interleaved_to_half),
)


@dataclass(frozen=True)
class Cell:
    shape: dict[str, Any]
    provider: str
    median: float  # microseconds
    ratio: float  # of the copy's time


def both(rotate: Rotate) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda q, k, cos, sin: (rotate(q, cos, sin), rotate(k, cos, sin))


def semantic(spec: RopeSpec) -> Callable[..., tuple[Tensor, Tensor]]:
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.ops.braze.rope(
            x,
            cos,
            sin,
            rotary_dim=spec.rotary_dim,
            start=spec.start,
            layout_in=spec.layout_in,
            layout_out=spec.layout_out,
        )

    return lambda q, k, cos, sin: (rotate(q, cos, sin), rotate(k, cos, sin))


def kernel(spec: RopeSpec, **knobs: int) -> Callable[..., Any]:
    return lambda q, k, cos, sin: triton_rope.run(q, k, cos[:, 0], sin[:, 0], spec, **knobs)


def copy(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The floor: every element read and written once, in the order of memory."""
    return torch.clone(q.transpose(1, 2)), torch.clone(k.transpose(1, 2))


def make(variant: Variant, tokens: int, heads: tuple[int, int], device: str) -> tuple[Tensor, ...]:
    """q, k as [1, H, T, D] over a projection's memory [1, T, H, D]; tables [1, 1, T, width]."""
    q, k = (torch.randn(1, tokens, n, variant.size, device=device, dtype=torch.bfloat16).transpose(1, 2) for n in heads)
    angle = torch.rand(1, 1, tokens, variant.spec.rotary_dim // 2, device=device) * 6
    if variant.width == variant.spec.rotary_dim:
        interleave = variant.spec.layout_out == "interleaved"
        angle = angle.repeat_interleave(2, -1) if interleave else torch.cat((angle, angle), -1)
    return q, k, angle.cos().to(variant.table_dtype), angle.sin().to(variant.table_dtype)


def check(function: Callable[..., Any], variant: Variant, inputs: tuple[Tensor, ...]) -> None:
    wanted = both(variant.eager)(*(x.double() if x.dtype != torch.float32 else x for x in inputs))
    for got, want in zip(function(*inputs), wanted, strict=True):
        error = ((got.double() - want.double()).norm() / want.double().norm()).item()
        assert error < 8e-3, (variant.name, error)


def gpu_time(function: Callable[..., Any], sets: list[tuple[Tensor, ...]], repeats: int) -> float:
    """Microseconds a call: the median of replays of one graph that calls the function on each set."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for inputs in sets[:2]:
            function(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [function(*inputs) for inputs in sets]
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(sets))
    del graph, results
    torch.cuda.empty_cache()
    return statistics.median(times)


def cpu_times(functions: list[Callable[..., Any]], inputs: tuple[Tensor, ...], repeats: int) -> list[float]:
    """Microseconds a call: medians of rounds that call every function once."""
    times: list[list[float]] = [[] for _ in functions]
    for n in range(repeats + 3):
        for function, taken in zip(functions, times, strict=True):
            begin = time.perf_counter()
            function(*inputs)
            if n >= 3:
                taken.append((time.perf_counter() - begin) * 1e6)
    return [statistics.median(t) for t in times]


def measure(variant: Variant, tokens: int, heads: tuple[int, int], device: str, repeats: int) -> Iterator[Cell]:
    inputs = make(variant, tokens, heads, device)
    torch._dynamo.reset()
    providers: dict[str, Callable[..., Any]] = {
        "copy": copy,
        "eager": both(variant.eager),
        "stock": torch.compile(both(variant.eager), dynamic=False),
        "pointwise": torch.compile(semantic(variant.spec), dynamic=False),
    }
    if device == "cuda":
        providers["triton"] = kernel(variant.spec)
    for name, function in providers.items():
        if name != "copy":
            check(function, variant, inputs)
    if device == "cuda":
        size = sum(x.numel() * x.element_size() for x in inputs)
        sets = [inputs, *(make(variant, tokens, heads, device) for _ in range(min(63, L2_BYTES * 2 // size)))]
        medians = [gpu_time(f, sets, repeats) for f in providers.values()]
    else:
        medians = cpu_times(list(providers.values()), inputs, repeats)
    shape = {"variant": variant.name, "D": variant.size, "T": tokens, "Hq": heads[0], "Hk": heads[1], "device": device}
    for name, median in zip(providers, medians, strict=True):
        yield Cell(shape, name, round(median, 2), round(medians[0] / median, 3))


def show(cells: list[Cell], console: Console) -> None:
    names = list(dict.fromkeys(c.provider for c in cells))
    table = Table(title="RoPE on q and k: microseconds (copy's time / provider's)")
    for header in ("variant", "T", *names):
        table.add_column(header, justify="left" if header == "variant" else "right")
    for shape in {json.dumps(c.shape): c.shape for c in cells}.values():
        row = {c.provider: f"{c.median:.1f} ({c.ratio:.2f})" for c in cells if c.shape == shape}
        table.add_row(shape["variant"], str(shape["T"]), *(row.get(n, "") for n in names))
    console.print(table)


def tune(console: Console) -> None:
    """The Triton kernel's tile sizes and warps, as fractions of the copy's speed."""
    choices = [(tile, warps) for tile in (1024, 2048, 4096, 8192) for warps in (2, 4, 8)]
    table = Table("variant", "T", *(f"{t}/{w}" for t, w in choices))
    for variant in VARIANTS:
        for tokens in (256, 4096, 16384):
            sets = [make(variant, tokens, (32, 8), "cuda") for _ in range(3)]
            floor = gpu_time(copy, sets, 20)
            times = [gpu_time(kernel(variant.spec, tile=t, warps=w), sets, 20) for t, w in choices]
            table.add_row(variant.name, str(tokens), *(f"{floor / t:.2f}" for t in times))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats")
    parser.add_argument("--json", type=Path, help="write the cells to this file")
    parser.add_argument("--tune", action="store_true", help="also sweep the Triton kernel's tiles and warps (GPU)")
    options = parser.parse_args()
    register()
    torch.compiler.config.force_disable_caches = True  # a cached graph would hold an earlier lowering
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)  # else a busy machine's other work decides
    console = Console(width=150)
    heads = (32, 8) if device == "cuda" else (16, 4)
    sizes = ([1, 4096] if options.quick else [1, 16, 256, 4096, 32768]) if device == "cuda" else [1, 1024]
    repeats = 10 if options.quick else 40
    cells: list[Cell] = []
    with torch.no_grad():
        for variant in VARIANTS:
            for tokens in sizes:
                cells += measure(variant, tokens, heads, device, repeats)
                if options.json:
                    options.json.write_text(json.dumps([asdict(c) for c in cells], indent=1))
        show(cells, console)
        if options.tune and device == "cuda":
            tune(console)


if __name__ == "__main__":
    main()
