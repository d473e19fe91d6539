"""Triton's driver for a GPU that is not there: Intel's compiler, then the OpenCL CPU runtime on the tensors' own memory.

Triton asks its driver for a target, a way to load a binary and a way to launch it; this one answers with the chosen
GPU's capabilities and with an OpenCL launch on shared virtual memory, which on a CPU is any memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from braze.kernels.triton import compat
from braze.xpu_sim import builtins, opencl
from braze.xpu_sim.errors import SurfaceError
from braze.xpu_sim.targets import SHARED_MEMORY, Target

SCALARS: dict[str, Callable[[Any], Any]] = {
    "i1": np.int8,
    "i8": np.int8,
    "i16": np.int16,
    "i32": np.int32,
    "i64": np.int64,
    "u1": np.uint8,
    "u8": np.uint8,
    "u16": np.uint16,
    "u32": np.uint32,
    "u64": np.uint64,
    "fp16": np.float32,
    "bf16": np.float32,
    "fp32": np.float32,
    "f32": np.float32,
    "fp64": np.float64,
}


def flatten(kinds: Sequence[Any], values: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """(type, value) of each run-time argument; tuples opened up, compile-time constants left out."""
    for kind, value in zip(kinds, values, strict=True):
        if isinstance(kind, tuple):
            yield from flatten(kind, value)
        elif kind != "constexpr":
            yield kind, value


def argument(kind: str, value: Any) -> Any:
    """One argument as OpenCL takes it: a pointer into the tensor's own memory, or a scalar of the kernel's type."""
    import pyopencl as cl

    if not kind.startswith("*"):
        return SCALARS[kind](value)
    if isinstance(value, torch.Tensor) and value.device.type != "cpu":
        raise ValueError(f"the XPU simulator runs on CPU tensors, not on {value.device}")
    address = value if isinstance(value, int) else 0 if value is None else value.data_ptr()
    # Only the address of an SVM argument counts, so one byte stands for the tensor.
    return cl.SVM(np.ctypeslib.as_array((ctypes.c_int8 * 1).from_address(address))) if address else None


@dataclass(frozen=True)
class Function:
    """A compiled kernel as Triton holds it: its name, target and SPIR-V; linked for the CPU at its first launch."""

    name: str
    target: str
    module: bytes


@dataclass(frozen=True)
class Launch:
    """One launch that ran: the kernel's SPIR-V and what its machine code depends on.

    `flags` are the options for Intel's compiler (the register file's size among them), `shared` is in bytes.
    """

    kernel: str
    target: str
    module: bytes
    flags: str
    warps: int
    shared: int
    grid: tuple[int, int, int]


@dataclass(frozen=True)
class Record:
    """Where launches are collected; without `run` they are not executed."""

    launches: list[Launch]
    run: bool


RECORDS: list[Record] = []


@contextlib.contextmanager
def record(run: bool) -> Iterator[list[Launch]]:
    """Collects the launches made inside it, in order; without `run` they are compiled and not executed.

    One that runs knows nothing of launches that another, inside it, kept from running.
    """
    RECORDS.append(Record([], run))
    try:
        yield RECORDS[-1].launches
    finally:
        RECORDS.pop()


class Launcher:
    """Launches one compiled kernel; made by Triton from the kernel's source (for its signature) and metadata."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.kinds = tuple(source.signature.values())
        self.shared = int(metadata.shared)
        self.warps = int(metadata.num_warps)
        self.flags = str(metadata.build_flags)
        self.lanes = self.warps * int(metadata.threads_per_warp)

    def __call__(self, x: int, y: int, z: int, stream: int, function: Function, *rest: Any) -> None:

        _, launch_metadata, enter, leave, *values = rest
        if x * y * z == 0:
            return
        if enter is not None:
            enter(launch_metadata)
        runs = all(records.run for records in RECORDS)
        if runs:
            self.execute(opencl.load(function.module, function.name), (x, y, z), values)
        if leave is not None:
            leave(launch_metadata)
        for records in RECORDS:
            name, target, module = function.name, function.target, function.module
            if runs or not records.run:
                records.launches.append(Launch(name, target, module, self.flags, self.warps, self.shared, (x, y, z)))

    def execute(self, program: opencl.Program, grid: tuple[int, int, int], values: Sequence[Any]) -> None:
        import pyopencl as cl

        x, y, z = grid
        arguments = [argument(kind, value) for kind, value in flatten(self.kinds, values)]
        if self.shared:
            arguments.append(cl.LocalMemory(self.shared))
        program.kernel.set_args(*arguments)
        cl.enqueue_nd_range_kernel(opencl.queue(), program.kernel, (x * self.lanes, y, z), (self.lanes, 1, 1))
        opencl.queue().finish()
        if program.fault is not None:
            check(program)


