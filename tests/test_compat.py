"""What kernels are told of a device: whose kernels run there, and by which name it is tuned."""

from __future__ import annotations

import pytest
import torch

from braze.kernels.triton import compat


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("Intel(R) Data Center GPU Max 1550", "pvc"),
        ("Intel(R) Data Center GPU Max 1100", "pvc"),
        ("Intel(R) Arc(TM) B580 Graphics", "bmg"),
        ("Intel(R) Arc(TM) A770 Graphics", "xpu"),
        ("Intel(R) Data Center GPU Flex 170", "xpu"),
    ],
)
def test_names_of_intel_gpus(name: str, config: str) -> None:
    assert compat.intel_name(name) == config


def test_a_simulated_gpu_takes_the_place_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert (compat.platform(cpu), compat.device_name(cpu), compat.processors(cpu)) == ("cpu", "cpu", 1)
    monkeypatch.setitem(compat.simulated, "cpu", compat.Simulated("xpu", "pvc", 64))
    assert (compat.platform(cpu), compat.device_name(cpu), compat.processors(cpu)) == ("xpu", "pvc", 64)
