"""q and k that turn alike become one launch: the kernel reads a token's cos and sin once for all heads of both.

Two `braze::rope` calls are a pair where they share tables and attributes and have one shape but for the number of heads. The
kernel sees x as [B, H, S, D] and tables as [B or 1, S, W]; which dimension counts heads is told by the tables, which do not
vary along it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from braze.kernels.spec import RopeSpec
from braze.kernels.triton import rope as triton_rope
from braze.lowering import inductor
from braze.lowering.inline import inline_all


@dataclass(frozen=True)
class Turn:
    """One `braze::rope` call: axis is the dimension of x that counts heads."""

    call: fx.Node
    spec: RopeSpec
    axis: int

    @property
    def x(self) -> fx.Node:
        return self.call.args[0]  # type: ignore[return-value]

    @property
    def tables(self) -> tuple[fx.Node, fx.Node]:
        return self.call.args[1], self.call.args[2]  # type: ignore[return-value]


def turn(call: fx.Node) -> Turn | str:
    """The call as the kernel takes it, or why it does not."""
    x, cos, sin = (n.meta["val"] for n in call.args)  # type: ignore[union-attr]
    spec = RopeSpec(**call.kwargs)  # type: ignore[arg-type]
    axis = _head_axis(x, cos, sin)
    if axis is None:
        return "the kernel takes tables that do not vary from head to head, and x with a batch, heads and tokens"
    refusal = triton_rope.supports(_heads(x, axis), None, _rows(cos, axis, x.ndim), _rows(sin, axis, x.ndim), spec)
    return refusal or Turn(call, spec, axis)


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


def _rows(table: Tensor, axis: int, rank: int) -> Tensor:
    """A table as [B or 1, S, W], its rows contiguous: one that is not is small, and is copied."""
    for _ in range(rank - table.ndim):
        table = table[None]
    table = table.select(axis, 0)
    table = table if table.stride(-1) == 1 else table.contiguous()
    return table if rank == 4 else table[None]


def pairs(turns: Sequence[Turn]) -> list[tuple[Turn, ...]]:
    """Each turn alone, or two together that one launch can make, in the order of the graph."""
    found: list[tuple[Turn, ...]] = []
    left = list(turns)
    order = {n: i for i, n in enumerate(left[0].call.graph.nodes)} if left else {}
    while left:
        first = left.pop(0)
        second = next((t for t in left if _alike(first, t) and _together(first, t, order)), None)
        if second is not None:
            left.remove(second)
        found.append((first,) if second is None else (first, second))
    return found


def _alike(a: Turn, b: Turn) -> bool:
    x, y = a.x.meta["val"], b.x.meta["val"]
    same = (a.tables, a.spec, a.axis, x.ndim, x.dtype) == (b.tables, b.spec, b.axis, y.ndim, y.dtype)
    return same and all(statically_known_true(x.shape[d] == y.shape[d]) for d in range(x.ndim) if d != a.axis)


def _together(first: Turn, second: Turn, order: Mapping[fx.Node, int]) -> bool:
    """Whether nothing needs the first's result before the second's place."""
    return all(order[user] > order[second.call] for user in first.call.users)


def launch(group: tuple[Turn, ...]) -> None:
    """Replaces one call, or two that are alike, by one launch of the kernel."""
    turn = group[0]
    inputs = [*(t.x for t in group), *turn.tables]
    rank = turn.x.meta["val"].ndim

    def body(*tensors: Tensor) -> tuple[Tensor, ...]:
        *xs, cos, sin = tensors
        heads = [_heads(x, turn.axis) for x in xs]
        q, k = heads[0], heads[1] if len(heads) == 2 else None
        tile, warps = triton_rope.tiling(q)
        rotated = triton_rope.launch(
            q, k, _rows(cos, turn.axis, rank), _rows(sin, turn.axis, rank), turn.spec, None, False, tile, warps,
            start=inductor.start,
        )  # fmt: skip
        return tuple(_as_given(out, turn.axis, rank) for out in rotated if out is not None)

    inline_all([t.call for t in group], inputs, body, inductor.decompositions())
