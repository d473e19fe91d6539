"""The identity test that licenses a rewrite: the subgraph and the semantic op agree in float64 on pseudo-random values.

A rotation's elements are evaluated one by one at sampled positions, every element of the last dimension; an expert block is run
on a small instance of itself (small hidden sizes, an expert with no token); a router on rows that its constants show at.
Symbolic sizes get two bindings.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import sympy
import torch
from torch import Tensor, fx

from braze.kernels import reference
from braze.passes import element_ops, probes, separate, small  # noqa: F401  (element_ops fills the table that Elements reads)
from braze.passes.elements import Elements, Position, Sizes, Unknown
from braze.passes.numeric import value
from braze.passes.sites import MoeSite, RopeSite, RouterSite

#: Relative difference above which two float64 results are not the same computation.
TOLERANCE = 1e-9


class Refused(Exception):
    """Why a site's proof failed."""


def bindings(graph: fx.Graph) -> list[Sizes]:
    """The hints of the graph's symbolic sizes and, where it has any, one other binding of them all."""
    symbols: dict[sympy.Symbol, int] = {}
    for node in graph.find_nodes(op="placeholder"):
        val = node.meta.get("val")
        for size in val.shape if isinstance(val, Tensor) else (val,):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol and size.node.hint is not None:
                symbols[size.node.expr] = int(size.node.hint)
    return [Sizes(), Sizes({s: 2 * h for s, h in symbols.items()})] if symbols else [Sizes()]


def rope(site: RopeSite, sizes: Sequence[Sizes]) -> str:
    """The proof's outcome in words; Refused where the site is not what it was taken for."""
    worst, count = 0.0, 0
    for binding in sizes:
        ev = Elements(binding, stop=lambda n: n is site.x)
        shape = ev.shape(site.root)
        if shape != ev.shape(site.x):
            raise Refused(f"{site.x.name} has shape {ev.shape(site.x)} and its rotation {shape} for other sizes")
        for p in _sample(shape[:-1]):
            worst = max(worst, _compare_row(ev, site, p, shape))
            count += shape[-1]
    return f"{count} elements agree in float64 (worst {worst:.0e})"


def _compare_row(ev: Elements, site: RopeSite, p: Position, shape: tuple[int, ...]) -> float:
    memo: dict[object, float] = {}
    head = shape[-1]

    def row(node: fx.Node) -> Tensor:
        own = ev.shape(node)
        offset = len(shape) - len(own)
        try:
            lead = tuple(0 if s == 1 else p[offset + i] for i, s in enumerate(own[:-1]))
        except IndexError:
            raise Refused(f"table {node.name} of shape {own} does not broadcast to {shape}") from None
        for s, k in zip(own, lead, strict=False):
            if k >= s:
                raise Refused(f"table {node.name} of shape {own} does not broadcast to {shape}")
        return torch.tensor([value(ev.at(node, (*lead, d)), memo) for d in range(own[-1])], dtype=torch.float64)  # type: ignore[arg-type]

    try:
        expected = torch.tensor([value(ev.at(site.root, (*p, d)), memo) for d in range(head)], dtype=torch.float64)  # type: ignore[arg-type]
        got = reference.rope(row(site.x), row(site.cos), row(site.sin), replace(site.spec, out_dtype=torch.float64))
    except Unknown as e:
        raise Refused(f"unknown {e}") from None
    return difference(got, expected, f"at position {p}")


def moe(site: MoeSite, sizes: Sequence[Sizes]) -> str:
    """The proof's outcome in words; Refused where the site is not what it was taken for."""
    worst = 0.0
    cases = []
    for binding in sizes:
        inputs = _small_inputs(site, binding)
        try:
            expected = small.run(site.root, inputs, binding)
            weights = (
                small.run(site.weights, inputs, binding) if site.weights is not site.values else inputs[site.values]
            )
        except (small.CannotShrink, Unknown) as e:
            raise Refused(str(e)) from None
        b1, b2 = (inputs[b] if b is not None else None for b in (site.b1, site.b2))
        got = reference.moe(
            inputs[site.x], inputs[site.ids], weights, inputs[site.w1], inputs[site.w2], b1, b2,
            replace(site.spec, out_dtype=torch.float64),
        )  # fmt: skip
        tokens, slots = inputs[site.ids].shape
        cases.append(f"{tokens} x {slots} rows")
        worst = max(worst, difference(got, expected, f"for {cases[-1]}"))
    return f"small instance agrees in float64 ({', '.join(cases)}, worst {worst:.0e})"


