"""Loops over the experts that were hit: braze.fuse captures the model in one graph and changes no result."""

import copy
import logging
import pickle
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import braze
from braze import breaks
from braze.backend import collect
from braze.loops import is_loop, without_loops
from braze.unlooped import Unlooped
from braze.unlooping import KeepsLoop, unlooped
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


@pytest.mark.parametrize(
    ("name", "layers"),
    [("step3p7", 2), ("dbrx", 2), ("longcat_flash", 1), ("jetmoe", 2), ("switch_transformers", 2), ("nllb_moe", 4)],
)
def test_loops_of_transformers_are_fused_with_the_same_result(name: str, layers: int) -> None:
    """Experts of stacked tensors; gate and up apart; experts that pass a token on; rows split by lists; a module each."""
    model = build(name)
    twin = copy.deepcopy(model).double()
    without_loops(model)
    fused = Fused(model)
    with torch.no_grad():
        got, exact = fused(**inputs(name))[0], twin(**inputs(name))[0]
    assert_close(got, exact, 1e-5)
    assert sum(fused.count("moe")) == layers, fused.reasons
    if torch.__version__ >= "2.12":  # Dynamo of 2.11 breaks graphs where transformers notes a model's outputs
        graphs = 3 if name == "switch_transformers" else 1  # its router sets an attribute of its own
        assert len(fused.results) == graphs


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


def test_settings_of_torch_are_changed_in_the_compiled_call_only() -> None:
    seen: list[bool] = []
    model = build("jetmoe")

    def backend(gm: Any, example_inputs: Any, **_: Any) -> Any:
        seen.append(torch._dynamo.config.capture_scalar_outputs)
        return gm.forward

    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys.modules["braze.fuse"], "_backend", lambda chosen: backend)
        braze.fuse(model)
    with torch.no_grad():
        got, exact = model(**inputs("jetmoe"))[0], build("jetmoe")(**inputs("jetmoe"))[0]
    torch.testing.assert_close(got, exact)
    assert seen == [True]
    assert not torch._dynamo.config.capture_scalar_outputs


def test_one_module_an_expert_is_read_where_it_lies() -> None:
    """Nothing is stacked: no memory is added, and a weight that is replaced later, as LoRA's merge does, is seen."""
    model = Block(Separate())
    exact = copy.deepcopy(model).double()
    without_loops(model)
    fused = Fused(model, dynamic=False)
    assert_close(fused(tokens()), exact(tokens().double()).detach(), 1e-6)
    assert fused.count("moe") == [1]
    assert not [b for m in model.modules() for b in m.buffers(recurse=False)]
    for m in (model, exact):
        m.experts.experts[2][0].weight.data.mul_(-3.0)
        m.experts.experts[1][2].weight = nn.Parameter(m.experts.experts[1][2].weight.data * 2)
    assert_close(fused(tokens()), exact(tokens().double()).detach(), 1e-6)


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
    fused = Fused(experts)
    x, ids, weights = tokens(), torch.randint(E, (7, K)), torch.randn(7, K)
    before = fused(x, ids, weights)
    assert fused.count("moe") == [1]
    with torch.no_grad():
        experts.down.mul_(2.0)
    torch.testing.assert_close(fused(x, ids, weights), 2 * before)


def test_state_dict_and_pickles_stay_and_the_loop_comes_back() -> None:
    model, plain = Block(Stacked()), Block(Stacked())
    without_loops(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(tokens()), plain(tokens()))
    assert isinstance(model.experts.forward, Unlooped)
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


class OtherOrder(Stacked):
    """Experts are numbered from the last one on."""

    def expert(self, e: int, x: Tensor) -> Tensor:
        return super().expert(E - 1 - e, x)

    forward = LastOdd.forward


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (OtherOrder, "in no order"),
        (LastOdd, "expert 4 does not compute"),
        (Busy, "result is another"),
    ],
)
def test_what_is_no_weighted_sum_of_experts_keeps_its_loop(
    kind: type[nn.Module], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(KeepsLoop, match=reason):
        unlooped(kind())
    model = Block(kind())
    with caplog.at_level(logging.WARNING, "braze"):
        without_loops(model)
    assert "keeps its loop over experts" in caplog.text
    assert "forward" not in vars(model.experts)


class Passing(Stacked):
    """Ids past the last expert pass the token on, doubled."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            token, slot = torch.where(ids == e)
            y = self.expert(e, x[token]) if e < E else 2 * x[token]
            out.index_add_(0, token, y * weights[token, slot, None])
        return out


def test_experts_without_parameters_come_after_the_others() -> None:
    experts = Passing()
    exact = copy.deepcopy(experts).double()
    without_loops(experts)
    fused = Fused(experts)
    rng = torch.Generator().manual_seed(4)
    ids = torch.stack([torch.randperm(E + 2, generator=rng)[:3] for _ in range(7)])
    weights = torch.randn(7, 3, generator=rng)
    assert (ids >= E).any()
    assert_close(fused(tokens(), ids, weights), exact(tokens().double(), ids, weights.double()).detach(), 1e-6)
    assert fused.count("moe") == [1]


def test_where_gradients_are_recorded_it_is_the_loop() -> None:
    """Graphs that save intermediates are not fused: rows that gather weights would cost more than the loop."""
    experts = Stacked()
    without_loops(experts)
    x, ids, weights = tokens(), torch.randint(E, (7, K)), torch.randn(7, K)
    torch._dynamo.reset()
    explained = torch._dynamo.explain(experts)(x, ids, weights)
    assert explained.graph_break_count > 0
    with torch.no_grad():
        assert torch._dynamo.explain(experts)(x, ids, weights).graph_break_count == 0


def test_a_captured_piece_is_told_with_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    breaks.tell.cache_clear()
    model: Any = torch.compile(Block(Stacked()), backend="braze")
    with caplog.at_level(logging.WARNING, "braze"), torch.no_grad():
        model(tokens())
    told = [r.message for r in caplog.records if "only a piece" in r.message]
    assert told
    assert len(told) == len(set(told))
    assert "braze.fuse(model)" in told[0]
