"""Runs a subgraph on a small instance of itself, in float64: other sizes for some dimensions of its inputs.

Shapes are written into a captured graph as numbers (views, splits, slices). Where an input's dimension shrinks, those
numbers are rewritten in proportion, matching each view's groups of dimensions by position. What cannot be
rewritten is refused, never guessed: a wrong guess would show as a shape error or a failed comparison.
"""

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from braze.passes.element_args import argument
from braze.passes.elements import Sizes
from braze.passes.products import is_grouped

aten = torch.ops.aten
prims = torch.ops.prims


class CannotShrink(Exception):
    """Why a subgraph cannot be run on a small instance."""


def between(roots: Sequence[fx.Node], inputs: Collection[fx.Node]) -> list[fx.Node]:
    """The nodes needed to compute `roots` from `inputs`, in order; other inputs' nodes are included as they are reached."""
    needed: set[fx.Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node in needed or node in inputs:
            continue
        needed.add(node)
        stack.extend(node.all_input_nodes)
    return sorted(needed)


def run(root: fx.Node, inputs: dict[fx.Node, Tensor], sizes: Sizes) -> Tensor:
    """The value of `root` for the given inputs, all floating tensors in float64; CannotShrink where it has none."""
    return run_all((root,), inputs, sizes)[0]


def run_all(roots: Sequence[fx.Node], inputs: dict[fx.Node, Tensor], sizes: Sizes) -> list[Tensor]:
    """The values of `roots`, as `run`."""
    values: dict[fx.Node, Any] = dict(inputs)
    for node in between(roots, inputs):
        if node.op != "call_function":
            if isinstance(node.meta.get("val"), torch.SymInt | int):
                values[node] = sizes.of(node)
                continue
            raise CannotShrink(f"it also depends on {node.name}")
        values[node] = _run_node(node, values, sizes)
    return [values[root] for root in roots]


def _run_node(node: fx.Node, values: dict[fx.Node, Any], sizes: Sizes) -> Any:
    if not isinstance(node.meta.get("val"), Tensor | list | tuple):
        return sizes.of(node)
    if is_grouped(node):
        return _grouped(*(values[a] for a in node.all_input_nodes))
    rule = _RULES.get(node.target)
    try:
        if rule is not None:
            return rule(node, values, sizes)
        args: Any = fx.node.map_arg(node.args, lambda n: values[n])
        kwargs: dict[str, Any] = dict(node.kwargs)
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        if kwargs.get("dtype") is not None and kwargs["dtype"].is_floating_point:
            kwargs["dtype"] = torch.float64
        return node.target(*_symbols(args, sizes), **fx.node.map_arg(kwargs, lambda n: values[n]))  # type: ignore[operator]
    except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError) as e:
        raise CannotShrink(f"{node.name} does not run on a small instance ({str(e).splitlines()[0][:120]})") from None


def _symbols(args: Any, sizes: Sizes) -> Any:
    if isinstance(args, list | tuple):
        return type(args)(_symbols(a, sizes) for a in args)
    return sizes.of(args) if isinstance(args, torch.SymInt) else args


