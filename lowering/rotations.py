"""q and k that turn alike become one launch, or one C++ call: either reads a token's cos and sin once for all heads of both.

Two `braze::rope` calls are a pair where they share tables and attributes and have one shape but for the number of heads. A
`braze::rms_norm` before them is made by the same launch, which holds whole heads. The kernel sees x as [B, H, S, D] and tables
as [B or 1, S, W]; which dimension counts heads is told by the tables, which do not vary along it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from braze.kernels import aten
from braze.kernels.cpp import rope as cpp
from braze.kernels.spec import NormSpec, RopeSpec
from braze.kernels.triton import rope as triton_rope
from braze.kernels.turning import Norm, Rows
from braze.lowering import cpp_rope, inductor, places
from braze.lowering.inline import inline, inline_all
from braze.lowering.places import CacheWrite


@dataclass(frozen=True)
class Turn:
    """One `braze::rope` call: axis is the dimension of x that counts heads. norm: the `braze::rms_norm` call that made x.
    kernel: "triton" or "cpp"."""

    call: fx.Node
    spec: RopeSpec
    axis: int
    norm: fx.Node | None = None
    kernel: str = "triton"

    @property
    def x(self) -> fx.Node:
        """What the kernel reads: the norm's input, where there is one."""
        return (self.norm or self.call).args[0]  # type: ignore[return-value]

    @property
    def weights(self) -> tuple[fx.Node, ...]:
        weight = self.norm.args[1] if self.norm is not None else None
        return (weight,) if isinstance(weight, fx.Node) else ()

    @property
    def norm_spec(self) -> NormSpec | None:
        """The norm's attributes but for its result's dtype: the kernel rounds once, after the rotation."""
        return None if self.norm is None else replace(NormSpec(**self.norm.kwargs), out_dtype=None)  # type: ignore[arg-type]

    @property
    def tables(self) -> tuple[fx.Node, fx.Node]:
        return self.call.args[1], self.call.args[2]  # type: ignore[return-value]


def turn(call: fx.Node, kernel: str) -> Turn | str:
    """The call as a kernel takes it, or why none does."""
    norm = norm_before(call)
    x, cos, sin = (n.meta["val"] for n in call.args)  # type: ignore[union-attr]
    spec = RopeSpec(**call.kwargs)  # type: ignore[arg-type]
    if norm is not None:
        x, spec = norm.args[0].meta["val"], replace(spec, out_dtype=call.meta["val"].dtype)  # type: ignore[union-attr]
    axis = _head_axis(x, cos, sin)
    if axis is None:
        return "the kernel takes tables that do not vary from head to head, and x with a batch, heads and tokens"
    return Turn(call, spec, axis, norm, kernel)


def refusal(turn: Turn) -> str | None:
    """Why its kernel does not make this call, in words; None where it does."""
    x, cos, sin = (n.meta["val"] for n in (turn.x, *turn.tables))
    heads, tables = _heads(x, turn.axis), _rows(cos, sin, turn, x.ndim)
    if turn.kernel == "cpp":
        return cpp.supports(heads, *tables, turn.spec, turn.weights[0].meta["val"] if turn.weights else None)
    return triton_rope.supports(heads, None, *tables, turn.spec)


def norm_before(call: fx.Node) -> fx.Node | None:
    """The `braze::rms_norm` call that makes what a `braze::rope` call turns."""
    x = call.args[0]
    assert isinstance(x, fx.Node)
    return x if x.target is torch.ops.braze.rms_norm.default else None


def open_norm(call: fx.Node) -> None:
    """Makes a `braze::rms_norm` call a reduction and a product, which Inductor fuses with what is around them."""

    def compose(x: Tensor, weight: Tensor | None = None, **attributes: Any) -> Tensor:
        return aten.rms_norm(x, weight, NormSpec(**attributes))

    inline(call, compose, inductor.decompositions())


def _head_axis(x: Tensor, cos: Tensor, sin: Tensor) -> int | None:
    """The dimension that counts heads; None where no dimension but the batch is without effect on the tables."""
    if cos.shape != sin.shape:
        return None
    candidates = {3: (0, 1), 4: (1, 2)}.get(x.ndim, ())
    free = [d for d in candidates if _size_one(cos, d - x.ndim)]
    return next((d for d in free if not statically_known_true(x.shape[d] == 1)), free[0] if free else None)


def _size_one(table: Tensor, d: int) -> bool:
    return -d > table.ndim or statically_known_true(table.shape[d] == 1)


def _heads(x: Tensor, axis: int) -> Tensor:
    """x as [B, H, S, D]."""
    whole = x if x.ndim == 4 else x[None]
    return whole if axis == x.ndim - 3 else whole.transpose(1, 2)


