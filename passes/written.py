"""An expert written out as products of matrices: down(act(gate x, up x)), gate and up one product, two, or no gate.

An element of what the last product reads, expanded, is an expression in elements of the first ones: their columns tell
where g and u lie, and the expression with both as symbols is the activation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from braze.kernels.expression import g as G
from braze.kernels.expression import u as U
from braze.kernels.spec import GateUpLayout
from braze.passes import activation, separate
from braze.passes.between import linear_in
from braze.passes.elements import Elements, Expr, Position, Unknown, leaves, trail
from braze.passes.products import NoExperts
from braze.passes.rows import count
from braze.passes.separate import is_plain

_CAST = torch.ops.prims.convert_element_type.default


@dataclass(frozen=True)
class Expert:
    """One expert's products and what lies between: firsts in the order of g, u; meaning: equal for equal functions."""

    firsts: tuple[fx.Node, ...]
    columns: tuple[int, ...]
    element: Expr
    symbols: tuple[Expr, ...]
    meaning: object


def firsts(down: fx.Node, i: int, ev: Elements) -> list[Expr]:
    """The elements of other products that inner index i of a product's rows depends on; none where there is anything
    that is not a product's element with a function of one row around it."""
    rows = separate.left(down)
    try:
        t = ev.shape(down)[0] - 1
        element = ev.at(rows, (t, i))
    except (Unknown, RecursionError):
        return []
    loads = leaves([element])
    if element.op == "load" or not 1 <= len(loads) <= 2 or not all(is_plain(e.args[0]) for e in loads):
        return []
    return loads if all(e.args[1][0] == t for e in loads) else []


def expert_of(down: fx.Node, ev: Elements) -> Expert:
    """The expert whose last product is `down`; NoExperts where it is none."""
    loads = sorted(firsts(down, 0, ev), key=lambda e: (e.args[0], e.args[1]))
    if not loads:
        raise NoExperts("an expert's last product is not fed by a scalar function of others")
    element = ev.at(separate.left(down), (ev.shape(down)[0] - 1, 0))
    if len({e.args[0] for e in loads}) == 2 and linear_in(element, loads[0]):
        loads = loads[::-1]  # the gate is what passes through the function
    numbers = {e: i for i, e in enumerate(loads)}
    meaning = (_meaning(element, numbers, {}), tuple(e.args[1][1] for e in loads), ev.shape(down))
    products = tuple(dict.fromkeys(e.args[0] for e in loads))
    return Expert(products, tuple(e.args[1][1] for e in loads), element, tuple(loads), meaning)


def _meaning(expr: Expr, numbers: dict[Expr, int], memo: dict[Expr, Any]) -> Any:
    """An expression with its loads numbered, to compare those of two experts by."""
    if expr in numbers:
        return numbers[expr]
    if expr.op == "const":
        return ("const", expr.args[0])
    if expr not in memo:
        memo[expr] = (expr.op, *(_meaning(a, numbers, memo) for a in expr.args))
    return memo[expr]


def activation_of(down: fx.Node, expert: Expert, ev: Elements) -> tuple[str, GateUpLayout]:
    """The activation as text, and where g and u lie; NoExperts where it is none or they lie in another way."""
    try:
        text = activation.text(expert.element, dict(zip(expert.symbols, (G, U), strict=False)))
    except activation.NotScalar as e:
        raise NoExperts(str(e)) from None
    inner = ev.shape(separate.left(down))[1]
    if len(expert.symbols) == 1:
        layout: GateUpLayout = "none"
        fits = expert.columns == (0,)
    elif len(expert.firsts) == 2:
        layout, fits = "halves", expert.columns == (0, 0)
    else:
        layout = "interleaved" if expert.columns == (0, 1) and inner > 1 else "halves"
        fits = expert.columns == ((0, 1) if layout == "interleaved" else (0, inner))
    if not fits:
        raise NoExperts(
            f"gate and up are columns {expert.columns} of the first product: neither halves nor interleaved"
        )
    return text, layout


def check_private(root: fx.Node, experts: Sequence[Expert], downs: Sequence[fx.Node]) -> None:
    """NoExperts where something between the products and the root is used elsewhere: it would be computed twice."""
    between: set[fx.Node] = {f for e in experts for f in e.firsts} | set(downs)
    inner: set[fx.Node] = {root}
    node, begin = root, min(between)
    while node is not begin:
        node = node.prev
        if any(u in inner for u in node.users):
            inner.add(node)
    for node in sorted(inner):
        if node in between or any(n in between for n in node.all_input_nodes):
            between.add(node)
            for user in node.users:
                if node is not root and user not in inner:
                    what = "saved for the backward pass or returned" if user.op == "output" else f"used by {user.name}"
                    raise NoExperts(f"the intermediate {node.name} is also {what}")


def last_row(rows: fx.Node, ev: Elements) -> tuple[fx.Node, Position]:
    """The first element of the last of rows [tokens, hidden]."""
    return rows, (ev.shape(rows)[0] - 1, 0)


def read_by(starts: Sequence[tuple[fx.Node, tuple[fx.Node, Position]]], ev: Elements) -> fx.Node:
    """The tensor [.., hidden] whose rows all products read, the nearest one that views lead to; starts: each product's rows,
    and what the first element of the last one is. Casts of one tensor, made for each product (autocast's), are one."""
    shared: dict[Any, fx.Node] | None = None
    for rows, start in starts:
        own = {_cast_of(n): n for n, idx in trail(*start, ev) if _holds_rows(n, idx, rows, ev)}
        shared = own if shared is None else {key: min(n, own[key]) for key, n in shared.items() if key in own}
    if not shared:
        raise NoExperts("the products do not read one tensor [tokens, hidden]")
    return next(iter(shared.values()))


def _cast_of(node: fx.Node) -> Any:
    return tuple(node.args[:2]) if node.target is _CAST else node


def _holds_rows(node: fx.Node, idx: Position, rows: fx.Node, ev: Elements) -> bool:
    shape = ev.shape(node)
    tokens, hidden = ev.shape(rows)
    return (
        shape[-1] == hidden
        and idx == (*(s - 1 for s in shape[:-1]), 0)
        and count(shape[:-1]) == tokens
        and node.meta["val"].dtype == rows.meta["val"].dtype
    )
