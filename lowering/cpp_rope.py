"""Rotations on CPU, with the norm before and the write into a cache after them, as one call of a C++ function for q and k.

The graph has it as `braze::rope_into`, which writes into tensors that it is given; Inductor's code has it as its own kernels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from braze.kernels.cpp import rope
from braze.kernels.spec import RopeSpec
from braze.kernels.turning import Norm, Rows
from braze.lowering import inductor


def launch(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, spec: RopeSpec, norm: Norm | None, outs: Sequence[Tensor],
    rows: Rows | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`rope.run` as a node of the graph being traced: what outs, or outs and a cache, hold then."""
    k_out = None if k is None else outs[1] if rows is None else rows.cache
    q_weight, k_weight = (None, None) if norm is None else (norm.q_weight, norm.k_weight)
    arguments = {
        "q_out": outs[0], "k_out": k_out, "q": q, "k": k, "cos": cos, "sin": sin, "q_weight": q_weight, "k_weight": k_weight,
        "index": None if rows is None else rows.index,
        "rows": [] if rows is None else [*rows.strides, rows.count, rows.first, *rows.index_strides],
        "rotary_dim": spec.rotary_dim, "start": spec.start, "layout_in": spec.layout_in, "layout_out": spec.layout_out,
        "inverse": spec.inverse, "out_dtype": spec.out_dtype,
        "eps": None if norm is None else norm.eps, "add_one": norm is not None and norm.add_one,
    }  # fmt: skip
    first, second = inductor.updated(torch.ops.braze.rope_into.default, ("q_out", "k_out"), arguments)
    return first, second


def lower(
    q_out: Any, k_out: Any, q: Any, k: Any, cos: Any, sin: Any, q_weight: Any, k_weight: Any, index: Any,
    rows: Sequence[Any], *, eps: float | None = None, add_one: bool = False, **attributes: Any,
) -> None:  # fmt: skip
    """`braze::rope_into` as the call."""
    spec, norm = RopeSpec(**attributes), None if eps is None else Norm(eps, add_one=add_one)
    given = [q_out, k_out, q, k, cos, sin, q_weight, k_weight, index]

    def numbers(lies: Sequence[Any]) -> Sequence[Any]:
        known = [None if t is None else lie for t, lie in zip(given, lies, strict=True)]
        return rope.numbers(known, spec, norm, rows, [lie.offset for lie in lies])

    tensors = [q if t is None else t for t in given]
    source = rope.source(q.get_dtype(), q_out.get_dtype(), spec.layout_in, spec.layout_out)
    inductor.cpp_update(tensors, 1 if k is None else 2, source, numbers, rope.ARGUMENTS)
