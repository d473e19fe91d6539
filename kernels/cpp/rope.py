"""A rotation of bfloat16 heads as one C++ call on CPU, an RMSNorm over each before it included.

Compilers vectorise neither pairs that lie side by side nor conversions of 16-bit types as well, and a norm is a second pass.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from braze.kernels.cpp.toolchain import compile_cpp
from braze.kernels.spec import NormSpec, PairLayout, RopeSpec

MAX_HEAD_SIZE = 512
#: Elements from which a call costs less than the loops that fuse with their neighbours (benchmarks/rope.py).
WORTH = 65536
_FLOATS = (torch.float32, torch.bfloat16)
_NUMBERS = (
    "batch", "tokens", "heads", "size", "start", "half", *(f"{t}{n}" for t in "oscn" for n in range(3)), "cos_float",
    "sin_float", "wide", "inverse", "norm", "weight_float",
)  # fmt: skip
#: Of `kernel`: the result, x, cos, sin, the norm's weight (or any tensor); numbers; what is added to the weight, epsilon.
ARGUMENTS = ("void*", *("const void*",) * 4, *("int64_t",) * len(_NUMBERS), "float", "float")
Lie = tuple[Sequence[Any], torch.dtype]  # how a table lies: strides for (batch, token, column), dtype


@cache
def source(layout_in: PairLayout, layout_out: PairLayout) -> str:
    """The C++ text of `kernel` for pairs that come in and go out as the layouts say."""
    constants = {"BRAZE_IN_INTERLEAVED": layout_in, "BRAZE_OUT_INTERLEAVED": layout_out}
    lists = (f"  const int64_t {t}[] = {{{t}0, {t}1, {t}2}};" for t in "oscn")
    return "\n".join(
        (
            "#include <torch/csrc/inductor/cpp_prefix.h>",
            "#include <algorithm>",
            "#include <cstring>",
            "#include <tuple>",
            "#include <ATen/cpu/vec/functional.h>",
            *(f"#undef {name}\n#define {name} {int(of == 'interleaved')}" for name, of in constants.items()),
            "namespace braze_rope {",
            (Path(__file__).parent / "rope.h").read_text(),
            "}  // namespace braze_rope",
            'extern "C" void kernel(void* out, const void* x, const void* cos, const void* sin, const void* weight,',
            "    " + ", ".join(f"int64_t {name}" for name in _NUMBERS) + ", float add, float eps) {",
            *lists,
            "  braze_rope::rope(",
            "      static_cast<at::BFloat16*>(out), static_cast<const at::BFloat16*>(x), cos, sin, weight, batch, tokens,",
            "      heads, size, start, half, o, s, c, n, cos_float, sin_float, wide, inverse, norm, weight_float, add, eps);",
            "}",
        )
    )


@cache
def _build(layout_in: PairLayout, layout_out: PairLayout) -> tuple[Callable[..., None] | None, str]:
    """The compiled kernel, or None and why there is none."""
    try:
        return compile_cpp(ARGUMENTS, source(layout_in, layout_out)), ""
    except RuntimeError as e:
        return None, f"the C++ kernel does not build ({e})"


def supports(x: Tensor, cos: Tensor, sin: Tensor, spec: RopeSpec, weight: Tensor | None = None) -> str | None:
    """Why the kernel can't take x [B, H, S, D], tables [B or 1, S, R or R/2] and a norm's weight [D] (fake ones too), in words;
    None where it can. Builds the kernel at its first use."""
    checks = (
        (x.device.type == "cpu", f"device {x.device}, not cpu"),
        (x.dtype == torch.bfloat16 and spec.out_dtype in (None, x.dtype), "not from bfloat16 to bfloat16"),
        (all(t.dtype in _FLOATS for t in (cos, sin)), "tables are neither float32 nor bfloat16"),
        (weight is None or weight.dtype in _FLOATS, "the norm's weight is neither float32 nor bfloat16"),
        (cos.shape == sin.shape and cos.shape[-1] in (spec.rotary_dim, spec.rotary_dim // 2), "tables of other widths"),
        (x.stride(-1) == 1, "the last dimension is not contiguous"),
        (x.shape[-1] <= MAX_HEAD_SIZE, f"head size {x.shape[-1]} exceeds {MAX_HEAD_SIZE}"),
    )
    reason = next((reason for fine, reason in checks if not fine), None)
    return reason or _build(spec.layout_in, spec.layout_out)[1] or None


def numbers(
    shape: Sequence[Any],
    out: Sequence[Any],
    x: Sequence[Any],
    cos: Lie,
    sin: Lie,
    wide: bool,
    spec: RopeSpec,
    norm: NormSpec | None,
    weight: torch.dtype | None,
) -> Sequence[Any]:
    """What follows the pointers: shape is (batch, tokens, heads, size), out and x are strides for (batch, token, head); wide:
    tables have a column for each element, not for each pair; weight: the dtype of the norm's."""
    kind = 0 if norm is None else 1 if weight is None else 2
    flags = (cos[1] == torch.float32, sin[1] == torch.float32, wide, spec.inverse)
    add, eps = (0.0, 0.0) if norm is None else (float(norm.add_one), norm.eps)
    return [
        *shape, spec.start, spec.rotary_dim // 2, *out, *x, *cos[0], *sin[0], *map(int, flags), kind,
        int(weight == torch.float32), add, eps,
    ]  # fmt: skip


def run(
    x: Tensor, cos: Tensor, sin: Tensor, spec: RopeSpec, norm: NormSpec | None = None, weight: Tensor | None = None
) -> Tensor:
    """As `braze.kernels.reference.rope` after its `rms_norm`, on tensors that `supports` takes -> [B, H, S, D], row-major."""
    kernel, reason = _build(spec.layout_in, spec.layout_out)
    if kernel is None:
        raise RuntimeError(reason)
    out = torch.empty(x.shape, dtype=x.dtype)
    lies = [((0 if t.shape[0] == 1 else t.stride(0), t.stride(1), t.stride(2)), t.dtype) for t in (cos, sin)]
    batch, heads, tokens, size = x.shape
    to, from_ = ((t.stride(0), t.stride(2), t.stride(1)) for t in (out, x))
    wide, dtype = cos.shape[-1] == spec.rotary_dim, None if weight is None else weight.dtype
    numbers_ = numbers((batch, tokens, heads, size), to, from_, lies[0], lies[1], wide, spec, norm, dtype)
    kernel(out, x, cos, sin, x if weight is None else weight.contiguous(), *numbers_)
    return out
