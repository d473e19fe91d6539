"""Where a rotation's result is written: over what it turns, where nothing reads that again, or straight into a cache.

Either becomes a launch that Inductor's reinplacing leaves without a clone, by its own rules, which are met here beforehand: a
buffer that is written over has no later reader, and a cache is a graph input that the epilogue updates by `copy_`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = torch.ops.aten

_VIEWS = {
    aten.permute.default,
    aten.transpose.int,
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.slice.Tensor,
    aten.select.int,
}
#: What makes a buffer of its own, whatever Inductor simplifies: what a projection consists of.
_FRESH = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.add.Tensor, aten.mul.Tensor}


_MOVES = {
    aten.permute.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.expand.default,
    aten.slice.Tensor,
    aten.select.int,
}
_LOOPS = {aten.clone.default, aten.cat.default, aten.index_put.default, aten.slice_scatter.default, aten.copy.default}
_ATTENTION = {
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}


@dataclass(frozen=True)
class CacheWrite:
    """A rotation's result as rows of a cache. node: what the launch's cache takes the place of; strides for (batch, row, head);
    index and its strides for (batch, token), or the first row."""

    node: fx.Node
    cache: fx.Node
    strides: tuple[Any, Any, Any]
    count: Any
    first: int = 0
    index: fx.Node | None = None
    index_strides: tuple[Any, Any] = (0, 0)


def is_dead(x: fx.Node, place: fx.Node, going: set[fx.Node]) -> bool:
    """Whether the memory of x was made in the graph and nothing reads it after `place` but the calls that are `going`."""
    base = x
    while base.target in _VIEWS:
        base = base.args[0]  # type: ignore[assignment]
    if base.target not in _FRESH or storage(base) != storage(x):
        return False
    return not _read_after(x, place, going)


def is_read_in_any_layout(call: fx.Node) -> bool:
    """Whether all that reads a result reads it as it lies, without a copy first: loops of Inductor's, and attention on CUDA."""
    queue = [call]
    for node in queue:
        for user in node.users:
            if user.target in _MOVES:
                queue.append(user)
            elif user.target not in _LOOPS and not (user.target in _ATTENTION and user.meta["val"][0].is_cuda):
                return False
    return True


def storage(node: fx.Node) -> int | None:
    """What tells whether two nodes are views of one memory."""
    val = node.meta.get("val")
    return val.untyped_storage()._cdata if isinstance(val, Tensor) else None


def _read_after(x: fx.Node, place: fx.Node, going: set[fx.Node]) -> bool:
    aliases = [n for n in x.graph.nodes if storage(n) == storage(x) and n not in going]
    users = (u for n in aliases for u in n.users if u not in aliases and u not in going)
    return any(u > place for u in users)


def cache_write(call: fx.Node, axis: int) -> CacheWrite | str | None:
    """The write into a cache that is the only use of a rotation's result, why the launch can't make it, or None where there is
    none. axis: the result's dimension that counts heads."""
    views, node = [], call
    while len(node.users) == 1 and ((user := next(iter(node.users))).target in _VIEWS or _is_copy(node, user)):
        views += [user] if user.target in _VIEWS else []
        node = user
    write = next((u for u in node.users if u.target in (aten.index_put.default, aten.slice_scatter.default)), None)
    if write is None or node not in (write.args[1], write.args[2] if len(write.args) > 2 else None):
        grows = any(u.target is aten.cat.default and _along_tokens(u) for u in node.users)
        return "the cache is a new tensor, what it held is copied with it" if grows else None
    if len(node.users) > 1:
        return "what goes into the cache is used elsewhere too"
    target = _updated(write)
    if isinstance(target, str):
        return target
    rows = _rows(write)
    if isinstance(rows, str):
        return rows
    dim, first, index = rows
    lie = _strides(call, axis, views, write.args[0].meta["val"], dim, index)  # type: ignore[union-attr]
    if lie is None:
        return "the cache's dimensions are not a batch's, tokens, heads and their elements"
    strides, index_strides = lie
    cache, held = base(write.args[0]), write.args[0].meta["val"]  # type: ignore[arg-type, union-attr]
    if held.dtype != call.meta["val"].dtype or held.storage_offset() != cache.meta["val"].storage_offset():
        return "the cache has another dtype, or is a part of a tensor"
    return CacheWrite(target, cache, strides, held.shape[dim], first, index, index_strides)


def _along_tokens(cat: fx.Node) -> bool:
    """Whether a concatenation is of rows, and not of the parts of heads."""
    dim = cat.args[1] if len(cat.args) > 1 else 0
    return isinstance(dim, int) and dim % cat.meta["val"].ndim != cat.meta["val"].ndim - 1


def _is_copy(node: fx.Node, user: fx.Node) -> bool:
    """Whether `user` is node's value laid out anew, or in the place of another tensor of its shape and dtype."""
    if user.target is aten.clone.default:
        return True
    if user.target is not aten.copy.default or user.args[1] is not node:
        return False
    a, b = node.meta["val"], user.meta["val"]
    return a.dtype == b.dtype and a.ndim == b.ndim and all(map(_same, a.shape, b.shape))


