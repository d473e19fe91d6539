"""Experts whose weights are E separate tensors: the kernel of `braze.kernels.cpp.moe` with a pointer an expert.

Nothing is stacked or copied; gate and up may be tensors of their own too.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from braze.kernels.cpp import moe
from braze.kernels.separate import unlike
from braze.kernels.spec import MoeSpec

MOST = 1024  # pointers that a function takes


def supports(
    x: Tensor, ids: Tensor, weights: Tensor, w1: Sequence[Tensor], w2: Sequence[Tensor], b1: Sequence[Tensor],
    b2: Sequence[Tensor], spec: MoeSpec,
) -> str | None:  # fmt: skip
    """None where `run` takes these tensors (real or fake), otherwise the reason why not; builds the kernel at first use."""
    tensors = counts(w1, w2, b1, b2)
    if sum(tensors) > MOST:
        return f"{sum(tensors)} tensors exceed {MOST}"
    reason = unlike(w1=w1, w2=w2, b1=b1, b2=b2)
    reason = reason or moe.refusal(x, ids, weights, w1[0], w2[0], first(b1), first(b2), spec)
    if reason is not None:
        return reason
    kernel, reason = moe.build(x, spec, tensors)
    return None if kernel else reason


def run(
    x: Tensor, ids: Tensor, weights: Tensor, w1: Sequence[Tensor], w2: Sequence[Tensor], b1: Sequence[Tensor],
    b2: Sequence[Tensor], spec: MoeSpec,
) -> Tensor:  # fmt: skip
    """As `braze.kernels.separate.moe`, on tensors that `supports` takes; numbers as `braze.kernels.cpp.moe.run`."""
    kernel, reason = moe.build(x, spec, counts(w1, w2, b1, b2))
    if kernel is None:
        raise RuntimeError(reason)
    out = torch.empty(x.shape, dtype=spec.out_dtype or x.dtype)
    if out.numel():
        kernel(out, x, ids, weights, *w1, *w2, *b1, *b2, *numbers(x, ids, weights, w1, w2, b1, b2, spec))
    return out


def counts(*lists: Sequence[Any]) -> tuple[int, ...]:
    """`tensors` of `braze.kernels.cpp.moe.source`."""
    return tuple(map(len, lists))


def first(tensors: Sequence[Any]) -> Any:
    return tensors[0] if tensors else None


def numbers(
    x: Any,
    ids: Any,
    weights: Any,
    w1: Sequence[Any],
    w2: Sequence[Any],
    b1: Sequence[Any],
    b2: Sequence[Any],
    spec: MoeSpec,
) -> tuple[Any, ...]:
    """As `braze.kernels.cpp.moe.numbers`."""
    return moe.numbers(x, ids, weights, w1[0], w2[0], first(b1), first(b2), spec, len(w2))
