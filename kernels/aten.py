"""The ops as compositions of ATen ops: correct on every device, fused by Inductor around the products.

Experts: sort the T*k (token, slot) rows by expert, so that each expert's rows are one dense block; two grouped products
with the activation between; undo the sort by its inverse permutation and add up each token's k rows.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from braze.kernels import reference, separate
from braze.kernels.expression import apply_torch
from braze.kernels.spec import MoeSpec, RouteSpec

rope = reference.rope  # the reference is already one fusible pass: slices, products, cat
rms_norm = reference.rms_norm  # one reduction and a product, rounded once where models round in between


@dataclass(frozen=True)
class Rows:
    """The T*k (token, slot) rows sorted by expert. expert, perm: the expert, and the row before the sort, of each; ends [E]."""

    expert: Tensor
    perm: Tensor
    ends: Tensor


def sort_rows(ids: Tensor, experts: int) -> Rows:
    """ids [T, k] -> rows whose blocks end at `ends`; those of no expert come last."""
    flat = ids.reshape(-1)
    flat = torch.where((flat < 0) | (flat >= experts), experts, flat)
    expert, perm = torch.sort(flat, stable=True)
    numbers = torch.arange(experts, device=ids.device, dtype=expert.dtype)
    return Rows(expert, perm, torch.searchsorted(expert, numbers, right=True, out_int32=True))


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
    rows = sort_rows(ids, w1.shape[0])
    h = _grouped_mm(x[rows.perm // ids.shape[1]], w1 if spec.transposed else w1.transpose(1, 2), rows.ends)
    act = between(h, rows, weights, b1, spec)
    y = _grouped_mm(act, w2 if spec.transposed else w2.transpose(1, 2), rows.ends)
    return combine(y, rows, weights, b2, spec, x.dtype)


def moe_apart(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate: Tensor,
    up: Tensor,
    w2: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    b2: Tensor | None,
    spec: MoeSpec,
) -> Tensor:
    """As `moe`, with the halves of w1 and b1 as two tensors: a product of the sorted rows for each."""
    rows = sort_rows(ids, gate.shape[0])
    sorted_x = x[rows.perm // ids.shape[1]]
    halves = [_grouped_mm(sorted_x, w if spec.transposed else w.transpose(1, 2), rows.ends) for w in (gate, up)]
    act = between(torch.cat(halves, 1), rows, weights, separate.joined(b_gate, b_up), spec)
    y = _grouped_mm(act, w2 if spec.transposed else w2.transpose(1, 2), rows.ends)
    return combine(y, rows, weights, b2, spec, x.dtype)


def between(h: Tensor, rows: Rows, weights: Tensor, b1: Tensor | None, spec: MoeSpec) -> Tensor:
    """The first product h [T*k, N] of sorted rows -> what the second one reads, in h's dtype."""
    wide = h.float()
    if spec.weight_on == "input":
        wide = wide * weights.reshape(-1)[rows.perm].float()[:, None]
    if b1 is not None:
        wide = wide + b1[rows.expert.clamp(max=b1.shape[0] - 1)].float()
    return apply_torch(spec.activation, *reference.split_gate_up(wide, spec.layout)).to(h.dtype)


def combine(y: Tensor, rows: Rows, weights: Tensor, b2: Tensor | None, spec: MoeSpec, dtype: torch.dtype) -> Tensor:
    """The second product y [T*k, H] of sorted rows -> [T, H]; a row of no expert may hold anything."""
    tokens, k = weights.shape
    wide = y.float()
    if b2 is not None:
        wide = wide + b2[rows.expert.clamp(max=b2.shape[0] - 1)].float()
    if spec.weight_on == "output":
        wide = wide * weights.reshape(-1)[rows.perm].float()[:, None]
    wide = torch.where((rows.expert < rows.ends.shape[0])[:, None], wide, 0.0)
    inverse = torch.empty_like(rows.perm).scatter(0, rows.perm, torch.arange(tokens * k, device=y.device))
    out = wide[inverse].reshape(tokens, k, y.shape[1]).sum(1)
    return (out if spec.scale == 1.0 else out * spec.scale).to(spec.out_dtype or dtype)


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
