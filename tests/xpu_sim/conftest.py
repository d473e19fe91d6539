"""Tests that run compiled XPU kernels on the OpenCL CPU runtime; skipped, saying what to install, where it is absent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from braze import xpu_sim

HERE = Path(__file__).parent
LACK = xpu_sim.missing()
if LACK is not None:
    collect_ignore = [path.name for path in HERE.glob("test_*.py") if path.name != "test_available.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.xpu_sim)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
