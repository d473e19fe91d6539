"""Dispatch by masks with experts that are modules of their own, each on its part of the rows (DeepSpeed, fairseq): the
parts are computed side by side, one call that reads weights where they lie. What is no such block is put back.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, one_hot, silu

from braze.backend import collect
from tests.harness import Fused, assert_close, capture

T, H, INNER, E, C = 22, 24, 16, 4, 5


class Plain(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, INNER, bias=bias), nn.Linear(INNER, H, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gelu(self.up(x)))  # type: ignore[no-any-return]


class Gated(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(H, INNER, bias=bias), nn.Linear(H, INNER, bias=bias)
        self.down = nn.Linear(INNER, H, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class Halves(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(H, 2 * INNER, bias=False), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate(x).chunk(2, -1)
        return self.down(silu(gate) * up)  # type: ignore[no-any-return]


def two_choices(logits: Tensor) -> Tensor:
    """Weights [tokens, experts, places] of the two best experts, as far as these have places."""
    p = logits.softmax(-1)
    first = one_hot(p.argmax(-1), E)
    second = one_hot(logits.masked_fill(first.bool(), float("-inf")).argmax(-1), E)
    places = [first.cumsum(0) - 1, second.cumsum(0) - 1 + first.sum(0, keepdim=True)]
    masks = [m * (q < C) for m, q in zip((first, second), places, strict=True)]
    g = [(p * m).sum(1) for m in masks]
    total = (g[0] + g[1]).clamp(min=1e-9)
    return sum(  # type: ignore[return-value]
        (w / total)[:, None, None] * m[:, :, None] * one_hot((q * m).sum(1), C)[:, None, :]
        for w, m, q in zip(g, masks, places, strict=True)
    )


class Layer(nn.Module):
    def __init__(self, kind: Any = Plain, how: str = "chunk", bent: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(kind() for _ in range(E))
        for p in self.parameters():
            p.data.mul_(3.0)
        self.how, self.bent = how, bent

    def forward(self, x: Tensor) -> Tensor:
        combine = two_choices(self.router(x))
        dispatch = combine.bool().to(x.dtype)
        if self.bent == "sums":
            dispatch = dispatch + 1
        z = torch.einsum("sec,sm->ecm", dispatch, x)
        y = self.run(z)
        return torch.einsum("sec,ecm->sm", combine, y)

    def run(self, z: Tensor) -> Tensor:
        if self.how == "chunk":  # [machines, experts, places, hidden]
            parts = z.reshape(1, E, C, H).chunk(E, dim=1)
            return torch.cat([e(p) for e, p in zip(self.experts, parts, strict=True)], dim=1).reshape(E, C, H)
        if self.how == "rows":
            parts = z.reshape(E * C, H).chunk(E)
            return torch.cat([e(p) for e, p in zip(self.experts, parts, strict=True)]).reshape(E, C, H)
        if self.how == "unbind":
            return torch.stack([e(p) for e, p in zip(self.experts, z.unbind(0), strict=True)])
        if self.bent == "another":
            return torch.stack([e(z[i]) * (i + 1) for i, e in enumerate(self.experts)])
        if self.bent == "order":
            return torch.stack([e(z[E - 1 - i]) for i, e in enumerate(self.experts)])
        if self.bent == "shared":
            return torch.stack([self.experts[0](z[i]) for i, e in enumerate(self.experts)])
        if self.bent == "over places":
            return torch.stack([e(z[i]).softmax(0) for i, e in enumerate(self.experts)])
        return torch.stack([e(z[i]) for i, e in enumerate(self.experts)])


def tokens(n: int = T) -> Tensor:
    return torch.randn(n, H, generator=torch.Generator().manual_seed(1))


def exact(m: Layer, x: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(m).double()(x.double())  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["chunk", "rows", "unbind", "index"])
@pytest.mark.parametrize("kind", [Plain, Gated, Halves, lambda: Gated(True), lambda: Plain(False)])
def test_parts_are_one_call(kind: Any, how: str) -> None:
    m = Layer(kind, how)
    fused = Fused(m)
    got = fused(tokens())
    assert fused.count("moe") == [1], fused.reasons
    assert fused.count("mlp") == [0]
    assert "moe_separate" in str([n.target for r in fused.results for n, _ in r.calls])
    assert_close(got, exact(m, tokens()), 1e-5)


def test_no_weight_is_put_together() -> None:
    """The stack is a name: nothing is left of it in the graph."""
    left: list[Any] = []
    Fused(Layer(Gated), after=lambda graph: left.extend(n for n in graph.nodes if "stack" in n.name))(tokens())
    assert not left


def test_other_numbers_of_tokens() -> None:
    m = Layer(Gated)
    fused = Fused(m, dynamic=True)
    for n in (T, 9, 30):
        assert_close(fused(tokens(n)), exact(m, tokens(n)), 1e-5)
    assert set(fused.count("moe")) == {1}, fused.reasons


@pytest.mark.parametrize("bent", ["another", "order", "shared", "over places", "sums"])
@pytest.mark.parametrize("kind", [Plain, Gated])
def test_one_thing_bent_stays(kind: Any, bent: str) -> None:
    m = Layer(kind, "index", bent)
    (before,) = capture(m, tokens())
    products = sum(n.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) for n in before.graph.nodes)
    left: list[Any] = []
    fused = Fused(m, after=lambda graph: left.extend(graph.nodes))
    got = fused(tokens())
    assert fused.count("moe") == [0]
    assert_close(got, exact(m, tokens()), 1e-5)
    assert not [n for n in left if "stack" in n.name and n.args[0][0].op == "placeholder"]
    assert sum("mm" in n.name and "bmm" not in n.name for n in left) + sum(fused.count("mlp")) >= min(products, E + 1)
    assert fused.reasons


@pytest.mark.parametrize("kind", [Plain, Gated])
def test_compiled(kind: Any) -> None:
    m = Layer(kind)
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True), torch.no_grad(), collect() as reports:
        compiled = torch.compile(m, backend="braze", options={"require": ["moe"]})
        for n in (T, 13):
            assert_close(compiled(tokens(n)), exact(m, tokens(n)), 1e-5)
    assert not any(r.errors for r in reports)


class Channels(nn.Module):
    """A gated convolution's channels, then halves that turn: parts, products and a cat, but no experts (lfm2)."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out, self.q = nn.Linear(H, 3 * H, bias=False), nn.Linear(H, H), nn.Linear(H, H)

    def forward(self, x: Tensor) -> Tensor:
        b, c, y = self.project(x).T[None].chunk(3, 1)
        q = self.q(x + self.out((c * (b * y).cumsum(-1)).squeeze(0).T))
        return torch.cat((-q[:, H // 2 :], q[:, : H // 2]), -1)


def test_other_parts_are_not_told_of() -> None:
    m = Channels()
    fused = Fused(m)
    assert_close(fused(tokens()), m.double()(tokens().double()), 1e-5)
    assert fused.count("moe") == [0]
    assert not [reason for reason in fused.reasons if "part of the rows" in str(reason)], fused.reasons
