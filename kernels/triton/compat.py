"""What differs between versions and vendors of Triton, in one place.

A weight tile is read through a tensor descriptor (made on the host) where the device copies tiles in hardware and Triton
has such descriptors (3.4 and later), and through plain pointers everywhere else; kernels take either.
"""

import importlib.util
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

HAVE_TRITON = importlib.util.find_spec("triton") is not None
HAVE_HOST_DESCRIPTORS = HAVE_TRITON and importlib.util.find_spec("triton.tools.tensor_descriptor") is not None
DESCRIPTOR_ALIGNMENT = 16  # bytes, of the base and of every stride but the last


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
        and x.data_ptr() % DESCRIPTOR_ALIGNMENT == 0
    )


def descriptor(x: Tensor, block: list[int]) -> Any:
    """A host-side descriptor of x whose loads have shape `block`, zeros beyond the ends of x."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)


def overlaps_launches(device: torch.device) -> bool:
    """Whether a kernel may start before its predecessor ends (`intrinsics`)."""
    if not (HAVE_HOST_DESCRIPTORS and _hopper_or_later(device)):
        return False
    from braze.kernels.triton.intrinsics import HAVE_DEPENDENT_LAUNCH

    return bool(HAVE_DEPENDENT_LAUNCH)


@lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    """How many programs a device runs side by side: multiprocessors of an NVIDIA GPU, Xe cores of an Intel one."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    if device.type == "xpu":
        return max(1, int(torch.xpu.get_device_properties(device).gpu_subslice_count))
    return 1


@lru_cache(maxsize=16)
def device_name(device: torch.device) -> str:
    """The name of a device's config file: "h100", "xpu" ...; "other" where nobody tuned."""
    if device.type != "cuda":
        return device.type
    name = torch.cuda.get_device_name(device).lower()
    return next((known for known in ("h100", "h200", "a100", "b200") if known in name), "other")


def dot_precision(x: Tensor) -> str:
    """How float32 products are made: three tf32 products on an NVIDIA GPU, which keep float32's accuracy."""
    return "tf32x3" if x.dtype == torch.float32 and x.device.type == "cuda" else "ieee"
