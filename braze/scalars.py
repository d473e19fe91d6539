"""Sizes that a program reads from a tensor with tolist(), to split rows by them: a graph breaks there, with the experts behind.

Dynamo is told to capture the program again and to hold such numbers (capture_scalar_outputs), as long as this one frame is
compiled. Where the passes then make grouped products of all that is split, nothing reads the numbers any more
(braze.passes.splits); anywhere else the program is captured once more as it was, with the break.
"""

import contextlib
import linecache
from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import fx
from torch._dynamo.callback import CallbackArgs, callback_handler
from torch._dynamo.exc import TensorifyScalarRestartAnalysis, UnspecializeRestartAnalysis
from torch._guards import CompileContext

from braze import breaks
from braze.passes.sites import NearMiss

#: What `capture_scalar_outputs` was before each time that a frame's compilation set it; empty while none has.
_before: list[bool] = []
#: How many calls run that have numbers captured from the start.
_within = 0
#: The compilations of frames that are captured with their breaks after all, and what held them back.
_given_up: WeakKeyDictionary[CompileContext, tuple[NearMiss, ...]] = WeakKeyDictionary()


class CaptureAgain(UnspecializeRestartAnalysis, TensorifyScalarRestartAnalysis):
    """What a backend raises for Dynamo to capture the program again: with the first it forgets where it broke, and the second
    passes through what calls a backend."""


class StillRead(Exception):
    """That a graph reads numbers from tensors after the passes; misses: of its experts."""

    def __init__(self, misses: Sequence[NearMiss]) -> None:
        super().__init__("numbers are read from tensors still")
        self.misses = tuple(misses)


def break_at_sizes(gm: fx.GraphModule) -> bool:
    """Whether a captured graph ended where the program reads a list of numbers from a tensor, and may be captured again."""
    ended = breaks.end(gm)
    if ended is None or captured():
        return False
    now = CompileContext.try_get()
    if now is None or now in _given_up:
        return False
    if not any(sign in ended.reason for sign in ("_local_scalar_dense", "Tensor.item()")) or not ended.user_stack:
        return False
    at = ended.user_stack[-1]
    return ".tolist(" in linecache.getline(at.filename, at.lineno)


def captured() -> bool:
    """Whether the frame that is compiled holds numbers read from tensors because of this module."""
    return bool(torch._dynamo.config.capture_scalar_outputs and (_before or _within))


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """What is compiled within is captured with the numbers that it reads, from the start."""
    global _within
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        _within += 1
        try:
            yield
        finally:
            _within -= 1


def capture() -> CaptureAgain:
    """To raise, for the program to be captured with the numbers that it reads."""
    _set(True)
    return CaptureAgain(restart_reason="sizes that are read from a tensor become a part of the graph")


def give_up(misses: Sequence[NearMiss]) -> CaptureAgain:
    """To raise, for the program to be captured with its breaks."""
    _set(False)
    _given_up[CompileContext.get()] = tuple(misses)
    return CaptureAgain(restart_reason="sizes that are read from a tensor end the graph")


def held_back() -> tuple[NearMiss, ...]:
    """The near misses of the graph with the numbers, once: for the report of the graph that took its place."""
    now = CompileContext.try_get()
    misses = _given_up.get(now, ()) if now is not None else ()
    if now is not None and misses:
        _given_up[now] = ()
    return misses


def check(graph: fx.Graph, misses: Sequence[NearMiss]) -> None:
    """StillRead where the passes left anything in a graph that reads numbers."""
    if captured() and any(n.target is torch.ops.aten._local_scalar_dense.default for n in graph.nodes):
        raise StillRead(misses)


def _set(value: bool) -> None:
    """Sets `capture_scalar_outputs` until the frame's compilation ends."""
    if _restore not in callback_handler.end_callbacks:
        callback_handler.register_end_callback(_restore)
    _before.append(torch._dynamo.config.capture_scalar_outputs)
    torch._dynamo.config.capture_scalar_outputs = value


def _restore(_: CallbackArgs | None = None) -> None:
    """Sets `capture_scalar_outputs` to what it was."""
    while _before:
        torch._dynamo.config.capture_scalar_outputs = _before.pop()
