"""Experts whose weights are gathered for each token, as decoding code spells them."""

import torch
from torch import Tensor
from torch.nn.functional import silu


def experts(x: Tensor, weights: Tensor, ids: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """x [T, H], weights and ids [T, k], w1 [E, 2 I, H] with gate's rows before up's, w2 [E, H, I] -> [T, H]."""
    g, u = torch.einsum("th,tknh->tkn", x, w1[ids]).chunk(2, -1)
    y = torch.einsum("tki,tkhi->tkh", silu(g) * u, w2[ids])
    return (y * weights[..., None].to(y.dtype)).sum(1)
