"""Polynomials over loaded elements: sums of products, each product a sorted tuple of atoms with a constant before it.

Enough algebra for rotations (linear in x, coefficients are table elements) and for combining expert rows, without
the cost of a general symbolic package.
"""

from braze.passes.elements import Expr

Monomial = tuple[Expr, ...]
Polynomial = dict[Monomial, float]

#: More terms than this means that the expression is no rotation and no sum of expert rows.
MAX_TERMS = 4096


class TooLarge(Exception):
    """The expression has too many terms to be of interest."""


def polynomial(expr: Expr, memo: dict[Expr, Polynomial] | None = None) -> Polynomial:
    """Expands add, sub, neg, mul and division by constants; every other operation is an atom."""
    memo = {} if memo is None else memo
    found = memo.get(expr)
    if found is None:
        found = memo[expr] = _expand(expr, memo)
        if len(found) > MAX_TERMS:
            raise TooLarge("too many terms in an element")
    return found


def _expand(expr: Expr, memo: dict[Expr, Polynomial]) -> Polynomial:
    if expr.op == "const":
        value = expr.args[0]
        return {(): float(value)} if value else {}
    if expr.op in ("add", "sub"):
        out = dict(polynomial(expr.args[0], memo))
        sign = 1.0 if expr.op == "add" else -1.0
        for atoms, c in polynomial(expr.args[1], memo).items():
            out[atoms] = out.get(atoms, 0.0) + sign * c
        return {m: c for m, c in out.items() if c}
    if expr.op == "neg":
        return {m: -c for m, c in polynomial(expr.args[0], memo).items()}
    if expr.op == "mul":
        a, b = polynomial(expr.args[0], memo), polynomial(expr.args[1], memo)
        if len(a) * len(b) > MAX_TERMS:
            raise TooLarge("too many terms in an element")
        out = {}
        for m, c in a.items():
            for n, d in b.items():
                key = tuple(sorted(m + n, key=id))
                out[key] = out.get(key, 0.0) + c * d
        return {m: c for m, c in out.items() if c}
    if expr.op == "div" and expr.args[1].const:
        return {m: c / expr.args[1].const for m, c in polynomial(expr.args[0], memo).items()}
    return {(expr,): 1.0}