def check(program: opencl.Program) -> None:
    """Raises SurfaceError where the launch broke a rule of the hardware for 2D block messages."""
    import pyopencl as cl

    word = np.zeros(1, np.uint32)
    assert program.fault is not None
    program.fault.set_args(cl.SVM(word))
    cl.enqueue_nd_range_kernel(opencl.queue(), program.fault, (1,), (1,))
    opencl.queue().finish()
    if word[0]:
        raise SurfaceError(f"{program.kernel.function_name}: {builtins.explain_fault(int(word[0]))}")


class Utils:
    """What Triton asks of the device itself."""

    @staticmethod
    def load_binary(name: str, module: bytes, shared: int, flags: str, device: str) -> tuple[Any, Any, int, int]:
        return None, Function(name, device, module), 0, 0

    @staticmethod
    def get_device_properties(device: str) -> dict[str, Any]:
        return {"max_shared_mem": SHARED_MEMORY, "multiprocessor_count": 64}


def once(call: Callable[[], Any], quantiles: Sequence[float] | None = None, **_: Any) -> Any:
    """The benchmark that autotuning uses: one run, in ms. Every config runs; which one wins says nothing of a GPU."""
    start = time.perf_counter()
    call()
    elapsed = 1e3 * (time.perf_counter() - start)
    return elapsed if quantiles is None else [elapsed] * len(quantiles)


class SimulatedXpu:
    """A Triton driver for one target; kernels are cached apart for each, since the device is the target's name."""

    launcher_cls = Launcher
    utils = Utils

    def __init__(self, target: Target) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return GPUTarget("xpu", self.target.properties(), 32)

    def get_current_device(self) -> str:
        return self.target.name

    def set_current_device(self, device: str) -> None:
        if device != self.target.name:
            raise ValueError(f"this is {self.target.name}, not {device}")

    def get_current_stream(self, device: str | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[..., Any]:
        return once

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(0)

    def clear_cache(self, cache: torch.Tensor) -> None:
        """There is no device cache to clear."""


class Idle:
    """The driver where there is no GPU and no simulated one is chosen: it lets kernels be decorated, not launched.

    Triton's autotune asks the driver for a benchmark when it decorates, which without any driver is an error.
    """

    def get_benchmarker(self) -> Callable[..., Any]:
        return once

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError('no GPU here: launch inside `with braze.xpu_sim.device("pvc"):`')


def stand_by() -> None:
    """Puts Idle in place of Triton's own choice of a driver where no GPU is present."""
    if not any(backend.driver.is_active() for backend in triton.backends.backends.values()):
        driver.set_active(Idle())


class NoArchitecture:
    """Stands for the helper that names the GPU's architecture, which Triton would build with a SYCL compiler."""

    @staticmethod
    def parse_device_arch(_: int) -> str:
        return ""


@contextlib.contextmanager
def active(target: Target) -> Iterator[None]:
    """Inside this context Triton compiles for `target` and launches on the CPU, and braze takes CPU tensors for the GPU's."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("TRITON_INTERPRET is set, so kernels are interpreted and never compiled: unset it")
    build_globals = triton.backends.backends["intel"].compiler.__init__.__globals__
    name = "compile_module_from_src"
    before = driver.active, build_globals[name]
    build_globals[name] = lambda source, module: NoArchitecture
    driver.set_active(SimulatedXpu(target))
    gpu = compat.Simulated("xpu", target.name, target.cores)
    try:
        with mock.patch.dict(compat.simulated, cpu=gpu):
            yield
    finally:
        driver.set_active(before[0])
        build_globals[name] = before[1]
