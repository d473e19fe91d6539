"""Whole compiled graphs on a simulated GPU: Inductor writes Triton for CPU tensors, the simulator compiles and runs it.

Inductor can generate Triton for the CPU, which only lacks a Triton that targets it; here that target is the GPU of the
simulator. So every kernel Inductor makes of a model runs as the SPIR-V of an Intel GPU, on the tensors' own memory.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch._inductor.config as inductor_config
import triton
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from triton.runtime.driver import driver

from braze.xpu_sim.driver import active
from braze.xpu_sim.opencl import cache_folder
from braze.xpu_sim.targets import Target

SETTINGS: dict[str, Any] = {
    "cpu_backend": "triton",
    "compile_threads": 1,  # the driver is this process's own
}


@contextlib.contextmanager
def compiled_graphs(target: Target) -> Iterator[None]:
    """torch.compile inside this context makes kernels for `target` and runs them on CPU tensors."""
    compile_triton = triton.compile
    # Inductor's cache does not know for which target a kernel was compiled, so each has its own.
    cache = str(cache_folder() / "inductor" / target.name)

    def compile_for_target(source: Any, target: Any = None, options: Any = None, **rest: Any) -> Any:
        chosen = driver.active.get_current_target() if getattr(target, "backend", None) == "cpu" else target
        return compile_triton(source, target=chosen, options=options, **rest)

    with (
        active(target),
        mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache, TRITON_CACHE_DIR=f"{cache}/triton"),
        inductor_config.patch(SETTINGS),
        mock.patch.object(triton, "compile", compile_for_target),
        mock.patch.object(triton_helpers, "set_driver_to_cpu", lambda: None),
        # The time of a simulated launch says nothing, so the first config of a kernel wins.
        mock.patch.object(CachingAutotuner, "bench", lambda *args, **options: 1.0),
    ):
        yield
