"""The attention preamble: the projections' output [1, T, H * D] -> heads -> norm -> RoPE -> [1, H, T, D] for attention.

Providers side by side: eager, stock torch.compile (static and dynamic), Liger-Kernel where it is installed and has the form,
and braze as it chooses by itself; in place is braze's Triton kernel over its inputs, as Liger-Kernel's is, and as braze has it
where a projection made them; --providers has its pointwise code and its kernel called alone, too. copy clones q and k: the
floor. Where k goes into a cache, it is written to rows of a tensor [1, H, T, D] that the caller keeps, by index. All are timed
in turn: a GPU by CUDA graphs over input sets that together exceed its L2 cache; a CPU by calls on one thread, one token also as
LAYERS preambles of one graph, since what a call of a graph costs is shared by a model's layers. In brackets: the copy's time
over the provider's, and stock's time over the provider's.

    python benchmarks/rope.py [--quick] [--json FILE] [--variant TEXT] [--tokens N ...] [--providers NAME ...] [--tune]
"""

import argparse
import ctypes
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
from braze.backend import collect
from braze.kernels.spec import RopeSpec
from braze.kernels.triton import rope as triton_rope
from braze.kernels.turning import Norm
from braze.tune import L2_BYTES, captured, replay_time

Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]
Function = Callable[..., Any]
EPS = 1e-6
LAYERS = 8
#: What is timed unless --providers says otherwise.
USUAL = ("copy", "eager", "stock", "stock dynamic", "liger", "in place", "braze", "braze dynamic")


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


