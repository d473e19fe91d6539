"""Element-wise evaluation: the value of one element of a node, as an expression over elements of leaf nodes.

A view, slice, cat or gather only moves elements, so at a concrete index it is index arithmetic; pointwise ops combine
elements. What is neither (a product, a reduction over many, an input) is a leaf. Nothing is materialised, so the
cost does not depend on tensor sizes. Expressions are hash-consed: equal expressions are one object.

An index is an int, or an expression where a tensor of integers chooses the element (`x[perm[3]]`). Casts between
floating dtypes are transparent: meaning, not rounding, is what is compared.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import fx

Index = "int | Expr"
Position = tuple[Any, ...]

#: Where a node that stacks tensors says that it is a name for their list alone (braze.passes.separate): it is a leaf.
LIST = "braze_list"
#: A sum over more elements than this is a leaf.
MAX_SUM = 512


class Unknown(Exception):
    """A size or an index that cannot be told at compile time."""


class Expr:
    """A hash-consed expression: op and args (Exprs, or plain data where op is "const" or "load")."""

    __slots__ = ("args", "op")

    def __init__(self, op: str, args: tuple[Any, ...]) -> None:
        self.op = op
        self.args = args

    def __repr__(self) -> str:
        if self.op == "const":
            return repr(self.args[0])
        if self.op == "load":
            node, idx = self.args
            return f"{node.name}[{', '.join(map(str, idx))}]"
        return f"{self.op}({', '.join(map(str, self.args))})"

    @property
    def const(self) -> Any:
        """The value of a constant, else None."""
        return self.args[0] if self.op == "const" else None


class Sizes:
    """Concrete values of symbolic sizes: hints of the graph's shape environment, or another binding of its symbols."""

    def __init__(self, binding: Mapping[sympy.Symbol, int] | None = None) -> None:
        self.binding = dict(binding or {})

    def of(self, value: Any) -> int:
        """An int, SymInt, or node that holds one -> int; Unknown where it has no value."""
        if isinstance(value, fx.Node):
            value = value.meta.get("val")
        if isinstance(value, torch.SymInt):
            expr = value.node.expr
            bound = expr.subs(self.binding)
            if bound.is_Integer:
                return int(bound)
            if value.node.hint is None or self.binding.keys() & expr.free_symbols:
                raise Unknown(f"size {expr}")
            return int(value.node.hint)
        if isinstance(value, bool) or not isinstance(value, int):
            raise Unknown(f"size {value!r}")
        return value

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor):
            raise Unknown(f"{node.name} is no tensor")
        return tuple(self.of(s) for s in val.shape)


Handler = Callable[["Elements", fx.Node, Position], "Expr | None"]
HANDLERS: dict[Any, Handler] = {}


def handles(*targets: Any) -> Callable[[Handler], Handler]:
    """Registers how an element of a node with one of `targets` is made; the handler answers None for a leaf."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(targets, handler))
        return handler

    return register


class Elements:
    """Evaluates elements of a graph's nodes under one binding of sizes; nodes for which `stop` holds are leaves."""

    def __init__(
        self,
        sizes: Sizes | None = None,
        stop: Callable[[fx.Node], bool] = lambda n: False,
        indices: "Elements | None" = None,
        also: Mapping[Any, Handler] | None = None,
    ) -> None:
        self.sizes = sizes or Sizes()
        self.stop = stop
        #: Handlers of ops that are leaves otherwise.
        self.also = also or {}
        #: Evaluates the integer tensors that choose elements, for which `stop` does not hold.
        self.indices = indices or self
        self._interned: dict[Any, Expr] = indices._interned if indices else {}
        self._memo: dict[tuple[fx.Node, Position], Expr] = {}
        self._shapes: dict[fx.Node, tuple[int, ...]] = {}

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        if node not in self._shapes:
            self._shapes[node] = self.sizes.shape(node)
        return self._shapes[node]

    def make(self, op: str, *args: Any) -> Expr:
        """The expression op(args), simplified where it is constant or neutral."""
        folded = _fold(op, args)
        if folded is not None:
            return folded if isinstance(folded, Expr) else self.const(folded)
        key = (op, args)
        found = self._interned.get(key)
        if found is None:
            found = self._interned[key] = Expr(op, args)
        return found

    def const(self, value: Any) -> Expr:
        key = ("const", type(value), value)
        found = self._interned.get(key)
        if found is None:
            found = self._interned[key] = Expr("const", (value,))
        return found

    def load(self, node: fx.Node, idx: Position) -> Expr:
        key = ("load", node, idx)
        found = self._interned.get(key)
        if found is None:
            found = self._interned[key] = Expr("load", (node, idx))
        return found

    def at(self, node: Any, idx: Position) -> Expr:
        """The element of `node` at `idx`; a number is its own element. A complex node's index ends in "re" or "im"."""
        if not isinstance(node, fx.Node):
            if isinstance(node, torch.SymInt):
                return self.const(self.sizes.of(node))
            return self.const(node)
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor):
            return self.const(self.sizes.of(node))
        key = (node, idx)
        found = self._memo.get(key)
        if found is None:
            found = self._memo[key] = self._evaluate(node, idx)
        return found

    def _evaluate(self, node: fx.Node, idx: Position) -> Expr:
        if is_empty(node):
            raise Unknown(f"an element of {node.name}, which has none")
        if node.op != "call_function" or self.stop(node):
            return self.load(node, idx)
        handler = self.also.get(node.target) or HANDLERS.get(node.target)
        try:
            found = handler(self, node, idx) if handler else None
        except Unknown:
            found = None
        return self.load(node, idx) if found is None else found

    def operand(self, arg: Any, node: fx.Node, idx: Position) -> Expr:
        """The element of an operand that is broadcast to node's shape, at node's index; complex parts are kept."""
        if not isinstance(arg, fx.Node) or not isinstance(arg.meta.get("val"), torch.Tensor):
            return self.at(arg, ())
        if is_complex(node):
            idx = idx if is_complex(arg) else idx[:-1]
            parts, idx = (idx[-1:], idx[:-1]) if is_complex(arg) else ((), idx)
        else:
            parts = ()
        shape = self.shape(arg)
        offset = len(idx) - len(shape)
        return self.at(arg, tuple(0 if s == 1 else idx[offset + i] for i, s in enumerate(shape)) + parts)

    # Index arithmetic, on ints and on expressions alike.
    def i_add(self, a: Any, b: Any) -> Any:
        return a + b if isinstance(a, int) and isinstance(b, int) else self.index(self.make("add", *self._boxed(a, b)))

    def i_mul(self, a: Any, b: Any) -> Any:
        return a * b if isinstance(a, int) and isinstance(b, int) else self.index(self.make("mul", *self._boxed(a, b)))

    def i_divmod(self, a: Any, b: int) -> tuple[Any, Any]:
        if isinstance(a, int):
            return divmod(a, b)
        x, y = self._boxed(a, b)
        return self.index(self.make("floordiv", x, y)), self.index(self.make("mod", x, y))

    def _boxed(self, *values: Any) -> list[Expr]:
        return [v if isinstance(v, Expr) else self.const(v) for v in values]

    def pick(self, node: fx.Node, idx: Position) -> Any:
        """The index that an integer tensor's element makes: an int where it is constant."""
        return self.index(self.indices.at(node, idx))

    def index(self, expr: Expr) -> Any:
        """An expression as an index: an int where it is constant."""
        value = expr.const
        return expr if value is None else int(value)


