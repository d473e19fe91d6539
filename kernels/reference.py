"""The meaning of braze's semantic ops in plain PyTorch: what every kernel is compared with.

Computed in float32, or in float64 where the input is float64, and rounded once at the end. Clarity before speed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from braze.kernels.expression import apply_torch
from braze.kernels.spec import MoeSpec, NormSpec, PairLayout, RopeSpec, RouteSpec


def split_gate_up(h: Tensor, layout: str) -> tuple[Tensor, Tensor | None]:
    """Columns [..., N] of the first product -> (g, u), each [..., I]; u is None where there is no gate."""
    if layout == "none":
        return h, None
    if layout == "interleaved":
        return h[..., 0::2], h[..., 1::2]
    half = h.shape[-1] // 2
    return h[..., :half], h[..., half:]


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
    """x [T, H], ids and weights [T, k], w1, w2, b1 [E, N], b2 [E, H] -> [T, H]. An id outside 0..E-1 adds nothing."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.zeros_like(x, dtype=acc)
    for e in range(w1.shape[0]):
        tokens, slots = torch.nonzero(ids == e, as_tuple=True)
        w = weights[tokens, slots].to(acc)[:, None]
        up = w1[e].to(acc) if spec.transposed else w1[e].to(acc).T
        down = w2[e].to(acc) if spec.transposed else w2[e].to(acc).T
        h = (x[tokens].to(acc) * w if spec.weight_on == "input" else x[tokens].to(acc)) @ up
        if b1 is not None:
            h = h + b1[e].to(acc)
        y = apply_torch(spec.activation, *split_gate_up(h, spec.layout)) @ down
        if b2 is not None:
            y = y + b2[e].to(acc)
        out.index_add_(0, tokens, y * w if spec.weight_on == "output" else y)
    return (out * spec.scale).to(spec.out_dtype or x.dtype)


def mlp(x: Tensor, w1: Sequence[Tensor], w2: Tensor, b1: Sequence[Tensor], b2: Tensor | None, spec: MoeSpec) -> Tensor:
    """x [T, H], w1 [N, H] or gate's and up's [I, H], w2 [H, I] ([H, N] ... where transposed), b1 likewise or none -> [T, H].

    Of spec, activation, layout, transposed and out_dtype count.
    """
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32

    def product(rows: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        y = rows @ (w if spec.transposed else w.T).to(acc)
        return y if b is None else y + b.to(acc)

    columns = [product(x.to(acc), w, b1[i] if b1 else None) for i, w in enumerate(w1)]
    gate, up = columns if len(columns) == 2 else split_gate_up(columns[0], spec.layout)
    return product(apply_torch(spec.activation, gate, up), w2, b2).to(spec.out_dtype or x.dtype)


def _pairs(x: Tensor, layout: PairLayout) -> tuple[Tensor, Tensor]:
    if layout == "interleaved":
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _join(a: Tensor, b: Tensor, layout: PairLayout) -> Tensor:
    return torch.stack((a, b), -1).flatten(-2) if layout == "interleaved" else torch.cat((a, b), -1)


def rope(x: Tensor, cos: Tensor, sin: Tensor, spec: RopeSpec) -> Tensor:
    """x [..., D]; cos and sin broadcast against x[..., :R] or x[..., :R/2] -> [..., D].

    Tables of width R/2 hold one value a pair; tables of width R one value an output element, in the order of the
    output's layout.
    """
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    end = spec.start + spec.rotary_dim
    a, b = _pairs(x[..., spec.start : end].to(acc), spec.layout_in)
    c, s = cos.to(acc), -sin.to(acc) if spec.inverse else sin.to(acc)
    if cos.shape[-1] == spec.rotary_dim:
        (ca, cb), (sa, sb) = _pairs(c, spec.layout_out), _pairs(s, spec.layout_out)
    else:
        ca = cb = c
        sa = sb = s
    rotated = _join(a * ca - b * sa, b * cb + a * sb, spec.layout_out).to(spec.out_dtype or x.dtype)
    parts = (x[..., : spec.start].to(rotated.dtype), rotated, x[..., end:].to(rotated.dtype))
    return torch.cat([p for p in parts if p.shape[-1]], -1)


def rms_norm(x: Tensor, weight: Tensor | None, spec: NormSpec) -> Tensor:
    """x [..., D], weight [D] or none -> [..., D]."""
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    out = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + spec.eps)
    if weight is not None:
        out = out * (weight.to(wide.dtype) + 1 if spec.add_one else weight.to(wide.dtype))
    return out.to(spec.out_dtype or x.dtype)


def scores(x: Tensor, scoring: str) -> Tensor:
    """The router's scores of logits x [..., E], in x's dtype."""
    if scoring == "softmax":
        return x.softmax(-1)
    return x.sigmoid() if scoring == "sigmoid" else torch.nn.functional.softplus(x).sqrt()


def route(logits: Tensor, bias: Tensor | None, spec: RouteSpec) -> tuple[Tensor, Tensor]:
    """logits [..., E + shared], bias of E elements -> weights [..., k + shared], ids [..., k], the best choice first.

    The bias decides which experts are chosen and is no part of the weights. Equal choices come in torch.topk's order,
    which it does not specify. Where closed groups are out, k experts must be open.
    """
    x = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    x, always = x[..., : x.shape[-1] - spec.shared], x[..., x.shape[-1] - spec.shared :]
    score = scores(x, spec.scoring)
    choice = x if spec.select_on == "logits" else score
    if bias is not None:
        choice = choice + bias.reshape(-1).to(x.dtype)
    if spec.groups > 1:
        grouped = choice.unflatten(-1, (spec.groups, -1))
        rank = grouped.amax(-1) if spec.group_score == "max" else grouped.topk(2).values.sum(-1)
        kept = torch.zeros_like(rank, dtype=torch.bool).scatter(-1, rank.topk(spec.top_groups).indices, True)
        choice = torch.where(kept[..., None], grouped, float("-inf") if spec.closed == "out" else 0.0).flatten(-2)
    ids = choice.topk(spec.top_k).indices
    weights = score.gather(-1, ids)
    if spec.shared:
        weights = torch.cat((weights, scores(always, spec.scoring)), -1)
    weights = normalised(weights, spec)
    return weights.to(spec.out_dtype or logits.dtype), ids.to(spec.ids_dtype)


def normalised(weights: Tensor, spec: RouteSpec) -> Tensor:
    """A token's scores [..., k + shared] -> its weights, unrounded."""
    if spec.renorm != "no":
        total = weights.sum(-1, keepdim=True)
        weights = weights / (total + spec.eps if spec.renorm == "add" else total.clamp(min=spec.eps))
    return weights if spec.scale == 1.0 else weights * spec.scale
