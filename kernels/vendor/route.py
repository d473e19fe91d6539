"""Routers by a vendor's top-k of a softmax: the k largest scores of a row of logits, divided by their sum or not.

What a router does besides is left to ATen ops around `braze::vendor_topk`: the scale, and the dtypes of weights and ids.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from braze.kernels.spec import RouteSpec
from braze.kernels.vendor import sgl_kernel


class Provider(Protocol):
    """A vendor's softmax and top-k."""

    def route_refusal(self, logits: Tensor, spec: RouteSpec) -> str | None:
        """Why it can't make these choices, in words; None where it can."""

    def topk(self, logits: Tensor, top_k: int, renorm: bool) -> tuple[Tensor, Tensor]:
        """logits [T, E] -> weights [T, k] in float32, divided by their sum where `renorm`, and ids [T, k] in int32."""


#: option -> provider
PROVIDERS: Mapping[str, Provider] = {"sgl_kernel": sgl_kernel}


def supports(logits: Tensor, bias: Tensor | None, spec: RouteSpec, provider: str) -> str | None:
    """Why `compose` can't take these (fake ones too), in words; None where it can."""
    checks = (
        (spec.scoring == "softmax", f"scores by {spec.scoring}, not softmax"),
        (bias is None, "a bias that the choice depends on"),
        (spec.groups == 1, "groups of experts"),
        (spec.renorm == "no" or spec.eps == 0.0, "an epsilon in the sum of the weights"),
    )
    reason = next((reason for fine, reason in checks if not fine), None)
    return reason or PROVIDERS[provider].route_refusal(logits, spec)


def compose(logits: Tensor, bias: Tensor | None, spec: RouteSpec, provider: str) -> tuple[Tensor, Tensor]:
    """As `braze.kernels.reference.route`."""
    flat = logits.reshape(-1, logits.shape[-1])
    weights, ids = torch.ops.braze.vendor_topk(flat, spec.top_k, spec.renorm != "no", provider=provider)
    weights = weights if spec.scale == 1.0 else weights * spec.scale
    lead = (*logits.shape[:-1], spec.top_k)
    return weights.to(spec.out_dtype or logits.dtype).reshape(lead), ids.to(spec.ids_dtype).reshape(lead)
