"""The matrix products that experts are made of, each as a sum over an inner index of two elements.

grouped:  out[r, n]    = sum_i x[r, i] W[expert of r, i, n],   rows in blocks that end at offs
batched:  out[b, m, n] = sum_i A[b, m, i] B[b, i, n],           one side of which holds expert weights

A batched product of one batch, or a plain one, may do all experts at once: its columns or its sum then run over them too.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from braze.passes.elements import Elements, Expr, Position, is_empty, trail

aten = torch.ops.aten


def is_grouped(node: fx.Node) -> bool:
    """Whether the node is a grouped product: torch's own, or the stand-in that transformers uses for other dtypes."""
    if node.op != "call_function":
        return False
    name = getattr(node.target, "name", lambda: "")()
    return name in ("aten::_grouped_mm", "transformers::grouped_mm_fallback", "braze::grouped_mm")


def is_product(node: fx.Node) -> bool:
    """Whether the node may be an expert product."""
    if node.op != "call_function" or any(map(_of_nothing, node.all_input_nodes)):
        return False
    if is_grouped(node):
        return True
    return node.target is aten.bmm.default or (node.target is aten.mm.default and _of_experts(node.args[1]))


def _of_nothing(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor) and is_empty(node)


def _of_experts(weight: Any) -> bool:
    """Whether a matrix is a view of a tensor [., ., .], of all experts' weights at once."""
    while weight.op == "call_function" and weight.target in _VIEWS:
        weight = weight.args[0]
        if weight.meta["val"].ndim == 3:
            return True
    return False


_VIEWS = (aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.permute.default, aten.clone.default)


class NoExperts(Exception):
    """Why a pair of products is no expert block."""


@dataclass(frozen=True)
class Pair:
    """Two expert products, the second fed by a scalar function of the first. rows_left: of a batched product, whether its
    first operand holds the rows (its second the weights). up: where gate and up are products of their own, the other one."""

    first: fx.Node
    second: fx.Node
    first_left: bool
    second_left: bool
    up: fx.Node | None = None

    @property
    def firsts(self) -> tuple[fx.Node, ...]:
        """The products that g, and u where it is apart, are elements of."""
        return (self.first,) if self.up is None else (self.first, self.up)


@dataclass(frozen=True)
class Side:
    """The expert-weight element of a product: node W [E, a, b], the expert, whether W is stored [E, inner, outer], and the
    outer index, which is the product's column unless one product does all experts at once."""

    weight: fx.Node
    expert: Any
    transposed: bool
    column: Any


def input_element(product: fx.Node, idx: Position, inner: int, rows_left: bool) -> tuple[fx.Node, Position]:
    """(node, index) of the element of the product's row operand that meets inner index `inner` in out[idx]."""
    if rows_left:
        return product.args[0], (*idx[:-1], inner)  # type: ignore[return-value]
    return product.args[1], (*idx[:-2], inner, idx[-1])  # type: ignore[return-value]


def weight_element(product: fx.Node, idx: Position, inner: int, rows_left: bool) -> tuple[fx.Node, Position]:
    """(node, index) of the element of the weight operand that meets inner index `inner` in out[idx]; a grouped
    product's expert is not known here and given as -1."""
    if is_grouped(product):
        return product.args[1], (-1, inner, idx[1])  # type: ignore[return-value]
    if rows_left:
        return product.args[1], (*idx[:-2], inner, idx[-1])  # type: ignore[return-value]
    return product.args[0], (*idx[:-1], inner)  # type: ignore[return-value]


def inner_size(product: fx.Node, ev: Elements, rows_left: bool) -> int:
    """How many terms each element of the product sums up."""
    rows = product.args[0 if rows_left else 1]
    assert isinstance(rows, fx.Node)
    return ev.shape(rows)[-1 if rows_left else -2]


def column(product: fx.Node, idx: Position, rows_left: bool) -> Any:
    """The output column of out[idx] that belongs to the weights."""
    return idx[-1] if rows_left else idx[-2]


def with_column(product: fx.Node, idx: Position, n: int, rows_left: bool) -> Position:
    """idx with its weight column replaced."""
    return (*idx[:-1], n) if rows_left else (*idx[:-2], n, idx[-1])


def weight_side(
    product: fx.Node,
    idx: Position,
    rows_left: bool,
    ev: Elements,
    start: int = 0,
    step: int = 1,
    cast: bool = False,
) -> Side | None:
    """The expert weight behind the product's element at idx, found by moving the inner index, `start` at first, by `step` and
    the column by one. cast: also where it is of another dtype than the product."""
    n = column(product, idx, rows_left)
    width = column(product, ev.shape(product), rows_left)
    if not isinstance(n, int):
        return None
    others = [c for c in (n - 1, n + 1) if 0 <= c < width]  # one of them may be of the next expert
    found = [_sides(product, idx, (start, start + step), n, c, rows_left, ev, cast) for c in others]
    return max((f for f in found if f), key=len, default=[None])[-1]


def _sides(
    product: fx.Node, idx: Position, at: tuple[int, int], n: int, other: int, rows_left: bool, ev: Elements, cast: bool
) -> list[Side | None]:
    """For the operand and each node that it views, the weights that it holds; the stored ones last."""
    found = [
        dict(trail(*weight_element(product, with_column(product, idx, c, rows_left), k, rows_left), ev))
        for k, c in ((at[0], n), (at[1], n), (at[0], other))
    ]
    dtype = product.meta["val"].dtype
    out: list[Side | None] = []
    for node, base in found[0].items():
        side = None
        same = cast or node.meta["val"].dtype == dtype
        if same and node in found[1] and node in found[2] and len(base) == 3:
            side = _side_at(node, base, found[1][node], found[2][node], other - n)
        out.append(side)
    while out and out[-1] is None:
        out.pop()
    return out


def _side_at(node: fx.Node, base: Position, inner: Position, outer: Position, step: int) -> Side | None:
    """The weight [., ., .] in which one more inner index and `step` more columns lead from base to these positions."""
    if not all(isinstance(k, int) for k in (*base[1:], *inner[1:], *outer[1:])):
        return None
    if not base[0] == inner[0] == outer[0]:
        return None
    if base[1] == 0 and inner[1:] == (1, base[2]) and outer[1:] == (0, base[2] + step):
        return Side(node, base[0], True, base[2])
    if base[2] == 0 and inner[1:] == (base[1], 1) and outer[1:] == (base[1] + step, 0):
        return Side(node, base[0], False, base[1])
    return None


def sort_of_rows(row: Any) -> fx.Node | None:
    """The sort whose permutation a row index undoes: row = position of element s in sorted order."""
    if isinstance(row, Expr) and row.op == "inverse":
        node = row.args[0].args[0]
        assert isinstance(node, fx.Node)
        return node
    return None
