"""Whom two runs of a model chose: told, and forced upon a third, so that a choice that differs is not taken for an error.

Rounding in bfloat16 can reverse two nearly equal scores: another expert is then right, and the result far away. A float64
model that takes a run's own ids and weights shows what is left: the errors of everything but the choice.
"""

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Route:
    """ids and weights [T, k] of one expert layer."""

    ids: Tensor
    weights: Tensor


class AllDouble(TorchFunctionMode):  # type: ignore[misc]
    """What a model asks to be float32 is float64: its own casts do not round, nor fail on what already is float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        wide = [torch.float64 if a is torch.float32 else a for a in args]
        named = {n: torch.float64 if a is torch.float32 else a for n, a in (kwargs or {}).items()}
        return func(*wide, **named)


def watch(experts: Iterable[Any], log: list[Route]) -> None:
    """Every call of the modules is noted in `log`."""

    def note(module: Any, args: Any, kwargs: Any) -> None:
        with contextlib.suppress(StopIteration):  # chosen by a mask: no ids
            log.append(_route(args, kwargs))

    for module in experts:
        module.register_forward_pre_hook(note, with_kwargs=True)


def watch_graph(graph: fx.Graph, log: list[Route]) -> None:
    """Every expert site that the graph runs is noted in `log`."""
    sites = tuple(getattr(torch.ops.braze, n).default for n in ("moe", "moe_apart", "moe_separate"))
    for node in [n for n in graph.nodes if n.target in sites]:
        with graph.inserting_after(node):
            graph.call_function(lambda i, w: log.append(Route(i.clone(), w.clone())), (node.args[1], node.args[2]))


def force(experts: Iterable[Any], routes: Sequence[Route]) -> list[Route]:
    """The modules' next calls take `routes` in order; returned, and filled as they run: what each would have taken."""
    coming, own = iter(routes), []

    def take(module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        mine, given = _route(args, kwargs), next(coming)
        own.append(Route(mine.ids.clone(), mine.weights.clone()))

        def swapped(a: Any) -> Any:
            source = given.ids if a is mine.ids else given.weights if a is mine.weights else None
            return a if source is None else source.reshape(a.shape).to(a.dtype)

        return tuple(map(swapped, args)), {n: swapped(a) for n, a in kwargs.items()}

    for module in experts:
        module.register_forward_pre_hook(take, with_kwargs=True)
    return own


def differing(a: Sequence[Route], b: Sequence[Route]) -> int:
    """At how many (layer, token) the two chose other experts."""
    return sum(int((~_same(x, y)).sum()) for x, y in zip(a, b, strict=True))


def weight_error(got: Sequence[Route], exact: Sequence[Route]) -> float:
    """The largest difference of weights where the choices agree, relative to the largest weight."""
    worst = 0.0
    for a, b in zip(got, exact, strict=True):
        same = _same(a, b)
        off = (_ordered(a) - _ordered(b))[same].abs()
        worst = max(worst, float(off.max() / _ordered(b).abs().max()) if off.numel() else 0.0)
    return worst


def _route(args: Any, kwargs: Any) -> Route:
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    ids = next(a for a in tensors if not a.is_floating_point())
    return Route(ids, next(a for a in tensors if a.is_floating_point() and a.shape == ids.shape))


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


def _same(a: Route, b: Route) -> Tensor:
    return (_rows(a.ids).sort(-1).values == _rows(b.ids).sort(-1).values).all(-1)


def _ordered(a: Route) -> Tensor:
    """Weights by their experts' ids."""
    return _rows(a.weights).gather(1, _rows(a.ids).argsort(-1)).double()
