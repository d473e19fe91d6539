"""Experts with a vendor's grouped product: rows sorted by expert make each expert's rows one dense block of a product.

Sorting, gathering, what is between the products and the weighted sum are ATen ops that Inductor fuses (`kernels/aten.py`); the
products are calls of `braze::vendor_grouped_mm`, of which a provider may make the activation a part.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from braze.kernels import aten
from braze.kernels.spec import MoeSpec
from braze.kernels.vendor import sgl_kernel, vllm_xpu


class Provider(Protocol):
    """A vendor's grouped product."""

    def moe_refusal(self, x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, spec: MoeSpec) -> str | None:
        """Why it can't make the products of these experts, in words; None where it can. Shapes as for `reference.moe`."""

    def fused(self, w1: Tensor, spec: MoeSpec) -> str:
        """The name of its own activation that the first product may end with; "" where there is none."""

    def grouped_mm(self, x: Tensor, w: Tensor, counts: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        """x [S, K] in blocks of counts [E] rows, w [E, N, K] whatever its strides, bias [E, N] in float32 -> [S, N],
        or [S, N/2] after an activation; rows past the last block are undefined."""


#: option -> provider
PROVIDERS: Mapping[str, Provider] = {"sgl_kernel": sgl_kernel, "vllm_xpu": vllm_xpu}


def supports(
    x: Tensor, ids: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None,
    spec: MoeSpec, provider: str,
) -> str | None:  # fmt: skip
    """Why `compose` can't take these tensors (fake ones too), in words; None where it can."""
    if not w1.dtype == w2.dtype == x.dtype:
        return f"weights in {w1.dtype} and {w2.dtype} for rows in {x.dtype}"
    return PROVIDERS[provider].moe_refusal(x, w1, w2, b1, spec)


def compose(
    x: Tensor, ids: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None,
    spec: MoeSpec, provider: str,
) -> Tensor:  # fmt: skip
    """As `braze.kernels.reference.moe`; products in x's dtype, all else in float32."""
    rows = aten.sort_rows(ids, w1.shape[0])
    counts = torch.cat((rows.ends[:1], rows.ends[1:] - rows.ends[:-1]))
    up = w1.transpose(1, 2) if spec.transposed else w1
    down = w2.transpose(1, 2) if spec.transposed else w2
    product = torch.ops.braze.vendor_grouped_mm
    gathered = x[rows.perm // ids.shape[1]]
    activation = PROVIDERS[provider].fused(w1, spec)
    if activation:
        bias = None if b1 is None else b1.float().contiguous()
        act = product(gathered, up, counts, bias, provider=provider, activation=activation)
    else:
        act = aten.between(product(gathered, up, counts, provider=provider), rows, weights, b1, spec)
    return aten.combine(product(act, down, counts, provider=provider), rows, weights, b2, spec, x.dtype)
