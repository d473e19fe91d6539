"""Rows that are split by expert, with what is computed of each part, put together again: grouped products.

    cat_e(f_e(split(x, sizes)[e]))  =  f(x),   a product of part e with W[e] in f_e being grouped in f (braze.passes.parts)

The sizes are the elements of a tensor, read one by one: a graph can hold that, and nothing else of it knows how many rows a
part has. The computations become one, and the sizes are no longer read. Rows beyond all parts, for which the model puts zeros
behind the parts' results, are set to zero by their place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_leaves

from braze.passes.draft import Draft
from braze.passes.elements import Elements, Sizes, Unknown
from braze.passes.parts import CAST, Lift, NotParts, is_split
from braze.passes.settle import symbolic
from braze.passes.sites import NearMiss, source_line

aten = torch.ops.aten
prims = torch.ops.prims


def group(graph: fx.Graph) -> list[NearMiss]:
    """Makes one computation of those on the parts of split rows, wherever it can; what holds it back elsewhere."""
    if not any(map(is_split, graph.nodes)):
        return []
    ev = Elements(Sizes())
    misses = []
    counts: set[fx.Node] = set()
    for cat in graph.find_nodes(op="call_function", target=aten.cat.default):
        parts = None if _is_nested(cat) else _parts(cat)
        if parts is None:
            continue
        try:
            counts.add(_group(parts, ev))
        except NotParts as e:
            if _multiplies(parts):
                reason = f"the experts' parts of split rows are not computed at once: {e}"
                misses.append(NearMiss("moe", cat.name, "find", reason, source_line([cat, parts.pieces[0]])))
    if counts:
        graph.eliminate_dead_code()
        _forget(counts)
    return misses


@dataclass(frozen=True)
class Parts:
    """cat = the pieces, each computed of one part of what `split` splits, in order; padded: with rows of zeros behind."""

    cat: fx.Node
    pieces: tuple[fx.Node, ...]
    split: fx.Node
    padded: bool
    cats: frozenset[fx.Node]


def _is_cat(node: fx.Node) -> bool:
    return node.target is aten.cat.default and node.args[1:] in ((), (0,))


def _is_nested(cat: fx.Node) -> bool:
    """Whether a cat's result is a piece of another one's alone."""
    return _is_cat(cat) and len(cat.users) == 1 and _is_cat(next(iter(cat.users)))


def _parts(cat: fx.Node) -> Parts | None:
    """What a cat puts together, where that is computed of the parts of split rows."""
    if not _is_cat(cat) or cat.meta["val"].ndim != 2:
        return None
    cats = {cat}
    pieces = _pieces(cat, cats)
    padded = len(pieces) > 1 and _is_zero(pieces[-1])
    pieces = pieces[:-1] if padded else pieces
    behind = [s for s in _behind(pieces[0]) if is_split(s)]
    split = max(behind, default=None)
    if split is None or len(split.args[1]) != len(pieces):  # type: ignore[arg-type]
        return None
    return Parts(cat, tuple(pieces), split, padded, frozenset(cats))


def _pieces(cat: fx.Node, cats: set[fx.Node]) -> list[fx.Node]:
    out: list[fx.Node] = []
    for piece in cat.args[0]:  # type: ignore[union-attr]
        if _is_nested(piece):  # type: ignore[arg-type]
            cats.add(piece)  # type: ignore[arg-type]
            out += _pieces(piece, cats)  # type: ignore[arg-type]
        else:
            out.append(piece)  # type: ignore[arg-type]
    return out


def _is_zero(node: fx.Node) -> bool:
    return node.target is aten.full.default and bool(node.args[1] == 0)


def _behind(node: fx.Node) -> set[fx.Node]:
    """What is between a piece and the splits that it is computed of, these included."""
    found = {node}
    stack = [node]
    while stack:
        n = stack.pop()
        for i in () if is_split(n) else n.all_input_nodes:
            if i not in found:
                found.add(i)
                stack.append(i)
    return found


def _multiplies(parts: Parts) -> bool:
    """Whether matrices are multiplied between the split and the cat."""
    after = {parts.split}
    for node in sorted(_behind(parts.pieces[0])):
        if not after.isdisjoint(node.all_input_nodes):
            after.add(node)
    return any(n.target in (aten.mm.default, aten.addmm.default, aten.bmm.default) for n in after)


def _group(parts: Parts, ev: Elements) -> fx.Node:
    """Puts one computation in the place of those on the parts; returns the tensor that the sizes are read from."""
    sizes: Any = parts.split.args[1]
    counts = _counts(sizes)
    rows: dict[Any, fx.Node] = {s.args[0]: _whole(s, parts) for s in _splits_by(sizes)}
    like = rows[parts.split.args[0]].meta["val"]
    on_device = _on(counts, like.device)
    draft = Draft(parts.cat)
    ends = draft.call(CAST, draft.call(aten.cumsum.default, on_device, 0), torch.int32)
    lift = Lift(parts.cat, draft.new, sizes=sizes, rows=rows, ends=ends, ev=ev)
    try:
        product = lift(parts.pieces)
        lift.private(set(parts.cats))
        if not lift.products:
            raise NotParts("no product")
        if parts.padded and not _equal(_length(parts.cat), _length(rows[parts.split.args[0]])):
            raise NotParts("with the zeros behind them the results are not as many as the rows")
    except (NotParts, Unknown):
        lift.erase()
        raise
    if parts.padded:
        product = _zero_beyond(product, rows[parts.split.args[0]], lift)
    product.meta = {**parts.cat.meta, "val": product.meta["val"]}
    parts.cat.replace_all_uses_with(product)
    _known_sizes(product, rows[parts.split.args[0]])
    return counts


def _counts(sizes: Sequence[fx.Node]) -> fx.Node:
    """The tensor [E] whose elements, in order, are the sizes."""
    found = {_element(s, e) for e, s in enumerate(sizes)}
    counts = found.pop()
    if found or counts is None or counts.meta["val"].shape[0] != len(sizes):
        raise NotParts("the sizes are not read, in order, from one tensor with a number for each expert")
    return counts


def _element(size: Any, e: int) -> fx.Node | None:
    """The tensor [.] whose element e a size is read from."""
    select: Any = size.args[0]
    if select.target is not aten.select.int or select.args[1:] != (0, e) or select.args[0].meta["val"].ndim != 1:
        return None
    return select.args[0]  # type: ignore[no-any-return]


def _on(counts: fx.Node, device: torch.device) -> fx.Node:
    """The sizes' tensor before it was copied to where it is read."""
    while counts.meta["val"].device != device and counts.target is prims.device_put.default:
        counts = counts.args[0]  # type: ignore[assignment]
    if counts.meta["val"].device != device:
        raise NotParts(f"the sizes are on {counts.meta['val'].device}, the rows on {device}")
    return counts


