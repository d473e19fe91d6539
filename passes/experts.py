"""Finds expert blocks by following rows: from a pair of expert products to where each token's rows are added up.

    out[t] = scale * sum_j wo_j (act(wi_j x[t] W1[e_j] + b1[e_j]) W2[e_j] + b2[e_j]),   e_j = ids[t, j]

Anchored at two products with a scalar function between, an output element is a sum of elements of the second product times
weights; each names its row, the row its expert and its token. Sorted and grouped, gathered and batched, or dense over all
experts, the dispatch is only a way to say the same rows. The proof (braze.passes.proof) then decides.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from braze.kernels.spec import MoeSpec, WeightOn
from braze.passes import capacity, normed, products, rows, separate, unread, unrolled
from braze.passes.between import Between, between, linear_in
from braze.passes.chosen import sparse
from braze.passes.combine import Term, check_private, inner, one_atom, output_of, root_of, scale_of, terms_of
from braze.passes.dense import turned_scores
from braze.passes.elements import Elements, Expr, Sizes, Unknown, leaves, trail
from braze.passes.linear import TooLarge
from braze.passes.products import NoExperts, Pair
from braze.passes.sites import MoeSite, NearMiss, source_line

aten = torch.ops.aten


def find(graph: fx.Graph, sizes: Sizes) -> tuple[list[MoeSite], list[NearMiss]]:
    """Every expert block of the graph, and every pair of expert products that is none, with the reason."""
    sites: list[MoeSite] = []
    misses: list[NearMiss] = []
    firsts: set[str] = set()
    seconds: set[fx.Node] = set()
    ev = Elements(sizes)
    for node in list(graph.nodes):
        if not products.is_product(node):
            continue
        try:
            pair = _pair(node, ev)
        except Unknown:  # a size that only a run tells
            continue
        if pair is None or pair.first in seconds:  # a block after a block, joined by the residual stream
            continue
        try:
            sites.append(capacity.site(pair, ev) or normed.site(pair, ev) or _site(pair, ev))
        except (NoExperts, separate.NotStored, Unknown, TooLarge) as e:
            if _looks_like_experts(pair, ev):
                misses.append(NearMiss("moe", node.name, "find", str(e), source_line([node])))
        else:
            firsts.update(f.name for f in pair.firsts)
            seconds.add(pair.second)
    misses = [
        m for m in misses if m.root not in firsts
    ]  # a block's first product, taken for the second of what is before it
    misses += unread.find(graph, firsts | {n.name for n in seconds} | {m.root for m in misses}, ev)
    loops, loop_misses = unrolled.find(graph, sizes)
    return sites + loops, misses + loop_misses


def _pair(second: fx.Node, ev: Elements) -> Pair | None:
    for left in (True,) if products.is_grouped(second) else (True, False):
        found = _fed_by(second, left, ev)
        if found is not None and products.is_grouped(found.first) == products.is_grouped(second):
            return found
    return None


def _fed_by(second: fx.Node, left: bool, ev: Elements) -> Pair | None:
    """The pair of `second` and the product, or the two, that a function of which is its rows. Their elements move with the
    second's inner index, along the weights' columns."""
    start = (0,) * len(ev.shape(second))
    columns = range(min(2, products.inner_size(second, ev, left)))
    try:
        elements = [ev.at(*products.input_element(second, start, i, left)) for i in columns]
    except (Unknown, RecursionError):
        return None
    if elements[0].op == "load":  # a product alone gathers rows, or adds them up
        return None
    loads = [[e for e in leaves([element]) if products.is_product(e.args[0])] for element in elements]
    firsts = {e.args[0] for e in loads[0] if len(loads) == 1 or e not in loads[1]}
    if not 1 <= len(firsts) <= 2 or len({ev.shape(f) for f in firsts}) != 1 or len({f.target for f in firsts}) != 1:
        return None
    first, up = min(firsts), max(firsts) if len(firsts) == 2 else None
    if up is not None and linear_in(elements[0], next(e for e in loads[0] if e.args[0] is first)):
        first, up = up, first  # the gate is what passes through the function
    if products.is_grouped(first):
        return Pair(first, second, True, left, up)
    if any(_is_later(e, first) for e in leaves(elements)):
        return None  # attention: a softmax between two products
    sides = set()
    for f in firsts:
        moved = [next(e.args[1] for e in at if e.args[0] is f) for at in loads]
        sides.add(moved[0][-1] != moved[-1][-1] or (len(moved) == 1 and _rows_left(f, ev)))
    return Pair(first, second, sides.pop(), left, up) if len(sides) == 1 else None


def _is_later(load: Expr, first: fx.Node) -> bool:
    """Whether an element is of a node computed after `first` from it."""
    node = load.args[0]
    return node > first and first in unread.ancestors(node, first)


def _looks_like_experts(pair: Pair, ev: Elements) -> bool:
    """Whether a pair of products is worth a word: any two batched products with a scalar function between are a pair."""
    if products.is_grouped(pair.second):
        return True
    side = products.weight_side(pair.second, (0,) * len(ev.shape(pair.second)), pair.second_left, ev, cast=True)
    return side is not None and separate.is_given(side.weight)


def _rows_left(product: fx.Node, ev: Elements) -> bool:
    """Which operand of a batched product holds the rows: the other one's is picked by expert ids, or is a parameter."""
    start = (0,) * len(ev.shape(product))
    sides = {left: products.weight_side(product, start, left, ev) for left in (True, False)}
    for left, side in sides.items():
        if side is not None and isinstance(side.expert, Expr):
            return left
    right = sides[False]
    return right is None or not separate.is_given(right.weight)


