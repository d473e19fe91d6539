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

from braze.kernels.cpp.source import AMX_PROBE, argument_types, moe_source
from braze.kernels.cpp.toolchain import compile_cpp
from braze.kernels.spec import GateUpLayout, MoeSpec

log = logging.getLogger(__name__)

_DTYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # as enum Dtype of moe.h
Tensors = tuple[int, ...]  # as `tensors` of moe_source
IN_PLACE = 12  # as ROWS_IN_PLACE of vector.h


@lru_cache(maxsize=256)
def _build(
    dtype: torch.dtype, layout: GateUpLayout, transposed: bool, activation: str, tensors: Tensors | None, amx: int
) -> tuple[Callable[..., None] | None, str]:
    """The compiled kernel, or None and why there is none."""
    try:
        text = _source(dtype, layout, transposed, activation, tensors, amx)
        return compile_cpp(argument_types(tensors or (1, 1, 1, 1)), text), ""
    except NotImplementedError as e:
        return None, f"the activation has no C++ form: {e}"
    except RuntimeError as e:
        return None, _warned(f"the C++ kernel does not build ({e})")


def build(x: Tensor, spec: MoeSpec, tensors: Tensors | None = None) -> tuple[Callable[..., None] | None, str]:
    """The kernel for tokens x, real or fake, built at its first use, or None and why not; tensors: as for `source`."""
    return _build(x.dtype, spec.layout, spec.transposed, spec.activation, tensors, _amx_for(x))


@lru_cache(maxsize=256)
def _source(
    dtype: torch.dtype, layout: GateUpLayout, transposed: bool, activation: str, tensors: Tensors | None, amx: int
) -> str:
    return moe_source(dtype, layout, transposed, activation, _bf16_dot() or amx > 0, tensors, amx)


def source(x: Tensor, spec: MoeSpec, tensors: Tensors | None = None) -> str:
    """The C++ text of the kernel for tokens x, real or fake; NotImplementedError where the activation has no C++ form.

    tensors: how many hold w1, w2, b1 and b2 where experts have tensors of their own; None: one holds all experts'.
    """
    return _source(x.dtype, spec.layout, spec.transposed, spec.activation, tensors, _amx_for(x))


def _amx_for(x: Tensor) -> int:
    """What of `_amx` serves tokens x: where no expert may have more rows than are multiplied in place, widening is faster."""
    few = isinstance(x.shape[0], int) and x.shape[0] <= IN_PLACE
    return 0 if few or x.dtype != torch.bfloat16 else _amx()


@cache
def _cpu() -> str:
    """What Linux says of the processor; nothing elsewhere."""
    info = Path("/proc/cpuinfo")
    return info.read_text() if info.exists() else ""


def _bf16_dot() -> bool:
    """Whether the dot product of bfloat16 beats widening to fp32: AMD's does, Intel's has half the rate of fp32 FMA."""
    return "AuthenticAMD" in _cpu()


@cache
def _amx() -> int:
    """1 where the CPU has a matrix unit for bfloat16, the operating system knows of it and the compiler too; else 0."""
    if " amx_bf16" not in _cpu():
        return 0
    try:
        compile_cpp(("void*",), AMX_PROBE)
    except RuntimeError as e:
        log.info("the CPU's matrix unit is not used: %s", e)
        return 0
    return 1


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
    reason = refusal(x, ids, weights, w1, w2, b1, b2, spec)
    if reason is not None:
        return reason
    kernel, reason = build(x, spec)
    return None if kernel else reason


def refusal(
    x: Tensor, ids: Tensor | None, weights: Tensor | None, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None,
    spec: MoeSpec,
) -> str | None:  # fmt: skip
    """As `supports`, but nothing is built. w1, w2, b1 and b2 are those of all experts, or of one; ids and weights are none
    where every row has the one expert."""
    dtype = x.dtype
    if dtype not in _DTYPES:
        return f"x is {dtype}, not float32, bfloat16 or float16"
    if spec.out_dtype is not None and spec.out_dtype not in _DTYPES:
        return f"the result would be {spec.out_dtype}"
    if ids is not None and ids.dtype not in (torch.int32, torch.int64):
        return f"ids are {ids.dtype}, not int32 or int64"
    for name, t in (("w1", w1), ("w2", w2)):
        if t.dtype != dtype:
            return f"{name} is {t.dtype} and x {dtype}"
        if t.stride(-1) != 1:
            return f"the last stride of {name} is {t.stride(-1)}, not 1"
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
    return None


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
    kernel, reason = build(x, spec)
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


def numbers(
    x: Any, ids: Any, weights: Any, w1: Any, w2: Any, b1: Any, b2: Any, spec: MoeSpec, experts: int | None = None
) -> tuple[Any, ...]:
    """What the function takes after its pointers: dtypes, sizes and strides of tensors (or of what stands for them).

    experts: how many, where w1, w2, b1 and b2 are one expert's. ids, weights: none where every row has the one expert.
    """
    lead = lambda t, dims: (*t.stride()[:2],) if len(t.shape) == dims else (0, t.stride(0))  # noqa: E731
    dtype_of = lambda t: 0 if t is None else _DTYPES[t.dtype]  # noqa: E731
    strides = lambda t: (0, 0) if t is None else t.stride()  # noqa: E731
    return (
        _DTYPES[spec.out_dtype or x.dtype], int(ids is not None and ids.dtype == torch.int64), dtype_of(weights),
        dtype_of(b1), dtype_of(b2), x.shape[0], x.shape[1], w2.shape[-2 if spec.transposed else -1],
        experts or w1.shape[0], 1 if ids is None else ids.shape[1], x.stride(0), *strides(ids), *strides(weights),
        *lead(w1, 3), *lead(w2, 3), *((0, 0) if b1 is None else lead(b1, 2)), *((0, 0) if b2 is None else lead(b2, 2)),
        int(spec.weight_on == "input"), float(spec.scale),
    )  # fmt: skip
