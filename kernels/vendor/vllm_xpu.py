"""vllm-xpu-kernels: a grouped product for Xe2.

As read in vllm-project/vllm-xpu-kernels, csrc/xpu/torch_bindings.cpp (schemas, of which the third is the newest),
csrc/xpu/grouped_gemm/xe_2/grouped_gemm_xe2_interface.hpp and vllm_xpu_kernels/fused_moe_interface.py. Other GPUs than Xe2 get
another kernel behind the same op, whose constraints are not the same: they are refused.
"""

import torch
from torch import Tensor

from braze.kernels.spec import MoeSpec
from braze.kernels.triton import compat
from braze.kernels.vendor import blocks, detect

_QUANTIZED = "int N, int K, int num_experts, bool is_B_int4, bool is_B_mxfp4"
GROUPED_MM = detect.Op(
    "_xpu_C", "cutlass_grouped_gemm_interface",
    (
        "Tensor ptr_A, Tensor ptr_B, Tensor? ptr_scales, Tensor? ptr_bias, Tensor ptr_D, Tensor expert_first_token_offset, "
        + _QUANTIZED,
        "Tensor ptr_A, Tensor ptr_B, Tensor? ptr_scales, Tensor? ptr_bias, Tensor ptr_D, Tensor rows_per_expert, " + _QUANTIZED,
        "Tensor ptr_A, Tensor? ptr_A_scale, Tensor ptr_B, Tensor? ptr_B_scale, Tensor? ptr_bias, Tensor ptr_D, "
        "Tensor rows_per_expert, int N, int K, int num_experts",
    ),
)  # fmt: skip
DTYPES = (torch.bfloat16, torch.float16)


def moe_refusal(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, spec: MoeSpec) -> str | None:
    """Why the products of these experts can't be made, in words; None where they can."""
    found = detect.find(GROUPED_MM)
    if isinstance(found, str):
        return found
    products = [w if spec.transposed else w.transpose(1, 2) for w in (w1, w2)]  # [E, K, N]
    columns = [int(w.shape[2]) for w in products]
    checks = (
        (detect.runs_on(found, x.device), f"{GROUPED_MM.full_name} has no {x.device.type} kernel"),
        (compat.device_name(x.device) == "bmg", f"made for Xe2 GPUs, not for {compat.device_name(x.device)}"),
        (x.dtype in DTYPES, f"rows in {x.dtype}, not bfloat16 or float16"),
        (all(n % 8 == 0 for n in columns), f"products with {columns[0]} and {columns[1]} columns, not multiples of 8"),
        (all(w.is_contiguous() for w in products), "weights that do not lie as [E, K, N], contiguous"),
        (blocks.aligned(w1, w2), "weights that do not begin at 64 bytes, or with a side that is no multiple of 32"),
    )
    return next((reason for fine, reason in checks if not fine), None)


def fused(w1: Tensor, spec: MoeSpec) -> str:
    """The product has no activation of its own."""
    return ""


def grouped_mm(x: Tensor, w: Tensor, counts: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """`kernels.vendor.moe.Provider.grouped_mm`."""
    found = detect.find(GROUPED_MM)
    if isinstance(found, str):
        raise RuntimeError(f"vllm_xpu: {found}")
    a, b, (experts, n, k) = x.contiguous(), w.transpose(1, 2), w.shape
    out = x.new_empty(x.shape[0], n)
    if found.form == 0:
        offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0))).to(torch.int64)
        found.call(a, b, None, None, out, offsets, n, k, experts, False, False)
    elif found.form == 1:
        found.call(a, b, None, None, out, counts, n, k, experts, False, False)
    else:
        found.call(a, None, b, None, None, out, counts, n, k, experts)
    return out
