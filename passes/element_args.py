"""How the table of ops reads a node: an argument however it was passed, a node that must be a tensor, an index without its
complex part."""

from typing import Any

from torch import fx

from braze.passes.elements import Position, is_complex


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An op's argument, however it was passed."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def tensor_of(node: Any) -> fx.Node:
    """The argument, which is a tensor's node."""
    assert isinstance(node, fx.Node)
    return node


def split_part(node: fx.Node, idx: Position) -> tuple[Position, Position]:
    """(index of the tensor's dimensions, index of the complex part)."""
    return (idx[:-1], idx[-1:]) if is_complex(node) else (idx, ())
