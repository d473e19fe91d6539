"""docs/performance.md out of benchmarks/results/*.json: each file that has a section here becomes one, others are left out.

python benchmarks/report.py > docs/performance.md
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
HEAD = """# Performance

Made by `make performance` from `benchmarks/results/`. Ratios on CPU are paired: both sides
were called in turn in one run. More than 1 is faster than the other.
"""
Rows = Sequence[Mapping[str, Any]]
BESIDE = ("grouped", "triton_kernels")
MANY = 2048  # tokens from which arithmetic decides: the table says so


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def summary(name: str, rows: Rows) -> str:
    """The geometric mean and the worst of the ratios."""
    worst = min(rows, key=lambda r: r["ratio"])
    mean = statistics.geometric_mean(r["ratio"] for r in rows)
    where = f"{worst['shape']} {worst['dtype']}, {worst['tokens']} tokens"
    return f"- {name}: {mean:.2f}x (geomean of {len(rows)} cells), worst {worst['ratio']:.2f}x ({where})."


def cpu(cells: Rows, machine: str) -> str:
    """Expert layers on a CPU; cells whose calls were disturbed by other work are marked and not counted."""
    calm = [c for c in cells if c["calm"] >= 7]
    rows = [
        (
            f"{c['shape']} {c['dtype']}", c["tokens"], f"{c['median']:.2f}", f"{c['gflops']:.0f}",
            f"{c['of_gemm']:.2f}", f"{c['gbytes']:.1f}", f"{c['of_read']:.2f}",
            f"{c['ratio']:.2f}" + ("" if c in calm else " (disturbed)"), c["peer"],
        )
        for c in cells
    ]  # fmt: skip
    header = ("layer", "tokens", "braze ms", "GFLOP/s", "of GEMM", "GB/s", "of read", "stock / braze", "best stock")
    parts = (
        ("decode, up to 8 tokens", [c for c in calm if c["tokens"] <= 8]),
        ("prefill, 128 and 512 tokens", [c for c in calm if c["tokens"] > 8]),
    )
    return "\n".join(
        (
            f"## Experts on {machine}\n",
            "`benchmarks/cpu.py`: transformers' expert layers, braze beside the fastest of `grouped_mm`, `batched_mm` and the",
            "eager loop, each under stock `torch.compile`. Of GEMM and of read: the parts of a dense product's FLOP/s and of",
            "the bytes a second of reading as much memory, both measured in the rounds of the cell.",
            f"{len(cells) - len(calm)} of {len(cells)} cells had fewer than 7 calls undisturbed by other work in some form:",
            "these are marked, and not counted in:\n",
            *(summary(name, some) for name, some in parts if some),
            "",
            table(header, rows),
            "",
        )
    )


def loops(cells: Rows, machine: str) -> str:
    """Layers with loops over a list of modules."""
    rows = []
    for c in cells:
        best = min(c["eager"], c["stock"]) / min(c["braze"], c["graph"] or c["braze"])
        graph = f"{c['graph']:.3f}" if c["graph"] else ""
        rows.append(
            (c["shape"], c["tokens"], *(f"{c[way]:.3f}" for way in ("eager", "stock", "braze")), graph, f"{best:.2f}")
        )
    header = ("layer", "tokens", "eager ms", "stock ms", "braze ms", "in a CUDA graph ms", "best of the others / braze")
    return "\n".join(
        (
            f"## Layers with a loop over a list of experts, on {machine}\n",
            "`benchmarks/loops.py`: router and loop in one forward, as models were written before transformers 5, bfloat16;",
            "whole calls in turn, the host's time included. stock: torch.compile, which breaks its graph in the loop; braze:",
            '`braze.fuse`, in a CUDA graph with mode="reduce-overhead".\n',
            f"- {mean([float(r[-1]) for r in rows])}\n",
            table(header, rows),
            "",
        )
    )


def growth(cells: Rows) -> str:
    """One expert layer on CPU over tokens and over experts."""
    rows = [
        (
            c["tokens"],
            c["experts"],
            f"{c['median']:.2f}",
            f"{c['median'] * c['ratio']:.2f}",
            f"{c['ratio']:.2f}",
            c["calm"],
        )
        for c in cells
    ]
    header = ("tokens", "experts", "braze ms", "best stock ms", "stock / braze", "undisturbed calls")
    return "\n".join(
        (
            "## Growth on CPU\n",
            "`benchmarks/cpu.py --growth`: a qwen3-like layer, hidden 512, inner 256, top-8, bfloat16; first over tokens, then",
            "over experts. Fewer than 7 undisturbed calls: the ratio is not to be relied on.\n",
            table(header, rows),
            "",
        )
    )


def mean(ratios: Sequence[float], worst: Callable[..., float] = min) -> str:
    return f"{statistics.geometric_mean(ratios):.2f}x (geomean of {len(ratios)} cells), worst {worst(ratios):.2f}x"


def rope(cells: Rows) -> str:
    """The attention preamble on a GPU, every provider of a size in one row."""
    rows, by_size = [], {json.dumps(c["shape"]): c["shape"] for c in cells}
    ours = [c for c in cells if c["provider"] == "braze"]
    against = []
    for shape in by_size.values():
        own = {c["provider"]: c for c in cells if c["shape"] == shape}
        braze, over, liger = own["braze"], own.get("in place"), own.get("liger")
        best = min(c["median"] for c in (braze, over) if c)
        against += [liger["median"] / best] if liger else []
        ratios = (f"{braze['ratio']:.2f}", f"{braze['speedup']:.2f}", f"{over['median']:.1f}" if over else "")
        words = f"{liger['median'] / best:.2f}" if liger else ""
        rows.append((shape["variant"], shape["T"], f"{braze['median']:.1f}", *ratios, words))
    many = [c for c in ours if c["shape"]["T"] >= 4096]
    header = ("preamble", "tokens", "braze us", "copy / braze", "stock / braze", "in place us", "Liger / braze's best")
    return "\n".join(
        (
            "## RoPE on an H100\n",
            "`benchmarks/rope.py`: projections' output to the layout that attention wants, 32 and 8 heads, bfloat16, CUDA",
            "graphs over inputs larger than L2. Copy clones q and k; Liger-Kernel rotates in place, and norms by kernels of",
            "their own; all in turn. In place: the kernel over its inputs, as compiled graphs have it where a projection made",
            "them; a graph's own inputs, as here, are not written over.\n",
            f"- against stock torch.compile: {mean([c['speedup'] for c in ours])}",
            f"- against a copy, from 4096 tokens: {mean([c['ratio'] for c in many])}",
            *([f"- against Liger-Kernel: {mean(against)}"] if against else []),
            "",
            table(header, rows),
            "",
        )
    )


def rope_cpu(cells: Rows) -> str:
    """The attention preamble on a CPU."""
    ours = [c for c in cells if c["provider"] == "braze"]
    alone = [c for c in ours if "layers" not in c["shape"]]
    layers = {c["shape"]["variant"]: c for c in ours if "layers" in c["shape"]}
    rows = []
    for c in alone:
        shape = c["shape"]
        many = layers.get(shape["variant"]) if shape["T"] == 1 else None
        ratios = f"{c['ratio']:.2f}", f"{c['speedup']:.2f}", f"{many['speedup']:.2f}" if many else ""
        kernel = "C++" if "cpp" in c["kernel"] else "loops"
        rows.append((shape["variant"], shape["T"], f"{c['median']:.0f}", *ratios, kernel))
    count = next((c["shape"]["layers"] for c in layers.values()), 0)
    kinds = {
        "one token, the call of the graph included": [c["speedup"] for c in alone if c["shape"]["T"] == 1],
        f"one token, {count} preambles in one graph": [c["speedup"] for c in layers.values()],
        "prefill": [c["speedup"] for c in alone if c["shape"]["T"] > 1],
    }
    header = ("preamble", "tokens", "braze us", "copy / braze", "stock / braze", "of a graph of many", "kernel")
    return "\n".join(
        (
            "## RoPE on CPU\n",
            "`benchmarks/rope.py`: the same preamble with 16 and 4 heads, on one thread; stock's time over braze's in the",
            "rounds of one run. A call of a compiled graph takes more than ten microseconds whatever it does, which all",
            f"layers of a model share: one token is also timed through {count} preambles in one graph.\n",
            *(f"- {name}: {mean(some)}" for name, some in kinds.items() if some),
            "",
            table(header, rows),
            "",
        )
    )


def peers(cells: Rows) -> str:
    """The experts' kernels on a GPU beside the best of the other projects' in each cell."""
    rows = [
        (c["shape"], c["tokens"], c["median"], f"{c['fraction_of_floor']:.2f}", f"{c['ratio']:.2f}", c["peer"])
        for c in cells
    ]
    header = ("experts", "tokens", "braze us", "of floor", "peer / braze", "best peer")
    return "\n".join(
        (
            "## Experts' kernels on an H100\n",
            "`benchmarks/moe.py`: CUDA graphs, bfloat16; peers are vLLM's and SGLang's Triton kernels, OpenAI's triton_kernels",
            "and torch's grouped products, on the same kind of GPU, not in the same run (`benchmarks/peers_h100.json`). With",
            "many tokens a warm GPU is slower by up to 15 %, so that there only the next table compares. The floor is the",
            "larger of the time to read what is needed and the time of the arithmetic.\n",
            f"- against the best peer: {mean([c['ratio'] for c in cells])}\n",
            table(header, rows),
            "",
        )
    )


def beside(cells: Rows) -> str:
    """The experts' kernels on a GPU beside other forms of the layer, in turn."""
    rows = []
    for c in cells:
        others = (f"{t:.1f} ({t / c['braze']:.2f})" if (t := c[peer]) else "-" for peer in BESIDE)
        dense = f"{c['of_dense']:.2f}" if c["tokens"] >= MANY else ""
        rows.append((c["shape"], c["tokens"], f"{c['braze']:.1f}", *others, dense, f"{c['of_floor']:.2f}"))
    best = [min(t for peer in BESIDE if (t := c[peer])) / c["braze"] for c in cells if any(c[peer] for peer in BESIDE)]
    against = [(peer, [c[peer] / c["braze"] for c in cells if c[peer]]) for peer in BESIDE]
    header = ("experts", "tokens", "braze us", *(f"{peer} us" for peer in BESIDE), "of dense", "of floor")
    return "\n".join(
        (
            "## Experts' kernels on an H100, in turn with others\n",
            "`benchmarks/moe_beside.py`: every form of a cell in one run, the replays of their CUDA graphs in turn, as a warm",
            "GPU is slower by more than forms differ; in brackets its time over braze's. grouped: `torch._grouped_mm` under",
            "torch.compile, all sizes fixed; triton_kernels: OpenAI's, with gpt_oss's activation in every shape,",
            "without the router's softmax and top-k, where top_k is a power of two. Of dense, from 2048 tokens: cuBLAS's time",
            "for the products as if all rows had one expert, without sort, gathering, activation and sum, over braze's.\n",
            *(f"- against {peer}: {mean(ratios)}" for peer, ratios in against if ratios),
            f"- against the faster of them: {mean(best)}\n",
            table(header, rows),
            "",
        )
    )


