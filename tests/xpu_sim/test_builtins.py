"""The generated 2D block built-ins of every width, against the layout that the hardware has, written down a second time."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pyopencl as cl
import pytest

from braze.xpu_sim import builtins, opencl
from braze.xpu_sim.errors import MissingBuiltin
from braze.xpu_sim.spirv import Import

LANES = 16
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}
NAMES = {1: "uchar", 2: "ushort", 4: "uint"}
MANGLED = {1: "h", 2: "t", 4: "j"}
HEIGHT, PITCH = 21, 192  # of the surface, in rows and bytes


def found(name: str, lane_bytes: int) -> Import:
    pointer = f"private {NAMES[lane_bytes]}*"
    parameters = ("global void*", "int", "int", "int", "int2", pointer)
    return Import(name, name, f"PU3AS1viiiDv2_iP{MANGLED[lane_bytes]}", "void", parameters)


def call(one: Import, memory: np.ndarray[Any, Any], registers: np.ndarray[Any, Any], x: int, y: int) -> None:
    """One sub-group's call: registers [slots, lanes] in and out."""
    code, emulated = builtins.library([one])
    kind = NAMES[registers.dtype.itemsize]
    kernel = f"""
__attribute__((intel_reqd_sub_group_size({LANES})))
kernel void check(global void* memory, global {kind}* registers, int x, int y) {{
  {kind} data[{len(registers)}];
  int lane = get_sub_group_local_id();
  for (int i = 0; i < {len(registers)}; i++) data[i] = registers[i * {LANES} + lane];
  {builtins.symbol(one.symbol)}(memory, {PITCH}, {HEIGHT}, {PITCH}, (int2)(x, y), data);
  for (int i = 0; i < {len(registers)}; i++) registers[i * {LANES} + lane] = data[i];
}}"""
    assert emulated == {one.symbol}
    program = cl.Program(opencl.context(), code + kernel)
    with warnings.catch_warnings(action="ignore"):
        program.build(options=["-cl-std=CL3.0"], cache_dir=False)
    run = cl.Kernel(program, "check")
    run.set_args(cl.SVM(memory), cl.SVM(registers), np.int32(x), np.int32(y))
    cl.enqueue_nd_range_kernel(opencl.queue(), run, (LANES,), (LANES,))
    opencl.queue().finish()


def surface(size: int) -> np.ndarray[Any, Any]:
    """A surface of random elements whose base is aligned as the hardware asks."""
    raw = np.random.default_rng(0).integers(0, 256, HEIGHT * PITCH + 64, dtype=np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + HEIGHT * PITCH].view(UNSIGNED[size])


def block(memory: np.ndarray[Any, Any], x: int, y: int, rows: int, columns: int) -> np.ndarray[Any, Any]:
    """rows x columns at (x, y), zero outside of the surface."""
    whole = np.pad(memory.reshape(HEIGHT, -1), ((0, rows), (0, columns)))
    return whole[y : y + rows, x : x + columns]


def packed(tile: np.ndarray[Any, Any], lane_bytes: int) -> np.ndarray[Any, Any]:
    """A tile's bytes in row-major order, dealt to the lanes in pieces of a register each: [slots, lanes]."""
    flat = np.ascontiguousarray(tile).view(np.uint8).ravel()
    flat = np.pad(flat, (0, -len(flat) % (LANES * lane_bytes)))
    return flat.view(UNSIGNED[lane_bytes]).reshape(-1, LANES)


@pytest.mark.parametrize(
    ("size", "rows", "columns", "blocks", "lane_bytes"),
    [(1, 8, 32, 1, 2), (1, 32, 32, 1, 2), (2, 8, 16, 2, 2), (2, 16, 16, 1, 2), (4, 8, 8, 1, 4), (4, 8, 16, 1, 4)],
)  # fmt: skip
@pytest.mark.parametrize("corner", [(0, 0), (16, 17)])
def test_read(size: int, rows: int, columns: int, blocks: int, lane_bytes: int, corner: tuple[int, int]) -> None:
    memory = surface(size)
    tiles = [block(memory, corner[0] + b * columns, corner[1], rows, columns) for b in range(blocks)]
    want = np.concatenate([packed(tile, lane_bytes) for tile in tiles])
    registers = np.zeros(want.shape, UNSIGNED[lane_bytes])
    name = f"intel_sub_group_2d_block_read_{8 * size}b_{rows}r{columns}x{blocks}c"
    call(found(name, lane_bytes), memory, registers, *corner)
    assert np.array_equal(registers, want)


@pytest.mark.parametrize(("size", "rows"), [(1, 32), (2, 16), (2, 32)])
def test_read_for_the_matrix_engine(size: int, rows: int) -> None:
    """VNNI: a register of 32 bits holds as many rows of one column as it can."""
    memory, each = surface(size), 4 // size
    tile = block(memory, 16, 3, rows, LANES)
    want = np.stack([np.ascontiguousarray(tile[s : s + each].T).view(np.uint32)[:, 0] for s in range(0, rows, each)])
    registers = np.zeros(want.shape, np.uint32)
    name = f"intel_sub_group_2d_block_read_transform_{8 * size}b_{rows}r16x1c"
    call(found(name, 4), memory, registers, 16, 3)
    assert np.array_equal(registers, want)


def test_read_transposed() -> None:
    memory = surface(4)
    want = packed(block(memory, 8, 2, 16, 8).T, 4)
    registers = np.zeros(want.shape, np.uint32)
    call(found("intel_sub_group_2d_block_read_transpose_32b_16r8x1c", 4), memory, registers, 8, 2)
    assert np.array_equal(registers, want)


@pytest.mark.parametrize(("size", "columns", "lane_bytes"), [(1, 32, 2), (2, 16, 2), (4, 16, 4)])
def test_write_stays_inside(size: int, columns: int, lane_bytes: int) -> None:
    memory = surface(size)
    before = memory.copy().reshape(HEIGHT, -1)
    tile = np.random.default_rng(1).integers(0, 200, (8, columns)).astype(UNSIGNED[size])
    registers = np.ascontiguousarray(packed(tile, lane_bytes))
    call(found(f"intel_sub_group_2d_block_write_{8 * size}b_8r{columns}x1c", lane_bytes), memory, registers, 16, 17)
    want = before.copy()
    rows, width = HEIGHT - 17, min(columns, before.shape[1] - 16)
    want[17:, 16 : 16 + width] = tile[:rows, :width]
    assert np.array_equal(memory.reshape(HEIGHT, -1), want)


def test_a_prefetch_changes_nothing() -> None:
    name = "intel_sub_group_2d_block_prefetch_16b_8r16x1c"
    one = Import(name, name, "PU3AS1viiiDv2_i", "void", ("global void*", "int", "int", "int", "int2"))
    assert builtins.emulated(one) is not None


def test_one_that_is_not_covered_is_named() -> None:
    one = Import("_Z9sub_thingi", "intel_sub_group_thing", "i", "int", ("int",))
    with pytest.raises(MissingBuiltin, match=r"does not emulate intel_sub_group_thing .*int \(int\)"):
        builtins.emulated(one)
