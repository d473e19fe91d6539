"""Experts whose weights are E separate tensors: the rows of one expert at a time, with its weights where they lie.

Nothing is stacked, so nothing is copied or held twice, and weights that change between calls are read as they are. Rows
are sorted by expert; an expert without rows costs nothing. The experts' counts are read on the host.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from braze.kernels.expression import apply_torch
from braze.kernels.reference import split_gate_up
from braze.kernels.spec import MoeSpec


def moe(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w1: Sequence[Tensor],
    w2: Sequence[Tensor],
    b1: Sequence[Tensor],
    b2: Sequence[Tensor],
    spec: MoeSpec,
) -> Tensor:
    """As `braze.kernels.reference.moe` with E matrices w2[e] and, for each, w1[e] or the pair w1[2e] (gate), w1[2e + 1] (up);
    b1 likewise, b2 [H] each; empty lists for no biases. Products in x's dtype, all else in float32 (float64 for float64)."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    tokens, k = ids.shape
    experts, apart = len(w2), len(w1) // len(w2)
    expert, perm = ids.reshape(-1).sort(stable=True)
    ends = torch.searchsorted(expert, torch.arange(experts, device=x.device), right=True).tolist()
    begin = int((expert < 0).sum())
    scores = weights.reshape(-1)
    out = x.new_zeros(tokens, x.shape[1], dtype=acc)
    for e, end in enumerate(ends):
        if end == begin:
            continue
        row = perm[begin:end]
        begin = end
        token, w = row // k, scores[row].to(acc)[:, None]
        rows = x[token] if spec.weight_on == "output" else (x[token].to(acc) * w).to(x.dtype)
        own = slice(e * apart, (e + 1) * apart)
        y = _expert(rows, w1[own], w2[e], b1[own], b2[e] if b2 else None, spec).to(acc)
        out.index_add_(0, token, y * w if spec.weight_on == "output" else y)
    return (out if spec.scale == 1.0 else out * spec.scale).to(spec.out_dtype or x.dtype)


def mlp(x: Tensor, w1: Sequence[Tensor], w2: Tensor, b1: Sequence[Tensor], b2: Tensor | None, spec: MoeSpec) -> Tensor:
    """As `braze.kernels.reference.mlp`; products in x's dtype, all else as in `moe`."""
    return _expert(x, w1, w2, b1, b2, spec).to(spec.out_dtype or x.dtype)


def _expert(
    x: Tensor, w1: Sequence[Tensor], w2: Tensor, b1: Sequence[Tensor], b2: Tensor | None, spec: MoeSpec
) -> Tensor:
    """One expert's rows, in the dtype that the last product and its bias give."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    columns = [_product(x, w, b1[i] if b1 else None, spec).to(acc) for i, w in enumerate(w1)]
    gate, up = split_gate_up(columns[0], spec.layout) if len(columns) == 1 else columns
    return _product(apply_torch(spec.activation, gate, up).to(x.dtype), w2, b2, spec)


def unlike(**lists: Sequence[Tensor]) -> str | None:
    """Which of the experts' lists, by name, has tensors that a kernel could not take for one another; None where none has."""
    for name, tensors in lists.items():
        kinds = [(t.dtype, t.device, t.shape, t.stride()) for t in tensors]
        if any(kind != kinds[0] for kind in kinds):
            return f"the experts' {name} differ in dtype, device, shape or strides"
    return None


def lists(
    gate: Tensor, up: Tensor, w2: Tensor, b_gate: Tensor | None, b_up: Tensor | None, b2: Tensor | None
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Gate and up of two tensors [E, ., .] as `moe` takes them: views, expert by expert; biases [E, .] likewise."""
    w1 = [w for pair in zip(gate.unbind(), up.unbind(), strict=True) for w in pair]
    b1 = (
        []
        if b_gate is None or b_up is None
        else [b for p in zip(b_gate.unbind(), b_up.unbind(), strict=True) for b in p]
    )
    return w1, list(w2.unbind()), b1, [] if b2 is None else list(b2.unbind())


def joined(b_gate: Tensor | None, b_up: Tensor | None) -> Tensor | None:
    """The biases of gate and up [E, I] as halves of one [E, 2I]."""
    return None if b_gate is None or b_up is None else torch.cat((b_gate, b_up), 1)


def _product(x: Tensor, w: Tensor, bias: Tensor | None, spec: MoeSpec) -> Tensor:
    y = linear(x, w.t() if spec.transposed else w)
    return y if bias is None else y + bias
