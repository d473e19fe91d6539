"""Experts whose rows are gathered and added up by products with masks: GShard's and Switch's dispatch, with a capacity or none.

    z[e, c] = sum_s D[s, e, c] x[s],   out[t] = sum_(e, c) C[t, e, c] F_e(z[e, c])

Where each place (e, c) has one token at most, and C is 0 for all others, out[t] = sum_e w[t, e] F_e(x[t]), w = sum_c C: an
expert that had no place for a token has the weight 0, and its row is left out by the id -1. The proof runs masks and all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from braze.kernels.spec import MoeSpec
from braze.passes import products, rows, separate
from braze.passes.between import between
from braze.passes.chosen import chosen_by, with_choice
from braze.passes.combine import Term, check_private, inner, output_of, present, split
from braze.passes.elements import Elements, Expr, Position, leaves, trail
from braze.passes.linear import polynomial
from braze.passes.products import NoExperts, Pair
from braze.passes.sites import MoeSite

aten = torch.ops.aten
_PRODUCTS = (aten.bmm.default, aten.mm.default)


@dataclass(frozen=True)
class Mixed:
    """The product that adds up the rows of a pair; left: whether its left operand holds the weights."""

    node: fx.Node
    left: bool


def site(pair: Pair, ev: Elements) -> MoeSite | None:
    """The site of a pair whose rows are gathered and added up by products; None where they are not; NoExperts where the
    products are no such masks."""
    gather = _gather(pair, ev)
    mixed = None if gather is None else _mixed(pair, ev)
    if gather is None or mixed is None:
        return None
    root = output_of(mixed.node, ev)
    shape = ev.shape(root)
    tokens, hidden = rows.count(shape[:-1]), shape[-1]
    places = ev.shape(_operand(mixed.node, mixed.left))[-1 if mixed.left else -2]
    if ev.shape(gather)[-2] != places and ev.shape(gather)[-1] != places:
        return None
    check_private(inner(gather, root), root)

    at, scale = _behind(root, mixed.node, ev)
    terms = {j: _row(pair, mixed, at, j, ev) for j in (0, 1, places - 1)}
    w2 = rows.second_side(pair, terms[places - 1], ev)
    experts = ev.shape(w2.weight)[0]
    number = {j: rows.expert_of(pair, t, ev) for j, t in terms.items()}
    if places % experts or number[0] != 0 or number[places - 1] != experts - 1:
        raise NoExperts(f"the places of the rows, {places}, are not in the order of {experts} experts")
    capacity = places // experts
    by_expert = number[1] == (1 if capacity == 1 else 0)  # [experts, capacity], or [capacity, experts]
    term = terms[places - 1]
    act = between(pair, term, ev.shape(w2.weight)[1 if w2.transposed else 2], lambda load: False, ev)
    x = _tokens(pair, gather, act.at, (tokens, hidden), ev)
    b2 = rows.second_bias([term], [experts - 1], experts, ev)

    def weight(e: int) -> tuple[fx.Node, Position]:
        j = e * capacity + capacity - 1 if by_expert else (capacity - 1) * experts + e
        return _operand(mixed.node, mixed.left), (*at[:-1], j) if mixed.left else (*at[:-2], j, at[-2])

    spec = MoeSpec(act.text, act.layout, act.side.transposed, "output", scale, root.meta["val"].dtype)
    root = separate.flat(root, ev)
    w1, b1, down = separate.named(act.sides, act.biases, w2, root)
    x = separate.rows_of(separate.cast(x, pair.first.meta["val"].dtype, root), hidden, ev, root)
    with root.graph.inserting_before(root):
        mask = _operand(mixed.node, mixed.left)
        if not mixed.left:
            mask = separate.turned(mask)
        known = isinstance(mask.meta["val"].shape[-1], int)
        sizes = (-1, capacity) if known else (separate.size_of(root, 0), -1)
        mask = separate.reshaped(mask, [sizes[0], *((experts, sizes[1]) if by_expert else (sizes[1], experts))])
    picked = chosen_by(weight, mask, 1 if by_expert else 2, experts, tokens, root, ev)
    found = MoeSite(
        root, x, picked.ids, picked.weights, w1, down, b1, b2, picked.weights, spec, "capacity",
        capacity=mask.meta["val"].shape[2 if by_expert else 1],
    )  # fmt: skip
    return with_choice(found, picked)


def _operand(node: fx.Node, left: bool) -> fx.Node:
    found = node.args[0 if left else 1]
    assert isinstance(found, fx.Node)
    return found


def _gather(pair: Pair, ev: Elements) -> fx.Node | None:
    """The product whose rows the first one takes; None where it takes others."""
    if products.is_grouped(pair.first):
        return None
    start = products.input_element(pair.first, (0,) * len(ev.shape(pair.first)), 0, pair.first_left)
    node, _ = list(trail(*start, ev))[-1]
    return node if node.target in _PRODUCTS else None


def _mixed(pair: Pair, ev: Elements) -> Mixed | None:
    """The product that adds up the second one's rows, the first after it."""
    node = pair.second
    while users := [n for n in node.users if n.op == "call_function"]:
        node = max(users)
        if node.target not in _PRODUCTS:
            continue
        for left in (True, False):
            operand = _operand(node, not left)
            at = (0,) * len(ev.shape(operand))
            near = Elements(ev.sizes, stop=lambda n: n is pair.second, indices=ev)
            if any(e.args[0] is pair.second for e in leaves([near.at(operand, at)])):
                return Mixed(node, left)
        return None
    return None


