"""A dense MLP of few rows: the experts' kernel with one expert that every row has, with the weight 1.

Two or three products of a few rows, and what lies between, are one call that reads each weight once; torch's own products of
so few rows read slower than memory gives, and each is a call of its own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from braze.kernels.cpp import moe
from braze.kernels.spec import MoeSpec

FEW = 8  # rows at most: they are multiplied with weights where these lie, as up to ROWS_IN_PLACE of vector.h are


def few(rows: Tensor) -> bool:
    """Whether rows, a tensor [T, .] that may be fake, are few, and on a CPU."""
    tokens = rows.shape[0]
    return rows.device.type == "cpu" and isinstance(tokens, int) and 0 < tokens <= FEW


def supports(
    x: Tensor, w1: Sequence[Tensor], w2: Tensor, b1: Sequence[Tensor], b2: Tensor | None, spec: MoeSpec
) -> str | None:
    """None where `run` takes these tensors (real or fake), otherwise the reason why not; builds the kernel at first use."""
    if not few(x):
        return f"{x.shape[0]} rows on {x.device} are not 1 to {FEW} on a CPU"
    if len({(t.dtype, tuple(t.shape), t.stride()) for t in w1}) > 1:
        return "gate and up differ in dtype, shape or strides"
    if len({(t.dtype, t.stride()) for t in b1}) > 1:
        return "the biases of gate and up differ in dtype or strides"
    reason = moe.refusal(x, None, None, w1[0], w2, b1[0] if b1 else None, b2, spec)
    if reason is not None:
        return reason
    kernel, reason = moe.build(x, spec, tensors(w1, b1, b2))
    return None if kernel else reason


def run(x: Tensor, w1: Sequence[Tensor], w2: Tensor, b1: Sequence[Tensor], b2: Tensor | None, spec: MoeSpec) -> Tensor:
    """As `braze.kernels.reference.mlp`, on tensors that `supports` takes; numbers as `braze.kernels.cpp.moe.run`."""
    kernel, reason = moe.build(x, spec, tensors(w1, b1, b2))
    if kernel is None:
        raise RuntimeError(reason)
    out = torch.empty((x.shape[0], w2.shape[1 if spec.transposed else 0]), dtype=spec.out_dtype or x.dtype)
    kernel(out, *pointers(x, w1, w2, b1, b2), *numbers(x, w1, w2, b1, b2, spec))
    return out


def tensors(w1: Sequence[Any], b1: Sequence[Any], b2: Any) -> tuple[int, int, int, int]:
    """`tensors` of `braze.kernels.cpp.moe.source`."""
    return len(w1), 1, len(b1), int(b2 is not None)


def pointers(x: Any, w1: Sequence[Any], w2: Any, b1: Sequence[Any], b2: Any) -> list[Any]:
    """What the function takes after the result; x stands for ids and weights, which are not read."""
    return [x, x, x, *w1, w2, *b1, *([] if b2 is None else [b2])]


def numbers(x: Any, w1: Sequence[Any], w2: Any, b1: Sequence[Any], b2: Any, spec: MoeSpec) -> tuple[Any, ...]:
    """As `braze.kernels.cpp.moe.numbers`."""
    return moe.numbers(x, None, None, w1[0], w2, b1[0] if b1 else None, b2, spec, 1)
