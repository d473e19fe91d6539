"""What is computed of the parts of split rows, one part like the other, is computed of all rows at once:

    cat_e(f(split(x, sizes)[e] W[e]))  =  f(grouped(x, W, ends)),   ends = the running sum of sizes

f is made of functions of elements, of parts of columns, and of more such products; each is lifted node by node.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_flatten, tree_unflatten

from braze.passes.draft import Draft
from braze.passes.elements import Elements, Unknown, trail

aten = torch.ops.aten
CAST = torch.ops.prims.convert_element_type.default
_ALONG_COLUMNS = (aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default)


class NotParts(Exception):
    """Why what is computed of the parts is not computed of all rows at once."""


@dataclass(kw_only=True)
class Lift(Draft):
    """Lifts tuples of nodes, one for each part, to nodes on all rows.

    sizes: what splits rows; rows: of what is split, by the tensor that is. ends: where each part ends, int32 [E].
    """

    sizes: Sequence[Any]
    rows: dict[fx.Node, fx.Node]
    ends: fx.Node
    ev: Elements
    products: int = 0
    _memo: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def __call__(self, parts: tuple[Any, ...]) -> Any:
        """The node on all rows with these parts; what all parts have in common is itself. NotParts where there is none."""
        if parts not in self._memo:
            self._memo[parts] = self._lifted(parts)
        return self._memo[parts]

    def private(self, cats: set[fx.Node]) -> None:
        """NotParts where something computed of a part is used for anything else: it would be computed twice."""
        inside = {n for parts in self._memo if _differ(parts) for n in parts if isinstance(n, fx.Node)} | cats
        for node in inside - cats:
            if not _is_part(node) and not inside.issuperset(node.users):
                raise NotParts(f"{node.name}, computed of one expert's rows, is used elsewhere")

    def _lifted(self, parts: tuple[Any, ...]) -> Any:
        if not _differ(parts):
            return self._shared(parts[0])
        if not all(isinstance(n, fx.Node) for n in parts):
            raise NotParts(f"experts compute with different constants, {parts[0]} and {parts[1]}")
        if all(map(_is_part, parts)):
            return self._rows(parts)
        first = parts[0]
        if any(n.target is not first.target or n.kwargs != first.kwargs for n in parts):
            other = next(n for n in parts if n.target is not first.target or n.kwargs != first.kwargs)
            raise NotParts(f"experts are computed in different ways: {first.name} and {other.name}")
        if first.target is aten.mm.default:
            return self._product(parts)
        if not _is_by_rows(first):
            raise NotParts(f"{first.name} ({first.target}) of one expert's rows is no function of a row")
        return self._again(parts)

    def _shared(self, arg: Any) -> Any:
        """What all parts have in common: a number, or a tensor that has one row at most."""
        val = arg.meta.get("val") if isinstance(arg, fx.Node) else None
        if isinstance(val, torch.Tensor) and val.ndim > 1 and val.shape[0] != 1:
            raise NotParts(f"{arg.name} is no expert's rows")
        if isinstance(arg, fx.Node) and not isinstance(val, torch.Tensor):
            raise NotParts(f"{arg.name} is the number of an expert's rows")
        return arg

    def _rows(self, parts: Sequence[fx.Node]) -> fx.Node:
        splits = {n.args[0] for n in parts}
        split: Any = splits.pop()
        if splits or split.target is not aten.split_with_sizes.default or list(split.args[1]) != list(self.sizes):
            raise NotParts("rows are not split by one list of sizes")
        if [n.args[1] for n in parts] != list(range(len(parts))):
            raise NotParts("experts do not take the parts of the rows in order")
        if split.args[0] not in self.rows:
            raise NotParts(f"rows of {split.args[0].name} are split beside those of others")
        return self.rows[split.args[0]]

    def _product(self, parts: Sequence[fx.Node]) -> fx.Node:
        rows = self(tuple(n.args[0] for n in parts))
        weights = {_weight(n.args[1], e, self.ev) for e, n in enumerate(parts)}  # type: ignore[arg-type]
        found = weights.pop()
        if weights or found is None or not statically_known_true(found[0].meta["val"].shape[0] == len(parts)):
            raise NotParts("the experts' weights are no parts, in order, of one tensor [experts, ., .]")
        like = parts[0].meta["val"]
        weight, as_multiplied = found
        if weight.meta["val"].dtype != like.dtype:
            weight = self.call(CAST, weight, like.dtype)
        if not as_multiplied:
            weight = self.call(aten.permute.default, weight, [0, 2, 1])
        native = like.device.type != "cpu" and like.dtype == torch.bfloat16
        target = aten._grouped_mm.default if native else torch.ops.braze.grouped_mm.default
        self.products += 1
        return self._like(parts[0], self.call(target, rows, weight, self.ends))

    def _again(self, parts: Sequence[fx.Node]) -> fx.Node:
        """The same call on all rows."""
        flat = [tree_flatten(n.args) for n in parts]
        if any(spec != flat[0][1] for _, spec in flat):
            raise NotParts(f"experts are computed in different ways: {parts[0].name} and {parts[1].name}")
        leaves = [self(same) for same in zip(*(leaves for leaves, _ in flat), strict=True)]
        args = tree_unflatten(leaves, flat[0][1])
        return self._like(parts[0], self.call(parts[0].target, *args, **parts[0].kwargs))

    def _like(self, part: fx.Node, node: fx.Node) -> fx.Node:
        node.meta = {**part.meta, "val": node.meta["val"]}
        return node


def is_split(node: Any) -> bool:
    """Whether a node splits rows by sizes that are read from a tensor."""
    return (
        isinstance(node, fx.Node)
        and node.target is aten.split_with_sizes.default
        and node.args[2:] in ((), (0,))
        and all(isinstance(s, fx.Node) and s.target is aten._local_scalar_dense.default for s in node.args[1])  # type: ignore[union-attr]
    )


def _is_part(node: fx.Node) -> bool:
    return node.target is operator.getitem and is_split(node.args[0])


def _differ(parts: tuple[Any, ...]) -> bool:
    return any(type(p) is not type(parts[0]) or p != parts[0] for p in parts)


def _is_by_rows(node: fx.Node) -> bool:
    """Whether each row of a node is a function of the same row of its operands."""
    if node.target is operator.getitem:
        return node.args[0].target in _ALONG_COLUMNS  # type: ignore[union-attr, operator]
    if node.target in _ALONG_COLUMNS:
        place = 1 if node.target is aten.slice.Tensor else 2
        dim = node.args[place] if len(node.args) > place else 0
        return isinstance(dim, int) and dim % node.args[0].meta["val"].ndim != 0  # type: ignore[union-attr]
    return node.target is CAST or torch.Tag.pointwise in getattr(node.target, "tags", ())


def _weight(operand: fx.Node, e: int, ev: Elements) -> tuple[fx.Node, bool] | None:
    """(the tensor [E, ., .] whose part e an operand [K, N] is, whether as it is or turned)."""
    try:
        k, n = ev.shape(operand)
        paths = [dict(trail(operand, at, ev)) for at in ((0, 0), (k - 1, n - 1), (0, n - 1))]
    except Unknown:
        return None
    for node in paths[0]:
        shape = ev.shape(node)
        ends = [p.get(node) for p in paths]
        if shape[1:] == (k, n) and len(shape) == 3 and ends == [(e, 0, 0), (e, k - 1, n - 1), (e, 0, n - 1)]:
            return node, True
        if shape[1:] == (n, k) and len(shape) == 3 and ends == [(e, 0, 0), (e, n - 1, k - 1), (e, n - 1, 0)]:
            return node, False
    return None
