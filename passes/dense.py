"""Dense expert weights of which few are not zero: scores[t, e] = 0 unless e is one of ids[t, :].

They come from a top-k that was scattered, f(scatter(fill, ids, values)) with f(fill) = 0, or added up into zeros, or from
comparisons with the experts' numbers, sum_j [ids[t, j] = e] w[t, j]. Then only the chosen experts count: the same block with
ids and weights [T, k].
"""

from collections.abc import Sequence

import torch
from torch import fx

from braze.passes import rows, separate
from braze.passes.combine import written_out
from braze.passes.elements import Elements, Expr, leaves, trail
from braze.passes.linear import polynomial
from braze.passes.numeric import value
from braze.passes.products import NoExperts

aten = torch.ops.aten
_CAST = torch.ops.prims.convert_element_type.default


def sparse_scores(scores: fx.Node, before: fx.Node, ev: Elements) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(ids, values, weights) [T, k] of dense `scores` [T, E], new nodes before `before`: weights are computed from values.
    None where the scores are not made in one of these ways."""
    return _scattered(scores, before, ev) or _compared(scores, before, ev)


def turned_scores(
    source: rows.Source, expert: int, shape: tuple[int, int], before: fx.Node, ev: Elements
) -> fx.Node | None:
    """The matrix `shape` of scores where an element is one of their transpose [experts, tokens]: what was computed from the
    transpose one by one is computed from the scores themselves."""
    at = (expert, shape[0] - 1)
    node = next((n for n, idx in trail(*source, ev) if ev.shape(n) == shape[::-1] and idx == at), None)
    steps: list[fx.Node] = []
    while node is not None:
        found = rows.matrix((node, at), expert, shape, ev)
        if found is not None:
            for step in reversed(steps):
                found = _again(step, found, before)
            return found
        steps.append(node)
        node = _one_by_one(node, at, ev)
    return None


def _one_by_one(node: fx.Node, at: tuple[int, ...], ev: Elements) -> fx.Node | None:
    """The tensor of which a node's elements are a function, each of the one at its place."""
    if node.op != "call_function" or len(node.all_input_nodes) != 1:
        return None
    (source,) = node.all_input_nodes
    near = Elements(ev.sizes, stop=lambda n: n is source, indices=ev)
    return source if leaves([near.at(node, at)]) == [near.load(source, at)] else None


# ---------------------------------------------------------------------------------------------------- scattered


def _scattered(scores: fx.Node, before: fx.Node, ev: Elements) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    chain: list[fx.Node] = []
    at = tuple(s - 1 for s in ev.shape(scores))
    node = scores
    while node.target not in (aten.scatter.src, aten.scatter_add.default):
        path = list(trail(node, tuple(s - 1 for s in ev.shape(node)), ev))
        ends = [n for n, idx in path[1:] if _like(n, idx, at, ev)]
        if path[-1][0] is not node and not ends:
            return None
        if ends:
            if node.target is _CAST:
                chain.append(node)
            node = ends[0]
            continue
        sources = node.all_input_nodes
        if len(sources) != 1 or node.op != "call_function" or ev.shape(sources[0]) != ev.shape(node):
            return None
        chain.append(node)
        node = sources[0]
    base, dim, ids, values = node.args[:4]
    if dim not in (-1, len(ev.shape(node)) - 1) or not isinstance(ids, fx.Node) or not isinstance(values, fx.Node):
        return None
    if not _is_zero_at_fill(scores, node, base, ev):
        return None
    if node.target is aten.scatter_add.default and (
        any(n.target is not _CAST for n in chain) or not _is_zero(base, ev)
    ):
        return None  # the sum's function, where an expert is chosen twice, is not the sum of each one's
    slots = ev.shape(ids)[-1]
    values = weights = separate.rows_of(values, slots, ev, before)
    for step in reversed(chain):
        weights = _again(step, weights, before)
    return separate.rows_of(ids, slots, ev, before), values, weights


def _like(node: fx.Node, idx: Sequence[object], at: Sequence[int], ev: Elements) -> bool:
    """Whether a tensor has the rows of scores whose last position is `at`, and idx is their last element."""
    shape = ev.shape(node)
    return (
        shape[-1] == at[-1] + 1
        and rows.count(shape) == rows.count(tuple(a + 1 for a in at))
        and idx == tuple(s - 1 for s in shape)
    )


