"""Loops over the experts that were hit: braze.fuse captures the model in one graph and changes no result."""

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import braze
from braze.backend import _tell_break, collect
from braze.loops import Gathered, KeepsLoop, gathered, is_loop, without_loops
from tests.families import build, inputs
from tests.harness import Fused, assert_close

H, INNER, E, K = 16, 12, 5, 2


class Stacked(nn.Module):
    """As transformers writes it: the experts that were hit, by nonzero."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.up = nn.Parameter(torch.randn(E, 2 * INNER, H, generator=rng) * 0.3)
        self.down = nn.Parameter(torch.randn(E, H, INNER, generator=rng) * 0.3)

    def expert(self, e: int, x: Tensor) -> Tensor:
        gate, up = nn.functional.linear(x, self.up[e]).chunk(2, -1)
        return nn.functional.linear(nn.functional.silu(gate) * up, self.down[e])

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = nn.functional.one_hot(ids, E).permute(2, 1, 0)
        for (e,) in mask.sum((-1, -2)).nonzero():
            slot, token = torch.where(mask[e])
            out.index_add_(0, token, self.expert(e, x[token]) * weights[token, slot, None])
        return out


class Separate(nn.Module):
    """One module an expert, a mask for each, in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(H, INNER), nn.GELU(), nn.Linear(INNER, H)) for _ in range(E)
        )

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            if token.numel():
                out[token] += expert(x[token]) * weights[token, slot].unsqueeze(1)
        return out


class Block(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.router = nn.Linear(H, E)
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K)
        return x + self.experts(x, ids, weights)


def tokens(n: int = 7) -> Tensor:
    return torch.randn(n, H, generator=torch.Generator().manual_seed(2))


def test_a_loop_by_hand_is_fused_with_the_same_result() -> None:
    model = Block(Stacked())
    exact = copy.deepcopy(model).double()(tokens().double()).detach()
    without_loops(model)
    fused = Fused(model, dynamic=False)
    assert_close(fused(tokens()), exact, 1e-6)
    assert fused.count("moe") == [1]


@pytest.mark.parametrize(("name", "layers"), [("step3p7", 2)])
def test_loops_of_transformers_are_fused_with_the_same_result(name: str, layers: int) -> None:
    model = build(name)
    twin = copy.deepcopy(model).double()
    without_loops(model)
    fused = Fused(model)
    with torch.no_grad():
        got, exact = fused(**inputs(name))[0], twin(**inputs(name))[0]
    assert_close(got, exact, 1e-5)
    assert fused.count("moe") == [layers]


def test_a_loop_in_bfloat16_is_fused() -> None:
    """Decompositions leave dead casts beside its products."""
    experts = next(m for m in build("step3p7", torch.bfloat16).modules() if is_loop(m))
    exact = copy.deepcopy(experts).double()
    rng = torch.Generator().manual_seed(3)
    x, weights = torch.randn(9, 64, generator=rng).bfloat16(), torch.rand(9, 2, generator=rng).bfloat16()
    ids = torch.stack([torch.randperm(8, generator=rng)[:2] for _ in range(9)])
    expected = exact(x.double(), ids, weights.double()).detach()
    without_loops(experts)
    fused = Fused(experts)
    assert_close(fused(x, ids, weights), expected, 3e-2)
    assert fused.count("moe") == [1]


@pytest.mark.parametrize(("name", "reason"), [("dbrx", "not recognised"), ("longcat_flash", "no parameters")])
def test_a_loop_that_would_gather_weights_unfused_stays(name: str, reason: str) -> None:
    """dbrx keeps gate and up in two tensors, longcat_flash has experts that pass a token on: no site covers either yet."""
    loops = [m for m in build(name).modules() if is_loop(m)]
    assert loops
    for module in loops:
        with pytest.raises(KeepsLoop, match=reason):
            gathered(module)


def test_a_class_with_a_choice_is_switched() -> None:
    model = build("mixtral", experts="eager")
    without_loops(model)
    fused = Fused(model)
    fused(**inputs("mixtral"))
    assert fused.count("moe") == [2]


def test_fuse_compiles_the_model_and_gradients_reach_the_parameters() -> None:
    model = Block(Stacked())
    twin = copy.deepcopy(model).double()
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True), collect() as reports:
        braze.fuse(
            model,
        )
        got = model(tokens())
    assert len(reports) >= 1
    got.square().sum().backward()
    twin(tokens().double()).square().sum().backward()
    for ours, exact in zip(model.parameters(), twin.parameters(), strict=True):
        assert ours.grad is not None
        assert exact.grad is not None
        assert_close(ours.grad, exact.grad, 1e-4)


def test_parameters_changed_later_are_seen() -> None:
    experts = Stacked()
    without_loops(experts)
    x, ids, weights = tokens(), torch.randint(E, (7, K)), torch.randn(7, K)
    before = experts(x, ids, weights)
    with torch.no_grad():
        experts.down.mul_(2.0)
    torch.testing.assert_close(experts(x, ids, weights), 2 * before)


def test_state_dict_and_pickles_stay_and_the_loop_comes_back() -> None:
    model, plain = Block(Stacked()), Block(Stacked())
    without_loops(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(tokens()), plain(tokens()))
    assert isinstance(model.experts.forward, Gathered)
    del model.experts.forward
    assert is_loop(model.experts)


class WeightBefore(Stacked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.expert(e, x[token] * weights[token, slot, None]))
        return out


class LastOdd(Stacked):
    def expert(self, e: int, x: Tensor) -> Tensor:
        y = super().expert(e, x)
        return y.relu() if e == E - 1 else y

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.expert(e, x[token]) * weights[token, slot, None])
        return out


class Busy(Stacked):
    """An expert's load changes what it computes: only a comparison of many tokens shows it."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.expert(e, x[token]) * weights[token, slot, None] / token.numel())
        return out


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (WeightBefore, "constant"),
        (Separate, "parameter of its own"),
        (LastOdd, "expert 4 does not compute"),
        (Busy, "another result"),
    ],
)
def test_what_is_no_weighted_sum_of_experts_keeps_its_loop(
    kind: type[nn.Module], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(KeepsLoop, match=reason):
        gathered(kind())
    model = Block(kind())
    with caplog.at_level(logging.WARNING, "braze"):
        without_loops(model)
    assert "keeps its loop over experts" in caplog.text
    assert "forward" not in vars(model.experts)


def test_a_captured_piece_is_told_with_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    _tell_break.cache_clear()
    model: Any = torch.compile(Block(Stacked()), backend="braze")
    with caplog.at_level(logging.WARNING, "braze"), torch.no_grad():
        model(tokens())
    told = [r.message for r in caplog.records if "only a piece" in r.message]
    assert told
    assert len(told) == len(set(told))
    assert "braze.fuse(model)" in told[0]
