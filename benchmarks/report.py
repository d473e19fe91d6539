"""docs/performance.md out of benchmarks/results/*.json: each file that has a section here becomes one, others are left out.

python benchmarks/report.py > docs/performance.md
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
HEAD = """# Performance

Made by `make performance` from `benchmarks/results/`. Ratios are paired: both sides were called in turn in one run.
"""
Rows = Sequence[Mapping[str, Any]]


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


def cpu(cells: Rows) -> str:
    """Expert layers on CPU; cells whose calls were disturbed by other work are marked and not counted."""
    calm = [c for c in cells if c["calm"] >= 7]
    rows = [
        (
            f"{c['shape']} {c['dtype']}", c["tokens"], f"{c['median']:.2f}", f"{c['gflops']:.0f} ({c['of_gemm']:.2f})",
            f"{c['gbytes']:.1f} ({c['of_read']:.2f})", f"{c['ratio']:.2f}" + ("" if c in calm else " (disturbed)"), c["peer"],
        )
        for c in cells
    ]  # fmt: skip
    header = ("layer", "tokens", "braze ms", "GFLOP/s (of GEMM)", "GB/s (of read)", "stock / braze", "best stock")
    parts = (
        ("decode, 1 and 8 tokens", [c for c in calm if c["tokens"] <= 8]),
        ("prefill, 128 and 512 tokens", [c for c in calm if c["tokens"] > 8]),
    )
    return "\n".join(
        (
            "## Experts on CPU\n",
            "`benchmarks/cpu.py`: transformers' expert layers, braze beside the fastest of `grouped_mm`, `batched_mm` and the",
            "eager loop, each under stock `torch.compile`. In brackets: of the machine's own dense product and reading speed.",
            f"{len(cells) - len(calm)} of {len(cells)} cells had fewer than 7 calls undisturbed by other work in some form:",
            "these are marked, and not counted in:\n",
            *(summary(name, some) for name, some in parts if some),
            "",
            table(header, rows),
        )
    )


#: File of benchmarks/results, without .json -> its section.
SECTIONS: Mapping[str, Callable[[Any], str]] = {"cpu": cpu}


def report() -> str:
    files = {name: RESULTS / f"{name}.json" for name in SECTIONS}
    sections = [SECTIONS[name](json.loads(file.read_text())) for name, file in files.items() if file.exists()]
    return "\n".join((HEAD, *sections))


if __name__ == "__main__":
    print(report())
