"""Intel Extension for PyTorch: rotations of whole heads, and a softmax router of few experts.

As read in intel/intel-extension-for-pytorch, csrc/gpu/aten/operators/Rope.cpp and MoeOps.cpp; its ops are registered by their
C++ types alone, so that arguments are called _0, _1 and nothing says what is written.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from braze.kernels.spec import RopeSpec, RouteSpec
from braze.kernels.vendor import detect

if TYPE_CHECKING:
    from braze.kernels.vendor.route import Choice

_FOUR = ("Tensor _0, Tensor _1, Tensor _2, Tensor _3",)  # x, sin, cos, result
ROTATE_HALF = detect.Op("torch_ipex", "apply_rotary_embedding_half", _FOUR)
ROTATE_TWO = detect.Op("torch_ipex", "apply_rotary_embedding_two", _FOUR)
TOPK_SOFTMAX = detect.Op("torch_ipex", "topk_softmax", ("Tensor _0, int _1, bool _2",))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOP_K = (1, 2, 4, 8)
MAX_EXPERTS = 32  # more logits of a work group than these do not fit its local memory


def rope_refusal(x: Tensor, cos: Tensor, sin: Tensor, spec: RopeSpec) -> str | None:
    """`kernels.vendor.rope.Provider.rope_refusal`."""
    op = ROTATE_TWO if spec.layout_in == "interleaved" else ROTATE_HALF
    found = detect.find(op)
    if isinstance(found, str):
        return found
    tables = {cos.dtype, sin.dtype}
    checks = (
        (detect.runs_on(found, x.device), f"{op.full_name} has no {x.device.type} kernel"),
        (x.dtype in DTYPES, f"x in {x.dtype}, not bfloat16, float16 or float32"),
        (tables in ({torch.float32}, {x.dtype}), "tables in neither float32 nor x's dtype"),
        (spec.rotary_dim == x.shape[-1], f"{spec.rotary_dim} of {x.shape[-1]} elements of a head turn, not all"),
        (cos.shape[-1] == spec.rotary_dim, "tables of a column a pair"),
    )
    return next((reason for fine, reason in checks if not fine), None)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """`kernels.vendor.rope.Provider.rotate`."""
    found = detect.find(ROTATE_TWO if interleaved else ROTATE_HALF)
    if isinstance(found, str):
        raise RuntimeError(f"ipex: {found}")
    out = torch.empty_like(x)
    found.call(x, sin[:, None].expand(x.shape), cos[:, None].expand(x.shape), out)
    return out


def route_refusal(logits: Tensor, bias: Tensor | None, spec: RouteSpec) -> str | None:
    """`kernels.vendor.route.Provider.route_refusal`."""
    found = detect.find(TOPK_SOFTMAX)
    if isinstance(found, str):
        return found
    experts = logits.shape[-1]
    checks = (
        (detect.runs_on(found, logits.device), f"{TOPK_SOFTMAX.full_name} has no {logits.device.type} kernel"),
        (spec.scoring == "softmax", f"scores by {spec.scoring}, not softmax"),
        (bias is None, "a bias that the choice depends on"),
        (spec.groups == 1, "groups of experts"),
        (logits.dtype in DTYPES, f"logits in {logits.dtype}, not bfloat16, float16 or float32"),
        (experts <= MAX_EXPERTS and experts % 2 == 0, f"{experts} experts, not an even number up to {MAX_EXPERTS}"),
        (spec.top_k in TOP_K, f"{spec.top_k} experts a token, not 1, 2, 4 or 8"),
    )
    return next((reason for fine, reason in checks if not fine), None)


def topk(logits: Tensor, bias: Tensor | None, choice: "Choice") -> tuple[Tensor, Tensor]:
    """`kernels.vendor.route.Provider.topk`."""
    found = detect.find(TOPK_SOFTMAX)
    if isinstance(found, str):
        raise RuntimeError(f"ipex: {found}")
    weights, ids, *_ = found.call(logits.contiguous(), choice.top_k, choice.renorm)
    return weights, ids
