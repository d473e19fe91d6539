"""Products in another dtype than the parameters': under autocast, and where a model casts its weights itself.

What is proven in float64 has to be called in the dtypes that the model multiplies.
"""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, silu

from tests.harness import Fused, assert_close

H, INNER, E, K = 24, 16, 5, 2


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, INNER), nn.Linear(INNER, H)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gelu(self.up(x)))  # type: ignore[no-any-return]


class Master(Mlp):
    """Parameters in float32, cast to the tokens' dtype for each product."""

    def forward(self, x: Tensor) -> Tensor:
        h = gelu(linear(x, self.up.weight.to(x.dtype), self.up.bias.to(x.dtype)))
        return linear(h, self.down.weight.to(x.dtype), self.down.bias.to(x.dtype))


class Loop(nn.Module):
    """All experts on all tokens, each with parameters of its own."""

    def __init__(self, expert: type[Mlp] = Mlp) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(expert() for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = linear(x, self.gate.weight.to(x.dtype)).softmax(-1).topk(K)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out + expert(x) * (weights * (ids == e)).sum(-1, keepdim=True)
        return out


class Gathered(nn.Module):
    """Weights gathered for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(E, INNER, H) / 5), nn.Parameter(torch.randn(E, H, INNER) / 4)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(K)
        h = silu(torch.einsum("ti,taoi->tao", x, self.up[ids]))
        return torch.einsum("tao,taio,ta->ti", h, self.down[ids], weights)


def model(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval().requires_grad_(False)


def tokens(n: int) -> Tensor:
    return torch.randn(n, H, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("n", [1, 4])
def test_a_dense_mlp_under_autocast(n: int, compiled: bool) -> None:
    m, x = model(Mlp), tokens(n)
    fused = Fused(m)
    run = torch.compile(m, backend="braze") if compiled else fused
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(x)
        assert got.dtype == m(x).dtype == torch.bfloat16
    if not compiled:
        assert fused.count("mlp") == [1], fused.reasons
    assert_close(got, copy.deepcopy(m).double()(x.double()), 2.0**-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_that_the_model_casts(compiled: bool) -> None:
    m, x = model(Master), tokens(3).bfloat16()
    fused = Fused(m)
    with torch.no_grad():
        got = (torch.compile(m, backend="braze") if compiled else fused)(x)
    assert compiled or fused.count("mlp") == [1], fused.reasons
    assert_close(got, copy.deepcopy(m).double()(x.double()), 2.0**-6)


@pytest.mark.parametrize("kind", [Loop, lambda: Loop(Master)])
def test_a_loop_under_autocast_is_one_call(kind: type[nn.Module]) -> None:
    m, x = model(kind), tokens(11)
    fused = Fused(m)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got = fused(x)
        eager = m(x)
    assert fused.count("moe") == [1], fused.reasons
    assert_close(got, eager.double(), 2.0**-5)  # the router's choice is that of 16 bits


def test_gathered_weights_under_autocast_stay_and_say_why() -> None:
    m, x = model(Gathered), tokens(11)
    fused = Fused(m)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got = fused(x)
        eager = m(x)
    assert fused.count("moe") == [0]
    assert any("cast after they are picked" in r for r in fused.reasons), fused.reasons
    assert_close(got, eager.double(), 2.0**-5)
