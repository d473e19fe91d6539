"""Rows that are normed before they are weighted: the experts are one call, norm, weights and sum stay outside."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from tests.harness import Fused, assert_close
from tests.test_expert_styles import K, Layer, grouped, layer, sort, tokens


def norm(y: Tensor) -> Tensor:
    return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)


def gathered(m: Layer, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    rows, which = x.repeat_interleave(K, 0).unsqueeze(-1), ids.flatten()
    y = (m.down[which] @ (silu(m.gate[which] @ rows) * (m.up[which] @ rows))).squeeze(-1)
    return (norm(y) * weights.flatten().unsqueeze(1)).view(-1, K, x.shape[1]).sum(1)


def in_order(m: Layer, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    perm, _ = sort(ids)
    expert = ids.flatten().sort(stable=True).values
    _, ends = sort(expert)
    rows = x[perm // K]
    y = norm(grouped(silu(grouped(rows, m.gate, ends)) * grouped(rows, m.up, ends), m.down, ends).to(x.dtype))
    return torch.zeros_like(x).index_add(0, perm // K, y * weights.flatten()[perm].unsqueeze(1))


def weighted_first(m: Layer, x: Tensor) -> Tensor:
    """The rows that the experts take are weighted: to them these are rows as any."""
    weights, ids = m.route(x)
    which = ids.flatten()
    rows = (x.repeat_interleave(K, 0) * weights.flatten().unsqueeze(1)).unsqueeze(-1)
    y = (m.down[which] @ (silu(m.gate[which] @ rows) * (m.up[which] @ rows))).squeeze(-1)
    return norm(y).view(-1, K, x.shape[1]).sum(1)


def kept(m: Layer, x: Tensor) -> Tensor:
    """The activation has another use."""
    weights, ids = m.route(x)
    rows, which = x.repeat_interleave(K, 0).unsqueeze(-1), ids.flatten()
    act = silu(m.gate[which] @ rows) * (m.up[which] @ rows)
    y = norm((m.down[which] @ act).squeeze(-1)) * weights.flatten().unsqueeze(1)
    return y.view(-1, K, x.shape[1]).sum(1) + act.mean()


@pytest.mark.parametrize("style", [gathered, in_order, weighted_first])
def test_the_experts_are_one_call(style: Callable[[Layer, Tensor], Tensor]) -> None:
    m, x = layer(), tokens()
    fused = Fused(lambda x: style(m, x))
    got = fused(x)
    assert fused.count("moe") == [1], fused.reasons
    exact = weighted_first if style is weighted_first else gathered
    assert_close(got, exact(m.to(torch.float64), x.double()), 3e-2 if style is in_order else 1e-5)


def test_an_activation_with_another_use_is_refused() -> None:
    m, x = layer(), tokens()
    fused = Fused(lambda x: kept(m, x))
    assert_close(fused(x), kept(m.to(torch.float64), x.double()), 1e-5)
    assert fused.count("moe") == [0]
    assert any("is also used by" in r for r in fused.reasons), fused.reasons
