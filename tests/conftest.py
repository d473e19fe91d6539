"""Where nothing runs compiled Triton, its interpreter runs the kernels: it must be asked for before any is imported.

With Intel's Triton and an OpenCL CPU runtime, kernels run on the XPU simulator instead (tests/xpu_sim).
"""

import os
import sys
from importlib import util
from pathlib import Path

import torch


def simulated() -> bool:
    """Whether the simulator can run, as `braze.xpu_sim.missing` says, which can't be asked: it imports the kernels."""
    spec = util.find_spec("triton")
    if spec is None or spec.origin is None or util.find_spec("pyopencl") is None:
        return False
    runtime = any((Path(prefix) / "lib" / "libintelocl.so").exists() for prefix in (sys.prefix, sys.base_prefix))
    return runtime and (Path(spec.origin).parent / "backends" / "intel").is_dir()


if not torch.cuda.is_available() and not simulated():
    os.environ.setdefault("TRITON_INTERPRET", "1")
