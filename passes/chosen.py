"""Weights of all experts, of which only a token's chosen ones are not zero, whatever they are computed from.

    sum_e w[t, e] F_e = sum_j w[t, ids[t, j]] F_ids[t, j]      where w[t, e] = 0 unless e is one of ids[t, :], all different

The ids are the integers that the experts' numbers are compared with; the weights are gathered from w itself.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from braze.passes import rows, separate
from braze.passes.dense import chooses, over_masks, sparse_scores
from braze.passes.elements import Elements, Expr, Position, subexpressions, trail
from braze.passes.products import NoExperts
from braze.passes.separate import called
from braze.passes.sites import MoeSite

aten = torch.ops.aten
_LAYOUT = (
    aten.reshape.default, aten.view.default, aten.permute.default, aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dim,
    aten.expand.default, aten.clone.default, torch.ops.prims.convert_element_type.default,
)  # fmt: skip


@dataclass(frozen=True)
class Chosen:
    """ids and weights [tokens, slots], new nodes; sources: the integers [.., slots], or [..] each, that ids are of."""

    ids: fx.Node
    weights: fx.Node
    sources: tuple[fx.Node, ...]


def chosen_by(
    weight: Callable[[int], rows.Source],
    mask: fx.Node,
    dim: int,
    experts: int,
    tokens: int,
    before: fx.Node,
    ev: Elements,
) -> Chosen:
    """The choice behind a mask [tokens, ., .], whose dimension `dim` is of experts and whose other one is summed up. weight: an
    element of one expert's part for the last token. NoExperts where the mask does not tell experts by their numbers."""
    picks = _picks(weight, experts, tokens, ev)
    sources = _sources(picks, tokens, ev)
    if not sources:
        raise NoExperts(
            "the weights of all experts are no top-k: none is chosen by comparing ids with the experts' numbers"
        )
    with before.graph.inserting_before(before):
        raw = _as_ids(sources, len(picks))
        other = 3 - dim
        sizes: list[Any] = [-1, -1, -1]
        size = mask.meta["val"].shape[other]
        sizes[other] = size if isinstance(size, int) else called(aten.sym_size.int, mask, other)
        index = called(aten.unsqueeze.default, _bounded(raw, experts), other)
        index = called(aten.expand.default, index, sizes)
        weights = called(aten.sum.dim_IntList, called(aten.gather.default, mask, dim, index), [other])
        counts = called(aten.ne.Scalar, weights, 0)
        if len(picks) > 1 and not is_top_k(sources[0]):
            counts = called(aten.logical_and.default, counts, _first_of_its_kind(raw))
        ids = called(aten.where.self, counts, raw, _none(raw))
    return Chosen(ids, weights, sources)


def sparse(site: MoeSite, ev: Elements) -> MoeSite:
    """A site of all experts, whose weights are scores [tokens, experts], with the ids and weights of those that count;
    NoExperts where all may."""
    scores = site.weights
    found = sparse_scores(scores, site.root, ev)
    if found is not None:
        ids, values, weights = found
        return replace(site, ids=ids, values=values, weights=weights)
    tokens, experts = ev.shape(scores)
    with site.root.graph.inserting_before(site.root):
        mask = called(aten.unsqueeze.default, scores, 2)
    picked = chosen_by(lambda e: (scores, (tokens - 1, e)), mask, 1, experts, tokens, site.root, ev)
    return with_choice(site, picked)


def with_choice(site: MoeSite, picked: Chosen) -> MoeSite:
    """A site with ids and weights that are computed from a choice, and what else they are computed from."""
    parameters = [n for n in (site.w1, site.w2, site.b1, site.b2) if n is not None]
    parameters += [n for p in parameters for n in separate.sources(p)]
    given = _given_to((site.root, picked.ids, picked.weights), (*picked.sources, *parameters), site.x)
    return replace(
        site, ids=picked.ids, weights=picked.weights, values=picked.weights, chosen=picked.sources, given=given
    )


def _bounded(ids: fx.Node, experts: int) -> fx.Node:
    return called(aten.clamp_max.default, called(aten.clamp_min.default, ids, 0), experts - 1)


def _none(ids: fx.Node) -> fx.Node:
    """The id of no expert, as a tensor of no dimension."""
    value = ids.meta["val"].new_full((), -1)
    settings = {"dtype": value.dtype, "layout": torch.strided, "device": value.device, "pin_memory": False}
    node = ids.graph.call_function(aten.full.default, ([], -1), settings)
    node.meta["val"] = value
    return node


