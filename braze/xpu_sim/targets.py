"""The GPUs a kernel can be compiled for, as the properties that Triton's Intel backend asks of a device.

A target is a set of capabilities, not a driver: DPAS (the matrix engine) and 2D block IO decide which code is made,
so `generic` (none of them) and `pvc` (all of them) cover both sides of every choice of the compiler. `bmg` has those of `pvc`
and other tiles, since it has fewer cores and less bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SHARED_MEMORY = 128 * 1024  # bytes of shared local memory one work group may hold on PVC and Xe2


@dataclass(frozen=True)
class Target:
    """One Intel GPU as the compiler sees it.

    `sub_group_size` is the smallest sub-group (lanes); `matrix_engine` is DPAS; `block_io` is 2D block loads and stores;
    `fp64` is double precision in hardware; `cores` counts Xe cores.
    """

    name: str
    device_name: str
    sub_group_size: int
    matrix_engine: bool
    block_io: bool
    fp64: bool = True
    cores: int = 64

    def properties(self) -> dict[str, Any]:
        """The dictionary that Triton's Intel backend takes as `GPUTarget.arch`."""
        return {
            "name": self.device_name,
            "architecture": 0,
            "sub_group_sizes": [self.sub_group_size, 32],
            "max_work_group_size": 1024,
            "max_num_sub_groups": 64,
            "has_fp64": self.fp64,
            "has_subgroup_matrix_multiply_accumulate": self.matrix_engine,
            "has_subgroup_matrix_multiply_accumulate_tensor_float32": self.matrix_engine,
            "has_subgroup_2d_block_io": self.block_io,
            "has_bfloat16_conversions": self.matrix_engine,
        }


TARGETS = {
    target.name: target
    for target in (
        Target("pvc", "Intel(R) Data Center GPU Max 1550", 16, matrix_engine=True, block_io=True),
        Target("bmg", "Intel(R) Arc(TM) B580 Graphics", 16, matrix_engine=True, block_io=True, cores=20),
        Target("generic", "Intel(R) GPU without matrix engine", 16, matrix_engine=False, block_io=False),
    )
}


def find(name: str) -> Target:
    """The target of that name; raises ValueError that lists the names."""
    if name not in TARGETS:
        raise ValueError(f"unknown XPU target {name!r}: one of {', '.join(TARGETS)}")
    return TARGETS[name]
