"""Experts that are modules of their own, each on its part of the rows that a mask gathered [experts, places, hidden]:

    cat_e(f_e(z[e]))  =  f(z),   a product of z[e] with W_e in f_e being a batched one with stack(W_0, W_1, ...) in f

The stack is a name for the list of weights, which no kernel computes: what no site took is put back as it was.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from braze.passes import separate
from braze.passes.draft import Draft
from braze.passes.sites import NearMiss, source_line

aten = torch.ops.aten
_CAST = torch.ops.prims.convert_element_type.default
_PRODUCTS = (aten.mm.default, aten.addmm.default)
_VIEWS = (aten.reshape.default, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim, aten.clone.default)
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)

#: What an expert makes of its part takes no more nodes than this.
MAX_NODES = 256


class NotAlike(Exception):
    """Why parts are not computed side by side."""


@dataclass(frozen=True)
class Placed:
    """What took the place of `old`: `root`. old: nodes in order, of which the last was used, each with its arguments. source:
    what the parts were of, as the old nodes name it; reader: the new node whose first argument it is now."""

    root: fx.Node
    old: tuple[tuple[fx.Node, Any, Any], ...]
    source: fx.Node
    reader: fx.Node


def place(graph: fx.Graph) -> tuple[list[Placed], list[NearMiss]]:
    """Puts what is computed of the parts of one tensor, each with weights of its own, side by side, wherever it can; what holds
    it back where the parts are of rows that a product gathered."""
    found, misses = [], []
    for cat in [n for n in graph.nodes if n.target in (aten.cat.default, aten.stack.default)]:
        pieces: Any = cat.args[0]
        if len(pieces) < 2 or len(set(pieces)) < len(pieces) or not _multiplies(pieces[0]):
            continue
        lift = _Lift(cat, experts=len(pieces))
        try:
            found.append(_placed(cat, tuple(pieces), lift))
        except NotAlike as e:
            lift.erase()
            if _are_experts(pieces):
                reason = f"experts, each on its part of the rows, are not computed side by side: {e}"
                misses.append(NearMiss("moe", cat.name, "find", reason, source_line([cat, pieces[0]])))
    return found, misses


def put_back(placed: Sequence[Placed]) -> None:
    """Puts back what is still there of the new nodes."""
    for p in placed:
        if p.root._erased or not p.root.users:
            continue
        graph = p.root.graph
        again: dict[fx.Node, fx.Node] = {p.source: p.reader.args[0]}  # type: ignore[dict-item]
        with graph.inserting_before(p.root):
            for node, old_args, old_kwargs in p.old:
                args, kwargs = fx.node.map_arg((old_args, old_kwargs), partial(_instead, again))
                again[node] = graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
                again[node].meta = dict(node.meta)
        p.root.replace_all_uses_with(again[p.old[-1][0]])
        graph.eliminate_dead_code()


def _instead(again: dict[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
    return again.get(node, node)


def _placed(cat: fx.Node, pieces: tuple[fx.Node, ...], lift: "_Lift") -> Placed:
    root = lift(pieces)
    if lift.source is None or lift.reader is None or lift.products < 2 or not lift.listed:
        raise NotAlike("no experts of their own")
    dim = cat.args[1] if len(cat.args) > 1 else 0
    whole = _joined(root, cat, int(dim), lift)  # type: ignore[arg-type, call-overload]
    inside = lift.inside() | {cat}
    if any(not inside.issuperset(n.users) for n in inside - {cat}):
        raise NotAlike("what is computed of a part is used elsewhere")
    old = tuple((n, n.args, dict(n.kwargs)) for n in sorted(inside))
    cat.replace_all_uses_with(whole)
    for node, _, _ in reversed(old):
        cat.graph.erase_node(node)
    return Placed(whole, old, lift.source, lift.reader)


def _between(piece: fx.Node) -> tuple[set[fx.Node], list[fx.Node]]:
    """(what a piece is computed of, back to parts of something; what took these parts)."""
    seen: set[fx.Node] = set()
    parts, stack = [], [piece]
    while stack and len(seen) < MAX_NODES:
        node = stack.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if (part := _part_of(node)) is not None and part[0].op == "call_function" and not _is_by_columns(part):
            parts.append(node)
        else:
            stack.extend(node.all_input_nodes)
    return seen, parts


def _is_by_columns(part: tuple[fx.Node, int, int, bool]) -> bool:
    return bool(part[1] == part[0].meta["val"].ndim - 1)


def _multiplies(piece: fx.Node) -> bool:
    """Whether a piece is computed by two products of matrices at least."""
    return sum(n.target in _PRODUCTS for n in _between(piece)[0]) > 1


def _are_experts(pieces: Sequence[fx.Node]) -> bool:
    """Whether each piece is computed of parts of its own, the first of a part of what a product made: two halves of what turns
    share what was before them."""
    taken = [_between(piece)[1] for piece in pieces]
    if not all(taken):
        return False
    seen: set[fx.Node] = set()
    for parts in taken:
        if not seen.isdisjoint(parts):
            return False
        seen.update(parts)
    return any(_is_product(n) for n in taken[0])


def _is_product(part: fx.Node) -> bool:
    """Whether a part is one of what a product made."""
    node: Any = _part_of(part)[0]  # type: ignore[index]
    while node.target in _VIEWS:
        node = node.args[0]
    return node.target in (aten.bmm.default, aten.mm.default)


def _joined(root: fx.Node, cat: fx.Node, dim: int, lift: "_Lift") -> fx.Node:
    """The parts [experts, ...] as the cat, or the stack, has them."""
    rank = root.meta["val"].ndim
    shape = list(cat.meta["val"].shape)
    dim %= len(shape)
    if dim:
        order = [*range(1, dim + 1), 0, *range(dim + 1, rank)]
        root = lift.call(aten.permute.default, root, order)
    if cat.target is aten.stack.default:
        return root
    return lift.call(aten.reshape.default, root, lift.sizes(shape))


@dataclass(kw_only=True)
class _Lift(Draft):
    experts: int
    source: fx.Node | None = None
    reader: fx.Node | None = None
    products: int = 0
    listed: bool = False
    _memo: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    _own: set[fx.Node] = field(default_factory=set)

    def __call__(self, parts: tuple[Any, ...]) -> fx.Node:
        """The node [experts, ...] whose parts are `parts`."""
        if parts not in self._memo:
            node = self._lifted(parts)
            shape, part = node.meta["val"].shape, parts[0].meta["val"].shape
            if list(map(str, shape)) != [str(self.experts), *map(str, part)]:
                raise NotAlike(f"{parts[0].name} is no part of {node.name}")
            self._memo[parts] = node
        return self._memo[parts]  # type: ignore[no-any-return]

    def inside(self) -> set[fx.Node]:
        """The nodes that are computed of the parts."""
        return self._own

    def sizes(self, shape: Sequence[Any]) -> list[Any]:
        """A shape as an argument: one size may be what is left."""
        unknown = [d for d, s in enumerate(shape) if not isinstance(s, int)]
        if len(unknown) > 1:
            raise NotAlike("several sizes are symbolic")
        return [-1 if d in unknown else s for d, s in enumerate(shape)]

    def _lifted(self, parts: tuple[Any, ...]) -> fx.Node:
        if not all(isinstance(n, fx.Node) and isinstance(n.meta.get("val"), Tensor) for n in parts):
            raise NotAlike("a part is no tensor")
        first = parts[0]
        whole = self._whole(parts)
        if whole is not None:
            return whole
        if all(n.op in ("placeholder", "get_attr") for n in parts):
            return self._list(parts)
        if all(n.target is operator.getitem for n in parts):
            return self._columns(parts)
        if any(n.op != "call_function" or n.target is not first.target or n.kwargs != first.kwargs for n in parts):
            raise NotAlike("experts are computed in different ways")
        node = self._call(parts)
        node.meta = {**first.meta, "val": node.meta["val"]}
        self._own.update(parts)
        return node

    def _list(self, parts: tuple[Any, ...]) -> fx.Node:
        """A name for the list of what the experts have of their own."""
        if len(set(parts)) < len(parts):
            raise NotAlike("experts share a tensor")
        self.listed = True
        node = separate.name([[n] for n in parts], 0, self.before)
        self.new.append(node)
        return node

    def _whole(self, parts: tuple[fx.Node, ...]) -> fx.Node | None:
        """The tensor whose parts along some dimension the parts are, that dimension in front."""
        made = [_part_of(n) for n in parts]
        if any(m is None for m in made):
            return None
        found = [m for m in made if m is not None]
        source, dim, kept = found[0][0], found[0][1], found[0][3]
        if any(m[:2] != (source, dim) or m[2] != e or m[3] != kept for e, m in enumerate(found)):
            return None
        size = source.meta["val"].shape[dim]
        if not isinstance(size, int) or size % self.experts or (not kept and size != self.experts):
            return None
        node = source
        if kept:
            outer, (_, *after) = source.meta["val"].shape[:dim], source.meta["val"].shape[dim:]
            apart = self.sizes([*outer, self.experts, size // self.experts, *after])
            node = self.call(aten.reshape.default, node, apart)
        rank = node.meta["val"].ndim
        moved = self.call(aten.permute.default, node, [dim, *(d for d in range(rank) if d != dim)])
        if source.op == "call_function":
            if self.source not in (None, source):
                raise NotAlike("experts take parts of several tensors")
            self.source, self.reader = source, (node if kept else moved)
        for n in parts:
            self._own.add(n)
            if n.target is operator.getitem:
                self._own.add(n.args[0])  # type: ignore[arg-type]
        return moved

    def _columns(self, parts: tuple[fx.Node, ...]) -> fx.Node:
        """A part of each part, of its columns say."""
        splits: Any = tuple(n.args[0] for n in parts)
        first = splits[0]
        same = {(n.args[1], s.target, str(s.args[1:])) for n, s in zip(parts, splits, strict=True)}
        if len(same) > 1 or first.target not in _SPLITS[:2]:
            raise NotAlike("experts are computed in different ways")
        if splits not in self._memo:
            dim = first.args[2] if len(first.args) > 2 else 0
            whole = self(tuple(s.args[0] for s in splits))
            rank = whole.meta["val"].ndim - 1
            self._memo[splits] = self.call(first.target, whole, first.args[1], dim % rank + 1)
            self._own.update(splits)
        node = self.call(operator.getitem, self._memo[splits], parts[0].args[1])
        node.meta = {**parts[0].meta, "val": node.meta["val"]}
        self._own.update(parts)
        return node

    def _call(self, parts: tuple[fx.Node, ...]) -> fx.Node:
        first = parts[0]
        column = [self._operand(list(same)) for same in zip(*(_flat(n) for n in parts), strict=True)]
        if first.target in _PRODUCTS:
            self.products += 1
            if first.target is aten.mm.default:
                return self.call(aten.bmm.default, *column)
            if first.kwargs:
                raise NotAlike("a product is scaled")
            product = self.call(aten.bmm.default, *column[1:])
            return self.call(aten.add.Tensor, product, self.call(aten.unsqueeze.default, column[0], 1))
        args = tree_unflatten(column, tree_flatten(first.args)[1])
        rank = first.meta["val"].ndim
        if first.target in (aten.reshape.default, aten.view.default):
            return self.call(aten.reshape.default, args[0], [self.experts, *args[1]])
        if first.target is aten.permute.default:
            return self.call(first.target, args[0], [0, *(d % rank + 1 for d in args[1])])
        if first.target in (aten.unsqueeze.default, aten.squeeze.dim):
            inner = rank if first.target is aten.unsqueeze.default else rank + 1
            return self.call(first.target, args[0], args[1] % inner + 1)
        if first.target is aten.slice.Tensor:
            return self.call(first.target, args[0], args[1] % rank + 1, *args[2:])
        if first.target is _CAST or first.target is aten.clone.default:
            return self.call(first.target, *args, **first.kwargs)
        if torch.Tag.pointwise in getattr(first.target, "tags", ()):
            aligned = [self._aligned(a, rank) for a in args]
            return self.call(first.target, *aligned, **first.kwargs)
        raise NotAlike(f"{first.target} of a part")

    def _operand(self, same: list[Any]) -> Any:
        """An argument of all parts: what they have in common, or the node that they are parts of."""
        one = same[0]
        if any(type(a) is not type(one) or a != one for a in same):
            return self(tuple(same))
        if not (isinstance(one, fx.Node) and isinstance(one.meta.get("val"), Tensor)):
            return one
        if one.op == "call_function":
            raise NotAlike("a part is computed of something else as well")
        return self.call(aten.expand.default, one, [self.experts, *one.meta["val"].shape])

    def _aligned(self, arg: Any, rank: int) -> Any:
        """An operand [experts, ...] with as many dimensions behind as a result's part has."""
        while isinstance(arg, fx.Node) and isinstance(arg.meta.get("val"), Tensor) and arg.meta["val"].ndim < rank + 1:
            arg = self.call(aten.unsqueeze.default, arg, 1)
        return arg


def _flat(node: fx.Node) -> list[Any]:
    return tree_flatten(node.args)[0]


def _part_of(node: fx.Node) -> tuple[fx.Node, int, int, bool] | None:
    """(tensor, dimension, which, whether it keeps the dimension) of which a node is a part."""
    if node.target is aten.select.int:
        source, dim, e = node.args
        keeps = False
    elif node.target is operator.getitem and node.args[0].target in _SPLITS:  # type: ignore[union-attr, operator]
        split, e = node.args
        source = split.args[0]  # type: ignore[union-attr]
        keeps = split.target is not aten.unbind.int  # type: ignore[union-attr]
        place = 2 if keeps else 1
        dim = split.args[place] if len(split.args) > place else 0  # type: ignore[union-attr]
        if keeps and len({str(v.shape) for v in split.meta["val"]}) != 1:  # type: ignore[union-attr]
            return None
    else:
        return None
    if not isinstance(e, int) or not isinstance(dim, int) or not isinstance(source, fx.Node):
        return None
    return source, dim % source.meta["val"].ndim, e, keeps
