"""A rotation on CPU, with the norm before it, as one call of a C++ function: `braze::norm_rope`, written into Inductor's code.

It takes the place of `braze::rope` where there is enough to turn; a few tokens are left to loops that fuse with what is around.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from braze.kernels.cpp import rope
from braze.kernels.spec import NormSpec, RopeSpec
from braze.lowering import inductor
from braze.lowering.rotations import Turn, as_kernels_see


def refusal(turn: Turn, asked_for: bool) -> str | None:
    """Why the C++ kernel does not make this call, in words; None where it does. asked_for: even where it does not pay."""
    size = turn.x.meta["val"].numel()
    if isinstance(size, int) and size < rope.WORTH and not asked_for:
        return "so few tokens are turned before a call has begun"
    if turn.spec.layout_in == turn.spec.layout_out == "half" and turn.norm is None and not asked_for:
        return "loops over halves are as fast"
    x, cos, sin = as_kernels_see(turn)
    weight = turn.weights[0].meta["val"] if turn.weights else None
    return rope.supports(x, cos, sin, turn.spec, weight)


def apply(turn: Turn) -> None:
    """Replaces a `braze::rope` call, and the norm before it, by `braze::norm_rope`."""
    call, norm = turn.call, turn.norm_spec
    attributes = {k: v for k, v in asdict(turn.spec).items() if k != "out_dtype"}
    if norm is not None:
        attributes |= {"eps": norm.eps, "add_one": norm.add_one}
    with call.graph.inserting_before(call):
        new = call.graph.call_function(
            torch.ops.braze.norm_rope.default,
            (turn.x, *turn.tables, turn.weights[0] if turn.weights else None),
            {**attributes, "axis": turn.axis, "turned": _is_turned(call.meta["val"], turn.axis)},
        )
    new.meta = {**call.meta}
    new.meta.pop("eager_input_vals", None)
    call.replace_all_uses_with(new)
    call.graph.erase_node(call)
    if turn.norm is not None and not turn.norm.users:
        call.graph.erase_node(turn.norm)


def lower(
    x: Any, cos: Any, sin: Any, weight: Any = None, *, axis: int, turned: bool = False, eps: float | None = None,
    add_one: bool = False, **attributes: Any,
) -> Any:  # fmt: skip
    """`braze::norm_rope` as the call."""
    spec, norm = RopeSpec(**attributes), None if eps is None else NormSpec(eps, add_one)
    size = x.get_size()
    rank = len(size)
    batch, token = size[0] if rank == 4 else 1, 2 * rank - 5 - axis
    given = [inductor.with_rows(x), cos, sin, *([] if weight is None else [inductor.with_rows(weight)])]
    wide = inductor.same_size(cos.get_size()[-1], spec.rotary_dim)

    def strides(of: Sequence[Any]) -> tuple[Any, Any, Any]:
        return of[0] if rank == 4 else 0, of[token], of[axis]

    def table(lie: Any) -> rope.Lie:
        at = [
            0 if d < 0 or inductor.same_size(lie.shape[d], 1) else lie.stride(d)
            for d in ((0, token) if rank == 4 else (-1, token))
            for d in (d - rank + len(lie.shape) if d >= 0 else d,)
        ]
        return (*at, lie.stride(len(lie.shape) - 1)), lie.dtype

    out = _dense(size, _order(rank, axis, token if turned else axis))

    def numbers(lies: Sequence[Any]) -> Sequence[Any]:
        return rope.numbers(
            (batch, size[token], size[axis], size[-1]), strides(out), strides(lies[0].stride()), table(lies[1]),
            table(lies[2]), wide, spec, norm, None if weight is None else lies[3].dtype,
        )  # fmt: skip

    tensors = given if weight is not None else [*given, given[0]]
    source = rope.source(spec.layout_in, spec.layout_out)
    return inductor.cpp_call(size, x.get_dtype(), tensors, source, numbers, rope.ARGUMENTS, out)


def _is_turned(val: Tensor, axis: int) -> bool:
    """Whether the graph's own result lies in memory with heads and tokens the other way round, and not row-major."""
    token = 2 * val.ndim - 5 - axis
    fits = []
    for other in (axis, token):
        wanted = zip(val.shape, val.stride(), _dense(val.shape, _order(val.ndim, axis, other)), strict=True)
        fits.append(all(statically_known_true(n == 1) or statically_known_true(s == w) for n, s, w in wanted))
    return fits == [False, True]


def _order(rank: int, a: int, b: int) -> list[int]:
    """The dimensions as they lie: row-major, but a and b the other way round."""
    return [{a: b, b: a}.get(d, d) for d in range(rank)]


def _dense(size: Sequence[Any], order: Sequence[int]) -> list[Any]:
    """The strides of a dense tensor whose dimensions lie in this order, the last one next to each other."""
    strides: dict[int, Any] = {}
    step: Any = 1
    for d in reversed(order):
        strides[d] = step
        step = step * size[d]
    return [strides[d] for d in range(len(size))]