def stored(cells: Rows) -> str:
    """The experts' kernels on a GPU with weights stored in several ways."""
    ways = ("apart", "separate", "in_turn")
    rows = [
        (
            c["shape"],
            c["tokens"],
            f"{c['stacked']:.1f}",
            *(f"{c[way]:.1f} ({c[way] / c['stacked']:.2f})" for way in ways),
        )
        for c in cells
    ]
    return "\n".join(
        (
            "## Experts' kernels on an H100, by how weights are stored\n",
            "`benchmarks/moe_stored.py`: one run, replays in turn; in brackets the time over that of stacked weights. apart:",
            "gate and up are two tensors; separate: gate, up and down of each expert are, found by a table of addresses, whose",
            "copy to the device is in the time; in turn: the same, one expert after the other, calls without a graph.\n",
            *(f"- {way.replace('_', ' ')}: {mean([c[way] / c['stacked'] for c in cells], max)}" for way in ways),
            "",
            table(("experts", "tokens", "stacked us", "apart us", "separate us", "in turn us"), rows),
            "",
        )
    )


def untuned(cells: Rows) -> str:
    """Tiles that the model of their cost chooses beside tuned ones."""
    rows = [
        (c["shape"], c["tokens"], c["tuned"], c["untuned"], f"{c['tuned'] / c['untuned']:.2f}", c["model"])
        for c in cells
    ]
    header = ("experts", "tokens", "tuned us", "model's us", "tuned / model's", "the model's tiles")
    return "\n".join(
        (
            "## Untuned shapes on an H100\n",
            "`benchmarks/moe.py --untuned`: what a shape that nobody tuned would get, the shipped ones as examples; replays of",
            "the two in turn.\n",
            f"- tuned against the model's: {mean([c['tuned'] / c['untuned'] for c in cells])}\n",
            table(header, rows),
            "",
        )
    )


