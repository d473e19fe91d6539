"""Choices are told apart from errors: a run that chose others than float64 is compared with float64 that chooses the same."""

from dataclasses import replace

import pytest
import torch

from tests.routing import Route, differing, weight_error
from tests.support import Outcome, _outcome

A = Route(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0.7, 0.3], [0.6, 0.4]]))


def test_order_within_a_choice_does_not_count_and_another_expert_does() -> None:
    turned = Route(A.ids.flip(-1), A.weights.flip(-1))
    other = Route(torch.tensor([[0, 1], [2, 4]]), A.weights)
    assert (differing([A], [turned]), differing([A], [other])) == (0, 1)
    assert weight_error([turned], [A]) == 0.0
    assert weight_error([replace(A, weights=A.weights * 1.1)], [A]) == pytest.approx(0.1, rel=1e-5)


def test_a_choice_that_differs_in_bfloat16_leaves_no_error_once_forced() -> None:
    found = _outcome("granitemoeshared", "batched_mm", "bfloat16", "prefill")
    assert (found.moe, found.choices) == (2, 48)
    assert 0 < found.error < 3e-2
    assert found.whole


def test_many_choices_that_differ_are_no_rounding() -> None:
    case = Outcome("own", "bfloat16", "prefill", layers=1, moe=1, error=1e-3, eager=1e-3, other=9, choices=64)
    assert not case.exact
    assert replace(case, other=2).exact
