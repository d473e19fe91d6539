"""sgl-kernel-xpu: a grouped product for Xe2 that can end with the activation, and a softmax router.

As read in sgl-project/sgl-kernel-xpu, src/torch_extension_sycl.cc (schemas), src/sycl/GroupGemmXe20.cpp and
src/sycl/kernels/moe/xe20/moe_kernel.hpp (experts) and src/sycl/TopKSoftMax.cpp (routers).
"""

import torch
from torch import Tensor

from braze.kernels.spec import MoeSpec, RouteSpec
from braze.kernels.triton import compat
from braze.kernels.vendor import activation as same_function
from braze.kernels.vendor import blocks, detect

GROUPED_MM = detect.Op(
    "sgl_kernel", "moe_grouped_mm_nt_xe20",
    (
        "Tensor! output, Tensor activations, Tensor weights, Tensor? bias, Tensor total_rows_for_experts, int n_experts, "
        "int activation_type, bool fuse_act",
    ),
)  # fmt: skip
TOPK_SOFTMAX = detect.Op(
    "sgl_kernel", "topk_softmax",
    ("Tensor! topk_weights, Tensor! topk_indices, Tensor gating_output, bool renormalize",),
)  # fmt: skip
MAX_TOP_K = 8
#: Other numbers of experts go through a kernel that rounds weights to the logits' dtype more than once.
EXPERTS_IN_FLOAT32 = tuple(2**i for i in range(9))
#: name -> (number, what it computes, the layout of its gate and up columns); 2 has the defaults alpha 1.702 and limit 7
ACTIVATIONS = {
    "silu": (0, "g*u*sigmoid(g)", "halves"),
    "gelu_tanh": (1, "0.5*g*u*(1 + tanh(0.7978845608028654*(g + 0.044715*g**3)))", "halves"),
    "swiglu_oss": (2, "Min(g, 7.0)*sigmoid(1.702*Min(g, 7.0))*(1 + Max(-7.0, Min(u, 7.0)))", "interleaved"),
}
NO_ACTIVATION = 0  # ignored where fuse_act is false


def moe_refusal(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, spec: MoeSpec) -> str | None:
    """Why the products of these experts can't be made, in words; None where they can."""
    found = detect.find(GROUPED_MM)
    if isinstance(found, str):
        return found
    experts = w1.shape[0]
    views = [w.transpose(1, 2) if spec.transposed else w for w in (w1, w2)]
    checks = (
        (detect.runs_on(found, x.device), f"{GROUPED_MM.full_name} has no {x.device.type} kernel"),
        (compat.device_name(x.device) == "bmg", f"made for Xe2 GPUs, not for {compat.device_name(x.device)}"),
        (x.dtype == torch.bfloat16, f"rows in {x.dtype}, not bfloat16"),
        (experts % 8 == 0, f"{experts} experts, not a multiple of 8"),
        (
            all(_rows_of_k(w) for w in views),
            "weights that do not lie as [E, N, K] with whole experts one after the other",
        ),
        (blocks.aligned(w1, w2), "weights that do not begin at 64 bytes, or with a side that is no multiple of 32"),
    )
    return next((reason for fine, reason in checks if not fine), None)


def _rows_of_k(w: Tensor) -> bool:
    """Whether w [E, N, K] has its K contiguous and experts N rows apart, the only stride that the kernel is told."""
    return w.stride(2) == 1 and w.stride(0) == w.shape[1] * w.stride(1) and w.stride(1) >= w.shape[2]


def fused(w1: Tensor, spec: MoeSpec) -> str:
    """The activation that the first product may end with; "" where there is none or a weight comes before it."""
    if spec.weight_on == "input" or spec.layout == "none":
        return ""
    fitting = (name for name, (_, text, layout) in ACTIVATIONS.items()
               if layout == spec.layout and same_function.same(spec.activation, text))  # fmt: skip
    return next(fitting, "")


def grouped_mm(x: Tensor, w: Tensor, counts: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """`kernels.vendor.moe.Provider.grouped_mm`."""
    found = detect.find(GROUPED_MM)
    if isinstance(found, str):
        raise RuntimeError(f"sgl_kernel: {found}")
    out = x.new_empty(x.shape[0], w.shape[1] // 2 if activation else w.shape[1])
    number = ACTIVATIONS[activation][0] if activation else NO_ACTIVATION
    found.call(out, x.contiguous(), w, bias, counts, w.shape[0], number, bool(activation))
    return out


def route_refusal(logits: Tensor, spec: RouteSpec) -> str | None:
    """Why `topk` can't make these choices, in words; None where it can."""
    found = detect.find(TOPK_SOFTMAX)
    if isinstance(found, str):
        return found
    experts = logits.shape[-1]
    checks = (
        (detect.runs_on(found, logits.device), f"{TOPK_SOFTMAX.full_name} has no {logits.device.type} kernel"),
        (logits.dtype in (torch.bfloat16, torch.float16), f"logits in {logits.dtype}, not bfloat16 or float16"),
        (experts in EXPERTS_IN_FLOAT32, f"{experts} experts, not a power of two up to 256"),
        (spec.top_k <= MAX_TOP_K, f"{spec.top_k} experts a token, more than {MAX_TOP_K}"),
    )
    return next((reason for fine, reason in checks if not fine), None)


def topk(logits: Tensor, top_k: int, renorm: bool) -> tuple[Tensor, Tensor]:
    """`kernels.vendor.route.Provider.topk`."""
    found = detect.find(TOPK_SOFTMAX)
    if isinstance(found, str):
        raise RuntimeError(f"sgl_kernel: {found}")
    weights = logits.new_empty(logits.shape[0], top_k, dtype=torch.float32)
    ids = logits.new_empty(logits.shape[0], top_k, dtype=torch.int32)
    found.call(weights, ids, logits.contiguous(), renorm)
    return weights, ids
