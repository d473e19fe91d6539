"""Whole expert layers of transformers on a GPU, at their real sizes: braze against stock torch.compile, in one run.

Stock is, in each cell, the faster of transformers' grouped_mm and batched_mm forms (Llama4 has a form of its own), compiled by
stock torch.compile; router, experts, shared experts and the sum are all inside. Medians of CUDA-graph replays over other tokens
in each call, hence another routing. host: microseconds that one compiled call takes the host, without a graph.

    python benchmarks/layers.py [--quick] [--json FILE] [--shapes NAME ...] [--tokens N ...]
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from cpu import Shape, build
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from braze.tune import graph_time

Layer = Callable[[Tensor], Any]
STOCK = ("grouped_mm", "batched_mm")
GATHERED = 8 << 30  # bytes of gathered weights above which batched_mm is not tried: it never wins there
DECODE = 32  # tokens up to which a cell counts as decode

SHAPES = {
    "mixtral_8x7b": Shape("mixtral", "MixtralSparseMoeBlock", "MixtralConfig", 4096, 8, 14336, 2, {}),
    "gpt_oss_20b": Shape("gpt_oss", "GptOssMLP", "GptOssConfig", 2880, 32, 2880, 4, {}),
    "qwen3_30b_a3b": Shape(
        "qwen3_moe", "Qwen3MoeSparseMoeBlock", "Qwen3MoeConfig", 2048, 128, 768, 8, {"norm_topk_prob": True}
    ),
    "deepseek_lite": Shape(
        "deepseek_v3", "DeepseekV3MoE", "DeepseekV3Config", 2048, 64, 1408, 6,
        {"n_shared_experts": 2, "n_group": 1, "topk_group": 1},
    ),
    "llama4_scout": Shape(
        "llama4", "Llama4TextMoe", "Llama4TextConfig", 5120, 16, 8192, 1,
        {"intermediate_size_mlp": 8192, "num_local_experts": 16},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One layer, number of tokens and provider: median and host in microseconds, speedup over the better stock form."""

    shape: str
    tokens: int
    provider: str
    median: float
    speedup: float
    host: float
    error: float


def result(layer: Layer, x: Tensor) -> Tensor:
    out = layer(x)
    return out if isinstance(out, Tensor) else out[0]


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def host_time(layer: Layer, x: Tensor) -> float:
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        layer(x)
        times.append((time.perf_counter() - begin) * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times)


def providers(layers: dict[str, nn.Module], shape: Shape, tokens: int) -> dict[str, Layer]:
    torch._dynamo.reset()
    first = layers["grouped_mm"]
    options = {"require": ["moe"], "strict": True}
    found: dict[str, Layer] = {"braze": torch.compile(first, backend="braze", dynamic=False, options=options)}
    if shape.module == "llama4":
        return found | {"its own": torch.compile(first, dynamic=False)}
    for name in STOCK:
        if name != "batched_mm" or tokens * shape.top_k * shape.expert_elements() * 2 <= GATHERED:
            found[name] = torch.compile(layers[name], dynamic=False)
    return found


def measure(name: str, layers: dict[str, nn.Module], tokens: int, repeats: int) -> Iterator[Cell]:
    """AssertionError where braze's result is no more like the eager layer's than bfloat16 and ties in the router allow."""
    shape = SHAPES[name]
    sets = [(torch.randn(1, tokens, shape.hidden, device="cuda", dtype=torch.bfloat16),) for _ in range(8)]
    want = result(layers["grouped_mm"], *sets[0])
    taken: dict[str, tuple[float, float, float]] = {}
    for provider, layer in providers(layers, shape, tokens).items():
        try:
            off = error(result(layer, *sets[0]), want)
            taken[provider] = graph_time(layer, sets, repeats), host_time(layer, *sets[0]), off
        except Exception as e:  # one provider's failure is a line of the report, and not the end of the others
            print(f"{name}, T={tokens}: {provider} left out: {type(e).__name__}: {str(e).splitlines()[0][:200]}")
        torch.cuda.empty_cache()
    stock = min((median for provider, (median, _, _) in taken.items() if provider != "braze"), default=math.nan)
    for provider, (median, host, off) in taken.items():
        assert provider != "braze" or off < 0.05, (name, tokens, off)
        yield Cell(name, tokens, provider, round(median, 1), round(stock / median, 3), round(host), float(f"{off:.2e}"))


def geomean(cells: Sequence[Cell]) -> str:
    return f"{math.exp(statistics.fmean(math.log(c.speedup) for c in cells)):.2f}" if cells else "none"


def show(cells: Sequence[Cell], console: Console) -> None:
    names = list(dict.fromkeys(c.provider for c in cells))
    table = Table(title="expert layers: microseconds (host's)")
    for header in ("layer", "T", *names, "stock / braze", "error"):
        table.add_column(header, justify="left" if header == "layer" else "right")
    for row in dict.fromkeys((c.shape, c.tokens) for c in cells):
        own = {c.provider: c for c in cells if (c.shape, c.tokens) == row}
        times = (f"{own[n].median:.0f} ({own[n].host:.0f})" if n in own else "" for n in names)
        braze = own.get("braze")
        last = (f"{braze.speedup:.2f}", f"{braze.error:.0e}") if braze else ("", "")
        table.add_row(row[0], str(row[1]), *times, *last)
    console.print(table)
    ours = [c for c in cells if c.provider == "braze"]
    few, many = ([c for c in ours if (c.tokens <= DECODE) == d] for d in (True, False))
    console.print(f"stock / braze, geometric means: decode {geomean(few)}, prefill {geomean(many)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats")
    parser.add_argument("--json", type=Path, help="write the cells to this file, after each size")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, help="only these numbers of tokens")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    console = Console(width=130)
    cells: list[Cell] = []
    with torch.no_grad():
        for name in options.shapes:
            torch.set_default_device("cuda")
            layers = build(SHAPES[name], torch.bfloat16)
            torch.set_default_device("cpu")
            for tokens in options.tokens or ([1, 2048] if options.quick else [1, 8, 512, 2048, 8192]):
                cells += measure(name, layers, tokens, 5 if options.quick else 20)
                if options.json:
                    options.json.write_text(json.dumps([asdict(c) for c in cells], indent=1) + "\n")
            del layers
            torch.cuda.empty_cache()
    show(cells, console)


if __name__ == "__main__":
    main()
