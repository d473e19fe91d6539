"""Unrolled loops whose sum starts from the residual or from shared experts' results: the experts are one call, added to it.

A sum that is no expert block is added up as it was.
"""

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from braze.passes import pipeline
from tests.harness import Fused, assert_close, capture
from tests.test_expert_loops import E, H, Loop, T, masked_sum


def tokens(n: int = T) -> Tensor:
    return torch.randn(n, H, generator=torch.Generator().manual_seed(1))


class FromTokens(Loop):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        return sum((masked_sum(w, ids, e) * f(x) for e, f in enumerate(self.experts)), x)


class Last(Loop):
    """The sum is the right operand, and something follows."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out = x.tanh()
        for e, f in enumerate(self.experts):
            out = f(x) * masked_sum(w, ids, e) + out
        return out.exp()


class InPlace(Loop):
    """Only what is chosen is added, in place."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out = x.clone()
        for e, f in enumerate(self.experts):
            chosen = (ids == e).any(-1, keepdim=True)
            out += torch.where(chosen, f(x) * masked_sum(w, ids, e), 0.0)
        return out


class OverShared(Loop):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, 24), nn.Linear(24, H)

    def start(self, x: Tensor) -> Tensor:
        return self.down(silu(self.up(x)))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out = self.start(x)
        for e, f in enumerate(self.experts):
            out = out + f(x) * masked_sum(w, ids, e)
        return out


class OverBoth(OverShared):
    """Over the residual and shared experts, with one more addition after the sum."""

    def start(self, x: Tensor) -> Tensor:
        return x + super().start(x)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.sin()


class ByScores(Loop):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        scores = torch.zeros(x.shape[0], E, dtype=x.dtype).scatter(1, ids, w)
        return sum((scores[:, e, None] * f(x) for e, f in enumerate(self.experts)), x)


class Twice(nn.Module):
    """Layers after one another, each adding to what the one before made."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList((FromTokens(), InPlace()))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def exact(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).double()(x.double())  # type: ignore[no-any-return]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", [FromTokens, Last, InPlace, OverShared, OverBoth, ByScores, Twice])
def test_the_experts_are_one_call(kind: type[nn.Module], dynamic: bool) -> None:
    torch.manual_seed(0)
    model = kind()
    fused = Fused(model, dynamic=dynamic)
    for n in (T, 11):
        assert_close(fused(tokens(n)), exact(model, tokens(n)), 1e-5)
    assert set(fused.count("moe")) == {2 if kind is Twice else 1}, fused.reasons


class Skips(Loop):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        return sum((masked_sum(w, ids, e) * self.experts[e](x) for e in (0, 2, 3)), x)


class Other(FromTokens):
    def __init__(self) -> None:
        super().__init__()
        self.experts[2].between = lambda g, u: torch.relu(g) * u


@pytest.mark.parametrize(("kind", "reason"), [(Skips, "not 0 up to their number"), (Other, "different activations")])
def test_what_is_no_block_is_added_up_as_it_was(kind: type[nn.Module], reason: str) -> None:
    model, x = kind(), tokens(13)  # more tokens than dense MLPs are looked for with
    (graph,) = capture(model, x)
    graph.graph.eliminate_dead_code()
    before = Counter(str(n.target) for n in graph.graph.nodes)
    result = pipeline.run(graph.graph, disable=("router",), strict=True)
    assert [f.kind for _, f in result.calls] == []
    assert any(reason in m.reason for m in result.near_misses)
    assert Counter(str(n.target) for n in graph.graph.nodes) == before
    assert_close(Fused(model)(x), exact(model, x), 1e-5)


def test_a_sum_that_is_used_on_its_way_ends_there() -> None:
    """The experts up to there are a block; those behind are not the first of any."""

    class Kept(Loop):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            w, ids = self.route(x)
            out, kept = x, x
            for e, f in enumerate(self.experts):
                out = out + f(x) * masked_sum(w, ids, e)
                kept = out if e == 1 else kept
            return out, kept

    model = Kept()
    fused = Fused(model)
    for got, expected in zip(fused(tokens()), copy.deepcopy(model).double()(tokens().double()), strict=True):
        assert_close(got, expected.detach(), 1e-5)
    assert fused.count("moe") == [1]
    assert any("not 0 up to their number" in r for r in fused.reasons)


def test_a_symbolic_number_that_is_added_is_no_residual() -> None:
    class Shifted(FromTokens):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x.shape[0]

    model = Shifted()
    fused = Fused(model, dynamic=True)
    for n in (T, 11):
        assert_close(fused(tokens(n)), exact(model, tokens(n)), 1e-5)
    assert set(fused.count("moe")) == {1}, fused.reasons
