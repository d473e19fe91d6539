"""Which of a vendor's built-in activations an expression is, if any.

Two expressions in g and u are taken for one function where they agree on a grid that reaches beyond every clamp in use; a
vendor's approximation, such as tanh for erf, differs there by far more than rounding. Plain floats: a graph is being traced.
"""

import itertools
import math
from functools import lru_cache

import sympy

from braze.kernels import expression

TOLERANCE = 1e-6  # constants are written with seven digits or more
GRID = (*(0.23 * i for i in range(-20, 21)), *(3.7 * i for i in range(-11, 12)))


@lru_cache(maxsize=256)
def same(a: str, b: str) -> bool:
    """Whether two activations of g and u are the same function; not where one of them has no value somewhere."""
    try:
        return all(abs(x - y) <= TOLERANCE * (1 + abs(y)) for x, y in zip(_values(a), _values(b), strict=True))
    except (ArithmeticError, ValueError):
        return False


@lru_cache(maxsize=256)
def _values(text: str) -> tuple[float, ...]:
    own = {
        "sigmoid": lambda x: 0.5 + 0.5 * math.tanh(0.5 * x),
        **{name: expression.TORCH[name] for name in ("where_gt", "where_ge")},  # of plain numbers too
    }
    function = sympy.lambdify((expression.g, expression.u), expression.parse(text), modules=[own, "math"])
    return tuple(float(function(g, u)) for g, u in itertools.product(GRID, GRID))
