"""Layers with loops over experts as projects outside of transformers write them: taken out, or left with a reason."""

import copy
import logging

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, silu

import braze
from braze import loops
from braze.loops import without_loops
from tests.harness import Fused, assert_close
from tests.test_routed_loops import INNER, E, H, K, Layer, Mlp


class Counted(Layer):
    """DeepSeek-V3's own inference code: groups closed by a new mask, counts of an expert's rows, a shared expert."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.randn(E) * 0.1)
        self.shared = Mlp(40)

    def open_groups(self, choice: Tensor, groups: Tensor) -> Tensor:
        return choice.new_ones(choice.size(0), 3, dtype=torch.bool).scatter_(1, groups, False)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.sigmoid()
        choice = (scores + self.bias).view(logits.size(0), 3, -1)
        groups = choice.topk(2, dim=-1)[0].sum(-1).topk(2, dim=-1)[1]
        choice = choice.masked_fill(self.open_groups(choice, groups).unsqueeze(-1), float("-inf")).flatten(1)
        ids = choice.topk(K, dim=-1)[1]
        weights = scores.gather(1, ids)
        return weights / weights.sum(-1, keepdim=True) * 2.5, ids

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, H)
        weights, ids = self.choose(self.gate(flat))
        y = torch.zeros_like(flat)
        counts = torch.bincount(ids.flatten(), minlength=E).tolist()
        for e in range(E):
            if counts[e] == 0:
                continue
            token, slot = torch.where(ids == e)
            y[token] += self.experts[e](flat[token]) * weights[token, slot, None]
        return (y + self.shared(flat)).view(x.shape)


class Filled(Counted):
    """The mask made by another function, of another value."""

    def open_groups(self, choice: Tensor, groups: Tensor) -> Tensor:
        return choice.new_full((choice.size(0), 3), 2.0).scatter_(1, groups, 0.0) > 1


class AlwaysOneRow(Counted):
    """The mask of the first token is everyone's: what one token does is not what many do."""

    def open_groups(self, choice: Tensor, groups: Tensor) -> Tensor:
        return super().open_groups(choice, groups[:1].expand_as(groups))


@pytest.mark.parametrize("kind", [Counted, Filled])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_tensors_have_as_many_rows_as_there_are_tokens(kind: type[Layer], dtype: torch.dtype) -> None:
    layer = kind().to(dtype).eval()
    exact = kind().double().eval()
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(2, 9, H, generator=torch.Generator().manual_seed(3)).to(dtype)
    with torch.no_grad():
        expected, eager = exact(x.double()), layer(x)
    without_loops(layer)
    fused = Fused(layer)
    got = fused(x)
    assert fused.count("moe") == fused.count("router") == [1], fused.reasons
    assert "in 2 of 3 groups" in next(f.form for f in fused.findings if f.kind == "router")
    if dtype == torch.float32:
        assert_close(got, expected, 1e-5)
    else:  # near ties are chosen otherwise than in float64
        assert_close(got, eager.double(), 2.0**-5)


def test_what_is_another_thing_for_more_tokens_keeps_its_loop(caplog: pytest.LogCaptureFixture) -> None:
    layer = AlwaysOneRow().eval()
    with caplog.at_level(logging.WARNING, "braze"):
        without_loops(layer)
    assert "forward" not in vars(layer)
    assert "keeps its loop over experts" in caplog.text


def test_an_error_of_what_takes_the_loops_place_leaves_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(module: nn.Module) -> None:
        raise ZeroDivisionError("of braze's own")

    monkeypatch.setattr(loops, "routed", fails)
    layer = Counted().eval()
    x = torch.randn(1, 5, H)
    with torch.no_grad():
        expected = layer(x)
    with caplog.at_level(logging.WARNING, "braze"):
        without_loops(layer)
    assert "internal error: ZeroDivisionError: of braze's own" in caplog.text
    with torch.no_grad():
        assert torch.equal(layer(x), expected)


class Scored(nn.Module):
    """DBRX as it was released: a router that returns all scores too, experts in rows of one tensor each, and a loop that takes
    the scores beside ids and weights. own: a loop that weights by all scores instead."""

    def __init__(self, own: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = ScoringRouter()
        self.experts = ScoredExperts(own)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, weights, ids = self.router(x)
        return self.experts(x, scores, weights, ids), scores


class ScoringRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(H, E, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = self.layer(x.view(-1, H)).softmax(dim=-1)
        weights, ids = scores.topk(K, dim=-1)
        return scores, weights / torch.norm(weights, p=1, dim=-1, keepdim=True), ids


class ScoredExperts(nn.Module):
    def __init__(self, own: bool) -> None:
        super().__init__()
        self.own = own
        self.gate, self.up, self.down = (nn.Parameter(torch.randn(E * INNER, H) * 0.2) for _ in range(3))

    def one(self, x: Tensor, e: int) -> Tensor:
        gate, up, down = (w.view(E, INNER, H)[e] for w in (self.gate, self.up, self.down))
        return (silu(x.matmul(gate.t())) * x.matmul(up.t())).matmul(down)

    def forward(self, x: Tensor, scores: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        x = x.view(-1, hidden)
        out = torch.zeros_like(x)
        mask = one_hot(ids, num_classes=E).permute(2, 1, 0)
        for e in range(E):
            slot, token = torch.where(mask[e])
            if token.shape[0] == 0:
                continue
            tokens, slots = token.tolist(), slot.tolist()
            weight = scores[tokens, e, None] if self.own else weights[tokens, slots, None]
            out.index_add_(0, token, self.one(x[None, tokens].reshape(-1, hidden), e) * weight)
        return out.reshape(batch, length, hidden)


class Around(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.tanh())[0] + x  # type: ignore[no-any-return]


@pytest.mark.parametrize("own", [False, True])
def test_a_loop_that_takes_all_scores_too(own: bool) -> None:
    model = Around(Scored(own)).eval()
    exact = copy.deepcopy(model).double()
    x = torch.randn(2, 9, H, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = exact(x.double())
    without_loops(model)
    fused = Fused(model)
    assert_close(fused(x), expected, 1e-5)
    if own:  # ids and weights do not say what it weights by
        assert "forward" not in vars(model.layer)
    else:
        assert fused.count("moe") == fused.count("router") == [1], fused.reasons
        del model.layer.forward
        with torch.no_grad():
            assert_close(model(x), expected, 1e-5)


def test_a_break_in_experts_is_told_with_its_line() -> None:
    x = torch.randn(2, 9, H, generator=torch.Generator().manual_seed(3))
    report = braze.explain(Around(Scored()).eval(), x)
    told = [m for m in report.near_misses if "the graph ends here" in m.reason]
    assert told
    assert "braze.fuse(model)" in told[0].reason
    assert "test_loop_projects.py" in told[0].source


def test_a_break_elsewhere_is_no_near_miss() -> None:
    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sin() * len(x[x > 0])

    assert not braze.explain(Counts().eval(), torch.randn(5)).near_misses
