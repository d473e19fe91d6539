"""Subgraphs that are the same but for the names of their nodes: the layers of a model.

A subgraph is written down from its outputs back to its inputs: nodes numbered by first visit, each with its op, arguments,
constants, and the shapes and dtypes of what it gives. Equal texts are one computation, so what was found or proven of one
holds for the other with nodes exchanged by number.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from braze.passes import element_ops  # noqa: F401  (fills the table of HANDLERS)
from braze.passes.elements import HANDLERS

#: A subgraph with more nodes than this is looked at anew each time: writing it down would not pay.
MAX_NODES = 1024

_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True)
class Subgraph:
    """text: equal for subgraphs that are the same up to names, within one graph. nodes: by number."""

    text: tuple[Any, ...]
    nodes: tuple[fx.Node, ...]

    def number(self, node: fx.Node) -> int | None:
        """The node's number; None where it is no part of the subgraph."""
        return next((i for i, n in enumerate(self.nodes) if n is node), None)


def subgraph(
    outputs: Sequence[fx.Node], inputs: Collection[fx.Node], inside: Callable[[fx.Node], bool] = lambda n: True
) -> Subgraph | None:
    """What `outputs` are computed from, back to `inputs` and to nodes for which `inside` does not hold; None if too large.

    An input is told by what it gives alone, another node where it ends by its op as well; that it occurs twice shows in its
    number.
    """
    numbers: dict[fx.Node, int] = {}
    text: list[Any] = []

    def number(node: fx.Node) -> int:
        return numbers.setdefault(node, len(numbers))

    ends = [number(n) for n in inputs]
    starts = [number(n) for n in outputs]
    done = 0
    while done < len(numbers):
        if len(numbers) > MAX_NODES:
            return None
        for node in list(numbers)[done:]:
            done += 1
            text.append(("given",) if node in inputs else _made(node, inside, number))
            text.append(_gives(node))
    return Subgraph((tuple(ends), tuple(starts), *text), tuple(numbers))


def evaluated(node: fx.Node) -> bool:
    """Whether element-wise evaluation may look behind a node: it has a rule, or is one of an op's several results."""
    return node.target in HANDLERS or not isinstance(node.meta.get("val"), torch.Tensor)


def _made(node: fx.Node, inside: Callable[[fx.Node], bool], number: Callable[[fx.Node], int]) -> tuple[Any, ...]:
    if node.op != "call_function":
        return (node.op,)
    return (node.op, node.target, _written(node, number) if inside(node) else ())


def _written(node: fx.Node, number: Callable[[fx.Node], int]) -> tuple[Any, ...]:
    def write(arg: Any) -> Any:
        if isinstance(arg, fx.Node):
            return ("node", number(arg))
        if isinstance(arg, list | tuple):
            return tuple(map(write, arg))
        if isinstance(arg, dict):
            return tuple((k, write(v)) for k, v in arg.items())
        if isinstance(arg, slice):
            return ("slice", write(arg.start), write(arg.stop), write(arg.step))
        if isinstance(arg, _PLAIN + _SYMBOLIC):
            return (type(arg), repr(arg))  # 1, 1.0 and True are different constants
        return ("object", id(arg))

    return write(node.args), write(dict(node.kwargs))


def _gives(node: fx.Node) -> Any:
    """Shapes and dtypes of a node's value; symbolic sizes by their expressions, which name one graph's symbols."""

    def value(val: Any) -> Any:
        if isinstance(val, torch.Tensor):
            return (tuple(map(str, val.shape)), val.dtype, val.device.type)
        if isinstance(val, list | tuple):
            return tuple(map(value, val))
        return (type(val), str(val))

    return value(node.meta.get("val"))
