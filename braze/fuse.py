"""`braze.fuse`: torch.compile with this backend, as a decorator of a class, a function or an instance."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, overload

import torch
from torch import nn

from braze import scalars
from braze.loops import splits_by_numbers, without_loops
from braze.options import Options

T = TypeVar("T")


@overload
def fuse(target: T, /) -> T: ...
@overload
def fuse(
    *, mode: str | None = None, dynamic: bool | None = None, fullgraph: bool = False, **options: Any
) -> Callable[[T], T]: ...


def fuse(
    target: Any = None,
    /,
    *,
    mode: str | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    **options: Any,
) -> Any:
    """Compiles `target` with backend="braze" at its first call.

    target: an nn.Module subclass (each instance's forward is compiled, in place: its type, parameters, state dict and pickles
        stay), an nn.Module instance (compiled in place and returned; loops over experts that a graph cannot hold are replaced,
        see `braze.loops`), or a function (its compiled form is returned).
    mode, dynamic, fullgraph: as torch.compile's. options: the backend's (`braze.options`), for instance require=["moe"].
    TypeError where `target` is something else; ValueError for a bad option or mode, at once.
    """
    Options.parse(options, mode)
    chosen = {k: v for k, v in (("mode", mode), ("options", options or None)) if v is not None}
    compile_ = functools.partial(torch.compile, backend=_backend(chosen), dynamic=dynamic, fullgraph=fullgraph)

    def apply(t: Any) -> Any:
        if isinstance(t, type) and issubclass(t, nn.Module):
            return _fuse_class(t, compile_)
        if isinstance(t, nn.Module):
            without_loops(t)
            t.compile(backend=_backend(chosen), dynamic=dynamic, fullgraph=fullgraph)
            if splits_by_numbers(t):
                t._compiled_call_impl = _with_numbers(t._compiled_call_impl)  # type: ignore[assignment]
            return t
        if isinstance(t, type) or not callable(t):
            raise TypeError(f"braze.fuse takes an nn.Module class, an instance of one, or a function, not {t!r}")
        return compile_(t)

    return apply if target is None else apply(target)


def _with_numbers(call: Any) -> Callable[..., Any]:
    """`call`, captured with the numbers that it reads from tensors."""

    def compiled(*args: Any, **kwargs: Any) -> Any:
        with scalars.capturing():
            return call(*args, **kwargs)

    return compiled


def _backend(chosen: dict[str, Any]) -> Callable[..., Any]:
    """The backend with its settings bound: torch.compile takes either a mode or options, the backend both."""
    from braze.backend import braze

    return functools.partial(braze, **chosen) if chosen else braze


def _fuse_class(cls: type[nn.Module], compile_: Callable[[Any], Any]) -> type[nn.Module]:
    cls.forward = compile_(cls.forward)  # type: ignore[method-assign]
    return cls