def _picks(weight: Callable[[int], rows.Source], experts: int, tokens: int, ev: Elements) -> list[Expr]:
    """The elements of integers that are compared with an expert's number in that expert's weight."""
    found: list[dict[Expr, Expr]] = []
    for e in (experts - 1, experts - 2):
        node, at = weight(e)
        element = over_masks(node, ev).at(node, at)
        equal = [f for f in subexpressions(element) if chooses(f) and f.args[1].const == e]
        equal = [f for f in equal if _in_last_row(f.args[0], tokens, ev)]
        found.append({ev.at(*f.args[0].args): f.args[0] for f in equal})  # by what is loaded in the end
    return [load for end, load in found[0].items() if end in found[1]]


def _in_last_row(load: Expr, tokens: int, ev: Elements) -> bool:
    """Whether an element is one of the last token's: other tokens' ids count the places that are taken."""
    for node, idx in trail(load.args[0], load.args[1], ev):
        shape = ev.shape(node)
        for lead in range(1, len(shape) + 1):
            if rows.count(shape[:lead]) == tokens and idx[:lead] == tuple(s - 1 for s in shape[:lead]):
                return True
    return False


def _sources(picks: Sequence[Expr], tokens: int, ev: Elements) -> tuple[fx.Node, ...]:
    """The integers [.., slots], or for each slot [..], that have these elements in their last row."""
    paths = [dict(trail(p.args[0], p.args[1], ev)) for p in picks]
    for node in paths[0] if paths else ():
        shape = ev.shape(node)
        last = tuple(s - 1 for s in shape[:-1])
        slots = {(*last, j) for j in range(len(picks))}
        if shape[-1:] == (len(picks),) and rows.count(shape[:-1]) == tokens and {p.get(node) for p in paths} == slots:
            return (node,)
    flat = [next((n for n, idx in p.items() if _holds_last(n, idx, tokens, ev)), None) for p in paths]
    return tuple(n for n in flat if n is not None) if None not in flat else ()


def _holds_last(node: fx.Node, idx: Position, tokens: int, ev: Elements) -> bool:
    shape = ev.shape(node)
    return rows.count(shape) == tokens and idx == tuple(s - 1 for s in shape)


def _as_ids(sources: Sequence[fx.Node], slots: int) -> fx.Node:
    """[tokens, slots] of `_sources`."""
    if len(sources) == 1:
        return sources[0] if sources[0].meta["val"].ndim == 2 else separate.reshaped(sources[0], [-1, slots])
    return _side_by_side([n if n.meta["val"].ndim == 1 else separate.reshaped(n, [-1]) for n in sources])


def is_top_k(node: fx.Node) -> bool:
    """Whether a row's integers are different, as a top-k's indices are, in a view of other rows too."""
    source = node.args[0] if node.args else None
    while node.target is aten.reshape.default and isinstance(source, fx.Node):
        if source.meta["val"].shape[-1:] != node.meta["val"].shape[-1:]:
            return False
        node, source = source, source.args[0] if source.args else None
    return isinstance(source, fx.Node) and source.target is aten.topk.default


def _first_of_its_kind(ids: fx.Node) -> fx.Node:
    """[tokens, slots]: whether no earlier slot of a token has the same id."""
    columns = [called(aten.select.int, ids, 1, j) for j in range(ids.meta["val"].shape[1])]
    out = []
    for j, column in enumerate(columns):
        first = called(aten.ge.Scalar, column, 0)
        for earlier in columns[:j]:
            first = called(aten.logical_and.default, first, called(aten.ne.Tensor, earlier, column))
        out.append(first)
    return _side_by_side(out)


def _side_by_side(columns: Sequence[fx.Node]) -> fx.Node:
    return called(aten.cat.default, [called(aten.unsqueeze.default, c, 1) for c in columns], 1)


def _given_to(roots: Sequence[fx.Node], inputs: Collection[fx.Node], x: fx.Node) -> tuple[fx.Node, ...]:
    """What `roots` are computed from besides x and the other inputs: where none of those is behind a node, its value is
    taken as given, unless it is a view of x, or constant. What chooses the experts depends on x too: it is given."""
    needed: list[fx.Node] = []
    stack = list(roots)
    seen: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            if node not in inputs and node is not x:
                needed.append(node)
                stack.extend(node.all_input_nodes)
    inside = set(inputs)
    constant: set[fx.Node] = set()
    for node in sorted(needed):
        behind = node.all_input_nodes
        if any(n in inside for n in behind):
            inside.add(node)
        elif isinstance(node.meta.get("val"), torch.SymInt) or (
            node.op == "call_function" and constant.issuperset(behind)
        ):
            constant.add(node)
    given: dict[fx.Node, None] = {}
    for node in needed:
        for n in node.all_input_nodes if node in inside else ():
            if n not in inside and n not in constant and _viewed(n) is not _viewed(x):
                given[n] = None
    return tuple(given)


def _viewed(node: fx.Node) -> fx.Node:
    while node.target in _LAYOUT:
        node = node.all_input_nodes[0]
    return node
