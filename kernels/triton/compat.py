"""What differs between versions and vendors of Triton, in one place.

A weight tile is read through a tensor descriptor (made on the host) where the device copies tiles in hardware and Triton
has such descriptors (3.4 and later), and through plain pointers everywhere else; kernels take either. Host code launches
kernels through a `Start`, so that one sequence runs at once or becomes a part of a graph.
"""

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

HAVE_TRITON = importlib.util.find_spec("triton") is not None
HAVE_HOST_DESCRIPTORS = HAVE_TRITON and importlib.util.find_spec("triton.tools.tensor_descriptor") is not None
BLOCK_ALIGNMENT = 64  # bytes
LAST_WITH_SMALL_AND_LARGE = (3, 5)  # version of Intel's Triton that calls 128 and 256 registers so
DESCRIPTOR_ALIGNMENT = 16  # bytes, of the base and of every stride but the last


@dataclass(frozen=True)
class Simulated:
    """A GPU that runs on another device's tensors: its platform ("xpu"), device name ("pvc"), and what runs side by side."""

    platform: str
    name: str
    processors: int


#: device type -> the GPU that is simulated there (`braze.xpu_sim`)
simulated: dict[str, Simulated] = {}


def platform(device: torch.device) -> str:
    """Whose kernels run on a device's tensors: the device's type, or that of the GPU simulated there."""
    found = simulated.get(device.type)
    return found.platform if found else device.type


