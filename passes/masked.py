"""Sums of experts' outputs, each masked or weighted: an element's terms, and the node where the sum is whole.

A select between a sum and itself with one more term is a mask: where(c, a, b) = b + c (a - b). So is an expert's output picked
by its number from all of them: y[ids[t]] = sum_e [ids[t] = e] y_e.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from braze.passes.combine import written_out
from braze.passes.dense import chooses, is_mask
from braze.passes.elements import HANDLERS, Elements, Expr, Unknown, leaves, trail
from braze.passes.linear import TooLarge, polynomial
from braze.passes.products import NoExperts
from braze.passes.separate import is_plain

aten = torch.ops.aten

#: What says of a node that it adds to a sum of experts what that started from (braze.passes.residuals): the sum ends before.
TOTAL = "braze_total"


class NoLoop(NoExperts):
    """Why products that are masked and added up are no expert block."""


class ForeignTerm(NoLoop):
    """A sum of experts that has something else in it. masked: the products of its terms that are masked."""

    def __init__(self, masked: set[fx.Node]) -> None:
        super().__init__("a term without an expert's product")
        self.masked = masked


@dataclass(frozen=True)
class Term:
    """One expert in one slot of the element: its last product, its number, the ids and the weight that choose it.

    ids is None where weight is an element of dense scores [.., E]. x: where the weight is on the expert's input, the
    element of the tokens that it multiplies.
    """

    product: fx.Node
    scale: float
    expert: int
    ids: Expr | None
    weight: Expr
    x: Expr | None = None


#: The first element of the rows that an expert reads, for its last product.
Rows = Callable[[fx.Node], Expr]


@dataclass
class Sum:
    """What follows an expert's last product: the last node whose elements are sums of experts, if there is one; the products
    that meet there or on the way; why there is none."""

    root: fx.Node | None = None
    terms: list[Term] = field(default_factory=list)
    products: set[fx.Node] = field(default_factory=set)
    reason: str = ""


def is_choice(node: fx.Node) -> bool:
    """Whether a node may choose experts: a comparison of integers, a scatter, or a gather from tensors put together."""
    if node.target in (aten.gather.default, aten.index.Tensor):
        source: Any = node.args[0]
        while source.target in (aten.reshape.default, aten.permute.default):
            source = source.args[0]
        return source.target is aten.cat.default
    return is_mask(node) or node.target in (aten.scatter.src, aten.scatter.value)


def masks(graph: fx.Graph) -> list[set[fx.Node]]:
    """The comparisons that choose experts, but for those that compared ids are made of themselves, as of a one-hot mask; then
    those with a number alone, for weights may be made of other masks."""
    found = set(filter(is_mask, graph.nodes))
    before: set[fx.Node] = set()
    stack = [n for mask in found for n in mask.all_input_nodes]
    while stack:
        node = stack.pop()
        value = node.meta.get("val")
        if node not in before and isinstance(value, torch.Tensor) and not value.is_floating_point():
            before.add(node)
            stack.extend(node.all_input_nodes)
    found -= before
    return [found, {n for n in found if n.target is aten.eq.Scalar}]


def behind(seeds: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes computed from `seeds` element by element, or by a batched product, not through sorts and the like."""
    out = set(seeds)
    for node in min(out).graph.nodes if out else ():
        handled = node.target in HANDLERS or node.target is aten.bmm.default
        if handled and TOTAL not in node.meta and any(n in out for n in node.all_input_nodes):
            out.add(node)
    return out


def root_of(down: fx.Node, inside: Collection[fx.Node], reads: Callable[[fx.Node], fx.Node], ev: Elements) -> Sum:
    """The sum that an expert's last product ends in. reads: the row operand of an expert's first product, by its last."""
    element = Elements(
        ev.sizes,
        stop=lambda n: is_plain(n) or (n not in inside and _of_tensors(n)),
        indices=ev,
        also={aten.bmm.default: written_out},
    )

    def rows(product: fx.Node) -> Expr:
        operand = reads(product)
        return _linear(element.at(operand, (ev.shape(operand)[0] - 1, 0)), element, {})

    memo: dict[Expr, Any] = {}
    found = Sum(products={down})
    node, width = down, ev.shape(down)[-1]
    while True:
        shape = ev.shape(node)
        try:
            expr = _linear(element.at(node, tuple(s - 1 for s in shape)), element, {})
            met = {e.args[0] for e in leaves([expr]) if is_plain(e.args[0])}
            terms = _terms(expr, memo, rows, ev)
        except (NoLoop, Unknown, TooLarge, RecursionError) as e:
            found.products |= e.masked if isinstance(e, ForeignTerm) else set()
            found.reason = str(e)
            break
        found.products |= met
        if terms and len({t.product for t in terms}) > 1 and shape[-1] == width:  # not a sum over the columns, later on
            found.root, found.terms = node, terms
        users = [n for n in node.users if n in inside]
        if not users or len(users) != len(node.users):
            found.reason = found.reason or f"{node.name} is no such sum"
            break
        node = max(users)
    return found