def base(node: fx.Node) -> fx.Node:
    """What a node is a view of."""
    while node.target in _VIEWS:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _updated(write: fx.Node) -> fx.Node | str:
    """The node that is a graph input with the write done: the write itself, or, in another shape, its only user."""
    cache = base(write.args[0])  # type: ignore[arg-type]
    if cache.op != "placeholder":
        return "the cache is no input of the graph"
    node = write
    if write.args[0] is not cache:
        if len(write.users) != 1:
            return "the cache is read in another shape than the input's"
        node = next(iter(write.users))
    copies = [u for u in node.users if u.target is aten.copy_.default and u.args[:2] == (cache, node)]
    if not copies or not _same_lie(node.meta["val"], cache.meta["val"]):
        return "the cache is no input that the graph updates"
    if _read_after(cache, node, set(copies)):
        return "the cache is read as it was"
    return node


def _same_lie(a: Tensor, b: Tensor) -> bool:
    return a.ndim == b.ndim and all(map(_same, (*a.shape, *a.stride()), (*b.shape, *b.stride())))


def _same(a: Any, b: Any) -> bool:
    return statically_known_true(a == b)


def _rows(write: fx.Node) -> tuple[int, int, fx.Node | None] | str:
    """(dimension of the cache that counts rows, first row, index of rows)"""
    args: Any = write.args
    if write.target is aten.slice_scatter.default:
        named = ("dim", "start", "end", "step")
        given: dict[Any, Any] = {"dim": 0, "step": 1, **dict(zip(named, args[2:], strict=False)), **write.kwargs}
        dim, start = given["dim"], given.get("start")
        if not isinstance(start, int | None) or (start or 0) < 0 or given["step"] != 1:
            return "the first row is no number known when it is compiled"
        return dim % args[0].meta["val"].ndim, start or 0, None
    given = {d: n for d, n in enumerate(args[1]) if n is not None}
    if len(given) != 1 or (*args[3:], write.kwargs.get("accumulate", False))[0]:
        return "rows are told by several indices, or added"
    ((dim, index),) = given.items()
    val = index.meta["val"]
    if val.ndim != 1 or val.dtype not in (torch.int32, torch.int64):
        return "rows are told by no list of integers"
    return dim, 0, index


def _strides(
    call: fx.Node, axis: int, views: list[fx.Node], cache: Tensor, dim: int, index: fx.Node | None
) -> tuple[tuple[Any, Any, Any], tuple[Any, Any]] | None:
    """The cache's strides for (batch, row, head) and the index's for (batch, token), where rows are tokens, or tokens of the
    whole batch, and the cache's other dimensions are the batch, heads and their elements; None where they are not."""
    size, step, value = _replayed(call, axis, views)
    last = cache.ndim - 1
    if value is None or value.ndim != cache.ndim or dim == last:
        return None
    if not all(_same(t.stride(last), 1) and _same(t.shape[last], call.meta["val"].shape[-1]) for t in (value, cache)):
        return None
    if not all(_same(value.shape[d], cache.shape[d]) for d in range(last) if d != dim):
        return None
    found: dict[str, int] = {}  # what a dimension of the cache counts
    for d in range(last):
        if _same(value.shape[d], 1):
            continue
        name = next((r for r in size if _same(value.stride(d), step[r]) and not _same(size[r], 1)), None)
        if name is None or name in found:
            return None
        if not _same(value.shape[d], size[name]):
            if name != "token" or axis != 2 or not _same(value.shape[d], size["batch"] * size["token"]):
                return None
            found["batch"] = d
        found[name] = d
    if any(r not in found for r in size if not _same(size[r], 1)):
        return None
    rows = {r for r, d in found.items() if d == dim}
    pitch = index.meta["val"].stride(0) if index is not None else 1
    if "head" in rows or ("token" in found and "token" not in rows) or (index is None and "batch" in rows):
        return None
    batch, head = (cache.stride(found[r]) if r in found and r not in rows else 0 for r in ("batch", "head"))
    return (batch, cache.stride(dim), head), (size["token"] * pitch if "batch" in rows else 0, pitch)


def _replayed(call: fx.Node, axis: int, views: list[fx.Node]) -> tuple[dict[str, Any], dict[str, Any], Tensor | None]:
    """The sizes and strides of the call's batch, tokens and heads in a row-major result, and that after the views, whose
    strides tell what is what; None for it where a view would copy."""
    result = call.meta["val"]
    with result.fake_mode:
        plain = torch.empty(result.shape, device=result.device, dtype=result.dtype)
        value = plain
        for n in views:
            value = n.target(value, *fx.node.map_arg(n.args[1:], lambda a: a.meta["val"]))  # type: ignore[operator]
    place = {"head": axis, "token": 2 * plain.ndim - 5 - axis} | ({"batch": 0} if plain.ndim == 4 else {})
    size, step = ({r: of[d] for r, d in place.items()} for of in (plain.shape, plain.stride()))
    same = value.untyped_storage()._cdata == plain.untyped_storage()._cdata
    return size, step, value if same else None
