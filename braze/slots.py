"""Tensors that hold several rows of one token, such as a copy for each of its slots: which row lies where in them.

Operations that only move elements are run on the elements' numbers instead: a run of them that a row's size long is, in order,
was that row. Rows times constants that are 1 or 0, and sums of rows of which one is not zero, stay rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

_MOVES = {
    "alias", "cat", "clone", "copy", "detach", "expand", "gather", "index", "index_copy", "index_put", "index_select",
    "masked_scatter", "masked_select", "permute", "repeat", "reshape", "scatter", "select", "slice", "squeeze", "stack", "t",
    "transpose", "unsqueeze", "view", "_unsafe_view",
}  # fmt: skip


class Other(Enum):
    """What a row is that nothing recorded leads to."""

    ZERO = "zero"
    UNKNOWN = "unknown"


Row = fx.Node | Other


@dataclass(frozen=True)
class Held:
    """The rows of a tensor. at: for each of its elements the number among the rows' own; None where they are in order."""

    rows: tuple[Row, ...]
    at: Tensor | None = None


def moved(
    func: Any, name: str, args: Any, kwargs: Any, width: int, held: Callable[[Tensor], Held | None]
) -> Held | None:
    """What the result holds where the operation only moves the elements of whole rows; None otherwise."""
    if name.removesuffix("_") not in _MOVES or (name.startswith("index_put") and args[3:] == (True,)):
        return None
    sources: list[Row] = []

    def numbered(a: Any) -> Any:
        if not isinstance(a, Tensor) or not a.is_floating_point():
            return a
        first, found = len(sources) * width, held(a)
        sources.extend(found.rows if found is not None else [Other.UNKNOWN] * -(-a.numel() // width))
        at = torch.arange(a.numel(), device=a.device) if found is None or found.at is None else found.at
        return at.reshape(a.shape) + first

    given = tree_map(numbered, (args, kwargs))
    out = func(*given[0], **given[1])
    if not isinstance(out, Tensor) or out.numel() % width:
        return None
    at = None
    if not _in_runs(out, width):
        out, order = out.flatten().sort()
        if not _in_runs(out, width):
            return None
        at = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return Held(tuple(sources[n] for n in (out.reshape(-1, width)[:, 0] // width).tolist()), at)


def _in_runs(numbers: Tensor, width: int) -> bool:
    """Whether elements lie as whole rows, one after the other."""
    runs = numbers.reshape(-1, width)
    first = runs[:, :1]
    return not bool((first % width).any()) and torch.equal(runs, first + torch.arange(width, device=runs.device))


def scaled(rows: Sequence[Row], factors: Tensor) -> tuple[Row, ...] | None:
    """The rows times constants [rows, .] that are 1 or 0 for a row; None where they are not."""
    made: list[Row] = []
    for row, factor in zip(rows, factors, strict=True):
        if bool((factor == 0).all()):
            made.append(Other.ZERO)
        elif bool((factor == 1).all()):
            made.append(row)
        else:
            return None
    return tuple(made)


def summed(rows: Sequence[Row]) -> tuple[Row] | None:
    """The sum of rows of which at most one is not zero; None where more are not."""
    there = [r for r in rows if r is not Other.ZERO]
    if len(there) > 1 or Other.UNKNOWN in there:
        return None
    return (there[0] if there else Other.ZERO,)


def added(rows: Sequence[Row], index: Tensor, source: Tensor, out: Tensor) -> tuple[Row, ...] | None:
    """The rows of out after the rows of source were added to it, each at its index; None where they did not come to zeros."""
    found: list[Row] = []
    for place, value in enumerate(out.reshape(-1, source.shape[-1])):
        mine = [n for n, to in enumerate(index.tolist()) if to == place]
        total = summed([rows[n] for n in mine])
        if total is None or not torch.equal(value, source[mine].sum(0)):
            return None
        found += total
    return tuple(found)
