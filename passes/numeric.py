"""Expressions in float64 on pseudo-random leaves: what two ways to compute one element are compared by.

A leaf's value depends on its node's name and index alone, so that both ways see the same tensors.
"""

import math
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

from braze.passes.elements import Expr

_OPS: dict[str, Callable[..., float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b if b else math.copysign(math.inf, a),
    "floordiv": lambda a, b: a // b if b else math.nan,
    "mod": lambda a, b: a % b if b else math.nan,
    "max": max,
    "min": min,
    "neg": lambda a: -a,
    "abs": abs,
    "exp": lambda a: math.exp(min(a, 700.0)),
    "expm1": lambda a: math.expm1(min(a, 700.0)),
    "log": lambda a: math.log(a) if a > 0 else math.nan,
    "log1p": lambda a: math.log1p(a) if a > -1 else math.nan,
    "sqrt": lambda a: math.sqrt(a) if a >= 0 else math.nan,
    "rsqrt": lambda a: 1.0 / math.sqrt(a) if a > 0 else math.nan,
    "tanh": math.tanh,
    "erf": math.erf,
    "sigmoid": lambda a: 1.0 / (1.0 + math.exp(-a)) if a > -700 else 0.0,
    "cos": math.cos,
    "sin": math.sin,
    "eq": lambda a, b: float(a == b),
    "ne": lambda a, b: float(a != b),
    "lt": lambda a, b: float(a < b),
    "le": lambda a, b: float(a <= b),
    "gt": lambda a, b: float(a > b),
    "ge": lambda a, b: float(a >= b),
    "not": lambda a: float(not a),
    "where": lambda c, a, b: a if c else b,
}


def leaf(name: str, idx: Any) -> float:
    """A number in (-2, 2) that only `name` and `idx` decide."""
    digest = blake2b(f"{name}{idx}".encode(), digest_size=8).digest()
    return 4.0 * (int.from_bytes(digest, "little") + 0.5) / 2**64 - 2.0


def value(expr: Expr, memo: dict[Expr, float]) -> float:
    """The value of `expr`; NaN where it has none or an operation is not known here."""
    found = memo.get(expr)
    if found is None:
        found = memo[expr] = _compute(expr, memo)
    return found


def _compute(expr: Expr, memo: dict[Expr, float]) -> float:
    if expr.op == "const":
        return float(expr.args[0])
    if expr.op == "load":
        node, idx = expr.args
        return leaf(node.name, idx)
    op = _OPS.get(expr.op)
    return math.nan if op is None else op(*(value(a, memo) for a in expr.args))
