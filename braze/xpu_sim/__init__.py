"""Run XPU kernels without an XPU: Intel's Triton compiler, then Intel's OpenCL CPU runtime, the GPU's built-ins emulated.

    with braze.xpu_sim.device("pvc"):
        kernel[grid](x, y, n, BLOCK=128)      # any @triton.jit kernel, CPU tensors

What runs is the SPIR-V that the GPU would load, matrix engine and 2D block loads included. It shows numbers and broken
rules of the hardware, not speed and not races.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from braze.xpu_sim.errors import MissingBuiltin, SimulatorUnavailable, SurfaceError
from braze.xpu_sim.opencl import missing
from braze.xpu_sim.targets import TARGETS, Target, find

if TYPE_CHECKING:
    from braze.xpu_sim.driver import Launch

__all__ = [
    "TARGETS",
    "MissingBuiltin",
    "SimulatorUnavailable",
    "SurfaceError",
    "Target",
    "compiled_graphs",
    "device",
    "missing",
    "record",
]


def require() -> None:
    """Raises SimulatorUnavailable, saying what to install, where a package is absent."""
    lack = missing()
    if lack is not None:
        raise SimulatorUnavailable(lack)


def device(name: str = "pvc") -> AbstractContextManager[None]:
    """A context in which Triton kernels are compiled for that Intel GPU and run on CPU tensors, without a copy.

    `name` is "pvc" or "bmg" (DPAS, 2D block IO) or "generic" (neither). Raises SimulatorUnavailable where a package is absent;
    ValueError for an unknown name. A launch raises MissingBuiltin for a GPU built-in that is not emulated, SurfaceError
    where a 2D block message breaks a rule of the hardware.
    """
    target = find(name)
    require()
    from braze.xpu_sim.driver import active

    return active(target)


def compiled_graphs(name: str = "pvc") -> AbstractContextManager[None]:
    """As `device`, and torch.compile inside it makes every kernel of a model's graphs for that GPU, run on CPU tensors."""
    target = find(name)
    require()
    from braze.xpu_sim import inductor

    return inductor.compiled_graphs(target)


def record(run: bool = True) -> AbstractContextManager[list[Launch]]:
    """A context that collects the launches made inside it: SPIR-V, compiler flags, grid, bytes of shared memory.

    Without `run` kernels are compiled and recorded but not executed.
    """
    require()
    from braze.xpu_sim import driver

    return driver.record(run)


if missing() is None:
    from braze.xpu_sim.driver import stand_by

    stand_by()
