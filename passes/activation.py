"""The scalar function between two expert products: an element of the second's input over elements of the first's output.

Biases are part of what they are added to: g and u are the first product's columns with bias. silu's expanded form,
x / (1 + exp(-x)), becomes x * sigmoid(x), so that every spelling has one text.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import sympy
from sympy.printing.str import StrPrinter

from braze.kernels.expression import expm1, log1p, sigmoid, where_ge, where_gt
from braze.passes.elements import Expr


class NotScalar(Exception):
    """Why an expression is no activation."""


_SYMPY: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "max": sympy.Max,
    "min": sympy.Min,
    "abs": sympy.Abs,
    "exp": sympy.exp,
    "log": sympy.log,
    "sqrt": sympy.sqrt,
    "rsqrt": lambda a: 1 / sympy.sqrt(a),
    "tanh": sympy.tanh,
    "erf": sympy.erf,
    "sigmoid": sigmoid,
    "log1p": log1p,
    "expm1": expm1,
    "where_gt": where_gt,
    "where_ge": where_ge,
}
#: (the function that chooses by a comparison, whether its operands change places)
_CHOOSE = {"gt": ("where_gt", False), "ge": ("where_ge", False), "lt": ("where_gt", True), "le": ("where_ge", True)}


class _Printer(StrPrinter):  # type: ignore[misc]
    def _print_Float(self, expr: sympy.Float) -> str:
        return repr(float(expr))


def text(expr: Expr, symbols: Mapping[Expr, sympy.Symbol]) -> str:
    """The activation as text, with `symbols` for the expressions that stand for g and u; NotScalar where it is none."""
    steps: list[tuple[Any, ...]] = []
    place: dict[Expr, int] = {}

    def go(e: Expr) -> int:
        if e not in place:
            step = (symbols[e],) if e in symbols else _step(e, go)
            place[e] = len(steps)
            steps.append(step)
        return place[e]

    go(expr)
    return _text(tuple(steps))


def _step(e: Expr, go: Callable[[Expr], int]) -> tuple[Any, ...]:
    if e.op == "const":
        return ("const", type(e.args[0]), e.args[0])
    if e.op == "load":
        raise NotScalar(f"the activation depends on {e.args[0].name}")
    if e.op == "where" and e.args[0].op in _CHOOSE:
        condition, *branches = e.args
        name, swapped = _CHOOSE[condition.op]
        compared = reversed(condition.args) if swapped else condition.args
        return (name, *map(go, (*compared, *branches)))
    if e.op not in _SYMPY:
        raise NotScalar(f"the activation uses {e.op}")
    return (e.op, *map(go, e.args))


@lru_cache(maxsize=1024)
def _text(steps: tuple[tuple[Any, ...], ...]) -> str:
    """The text of the last of `steps`, which name earlier ones by number: the same for every layer, and worked out once."""
    values: list[Any] = []
    for first, *rest in steps:
        if first == "const":
            values.append(_number(rest[1]))
        elif isinstance(first, str):
            values.append(_SYMPY[first](*(values[i] for i in rest)))
        else:
            values.append(first)
    return str(_Printer().doprint(values[-1].replace(_is_logistic, lambda e: sigmoid(-_exponent(e.base)))))


def _number(value: Any) -> Any:
    if isinstance(value, float) and not value.is_integer():
        return sympy.Float(value, 17)
    return sympy.Integer(int(value)) if abs(value) < 2**53 else sympy.Float(value, 17)


def _is_logistic(e: Any) -> bool:
    return bool(e.is_Pow and e.exp == -1 and _exponent(e.base) is not None)


def _exponent(base: Any) -> Any:
    """z where base is 1 + exp(z)."""
    if base.is_Add and len(base.args) == 2:
        one, other = base.args
        if other == 1:
            one, other = other, one
        if one == 1 and isinstance(other, sympy.exp):
            return other.args[0]
    return None