@lru_cache(maxsize=16)
def _hopper_or_later(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def takes_descriptor(x: Tensor) -> bool:
    """Whether `descriptor(x, ...)` can be made and pays: hardware tile copies, last stride 1, the rest aligned."""
    aligned = all(s * x.element_size() % DESCRIPTOR_ALIGNMENT == 0 for s in x.stride()[:-1])
    return (
        HAVE_HOST_DESCRIPTORS
        and _hopper_or_later(x.device)
        and x.stride(-1) == 1
        and aligned
        and _address(x) % DESCRIPTOR_ALIGNMENT == 0
    )


def takes_block(x: Tensor, offset: int = 0) -> bool:
    """Whether an XPU can load blocks of x's last two dimensions, of stride 1 at the end: 16 bits, the base (and what lies
    `offset` elements behind it) aligned to 64 bytes, the pitch to 16, rows of at least 64 bytes (docs/xpu.md)."""
    if platform(x.device) != "xpu":
        return False
    size, pitch = x.element_size(), x.stride(-2) * x.element_size()
    bases = (_address(x), *(s * size for s in x.stride()[:-2]), offset * size)
    return (
        _have_block_pointers()
        and size == 2
        and x.stride(-1) == 1
        and all(base % BLOCK_ALIGNMENT == 0 for base in bases)
        and pitch % 16 == 0
        and pitch >= x.shape[-1] * size >= 64
        and x.shape[-1] * size % 4 == 0
        and x.shape[-2] > 1
    )


@lru_cache(maxsize=1)
def _have_block_pointers() -> bool:
    """Triton up to 3.8 has them."""
    import triton.language as tl

    return hasattr(tl, "make_block_ptr")


def _address(x: Tensor) -> int:
    """Where x begins; in a graph, counted from its storage, which compiled code gets aligned."""
    return int(x.storage_offset() * x.element_size()) if isinstance(x, FakeTensor) else x.data_ptr()


def multiplies_into_float32(device: torch.device) -> bool:
    """Whether torch multiplies 16-bit matrices into a float32 result there."""
    return device.type == "cuda" and torch.version.hip is None


@dataclass(frozen=True)
class Box:
    """A tensor that a kernel reads in blocks of this shape through a descriptor, zeros beyond the tensor's ends."""

    tensor: Tensor
    block: tuple[int, ...]


def overlaps_launches(device: torch.device) -> bool:
    """Whether a kernel may start before its predecessor ends (`intrinsics`)."""
    if not (HAVE_HOST_DESCRIPTORS and _hopper_or_later(device)):
        return False
    from braze.kernels.triton.intrinsics import HAVE_DEPENDENT_LAUNCH

    return bool(HAVE_DEPENDENT_LAUNCH)


def capturing(device: torch.device) -> bool:
    """Whether what is launched becomes a part of a CUDA graph, or of an XPU's."""
    ask = getattr(getattr(torch, device.type, None), "is_current_stream_capturing", None)
    return bool(ask is not None and ask())


def processors(device: torch.device) -> int:
    """How many programs a device runs side by side: multiprocessors of an NVIDIA GPU, Xe cores of an Intel one."""
    found = simulated.get(device.type)
    return found.processors if found else _processors(device)


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    if device.type == "xpu":
        return max(1, int(torch.xpu.get_device_properties(device).gpu_subslice_count))
    return 1


def device_name(device: torch.device) -> str:
    """The name of a device's config file: "h100", "pvc", "bmg" ...; "xpu" or "other" where nobody tuned."""
    found = simulated.get(device.type)
    return found.name if found else _device_name(device)


@lru_cache(maxsize=16)
def _device_name(device: torch.device) -> str:
    if device.type == "xpu":
        return intel_name(torch.xpu.get_device_name(device))
    if device.type != "cuda":
        return device.type
    name = torch.cuda.get_device_name(device).lower()
    return next((known for known in ("h100", "h200", "a100", "b200") if known in name), "other")


def intel_name(name: str) -> str:
    """The config name of an Intel GPU by the name its driver gives: "pvc" (Max series), "bmg" (Arc B), else "xpu"."""
    if "Data Center GPU Max" in name:
        return "pvc"
    return "bmg" if re.search(r"\bArc\b.*\bB\d{2,3}\b", name) else "xpu"


@lru_cache(maxsize=1)
def triton_version() -> tuple[int, int]:
    """(major, minor) of the Triton that is installed, by whichever name."""
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


#: Of an XPU's work group, by the registers of a thread: twice as many leave half the threads.
MAX_WARPS = {128: 64, 256: 32}


def xpu_options(warps: int, registers: int, version: tuple[int, int]) -> dict[str, str]:
    """The launch option that gives each thread of an XPU 128 or 256 registers, as this version of Triton spells it.

    ValueError for another number, or for more warps than a work group can have with so many.
    """
    if registers not in MAX_WARPS:
        raise ValueError(f"an XPU's thread has 128 or 256 registers, not {registers}")
    if warps > MAX_WARPS[registers]:
        raise ValueError(f"{warps} warps with {registers} registers a thread: at most {MAX_WARPS[registers]}")
    old = {128: "small", 256: "large"}
    return {"grf_mode": old[registers] if version <= LAST_WITH_SMALL_AND_LARGE else str(registers)}


ARRIVALS = 1024  # blocks of columns whose parts can be counted in one call
LANES = 16  # of an XPU's warp
HELD = 32  # elements of a kernel's largest tile that each of them holds without a spill


def spread(x: Tensor, elements: int, warps: int) -> int:
    """Warps for a kernel whose largest tile has so many elements of 32 bits: on an XPU more than given where it would spill."""
    if platform(x.device) != "xpu":
        return warps
    needed = -(-elements // (LANES * HELD))
    return min(32, max(warps, 1 << (needed - 1).bit_length()))


def dot_precision(x: Tensor) -> str:
    """How float32 products are made: three tf32 products on an NVIDIA GPU, which keep float32's accuracy."""
    return "tf32x3" if x.dtype == torch.float32 and x.device.type == "cuda" else "ieee"


class Start(Protocol):
    """How a kernel is launched: at once (`start`), or by becoming a part of a graph."""

    def __call__(
        self,
        kernel: Any,
        grid: tuple[Any, ...],
        args: tuple[Any, ...],
        constants: Mapping[str, Any],
        writes: Sequence[str],
        *,
        warps: int,
        stages: int | None = None,
        overlap: bool = False,
        registers: int = 0,
    ) -> list[Tensor]:
        """Launches kernel[grid](*args, **constants) and returns the arguments named in `writes` as the kernel leaves them.

        args: the kernel's arguments ahead of its constexprs, which are `constants`, in the order of its signature.
        overlap: the launch may begin before its predecessor has ended. registers: of each thread of an XPU (`xpu_options`).
        """
        ...


_compiled: dict[Any, Any] = {}


def start(
    kernel: Any,
    grid: tuple[Any, ...],
    args: tuple[Any, ...],
    constants: Mapping[str, Any],
    writes: Sequence[str],
    *,
    warps: int,
    stages: int | None = None,
    overlap: bool = False,
    registers: int = 0,
) -> list[Tensor]:
    """A launch at once."""
    return launched(kernel, grid, args, constants, writes, warps, stages, overlap, registers)[1]


def launched(
    kernel: Any, grid: tuple[Any, ...], args: tuple[Any, ...], constants: Mapping[str, Any], writes: Sequence[str],
    warps: int, stages: int | None, overlap: bool, registers: int,
) -> tuple[Any, list[Tensor]]:  # fmt: skip
    """(the compiled kernel, what it writes) after a launch. What was compiled for such arguments is found by a short key:
    Triton's own way from a call to a launch, which looks at every argument again, takes longer than a token's kernels."""
    written = [args[kernel.arg_names.index(name)] for name in writes]
    options: dict[str, Any] = (
        {"num_warps": warps} | ({"num_stages": stages} if stages else {}) | ({"launch_pdl": True} if overlap else {})
    )
    if registers and platform(args[0].device) == "xpu":
        options |= xpu_options(warps, registers, triton_version())
    key = None
    if args[0].device.type in ("cuda", "xpu"):
        key = (kernel, args[0].device.index, *map(_specialized, args), *constants.values(), *options.values())
    given = tuple(_descriptor(a) if isinstance(a, Box) else a for a in args)
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[(*grid, 1, 1)[:3]](*given, *constants.values())
        return compiled, written
    compiled = kernel[grid](*given, **constants, **options)
    if key is not None:
        _compiled[key] = compiled
    return compiled, written


def _specialized(value: Any) -> Any:
    """What of an argument Triton compiles for."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int):
        return value == 1, value % 16 == 0, -(2**31) <= value < 2**31
    return (value.tensor.dtype, value.block) if isinstance(value, Box) else None


def _descriptor(box: Box) -> Any:
    x = box.tensor
    return tensor_descriptor(x, list(x.shape), list(x.stride()), list(box.block))


def tensor_descriptor(base: Any, shape: list[int], strides: list[int], block: list[int]) -> Any:
    """Triton's descriptor; base: a tensor, or what has its data_ptr() and dtype."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(base, shape, strides, block)
