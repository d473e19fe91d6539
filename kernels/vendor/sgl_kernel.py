"""sgl-kernel-xpu: a grouped product for Xe2 that can end with the activation, routers, and a rotation.

As read in sgl-project/sgl-kernel-xpu, src/torch_extension_sycl.cc (schemas), src/sycl/GroupGemmXe20.cpp and
src/sycl/kernels/moe/xe20/moe_kernel.hpp (experts), src/sycl/TopKSoftMax.cpp, TopKSigMoid.cpp and MoE_fused_gate.cpp
(routers; the last one's newest schema, with a renormalize, is not known here by its source) and src/sycl/Rope.cpp.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from braze.kernels.spec import MoeSpec, RopeSpec, RouteSpec
from braze.kernels.triton import compat
from braze.kernels.vendor import activation as same_function
from braze.kernels.vendor import blocks, detect

if TYPE_CHECKING:
    from braze.kernels.vendor.route import Choice

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
TOPK_SIGMOID = detect.Op(
    "sgl_kernel", "topk_sigmoid",
    ("Tensor! topk_weights, Tensor! topk_indices, Tensor gating_output, bool renormalize, Tensor? correction_bias",),
)  # fmt: skip
_GATE = "Tensor input, Tensor bias, int num_expert_group, int topk_group, int topk, int num_fused_shared_experts, "
FUSED_GATE = detect.Op(
    "sgl_kernel", "moe_fused_gate",
    (
        _GATE + "int scoring_func, float routed_scaling_factor, bool apply_routed_scaling_factor_on_output",
        _GATE + "float routed_scaling_factor, bool apply_routed_scaling_factor_on_output",
    ),
)  # fmt: skip
ROTARY = detect.Op(
    "sgl_kernel", "rotary_embedding",
    ("Tensor positions, Tensor query, Tensor key, int head_size, Tensor cos_sin_cache, bool is_neox",),
)  # fmt: skip
GATE_SCORING = ("sigmoid", "softmax")  # by their numbers
#: (experts, groups) that have a kernel of their own; the one for others takes the open groups for all
GATE_SHAPES = ((512, 16), (256, 8), (256, 16), (128, 4), (128, 8))
GATE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
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


def _router(bias: Tensor | None, spec: RouteSpec) -> detect.Op | str:
    """The op for such a router; in words why there is none."""
    if spec.groups > 1:
        return FUSED_GATE if spec.scoring in GATE_SCORING else f"groups of experts scored by {spec.scoring}"
    if spec.scoring == "sigmoid":
        return TOPK_SIGMOID
    if spec.scoring != "softmax":
        return f"scores by {spec.scoring}, neither softmax nor sigmoid"
    return TOPK_SOFTMAX if bias is None else "a softmax with a bias that the choice depends on"


def route_refusal(logits: Tensor, bias: Tensor | None, spec: RouteSpec) -> str | None:
    """`kernels.vendor.route.Provider.route_refusal`."""
    op = _router(bias, spec)
    found = op if isinstance(op, str) else detect.find(op)
    if isinstance(op, str) or isinstance(found, str):
        return str(found)
    if not detect.runs_on(found, logits.device):
        return f"{op.full_name} has no {logits.device.type} kernel"
    experts, k = logits.shape[-1], spec.top_k
    checks: tuple[tuple[bool, str], ...]
    if op is FUSED_GATE:
        checks = (
            (logits.dtype == torch.float32, f"logits in {logits.dtype}, to which scores are rounded, not float32"),
            ((experts, spec.groups) in GATE_SHAPES, f"{experts} experts in {spec.groups} groups"),
            (spec.group_score == "top2", "groups ranked by their largest score, not by the sum of two"),
            (spec.renorm == "add" and spec.eps == 0.0, "weights that are not divided by their sum alone"),
            (spec.scoring == "sigmoid" or found.form == 0, "a softmax, of which the loaded op does not know"),
        )
    elif op is TOPK_SIGMOID:
        checks = (
            (logits.dtype in GATE_DTYPES, f"logits in {logits.dtype}"),
            (experts <= 256, f"{experts} experts, more than 256"),
            (k <= MAX_TOP_K, f"{k} experts a token, more than {MAX_TOP_K}"),
        )
    else:
        checks = (
            (logits.dtype in (torch.bfloat16, torch.float16), f"logits in {logits.dtype}, not bfloat16 or float16"),
            (experts in EXPERTS_IN_FLOAT32, f"{experts} experts, not a power of two up to 256"),
            (k <= MAX_TOP_K, f"{k} experts a token, more than {MAX_TOP_K}"),
        )
    return next((reason for fine, reason in checks if not fine), None)


def topk(logits: Tensor, bias: Tensor | None, choice: "Choice") -> tuple[Tensor, Tensor]:
    """`kernels.vendor.route.Provider.topk`."""
    op = _router(bias, RouteSpec(choice.top_k, choice.scoring, groups=choice.groups, top_groups=choice.top_groups))  # type: ignore[arg-type]
    found = op if isinstance(op, str) else detect.find(op)
    if isinstance(found, str):
        raise RuntimeError(f"sgl_kernel: {found}")
    logits = logits.contiguous()
    if op is FUSED_GATE:
        added = logits.new_zeros(logits.shape[-1]) if bias is None else bias
        kind = (GATE_SCORING.index(choice.scoring),) if found.form == 0 else ()
        given = (logits, added, choice.groups, choice.top_groups, choice.top_k, 0, *kind, 1.0, False)
        weights, ids = found.call(*given)
        return weights, ids
    weights = logits.new_empty(logits.shape[0], choice.top_k, dtype=torch.float32)
    ids = logits.new_empty(logits.shape[0], choice.top_k, dtype=torch.int32)
    found.call(weights, ids, logits, choice.renorm, *((bias,) if op is TOPK_SIGMOID else ()))
    return weights, ids


def rope_refusal(x: Tensor, cos: Tensor, sin: Tensor, spec: RopeSpec) -> str | None:
    """`kernels.vendor.rope.Provider.rope_refusal`."""
    found = detect.find(ROTARY)
    if isinstance(found, str):
        return found
    checks = (
        (detect.runs_on(found, x.device), f"{ROTARY.full_name} has no {x.device.type} kernel"),
        (x.dtype in GATE_DTYPES, f"x in {x.dtype}"),
        (cos.dtype == sin.dtype == x.dtype, f"tables in {cos.dtype} for x in {x.dtype}"),
        (cos.shape[-1] == spec.rotary_dim // 2, "tables of two columns a pair, which need not be equal"),
    )
    return next((reason for fine, reason in checks if not fine), None)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """`kernels.vendor.rope.Provider.rotate`: the op turns rows [T, H * D] where they are, so it gets a copy of its own."""
    found = detect.find(ROTARY)
    if isinstance(found, str):
        raise RuntimeError(f"sgl_kernel: {found}")
    rows = x.reshape(x.shape[0], -1).clone()
    positions = torch.arange(x.shape[0], device=x.device)
    found.call(positions, rows, rows[:, :0], x.shape[-1], torch.cat((cos, sin), -1), not interleaved)
    return rows.view(x.shape)
