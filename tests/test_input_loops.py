"""Loops over experts that put the router's weight on an expert's input: F(w x), not w F(x)."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from braze.loops import without_loops
from braze.unlooping import KeepsLoop, unlooped
from tests import test_loops
from tests.harness import Fused, assert_close
from tests.test_loops import INNER, Block, Separate, WeightBefore
from tests.test_routed_loops import E, H, K, Layer, Mlp, taken_out, tokens


class Rows(Layer):
    """What `one` makes of each expert's rows and their weights, added up."""

    def one(self, e: int, rows: Tensor, own: Tensor) -> Tensor:
        return self.experts[e](rows * own)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, H)
        weights, ids = self.choose(self.gate(flat))
        weights, out = weights.to(x.dtype), torch.zeros_like(flat)
        for e in range(E):
            token, slot = torch.where(ids == e)
            if token.numel():
                out.index_add_(0, token, self.one(e, flat[token], weights[token, slot, None]))
        return out.view_as(x)


class Llama(Rows):
    """One expert a token, a sigmoid of its logit, and a shared expert beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = Mlp(40)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        top, ids = logits.topk(1, dim=-1)
        return top.sigmoid(), ids

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shared(x)


class Slots(Rows):
    """A row for each slot, weighted before the experts."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, H)
        weights, ids = self.choose(self.gate(flat))
        rows = flat.repeat_interleave(K, dim=0) * weights.view(-1, 1).to(x.dtype)
        y = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            mask = ids.view(-1) == e
            if mask.any():
                y[mask] = expert(rows[mask])
        return y.view(-1, K, H).sum(1).view_as(x)


@pytest.mark.parametrize("kind", [Rows, Llama, Slots])
def test_one_graph_with_the_same_result(kind: type[Layer]) -> None:
    fused = taken_out(kind)
    assert any("weight on input" in str(f) for f in fused.findings)


def test_stacked_experts_by_ids_of_the_caller() -> None:
    model = Block(WeightBefore())
    x = test_loops.tokens()
    exact = copy.deepcopy(model).double()(x.double()).detach()
    without_loops(model)
    fused = Fused(model, dynamic=False)
    assert_close(fused(x), exact, 1e-6)
    assert fused.count("moe") == [1], fused.reasons


class Biased(Rows):
    """Experts that make something of nothing."""

    def __init__(self) -> None:
        super().__init__()
        for expert in self.experts:
            expert.down_proj = nn.Linear(INNER * 2, H)

    forward = Rows.forward


class Twice(Rows):
    """The weight is on the input and on the output."""

    def one(self, e: int, rows: Tensor, own: Tensor) -> Tensor:
        return super().one(e, rows, own) * own


class Squared(Rows):
    """What is multiplied by the weight is not the row."""

    def one(self, e: int, rows: Tensor, own: Tensor) -> Tensor:
        return super().one(e, rows * rows, own)


class Added(Rows):
    """The expert also sees the row without its weight."""

    def one(self, e: int, rows: Tensor, own: Tensor) -> Tensor:
        return super().one(e, rows, own + 1)


@pytest.mark.parametrize("kind", [Biased, Twice, Squared, Added])
def test_what_is_no_sum_of_experts_of_weighted_rows_keeps_its_loop(
    kind: type[Layer], caplog: pytest.LogCaptureFixture
) -> None:
    layer = kind().eval()
    with torch.no_grad():
        layer(tokens())
    with caplog.at_level(logging.WARNING, "braze"):
        without_loops(layer)
    assert "keeps its loop over experts" in caplog.text
    assert "forward" not in vars(layer)


class Named(Separate):
    """Ids of the caller, which may name an expert twice: F(w1 x) + F(w2 x) is not F((w1 + w2) x)."""

    def __init__(self) -> None:
        super().__init__()
        for expert in self.experts:
            expert[0], expert[2] = nn.Linear(16, 12, bias=False), nn.Linear(12, 16, bias=False)  # type: ignore[operator, index]

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask: Any = one_hot(ids, len(self.experts)).permute(2, 1, 0)
        for e, expert in enumerate(self.experts):
            slot, token = torch.where(mask[e])
            out.index_add_(0, token, expert(x[token] * weights[token, slot, None]))
        return out


def test_ids_that_may_be_the_same_keep_the_loop() -> None:
    with pytest.raises(KeepsLoop, match="name twice"):
        unlooped(Named())