def is_empty(node: fx.Node) -> bool:
    """Whether a tensor has no elements, whatever its symbolic sizes are."""
    return any(isinstance(s, int) and s == 0 for s in node.meta["val"].shape)


def is_complex(node: fx.Node) -> bool:
    return bool(node.meta["val"].is_complex())


def leaves(exprs: Iterable[Expr]) -> list[Expr]:
    """The loads that occur in `exprs`, each once, in order of first occurrence (indices of loads not searched)."""
    seen: dict[Expr, None] = {}
    found: dict[Expr, None] = {}
    stack = list(exprs)[::-1]
    while stack:
        e = stack.pop()
        if e in seen or not isinstance(e, Expr):
            continue
        seen[e] = None
        if e.op == "load":
            found[e] = None
        elif e.op != "const":
            stack.extend(reversed(e.args))
    return list(found)


def subexpressions(expr: Expr) -> Iterator[Expr]:
    """The expression and all it is made of, but for constants and loads, each once."""
    seen: set[Expr] = set()
    stack = [expr]
    while stack:
        e = stack.pop()
        if e in seen or e.op in ("const", "load"):
            continue
        seen.add(e)
        yield e
        stack.extend(e.args)


_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "max": max,
    "min": min,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


def _fold(op: str, args: tuple[Any, ...]) -> Any:
    """The value of a constant expression, or the operand that a neutral one equals; None where it stays."""
    if not all(isinstance(a, Expr) for a in args):
        return None
    values = [a.const for a in args]
    if op in _BINARY and len(args) == 2:
        a, b = values
        if a is not None and b is not None:
            return None if op in ("floordiv", "mod") and b == 0 else _BINARY[op](a, b)
        if op == "add":
            return args[1] if a == 0 else args[0] if b == 0 else None
        if op == "sub":
            return args[0] if b == 0 else None
        if op == "mul":
            return args[1] if a == 1 else args[0] if b == 1 else None
        if op == "floordiv":
            return args[0] if b == 1 else None
    if op == "neg":
        if values[0] is not None:
            return -values[0]
        return args[0].args[0] if args[0].op == "neg" else None
    if op == "div" and values[1] is not None and values[1] != 0:
        return values[0] / values[1] if values[0] is not None else args[0] if values[1] == 1 else None
    if op == "where" and values[0] is not None:
        return args[1] if values[0] else args[2]
    return None


def trail(node: fx.Node, idx: Position, indices: Elements) -> Iterator[tuple[fx.Node, Position]]:
    """Where an element comes from: the node itself, then each node behind it that views and gathers lead to."""
    while True:
        yield node, idx
        here = node
        found = Elements(indices.sizes, stop=lambda n: n is not here, indices=indices).at(node, idx)  # noqa: B023
        if found.op != "load" or found.args[0] is node:
            return
        node, idx = found.args
