"""The Triton experts as XPU code: both ways to find rows, both layouts of gate and up, against float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from braze import xpu_sim
from tests.test_triton_moe import CASES, compare, config


@pytest.mark.parametrize("name", ["silu", "gpt_oss", "invalid k=1", "fp16"])
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "sorted"])
def test_features(name: str, direct: bool) -> None:
    with xpu_sim.device("pvc"):
        compare(CASES[name], config(direct))


def test_a_split_and_two_counting_programs() -> None:
    many = dataclasses.replace(CASES["silu"], tokens=600, hidden=32, intermediate=32, ids="invalid", bias=torch.float32)
    with xpu_sim.device("generic"):
        compare(dataclasses.replace(CASES["on_input"], intermediate=160), config(True, split=4))
        compare(many, config(False, rows=32))
