"""A rotation of q's and k's heads as one C++ call on CPU, an RMSNorm over each before it and the write into a cache included.

Compilers vectorise neither pairs that lie side by side nor conversions of 16-bit types as well, make tables' elements anew for
each head, and a norm is a second pass.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from braze.kernels.cpp.toolchain import compile_cpp
from braze.kernels.spec import PairLayout, RopeSpec
from braze.kernels.turning import Norm, Rows

MAX_HEAD_SIZE = 512
TYPES = {torch.float32: "float", torch.bfloat16: "at::BFloat16", torch.float16: "at::Half"}
_CODE = {dtype: n for n, dtype in enumerate(TYPES)}  # as in rope.h
_POINTERS = ("q_out", "k_out", "q", "k", "cos", "sin", "q_weight", "k_weight", "index")  # the first two for writing
_NUMBERS = (
    *(f"{name}_at" for name in _POINTERS), "batch", "tokens", "size", "start", "half", "q_heads", "k_heads",
    *(f"{x}_{to}{n}" for x in "qk" for to in ("from", "to") for n in range(3)),
    *(f"{table}_{of}" for table in ("cos", "sin") for of in ("type", "batch", "token", "step")),
    "wide", "inverse", "norm", "weight_type", "index_type", "index_batch", "index_token", "first", "count",
)  # fmt: skip
#: Of `kernel`: tensors (any, where it has none), numbers, what is added to a weight, epsilon.
ARGUMENTS = (*("void*",) * 2, *("const void*",) * (len(_POINTERS) - 2), *("int64_t",) * len(_NUMBERS), "float", "float")


@cache
def source(dtype: torch.dtype, out: torch.dtype, layout_in: PairLayout, layout_out: PairLayout) -> str:
    """The C++ text of `kernel` for heads of dtype, results of `out`, and pairs that come in and go out as the layouts say."""
    constants = {"BRAZE_IN_INTERLEAVED": layout_in, "BRAZE_OUT_INTERLEAVED": layout_out}
    types = (*(f"{kind} {name}" for kind, name in zip(ARGUMENTS, (*_POINTERS, *_NUMBERS, "add", "eps"), strict=True)),)
    strides = (
        f"  const int64_t {x}_{to}[] = {{{x}_{to}0, {x}_{to}1, {x}_{to}2}};" for x in "qk" for to in ("from", "to")
    )
    heads = (
        f"{{static_cast<const In*>({x}) + {x}_at, static_cast<Out*>({x}_out) + {x}_out_at, {x}_weight, {x}_weight_at, "
        f"{x}_heads, {x}_from, {x}_to}}"
        for x in "qk"
    )
    tables = (f"{{{t}, {t}_at, {t}_type, {t}_batch, {t}_token, {t}_step}}" for t in ("cos", "sin"))
    places = "{index, index_at, index_type, index_batch, index_token, first, count}"
    form = "{size, start, half, norm, weight_type, wide != 0, inverse != 0, add, eps}"
    return "\n".join(
        (
            "#include <torch/csrc/inductor/cpp_prefix.h>",
            "#include <algorithm>",
            "#include <cstring>",
            "#include <stdexcept>",
            "#include <tuple>",
            "#include <ATen/cpu/vec/functional.h>",
            *(f"#undef {name}\n#define {name} {int(of == 'interleaved')}" for name, of in constants.items()),
            "namespace braze_kernel {",
            f"using In = {TYPES[dtype]};\nusing Out = {TYPES[out]};",
            (Path(__file__).parent / "rope.h").read_text(),
            "}  // namespace braze_kernel",
            f'extern "C" void kernel({", ".join(types)}) {{',
            "  using namespace braze_kernel;",
            *strides,
            f"  rope({', '.join((*heads, *tables, places, form))}, batch, tokens);",
            "}",
        )
    )


@cache
def _build(*form: Any) -> tuple[Callable[..., None] | None, str]:
    """The compiled kernel of this `source`, or None and why there is none."""
    try:
        return compile_cpp(ARGUMENTS, source(*form)), ""
    except RuntimeError as e:
        return None, f"the C++ kernel does not build ({e})"


def _form(dtype: torch.dtype, spec: RopeSpec) -> tuple[torch.dtype, torch.dtype, PairLayout, PairLayout]:
    return dtype, spec.out_dtype or dtype, spec.layout_in, spec.layout_out


def supports(x: Tensor, cos: Tensor, sin: Tensor, spec: RopeSpec, weight: Tensor | None = None) -> str | None:
    """Why the kernel can't take x [B, H, S, D], tables [B or 1, S, R or R/2] and a norm's weight [D] (fake ones too), in words;
    None where it can. Builds the kernel at its first use."""
    checks = (
        (x.device.type == "cpu", f"device {x.device}, not cpu"),
        (x.dtype in TYPES and (spec.out_dtype or x.dtype) in TYPES, f"from {x.dtype} to {spec.out_dtype or x.dtype}"),
        (all(t.dtype in TYPES for t in (cos, sin)), "tables are neither float32 nor of 16 bits"),
        (weight is None or weight.dtype in TYPES, "the norm's weight is neither float32 nor of 16 bits"),
        (cos.shape == sin.shape and cos.shape[-1] in (spec.rotary_dim, spec.rotary_dim // 2), "tables of other widths"),
        (x.stride(-1) == 1, "the last dimension is not contiguous"),
        (x.shape[-1] <= MAX_HEAD_SIZE, f"head size {x.shape[-1]} exceeds {MAX_HEAD_SIZE}"),
    )
    reason = next((reason for fine, reason in checks if not fine), None)
    return reason or _build(*_form(x.dtype, spec))[1] or None


def numbers(
    tensors: Sequence[Any], spec: RopeSpec, norm: Norm | None, rows: Sequence[Any],
    offsets: Sequence[Any] = (0,) * len(_POINTERS),
) -> list[Any]:  # fmt: skip
    """What follows the pointers to these tensors, or to what has their shape, dtype and stride(). rows: empty, or a cache's
    strides for (batch, row, head), its number of rows, the first of them, and the index's strides for (batch, token). offsets:
    in elements, from each pointer to its tensor."""
    q_out, k_out, q, k, cos, sin, q_weight, _, index = tensors
    to, more = (rows[:3], rows[3:]) if rows else (_strides(k_out), (0, 0, 0, 0))
    count, first, index_batch, index_token = more
    tables = [(_CODE[t.dtype], 0 if t.shape[0] == 1 else t.stride(0), t.stride(1), t.stride(2)) for t in (cos, sin)]
    kind = 0 if norm is None else 1 if q_weight is None else 2
    return [
        *offsets, q.shape[0], q.shape[2], q.shape[3], spec.start, spec.rotary_dim // 2, q.shape[1],
        0 if k is None else k.shape[1], *_strides(q), *_strides(q_out), *_strides(k), *to, *tables[0], *tables[1],
        int(cos.shape[-1] == spec.rotary_dim), int(spec.inverse), kind, 0 if q_weight is None else _CODE[q_weight.dtype],
        0 if index is None else 1 if index.dtype == torch.int32 else 2, index_batch, index_token, first, count,
        0.0 if norm is None else float(norm.add_one), 0.0 if norm is None else norm.eps,
    ]  # fmt: skip


def _strides(x: Any) -> tuple[Any, Any, Any]:
    """(batch, token, head) strides of [B, H, S, D]."""
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(2), x.stride(1))


def run(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, spec: RopeSpec, *, norm: Norm | None = None,
    outs: Sequence[Tensor] | None = None, rows: Rows | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As `braze.kernels.reference.rope` after its `rms_norm`, on tensors that `supports` takes: q [B, H, S, D], k [B, K, S, D]
    -> results, row-major, or `outs`; in k's place the cache, where rows say that k goes there."""
    kernel, reason = _build(*_form(q.dtype, spec))
    if kernel is None:
        raise RuntimeError(reason)
    dtype = spec.out_dtype or q.dtype
    q_out = outs[0] if outs else torch.empty(q.shape, dtype=dtype)
    k_out = None if k is None else rows.cache if rows else outs[1] if outs else torch.empty(k.shape, dtype=dtype)
    q_weight, k_weight = (None, None) if norm is None else (norm.q_weight, norm.k_weight)
    index = None if rows is None else rows.index
    lie = [] if rows is None else [*rows.strides, rows.count, rows.first, *rows.index_strides]
    tensors = (q_out, k_out, q, k, cos, sin, q_weight, k_weight, index)
    kernel(*(q if t is None else t for t in tensors), *numbers(tensors, spec, norm, lie))
    return q_out, k_out