def _grouped(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    """A grouped product, row by row; rows past the last offset are NaN, as they are undefined."""
    out = x.new_full((x.shape[0], w.shape[2]), float("nan"))
    begin = 0
    for e, end in enumerate(offs.tolist()):
        out[begin:end] = x[begin:end] @ w[e]
        begin = end
    return out


def _view(node: fx.Node, values: dict[fx.Node, Any], sizes: Sizes) -> Tensor:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    value: Tensor = values[source]
    old, small = sizes.shape(source), tuple(value.shape)
    return value.reshape(_new_shape(old, sizes.shape(node), small, {} if old == small else _shrunk(values, sizes)))


def _shrunk(values: dict[fx.Node, Any], sizes: Sizes) -> dict[int, set[int]]:
    """What the sizes of the values so far have shrunk to."""
    found: dict[int, set[int]] = {}
    for node, value in values.items():
        if isinstance(value, Tensor) and isinstance(node.meta.get("val"), Tensor):
            for old, small in zip(sizes.shape(node), value.shape, strict=False):
                found.setdefault(old, set()).add(small)
    return found


def _new_shape(
    old: tuple[int, ...], new: tuple[int, ...], small: tuple[int, ...], shrunk: Mapping[int, Collection[int]]
) -> list[int]:
    """The small instance's counterpart of viewing `old` as `new`: groups of dimensions with equal products go together, and
    within one, dimensions that were not shrunk keep their sizes. Where a shrunk one splits, its parts are sizes that others
    have shrunk to, in the one way that fits."""
    out: list[int] = []
    i = j = 0
    while i < len(new) or j < len(old):
        i0, j0 = i, j
        a = b = 1
        if i < len(new):
            a, i = new[i], i + 1
        if j < len(old):
            b, j = old[j], j + 1
        while a != b:
            if a < b:
                if i == len(new):
                    raise CannotShrink(f"a view of {old} as {new}")
                a, i = a * new[i], i + 1
            else:
                if j == len(old):
                    raise CannotShrink(f"a view of {old} as {new}")
                b, j = b * old[j], j + 1
        out.extend(_new_group(old[j0:j], new[i0:i], small[j0:j], shrunk))
    return out


def _new_group(
    old: tuple[int, ...], new: tuple[int, ...], small: tuple[int, ...], shrunk: Mapping[int, Collection[int]]
) -> list[int]:
    if old == small:
        return list(new)
    big = [s for o, s in zip(old, small, strict=True) if o != 1]
    if [n for n in new if n != 1] == [o for o in old if o != 1]:
        it = iter(big)
        return [1 if n == 1 else next(it) for n in new]
    total = math.prod(small)
    if len([n for n in new if n != 1]) == 1:
        return [1 if n == 1 else total for n in new]
    ways = [w for w in itertools.product(*({n, *shrunk.get(n, ())} for n in new)) if math.prod(w) == total]
    if len(ways) == 1:
        return list(ways[0])
    raise CannotShrink(f"a view that splits a shrunk dimension: {old} as {new}")


def _expand(node: fx.Node, values: dict[fx.Node, Any], sizes: Sizes) -> Tensor:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    value: Tensor = values[source]
    old, new = sizes.shape(source), sizes.shape(node)
    pad = len(new) - len(old)
    shape = [n if i < pad or old[i - pad] == 1 else value.shape[i - pad] for i, n in enumerate(new)]
    return value.expand(shape)


def _scaled(k: int, old: int, small: int) -> int:
    if old == small:
        return k
    if k * small % old:
        raise CannotShrink(f"an offset of {k} in {old}")
    return k * small // old


def _slice(node: fx.Node, values: dict[fx.Node, Any], sizes: Sizes) -> Tensor:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    value: Tensor = values[source]
    dim = int(argument(node, 1, "dim", 0))
    old, small = sizes.shape(source)[dim], value.shape[dim]

    step = sizes.of(argument(node, 4, "step", 1))

    def bound(v: Any, default: int) -> int:
        k = default if v is None else sizes.of(v)
        k = min(max(k + old if k < 0 else k, 0), old)
        return k if k < step else _scaled(k, old, small)  # every step-th column: a phase does not shrink

    start, end = bound(argument(node, 2, "start"), 0), bound(argument(node, 3, "end"), old)
    return torch.ops.aten.slice.Tensor(value, dim, start, end, step)  # type: ignore[no-any-return]


def _split(node: fx.Node, values: dict[fx.Node, Any], sizes: Sizes) -> Any:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    value: Tensor = values[source]
    dim = int(argument(node, 2, "dim", 0))
    old, small = sizes.shape(source)[dim], value.shape[dim]
    parts = node.args[1]
    if isinstance(parts, list | tuple):
        return value.split([_scaled(sizes.of(p), old, small) for p in parts], dim)
    return value.split(_scaled(sizes.of(parts), old, small), dim)


def _convert(node: fx.Node, values: dict[fx.Node, Any], sizes: Sizes) -> Tensor:
    value: Tensor = values[node.args[0]]  # type: ignore[index]
    dtype = node.meta["val"].dtype
    return value.to(torch.float64 if dtype.is_floating_point else dtype)


def _filled(make: Callable[[fx.Node, tuple[int, ...]], Tensor]) -> Callable[..., Tensor]:
    """A constant tensor at its own size: where one that should have shrunk did not, shapes will not fit."""

    def rule(node: fx.Node, values: dict[fx.Node, Any], sizes: Sizes) -> Tensor:
        return make(node, sizes.shape(node))

    return rule


def _dtype(node: fx.Node) -> torch.dtype:
    dtype = node.meta["val"].dtype
    return torch.float64 if dtype.is_floating_point else dtype


def _empty(node: fx.Node, shape: tuple[int, ...]) -> Tensor:
    dtype = _dtype(node)
    return torch.full(shape, float("nan") if dtype.is_floating_point else -1, dtype=dtype)


def _full(node: fx.Node, values: dict[fx.Node, Any], sizes: Sizes) -> Tensor:
    """One element in place of all where it is only broadcast: then its sizes need not be known."""
    broadcast = all(u.target in _BROADCASTING for u in node.users)
    shape = (1,) * len(sizes.shape(node)) if broadcast else sizes.shape(node)
    return torch.full(shape, node.args[1], dtype=_dtype(node))  # type: ignore[arg-type]


#: Ops whose other operands give the result its shape, where it is theirs: `where` and sums of experts.
_BROADCASTING = {aten.where.self, aten.add.Tensor, aten.mul.Tensor}


def _histc(node: fx.Node, values: dict[fx.Node, Any], sizes: Sizes) -> Tensor:
    value: Tensor = values[node.args[0]]  # type: ignore[index]
    return torch.histc(value.double(), *node.args[1:], **node.kwargs)  # type: ignore[arg-type]


def _gather(node: fx.Node, values: dict[fx.Node, Any], sizes: Sizes) -> Tensor:
    """An index that is repeated along a dimension is repeated less often where its source has shrunk."""
    source, dim, index = node.args[:3]
    assert isinstance(source, fx.Node)
    assert isinstance(index, fx.Node)
    assert isinstance(dim, int)
    value: Tensor = values[source]
    picks: Tensor = values[index]
    for d in range(picks.ndim):
        if d != dim % picks.ndim and picks.shape[d] > value.shape[d] and picks.stride(d) == 0:
            picks = picks.narrow(d, 0, value.shape[d])
    return value.gather(dim, picks)


def _put(node: fx.Node, values: dict[fx.Node, Any], sizes: Sizes) -> Tensor:
    """A constant that rows are put into, or added to, gets their columns; so do the indices that are repeated for each."""
    args: list[Any] = list(fx.node.map_arg(node.args, lambda n: values[n]))
    scatters = node.target in (aten.scatter.src, aten.scatter_add.default)
    if scatters and args[1] % args[0].ndim:
        return node.target(*args)  # type: ignore[no-any-return, operator]  # columns are of experts, not of rows
    rows = args[3 if scatters or node.target is aten.index_add.default else 2]
    own, columns = args[0], rows.shape[1:] if rows.ndim > 1 else ()
    lead = own.ndim - len(columns)
    if isinstance(node.args[0], fx.Node) and node.args[0].target in _CONSTANT:
        args[0] = own.flatten()[:1].expand(*own.shape[:lead], *columns)
    if scatters and args[2].stride()[1:] == (0,) * len(columns):
        args[2] = args[2][(slice(None), *(slice(0, 1) for _ in columns))].expand(rows.shape)
    return node.target(*args, **node.kwargs)  # type: ignore[no-any-return, operator]


#: What gives tensors all of whose elements are the same, or nobody's.
_CONSTANT = (aten.full.default, aten.empty.memory_format)

_RULES: dict[Any, Callable[[fx.Node, dict[fx.Node, Any], Sizes], Any]] = {
    aten.view.default: _view,
    aten.reshape.default: _view,
    aten._unsafe_view.default: _view,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    prims.convert_element_type.default: _convert,
    aten.histc.default: _histc,
    aten.gather.default: _gather,
    aten.index_put.default: _put,
    aten._unsafe_index_put.default: _put,
    aten.index_add.default: _put,
    aten.scatter.src: _put,
    aten.scatter_add.default: _put,
    aten.empty.memory_format: _filled(_empty),
    aten.full.default: _full,
}