def router(site: RouterSite, sizes: Sequence[Sizes]) -> str:
    """The proof's outcome in words; Refused where the site is not what it was taken for."""
    worst, rows = 0.0, 0
    for binding in sizes:
        try:
            runs = probes.probes(site, binding, seed=1)
        except (small.CannotShrink, Unknown) as e:
            raise Refused(str(e)) from None
        for run in runs:
            worst = max(worst, probes.difference(run, site.spec))
            rows += run.ids.numel() // run.ids.shape[-1]
            if worst > probes.TOLERANCE:
                what = "weights differ" if math.isfinite(worst) else "experts are chosen"
                raise Refused(f"other {what} for logits {tuple(run.logits.shape)} (relative difference {worst:.1e})")
    return f"{rows} rows agree in float64 (worst {worst:.0e})"


#: Hidden and intermediate sizes of the small instance; different, so that mixing them up shows.
SMALL_HIDDEN, SMALL_INNER = 6, 4


def _small_inputs(site: MoeSite, sizes: Sizes) -> dict[fx.Node, Tensor]:
    """Random inputs for a small instance; the values between the products reach past any clamp that models use."""
    rng = torch.Generator().manual_seed(0)
    tokens, slots = sizes.shape(site.ids)
    experts, *w1 = sizes.shape(site.w1)
    gates = 1 if site.spec.layout == "none" else 2
    hidden, inner = min(w1[1 - site.spec.transposed], SMALL_HIDDEN), min(w1[site.spec.transposed] // gates, SMALL_INNER)
    used = experts - 1 if experts > slots else experts

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64) * std

    up, down = (hidden, gates * inner), (inner, hidden)
    if not site.spec.transposed:
        up, down = up[::-1], down[::-1]
    ids = torch.rand((tokens, used), generator=rng).argsort(1)[:, :slots].to(site.ids.meta["val"].dtype)
    if site.masked and tokens > 1:
        ids[0, 0] = experts  # an expert that is elsewhere
    inputs = {
        site.ids: ids,
        site.x: normal(tokens, hidden, std=3.0),
        site.values: normal(tokens, slots),
        site.w1: normal(experts, *up, std=2.0),
        site.w2: normal(experts, *down),
    }
    for source, view in separate.viewed(site).items():
        shape = sizes.shape(source)
        inputs[source] = inputs[view].reshape(*shape[:-1], hidden if view is site.x else shape[-1])
    if site.b1 is not None:
        inputs[site.b1] = normal(experts, gates * inner)
    if site.b2 is not None:
        inputs[site.b2] = normal(experts, hidden)
    for node in (site.w1, site.w2, site.b1, site.b2):
        if node is not None:
            inputs.update(separate.parts_of(node, inputs[node]))
    return inputs


def difference(got: Tensor, expected: Tensor, where: str) -> float:
    """The largest difference relative to the largest value; Refused where it is more than rounding, or not a number."""
    if got.shape != expected.shape:
        raise Refused(f"shapes {tuple(got.shape)} and {tuple(expected.shape)} differ {where}")
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    worst = float((got - expected).abs().max()) / (scale or 1.0) if expected.numel() else 0.0
    if not math.isfinite(scale) or not math.isfinite(worst) or worst > TOLERANCE:
        raise Refused(f"the subgraph and the op differ {where} (relative difference {worst:.1e})")
    if expected.numel() and scale == 0.0:
        raise Refused(f"the subgraph is zero {where}, which proves nothing")
    return worst


def _sample(shape: tuple[int, ...], count: int = 3) -> list[Position]:
    """The first, the last and some inner positions of `shape`, always the same ones."""
    rng = random.Random(0)
    corners = [tuple(0 for _ in shape), tuple(s - 1 for s in shape)]
    inner = [tuple(rng.randrange(s) for s in shape) for _ in range(count)]
    return list(dict.fromkeys(corners + inner))
