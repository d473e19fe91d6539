"""A router with the product before it, for few tokens on CPU: logits, choice and weights in one C++ call.

A product of a handful of rows, a top-k and what is left of a softmax take longer to start than to compute.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from braze.kernels.cpp import route
from braze.kernels.cpp.route import DTYPES
from braze.kernels.cpp.source import TYPES
from braze.kernels.cpp.toolchain import compile_cpp
from braze.kernels.spec import RouteSpec

FEW = 8  # tokens at most, as in gate.h
ARGUMENTS = ("void*", "void*", *("const void*",) * 4, *("int64_t",) * 23, "float", "float")


def source(x: torch.dtype, w: torch.dtype) -> str:
    """The C++ text of the kernel for x and w of these dtypes."""
    return route.text("gate.h", f"using X = {TYPES[x]};", f"using Gate = {TYPES[w]};")


@cache
def _build(x: torch.dtype, w: torch.dtype) -> tuple[Callable[..., None] | None, str]:
    try:
        return compile_cpp(ARGUMENTS, source(x, w)), ""
    except RuntimeError as e:
        return None, f"the C++ kernel does not build ({e})"


def supports(
    x: Tensor, w: Tensor, b: Tensor | None, bias: Tensor | None, logits: torch.dtype, spec: RouteSpec
) -> str | None:
    """None where `run` takes these tensors (real or fake), otherwise the reason why not; builds the kernel at first use."""
    tokens = x.shape[0]
    if not (isinstance(tokens, int) and 0 < tokens <= FEW):
        return f"{tokens} tokens are not 1 to {FEW}"
    if x.shape[1] != w.shape[1] or x.stride(1) != 1 or w.stride(1) != 1:
        return "rows of x or of the router's weight are not contiguous"
    reason = route.refusal(x.new_empty((tokens, w.shape[0]), dtype=logits), bias, spec)
    if reason is not None:
        return reason
    for t in (x, w, b):
        if t is not None and (t.dtype not in DTYPES or t.device.type != "cpu"):
            return f"a tensor is {t.dtype} on {t.device}"
    for t in (b, bias):
        if t is not None and not t.is_contiguous():
            return "a bias is not contiguous"
    kernel, reason = _build(x.dtype, w.dtype)
    return None if kernel else reason


def run(
    x: Tensor, w: Tensor, b: Tensor | None, bias: Tensor | None, logits: torch.dtype, spec: RouteSpec,
    outs: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`braze.kernels.reference.route` of x @ w.T (+ b), rounded to the dtype `logits`, for x [T, H] and w [E, H].

    The product is summed in float32. outs: where weights and ids are written; both are contiguous.
    """
    kernel, reason = _build(x.dtype, w.dtype)
    if kernel is None:
        raise RuntimeError(reason)
    weights, ids = outs or results(x, logits, spec)
    kernel(
        weights, ids, x, w, x if b is None else b, x if bias is None else bias,
        *numbers(weights, ids, x, w, b, bias, logits, spec),
    )  # fmt: skip
    return weights, ids


def results(x: Tensor, logits: torch.dtype, spec: RouteSpec) -> tuple[Tensor, Tensor]:
    """Tensors for weights and ids."""
    weights = x.new_empty((x.shape[0], spec.top_k + spec.shared), dtype=spec.out_dtype or logits)
    return weights, x.new_empty((x.shape[0], spec.top_k), dtype=spec.ids_dtype)


def numbers(
    weights: Any, ids: Any, x: Any, w: Any, b: Any, bias: Any, logits: torch.dtype, spec: RouteSpec,
    offsets: Sequence[Any] = (0, 0, 0, 0),
) -> tuple[Any, ...]:  # fmt: skip
    """What the function takes after its pointers, of tensors or of what stands for them.

    offsets: of x, w, b and bias from where their pointers point to, in elements.
    """
    return (
        DTYPES[weights.dtype], int(ids.dtype == torch.int64), x.stride(0), w.stride(0),
        0 if b is None else DTYPES[b.dtype], DTYPES[logits], x.shape[1], 0 if bias is None else DTYPES[bias.dtype],
        *offsets, x.shape[0], w.shape[0] - spec.shared, *route.attributes(spec, bias is not None),
    )  # fmt: skip
