"""Pointwise ops combine elements of their operands at one index; a short sum is written out, and so is any of a few."""

import math
import operator
from typing import Any

import torch
from torch import fx

from braze.passes.element_args import argument, tensor_of
from braze.passes.element_gathers import is_sort
from braze.passes.elements import MAX_SUM, Elements, Expr, Position, handles, is_complex

aten = torch.ops.aten
#: Inductor's own op, which is there once Inductor is.
FMA = getattr(getattr(torch.ops.prims, "fma", None), "default", "no such op")


def _binary(op: str) -> Any:
    def handler(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
        if is_complex(node) and op not in ("add", "sub"):
            return None
        a, b = ev.operand(node.args[0], node, idx), ev.operand(node.args[1], node, idx)
        alpha = node.kwargs.get("alpha", 1)
        return ev.make(op, a, b if alpha == 1 else ev.make("mul", b, ev.at(alpha, ())))

    return handler


handles(aten.add.Tensor, aten.add.Scalar, operator.add)(_binary("add"))
handles(aten.sub.Tensor, aten.sub.Scalar, operator.sub)(_binary("sub"))
handles(aten.maximum.default, aten.clamp_min.default, aten.clamp_min.Tensor)(_binary("max"))
handles(aten.minimum.default, aten.clamp_max.default, aten.clamp_max.Tensor)(_binary("min"))
handles(aten.eq.Tensor, aten.eq.Scalar)(_binary("eq"))
handles(aten.ne.Tensor, aten.ne.Scalar)(_binary("ne"))
handles(aten.lt.Tensor, aten.lt.Scalar)(_binary("lt"))
handles(aten.le.Tensor, aten.le.Scalar)(_binary("le"))
handles(aten.gt.Tensor, aten.gt.Scalar)(_binary("gt"))
handles(aten.ge.Tensor, aten.ge.Scalar)(_binary("ge"))


@handles(aten.mul.Tensor, aten.mul.Scalar, operator.mul)
def _mul(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    if not is_complex(node):
        return ev.make("mul", ev.operand(node.args[0], node, idx), ev.operand(node.args[1], node, idx))
    (a, b), (c, d) = (_parts(ev, arg, node, idx[:-1]) for arg in node.args[:2])
    if idx[-1] == "re":
        return ev.make("sub", ev.make("mul", a, c), ev.make("mul", b, d))
    return ev.make("add", ev.make("mul", a, d), ev.make("mul", b, c))


def _parts(ev: Elements, arg: Any, node: fx.Node, dims: Position) -> tuple[Expr, Expr]:
    """(real, imaginary) element of an operand of a complex product."""
    if isinstance(arg, fx.Node) and is_complex(arg):
        return ev.operand(arg, node, (*dims, "re")), ev.operand(arg, node, (*dims, "im"))
    return ev.operand(arg, node, (*dims, "re")), ev.const(0)


@handles(aten._conj.default, aten.conj_physical.default)
def _conj(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    value = ev.at(node.args[0], idx)
    return ev.make("neg", value) if is_complex(node) and idx[-1] == "im" else value


@handles(aten.addcmul.default)
def _addcmul(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    if is_complex(node):
        return None
    a, b, c = (ev.operand(arg, node, idx) for arg in node.args[:3])
    product, value = ev.make("mul", b, c), node.kwargs.get("value", 1)
    return ev.make("add", a, product if value == 1 else ev.make("mul", product, ev.at(value, ())))


@handles(FMA)
def _fma(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    """a * b + c: what becomes of `addcmul` with a factor."""
    a, b, c = (ev.operand(arg, node, idx) for arg in node.args)
    return ev.make("add", ev.make("mul", a, b), c)


@handles(aten.div.Tensor, aten.div.Scalar, aten.div.Tensor_mode, aten.div.Scalar_mode)
def _div(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    if is_complex(node):
        return None
    mode = node.kwargs.get("rounding_mode")
    a, b = ev.operand(node.args[0], node, idx), ev.operand(node.args[1], node, idx)
    if mode is None:
        return ev.make("div", a, b)
    place = a.op == "load" and is_sort(a.args[0])  # a position, never negative
    if mode == "trunc" and not place and (a.const is None or a.const < 0):
        return None
    return ev.make("floordiv", a, b)


@handles(aten.floor_divide.default, operator.floordiv)
def _floordiv(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    return ev.make("floordiv", ev.operand(node.args[0], node, idx), ev.operand(node.args[1], node, idx))


@handles(aten.remainder.Scalar, aten.remainder.Tensor, operator.mod)
def _mod(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    return ev.make("mod", ev.operand(node.args[0], node, idx), ev.operand(node.args[1], node, idx))


@handles(aten.fmod.Scalar, aten.fmod.Tensor)
def _fmod(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    """As mod, where neither is negative: what torch.roll makes of an index."""
    a, b = ev.operand(node.args[0], node, idx), ev.operand(node.args[1], node, idx)
    return ev.make("mod", a, b) if all(e.const is not None and e.const >= 0 for e in (a, b)) else None


@handles(aten.clamp.default, aten.hardtanh.default)
def _clamp(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    value = ev.at(node.args[0], idx)
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    if low is not None:
        value = ev.make("max", value, ev.at(low, ()))
    return value if high is None else ev.make("min", value, ev.at(high, ()))


@handles(aten.where.self)
def _where(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    return ev.make("where", *(ev.operand(a, node, idx) for a in node.args))


@handles(aten.pow.Tensor_Scalar)
def _pow(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    exponent = node.args[1]
    if not isinstance(exponent, int | float) or exponent not in (2, 3, 4, 0.5, -0.5):
        return None
    base = ev.at(node.args[0], idx)
    if abs(exponent) == 0.5:
        return ev.make("sqrt" if exponent > 0 else "rsqrt", base)
    value = base
    for _ in range(int(exponent) - 1):
        value = ev.make("mul", value, base)
    return value


def _unary(op: str) -> Any:
    def handler(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
        return None if is_complex(node) and op != "neg" else ev.make(op, ev.at(node.args[0], idx))

    return handler


for _target, _op in {
    aten.neg.default: "neg",
    aten.exp.default: "exp",
    aten.expm1.default: "expm1",
    aten.log.default: "log",
    aten.log1p.default: "log1p",
    aten.sqrt.default: "sqrt",
    aten.rsqrt.default: "rsqrt",
    aten.tanh.default: "tanh",
    aten.erf.default: "erf",
    aten.sigmoid.default: "sigmoid",
    aten.abs.default: "abs",
    aten.cos.default: "cos",
    aten.sin.default: "sin",
    aten.logical_not.default: "not",
    aten.bitwise_not.default: "not",
}.items():
    handles(_target)(_unary(_op))


@handles(aten.relu.default)
def _relu(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    return ev.make("max", ev.at(node.args[0], idx), ev.const(0.0))


@handles(aten.reciprocal.default)
def _reciprocal(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    return ev.make("div", ev.const(1.0), ev.at(node.args[0], idx))


@handles(aten.sum.dim_IntList)
def _sum(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    """A short sum is a chain of additions."""
    source = tensor_of(node.args[0])
    shape = ev.shape(source)
    which = argument(node, 1, "dim")
    which = [which] if isinstance(which, int) else which
    dims = sorted({int(d) % len(shape) for d in which or range(len(shape))})
    count = math.prod(shape[d] for d in dims)
    if not 0 < count <= MAX_SUM or is_complex(node):
        return None
    keep = bool(argument(node, 2, "keepdim", False))
    base = list(idx)
    if not keep:
        for d in dims:
            base.insert(d, 0)
    total: Expr | None = None
    for k in range(count):
        rest = k
        for d in reversed(dims):
            rest, base[d] = divmod(rest, shape[d])
        term = ev.at(source, tuple(base))
        total = term if total is None else ev.make("add", total, term)
    return total


@handles(aten.any.dim, aten.any.dims)
def _any(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    """Whether a sum of truth values is more than 0."""
    source = tensor_of(node.args[0])
    if source.meta["val"].dtype is not torch.bool:
        return None
    total = _sum(ev, node, idx)
    return None if total is None else ev.make("gt", total, ev.const(0))