def _as_given(out: Tensor, axis: int, rank: int) -> Tensor:
    """The inverse of `_heads`."""
    out = out if axis == rank - 3 else out.transpose(1, 2)
    return out if rank == 4 else out[0]


def _rows(cos: Tensor, sin: Tensor, turn: Turn, rank: int) -> tuple[Tensor, Tensor]:
    """Tables as [B or 1, S, W]; those that the kernel cannot read as they lie are small, and are copied."""

    def rows(table: Tensor) -> Tensor:
        table = table[(None,) * (rank - table.ndim)].select(turn.axis, 0)
        return table if rank == 4 else table[None]

    a, b = rows(cos), rows(sin)
    readable = all(triton_rope.readable(t, turn.spec) for t in (a, b)) and a.stride(-1) == b.stride(-1)
    as_they_lie = turn.kernel == "cpp" or readable
    return (a, b) if as_they_lie else (a.contiguous(), b.contiguous())


def _room(call: fx.Node, x: Tensor) -> Tensor:
    """What a call's result is written to: as x lies in memory, or row-major where the graph's own result is, so that no copy
    follows."""
    like = call.meta["val"]
    size, row_major = 1, True
    for d in reversed(range(like.ndim)):
        row_major &= statically_known_true(like.shape[d] == 1) or statically_known_true(like.stride(d) == size)
        size = size * like.shape[d]
    return x.new_empty(x.shape, dtype=like.dtype) if row_major else torch.empty_like(x, dtype=like.dtype)


def pairs(turns: Sequence[Turn]) -> list[tuple[Turn, ...]]:
    """Each turn alone, or two together that one launch can make, in the order of the graph."""
    found: list[tuple[Turn, ...]] = []
    left = list(turns)
    while left:
        first = left.pop(0)
        second = next((t for t in left if _alike(first, t) and _together(first.call, t.call)), None)
        if second is not None:
            left.remove(second)
        found.append((first,) if second is None else (first, second))
    return found


def _alike(a: Turn, b: Turn) -> bool:
    x, y = a.x.meta["val"], b.x.meta["val"]
    norms = (a.norm_spec, len(a.weights)) == (b.norm_spec, len(b.weights))
    same = norms and (a.kernel, a.spec, a.axis, x.ndim, x.dtype) == (b.kernel, b.spec, b.axis, y.ndim, y.dtype)
    same = same and all(statically_known_true(x.shape[d] == y.shape[d]) for d in range(x.ndim) if d != a.axis)
    return same and all(map(_same_value, a.tables, b.tables))


def _same_value(a: Any, b: Any, depth: int = 12) -> bool:
    """Whether two nodes, or arguments, are the same computation: models index or convert a table once for q and once for k."""
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return type(a) is type(b) and bool(a == b)
    if a is b:
        return True
    if depth == 0 or a.op != "call_function" or a.target is not b.target or not _is_pure(a):
        return False
    pairs = zip((*a.args, *a.kwargs.values()), (*b.args, *b.kwargs.values()), strict=False)
    return (
        len(a.args) == len(b.args) and list(a.kwargs) == list(b.kwargs)
        and all(_same_argument(m, n, depth - 1) for m, n in pairs)
    )  # fmt: skip


def _same_argument(a: Any, b: Any, depth: int) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_same_argument(m, n, depth) for m, n in zip(a, b, strict=True))
    return _same_value(a, b, depth)


def _is_pure(node: fx.Node) -> bool:
    """Whether the same arguments always give the same value."""
    tags = getattr(node.target, "tags", (torch.Tag.nondeterministic_seeded,))
    return not node.is_impure() and torch.Tag.nondeterministic_seeded not in tags


def _together(a: fx.Node, b: fx.Node) -> bool:
    """Whether nothing needs the first one's result before the second one's place."""
    return all(user > max(a, b) for n in (a, b) for user in n.users)


