"""The whole experts op as one C++ call on CPU: list rows by expert, two blocked products, sum each token's rows.

Nothing is packed or kept between calls, so a weight that changes in place is never stale.
"""

import logging
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from braze.kernels.cpp.source import moe_source
from braze.kernels.cpp.toolchain import compile_cpp
from braze.kernels.spec import GateUpLayout, MoeSpec

log = logging.getLogger(__name__)

_DTYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # as enum Dtype of moe.h
#: The function's parameters: the result, the op's tensors (x for one that is not given), then `numbers`.
ARGUMENTS = ("void*", *("const void*",) * 7, *("int64_t",) * 24, "float")


@lru_cache(maxsize=256)
def _build(
    dtype: torch.dtype, layout: GateUpLayout, transposed: bool, activation: str
) -> tuple[Callable[..., None] | None, str]:
    """The compiled kernel, or None and why there is none."""
    try:
        return compile_cpp(ARGUMENTS, _source(dtype, layout, transposed, activation)), ""
    except NotImplementedError as e:
        return None, f"the activation has no C++ form: {e}"
    except RuntimeError as e:
        return None, _warned(f"the C++ kernel does not build ({e})")


@lru_cache(maxsize=256)
def _source(dtype: torch.dtype, layout: GateUpLayout, transposed: bool, activation: str) -> str:
    return moe_source(dtype, layout, transposed, activation, _bf16_dot())


def source(dtype: torch.dtype, spec: MoeSpec) -> str:
    """The C++ text of the kernel for weights of `dtype`; NotImplementedError where the activation has no C++ form."""
    return _source(dtype, spec.layout, spec.transposed, spec.activation)


@cache
def _bf16_dot() -> bool:
    """Whether the dot product of bfloat16 beats widening to fp32: AMD's does, Intel's has half the rate of fp32 FMA."""
    info = Path("/proc/cpuinfo")
    return info.exists() and "AuthenticAMD" in info.read_text()


@lru_cache(maxsize=16)
def _warned(reason: str) -> str:
    """`reason`, logged the first time."""
    log.warning("experts run as ATen ops on this CPU, which is slower: %s", reason)
    return reason


def supports(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    spec: MoeSpec,
) -> str | None:
    """None where `run` takes these tensors (real or fake), otherwise the reason why not, in words.

    Builds the kernel at its first use; a machine on which it does not build is asked once for each kernel.
    """
    dtype = x.dtype
    if dtype not in _DTYPES:
        return f"x is {dtype}, not float32, bfloat16 or float16"
    if spec.out_dtype is not None and spec.out_dtype not in _DTYPES:
        return f"the result would be {spec.out_dtype}"
    if ids.dtype not in (torch.int32, torch.int64):
        return f"ids are {ids.dtype}, not int32 or int64"
    for name, t in (("w1", w1), ("w2", w2)):
        if t.dtype != dtype:
            return f"{name} is {t.dtype} and x {dtype}"
        if t.stride(2) != 1:
            return f"the last stride of {name} is {t.stride(2)}, not 1"
    if x.stride(1) != 1:
        return f"the last stride of x is {x.stride(1)}, not 1"
    for name, s in (("router weights", weights), ("b1", b1), ("b2", b2)):
        if s is not None and s.dtype not in (torch.float32, dtype):
            return f"{name} are {s.dtype}, neither float32 nor {dtype}"
    for name, o in (
        ("x", x),
        ("ids", ids),
        ("router weights", weights),
        ("w1", w1),
        ("w2", w2),
        ("b1", b1),
        ("b2", b2),
    ):
        if o is not None and o.device.type != "cpu":
            return f"{name}: device {o.device}, not cpu"
    kernel, reason = _build(dtype, spec.layout, spec.transposed, spec.activation)
    return None if kernel else reason


def run(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    spec: MoeSpec,
) -> Tensor:
    """As `braze.kernels.reference.moe`, on tensors that `supports` takes; act columns are rounded to bfloat16 where the
    CPU multiplies bfloat16 itself, all else is fp32. Uses torch.get_num_threads() threads; deterministic.
    """
    kernel, reason = _build(x.dtype, spec.layout, spec.transposed, spec.activation)
    if kernel is None:
        raise RuntimeError(reason)
    tokens, hidden = x.shape
    out_dtype = spec.out_dtype or x.dtype
    out = torch.empty((tokens, hidden), dtype=out_dtype)
    if not tokens or not hidden:
        return out
    kernel(
        out, x, ids, weights, w1, w2, x if b1 is None else b1, x if b2 is None else b2,
        *numbers(x, ids, weights, w1, w2, b1, b2, spec),
    )  # fmt: skip
    return out


def numbers(x: Any, ids: Any, weights: Any, w1: Any, w2: Any, b1: Any, b2: Any, spec: MoeSpec) -> tuple[Any, ...]:
    """What the function takes after its pointers: dtypes, sizes and strides of tensors (or of what stands for them)."""
    return (
        _DTYPES[spec.out_dtype or x.dtype], int(ids.dtype == torch.int64), _DTYPES[weights.dtype],
        0 if b1 is None else _DTYPES[b1.dtype], 0 if b2 is None else _DTYPES[b2.dtype],
        x.shape[0], x.shape[1], w2.shape[1 if spec.transposed else 2], w1.shape[0], ids.shape[1],
        x.stride(0), *ids.stride(), *weights.stride(), w1.stride(0), w1.stride(1), w2.stride(0), w2.stride(1),
        *((0, 0) if b1 is None else b1.stride()), *((0, 0) if b2 is None else b2.stride()),
        int(spec.weight_on == "input"), float(spec.scale),
    )  # fmt: skip
