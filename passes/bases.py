"""Rows that are added up over a tensor that holds something already, shared experts' results for instance, are added up over
zeros first:

    scatter_add(base, places, rows)  =  base + scatter_add(0, places, rows)

What no site took is put together again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from braze.passes.combine import adds_rows
from braze.passes.elements import Elements, Sizes, is_empty
from braze.passes.separate import called

aten = torch.ops.aten


@dataclass(frozen=True)
class Apart:
    """total = base + added, where `added` adds up rows over zeros."""

    base: fx.Node
    added: fx.Node
    total: fx.Node


def take_apart(graph: fx.Graph) -> list[Apart]:
    """Takes what rows are added up over out of each sum that has something there."""
    ev = Elements(Sizes())
    return [_apart(n) for n in list(graph.nodes) if n.op == "call_function" and adds_rows(n) and _holds(n, ev)]


def put_together(apart: Sequence[Apart]) -> None:
    """Puts it back where the sum is still there as it was."""
    for a in apart:
        if a.added._erased or a.total._erased or not a.total.users or a.total.args != (a.base, a.added):
            continue
        zeros: Any = a.added.args[0]
        a.added.args = (a.base, *a.added.args[1:])
        a.total.replace_all_uses_with(a.added)
        a.total.graph.erase_node(a.total)
        a.added.graph.erase_node(zeros)


def _holds(node: fx.Node, ev: Elements) -> bool:
    """Whether what a node adds rows to, [rows, columns] of floating point, is not known to be constant."""
    base: Any = node.args[0]
    val = base.meta["val"]
    return val.is_floating_point() and val.ndim == 2 and not is_empty(base) and ev.at(base, (0, 0)).const is None


def _apart(node: fx.Node) -> Apart:
    base: Any = node.args[0]
    val = base.meta["val"]
    kwargs = {"dtype": val.dtype, "device": val.device, "pin_memory": False}
    with node.graph.inserting_before(node):
        zeros = node.graph.call_function(aten.full.default, ([_size(base, d) for d in range(val.ndim)], 0), kwargs)
    zeros.meta = {**node.meta, "val": val.new_zeros(val.shape)}
    with node.graph.inserting_after(node):
        total = node.graph.call_function(aten.add.Tensor, (base, node))
    total.meta = dict(node.meta)
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    node.args = (zeros, *node.args[1:])
    return Apart(base, node, total)


def _size(base: fx.Node, d: int) -> Any:
    """A size as the graph has it: a number, the node that is that symbol, or the size of the first tensor that has it, the
    tokens say. What the rows are added up over is not asked, since it is no part of the block."""
    size = base.meta["val"].shape[d]
    if isinstance(size, int):
        return size
    for node in base.graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, torch.SymInt) and val.node.expr == size.node.expr and node < base:
            return node
        if isinstance(val, torch.Tensor) and val.ndim == base.meta["val"].ndim:
            other = val.shape[d]
            if node is base or (isinstance(other, torch.SymInt) and other.node.expr == size.node.expr):
                return called(aten.sym_size.int, node, d)
    raise AssertionError(f"{base.name} is not in its graph")
