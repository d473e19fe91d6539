"""How an element of each ATen op is made of its operands' elements: the table behind `Elements`.

Three families: layout ops move an index, pointwise ops combine elements, gathers turn an integer tensor's
element into an index. An op that is not here, or an argument not understood, makes a leaf.
"""

import math
import operator
from typing import Any

import torch
from torch import fx

from braze.passes.elements import MAX_SUM, Elements, Expr, Position, handles, is_complex

aten = torch.ops.aten
prims = torch.ops.prims


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An op's argument, however it was passed."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def _tensor(node: Any) -> fx.Node:
    assert isinstance(node, fx.Node)
    return node


def _split_part(node: fx.Node, idx: Position) -> tuple[Position, Position]:
    """(index of the tensor's dimensions, index of the complex part)."""
    return (idx[:-1], idx[-1:]) if is_complex(node) else (idx, ())


# ---------------------------------------------------------------------------------------------------- layout


@handles(
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
)
def _same(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    return ev.at(node.args[0], idx)


@handles(prims.convert_element_type.default, aten._to_copy.default)
def _convert(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    """Floating to floating, or integers to anything: transparent. Floating to integer rounds: a leaf."""
    source = _tensor(node.args[0]).meta["val"]
    target = node.meta["val"]
    if target.is_complex() != source.is_complex():
        return None
    if source.is_floating_point() and not target.is_floating_point():
        value = ev.at(node.args[0], idx)
        exact = value.const is not None and float(value.const).is_integer()
        return ev.const(int(value.const)) if exact else None
    return ev.at(node.args[0], idx)


@handles(aten.copy.default)
def _copy(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    return ev.operand(node.args[1], node, idx)


@handles(aten.view.default, aten.reshape.default, aten._unsafe_view.default)
def _view(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    source = _tensor(node.args[0])
    if is_complex(node) != is_complex(source):
        return None
    dims, part = _split_part(node, idx)
    return ev.at(source, _reshape_index(ev, dims, ev.shape(node), ev.shape(source)) + part)


def _reshape_index(ev: Elements, idx: Position, shape: tuple[int, ...], source: tuple[int, ...]) -> Position:
    """The index in `source` of the element at `idx` in `shape`, group by group of dimensions with equal products,
    so that a dimension that keeps its size keeps its index, be it an expression or not."""
    out: list[Any] = []
    i = j = 0
    while i < len(shape) or j < len(source):
        i0, j0 = i, j
        a = b = 1
        if i < len(shape):
            a, i = shape[i], i + 1
        if j < len(source):
            b, j = source[j], j + 1
        while a != b:
            if a < b and i < len(shape):
                a, i = a * shape[i], i + 1
            elif j < len(source):
                b, j = b * source[j], j + 1
            else:
                a, i = a * shape[i], i + 1
        out.extend(_regroup(ev, idx[i0:i], shape[i0:i], source[j0:j]))
    return tuple(out)


def _regroup(ev: Elements, idx: Position, shape: tuple[int, ...], source: tuple[int, ...]) -> list[Any]:
    kept = [k for k, s in zip(idx, shape, strict=True) if s != 1]
    big = [s for s in source if s != 1]
    if [s for s in shape if s != 1] == big:
        it = iter(kept)
        return [0 if s == 1 else next(it) for s in source]
    flat: Any = 0
    for k, s in zip(idx, shape, strict=True):
        flat = ev.i_add(ev.i_mul(flat, s), k)
    out: list[Any] = []
    for s in reversed(source[1:]):
        flat, r = ev.i_divmod(flat, s)
        out.append(r)
    out.append(flat)
    return out[::-1]


@handles(aten.permute.default)
def _permute(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    dims, part = _split_part(node, idx)
    out: list[Any] = [0] * len(dims)
    for k, d in zip(dims, node.args[1], strict=True):  # type: ignore[arg-type]
        out[int(d) % len(dims)] = k  # type: ignore[call-overload]
    return ev.at(node.args[0], tuple(out) + part)


@handles(aten.transpose.int)
def _transpose(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    dims, part = _split_part(node, idx)
    out = list(dims)
    a, b = int(node.args[1]), int(node.args[2])  # type: ignore[arg-type]
    out[a], out[b] = out[b], out[a]
    return ev.at(node.args[0], tuple(out) + part)


@handles(aten.t.default)
def _t(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    return ev.at(node.args[0], idx[::-1])


@handles(aten.unsqueeze.default)
def _unsqueeze(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    dims, part = _split_part(node, idx)
    d = int(node.args[1]) % len(dims)  # type: ignore[arg-type]
    return ev.at(node.args[0], dims[:d] + dims[d + 1 :] + part)


@handles(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def _squeeze(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    dims, part = _split_part(node, idx)
    source = ev.shape(_tensor(node.args[0]))
    which = argument(node, 1, "dim", list(range(len(source))))
    gone = {int(d) % len(source) for d in ([which] if isinstance(which, int) else which)}
    it = iter(dims)
    out = tuple(0 if i in gone and s == 1 else next(it) for i, s in enumerate(source))
    return ev.at(node.args[0], out + part)


@handles(aten.expand.default)
def _expand(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    dims, part = _split_part(node, idx)
    source = ev.shape(_tensor(node.args[0]))
    offset = len(dims) - len(source)
    return ev.at(node.args[0], tuple(0 if s == 1 else dims[offset + i] for i, s in enumerate(source)) + part)


@handles(aten.repeat.default)
def _repeat(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    source = ev.shape(_tensor(node.args[0]))
    offset = len(idx) - len(source)
    return ev.at(node.args[0], tuple(ev.i_divmod(idx[offset + i], s)[1] for i, s in enumerate(source)))


@handles(aten.select.int)
def _select(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    dims, part = _split_part(node, idx)
    source = ev.shape(_tensor(node.args[0]))
    d = int(node.args[1]) % len(source)  # type: ignore[arg-type]
    return ev.at(node.args[0], dims[:d] + (ev.sizes.of(node.args[2]) % source[d],) + dims[d:] + part)


def slice_bounds(ev: Elements, node: fx.Node, first: int, size: int) -> tuple[int, int, int]:
    """(start, end, step) of a slice whose dim argument is args[first], within 0..size."""

    def clamp(v: Any, default: int) -> int:
        if v is None:
            return default
        n = ev.sizes.of(v)
        return min(max(n + size if n < 0 else n, 0), size)

    start = clamp(argument(node, first + 1, "start"), 0)
    end = clamp(argument(node, first + 2, "end"), size)
    return start, end, ev.sizes.of(argument(node, first + 3, "step", 1))


@handles(aten.slice.Tensor)
def _slice(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    source = ev.shape(_tensor(node.args[0]))
    d = int(argument(node, 1, "dim", 0)) % len(source)
    start, _, step = slice_bounds(ev, node, 1, source[d])
    return ev.at(node.args[0], idx[:d] + (ev.i_add(start, ev.i_mul(idx[d], step)),) + idx[d + 1 :])


@handles(aten.slice_scatter.default)
def _slice_scatter(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    d = int(argument(node, 2, "dim", 0)) % len(idx)
    start, end, step = slice_bounds(ev, node, 2, ev.shape(node)[d])
    if not isinstance(idx[d], int):
        return None
    if start <= idx[d] < end and (idx[d] - start) % step == 0:
        return ev.at(node.args[1], idx[:d] + ((idx[d] - start) // step,) + idx[d + 1 :])
    return ev.at(node.args[0], idx)


@handles(aten.select_scatter.default)
def _select_scatter(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    d = int(node.args[2]) % len(idx)  # type: ignore[arg-type]
    if not isinstance(idx[d], int):
        return None
    if idx[d] == ev.sizes.of(node.args[3]) % ev.shape(node)[d]:
        return ev.at(node.args[1], idx[:d] + idx[d + 1 :])
    return ev.at(node.args[0], idx)


@handles(aten.cat.default)
def _cat(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    dims, part = _split_part(node, idx)
    d = int(argument(node, 1, "dim", 0)) % len(dims)
    i = dims[d]
    if not isinstance(i, int):
        return _picked(ev, node, dims, d) if not part else None
    for source in node.args[0]:  # type: ignore[union-attr]
        size = ev.shape(_tensor(source))
        if len(size) != len(dims):
            continue  # the legacy empty tensor
        if i < size[d]:
            return ev.at(source, dims[:d] + (i,) + dims[d + 1 :] + part)
        i -= size[d]
    return None


#: One of more tensors than this, picked by an integer, makes a leaf.
MAX_PICKED = 64


def _picked(ev: Elements, node: fx.Node, dims: Position, d: int) -> Expr | None:
    """The element of that of several tensors whose number an integer is: sum_j [i = j] x_j."""
    parts: Any = node.args[0]
    sizes = {ev.shape(p)[d] for p in parts}
    number, within = _divided(dims[d], min(sizes))
    if len(parts) > MAX_PICKED or len(sizes) > 1 or number is None:
        return None
    total = ev.const(0)
    for j, part in enumerate(parts):
        is_it = ev.make("eq", number, ev.const(j))
        total = ev.make("add", total, ev.make("mul", is_it, ev.at(part, (*dims[:d], within, *dims[d + 1 :]))))
    return total


def _divided(index: Expr, size: int) -> tuple[Expr | None, int]:
    """(i, r) where an index is i size + r, r a number below size; i is None where that does not show."""
    rest = 0
    if index.op == "add" and index.args[1].const is not None:
        index, rest = index.args[0], index.args[1].const
    if size > 1 and index.op == "mul" and index.args[1].const == size:
        index = index.args[0]
    elif size > 1:
        return None, 0
    return (index, rest) if 0 <= rest < size else (None, 0)


@handles(aten.any.dim, aten.any.dims)
def _any(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    """Whether a sum of truth values is more than 0."""
    source = _tensor(node.args[0])
    if source.meta["val"].dtype is not torch.bool:
        return None
    total = _sum(ev, node, idx)
    return None if total is None else ev.make("gt", total, ev.const(0))


@handles(aten.stack.default)
def _stack(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    d = int(argument(node, 1, "dim", 0)) % len(idx)
    if not isinstance(idx[d], int):
        return None
    return ev.at(node.args[0][idx[d]], idx[:d] + idx[d + 1 :])  # type: ignore[index]


@handles(aten.constant_pad_nd.default)
def _pad(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    shape = ev.shape(_tensor(node.args[0]))
    out = list(idx)
    pads = [ev.sizes.of(p) for p in node.args[1]]  # type: ignore[union-attr]
    for k in range(len(pads) // 2):
        d = len(shape) - 1 - k
        if pads[2 * k] == 0 and pads[2 * k + 1] == 0:
            continue
        if not isinstance(out[d], int):
            return None
        out[d] -= pads[2 * k]
        if not 0 <= out[d] < shape[d]:
            return ev.const(argument(node, 2, "value", 0))
    return ev.at(node.args[0], tuple(out))


@handles(operator.getitem)
def _getitem(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    source, k = node.args
    if not isinstance(source, fx.Node) or not isinstance(k, int):
        return None
    if source.target is aten.sort.default or source.target is aten.sort.stable:
        return _sorted(ev, source, k, idx)
    if source.target not in (aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int):
        return None
    tensor = _tensor(source.args[0])
    rank = len(ev.shape(tensor))
    if source.target is aten.unbind.int:
        d = int(argument(source, 1, "dim", 0)) % rank
        return ev.at(tensor, idx[:d] + (k,) + idx[d:])
    d = int(argument(source, 2, "dim", 0)) % rank
    sizes = source.args[1]
    parts = sizes if isinstance(sizes, list | tuple) else [sizes] * k
    offset = sum(ev.sizes.of(s) for s in parts[:k])
    return ev.at(tensor, idx[:d] + (ev.i_add(offset, idx[d]),) + idx[d + 1 :])


@handles(aten.view_as_real.default)
def _view_as_real(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    if not isinstance(idx[-1], int):
        return None
    return ev.at(node.args[0], idx[:-1] + (("re", "im")[idx[-1]],))


@handles(aten.view_as_complex.default)
def _view_as_complex(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    return ev.at(node.args[0], idx[:-1] + (0 if idx[-1] == "re" else 1,))


@handles(aten.complex.default)
def _complex(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    shape = ev.shape(node)
    source = _tensor(node.args[0] if idx[-1] == "re" else node.args[1])
    offset = len(shape) - len(ev.shape(source))
    return ev.at(source, tuple(0 if s == 1 else idx[offset + i] for i, s in enumerate(ev.shape(source))))


@handles(aten.polar.default)
def _polar(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    radius, angle = ev.at(node.args[0], idx[:-1]), ev.at(node.args[1], idx[:-1])
    return ev.make("mul", radius, ev.make("cos" if idx[-1] == "re" else "sin", angle))


# -------------------------------------------------------------------------------------------------- pointwise


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


@handles(aten.div.Tensor, aten.div.Scalar, aten.div.Tensor_mode, aten.div.Scalar_mode)
def _div(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    if is_complex(node):
        return None
    mode = node.kwargs.get("rounding_mode")
    a, b = ev.operand(node.args[0], node, idx), ev.operand(node.args[1], node, idx)
    if mode is None:
        return ev.make("div", a, b)
    place = a.op == "load" and _is_sort(a.args[0])  # a position, never negative
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
    aten.log.default: "log",
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
    source = _tensor(node.args[0])
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


# ------------------------------------------------------------------------------------- constants and gathers


@handles(aten.full.default)
def _full(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    return ev.at(node.args[1], ())


@handles(aten.full_like.default)
def _full_like(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    return ev.at(node.args[1], ())


@handles(aten.scalar_tensor.default)
def _scalar_tensor(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    return ev.at(node.args[0], ())


@handles(aten.zeros.default, aten.zeros_like.default)
def _zeros(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    return ev.const(0.0 if node.meta["val"].is_floating_point() else 0)


@handles(aten.ones.default, aten.ones_like.default)
def _ones(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    return ev.const(1.0 if node.meta["val"].is_floating_point() else 1)


@handles(prims.iota.default)
def _iota(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    start, step = (ev.sizes.of(node.kwargs.get(name, default)) for name, default in (("start", 0), ("step", 1)))
    k = ev.i_add(start, ev.i_mul(idx[0], step))
    return k if isinstance(k, Expr) else ev.const(k)


def _sorted(ev: Elements, sort: fx.Node, k: int, idx: Position) -> Expr | None:
    """sort(e) of one dimension: values[r] = e[perm[r]]; perm[inverse of perm at s] = s."""
    source = _tensor(sort.args[0])
    if len(ev.shape(source)) != 1:
        return None
    perm = _permutation(ev, sort, idx[0])
    return ev.at(source, (ev.index(perm),)) if k == 0 else perm


def _permutation(ev: Elements, sort: fx.Node, r: Any) -> Expr:
    if isinstance(r, Expr) and r.op == "inverse" and r.args[0].args[0] is sort:
        return r.args[1]  # type: ignore[no-any-return]
    return ev.load(sort, (r,))


def _inverse(ev: Elements, perm: fx.Node, s: Any) -> Expr | None:
    """The position r with perm[r] = s, where perm holds a permutation made by a sort."""
    probe = ev.indices.at(perm, (0,))
    if probe.op == "load" and _is_sort(probe.args[0]) and len(ev.shape(perm)) == 1:
        return ev.make("inverse", ev.load(probe.args[0], ()), s if isinstance(s, Expr) else ev.const(s))
    return None


def _is_sort(node: fx.Node) -> bool:
    return node.target in (aten.sort.default, aten.sort.stable)


def _counts_up(ev: Elements, values: Any, like: fx.Node) -> bool:
    """Whether `values`, broadcast to the shape of the one-dimensional `like`, looks like 0, 1, 2, ..."""
    (size,) = ev.shape(like)
    return all(ev.operand(values, like, (r,)).const == r for r in (0, size // 2, size - 1))


@handles(aten.index_put.default, aten._unsafe_index_put.default)
def _index_put(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    """out[perm] = iota, perm a whole permutation: out is its inverse. Rows added up at perm // k: see `_sum_at`."""
    base, where, values = node.args[:3]
    if len(where) != 1:  # type: ignore[arg-type]
        return None
    if argument(node, 3, "accumulate", False):
        return _sum_at(ev, base, where[0], values, idx)  # type: ignore[index]
    return _inverse_of(ev, where[0], base, values, idx) if len(idx) == 1 else None  # type: ignore[index]


@handles(aten.scatter_add.default)
def _scatter_add(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    """Rows added up at the places that a column of indices, repeated for all columns, says."""
    base, dim, where, values = node.args[:4]
    rest = tuple(s - 1 for s in ev.shape(_tensor(where))[1:])
    if dim != 0 or ev.shape(_tensor(where)) != ev.shape(_tensor(values)):
        return None
    if ev.indices.at(where, (0, *rest)) is not ev.indices.at(where, (0, *(0 for _ in rest))):
        return None
    return _sum_at(ev, base, where, values, idx)


@handles(aten.index_add.default)
def _index_add(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    base, dim, where, values = node.args[:4]
    return _sum_at(ev, base, where, values, idx) if dim == 0 and node.kwargs.get("alpha", 1) == 1 else None


#: More rows than this for each place are not added up.
MAX_ADDED = 64


def _sum_at(ev: Elements, base: Any, where: Any, values: Any, idx: Position) -> Expr | None:
    """base[t] + sum of the rows values[r] with where[r] = t. where = perm // k, perm a permutation of k rows for each t: these
    are the positions that perm has k t, ..., k t + k - 1 at."""
    rows, places = ev.shape(_tensor(where))[0], ev.shape(_tensor(base))[0]
    if rows % places or not 1 <= rows // places <= MAX_ADDED or ev.shape(_tensor(values))[1:] != ev.shape(base)[1:]:
        return None
    count = rows // places
    probe = ev.indices.at(where, (0,) * len(ev.shape(where)))
    if count > 1:
        if probe.op != "floordiv" or probe.args[1].const != count:
            return None
        probe = probe.args[0]
    if probe.op != "load" or not _is_sort(probe.args[0]) or ev.shape(_tensor(probe.args[0].args[0])) != (rows,):
        return None
    total = ev.indices.at(base, idx)
    total = ev.at(base, idx) if total.const is None else total
    for j in range(count):
        place = ev.i_add(ev.i_mul(idx[0], count), j)
        row = ev.make("inverse", ev.load(probe.args[0], ()), place if isinstance(place, Expr) else ev.const(place))
        total = ev.make("add", total, ev.at(values, (row, *idx[1:])))
    return total


@handles(aten.scatter.src)
def _scatter(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    """out[perm] = iota of one dimension, as above; any other scatter is a leaf."""
    base, _, perm, values = node.args[:4]
    return _inverse_of(ev, perm, base, values, idx) if len(idx) == 1 else None


#: More integers a row than this, scattered, make a leaf.
MAX_SCATTERED = 64


@handles(aten.scatter.value)
def _scatter_value(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    """A number where one of a row's integers is the last index: selects, one for each integer."""
    base, dim, where, number = node.args[:4]
    assert isinstance(base, fx.Node)
    assert isinstance(where, fx.Node)
    last = len(idx) - 1
    shape = ev.shape(where)
    if dim not in (-1, last) or shape[:-1] != ev.shape(base)[:-1] or shape[-1] > MAX_SCATTERED:
        return None
    value = ev.at(base, idx)
    place = idx[-1] if isinstance(idx[-1], Expr) else ev.const(idx[-1])
    for j in range(shape[-1]):
        value = ev.make("where", ev.make("eq", ev.at(where, (*idx[:-1], j)), place), ev.at(number, ()), value)
    return value


def _inverse_of(ev: Elements, perm: Any, base: Any, values: Any, idx: Position) -> Expr | None:
    """The element at idx of `base` overwritten with `values` at `perm`, where that makes perm's inverse."""
    if not isinstance(perm, fx.Node) or ev.shape(perm) != ev.shape(_tensor(base)) or not _counts_up(ev, values, perm):
        return None
    return _inverse(ev, perm, idx[0])


@handles(aten.index.Tensor, aten._unsafe_index.Tensor)
def _index(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    source = _tensor(node.args[0])
    picks: Any = node.args[1]
    where = [i for i, p in enumerate(picks) if p is not None]
    if not where or where != list(range(where[0], where[-1] + 1)):
        return None
    ranks = [len(ev.shape(picks[i])) for i in where]
    rank = max(ranks)
    first = where[0]
    at = idx[first : first + rank]
    shape = ev.shape(source)
    out = list(idx[:first])
    for i in where:
        pick = picks[i]
        if pick.meta["val"].dtype in (torch.bool, torch.uint8):
            return None
        own = ev.shape(pick)
        position = tuple(0 if s == 1 else at[rank - len(own) + j] for j, s in enumerate(own))
        k = ev.pick(pick, position)
        out.append(k % shape[i] if isinstance(k, int) else k)
    out.extend(idx[first + rank :])
    return ev.at(source, tuple(out))


@handles(aten.index_select.default)
def _index_select(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    d = int(node.args[1]) % len(idx)  # type: ignore[arg-type]
    k = ev.pick(_tensor(node.args[2]), (idx[d],))
    return ev.at(node.args[0], idx[:d] + (k,) + idx[d + 1 :])


@handles(aten.gather.default)
def _gather(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    d = int(node.args[1]) % len(idx)  # type: ignore[arg-type]
    k = ev.pick(_tensor(node.args[2]), idx)
    return ev.at(node.args[0], idx[:d] + (k,) + idx[d + 1 :])


@handles(aten.embedding.default)
def _embedding(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    k = ev.pick(_tensor(node.args[1]), idx[:-1])
    return ev.at(node.args[0], (k, idx[-1]))
