"""The matrix products that experts are made of, each as a sum over an inner index of two elements.

grouped:  out[r, n]    = sum_i x[r, i] W[expert of r, i, n],   rows in blocks that end at offs
batched:  out[b, m, n] = sum_i A[b, m, i] B[b, i, n],           one side of which holds expert weights
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from braze.passes.elements import Elements, Expr, Position, trail

aten = torch.ops.aten


def is_grouped(node: fx.Node) -> bool:
    """Whether the node is a grouped product: torch's own, or the stand-in that transformers uses for other dtypes."""
    if node.op != "call_function":
        return False
    name = getattr(node.target, "name", lambda: "")()
    return name in ("aten::_grouped_mm", "transformers::grouped_mm_fallback")


def is_product(node: fx.Node) -> bool:
    """Whether the node may be an expert product."""
    return is_grouped(node) or (node.op == "call_function" and node.target is aten.bmm.default)


@dataclass(frozen=True)
class Side:
    """The expert-weight element of a product: node W [E, a, b], the expert, and whether W is stored [E, inner, outer]."""

    weight: fx.Node
    expert: Any
    transposed: bool


def input_element(product: fx.Node, idx: Position, inner: int, rows_left: bool) -> tuple[fx.Node, Position]:
    """(node, index) of the element of the product's row operand that meets inner index `inner` in out[idx]."""
    if is_grouped(product):
        return product.args[0], (idx[0], inner)  # type: ignore[return-value]
    b, m, n = idx
    return (product.args[0], (b, m, inner)) if rows_left else (product.args[1], (b, inner, n))  # type: ignore[return-value]


def weight_element(product: fx.Node, idx: Position, inner: int, rows_left: bool) -> tuple[fx.Node, Position]:
    """(node, index) of the element of the weight operand that meets inner index `inner` in out[idx]; a grouped
    product's expert is not known here and given as -1."""
    if is_grouped(product):
        return product.args[1], (-1, inner, idx[1])  # type: ignore[return-value]
    b, m, n = idx
    return (product.args[1], (b, inner, n)) if rows_left else (product.args[0], (b, m, inner))  # type: ignore[return-value]


def inner_size(product: fx.Node, ev: Elements, rows_left: bool) -> int:
    """How many terms each element of the product sums up."""
    first = product.args[0] if rows_left or is_grouped(product) else product.args[1]
    assert isinstance(first, fx.Node)
    shape = ev.shape(first)
    return shape[-1] if rows_left or is_grouped(product) else shape[1]


def column(product: fx.Node, idx: Position, rows_left: bool) -> Any:
    """The output column of out[idx] that belongs to the weights."""
    return idx[-1] if rows_left or is_grouped(product) else idx[1]


def with_column(product: fx.Node, idx: Position, n: int, rows_left: bool) -> Position:
    """idx with its weight column replaced."""
    return (*idx[:-1], n) if rows_left or is_grouped(product) else (idx[0], n, idx[2])


def weight_side(product: fx.Node, idx: Position, rows_left: bool, ev: Elements) -> Side | None:
    """The expert weight behind the product, found by moving the inner and the outer index by one."""
    found = [
        _weight_loads(product, with_column(product, idx, n, rows_left), i, rows_left, ev)
        for i, n in ((0, 0), (1, 0), (0, 1))
    ]
    dtype = product.meta["val"].dtype
    for node, base in reversed(found[0].items()):  # the stored weight rather than a view of it
        if node not in found[1] or node not in found[2] or len(base) != 3 or node.meta["val"].dtype != dtype:
            continue
        inner, outer = found[1][node], found[2][node]
        if base[1:] == (0, 0) and base[0] == inner[0] == outer[0]:
            if inner[1:] == (1, 0) and outer[1:] == (0, 1):
                return Side(node, base[0], True)
            if inner[1:] == (0, 1) and outer[1:] == (1, 0):
                return Side(node, base[0], False)
    return None


def _weight_loads(product: fx.Node, idx: Position, i: int, rows_left: bool, ev: Elements) -> dict[fx.Node, Position]:
    return dict(trail(*weight_element(product, idx, i, rows_left), ev))


def sort_of_rows(row: Any) -> fx.Node | None:
    """The sort whose permutation a row index undoes: row = position of element s in sorted order."""
    if isinstance(row, Expr) and row.op == "inverse":
        node = row.args[0].args[0]
        assert isinstance(node, fx.Node)
        return node
    return None
