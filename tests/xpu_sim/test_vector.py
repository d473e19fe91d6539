"""Vectors' kernels, which CUDA has for few tokens, as code that runs without a GPU: shared experts and a router's product."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from braze import xpu_sim
from tests import test_triton_gate, test_triton_shared


@pytest.mark.parametrize("form", test_triton_shared.FORMS, ids=str)
@pytest.mark.parametrize("factor", [None, 0.37])
def test_shared_experts(form: Any, factor: float | None) -> None:
    with xpu_sim.device("pvc"), xpu_sim.record() as launches:
        test_triton_shared.check_kernel("cpu", form, factor, torch.float32)
    assert [launch.kernel for launch in launches] == ["moe_vector_up", "moe_vector_down"]


@pytest.mark.parametrize(("dtype", "weight"), test_triton_gate.DTYPES, ids=str)
def test_a_routers_product(dtype: torch.dtype, weight: torch.dtype) -> None:
    with xpu_sim.device("pvc"):
        test_triton_gate.check_kernel("cpu", 3, 7, 1100, dtype, weight)