def layers(cells: Rows) -> str:
    """Whole expert layers on a GPU beside the better of the stock forms."""
    ours = [c for c in cells if c["provider"] == "braze"]
    rows = [(c["shape"], c["tokens"], c["median"], c["host"], f"{c['speedup']:.2f}") for c in ours]
    few, many = ([c["speedup"] for c in ours if (c["tokens"] <= 32) == decode] for decode in (True, False))
    return "\n".join(
        (
            "## Expert layers on an H100\n",
            "`benchmarks/layers.py`: router, experts and shared experts of transformers' layers, stock the faster of its forms",
            "under torch.compile, bfloat16.\n",
            *(f"- {name}: {mean(some)}" for name, some in (("decode", few), ("prefill", many)) if some),
            "",
            table(("layer", "tokens", "braze us", "host us", "stock / braze"), rows),
            "",
        )
    )


def mlp(cells: Rows) -> str:
    """Dense MLPs of one token on a GPU."""
    others = (("stock", "stock torch.compile"), ("tuned", "max-autotune"))
    rows = [
        (
            c["shape"], f"{c['braze']:.1f}", *(f"{c[way]:.1f} ({c[way] / c['braze']:.2f})" for way, _ in others),
            f"{c['floor'] / c['braze']:.2f}",
        )
        for c in cells
    ]  # fmt: skip
    return "\n".join(
        (
            "## A dense MLP of one token on an H100\n",
            "`benchmarks/mlp.py`: one run, replays of CUDA graphs in turn, bfloat16; in brackets the time over braze's. Tuned:",
            "torch.compile with max-autotune, to which braze leaves these products where it is on. The floor reads each weight",
            "once.\n",
            *(f"- against {name}: {mean([c[way] / c['braze'] for c in cells])}" for way, name in others),
            "",
            table(("MLP", "braze us", "stock us", "tuned us", "of floor"), rows),
            "",
        )
    )


