"""Expert layers on CPU: transformers' own blocks under braze and under stock torch.compile, paired in one run.

Stock is, in each cell, the fastest of transformers' experts implementations (grouped_mm, batched_mm, the eager loop), each
compiled by stock torch.compile; all forms share one set of weights and are called in turn, so that what else the machine
does meets all alike. Each call has other tokens, hence another routing. Medians over the calls for which no thread had to
wait for a core (Linux counts that); on a busy machine over those that waited least, and the cell says so. Beside braze's
GFLOP/s and GB/s (the experts' products; the used experts' weights, once) stand the machine's own: a dense product, and
reading as many bytes.

    python benchmarks/cpu.py [--quick] [--json FILE [--resume]] [--shapes NAME,...] [--tokens N,...] [--growth FOLDER]
"""

import argparse
import copy
import csv
import itertools
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

Run = Callable[[Tensor], Any]
STOCK = ("grouped_mm", "batched_mm", "eager")
PROBE = 1024  # rows and columns of the dense product that stands for what the machine can do
CALM = 7  # undisturbed calls of each form that a cell is measured for
PATIENCE = 4  # times a cell's seconds after which it is left with fewer
GATHERED = 2 << 30  # bytes of gathered weights above which batched_mm is not tried: it never wins there
HOPELESS = 3.0  # a stock form this many times slower than the best of them is dropped after two calls


@dataclass(frozen=True)
class Shape:
    """One layer: transformers' block and the sizes of the real model, scaled to a small machine."""

    module: str
    block: str
    config: str
    hidden: int
    experts: int
    inner: int
    top_k: int
    extra: Mapping[str, Any]

    def settings(self) -> dict[str, Any]:
        """The configuration's arguments under every name that the four models have for them."""
        return {
            "hidden_size": self.hidden, "num_experts_per_tok": self.top_k, "num_local_experts": self.experts,
            "num_experts": self.experts, "n_routed_experts": self.experts, "intermediate_size": self.inner,
            "moe_intermediate_size": self.inner, **self.extra,
        }  # fmt: skip

    def forms(self) -> tuple[str, ...]:
        """What stock is."""
        return STOCK if self.experts > 1 else ("eager",)

    def expert_elements(self) -> int:
        return 3 * self.hidden * self.inner


SHAPES = {
    "qwen3": Shape(
        "qwen3_moe", "Qwen3MoeSparseMoeBlock", "Qwen3MoeConfig", 1024, 32, 512, 8, {"norm_topk_prob": True}
    ),
    "mixtral": Shape("mixtral", "MixtralSparseMoeBlock", "MixtralConfig", 2048, 8, 1792, 2, {}),
    "gpt_oss": Shape("gpt_oss", "GptOssMLP", "GptOssConfig", 1440, 16, 1440, 4, {}),
    "deepseek": Shape(
        "deepseek_v3", "DeepseekV3MoE", "DeepseekV3Config", 1024, 64, 352, 6,
        {"n_shared_experts": 2, "n_group": 1, "topk_group": 1},
    ),
    "llama": Shape("llama", "LlamaMLP", "LlamaConfig", 2048, 1, 5632, 1, {}),  # a dense MLP: one expert, no router
}  # fmt: skip
EXPERTS = ("qwen3", "mixtral", "gpt_oss", "deepseek")


@dataclass(frozen=True)
class Cell:
    """One layer with one number of tokens. median: braze's milliseconds; ratio: the best stock form's over it.

    gflops, gbytes: per second, of braze; of_gemm, of_read: as parts of the machine's own. calm: undisturbed calls of the
    form that had fewest; fewer than CALM: the cell's numbers are not to be relied on.
    """

    shape: str
    dtype: str
    tokens: int
    experts: int
    provider: str
    median: float
    ratio: float
    peer: str
    gflops: float
    of_gemm: float
    gbytes: float
    of_read: float
    calm: int


@dataclass(frozen=True)
class Machine:
    """FLOP/s of a dense product of `dtype`, bytes/s of reading as much memory as the layer's weights take."""

    flops: float
    read: float

    def best(self, other: "Machine") -> "Machine":
        return Machine(max(self.flops, other.flops), max(self.read, other.read))


