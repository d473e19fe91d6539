"""The ops as compositions of ATen ops: correct on every device, fused by Inductor around the products.

Experts: sort the T*k (token, slot) rows by expert, so that each expert's rows are one dense block; two grouped products
with the activation between; undo the sort by its inverse permutation and add up each token's k rows.
"""

from dataclasses import replace

import torch
from torch import Tensor

from braze.kernels import reference
from braze.kernels.expression import apply_torch
from braze.kernels.spec import MoeSpec, RouteSpec

rope = reference.rope  # the reference is already one fusible pass: slices, products, cat
rms_norm = reference.rms_norm  # one reduction and a product, rounded once where models round in between


def moe(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    spec: MoeSpec,
) -> Tensor:
    """As `braze.kernels.reference.moe`; products in x's dtype, all else in float32."""
    tokens, k = ids.shape
    experts = w1.shape[0]
    flat = ids.reshape(-1)
    flat = torch.where((flat < 0) | (flat >= experts), experts, flat)
    expert, perm = torch.sort(flat, stable=True)
    numbers = torch.arange(experts, device=x.device, dtype=expert.dtype)
    ends = torch.searchsorted(expert, numbers, right=True, out_int32=True)
    w = weights.reshape(-1)[perm].float()[:, None]
    valid = (expert < experts)[:, None]
    bias_row = expert.clamp(max=experts - 1)

    h = _grouped_mm(x[perm // k], w1 if spec.transposed else w1.transpose(1, 2), ends).float()
    if spec.weight_on == "input":
        h = h * w
    if b1 is not None:
        h = h + b1[bias_row].float()
    act = apply_torch(spec.activation, *reference.split_gate_up(h, spec.layout)).to(x.dtype)
    y = _grouped_mm(act, w2 if spec.transposed else w2.transpose(1, 2), ends).float()
    if b2 is not None:
        y = y + b2[bias_row].float()
    if spec.weight_on == "output":
        y = y * w
    y = torch.where(valid, y, 0.0)

    inverse = torch.empty_like(perm).scatter(0, perm, torch.arange(tokens * k, device=x.device))
    out = y[inverse].reshape(tokens, k, y.shape[1]).sum(1)
    return (out if spec.scale == 1.0 else out * spec.scale).to(spec.out_dtype or x.dtype)


def _grouped_mm(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    """torch's own grouped product where it has one that Inductor knows, else an opaque op (`grouped_mm_eager`)."""
    if x.device.type != "cpu" and x.dtype == torch.bfloat16:
        return torch._grouped_mm(x, w, offs=offs)
    return torch.ops.braze.grouped_mm(x, w, offs)  # type: ignore[no-any-return]


def grouped_mm_eager(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    """x [S, K] in E blocks of rows that end at offs [E]; w [E, K, N] -> [S, N]; rows past offs[-1] are undefined.

    Each block is a product of its own, without the empty ones; off the CPU that waits for the offsets.
    """
    out = x.new_empty(x.shape[0], w.shape[2])
    begin = 0
    for e, end in enumerate(offs.tolist()):
        if end > begin:
            torch.mm(x[begin:end], w[e], out=out[begin:end])
        begin = end
    return out


def route(logits: Tensor, bias: Tensor | None, spec: RouteSpec) -> tuple[Tensor, Tensor]:
    """As `braze.kernels.reference.route`. Where the largest logits are chosen, only their scores are computed; groups are
    ranked by comparisons, which fuse as a top-k does not."""
    x = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    if bias is not None or spec.groups > 1 or spec.shared:
        return _route_by_choice(x, bias, spec, logits.dtype)
    values, ids = logits.topk(spec.top_k)
    values = values.to(x.dtype)
    if spec.scoring != "softmax":
        weights = reference.normalised(reference.scores(values, spec.scoring), spec)
    elif spec.renorm == "add" and spec.eps == 0.0:  # the sum over all experts cancels
        weights = reference.normalised(values.softmax(-1), replace(spec, renorm="no"))
    else:
        weights = reference.normalised((values - x.logsumexp(-1, keepdim=True)).exp(), spec)
    return weights.to(spec.out_dtype or logits.dtype), ids.to(spec.ids_dtype)


def _route_by_choice(x: Tensor, bias: Tensor | None, spec: RouteSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, always = x[..., : x.shape[-1] - spec.shared], x[..., x.shape[-1] - spec.shared :]
    score = reference.scores(x, spec.scoring)
    choice = x if spec.select_on == "logits" else score
    if bias is not None:
        choice = choice + bias.reshape(-1).to(x.dtype)
    if spec.groups > 1:
        grouped = choice.unflatten(-1, (spec.groups, -1))
        closed = float("-inf") if spec.closed == "out" else 0.0
        choice = torch.where(_open(grouped, spec)[..., None], grouped, closed).flatten(-2)
    ids = choice.topk(spec.top_k).indices
    weights = score.gather(-1, ids)
    if spec.shared:
        weights = torch.cat((weights, reference.scores(always, spec.scoring)), -1)
    return reference.normalised(weights, spec).to(spec.out_dtype or dtype), ids.to(spec.ids_dtype)


def _open(grouped: Tensor, spec: RouteSpec) -> Tensor:
    """Which groups of choices [..., G, size] are open: those than which fewer than top_groups are better."""
    rank = grouped.amax(-1)
    if spec.group_score == "top2":
        place = torch.arange(grouped.shape[-1], device=grouped.device)
        rank = rank + torch.where(place == grouped.argmax(-1, keepdim=True), float("-inf"), grouped).amax(-1)
    group = torch.arange(spec.groups, device=grouped.device)
    other, mine = rank[..., None, :], rank[..., :, None]
    ahead = (other > mine) | ((other == mine) & (group[None, :] < group[:, None]))
    return ahead.sum(-1) < spec.top_groups
