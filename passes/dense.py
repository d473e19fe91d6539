"""Dense expert weights that come from a top-k: scores[t, e] = f(s[t, e]), s = scatter(fill, ids, values), f(fill) = 0.

Then only the chosen experts count, with the weights f(values): the same block, with its ids and weights [tokens, k].
"""

import torch
from torch import fx

from braze.passes.elements import Elements, leaves, trail
from braze.passes.numeric import value

aten = torch.ops.aten


def sparse_scores(scores: fx.Node, before: fx.Node, ev: Elements) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(ids, values, weights) [T, k] of dense `scores` [T, E], weights as new nodes before `before`; None if there are none."""
    chain: list[fx.Node] = []
    at = tuple(s - 1 for s in ev.shape(scores))
    node = scores
    while node.target is not aten.scatter.src:
        path = list(trail(node, at, ev))
        ends = [n for n, idx in path[1:] if idx == at and ev.shape(n) == ev.shape(scores)]
        if path[-1][0] is not node and not ends:
            return None
        if ends:
            if node.target is torch.ops.prims.convert_element_type.default:
                chain.append(node)
            node = ends[0]
            continue
        sources = node.all_input_nodes
        if len(sources) != 1 or not ev.at(node, at).args or node.op != "call_function":
            return None
        if ev.shape(sources[0]) != ev.shape(node):
            return None
        chain.append(node)
        node = sources[0]
    base, dim, ids, values = node.args[:4]
    if dim not in (1, -1) or not isinstance(ids, fx.Node) or not isinstance(values, fx.Node):
        return None
    if not _is_zero_at_fill(scores, node, base, ev):
        return None
    weights = values
    for step in reversed(chain):
        weights = _again(step, weights, before)
    return ids, values, weights


def _is_zero_at_fill(scores: fx.Node, scatter: fx.Node, base: object, ev: Elements) -> bool:
    at = (0,) * len(ev.shape(scores))
    if not isinstance(base, fx.Node):
        return False
    fill = ev.at(base, at)
    score = Elements(ev.sizes, stop=lambda n: n is scatter).at(scores, at)
    if fill.const is None:
        return False
    return value(score, dict.fromkeys(leaves([score]), float(fill.const))) == 0.0


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
