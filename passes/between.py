"""What lies between two expert products: a[i] = act(g[i] + b1[i], u[i] + b1[..]), times the router's weight where it is there.

g and u are columns of the expert's first weight, halves or interleaved; w a W2 = w (a W2), so a weight on the activation
is one on the expert's output, and w (x W1) = (w x) W1, so one on the first product before its bias is one on the input.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from braze.kernels.expression import g as G
from braze.kernels.expression import u as U
from braze.kernels.spec import GateUpLayout
from braze.passes import activation, products
from braze.passes.combine import Term, inner, present
from braze.passes.elements import Elements, Expr, Position, leaves, subexpressions
from braze.passes.products import NoExperts, Pair, Side


@dataclass(frozen=True)
class Between:
    """The scalar function between the products. For the first product, or for gate's and up's where they are apart: at, the
    element that the symbol stands for; sides, the weights, and biases, none or all, one where both are of one tensor. weights:
    the loads by which the activation is multiplied, the router's; scaled_by: the one by which the first product is."""

    text: str
    layout: GateUpLayout
    biases: tuple[fx.Node, ...]
    at: tuple[Position, ...]
    sides: tuple[Side, ...]
    weights: tuple[Expr, ...]
    scaled_by: Expr | None

    @property
    def side(self) -> Side:
        return self.sides[0]


def between(pair: Pair, term: Term, size: int, is_weight: Callable[[Expr], bool], ev: Elements) -> Between:
    """What feeds the second product's row of `term`, whose inner size is `size`; NoExperts where it is no activation."""
    found = [_at(pair, term, i, is_weight, ev) for i in range(min(2, size))]
    columns = [f.columns for f in found]
    side = found[0].sides[0]
    width = ev.shape(side.weight)[2 if side.transposed else 1]
    layout = _layout(columns, size, width) if len(found[0].sides) == 1 else _apart(columns, size, width)
    texts = [f.text for f in found]
    if len(set(texts)) != 1:
        raise NoExperts(f"the activation differs between columns: {texts[0]} and {texts[-1]}")
    return Between(texts[0], layout, found[0].biases, found[0].at, found[0].sides, found[0].weights, found[0].scaled_by)


def linear_in(element: Expr, load: Expr) -> bool:
    """Whether a product's factor is the load itself and occurs nowhere else."""
    while element.op == "mul":
        if load in element.args:
            other = next(a for a in element.args if a is not load) if element.args[0] is not element.args[1] else load
            return load not in leaves([other])
        holding = [a for a in element.args if load in leaves([a])]
        if len(holding) != 1:
            return False
        element = holding[0]
    return False


def _layout(columns: list[tuple[int, ...]], size: int, width: int) -> GateUpLayout:
    choices: dict[GateUpLayout, list[tuple[int, ...]]] = {
        "halves": [(i, i + size) for i in range(len(columns))],
        "interleaved": [(2 * i, 2 * i + 1) for i in range(len(columns))],
        "none": [(i,) for i in range(len(columns))],
    }
    for layout, expected in choices.items():
        if columns == expected:
            if width != size * len(columns[0]):
                raise NoExperts(f"the first product has {width} columns for an inner size of {size}")
            return layout
    raise NoExperts(f"gate and up are columns {columns} of the first product: neither halves nor interleaved")


def _apart(columns: list[tuple[int, ...]], size: int, width: int) -> GateUpLayout:
    if columns != [(i, i) for i in range(len(columns))] or width != size:
        raise NoExperts(f"gate and up are columns {columns[-1]} of {width} each, for an inner size of {size}")
    return "halves"


@dataclass(frozen=True)
class _At:
    """The activation at one inner index."""

    columns: tuple[int, ...]
    at: tuple[Position, ...]
    text: str
    biases: tuple[fx.Node, ...]
    sides: tuple[Side, ...]
    weights: tuple[Expr, ...]
    scaled_by: Expr | None


