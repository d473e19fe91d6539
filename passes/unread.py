"""Pairs of expert products of which nothing else is told: what lies between is no function of one row's elements that is known.

Grouped products are a pair where they have the same rows; batched ones where integers pick the weights of both (a token's
experts), or where both are given as [experts, ., .] and an op that has no word lies between. Attention's products are none:
a softmax does.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from braze.passes import products, separate
from braze.passes.elements import HANDLERS, Elements, Expr, Unknown
from braze.passes.sites import NearMiss, source_line

aten = torch.ops.aten


def find(graph: fx.Graph, told: Collection[str], ev: Elements) -> list[NearMiss]:
    """A near miss for each second product of such a pair whose name is not in `told`."""
    misses = []
    earlier: list[tuple[fx.Node, object]] = []
    for node in graph.nodes:
        kind = None if node.name in told or not products.is_product(node) else _kind(node, ev)
        if kind is None:
            continue
        for first, other in reversed(earlier):
            if other == kind and first in (behind := ancestors(node, first)):
                path = list(_between(first, behind))
                unread = [str(n.target) for n in path if n.op == "call_function" and n.target not in HANDLERS]
                if (unread or not isinstance(kind, _Batched) or kind.picked) and not _softmax(path):
                    misses.append(NearMiss("moe", node.name, "find", _reason(first, unread), source_line([node])))
                    break
        earlier.append((node, kind))
    return misses


@dataclass(frozen=True)
class _Batched:
    """What two batched products of one block have in common: the number of experts, and whether integers pick them."""

    experts: int
    picked: bool


def _kind(product: fx.Node, ev: Elements) -> object:
    """What the other product of a block has too; None where this one is of no experts."""
    if products.is_grouped(product):
        return product.all_input_nodes[-1]  # where each expert's rows end
    try:
        start = (0,) * len(ev.shape(product))
        for left in (True, False):
            side = products.weight_side(product, start, left, ev)
            if side is None or (experts := ev.shape(side.weight)[0]) < 2:
                continue
            picked = isinstance(side.expert, Expr)
            if picked or separate.is_given(side.weight):
                return _Batched(experts, picked)
    except (Unknown, RecursionError):  # a size that only a run tells
        pass
    return None


def ancestors(node: fx.Node, first: fx.Node) -> set[fx.Node]:
    """What a node is computed from, no further back than `first`."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        for n in stack.pop().all_input_nodes:
            if n >= first and n not in found:
                found.add(n)
                stack.append(n)
    return found


def _between(first: fx.Node, behind: Collection[fx.Node]) -> Iterator[fx.Node]:
    """Those of `behind` that are computed from `first`, in order."""
    after = {first}
    for node in sorted(behind):
        if not after.isdisjoint(node.all_input_nodes):
            after.add(node)
            yield node


def _softmax(path: Sequence[fx.Node]) -> bool:
    """Whether a softmax lies on the way: exponentials of what is left of the largest."""
    names = {getattr(n.target, "_opname", "") for n in path}
    return {"exp", "amax"} <= names or "prepare_softmax_online" in names


def _reason(first: fx.Node, unread: Sequence[str]) -> str:
    named = f" ({unread[0]} is not)" if unread else ""
    return f"no function of one row's elements, as far as it is understood{named}, leads from {first.name} to it"