def complex_product(x: Tensor, table: Tensor, _: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.to(table.real.dtype).reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


def interleaved_to_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    batch, heads, tokens, size = x.shape
    return half(x.view(batch, heads, tokens, size // 2, 2).transpose(4, 3).reshape(x.shape), cos, sin)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def rms_norm_plus_one(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (wide * (1.0 + weight.float())).to(x.dtype)


@dataclass(frozen=True)
class Variant:
    """A model's own spelling of a rotation of heads of `size`, what it is as a spec, the tables' width, the norm before it."""

    name: str
    size: int
    spec: RopeSpec
    width: int
    rotate: Rotate
    table_dtype: torch.dtype = torch.bfloat16  # complex: one table of cos + i sin
    norm: Callable[[Tensor, Tensor], Tensor] | None = None
    cached: bool = False

    def __call__(
        self, q: Tensor, k: Tensor, a: Tensor, b: Tensor, cos: Tensor, sin: Tensor, *cache: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The preamble: q and k [1, T, H * D], weights a and b [D], tables [1, 1, T, width] -> q and k [1, H, T, D]. cache: a
        tensor [1, H, T, D] and the rows of it that are k's, where it has one."""
        heads = [x.view(*x.shape[:-1], -1, self.size) for x in (q, k)]
        if self.norm is not None:
            heads = [self.norm(x, w) for x, w in zip(heads, (a, b), strict=True)]
        q, k = (self.rotate(x.transpose(1, 2), cos, sin) for x in heads)
        return (q, cache[0].index_copy_(2, cache[1], k)) if cache else (q, k)


VARIANTS = (
    Variant("llama half", 128, RopeSpec(128), 128, half),
    Variant("llama half, cache", 128, RopeSpec(128), 128, half, cached=True),
    Variant("llama half 64", 64, RopeSpec(64), 64, half),
    Variant("partial 64 of 256", 256, RopeSpec(64), 64, partial),
    Variant("cohere interleaved", 128, RopeSpec(128, 0, "interleaved", "interleaved"), 128, interleaved, torch.float32),
    Variant(
        "llama4 complex", 128, RopeSpec(128, 0, "interleaved", "interleaved"), 64, complex_product, torch.complex64
    ),
    Variant("deepseek_v3 interleave", 64, RopeSpec(64, 0, "interleaved", "half"), 64, interleaved_to_half),
    Variant("qwen3 norm, half", 128, RopeSpec(128), 128, half, norm=rms_norm),
    Variant("gemma3 norm, half 256", 256, RopeSpec(256), 256, half, norm=rms_norm_plus_one),
    Variant("qwen3_next norm, partial 64 of 256", 256, RopeSpec(64), 64, partial, norm=rms_norm_plus_one),
)


@dataclass(frozen=True)
class Cell:
    shape: dict[str, Any]
    provider: str
    median: float  # microseconds
    ratio: float  # the copy's time over this one
    speedup: float  # stock's time over this one; on a CPU the median of the rounds' ratios
    kernel: str = ""  # what braze chose


def compiled_by_braze(variant: Variant, kernels: dict[str, str], **options: Any) -> Function:
    """A new closure each time: compiled functions of one code object would share their limit of recompilations."""
    return torch.compile(
        lambda *inputs: variant(*inputs),
        backend="braze",
        options={"require": ["rope"], "strict": True, "kernel": kernels},
        **options,
    )


def kernel(variant: Variant, **knobs: Any) -> Function:
    """braze's Triton kernel alone."""

    def run(q: Tensor, k: Tensor, a: Tensor, b: Tensor, cos: Tensor, sin: Tensor) -> Any:
        q, k = (x.view(*x.shape[:-1], -1, variant.size).transpose(1, 2) for x in (q, k))
        norm = None if variant.norm is None else Norm(EPS, a, b, variant.norm is rms_norm_plus_one)
        if cos.is_complex():
            cos, sin = torch.view_as_real(cos).unbind(-1)
        return triton_rope.run(q, k, cos[:, 0], sin[:, 0], variant.spec, norm=norm, **knobs)

    return run


def liger(variant: Variant) -> Function | None:
    """Liger-Kernel's norm and rotation, which is in place; None where it is not installed or has no such form."""
    if variant.rotate is not half or variant.cached:
        return None
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.rope import LigerRopeFunction
    except ImportError:
        return None

    def run(q: Tensor, k: Tensor, a: Tensor, b: Tensor, cos: Tensor, sin: Tensor) -> Any:
        heads = [x.view(*x.shape[:-1], -1, variant.size) for x in (q, k)]
        if variant.norm is not None:
            offset, mode = (0.0, "llama") if variant.norm is rms_norm else (1.0, "gemma")
            heads = [LigerRMSNormFunction.apply(x, w, EPS, offset, mode) for x, w in zip(heads, (a, b), strict=True)]
        return LigerRopeFunction.apply(*(x.transpose(1, 2) for x in heads), cos[:, 0], sin[:, 0])

    return run


def exactly(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64) if x.is_floating_point() or x.is_complex() else x


def copy(q: Tensor, k: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    """The floor: every element read and written once, in the order of memory."""
    return torch.clone(q), torch.clone(k)


def providers(variant: Variant, device: str) -> dict[str, Function]:
    alone = device == "cuda" and not variant.cached
    found: dict[str, Function | None] = {
        "copy": copy,
        "eager": variant,
        "stock": torch.compile(lambda *inputs: variant(*inputs), dynamic=False),
        "stock dynamic": torch.compile(lambda *inputs: variant(*inputs)),
        "liger": liger(variant) if device == "cuda" else None,
        "braze": compiled_by_braze(variant, {}, dynamic=False),
        "braze dynamic": compiled_by_braze(variant, {}),
        "pointwise": compiled_by_braze(variant, {"rope": "pointwise"}, dynamic=False),
        "kernel": kernel(variant) if alone else None,
        "in place": kernel(variant, in_place=True)
        if alone and variant.spec.layout_in == variant.spec.layout_out
        else None,
    }
    return {name: f for name, f in found.items() if f is not None}


def make(variant: Variant, tokens: int, heads: tuple[int, int], device: str) -> tuple[Tensor, ...]:
    """q, k [1, T, H * D], norm weights [D], tables [1, 1, T, width]; a cache [1, H, T, D] and its rows where there is one."""
    cache: tuple[Tensor, ...] = ()
    if variant.cached:
        room = torch.zeros(1, heads[1], tokens, variant.size, device=device, dtype=torch.bfloat16)
        cache = room, torch.arange(tokens, device=device)
    q, k = (torch.randn(1, tokens, n * variant.size, device=device, dtype=torch.bfloat16) for n in heads)
    a, b = torch.randn(2, variant.size, device=device, dtype=torch.bfloat16)
    angle = torch.rand(1, 1, tokens, variant.spec.rotary_dim // 2, device=device) * 6
    if variant.width == variant.spec.rotary_dim:
        interleave = variant.spec.layout_out == "interleaved"
        angle = angle.repeat_interleave(2, -1) if interleave else torch.cat((angle, angle), -1)
    if variant.table_dtype.is_complex:
        return q, k, a, b, torch.polar(torch.ones_like(angle), angle), angle
    return q, k, a, b, angle.cos().to(variant.table_dtype), angle.sin().to(variant.table_dtype), *cache


def check(name: str, function: Function, variant: Variant, inputs: tuple[Tensor, ...]) -> None:
    """AssertionError where a provider's first tokens differ from float64 by more than bfloat16 does."""
    q, k, a, b, cos, sin, *cache = inputs
    start = [x[:, :, :64] if x.ndim > 1 else x[:64] for x in cache]
    few = (q[:, :64], k[:, :64], a, b, cos[..., :64, :], sin[..., :64, :], *start)
    wanted = variant(*map(exactly, few))
    for got, want in zip(function(*(x.clone() for x in inputs)), wanted, strict=True):
        error = ((got[:, :, :64].double() - want).norm() / want.norm()).item()
        assert error < 1.2e-2, (variant.name, name, error)


def gpu_times(functions: list[Function], sets: list[tuple[Tensor, ...]], repeats: int) -> list[list[float]]:
    """Microseconds a call: for each function, the times of rounds that replay every function's graph once."""
    graphs = [captured(f, sets) for f in functions]
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for graph, taken in zip(graphs, times, strict=True):
            taken.append(replay_time(graph) / len(sets))
    return times


def cpu_times(functions: list[Function], inputs: tuple[Tensor, ...], repeats: int) -> list[list[float]]:
    """Microseconds a call: for each function, the times of rounds that call every function once."""
    times: list[list[float]] = [[] for _ in functions]
    for n in range(repeats + 3):
        for function, taken in zip(functions, times, strict=True):
            begin = time.perf_counter()
            function(*inputs)
            if n >= 3:
                taken.append((time.perf_counter() - begin) * 1e6)
    return times


def measure(
    variant: Variant, chosen: dict[str, Function], tokens: int, heads: tuple[int, int], device: str, repeats: int
) -> Iterator[Cell]:
    inputs = make(variant, tokens, heads, device)
    kernels: dict[str, str] = {}
    working: dict[str, Function] = {}
    for name, function in chosen.items():
        try:
            with collect() as reports:
                for other in (24, 40) if "dynamic" in name else ():  # the second length makes T symbolic
                    function(*make(variant, other, heads, device))
                if name != "copy":
                    check(name, function, variant, inputs)
        except Exception as e:  # one provider's failure is a line of the report, and not the end of the others
            print(f"{variant.name}, T={tokens}: {name} left out: {type(e).__name__}: {str(e).splitlines()[0][:200]}")
            continue
        working[name] = function
        kernels[name] = ", ".join(sorted({f"{s.form}: {s.kernel}" for r in reports for s in r.sites}))
    if device == "cuda":
        size = sum(x.numel() * x.element_size() for x in inputs)
        sets = [inputs, *(make(variant, tokens, heads, device) for _ in range(min(63, L2_BYTES * 2 // size)))]
        times = gpu_times(list(working.values()), sets, repeats)
    else:
        times = cpu_times(list(working.values()), inputs, repeats)
    by_name = dict(zip(working, times, strict=True))
    shape = {"variant": variant.name, "D": variant.size, "T": tokens, "Hq": heads[0], "Hk": heads[1], "device": device}
    for name, taken in by_name.items():
        against = [
            round(statistics.median(r / t for r, t in zip(by_name[reference], taken, strict=True)), 3)
            if reference in by_name
            else 0.0
            for reference in ("copy", "stock")
        ]
        yield Cell(shape, name, round(statistics.median(taken), 2), *against, kernels.get(name, ""))


def measure_layers(variant: Variant, heads: tuple[int, int], repeats: int) -> Iterator[Cell]:
    """One token on a CPU through LAYERS preambles of one graph, by tables that they share: microseconds a layer."""
    inputs = [make(variant, 1, heads, "cpu") for _ in range(LAYERS)]
    shared = inputs[0][2:6]

    def run(*each: Tensor) -> Any:
        step = len(each) // LAYERS
        return [variant(*each[n : n + 2], *shared, *each[n + 2 : n + step]) for n in range(0, len(each), step)]

    flat = [x for given in inputs for x in (*given[:2], *given[6:])]
    options: Any = {"require": ["rope"], "strict": True}
    functions = {
        "stock": torch.compile(lambda *each: run(*each), dynamic=False),
        "braze": torch.compile(lambda *each: run(*each), backend="braze", dynamic=False, options=options),
    }
    for _ in range(200):  # of a few microseconds each
        for function in functions.values():
            function(*flat)
    times = dict(zip(functions, cpu_times(list(functions.values()), tuple(flat), 20 * repeats), strict=True))
    shape = {"variant": variant.name, "D": variant.size, "T": 1, "Hq": heads[0], "Hk": heads[1], "device": "cpu"}
    for name, taken in times.items():
        against = statistics.median(r / t for r, t in zip(times["stock"], taken, strict=True))
        shape_of_many = {**shape, "layers": LAYERS}
        yield Cell(shape_of_many, name, round(statistics.median(taken) / LAYERS, 2), 0.0, round(against, 3))


def show(cells: list[Cell], console: Console) -> None:
    names = list(dict.fromkeys(c.provider for c in cells))
    cells = [c for c in cells if "layers" not in c.shape]
    table = Table(title="attention preamble: microseconds (copy's time / provider's, stock's / provider's)")
    for header in ("variant", "T", *names):
        table.add_column(header, justify="left" if header == "variant" else "right")
    for shape in {json.dumps(c.shape): c.shape for c in cells}.values():
        row = {c.provider: f"{c.median:.1f} ({c.ratio:.2f}, {c.speedup:.2f}x)" for c in cells if c.shape == shape}
        table.add_row(shape["variant"], str(shape["T"]), *(row.get(n, "") for n in names))
    console.print(table)


def tune(variants: list[Variant], console: Console) -> None:
    """The Triton kernel's tile sizes and warps, as fractions of the copy's speed."""
    choices = [(tile, warps) for tile in (512, 1024, 2048, 4096) for warps in (1, 2, 4, 8)]
    table = Table("variant", "T", *(f"{t}/{w}" for t, w in choices))
    for variant in variants:
        for tokens in (256, 4096, 16384):
            sets = [make(variant, tokens, (32, 8), "cuda") for _ in range(3)]
            functions = [copy, *(kernel(variant, tile=t, warps=w) for t, w in choices)]
            floor, *times = map(statistics.median, gpu_times(functions, sets, 20))
            table.add_row(variant.name, str(tokens), *(f"{floor / t:.2f}" for t in times))
    console.print(table)


def _keep_memory() -> None:
    """Memory that was freed is used again: whether a call has page faults would else depend on what ran before."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for setting, value in ((-4, 0), (-1, 2**30)) if mallopt else ():  # glibc's M_MMAP_MAX, M_TRIM_THRESHOLD
        mallopt(setting, value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats")
    parser.add_argument("--json", type=Path, help="write the cells to this file, after each size")
    parser.add_argument(
        "--variant", default="", help="only variants whose name has this in it ('norm': those with one)"
    )
    parser.add_argument("--tokens", type=int, nargs="+", help="only these numbers of tokens")
    parser.add_argument("--providers", nargs="+", default=USUAL, help="any of these, 'pointwise' and 'kernel'")
    parser.add_argument("--tune", action="store_true", help="only sweep the Triton kernel's tiles and warps (GPU)")
    options = parser.parse_args()
    torch.compiler.config.force_disable_caches = True  # a cached graph would hold an earlier lowering
    torch._dynamo.config.recompile_limit = 16  # a static compilation for each number of tokens
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)  # else a busy machine's other work decides
        _keep_memory()
    console = Console(width=200)
    heads = (32, 8) if device == "cuda" else (16, 4)
    sizes = ([1, 4096] if options.quick else [1, 16, 256, 4096, 32768]) if device == "cuda" else [1, 1024]
    repeats = 10 if options.quick else 40
    variants = [v for v in VARIANTS if options.variant in v.name]
    cells: list[Cell] = []
    with torch.no_grad():
        if options.tune:
            tune(variants, console)
            return
        for variant in variants:
            torch._dynamo.reset()
            chosen = {n: f for n, f in providers(variant, device).items() if n in options.providers}
            for tokens in options.tokens or sizes:
                cells += measure(variant, chosen, tokens, heads, device, repeats)
                if device == "cpu" and tokens == 1:
                    cells += measure_layers(variant, heads, repeats)
                if options.json:
                    options.json.write_text(json.dumps([asdict(c) for c in cells], indent=1))
    show(cells, console)


if __name__ == "__main__":
    main()