def models(cells: Rows) -> str:
    """Whole models on a GPU beside the faster of the stock forms."""
    rows, ratios = [], {"GPU": {}, "whole": {}}  # type: ignore[var-annotated]
    for key in dict.fromkeys((c["model"], c["tokens"]) for c in cells):
        own = {c["provider"]: c for c in cells if (c["model"], c["tokens"]) == key}
        eager, braze = own.pop("eager"), own.pop("braze")
        figures: list[str] = []
        for kind, part in (("GPU", "gpu"), ("whole", "median")):
            stock = min(c[part] for c in own.values())
            ratio = stock / braze[part]
            ratios[kind].setdefault("decode" if key[1] == 1 else "prefill", []).append(ratio)
            figures += [f"{stock:.2f}", f"{braze[part]:.2f}", f"{ratio:.2f}"]
        rows.append((*key, *figures, f"{eager['median']:.2f}"))
    header = (
        "model",
        "tokens",
        "GPU: stock ms",
        "braze ms",
        "ratio",
        "whole call: stock ms",
        "braze ms",
        "ratio",
        "eager ms",
    )
    named = {"GPU": "the GPU's time", "whole": "whole calls"}
    return "\n".join(
        (
            "## Whole models on an H200\n",
            f"`benchmarks/models.py --device cuda`: {cells[0]['layers']} layers of real size, bfloat16, in CUDA graphs,",
            "the faster of transformers' forms under stock torch.compile in turn with eager and braze. One token: a step",
            "with a static cache of 512 places. Whole calls: with the host's time, which is more than the GPU's for one token",
            "of so few layers (guards, with CPU caches that the eager call before has left cold). The GPU's: of calls behind",
            "a long kernel.\n",
            *(
                f"- {named[kind]}, {what}: {mean(some)}"
                for kind, parts in ratios.items()
                for what, some in parts.items()
            ),
            "",
            table(header, rows),
            "",
        )
    )