def _of_tensors(node: fx.Node) -> bool:
    return any(isinstance(n.meta.get("val"), torch.Tensor) for n in node.all_input_nodes)


def _linear(expr: Expr, ev: Elements, memo: dict[Expr, Expr]) -> Expr:
    """The expression with where(c, a, b) as b + c (a - b), and comparisons as factors of 0 and 1."""
    if expr.op in ("const", "load", "eq", "gt"):
        return expr
    if expr not in memo:
        args = [_linear(a, ev, memo) for a in expr.args]
        if expr.op == "where" and args[0].op in ("eq", "gt"):
            c, a, b = args
            memo[expr] = ev.make("add", b, ev.make("mul", c, ev.make("sub", a, b)))
        else:
            memo[expr] = ev.make(expr.op, *args)
    return memo[expr]


def _terms(expr: Expr, memo: dict[Expr, Any], rows: Rows, ev: Elements) -> list[Term]:
    """The terms of a sum of experts; empty where one is not masked or scored (yet); NoLoop where a product is missing."""
    out = []
    complete = True
    each = [(atoms, scale, _products(atoms)) for atoms, scale in polynomial(expr, memo).items()]
    if any(len(products) != 1 for _, _, products in each):
        raise ForeignTerm({p.args[0] for atoms, _, products in each if any(map(chooses, atoms)) for p in products})
    for atoms, scale, products in each:
        factors = {a for a in atoms if a is not products[0]}
        product = products[0].args[0]
        term = _term(product, scale, factors, ev)
        found = [term] if term is not None else _fed(product, scale, factors, rows)
        complete = complete and bool(found)
        out += found
    return out if complete else []


def _products(atoms: Iterable[Expr]) -> list[Expr]:
    return [a for a in atoms if a.op == "load" and is_plain(a.args[0])]


def _term(product: fx.Node, scale: float, factors: set[Expr], ev: Elements) -> Term | None:
    """The term of a product that is weighted."""
    equal = [a for a in factors if chooses(a)]
    weights = [a for a in factors if a.op == "load"]
    if len(weights) != 1 or len(equal) + len(_implied(factors, equal)) + 1 != len(factors):
        return None
    if len(equal) == 1:
        return Term(product, scale, int(equal[0].args[1].const), equal[0].args[0], weights[0])
    for node, idx in trail(weights[0].args[0], weights[0].args[1], ev):
        if not equal and len(idx) > 1 and ev.shape(node)[-1] > 1 and isinstance(idx[-1], int):
            return Term(product, scale, idx[-1], None, ev.load(node, idx))
    return None


def _fed(product: fx.Node, scale: float, factors: set[Expr], rows: Rows) -> list[Term]:
    """The terms of a product whose rows are weighted: sum_j [ids_j = e] w_j x, of which one j at most counts. Outside, it
    may be masked as well."""
    chosen = {a for a in factors if chooses(a)}
    terms = []
    try:
        fed = polynomial(rows(product))
    except (NoExperts, Unknown, TooLarge):
        return []
    for atoms, constant in fed.items():
        equal = [a for a in atoms if chooses(a)]
        loads = sorted((a for a in atoms if a.op == "load"), key=lambda a: a.args[0].meta["val"].shape[-1])
        if len(equal) != 1 or len(loads) != 2 or len(atoms) != 3 or constant != 1.0:
            return []
        if not chosen or chosen == set(equal):
            terms.append(Term(product, scale, int(equal[0].args[1].const), equal[0].args[0], loads[0], loads[1]))
    masks = chosen or {a for t in terms for a in factors if a.op == "gt" and _counts(a, t)}
    return terms if masks.issuperset(factors) else []


def _counts(factor: Expr, term: Term) -> bool:
    return any(chooses(a) and a.args[0] is term.ids for a in _summands(factor.args[0])) and factor.args[1].const == 0


def _implied(factors: Iterable[Expr], equal: Iterable[Expr]) -> list[Expr]:
    """The factors that say that one of several comparisons holds, of which one is a factor itself."""
    return [a for a in factors if a.op == "gt" and a.args[1].const == 0 and set(equal) & _summands(a.args[0])]


def _summands(expr: Expr) -> set[Expr]:
    return _summands(expr.args[0]) | _summands(expr.args[1]) if expr.op == "add" else {expr}
