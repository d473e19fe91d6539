"""Floats of the program that Dynamo hands to a graph as tensors of one number, which it does under dynamic=True.

An activation with such a number in it is no text of g and u. Where a site needs one, Dynamo is told to make it a constant
(which it guards) and to capture the program again, as Inductor tells it of floats that it cannot use as tensors.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.symbolic_convert import TensorifyState


class NeedsFloats(Exception):
    """A graph's inputs, by number, that are floats which a site needs to know."""

    def __init__(self, inputs: Collection[int]) -> None:
        super().__init__(f"inputs {sorted(inputs)} have to be constants")
        self.inputs = inputs


def given(gm: fx.GraphModule) -> dict[int, Any]:
    """The floats among a captured graph's inputs, by number."""
    found = {}
    for n, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        item = getattr(node.meta.get("example_value"), "item_memo", None)
        if isinstance(item, torch.SymFloat) and item.node.hint is not None and item.node._expr.is_Symbol:
            found[n] = item
    return found


def values(floats: Mapping[int, Any]) -> dict[int, float]:
    """What they are at this call."""
    return {n: float(item.node.hint) for n, item in floats.items()}


def capture_again(floats: Mapping[int, Any], needed: Collection[int]) -> TensorifyScalarRestartAnalysis:
    """What a backend raises for Dynamo to capture the program again, with `needed` as constants."""
    for n in needed:
        TensorifyState.specialize(floats[n].node._expr.name)
    return TensorifyScalarRestartAnalysis()
