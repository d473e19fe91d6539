"""The simulator says what it lacks, and what it cannot do, in words."""

from __future__ import annotations

import pytest

from braze import xpu_sim


def test_installed() -> None:
    lack = xpu_sim.missing()
    if lack is not None:
        pytest.skip(lack)


def test_unknown_target_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"one of pvc, bmg, generic"):
        xpu_sim.device("cuda")


def test_absent_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(xpu_sim.SimulatorUnavailable, match=r"needs triton.*braze\[xpu-verify\]"):
        xpu_sim.device("pvc")
