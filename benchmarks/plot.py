"""benchmarks/results/*_h100.json as curves over the number of tokens, a .csv and a .png beside each file; growth.json too.

python benchmarks/plot.py
"""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Cells = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Curve:
    """One panel: `value` of braze's cells over their tokens, a line for each shape; 1 is the line to be above."""

    value: str
    label: str


PANELS: Mapping[str, tuple[Curve, ...]] = {
    "moe_h100": (Curve("ratio", "best peer / braze"), Curve("fraction_of_floor", "fraction of the floor")),
    "layers_h100": (Curve("speedup", "stock / braze"),),
    "rope_h100": (Curve("speedup", "stock / braze"), Curve("ratio", "copy / braze")),
}


TABLES = ("moe_beside_h100",)  # without a plot


def flat(cell: Mapping[str, Any]) -> dict[str, Any]:
    """A cell as one line of a table: what a shape consists of becomes columns."""
    shape = cell["shape"]
    if not isinstance(shape, Mapping):
        return dict(cell)
    named = {"shape": shape["variant"], "tokens": shape["T"]}
    return named | {k: v for k, v in cell.items() if k != "shape"}


def write(name: str, cells: Cells) -> None:
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(cells[0]))
        writer.writeheader()
        writer.writerows(cells)


def draw(name: str, cells: Cells) -> None:
    from matplotlib.figure import Figure

    curves = PANELS[name]
    figure = Figure(figsize=(5.2 * len(curves), 4), layout="constrained")
    ours = [c for c in cells if c["provider"] == "braze"]
    for axes, curve in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        for shape in dict.fromkeys(c["shape"] for c in ours):
            own = [c for c in ours if c["shape"] == shape]
            axes.plot([c["tokens"] for c in own], [c[curve.value] for c in own], "o-", label=shape, markersize=3)
        axes.axhline(1, color="gray", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="tokens", ylabel=curve.label)
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(RESULTS / f"{name}.png", dpi=90, metadata={"Software": None})


def draw_growth(cells: Cells) -> None:
    """Milliseconds of a layer on CPU over tokens and over experts, braze's and the best stock form's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, x in zip(figure.subplots(1, 2), ("tokens", "experts"), strict=True):
        own = [c for c in cells if c["shape"] == f"by {x}"]
        at = [c[x] for c in own]
        axes.plot(at, [c["median"] * c["ratio"] for c in own], "o-", label="best stock torch.compile", markersize=3)
        axes.plot(at, [c["median"] for c in own], "o-", label="braze", markersize=3)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set(xlabel=x, ylabel="ms a layer")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(RESULTS / "growth.png", dpi=90, metadata={"Software": None})


def main() -> None:
    for name in PANELS:
        file = RESULTS / f"{name}.json"
        if file.exists():
            cells = [flat(c) for c in json.loads(file.read_text())]
            write(name, cells)
            draw(name, cells)
    for name in TABLES:
        file = RESULTS / f"{name}.json"
        if file.exists():
            write(name, json.loads(file.read_text()))
    if (RESULTS / "growth.json").exists():
        draw_growth(json.loads((RESULTS / "growth.json").read_text()))


if __name__ == "__main__":
    main()
