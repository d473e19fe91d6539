"""The scalar function between the two expert products, as text: "g*u*sigmoid(g)".

Text travels in the op's schema and in cache keys; here it becomes sympy, and from sympy code in any language:
`emit` walks the expression once and asks a table of the target language's spellings for each operation.
"""

import ast
import math
from collections.abc import Callable, Mapping
from functools import lru_cache, reduce
from typing import Any

import sympy
import torch

g, u = sympy.symbols("g u", real=True)


class sigmoid(sympy.Function):  # type: ignore[misc]
    """1 / (1 + exp(-x)), kept whole: its expanded form invites rewrites that overflow."""

    nargs = 1


class log1p(sympy.Function):  # type: ignore[misc]
    """log(1 + x), kept whole: near 0 the sum would lose x."""

    nargs = 1


class expm1(sympy.Function):  # type: ignore[misc]
    """exp(x) - 1, kept whole as `log1p`."""

    nargs = 1


class where_gt(sympy.Function):  # type: ignore[misc]
    """(x, y, a, b): a where x > y, else b; kept whole, as a branch that is not taken may have no value."""

    nargs = 4


class where_ge(sympy.Function):  # type: ignore[misc]
    """(x, y, a, b): a where x >= y, else b."""

    nargs = 4


FUNCTIONS: dict[str, Any] = {
    "sigmoid": sigmoid,
    "log1p": log1p,
    "expm1": expm1,
    "where_gt": where_gt,
    "where_ge": where_ge,
    "exp": sympy.exp,
    "log": sympy.log,
    "tanh": sympy.tanh,
    "erf": sympy.erf,
    "sqrt": sympy.sqrt,
    "Abs": sympy.Abs,
    "Min": sympy.Min,
    "Max": sympy.Max,
}


@lru_cache(maxsize=256)
def parse(text: str) -> sympy.Expr:
    """The sympy expression of an activation's text; ValueError where the text is anything else than one."""
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError as e:
        raise ValueError(f"not an activation: {text!r} ({e.msg})") from None
    return _build(tree.body, text)


def _build(node: ast.expr, text: str) -> sympy.Expr:
    match node:
        case ast.Constant(value=bool()):
            pass
        case ast.Constant(value=int() | float() as v):
            return sympy.Integer(v) if isinstance(v, int) else sympy.Float(v, 17)
        case ast.Name(id="g"):
            return g
        case ast.Name(id="u"):
            return u
        case ast.UnaryOp(op=ast.USub(), operand=a):
            return -_build(a, text)
        case ast.BinOp(left=a, op=op, right=b):
            x, y = _build(a, text), _build(b, text)
            match op:
                case ast.Add():
                    return x + y
                case ast.Sub():
                    return x - y
                case ast.Mult():
                    return x * y
                case ast.Div():
                    return x / y
                case ast.Pow():
                    return x**y
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
            return FUNCTIONS[name](*(_build(a, text) for a in args))
    raise ValueError(f"not an activation: {text!r} (at {ast.unparse(node)!r}; known: g, u, {', '.join(FUNCTIONS)})")


def emit(expr: sympy.Expr, ops: Mapping[str, Callable[..., Any]], leaves: Mapping[str, Any]) -> Any:
    """Builds `expr` in another language.

    ops: add, mul, div, neg, pow (base, int exponent), const (float) and each name of FUNCTIONS (Min and Max of
    two), as functions on the target's values (strings, tensors ...); leaves: the target's values of g and u.
    NotImplementedError where the expression needs an operation that `ops` lacks.
    """

    def go(e: sympy.Expr) -> Any:
        if e.is_Symbol:
            return leaves[e.name]
        if e.is_Number:
            return need("const")(float(e))
        if e.is_Add:
            return reduce(need("add"), map(go, e.args))
        if e.is_Mul:
            num, den = _fraction(e)
            sign = num and num[0] == -1
            value = (
                reduce(need("mul"), map(go, num[1:] if sign else num)) if num[bool(sign) :] else go(sympy.Integer(1))
            )
            if den:
                value = need("div")(value, reduce(need("mul"), map(go, den)))
            return need("neg")(value) if sign else value
        if e.is_Pow:
            base, exponent = e.args
            if exponent == sympy.Rational(1, 2):
                return need("sqrt")(go(base))
            if exponent.is_Integer and exponent > 0:
                return need("pow")(go(base), int(exponent))
            if exponent.is_negative:
                return need("div")(go(sympy.Integer(1)), go(base**-exponent))
            raise NotImplementedError(f"power {exponent}")
        name = type(e).__name__
        if name in ("Min", "Max"):
            return reduce(need(name), map(go, e.args))
        return need(name)(*map(go, e.args))

    def need(name: str) -> Callable[..., Any]:
        if name not in ops:
            raise NotImplementedError(f"{name} in {expr}")
        return ops[name]

    return go(expr)


def _fraction(e: sympy.Mul) -> tuple[list[sympy.Expr], list[sympy.Expr]]:
    """Factors above and below the line, a leading -1 first."""
    num, den = [], []
    for a in e.args:
        if a.is_Pow and a.args[1].is_negative:
            den.append(a.args[0] ** -a.args[1])
        else:
            num.append(a)
    return num, den


TORCH: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "pow": lambda a, n: a**n,
    "const": float,
    "sigmoid": torch.sigmoid,
    "exp": torch.exp,
    "log": torch.log,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "sqrt": lambda a: math.sqrt(a) if isinstance(a, float) else torch.sqrt(a),
    "Abs": torch.abs,
    "Min": lambda a, b: _clamp(a, b, torch.minimum, min),
    "Max": lambda a, b: _clamp(a, b, torch.maximum, max),
    "log1p": torch.log1p,
    "expm1": torch.expm1,
    "where_gt": lambda x, y, a, b: _where(x > y, a, b),
    "where_ge": lambda x, y, a, b: _where(x >= y, a, b),
}


def _where(condition: Any, a: Any, b: Any) -> Any:
    if isinstance(condition, bool):
        return a if condition else b
    return torch.where(condition, a, b)


def _clamp(a: Any, b: Any, tensors: Callable[..., Any], floats: Callable[..., Any]) -> Any:
    if isinstance(a, float) and isinstance(b, float):
        return floats(a, b)
    if isinstance(a, float):
        a, b = b, a
    if isinstance(b, float):
        b = torch.full((), b, dtype=a.dtype, device=a.device)
    return tensors(a, b)


def apply_torch(text: str, gate: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    """The activation of `gate` and `up` (same shape, any floating dtype), with torch ops in their dtype."""
    result = emit(parse(text), TORCH, {"g": gate, "u": up})
    return result if isinstance(result, torch.Tensor) else torch.full_like(gate, result)