def _is_zero_at_fill(scores: fx.Node, scatter: fx.Node, base: object, ev: Elements) -> bool:
    if not isinstance(base, fx.Node):
        return False
    fill = ev.at(base, (0,) * len(ev.shape(base)))
    score = Elements(ev.sizes, stop=lambda n: n is scatter).at(scores, (0,) * len(ev.shape(scores)))
    if fill.const is None:
        return False
    return value(score, dict.fromkeys(leaves([score]), float(fill.const))) == 0.0


def _is_zero(base: object, ev: Elements) -> bool:
    return isinstance(base, fx.Node) and ev.at(base, (0,) * len(ev.shape(base))).const == 0


def _again(step: fx.Node, source: fx.Node, before: fx.Node) -> fx.Node:
    """The pointwise `step` on another tensor."""
    old = step.all_input_nodes[0]
    with before.graph.inserting_before(before):
        node = before.graph.call_function(
            step.target,  # type: ignore[arg-type]
            fx.node.map_arg(step.args, lambda n: source if n is old else n),
            dict(step.kwargs),
        )
    args = fx.node.map_arg(node.args, lambda n: n.meta["val"])
    node.meta["val"] = step.target(*args, **step.kwargs)  # type: ignore[operator]
    return node


# ----------------------------------------------------------------------------------------------------- compared


def _compared(scores: fx.Node, before: fx.Node, ev: Elements) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    tokens, experts = ev.shape(scores)
    pairs = []
    for atoms, scale in polynomial(over_masks(scores, ev).at(scores, (tokens - 1, experts - 1))).items():
        equal = [a for a in atoms if chooses(a)]
        weights = [a for a in atoms if a.op == "load"]
        if (len(equal), len(weights), len(atoms), scale) != (1, 1, 2, 1.0) or equal[0].args[1].const != experts - 1:
            return None
        pairs.append((equal[0].args[0], weights[0]))
    if not pairs:
        return None
    ids, found = slots_of(pairs, tokens, len(pairs), before, ev)
    return ids, found, found


def over_masks(node: fx.Node, ev: Elements) -> Elements:
    """Evaluates what depends on comparisons of integers, or on what integers scatter; all else behind a node is a leaf."""
    behind: set[fx.Node] = set()
    stack = [node]
    while stack:
        n = stack.pop()
        if n not in behind:
            behind.add(n)
            stack.extend(n.all_input_nodes)
    masks: set[fx.Node] = set()
    constants: set[fx.Node] = set()
    for n in sorted(behind):
        if is_mask(n) or n.target is aten.scatter.value or any(i in masks for i in n.all_input_nodes):
            masks.add(n)
        elif n.op == "call_function" and constants.issuperset(n.all_input_nodes):
            constants.add(n)
    return Elements(
        ev.sizes,
        stop=lambda n: n not in masks and n not in constants,
        indices=ev,
        also={aten.bmm.default: written_out},
    )


def is_mask(node: fx.Node) -> bool:
    """Whether the node compares integers with integers for equality."""
    if node.target not in (aten.eq.Scalar, aten.eq.Tensor):
        return False
    return not node.args[0].meta["val"].is_floating_point()  # type: ignore[union-attr]


def chooses(factor: Expr) -> bool:
    """Whether a factor compares an id with an expert's number."""
    return factor.op == "eq" and factor.args[0].op == "load" and isinstance(factor.args[1].const, int)


def slots_of(
    pairs: Sequence[tuple[Expr, Expr]], tokens: int, slots: int, before: fx.Node, ev: Elements
) -> tuple[fx.Node, fx.Node]:
    """(ids, weights), each [tokens, slots], of which `pairs` are elements of the last row; NoExperts where one's id and
    weight are in different slots."""
    ids, weights = (_holder(e, (tokens, slots), ev) for e in pairs[0])
    if ids is None or weights is None:
        raise NoExperts(f"{pairs[0][0 if ids is None else 1]} is no element of a [tokens, slots] tensor")
    for pick, weight in pairs:
        at = _position(pick, ids, ev), _position(weight, weights, ev)
        if at[0] is None or at[0] != at[1]:
            raise NoExperts(f"the expert chosen by {pick} is weighted by {weight}")
    return separate.rows_of(ids, slots, ev, before), separate.rows_of(weights, slots, ev, before)


def _holder(element: Expr, shape: tuple[int, int], ev: Elements) -> fx.Node | None:
    """The node nearest to an element that is a tensor [.., slots] and has it in its last row."""
    return next((n for n, _ in rows.matrices(element.args, shape, ev)), None)


def _position(element: Expr, holder: fx.Node, ev: Elements) -> object:
    """The slot at which `holder` has an element; None if it has not."""
    return next((idx[-1] for n, idx in trail(element.args[0], element.args[1], ev) if n is holder), None)