def launch(group: tuple[Turn, ...]) -> str:
    """Replaces one call, or two that are alike, by one launch of their kernel; where the results are written, in words. What
    becomes dead is left in the graph."""
    write, words = _write(group)
    if write is not None and write[0] is group[0]:
        group = group[::-1]
    turn, cached = group[0], None if write is None else write[1]
    calls = [t.call for t in group]
    replaced = calls if cached is None else sorted((calls[0], cached.node))
    over = _turned_in_place(group, replaced, cached)
    weights = [w for t in group for w in t.weights]
    rows = [] if cached is None else [n for n in (cached.cache, cached.index) if n is not None]
    inputs = [*(t.x for t in group), *turn.tables, *weights, *rows]
    rank = turn.x.meta["val"].ndim

    def result(t: Turn, out: Tensor) -> Tensor:
        return _with_its_strides(_as_given(out, turn.axis, rank), t.call.meta["val"])

    def body(*tensors: Tensor) -> tuple[Tensor, ...]:
        xs, (cos, sin), rest = tensors[: len(group)], tensors[len(group) :][:2], tensors[len(group) + 2 :]
        heads = [_heads(x, turn.axis) for x in xs]
        outs = [
            h if t in over else _heads(_room(t.call, x), turn.axis) for t, x, h in zip(group, xs, heads, strict=True)
        ]
        q, k = heads[0], heads[1] if len(heads) == 2 else None
        tables, norm = _rows(cos, sin, turn, rank), _norm(turn, rest[: len(weights)])
        to = _cache_rows(cached, rest[len(weights) :])
        if turn.kernel == "cpp":
            first, second = cpp_rope.launch(q, k, *tables, turn.spec, norm, outs, to)
        else:
            tile, warps = triton_rope.tiling(q, turn.spec, norm is not None, cos.shape[-1])
            first, second = triton_rope.launch(
                q, k, *tables, turn.spec, norm, False, tile, warps, start=inductor.start, outs=outs, rows=to
            )
        if cached is not None and second is not None:
            return (result(turn, first), second)[:: 1 if replaced[0] is calls[0] else -1]
        return tuple(result(t, out) for t, out in zip(group, (first, second), strict=False) if out is not None)

    inline_all(replaced, inputs, body, inductor.decompositions())
    names = " and ".join("qk"[group.index(t)] for t in over)
    return ", ".join(([f"{names} in place"] if over else []) + ([words] if words else []))


def _write(group: tuple[Turn, ...]) -> tuple[tuple[Turn, CacheWrite] | None, str]:
    """The write into a cache that the launch makes, and whose it is; words on it, or on why it stays outside."""
    for t in group:
        found = places.cache_write(t.call, t.axis)
        if found is None:
            continue
        if isinstance(found, CacheWrite):
            others = [other for other in group if other is not t]
            if not others:
                found = "it turns alone"
            elif not _together(others[0].call, found.node):
                found = "q or the cache is needed before the other is made"
            else:
                return (t, found), "k straight into its cache"
        return None, f"the write into a cache is one more pass: {found}"
    return None, ""


def _turned_in_place(group: tuple[Turn, ...], replaced: Sequence[fx.Node], cached: CacheWrite | None) -> list[Turn]:
    """Those whose result takes the place of what was turned: nothing reads that later, and both lie alike."""
    going = {n for t in group for n in (t.call, t.norm) if n is not None}
    turns = group if cached is None else group[:1]
    over = [t for t in turns if _may_stay(t) and places.is_dead(t.x, max(replaced), going)]
    apart = len({places.storage(t.x) for t in group}) == len(group)  # else Inductor would clone one of them
    return over if apart else []


def _may_stay(turn: Turn) -> bool:
    """Whether a result may lie where what was turned does."""
    x, spec = turn.x.meta["val"], turn.spec
    if spec.layout_in != spec.layout_out or turn.call.meta["val"].dtype != x.dtype:
        return False
    # What does not turn stays where it is: worth more than the layout that the model's concatenation would give.
    if spec.rotary_dim < x.shape[-1] and turn.norm is None and places.is_read_in_any_layout(turn.call):
        return True
    with x.fake_mode:
        return _places_alike(_room(turn.call, x), x)


def _places_alike(a: Tensor, b: Tensor) -> bool:
    """Whether the same index is the same place; a dimension of one element has any stride."""
    return all(
        statically_known_true(size == 1) or statically_known_true(m == n)
        for size, m, n in zip(a.shape, a.stride(), b.stride(), strict=True)
    )


def _with_its_strides(out: Tensor, like: Tensor) -> Tensor:
    """out with the strides that the graph's own result has where a dimension has one element: Inductor would copy it else."""
    known = all(isinstance(s, int) for s in (*like.shape, *like.stride()))
    told = known and out.stride() != like.stride() and _places_alike(out, like)
    return out.as_strided(like.shape, like.stride()) if told else out


def _cache_rows(cached: CacheWrite | None, tensors: Sequence[Tensor]) -> Rows | None:
    if cached is None:
        return None
    cache, index = (*tensors, None)[:2]
    assert cache is not None
    return Rows(cache, cached.strides, cached.count, cached.first, index, cached.index_strides)


def _norm(turn: Turn, weights: Sequence[Tensor]) -> Norm | None:
    spec = turn.norm_spec
    if spec is None:
        return None
    q, k = (*(w.contiguous() for w in weights), None, None)[:2]
    return Norm(spec.eps, q, k, spec.add_one)
