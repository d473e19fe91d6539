"""Layout ops move an index: an element of a view, slice, cat, pad or complex part is an element of what it is made of."""

import operator
from typing import Any

import torch
from torch import fx

from braze.passes.element_args import argument, split_part, tensor_of
from braze.passes.element_gathers import sorted_element
from braze.passes.elements import LIST, Elements, Expr, Position, handles, is_complex

aten = torch.ops.aten
prims = torch.ops.prims


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
    source = tensor_of(node.args[0]).meta["val"]
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
    source = tensor_of(node.args[0])
    if is_complex(node) != is_complex(source):
        return None
    dims, part = split_part(node, idx)
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
    dims, part = split_part(node, idx)
    out: list[Any] = [0] * len(dims)
    for k, d in zip(dims, node.args[1], strict=True):  # type: ignore[arg-type]
        out[int(d) % len(dims)] = k  # type: ignore[call-overload]
    return ev.at(node.args[0], tuple(out) + part)


@handles(aten.transpose.int)
def _transpose(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    dims, part = split_part(node, idx)
    out = list(dims)
    a, b = int(node.args[1]), int(node.args[2])  # type: ignore[arg-type]
    out[a], out[b] = out[b], out[a]
    return ev.at(node.args[0], tuple(out) + part)


@handles(aten.t.default)
def _t(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    return ev.at(node.args[0], idx[::-1])


@handles(aten.unsqueeze.default)
def _unsqueeze(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    dims, part = split_part(node, idx)
    d = int(node.args[1]) % len(dims)  # type: ignore[arg-type]
    return ev.at(node.args[0], dims[:d] + dims[d + 1 :] + part)


@handles(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def _squeeze(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    dims, part = split_part(node, idx)
    source = ev.shape(tensor_of(node.args[0]))
    which = argument(node, 1, "dim", list(range(len(source))))
    gone = {int(d) % len(source) for d in ([which] if isinstance(which, int) else which)}
    it = iter(dims)
    out = tuple(0 if i in gone and s == 1 else next(it) for i, s in enumerate(source))
    return ev.at(node.args[0], out + part)


@handles(aten.expand.default)
def _expand(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    dims, part = split_part(node, idx)
    source = ev.shape(tensor_of(node.args[0]))
    offset = len(dims) - len(source)
    return ev.at(node.args[0], tuple(0 if s == 1 else dims[offset + i] for i, s in enumerate(source)) + part)


@handles(aten.repeat.default)
def _repeat(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    dims, part = split_part(node, idx)
    source = ev.shape(tensor_of(node.args[0]))
    offset = len(dims) - len(source)
    return ev.at(node.args[0], tuple(ev.i_divmod(dims[offset + i], s)[1] for i, s in enumerate(source)) + part)


def flipped(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    """torch.flip. Rotations read it; to experts it is a leaf: ids and weights that are flipped alike keep their slots."""
    shape = ev.shape(node)
    out = list(idx)
    for d in node.args[1]:  # type: ignore[union-attr]
        if not isinstance(out[d], int):  # type: ignore[index]
            return None
        out[d] = shape[d] - 1 - out[d]  # type: ignore[index]
    return ev.at(node.args[0], tuple(out))


FLIPS = {prims.rev.default: flipped}


@handles(aten.select.int)
def _select(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    dims, part = split_part(node, idx)
    source = ev.shape(tensor_of(node.args[0]))
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
    source = ev.shape(tensor_of(node.args[0]))
    d = int(argument(node, 1, "dim", 0)) % len(source)
    start, _, step = slice_bounds(ev, node, 1, source[d])
    return ev.at(node.args[0], idx[:d] + (ev.i_add(start, ev.i_mul(idx[d], step)),) + idx[d + 1 :])


@handles(aten.slice_scatter.default)
def _slice_scatter(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    d = int(argument(node, 2, "dim", 0)) % len(ev.shape(node))
    start, end, step = slice_bounds(ev, node, 2, ev.shape(node)[d])
    if not isinstance(idx[d], int):
        return None
    if start <= idx[d] < end and (idx[d] - start) % step == 0:
        return ev.at(node.args[1], idx[:d] + ((idx[d] - start) // step,) + idx[d + 1 :])
    return ev.at(node.args[0], idx)


@handles(aten.select_scatter.default)
def _select_scatter(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    d = int(node.args[2]) % len(ev.shape(node))  # type: ignore[arg-type]
    if not isinstance(idx[d], int):
        return None
    if idx[d] == ev.sizes.of(node.args[3]) % ev.shape(node)[d]:
        return ev.at(node.args[1], idx[:d] + idx[d + 1 :])
    return ev.at(node.args[0], idx)


@handles(aten.cat.default)
def _cat(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    dims, part = split_part(node, idx)
    d = int(argument(node, 1, "dim", 0)) % len(dims)
    i = dims[d]
    if not isinstance(i, int):
        return _picked(ev, node, dims, d) if not part else None
    for source in node.args[0]:  # type: ignore[union-attr]
        size = ev.shape(tensor_of(source))
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


@handles(aten.stack.default)
def _stack(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    d = int(argument(node, 1, "dim", 0)) % len(ev.shape(node))
    if not isinstance(idx[d], int) or LIST in node.meta:
        return None
    return ev.at(node.args[0][idx[d]], idx[:d] + idx[d + 1 :])  # type: ignore[index]


@handles(aten.constant_pad_nd.default)
def _pad(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    shape = ev.shape(tensor_of(node.args[0]))
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
            return None if is_complex(node) else ev.const(argument(node, 2, "value", 0))
    return ev.at(node.args[0], tuple(out))


@handles(operator.getitem)
def _getitem(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    source, k = node.args
    if not isinstance(source, fx.Node) or not isinstance(k, int):
        return None
    if source.target is aten.sort.default or source.target is aten.sort.stable:
        return sorted_element(ev, source, k, idx)
    if source.target not in (aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int):
        return None
    tensor = tensor_of(source.args[0])
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
    source = tensor_of(node.args[0] if idx[-1] == "re" else node.args[1])
    offset = len(shape) - len(ev.shape(source))
    return ev.at(source, tuple(0 if s == 1 else idx[offset + i] for i, s in enumerate(ev.shape(source))))


@handles(aten.polar.default)
def _polar(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    radius, angle = ev.at(node.args[0], idx[:-1]), ev.at(node.args[1], idx[:-1])
    return ev.make("mul", radius, ev.make("cos" if idx[-1] == "re" else "sin", angle))