def _behind(root: fx.Node, node: fx.Node, ev: Elements) -> tuple[Position, float]:
    """(the element of a product that is the last one of its output, but for a constant; that constant)."""
    near = Elements(ev.sizes, stop=lambda n: n is node, indices=ev)
    terms = polynomial(near.at(root, tuple(s - 1 for s in ev.shape(root))))
    atoms, scale = next(iter(terms.items())) if len(terms) == 1 else ((), 0.0)
    if len(atoms) != 1 or atoms[0].op != "load" or atoms[0].args[0] is not node:
        raise NoExperts("more is done to the sum of the rows than scaling it")
    return atoms[0].args[1], scale


def _row(pair: Pair, mixed: Mixed, at: Position, j: int, ev: Elements) -> Term:
    """The second product's row in place j."""
    chain = inner(pair.second, mixed.node)
    near = Elements(ev.sizes, stop=lambda n: n is pair.second or n not in chain, indices=ev)
    place = (*at[:-2], j, at[-1]) if mixed.left else (*at[:-1], j)
    element: Expr = present(near.at(_operand(mixed.node, not mixed.left), place), ev)
    terms = split(element, pair, chain, at[-1] if mixed.left else at[-2], ev)
    if len(terms) != 1 or terms[0].atoms or terms[0].constant != 1.0:
        raise NoExperts("a place of the rows that are added up is not one row")
    return terms[0]


def _tokens(pair: Pair, gather: fx.Node, firsts: Sequence[Position], shape: tuple[int, int], ev: Elements) -> fx.Node:
    """x [.., hidden], the operand of a product that gathers the rows of the first products. firsts: an element of each."""
    starts = [products.input_element(f, i, 0, pair.first_left) for f, i in zip(pair.firsts, firsts, strict=True)]
    ends = {list(trail(*start, ev))[-1] for start in starts}
    node, at = ends.pop()
    if ends or node is not gather:
        raise NoExperts("gate and up are products of different rows")
    size = ev.shape(_operand(gather, True))[-1]
    for source in (
        (_operand(gather, False), (*at[:-2], size - 1, at[-1])),
        (_operand(gather, True), (*at[:-1], size - 1)),
    ):
        x = rows.matrix(source, 0, shape, ev)
        if x is not None:
            return x
    raise NoExperts(f"the rows that {gather.name} gathers are no [tokens, hidden] = {shape} tensor")