def compile_time(cells: Rows) -> str:
    """What the passes add to a first call."""
    rows = [
        (
            c["model"],
            c["layers"],
            c["nodes"],
            c["sites"],
            f"{c['stock']:.1f}",
            f"{c['passes']:.2f}",
            f"{c['share']:.1%}",
        )
        for c in cells
    ]
    deep = [c for c in cells if c["layers"] == max(d["layers"] for d in cells)]
    shares = ", ".join(f"{c['share']:.1%} ({c['model']})" for c in deep)
    return "\n".join(
        (
            "## Compile time\n",
            "`benchmarks/compile_time.py`: the passes' seconds beside stock `torch.compile`'s first call, in one run, caches",
            "off, on two cores.\n",
            f"- {deep[0]['layers']} layers: {shares}\n",
            table(("model", "layers", "nodes", "sites", "stock s", "passes s", "passes / stock"), rows),
            "",
        )
    )


#: File of benchmarks/results, without .json -> its section.
SECTIONS: Mapping[str, Callable[[Any], str]] = {
    "moe_h100": peers,
    "moe_beside_h100": beside,
    "moe_stored_h100": stored,
    "untuned_h100": untuned,
    "layers_h100": layers,
    "models_h200": models,
    "mlp_h100": mlp,
    "rope_h100": rope,
    "rope_cpu": rope_cpu,
    "cpu": partial(cpu, machine="two cores of an AMD EPYC with AVX-512"),
    "cpu_mlp": partial(cpu, machine="the same cores: one that every token has, a dense MLP"),
    "cpu_amx": partial(cpu, machine="16 cores of an Intel Xeon with AMX"),
    "loops_h100": partial(loops, machine="an H100"),
    "loops_cpu": partial(loops, machine="two cores of an AMD EPYC with AVX-512"),
    "growth": growth,
    "compile_time": compile_time,
}


def report() -> str:
    parts = [HEAD]
    for name, section in SECTIONS.items():
        file, plot = RESULTS / f"{name}.json", RESULTS / f"{name}.png"
        if file.exists():
            parts.append(section(json.loads(file.read_text())))
            parts += [f"![over the number of tokens](../benchmarks/results/{plot.name})\n"] if plot.exists() else []
    return "\n".join(parts)


if __name__ == "__main__":
    print(report())
