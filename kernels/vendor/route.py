"""Routers by a vendor's top-k: the k experts of the largest scores, with those scores as weights, divided by their sum or not.

What a router does besides is left to ATen ops around `braze::vendor_topk`: an epsilon in the sum, the scale, and the dtypes
of weights and ids.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from braze.kernels import reference
from braze.kernels.spec import RouteSpec
from braze.kernels.vendor import ipex, sgl_kernel, vllm_xpu


@dataclass(frozen=True)
class Choice:
    """What a top-k is asked for: scores by `scoring`, the `top_groups` best of `groups` open, weights divided by their sum."""

    top_k: int
    renorm: bool
    scoring: str = "softmax"
    groups: int = 1
    top_groups: int = 1


class Provider(Protocol):
    """A vendor's top-k."""

    def route_refusal(self, logits: Tensor, bias: Tensor | None, spec: RouteSpec) -> str | None:
        """Why it can't make these choices, in words; None where it can. A bias is on scores, groups that are closed are out."""

    def topk(self, logits: Tensor, bias: Tensor | None, choice: Choice) -> tuple[Tensor, Tensor]:
        """logits [T, E], bias [E] in float32, added to the scores for the choice -> weights [T, k] in float32, ids [T, k] in
        int32."""


#: option -> provider
PROVIDERS: Mapping[str, Provider] = {"sgl_kernel": sgl_kernel, "vllm_xpu": vllm_xpu, "ipex": ipex}


def supports(logits: Tensor, bias: Tensor | None, spec: RouteSpec, provider: str) -> str | None:
    """Why `compose` can't take these (fake ones too), in words; None where it can."""
    checks = (
        (spec.shared == 0, "experts that every token gets"),
        (spec.select_on == "scores" or (bias is None and spec.groups == 1), "a bias or groups on logits"),
        (spec.groups == 1 or spec.closed == "out", "closed groups whose experts count as zero"),
    )
    reason = next((reason for fine, reason in checks if not fine), None)
    return reason or PROVIDERS[provider].route_refusal(logits, bias, spec)


def divides(spec: RouteSpec) -> bool:
    """Whether the weights are divided by nothing but their sum, which a kernel does itself."""
    return spec.renorm == "add" and spec.eps == 0.0


def compose(logits: Tensor, bias: Tensor | None, spec: RouteSpec, provider: str) -> tuple[Tensor, Tensor]:
    """As `braze.kernels.reference.route`."""
    flat = logits.reshape(-1, logits.shape[-1])
    wide = None if bias is None else bias.reshape(-1).float()
    renorm = divides(spec)
    weights, ids = torch.ops.braze.vendor_topk(
        flat, wide, spec.top_k, renorm, provider=provider,
        scoring=spec.scoring, groups=spec.groups, top_groups=spec.top_groups,
    )  # fmt: skip
    if not renorm:
        weights = reference.normalised(weights, spec)
    elif spec.scale != 1.0:
        weights = weights * spec.scale
    lead = (*logits.shape[:-1], spec.top_k)
    return weights.to(spec.out_dtype or logits.dtype).reshape(lead), ids.to(spec.ids_dtype).reshape(lead)
