"""The identity test that licenses a rewrite: the subgraph and the semantic op agree in float64 on pseudo-random values.

A rotation's elements are evaluated one by one at sampled positions, every element of the last dimension, and so are those of a
norm, on rows of several magnitudes; an expert block is run on a small instance of itself (small hidden sizes, an expert with no
token); a router on rows that its constants show at. Symbolic sizes get two bindings.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import sympy
import torch
from torch import Tensor, fx

from braze.kernels import reference
from braze.passes import element_ops, probes, small  # noqa: F401  (element_ops fills the table that Elements reads)
from braze.passes.element_layout import FLIPS
from braze.passes.elements import Elements, Expr, Position, Sizes, Unknown
from braze.passes.instances import instances, of_mlp
from braze.passes.numeric import value
from braze.passes.sites import MlpSite, MoeSite, NormSite, RopeSite, RouterSite

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
        ev = Elements(binding, stop=lambda n: n is site.x, also=FLIPS)
        shape = ev.shape(site.root)
        if shape != ev.shape(site.x):
            raise Refused(f"{site.x.name} has shape {ev.shape(site.x)} and its rotation {shape} for other sizes")
        for p in _sample(shape[:-1]):
            worst = max(worst, _compare_row(ev, site, p, shape))
            count += shape[-1]
    return f"{count} elements agree in float64 (worst {worst:.0e})"


def _compare_row(ev: Elements, site: RopeSite, p: Position, shape: tuple[int, ...]) -> float:
    memo: dict[Expr, float] = {}

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
        return _row(ev, node, lead, own[-1], memo)

    try:
        expected = _row(ev, site.root, p, shape[-1], memo)
        got = reference.rope(row(site.x), row(site.cos), row(site.sin), replace(site.spec, out_dtype=torch.float64))
    except Unknown as e:
        raise Refused(f"unknown {e}") from None
    return difference(got, expected, f"at position {p}")


def norm(site: NormSite, sizes: Sequence[Sizes]) -> str:
    """The proof's outcome in words; Refused where the site is not what it was taken for."""
    worst, count = 0.0, 0
    for binding in sizes:
        ev = Elements(binding, stop=lambda n: n is site.source or n is site.mean)
        rows = Elements(binding, stop=lambda n: n is site.normed)
        head = ev.shape(site.normed)[-1]
        for p in _sample(ev.shape(site.normed)[:-1]):
            worst = max(worst, norm_row(ev, site, p))
            count += head
        for p in _sample(ev.shape(site.root)[:-1]):
            moved = [rows.at(site.root, (*p, d)) for d in range(ev.shape(site.root)[-1])]
            row = moved[0].args[1][:-1] if moved[0].op == "load" else ()
            if moved != [rows.load(site.normed, (*row, d)) for d in range(head)]:
                raise Refused(f"the row of {site.root.name} at {p} is no row of {site.normed.name}")
    return f"norm: {count} elements agree in float64 (worst {worst:.0e})"


def norm_row(ev: Elements, site: NormSite, p: Position) -> float:
    """The largest relative difference in one row of a norm, whose source and mean are leaves of `ev`.

    Rows are of size 1, and so small that eps is as large as the mean of squares, and larger: its value and its place show.
    """
    head, rank = ev.shape(site.normed)[-1], len(ev.shape(site.source))
    if [int(d) % rank for d in site.mean.args[1]] != [rank - 1]:  # type: ignore[union-attr, arg-type]
        raise Refused(f"{site.mean.name} is no mean over the last dimension")
    own = [ev.load(site.source, (*p, d)) for d in range(head)]
    square = Elements(ev.sizes, stop=lambda n: n is site.source, indices=ev)
    if any(square.at(site.mean.args[0], (*p, d)) is not ev.make("mul", e, e) for d, e in enumerate(own)):
        raise Refused(f"{site.mean.name} is no mean of the squares of {site.source.name}")
    lead = () if site.weight is None else (0,) * (len(ev.shape(site.weight)) - 1)
    worst = 0.0
    for size in (1.0, math.sqrt(site.spec.eps), 0.01 * math.sqrt(site.spec.eps)) if site.spec.eps else (1.0, 1e-18):
        memo = {e: size * value(e, {}) for e in own}
        source = torch.tensor([memo[e] for e in own], dtype=torch.float64)
        memo |= {ev.load(site.mean, (*p, *end)): float(source.square().mean()) for end in ((), (0,))}
        try:
            weight = None if site.weight is None else _row(ev, site.weight, lead, head, memo)
            expected = _row(ev, site.normed, p, head, memo)
        except Unknown as e:
            raise Refused(f"unknown {e}") from None
        got = reference.rms_norm(source, weight, replace(site.spec, out_dtype=torch.float64))
        worst = max(worst, difference(got, expected, f"at position {p}"))
    return worst


def _row(ev: Elements, node: fx.Node, p: Position, size: int, memo: dict[Expr, float]) -> Tensor:
    """The elements node[p, :size]."""
    return torch.tensor([value(ev.at(node, (*p, d)), memo) for d in range(size)], dtype=torch.float64)


def moe(site: MoeSite, sizes: Sequence[Sizes]) -> str:
    """The proof's outcome in words; Refused where the site is not what it was taken for."""
    worst = 0.0
    cases: dict[str, None] = {}
    try:
        for binding in sizes:
            for inputs in instances(site, binding):
                case, differs = _moe_case(site, inputs, binding)
                cases[case] = None
                worst = max(worst, differs)
    except (small.CannotShrink, Unknown) as e:
        raise Refused(str(e)) from None
    return f"small instance agrees in float64 ({', '.join(cases)}, worst {worst:.0e})"


def _moe_case(site: MoeSite, inputs: dict[fx.Node, Tensor], sizes: Sizes) -> tuple[str, float]:
    expected, ids, weights = small.run_all((site.root, site.ids, site.weights), inputs, sizes)
    b1, b2 = (inputs[b] if b is not None else None for b in (site.b1, site.b2))
    spec = replace(site.spec, out_dtype=torch.float64)
    got = reference.moe(inputs[site.x], ids, weights, inputs[site.w1], inputs[site.w2], b1, b2, spec)
    tokens, slots = ids.shape
    return f"{tokens} x {slots} rows", difference(got, expected, f"for {tokens} x {slots} rows")


def mlp(site: MlpSite, sizes: Sequence[Sizes]) -> str:
    """The proof's outcome in words; Refused where the site is not what it was taken for."""
    worst = 0.0
    spec = replace(site.spec, out_dtype=torch.float64)
    try:
        for binding in sizes:
            inputs = of_mlp(site, binding)
            b1, b2 = [inputs[b] for b in site.b1], None if site.b2 is None else inputs[site.b2]
            got = reference.mlp(inputs[site.x], [inputs[w] for w in site.w1], inputs[site.w2], b1, b2, spec)
            worst = max(worst, difference(got, small.run(site.root, inputs, binding), f"for {len(got)} rows"))
    except (small.CannotShrink, Unknown) as e:
        raise Refused(str(e)) from None
    return f"small instance agrees in float64 ({len(got)} rows, worst {worst:.0e})"


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