def _at(pair: Pair, term: Term, i: int, is_weight: Callable[[Expr], bool], ev: Elements) -> _At:
    element, weights, scaled_by = _element(pair, term, i, is_weight, ev)
    loads = [e for e in leaves([element]) if e.args[0] in pair.firsts]
    by_column: dict[tuple[int, Any], Expr] = {}
    sides: dict[int, Side] = {}
    for e in loads:
        product = pair.firsts.index(e.args[0])
        side = products.weight_side(e.args[0], e.args[1], pair.first_left, ev)
        if not isinstance(products.column(e.args[0], e.args[1], pair.first_left), int):
            raise NoExperts("an element between the products is picked by an index that is not known")
        if side is None:
            raise NoExperts("the first product's weights are no [experts, ., .] tensor, indexed plainly")
        one = sides.setdefault(product, side)
        if (one.weight, one.expert, one.transposed) != (side.weight, side.expert, side.transposed):
            raise NoExperts("gate and up are columns of different weights")
        by_column[product, side.column] = e
    together = len(sides) == 2 and len({(s.weight, s.transposed) for s in sides.values()}) == 1  # parts of one tensor
    places = sorted(by_column, key=lambda p: p[::-1] if together else p)
    if not 1 <= len(places) <= 2 or len(loads) != len(places) or len(sides) != len(pair.firsts):
        raise NoExperts(f"an element between the products depends on {len(loads)} elements of the first")
    if len({(s.expert, s.transposed, ev.shape(s.weight)) for s in sides.values()}) != 1:
        raise NoExperts("gate and up are products with different experts' weights")
    symbols: dict[Expr, Any] = {}
    biases: dict[int, list[fx.Node]] = {product: [] for product in sides}
    for (product, column), symbol in zip(places, (G, U), strict=False):
        load = by_column[product, column]
        summed = _with_bias(element, load, column)
        symbols[summed or load] = symbol
        if summed is not None:
            biases[product] += [a.args[0] for a in summed.args if a is not load]
    try:
        text = activation.text(element, symbols)
    except activation.NotScalar as e:
        raise NoExperts(str(e)) from None
    added = [dict.fromkeys(biases[product]) for product in sorted(biases)]
    if len({len(a) for a in added}) > 1:
        raise NoExperts("only one of gate and up has a bias")
    if together:
        added = [{**added[0], **added[1]}]
    if max(map(len, added)) > 1:
        raise NoExperts("gate and up have biases of different tensors")
    at = tuple(by_column[next(p for p in places if p[0] == product)].args[1] for product in sorted(sides))
    return _At(
        tuple(c for _, c in places), at, text, tuple(b for a in added for b in a),
        tuple(sides[product] for product in sorted(sides))[: 1 if together else 2], weights, scaled_by,
    )  # fmt: skip


def _element(
    pair: Pair, term: Term, i: int, is_weight: Callable[[Expr], bool], ev: Elements
) -> tuple[Expr, tuple[Expr, ...], Expr | None]:
    """The activation at inner index i over the first product's elements, the weights that it is multiplied by, and the one that
    those elements are multiplied by."""
    ways = inner(pair.firsts, pair.second)
    near = Elements(ev.sizes, stop=lambda n: n in pair.firsts or n not in ways, indices=ev)
    start = products.input_element(pair.second, term.idx, term.start + i * term.step, pair.second_left)
    element = present(near.at(*start), ev)
    unscaled, scaled_by = _unscaled(element, pair.firsts, is_weight, ev)
    if scaled_by is not None:
        return _seen_through(unscaled, pair.firsts, ev), (), scaled_by
    outside = [f for f in _factors(element) if f.op == "load" and f.args[0] not in pair.firsts]
    weights = tuple(filter(is_weight, outside))
    return _seen_through(_without(element, set(weights), ev), pair.firsts, ev), weights, None


def _unscaled(
    expr: Expr, firsts: Collection[fx.Node], is_weight: Callable[[Expr], bool], ev: Elements
) -> tuple[Expr, Expr | None]:
    """An expression without the weight by which each of the first product's elements in it is multiplied, and that weight."""
    found: set[Expr | None] = set()
    memo: dict[Expr, Expr] = {}

    def go(e: Expr) -> Expr:
        if e.op == "load" and e.args[0] in firsts:
            found.add(None)
        if e.op in ("const", "load"):
            return e
        if e not in memo:
            loads = [a for a in e.args if a.op == "load"]
            values = [a for a in loads if a.args[0] in firsts]
            if (
                e.op == "mul"
                and len(loads) == 2
                and len(values) == 1
                and any(is_weight(a) for a in loads if a not in values)
            ):
                found.update(a for a in loads if a not in values)
                memo[e] = values[0]
            else:
                memo[e] = ev.make(e.op, *map(go, e.args))
        return memo[e]

    out = go(expr)
    return (expr, None) if None in found or len(found) != 1 else (out, found.pop())


def _factors(e: Expr) -> Iterator[Expr]:
    if e.op == "mul":
        for a in e.args:
            yield from _factors(a)
    else:
        yield e


def _without(e: Expr, factors: set[Expr], ev: Elements) -> Expr:
    """A product without some of its factors."""
    if e in factors:
        return ev.const(1)
    return ev.make("mul", *(_without(a, factors, ev) for a in e.args)) if e.op == "mul" and factors else e


def _seen_through(e: Expr, firsts: Collection[fx.Node], ev: Elements) -> Expr:
    """An expression with elements from outside evaluated as far as they go."""
    memo: dict[Expr, Expr] = {}

    def go(e: Expr) -> Expr:
        if e.op == "const" or (e.op == "load" and e.args[0] in firsts):
            return e
        if e not in memo:
            memo[e] = ev.at(*e.args) if e.op == "load" else ev.make(e.op, *map(go, e.args))
        return memo[e]

    return go(e)


def _with_bias(element: Expr, load: Expr, column: int) -> Expr | None:
    """The sum of a first product's element and its bias, where the element occurs only in that sum."""
    users = [e for e in subexpressions(element) if load in e.args]
    if len(users) == 1 and users[0].op == "add":
        (other,) = [a for a in users[0].args if a is not load] or [load]
        if other.op == "load" and len(other.args[1]) == 2 and other.args[1][1] == column:
            return users[0]
    return None
