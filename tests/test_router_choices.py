"""Routers that choose without a top-k: by a sort whose first results are taken, or by the largest score."""

import logging

import pytest
import torch
from torch import Tensor

from braze.loops import without_loops
from tests.harness import Fused, assert_close
from tests.test_routed_loops import Layer, Masked, taken_out
from tests.test_router_sites import K, Router, inputs, layer


def by_sort(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    values, ids = x.softmax(-1).sort(dim=-1, descending=True)
    return values[:, :K] / values[:, :K].sum(-1, keepdim=True), ids[:, :K]


def by_stable_sort(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    values, ids = torch.sort(x, dim=1, descending=True, stable=True)
    return values.narrow(1, 0, K).softmax(-1), ids.narrow(1, 0, K)


def by_argsort(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = x.sigmoid()
    ids = (scores + bias).argsort(-1, descending=True)[..., :K]
    return scores.gather(-1, ids), ids


def by_argmax(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = x.softmax(-1)
    ids = scores.argmax(-1, keepdim=True)
    return scores.gather(-1, ids), ids


def by_argmax_alone(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    ids = x.argmax(dim=1)
    return x.sigmoid().gather(1, ids.unsqueeze(1)), ids.unsqueeze(1)


@pytest.mark.parametrize("router", [by_sort, by_stable_sort, by_argsort, by_argmax, by_argmax_alone])
def test_a_choice_by_another_name_is_a_router(router: Router) -> None:
    fused = Fused(layer(router), dynamic=False)
    got = fused(*inputs())
    exact = layer(router)(*inputs(dtype=torch.float64))
    assert fused.count("moe") == [1], fused.reasons
    assert fused.count("router") == [1], fused.reasons
    assert_close(got, exact, 1e-5)


def smallest(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    values, ids = x.softmax(-1).sort(dim=-1)
    return values[:, :K], ids[:, :K]


def but_the_first(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    values, ids = x.softmax(-1).sort(dim=-1, descending=True)
    return values[:, 1 : K + 1], ids[:, 1 : K + 1]


def of_tokens(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    ids = x.sort(dim=0, descending=True)[1][:, :K]
    return x.softmax(-1).gather(1, ids), ids


def smallest_alone(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = x.softmax(-1)
    ids = (-scores).argmax(-1, keepdim=True)
    return scores.gather(-1, ids), ids


@pytest.mark.parametrize("router", [smallest, but_the_first, of_tokens, smallest_alone])
def test_another_choice_is_no_router(router: Router) -> None:
    fused = Fused(layer(router), dynamic=False)
    got = fused(*inputs())
    assert fused.count("router") == [0]
    assert fused.reasons
    assert_close(got, layer(router)(*inputs(dtype=torch.float64)), 1e-5)


class BySort(Masked):
    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        values, ids = logits.softmax(-1).sort(dim=-1, descending=True)
        weights = values[..., : self.k]
        return weights / weights.sum(-1, keepdim=True), ids[..., : self.k]


class ByMax(Masked):
    k = 1

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return logits.softmax(-1).max(-1, keepdim=True)


class ByArgmax(Masked):
    k = 1

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.softmax(-1)
        ids = scores.argmax(-1, keepdim=True)
        return scores.gather(-1, ids), ids


class InTurn(Masked):
    """The largest, then the largest of the others. Its router stays; its experts are one call."""

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.softmax(-1)
        first, one = scores.max(-1, keepdim=True)
        second, other = scores.scatter(-1, one, 0.0).max(-1, keepdim=True)
        weights = torch.cat((first, second), -1)
        return weights / weights.sum(-1, keepdim=True), torch.cat((one, other), -1)


@pytest.mark.parametrize(("kind", "routers"), [(BySort, 1), (ByMax, 1), (ByArgmax, 1), (InTurn, 0)])
def test_loops_with_such_a_router_are_taken_out(kind: type[Layer], routers: int) -> None:
    taken_out(kind, routers)


class Threshold(Masked):
    """Whatever is above the mean, as often as that is."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).softmax(-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = scores[:, e] > 1 / len(self.experts)
            if mask.any():
                out[mask] += scores[mask, e].unsqueeze(1) * expert(x[mask])
        return out


def test_a_threshold_chooses_nothing_that_is_known(caplog: pytest.LogCaptureFixture) -> None:
    model = Threshold().eval()
    with caplog.at_level(logging.INFO, "braze"):
        without_loops(model)
    assert "no top-k" in caplog.text
    assert "forward" not in vars(model)