def _site(pair: Pair, ev: Elements) -> MoeSite:
    parts = _experts_at_once(pair, ev)
    root = output_of(pair.second, ev) if len(parts) > 1 else root_of(pair, pair.second_left, ev)
    check_private(inner(pair.firsts, root), root)
    shape = ev.shape(root)
    hidden, tokens = shape[-1], rows.count(shape[:-1])
    if len(shape) < 2 or hidden != _hidden(pair, ev):
        raise NoExperts(f"the combined output has shape {shape}, not [tokens, hidden]")
    terms = terms_of(pair, root, tuple(s - 1 for s in shape), ev)
    if len(parts) > 1:
        terms = _apart(terms, parts)
    experts = [rows.expert_of(pair, term, ev) for term in terms]
    w2 = rows.second_side(pair, terms[0], ev)
    slots, dispatch = _dispatch(pair, experts, ev.shape(w2.weight)[0])
    ids, slot = (None, experts[0]) if dispatch == "dense" else rows.ids_of(pair, terms[0], (tokens, slots), root, ev)

    def is_weight(load: Expr) -> bool:
        return rows.matrix(load.args, slot, (tokens, slots), ev) is not None

    act = between(pair, terms[0], _inner_size(w2, ev), is_weight, ev)
    x, input_weight = rows.input_of(pair, act.at, (tokens, hidden), ev)
    on_output = [one_atom(t) for t in terms]
    if slots == 1 and input_weight is None and act.scaled_by is None and not act.weights and on_output == [None]:
        with contextlib.suppress(NoExperts):
            x, input_weight = rows.input_of(pair, act.at, (tokens, hidden), ev, weighted=True)
    source, weight_on = _weight(act, input_weight, on_output, bool(terms[0].biases), dispatch)
    weights = rows.matrix(source, slot, (tokens, slots), ev)
    weights = weights or turned_scores(source, slot, (tokens, slots), root, ev)
    if weights is None:
        raise NoExperts(f"the rows' weight {source[0].name} is no [tokens, slots] tensor")
    b2 = rows.second_bias(terms, experts, ev.shape(w2.weight)[0], ev)
    scale = scale_of(terms)
    masked = any(n.target is aten.where.self for n in inner(pair.second, root))
    spec = MoeSpec(act.text, act.layout, act.side.transposed, weight_on, scale, root.meta["val"].dtype)
    root = separate.flat(root, ev)
    w1, b1, down = separate.named(act.sides, act.biases, w2, root)
    x = separate.rows_of(separate.cast(x, pair.first.meta["val"].dtype, root), hidden, ev, root)
    values = weights = separate.rows_of(weights, slots, ev, root)
    site = MoeSite(root, x, ids or weights, weights, w1, down, b1, b2, values, spec, dispatch, masked)
    return sparse(site, ev) if ids is None else site


