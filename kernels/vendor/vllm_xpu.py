"""vllm-xpu-kernels: a grouped product for Xe2, routers, and a rotation in float32.

As read in vllm-project/vllm-xpu-kernels, csrc/xpu/torch_bindings.cpp (schemas, of which the third is the newest),
csrc/xpu/grouped_gemm/xe_2/grouped_gemm_xe2_interface.hpp and vllm_xpu_kernels/fused_moe_interface.py. Other GPUs than Xe2 get
another kernel behind the same op, whose constraints are not the same: they are refused. Routers: csrc/moe/topk.cpp and
fused_grouped_topk.cpp. Rotations: csrc/pos_encoding_kernels.cpp, which computes in x's dtype.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from braze.kernels.spec import MoeSpec, RopeSpec, RouteSpec
from braze.kernels.triton import compat
from braze.kernels.vendor import blocks, detect

if TYPE_CHECKING:
    from braze.kernels.vendor.route import Choice

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
_TOPK = (
    "Tensor! topk_weights, Tensor! topk_indices, Tensor! token_expert_indices, Tensor gating_output, bool renormalize"
)
TOPK_SOFTMAX = detect.Op(
    "_moe_C", "topk_softmax", (f"{_TOPK}, Tensor? bias, Tensor? is_padding", f"{_TOPK}, Tensor? bias", _TOPK)
)  # fmt: skip
TOPK_SIGMOID = detect.Op(
    "_moe_C", "topk_sigmoid",
    (f"{_TOPK}, Tensor? bias, float routed_scaling_factor, Tensor? is_padding", f"{_TOPK}, Tensor? bias"),
)  # fmt: skip
#: What follows the bias, by op and form.
_REST = {TOPK_SOFTMAX.name: ((None,), (), ()), TOPK_SIGMOID.name: ((1.0, None), ())}
GROUPED_TOPK = detect.Op(
    "_moe_C", "fused_grouped_topk",
    (
        "Tensor hidden_states, Tensor gating_output, int n_topk, bool renormalize, int n_expert_group, int n_topk_group, "
        "str scoring_func, float routed_scaling_factor, Tensor? bias",
    ),
)  # fmt: skip
ROTARY = detect.Op(
    "_C", "rotary_embedding",
    ("Tensor positions, Tensor! query, Tensor?! key, int head_size, Tensor cos_sin_cache, bool is_neox",),
)  # fmt: skip
ROUTER_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_GROUPS, MAX_GROUPED_EXPERTS, MAX_GROUPED_TOP_K = 32, 256, 8


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


def _router(spec: RouteSpec) -> detect.Op | str:
    """The op for such a router; in words why there is none."""
    if spec.groups > 1:
        return GROUPED_TOPK if spec.scoring == "sigmoid" else f"groups of experts scored by {spec.scoring}, not sigmoid"
    known = {"softmax": TOPK_SOFTMAX, "sigmoid": TOPK_SIGMOID}
    return known.get(spec.scoring, f"scores by {spec.scoring}, neither softmax nor sigmoid")


def route_refusal(logits: Tensor, bias: Tensor | None, spec: RouteSpec) -> str | None:
    """`kernels.vendor.route.Provider.route_refusal`."""
    op = _router(spec)
    found = op if isinstance(op, str) else detect.find(op)
    if isinstance(op, str) or isinstance(found, str):
        return str(found)
    experts, dtype = logits.shape[-1], logits.dtype
    rounds = "to which scores are rounded, not float32"
    checks: tuple[tuple[bool, str], ...] = (
        (detect.runs_on(found, logits.device), f"{op.full_name} has no {logits.device.type} kernel"),
        (dtype in ROUTER_DTYPES, f"logits in {dtype}"),
        (spec.scoring == "softmax" or dtype == torch.float32, f"logits in {dtype}, {rounds}"),
        (bias is None or found.form < 2, "a bias that the loaded op does not take"),
    )
    if op is GROUPED_TOPK:
        ranked = "top2" if bias is not None else "max"
        checks += (
            (spec.group_score == ranked, f"groups ranked by {spec.group_score}, where the op does by {ranked}"),
            (spec.groups <= MAX_GROUPS, f"{spec.groups} groups, more than {MAX_GROUPS}"),
            (experts <= MAX_GROUPED_EXPERTS, f"{experts} experts in groups, more than {MAX_GROUPED_EXPERTS}"),
            (spec.top_k <= MAX_GROUPED_TOP_K, f"{spec.top_k} experts a token, more than {MAX_GROUPED_TOP_K}"),
        )
    return next((reason for fine, reason in checks if not fine), None)


def topk(logits: Tensor, bias: Tensor | None, choice: "Choice") -> tuple[Tensor, Tensor]:
    """`kernels.vendor.route.Provider.topk`."""
    op = _router(RouteSpec(choice.top_k, choice.scoring, groups=choice.groups, top_groups=choice.top_groups))  # type: ignore[arg-type]
    found = op if isinstance(op, str) else detect.find(op)
    if isinstance(op, str) or isinstance(found, str):
        raise RuntimeError(f"vllm_xpu: {found}")
    logits = logits.contiguous()
    if op is GROUPED_TOPK:
        weights, ids = found.call(
            logits, logits, choice.top_k, choice.renorm, choice.groups, choice.top_groups, choice.scoring, 1.0, bias
        )
        return weights, ids
    weights = logits.new_empty(logits.shape[0], choice.top_k, dtype=torch.float32)
    ids, rows = (logits.new_empty(weights.shape, dtype=torch.int32) for _ in range(2))
    rest = (bias, *_REST[op.name][found.form]) if found.form < 2 else ()
    found.call(weights, ids, rows, logits, choice.renorm, *rest)
    return weights, ids


def rope_refusal(x: Tensor, cos: Tensor, sin: Tensor, spec: RopeSpec) -> str | None:
    """`kernels.vendor.rope.Provider.rope_refusal`."""
    found = detect.find(ROTARY)
    if isinstance(found, str):
        return found
    checks = (
        (detect.runs_on(found, x.device), f"{ROTARY.full_name} has no {x.device.type} kernel"),
        (x.dtype == torch.float32, f"x in {x.dtype}, in which it rounds at every step"),
        (cos.dtype == sin.dtype == x.dtype, f"tables in {cos.dtype} for x in {x.dtype}"),
        (cos.shape[-1] == spec.rotary_dim // 2, "tables of two columns a pair, which need not be equal"),
    )
    return next((reason for fine, reason in checks if not fine), None)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """`kernels.vendor.rope.Provider.rotate`: the op turns rows [T, H * D] where they are, so it gets a copy of its own."""
    found = detect.find(ROTARY)
    if isinstance(found, str):
        raise RuntimeError(f"vllm_xpu: {found}")
    rows = x.reshape(x.shape[0], -1).clone()
    positions = torch.arange(x.shape[0], device=x.device)
    found.call(positions, rows, None, x.shape[-1], torch.cat((cos, sin), -1), not interleaved)
    return rows.view(x.shape)
