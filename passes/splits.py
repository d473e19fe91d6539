"""Products of rows that are split by expert, one for each part, put together again: a grouped product.

    cat_e(split(x, sizes)[e] W[e]^T)  =  grouped(x, W^T, ends),   ends = the running sum of sizes

The sizes are the elements of a tensor, read one by one: a graph can hold that, and nothing else of it knows how many rows a
part has. The products become one, and the sizes are no longer read.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from braze.passes.elements import Elements, Sizes, Unknown, trail
from braze.passes.separate import called, turned

aten = torch.ops.aten


@dataclass(frozen=True)
class Parts:
    """cat = products of all parts of `rows`, in order, with the experts' parts of `weight` [E, N, K]; counts [E]."""

    cat: fx.Node
    rows: fx.Node
    weight: fx.Node
    counts: fx.Node


def group(graph: fx.Graph) -> int:
    """Makes grouped products of all products of split rows; returns their number."""
    ev = Elements(Sizes())
    found = [
        p for n in graph.find_nodes(op="call_function", target=aten.cat.default) if (p := _parts(n, ev)) is not None
    ]
    for parts in found:
        _replace(parts)
    if found:
        graph.eliminate_dead_code()
        _forget({p.counts for p in found})
    return len(found)


def _parts(cat: fx.Node, ev: Elements) -> Parts | None:
    pieces: Any = cat.args[0]
    if cat.args[1:] not in ((), (0,)) or not all(n.target is aten.mm.default for n in pieces):
        return None
    if not all(n.args[0].target is operator.getitem for n in pieces) or len({n.args[0].args[0] for n in pieces}) != 1:
        return None
    split = pieces[0].args[0].args[0]
    if split.target is not aten.split_with_sizes.default or split.args[2:] not in ((), (0,)):
        return None
    sizes = split.args[1]
    if [n.args[0].args[1] for n in pieces] != list(range(len(sizes))):
        return None
    counts = {_element(s, e) for e, s in enumerate(sizes)}
    weights = {_weight(n.args[1], e, ev) for e, n in enumerate(pieces)}
    if len(counts) != 1 or len(weights) != 1 or None in counts | weights:
        return None
    count, weight = counts.pop(), weights.pop()
    assert count is not None
    assert weight is not None
    same = len(sizes) == count.meta["val"].shape[0] == weight.meta["val"].shape[0]
    return Parts(cat, split.args[0], weight, count) if same else None


def _element(size: Any, e: int) -> fx.Node | None:
    """The tensor [.] whose element e a size is read from."""
    if not isinstance(size, fx.Node) or size.target is not aten._local_scalar_dense.default:
        return None
    select: Any = size.args[0]
    if select.target is not aten.select.int or select.args[1:] != (0, e) or select.args[0].meta["val"].ndim != 1:
        return None
    return select.args[0]  # type: ignore[no-any-return]


def _weight(operand: fx.Node, e: int, ev: Elements) -> fx.Node | None:
    """The tensor [E, N, K] whose part e, turned, an operand [K, N] is."""
    shape = tuple(operand.meta["val"].shape)
    try:
        paths = [dict(trail(operand, at, ev)) for at in ((0, 0), (shape[0] - 1, shape[1] - 1), (0, shape[1] - 1))]
    except Unknown:
        return None
    for node in paths[0]:
        if tuple(node.meta["val"].shape)[1:] == shape[::-1] and node.meta["val"].ndim == 3:
            ends = [p.get(node) for p in paths]
            if ends == [(e, 0, 0), (e, shape[1] - 1, shape[0] - 1), (e, shape[1] - 1, 0)]:
                return node
    return None


def _replace(parts: Parts) -> None:
    graph, like = parts.cat.graph, parts.rows.meta["val"]
    native = like.device.type != "cpu" and like.dtype == torch.bfloat16
    with graph.inserting_before(parts.cat):
        ends = called(
            torch.ops.prims.convert_element_type.default, called(aten.cumsum.default, parts.counts, 0), torch.int32
        )
        weight = turned(parts.weight)
        target = aten._grouped_mm.default if native else torch.ops.braze.grouped_mm.default
        product = called(target, parts.rows, weight, ends)
    product.meta = {**parts.cat.meta, "val": product.meta["val"]}
    parts.cat.replace_all_uses_with(product)
    _known_sizes(product)


def _known_sizes(product: fx.Node) -> None:
    """Says of what follows that it has as many rows as the product, not a sum of sizes that are not known."""
    changed, node = {product}, product.next
    while node.op != "root":
        if node.op == "call_function" and any(n in changed for n in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            value = node.target(*args, **kwargs)  # type: ignore[operator]
            if _shapes(value) != _shapes(node.meta["val"]):
                node.meta["val"] = value
                changed.add(node)
        node = node.next


def _shapes(value: Any) -> Any:
    return [str(tuple(v.shape)) if isinstance(v, Tensor) else str(v) for v in tree_leaves(value)]


def _forget(counts: set[fx.Node]) -> None:
    """Removes what reads sizes only to assert something of them."""
    graph = next(iter(counts)).graph
    read = {n for n in graph.nodes if n.target is aten._local_scalar_dense.default and _read_from(n) in counts}
    known = set(read)
    for node in graph.nodes:
        if any(i in known for i in node.all_input_nodes):
            known.add(node)
    ends = [n for n in known if not n.users]
    if all(n.target is aten._assert_scalar.default for n in ends):
        for node in sorted(known, reverse=True):
            graph.erase_node(node)


def _read_from(node: fx.Node) -> Any:
    return node.args[0].args[0] if node.args[0].target is aten.select.int else None  # type: ignore[union-attr]