def _splits_by(sizes: Sequence[fx.Node]) -> list[fx.Node]:
    return [n for n in sizes[0].users if is_split(n) and list(n.args[1]) == list(sizes)]  # type: ignore[arg-type]


def _whole(split: fx.Node, parts: Parts) -> fx.Node:
    """All rows of which a split has the first, as many as its sizes say: it is itself where the sizes are all of it."""
    source: Any = split.args[0]
    if source.target is not aten.slice.Tensor or source.args[1:3] not in ((0, 0), (0, None)) or source.args[4:]:
        return source  # type: ignore[no-any-return]
    total = sum(map(symbolic, split.args[1]))  # type: ignore[arg-type]
    end = source.args[3]
    if not _equal(total, symbolic(end) if isinstance(end, fx.Node) else end):
        return source  # type: ignore[no-any-return]
    every: Any = source.args[0]
    if not parts.padded and not _equal(total, _length(every)):
        raise NotParts("nothing says that the experts' rows are all of them")
    return every  # type: ignore[no-any-return]


def _length(rows: fx.Node) -> Any:
    return symbolic(rows).shape[0]


def _equal(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal, whatever their symbols are."""
    return statically_known_true(a == b)


def _zero_beyond(product: fx.Node, rows: fx.Node, lift: Lift) -> fx.Node:
    """What a product has of `rows` up to where the last expert's end, and zeros."""
    val = product.meta["val"]
    size = val.shape[0] if isinstance(val.shape[0], int) else lift.call(aten.sym_size.int, rows, 0)
    graph = product.graph
    with graph.inserting_before(lift.before):
        counting = {"start": 0, "step": 1, "dtype": torch.int64, "device": val.device, "requires_grad": False}
        places = graph.call_function(prims.iota.default, (size,), counting)
        places.meta["val"] = val.new_empty(val.shape[0], dtype=torch.int64)
        zero = graph.call_function(aten.full.default, ([], 0.0), {"dtype": val.dtype, "device": val.device})
        zero.meta["val"] = val.new_empty(())
    last = lift.call(aten.select.int, lift.ends, 0, -1)
    inside = lift.call(aten.lt.Tensor, lift.call(aten.unsqueeze.default, places, 1), last)
    return lift.call(aten.where.self, inside, product, zero)


def _known_sizes(product: fx.Node, rows: fx.Node) -> None:
    """Says of what follows that it has as many rows as the product, not a sum of sizes that are not known; how many that are
    is asked of `rows`."""
    changed, node = {product}, product.next
    while node.op != "root":
        if node.op == "call_function" and any(n in changed for n in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            with product.meta["val"].fake_mode:
                value = node.target(*args, **kwargs)  # type: ignore[operator]
            if _shapes(value) != _shapes(node.meta["val"]):
                node.meta["val"] = value
                changed.add(node)
            if node.target is aten.sym_size.int and node.args[1] == 0 and str(value) == str(rows.meta["val"].shape[0]):
                node.args = (rows, 0)
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
