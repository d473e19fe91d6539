"""Which modules of a model loop over the experts that were hit, and that what computes the same takes their place.

A loop is a method (x, ids, weights) (braze.unlooping), or a forward that also chooses the experts (braze.routed).
"""

import inspect
import logging
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn

from braze.routed import routed
from braze.unlooping import ChoosesNone, KeepsLoop, unlooped

log = logging.getLogger("braze")

_METHODS_OF_TORCH = frozenset(vars(nn.Module))
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
_SIGNS = ("nonzero(", ".tolist(", ".item(", ".any(", "where(", "unique(", ".numpy(")


def is_loop(module: nn.Module, method: str = "forward") -> bool:
    """Whether the method is the module's own, takes (x, ids, weights) and looks at values to decide what to run."""
    function = getattr(type(module), method)
    decorated = method == "forward" and hasattr(function, "__wrapped__")
    if method in vars(module) or decorated or next(module.parameters(), None) is None:
        return False
    return len(_arguments(function)) == 4 and _looks_at_values(function)


def is_routed_loop(module: nn.Module) -> bool:
    """Whether the module's forward takes tokens, chooses among experts and loops over them."""
    if "forward" in vars(module) or next(module.parameters(), None) is None:
        return False
    arguments = _arguments(type(module).forward)[1:]
    needed = [p for p in arguments if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(needed) != 1:
        return False
    if any("for " in _source(f) and _looks_at_values(f) for f in _functions(module)):
        return any(isinstance(m, nn.ModuleList | nn.ModuleDict) and _alike(m) for m in module.modules()) or any(
            _names_experts(module, f) for f in _functions(module)
        )
    return any(map(_loops_with_more, module.children()))


def _loops_with_more(module: nn.Module) -> bool:
    """Whether a module's forward loops over experts and takes more than (x, ids, weights), such as the scores of all experts:
    what calls it tells what these are."""
    function = type(module).forward
    loops = "for " in _source(function) and _looks_at_values(function)
    return loops and len(_arguments(function)) > 4 and _names_experts(module, function)


def _names_experts(module: nn.Module, function: Any) -> bool:
    return "expert" in (type(module).__name__ + _source(function)).lower()


def _functions(module: nn.Module) -> list[Any]:
    return [f for k in _kinds(module) for f in vars(k).values() if inspect.isfunction(f)]


def _alike(modules: nn.Module) -> bool:
    """Whether they are more than one, of one class."""
    children = list(modules.children())
    return len(children) > 1 and len({type(child) for child in children}) == 1


def _kinds(module: nn.Module) -> list[type[nn.Module]]:
    """A module's class and its bases, but for the one of all modules."""
    return [k for k in type(module).__mro__ if k is not nn.Module and issubclass(k, nn.Module)]


def loops_of(module: nn.Module) -> list[str]:
    """The methods of a module's class that `is_loop` is true of."""
    names = {n for k in _kinds(module) for n, f in vars(k).items() if inspect.isfunction(f)}
    return sorted(n for n in names if (n not in _METHODS_OF_TORCH or n == "forward") and is_loop(module, n))


@lru_cache(maxsize=4096)  # a model has many modules of few classes
def _arguments(function: Any) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return []


def _looks_at_values(function: Any) -> bool:
    return any(sign in _source(function) for sign in _SIGNS)


def splits_by_numbers(model: nn.Module) -> bool:
    """Whether modules of `model` split rows by a list of numbers that they read with tolist(): a graph can hold that, with
    what is computed of each part, and is told to while such a model is called (`braze.fuse`)."""
    sources = [_source(f) for kind in {type(m) for m in model.modules()} for f in _called(kind)]
    return any(".tolist()" in s for s in sources) and any("split(" in s for s in sources)


def _called(kind: type[nn.Module]) -> list[Any]:
    """The forward of a class, and the functions and methods that it calls by their names."""
    found: list[Any] = [kind.forward]
    for function in found:  # which grows
        inner = inspect.unwrap(function)
        names = inner.__code__.co_names if inspect.isfunction(inner) and not _of_torch(inner) else ()
        for name in names:
            own = getattr(kind, name, None) if name not in _METHODS_OF_TORCH else None
            called = own or inner.__globals__.get(name)
            if inspect.isfunction(called) and called not in found:
                found.append(called)
    return found


def _of_torch(function: Any) -> bool:
    return str(function.__module__).partition(".")[0] == "torch"


@lru_cache(maxsize=4096)
def _source(function: Any) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""


def without_loops(model: nn.Module) -> None:
    """Replaces the loops over experts in `model`, each by what computes the same and can be captured in one graph.

    A class of transformers that can switch its experts' implementation does so; another loop's method is set on its instance,
    and `del module.forward` brings it back. What stays as it was is told in the log.
    """
    made: dict[Any, Any] = {}
    for name, module in model.named_modules():
        if _is_eager(module):
            module.config._experts_implementation = "grouped_mm"
            log.info("%s: experts implementation grouped_mm instead of eager", name)
            continue
        ways: list[tuple[str, Callable[[nn.Module], Any]]] = [
            (method, partial(unlooped, method=method)) for method in loops_of(module)
        ]
        if is_routed_loop(module):
            ways.append(("forward", routed))
        reasons = []
        for method, make in ways:
            stays = _replace(module, method, make, made)
            where = ".".join(filter(None, (name, "" if method == "forward" else method))) or type(module).__name__
            if stays is None:
                log.info("%s: its loop over experts became products that a graph holds", where)
                break
            reasons.append((logging.INFO if isinstance(stays, ChoosesNone) else logging.WARNING, where, stays))
        else:
            for level, where, why in reasons:
                log.log(level, "%s keeps its loop over experts: %s", where, why)


def _replace(
    module: nn.Module, method: str, make: Callable[[nn.Module], Any], made: dict[Any, Any]
) -> KeepsLoop | None:
    """Sets what takes the loop's place, which layers that are alike share; why not, where nothing does."""
    key = method, _likeness(module)
    try:
        if key not in made:
            made[key] = make(module)
    except KeepsLoop as e:
        return e
    except Exception as e:
        log.exception("internal error, its loop stays: %s", type(module).__name__)
        return KeepsLoop(f"internal error: {type(e).__name__}: {e}")
    setattr(module, method, made[key].of(module))
    return None


def _likeness(module: nn.Module) -> tuple[Any, ...]:
    """All that a forward depends on but for the values of parameters: classes, other attributes, names and shapes."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    return (
        tuple((n, t.shape, t.dtype, t.device) for n, t in tensors),
        tuple(
            (n, type(m), bool(m._forward_hooks or m._forward_pre_hooks), *_own(m)) for n, m in module.named_modules()
        ),
    )


def _own(module: nn.Module) -> list[Any]:
    return [(k, _valued(v)) for k, v in sorted(vars(module).items()) if k not in _OF_EVERY_MODULE]


def _valued(value: Any) -> Any:
    """Equal for equal plain values; anything else only is like itself."""
    if isinstance(value, tuple | list):
        return type(value), *map(_valued, value)
    plain = isinstance(value, int | float | str | torch.dtype | torch.device | None)
    return (type(value), value) if plain else id(value)


def _is_eager(module: nn.Module) -> Any:
    """Whether the module is of a class of transformers with a choice, and its choice is the loop."""
    decorated = hasattr(type(module).forward, "__wrapped__") and hasattr(module, "is_transposed")
    return decorated and getattr(getattr(module, "config", None), "_experts_implementation", None) == "eager"