def _hidden(pair: Pair, ev: Elements) -> int:
    shape = ev.shape(pair.second)
    return shape[-1] if pair.second_left else shape[-2]


def _experts_at_once(pair: Pair, ev: Elements) -> list[tuple[int, int]]:
    """(start, step) of the inner indices of each expert that one row of the second product sums over, one after the other or
    in turns."""
    if products.is_grouped(pair.second):
        return [(0, 1)]
    at = tuple(s - 1 for s in ev.shape(pair.second))
    total = products.inner_size(pair.second, ev, pair.second_left)
    weight = [
        n for n, idx in trail(*products.weight_element(pair.second, at, 0, pair.second_left), ev) if len(idx) == 3
    ]
    for size in {s for s in ev.shape(weight[-1])[1:] if total % s == 0} if weight else ():
        number = total // size
        for step in {1, number}:
            side = products.weight_side(pair.second, at, pair.second_left, ev, 0, step)
            if side is not None and side.weight is weight[-1] and _inner_size(side, ev) == size:
                return [(e * size if step == 1 else e, step) for e in range(number)]
    return [(0, 1)]


def _inner_size(side: products.Side, ev: Elements) -> int:
    return ev.shape(side.weight)[1 if side.transposed else 2]


def _apart(terms: list[Term], parts: Sequence[tuple[int, int]]) -> list[Term]:
    """The one row of a product over several experts as their rows."""
    if len(terms) != 1 or terms[0].atoms or terms[0].biases:
        raise NoExperts("what sums over the experts is weighted once more")
    return [replace(terms[0], start=start, step=step) for start, step in parts]


def _dispatch(pair: Pair, experts: Sequence[Any], number: int) -> tuple[int, str]:
    """(rows a token, the form's name)."""
    if not all(isinstance(e, int) for e in experts):
        return len(experts), "grouped" if products.is_grouped(pair.second) else "batched"
    if list(experts) != list(range(number)):
        raise NoExperts(f"an output adds up experts {list(experts)[:4]}..., not each one once")
    return number, "dense"


def _weight(
    act: Between, on_input: rows.Source | None, on_output: Sequence[Expr | None], biased: bool, dispatch: str
) -> tuple[rows.Source, WeightOn]:
    """(the element of the rows' weight, whether it is on the experts' input or output)."""
    out = on_output[0]
    if act.scaled_by is not None:
        if on_input is not None or act.weights or any(a is not None for a in on_output):
            raise NoExperts("rows are weighted both on the first product and elsewhere")
        return act.scaled_by.args, "input"
    if act.weights:
        if biased:
            raise NoExperts("rows are weighted between the products, and the bias after them is not")
        if len(act.weights) > 1 or out is not None:
            raise NoExperts("rows are weighted both between the products and after them")
        out = act.weights[0]
    if on_input is None:
        if out is None:
            raise NoExperts("rows are not weighted by the router")
        return out.args, "output"
    if out is None and all(a is None for a in on_output):
        return on_input, "input"
    if out is None or dispatch != "dense":
        raise NoExperts("rows are weighted both before and after the experts")
    return out.args, "output"  # a mask before: the proof tells whether it is 1 where the weight is not 0
