"""Intel's OpenCL CPU runtime out of the Python environment, and SPIR-V made into programs that it runs.

The runtime lies in the environment's own lib folder and finds its libraries beside it; an ICD file in the cache folder
names it. A program linked once is kept on disk under the hash of all that went into it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braze.xpu_sim import builtins, spirv
from braze.xpu_sim.errors import SimulatorUnavailable
from braze.xpu_sim.split import split_loads

if TYPE_CHECKING:
    import pyopencl as cl

INSTALL = "pip install 'braze[xpu-verify]'"
LOCAL_MEMORY = "256KB"  # more than any GPU of Intel has, so that the kernel's target is the limit


@dataclass(frozen=True)
class Program:
    """A linked OpenCL program: `kernel` to launch; `fault`, a kernel that reads and clears the fault word, or None where
    nothing can set it."""

    kernel: Any
    fault: Any | None


def cache_folder() -> Path:
    """Where the simulator keeps what it built (XDG_CACHE_HOME, else ~/.cache)."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "braze" / "xpu_sim"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def runtime_library() -> Path:
    """The OpenCL CPU runtime that the package intel-opencl-rt put into this environment."""
    for folder in (Path(sys.prefix) / "lib", Path(sys.base_prefix) / "lib"):
        if (folder / "libintelocl.so").exists():
            return folder / "libintelocl.so"
    raise SimulatorUnavailable(f"the XPU simulator needs intel-opencl-rt: {INSTALL}")


def missing() -> str | None:
    """What keeps the simulator from running here, as a line that says what to install; None where nothing does."""
    for package in ("triton", "pyopencl"):
        if importlib.util.find_spec(package) is None:
            return f"the XPU simulator needs {package}: {INSTALL}"
    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.origin is not None
    if not (Path(spec.origin).parent / "backends" / "intel").is_dir():
        return f"the XPU simulator needs Intel's Triton (triton-xpu) in place of this triton: {INSTALL}"
    try:
        runtime_library()
    except SimulatorUnavailable as error:
        return str(error)
    return None


@functools.cache
def context() -> cl.Context:
    """The one OpenCL context, on the CPU runtime."""
    library = runtime_library()
    vendors = cache_folder() / "vendors" / hashlib.sha256(str(library).encode()).hexdigest()[:16]
    vendors.mkdir(parents=True, exist_ok=True)
    (vendors / "intel-cpu.icd").write_text(f"{library}\n")
    os.environ.setdefault("OCL_ICD_VENDORS", str(vendors))
    os.environ.setdefault("CL_CONFIG_CPU_FORCE_LOCAL_MEM_SIZE", LOCAL_MEMORY)
    import pyopencl as cl

    for platform in cl.get_platforms():
        if platform.name.startswith("Intel(R) OpenCL"):
            return cl.Context([platform.get_devices(cl.device_type.CPU)[0]])
    raise SimulatorUnavailable(
        "another OpenCL platform was loaded before the simulator's: import braze.xpu_sim first, and leave "
        "OCL_ICD_VENDORS unset"
    )


@functools.cache
def queue() -> cl.CommandQueue:
    import pyopencl as cl

    return cl.CommandQueue(context())


@functools.lru_cache(maxsize=1024)
def load(module: bytes, name: str) -> Program:
    """The kernel `name` of a SPIR-V module, built for the CPU (or taken from the disk) with what it imports.

    Raises MissingBuiltin where it calls what the simulator does not emulate.
    """
    import pyopencl as cl

    source, emulated = builtins.library(spirv.imports(module))
    renamed = spirv.adapt(module, lambda symbol: builtins.symbol(symbol) if symbol in emulated else symbol)
    adapted = split_loads(renamed)
    device = context().devices[0]
    version = f"{device.name} {device.driver_version} {importlib.metadata.version('intel-opencl-rt')}"
    key = hashlib.sha256(b"\0".join((adapted, source.encode(), version.encode()))).hexdigest()
    cached = cache_folder() / "programs" / f"{key}.bin"
    if cached.exists():
        program = cl.Program(context(), [device], [cached.read_bytes()])
        with warnings.catch_warnings(action="ignore"):  # the runtime's "build done", and pyopencl on its own cache
            program.build(cache_dir=False)
    else:
        program = link(adapted, source)
        cached.parent.mkdir(exist_ok=True)
        partial = cached.with_suffix(f".{os.getpid()}")
        partial.write_bytes(program.get_info(cl.program_info.BINARIES)[0])
        partial.replace(cached)
    return Program(cl.Kernel(program, name), cl.Kernel(program, builtins.FAULT_KERNEL) if source else None)


def link(module: bytes, source: str) -> cl.Program:
    import pyopencl as cl

    kernel = cl.Program(context(), module)
    kernel.compile()
    parts = [kernel]
    if source:
        library = cl.Program(context(), source)
        with warnings.catch_warnings(action="ignore"):
            library.compile(options=["-cl-std=CL3.0"])
        parts.append(library)
    return cl.link_program(context(), parts)
