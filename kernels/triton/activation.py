"""An activation's text as a Triton function of (g, u), generated once for each text.

A kernel calls its global `activation`; each text makes a copy of the kernel with that global bound to the generated function,
which Triton's caches then know by its source, as they do every function that a kernel calls.
"""

import hashlib
import linecache
import math
import types
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from braze.kernels.expression import emit, parse

Value = float | str  # a constant, or Triton source


def _call(source: str, constant: Callable[[float], float]) -> Callable[[Value], Value]:
    return lambda a: constant(a) if isinstance(a, float) else source.format(a)


def _extreme(name: str, constant: Callable[[float, float], float]) -> Callable[[Value, Value], Value]:
    def apply(a: Value, b: Value) -> Value:
        if isinstance(a, float) and isinstance(b, float):
            return constant(a, b)
        return f"tl.{name}({a}, {b}, propagate_nan=tl.PropagateNan.ALL)"

    return apply


def _infix(operator: str, constant: Callable[[float, float], float]) -> Callable[[Value, Value], Value]:
    def apply(a: Value, b: Value) -> Value:
        return constant(a, b) if isinstance(a, float) and isinstance(b, float) else f"({a} {operator} {b})"

    return apply


def _where(operator: str, holds: Callable[[float, float], bool]) -> Callable[..., Value]:
    def apply(x: Value, y: Value, a: Value, b: Value) -> Value:
        if isinstance(x, float) and isinstance(y, float):
            return a if holds(x, y) else b
        return f"tl.where({x} {operator} {y}, {a}, {b})"

    return apply


def _power(a: Value, n: int) -> Value:
    return a**n if isinstance(a, float) else "(" + " * ".join([a] * n) + ")"


TRITON: dict[str, Callable[..., Value]] = {
    "add": _infix("+", lambda a, b: a + b),
    "mul": _infix("*", lambda a, b: a * b),
    "div": _infix("/", lambda a, b: a / b),
    "neg": lambda a: -a if isinstance(a, float) else f"(-{a})",
    "pow": _power,
    "const": float,
    "sigmoid": _call("tl.sigmoid({})", lambda a: 1 / (1 + math.exp(-a))),
    "exp": _call("tl.exp({})", math.exp),
    "log": _call("tl.log({})", math.log),
    "tanh": _call("(2.0 * tl.sigmoid(2.0 * {}) - 1.0)", math.tanh),
    "erf": _call("tl.erf({})", math.erf),
    "sqrt": _call("tl.sqrt({})", math.sqrt),
    "Abs": _call("tl.abs({})", abs),
    "Min": _extreme("minimum", min),
    "Max": _extreme("maximum", max),
    # Near 0, where 1 + x loses x, three terms of the series; Triton has neither function on every device.
    "log1p": _call(
        "tl.where(tl.abs({0}) < 0.01, {0} * (1.0 - {0} * (0.5 - {0} / 3.0)), tl.log(1.0 + {0}))", math.log1p
    ),
    "expm1": _call(
        "tl.where(tl.abs({0}) < 0.01, {0} * (1.0 + {0} * (0.5 + {0} / 6.0)), tl.exp({0}) - 1.0)", math.expm1
    ),
    "where_gt": _where(">", lambda x, y: x > y),
    "where_ge": _where(">=", lambda x, y: x >= y),
}


def source(text: str) -> str:
    """Triton source of the activation, in float32; ValueError or NotImplementedError where there is none."""
    value = emit(parse(text), TRITON, {"g": "g", "u": "u"})
    return f"g * 0.0 + {value!r}" if isinstance(value, float) else str(value)


@lru_cache(maxsize=256)
def bind(kernel: Any, text: str) -> Any:
    """A copy of a @triton.jit kernel whose global `activation` is this one, a function of float32 blocks g and u; so it is in
    the functions that the kernel calls."""
    import triton
    import triton.language as tl

    code = f"def activation(g, u):\n    return {source(text)}\n"
    file = f"<braze activation {hashlib.sha256(code.encode()).hexdigest()[:16]}>"
    linecache.cache[file] = (len(code), None, code.splitlines(keepends=True), file)  # where triton.jit reads it
    namespace: dict[str, Any] = {"tl": tl, "__name__": "braze.activation"}
    exec(compile(code, file, "exec"), namespace)
    return _bound(kernel, triton.jit(namespace["activation"]))


def _bound(function: Any, activation: Any) -> Any:
    """The @triton.jit function with `activation` in place of its own global, and of those of what it calls."""
    import triton

    fn = function.fn
    replaced = {}
    for name in fn.__code__.co_names:
        called = fn.__globals__.get(name)
        if name == "activation":
            replaced[name] = activation
        elif isinstance(called, triton.JITFunction) and "activation" in called.fn.__code__.co_names:
            replaced[name] = _bound(called, activation)
    copy = types.FunctionType(fn.__code__, {**fn.__globals__, **replaced}, fn.__name__)
    copy.__module__, copy.__qualname__, copy.__doc__ = fn.__module__, fn.__qualname__, fn.__doc__
    copy.__annotations__ = fn.__annotations__
    return triton.jit(copy)
