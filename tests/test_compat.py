"""What kernels are told of a device: whose kernels run there, and by which name it is tuned."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

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


@pytest.mark.parametrize(
    ("version", "registers", "option"),
    [
        ((3, 3), 256, "large"),
        ((3, 3), 128, "small"),
        ((3, 5), 256, "large"),
        ((3, 6), 256, "256"),
        ((3, 8), 128, "128"),
    ],
)
def test_registers_as_each_version_of_triton_spells_them(version: tuple[int, int], registers: int, option: str) -> None:
    assert compat.xpu_options(8, registers, version) == {"grf_mode": option}


def test_warps_that_a_work_group_can_have() -> None:
    assert compat.xpu_options(32, 256, (3, 3)) and compat.xpu_options(64, 128, (3, 3))
    with pytest.raises(ValueError, match="64 warps with 256 registers a thread: at most 32"):
        compat.xpu_options(64, 256, (3, 3))
    with pytest.raises(ValueError, match="128 or 256 registers, not 64"):
        compat.xpu_options(8, 64, (3, 6))


class Xpu:
    """Stands for torch.xpu on a machine with such GPUs."""

    def __init__(self, name: str, cores: int) -> None:
        self.name, self.cores = name, cores

    def get_device_name(self, device: torch.device) -> str:
        return self.name

    def get_device_properties(self, device: torch.device) -> Any:
        return SimpleNamespace(gpu_subslice_count=self.cores)


@pytest.mark.parametrize(
    ("name", "cores", "config"),
    [("Intel(R) Data Center GPU Max 1550", 64, "pvc"), ("Intel(R) Arc(TM) B580 Graphics", 20, "bmg")],
)
def test_what_torch_says_of_an_xpu(monkeypatch: pytest.MonkeyPatch, name: str, cores: int, config: str) -> None:
    for cached in (compat._device_name, compat._processors):
        cached.cache_clear()
    monkeypatch.setattr(torch, "xpu", Xpu(name, cores))
    device = torch.device("xpu")
    assert compat.platform(device) == "xpu"
    assert (compat.device_name(device), compat.processors(device)) == (config, cores)
    for cached in (compat._device_name, compat._processors):
        cached.cache_clear()
