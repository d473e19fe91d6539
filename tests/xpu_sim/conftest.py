"""Tests that run compiled XPU kernels on the OpenCL CPU runtime; skipped, saying what to install, where it is absent."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
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


@pytest.fixture(autouse=True, scope="session")
def launched() -> Iterator[None]:
    """With BRAZE_XPU_LAUNCHES, every code that the tests execute is noted in that folder, for `make xpu-table`."""
    folder = os.environ.get("BRAZE_XPU_LAUNCHES")
    if folder is None or LACK is not None:
        yield
        return
    with xpu_sim.record() as launches:
        yield
    found = {(x.kernel, x.target, hashlib.sha256(x.module).hexdigest()) for x in launches}
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / f"{os.getpid()}.json").write_text(json.dumps(sorted(found)))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