class Probes:
    """What the machine can do, measured in the rounds of a cell: what disturbs one disturbs the other."""

    def __init__(self, dtype: torch.dtype, weight_bytes: int) -> None:
        self.product = torch.randn(PROBE, PROBE).to(dtype)
        self.weights = torch.ones(weight_bytes // 4)

    def measure(self) -> Machine:
        flops = 2 * PROBE**3 / clock(torch.mm, self.product, self.product).seconds
        return Machine(flops, 4 * self.weights.numel() / clock(torch.sum, self.weights).seconds)


def build(shape: Shape, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The layer in each experts implementation, on the same weights."""
    import importlib

    import transformers

    config = getattr(transformers, shape.config)(**shape.settings())
    module = importlib.import_module(f"transformers.models.{shape.module}.modeling_{shape.module}")
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        layer = getattr(module, shape.block)(config).eval()
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) / shape.hidden**0.5)
    layers = {}
    for name in shape.forms():
        layers[name] = copy.deepcopy(layer, {id(p): p for p in layer.parameters()})
        for part in layers[name].modules():
            if hasattr(part, "config"):
                part.config = copy.copy(part.config)
                part.config._experts_implementation = name
    return layers


def providers(layers: Mapping[str, nn.Module], shape: Shape, tokens: int, dtype: torch.dtype) -> dict[str, Run]:
    torch._dynamo.reset()
    runs: dict[str, Run] = {"braze": torch.compile(alone(layers[shape.forms()[0]]), backend="braze")}
    for name in shape.forms():
        gathered = tokens * shape.top_k * shape.expert_elements() * dtype.itemsize
        if name != "batched_mm" or gathered <= GATHERED:
            runs[name] = torch.compile(alone(layers[name]))
    return runs


def alone(layer: nn.Module) -> Run:
    """The layer as code of its own: of forms that share their code each call would look for its own among all of them."""

    def call(x: Tensor) -> Any:
        return layer(x)

    call.__code__ = call.__code__.replace()
    return call


def result(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, and for how many of them a thread of ours was ready to run and had no core (0: unknown)."""

    seconds: float
    waited: float


def waited() -> float:
    """Seconds that this process's threads have waited for a core so far."""
    nanoseconds = 0
    for thread in Path("/proc/self/task").glob("*/schedstat"):
        nanoseconds += int(thread.read_text().split()[1])
    return nanoseconds / 1e9


def clock(run: Callable[..., object], *args: Tensor) -> Timing:
    before, begin = waited(), time.perf_counter()
    run(*args)
    seconds = time.perf_counter() - begin
    return Timing(seconds, waited() - before)


def undisturbed(timings: Sequence[Timing]) -> list[float]:
    """Seconds of the calls that waited for less than 2 % of their time; of the CALM that waited least if those are fewer."""
    by_wait = sorted(timings, key=lambda t: t.waited / t.seconds)
    return [t.seconds for t in by_wait[: max(calm(timings), CALM)]]


def calm(timings: Sequence[Timing]) -> int:
    """How many calls waited for less than 2 % of their time."""
    return sum(t.waited < 0.02 * t.seconds for t in timings)


def check(calls: Mapping[str, Run], exact: Run, inputs: Sequence[Tensor]) -> None:
    """RuntimeError where a form is off for the median token. Few may be: equal scores can choose other experts."""
    expect = [result(exact(x.double())) for x in inputs]
    for name, call in calls.items():
        errors = [
            (result(call(x)).double() - e).norm(dim=-1) / e.norm(dim=-1) for x, e in zip(inputs, expect, strict=True)
        ]
        error = torch.cat(errors, dim=1).median().item()
        if not error < 0.02:
            raise RuntimeError(f"{name} is off by {error:.3g}")


def medians(
    calls: Mapping[str, Run], inputs: Sequence[Tensor], probes: Probes, seconds: float
) -> tuple[dict[str, float], int, Machine]:
    """Median seconds of each form that is not hopeless, the least number of undisturbed calls, the best of the probes.

    Called in turn for `seconds`, and on until each form had CALM undisturbed calls, but not for PATIENCE times as long.
    """
    first = {name: min(clock(call, x).seconds for x in inputs[:2]) for name, call in calls.items()}
    best = min(t for name, t in first.items() if name != "braze")
    kept = {name: call for name, call in calls.items() if name == "braze" or first[name] <= HOPELESS * best}
    times: dict[str, list[Timing]] = {name: [] for name in kept}
    machine = probes.measure()
    begin, forms = time.perf_counter(), list(kept)
    while (
        (spent := time.perf_counter() - begin) < seconds
        or len(times["braze"]) < CALM
        or (spent < PATIENCE * seconds and min(map(calm, times.values())) < CALM)
    ):
        for place, name in enumerate(forms):  # others' inputs: none finds the weights it needs just read
            x = inputs[(len(times[name]) + place * (len(inputs) // len(kept))) % len(inputs)]
            times[name].append(clock(kept[name], x))
        forms = forms[1:] + forms[:1]  # the first comes after the probes, which empty the caches
        machine = machine.best(probes.measure())
    return (
        {name: statistics.median(undisturbed(t)) for name, t in times.items()},
        min(map(calm, times.values())),
        machine,
    )


def used_experts(layer: nn.Module, x: Tensor) -> int:
    """How many experts x's tokens go to."""
    seen: list[int] = []
    hook = layer.get_submodule("experts").register_forward_pre_hook(lambda _, a: seen.append(a[1].unique().numel()))
    layer(x)
    hook.remove()
    return seen[0]


def measure(name: str, shape: Shape, dtype: torch.dtype, token_counts: Sequence[int], seconds: float) -> Iterator[Cell]:
    """The cells of one layer, each once it is measured."""
    layers = build(shape, dtype)
    weight_bytes = shape.experts * shape.expert_elements() * dtype.itemsize
    probes = Probes(dtype, weight_bytes)
    exact = copy.deepcopy(layers["eager"]).double()
    for tokens in token_counts:
        inputs = [torch.randn(1, tokens, shape.hidden).to(dtype) for _ in range(8)]
        calls = providers(layers, shape, tokens, dtype)
        check(calls, exact, inputs[: 8 if tokens < 64 else 1])
        found, calls_undisturbed, machine = medians(calls, inputs, probes, seconds)
        peer = min((n for n in found if n != "braze"), key=found.__getitem__)
        used = statistics.mean(used_experts(layers["eager"], x) for x in inputs) if shape.experts > 1 else 1
        median = found["braze"]
        flops = 2 * tokens * shape.top_k * shape.expert_elements() / median
        read = used * shape.expert_elements() * dtype.itemsize / median
        yield Cell(
            name, str(dtype).removeprefix("torch."), tokens, shape.experts, "braze", round(median * 1e3, 4),
            round(found[peer] / median, 3), peer, round(flops / 1e9, 1), round(flops / machine.flops, 3),
            round(read / 1e9, 2), round(read / machine.read, 3), calls_undisturbed,
        )  # fmt: skip


def geomean(values: Sequence[float]) -> float:
    return statistics.geometric_mean(values)


def table(cells: Sequence[Cell], title: str) -> Table:
    out = Table(title=title, title_justify="left")
    for header in ("layer", "tokens", "experts", "braze ms", "GFLOP/s", "of GEMM", "GB/s", "of read", "stock / braze"):
        out.add_column(header, justify="left" if header == "layer" else "right")
    out.add_column("best stock")
    for c in cells:
        ratio = f"[{'red' if c.ratio < 1 else 'green'}]{c.ratio:.2f}"
        out.add_row(
            f"{c.shape} {c.dtype}", str(c.tokens), str(c.experts), f"{c.median:.2f}", f"{c.gflops:.0f}", f"{c.of_gemm:.2f}",
            f"{c.gbytes:.1f}", f"{c.of_read:.2f}", ratio, c.peer,
        )  # fmt: skip
    return out


def summary(cells: Sequence[Cell]) -> str:
    parts = []
    for what, some in (("decode (<= 8 tokens)", [c for c in cells if c.tokens <= 8]),
                       ("prefill", [c for c in cells if c.tokens > 8])):  # fmt: skip
        if some:
            worst = min(some, key=lambda c: c.ratio)
            parts.append(
                f"{what}: {geomean([c.ratio for c in some]):.2f}x the best stock form (geomean of {len(some)}), "
                f"worst {worst.ratio:.2f}x ({worst.shape} {worst.dtype}, {worst.tokens} tokens)"
            )
    return "\n".join(parts)


def write_csv(path: Path, cells: Sequence[Cell]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(cells[0])))
        writer.writeheader()
        writer.writerows(map(asdict, cells))


def kept_cells(path: Path | None) -> list[Cell]:
    """The cells of an earlier run whose calls were undisturbed; none without a file."""
    if path is None or not path.exists():
        return []
    return [cell for entry in json.loads(path.read_text()) if (cell := Cell(**entry)).calm >= CALM]


def write(path: Path, cells: Sequence[Cell]) -> None:
    """The cells as .json, and beside it as .csv, in the order of layers."""
    at = {name: i for i, name in enumerate(SHAPES)}
    ordered = sorted(cells, key=lambda c: (c.dtype, at[c.shape], c.tokens))
    path.write_text(json.dumps([asdict(c) for c in ordered], indent=1) + "\n")
    write_csv(path.with_suffix(".csv"), ordered)


def growth(folder: Path, seconds: float, console: Console) -> None:
    """Time over tokens (1 to 4096) and over experts (8 to 256): growth.csv and .json."""
    base = Shape("qwen3_moe", "Qwen3MoeSparseMoeBlock", "Qwen3MoeConfig", 512, 32, 256, 8, {"norm_topk_prob": True})
    by_tokens = list(measure("by tokens", base, torch.bfloat16, [4**n for n in range(7)], seconds))
    by_experts: list[Cell] = []
    for experts in (8, 16, 32, 64, 128, 256):
        shape = Shape(base.module, base.block, base.config, 512, experts, 256, 8, base.extra)
        by_experts += measure("by experts", shape, torch.bfloat16, [32], seconds)
    cells = by_tokens + by_experts
    console.print(table(cells, "growth: hidden 512, inner 256, top-8"))
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "growth.csv", cells)
    (folder / "growth.json").write_text(json.dumps([asdict(c) for c in cells], indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one layer, two numbers of tokens, short rounds")
    parser.add_argument("--json", type=Path, help="write the cells to this file, and beside it as .csv")
    parser.add_argument("--resume", action="store_true", help="keep that file's undisturbed cells, measure the others")
    parser.add_argument("--shapes", default=",".join(EXPERTS), help="of " + ", ".join(SHAPES))
    parser.add_argument("--tokens", default="1,8,128,512")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--seconds", type=float, default=3.0, help="a cell's time, compilation not counted")
    parser.add_argument("--growth", type=Path, metavar="FOLDER", help="instead: growth.csv and .json there")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    console = Console(width=130)
    with torch.no_grad():
        if args.growth:
            growth(args.growth, 0.3 if args.quick else args.seconds / 2, console)
            return
        names = ["qwen3"] if args.quick else args.shapes.split(",")
        token_counts = [1, 128] if args.quick else [int(n) for n in args.tokens.split(",")]
        cells = kept_cells(args.json) if args.resume else []
        for dtype, name in itertools.product((getattr(torch, n) for n in args.dtypes.split(",")), names):
            done = {c.tokens for c in cells if c.shape == name and c.dtype == str(dtype).removeprefix("torch.")}
            left = [n for n in token_counts if n not in done]
            for cell in measure(name, SHAPES[name], dtype, left, 0.5 if args.quick else args.seconds) if left else ():
                cells.append(cell)
                console.print(table([cell], f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"))
                if args.json:
                    write(args.json, cells)
    console.print(summary(cells))


if __name__ == "__main__":
    main()
