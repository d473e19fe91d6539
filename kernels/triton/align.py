"""Sorts the T*k rows by expert on the device, without a host that waits: a counting sort in two or three launches.

Row r = t*k + j belongs to expert ids[t, j]. From how many rows each expert has follow where its rows begin and how many tiles
they make; then every row takes the next free place of its expert. The order within an expert is left to chance: a row's
result does not depend on its neighbours. Rows with an id outside 0..E-1 form one last "expert" E.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from braze.kernels.triton.compat import MOST, Start, platform, spread
from braze.kernels.triton.intrinsics import launch_dependents, wait

CHUNK = 256  # rows that a program looks at together
SINGLE = 1024  # rows up to which the scan counts by itself
PROGRAMS = 64
TILES = 32  # tiles that a program describes together


@dataclass(frozen=True)
class Alignment:
    """order [S]: rows sorted by expert. tiles [2 + 4*limit] int32: how many tiles have an expert, how many there are with
    those that have none, then each one's expert, the expert's first position in `order` and the one behind its last, and
    the expert's first tile. limit: a bound on the number of tiles, from what the host knows."""

    order: Tensor
    tiles: Tensor
    limit: int


@triton.jit
def _experts(ids, row, rows, experts):
    """The expert of each row: `experts` for an id that is none, experts + 1 past the last row."""
    value = tl.load(ids + row, mask=row < rows, other=0)
    value = tl.where((value >= 0) & (value < experts), value, experts).to(tl.int32)
    return tl.where(row < rows, value, experts + 1)


@triton.jit
def moe_count(ids, counts, rows, experts, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr):
    """counts [programs, BINS]: rows of each expert among a program's CHUNKS * CHUNK rows."""
    program = tl.program_id(0)
    total = tl.zeros((BINS,), tl.int32)
    for c in range(CHUNKS):
        row = (program * CHUNKS + c) * CHUNK + tl.arange(0, CHUNK)
        total += tl.histogram(_experts(ids, row, rows, experts), BINS)
    tl.store(counts + program * BINS + tl.arange(0, BINS), total)


@triton.jit
def moe_scan(
    ids, counts, table, tiles, rows, experts, parts,
    CHUNK: tl.constexpr, BINS: tl.constexpr, COUNTED: tl.constexpr, BM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """table [4, BINS]: each expert's next free position, its first, its rows, and its tiles with those before it.

    COUNTED: from counts [parts, BINS]; otherwise one program counts all the `parts` chunks of rows.
    """
    if OVERLAP:
        launch_dependents()
        if COUNTED:
            wait()
    bins = tl.arange(0, BINS)
    total = tl.zeros((BINS,), tl.int32)
    if COUNTED:
        for first in range(0, parts, 16):
            part = first + tl.arange(0, 16)[:, None]
            total += tl.sum(tl.load(counts + part * BINS + bins[None, :], mask=part < parts, other=0), 0)
    else:
        for part in range(parts):
            total += tl.histogram(_experts(ids, part * CHUNK + tl.arange(0, CHUNK), rows, experts), BINS)
    begin = tl.cumsum(total, 0) - total
    tile_count = tl.where(bins <= experts, (total + BM - 1) // BM, 0)
    tl.store(table + bins, begin)
    tl.store(table + BINS + bins, begin)
    tl.store(table + 2 * BINS + bins, total)
    tl.store(table + 3 * BINS + bins, tl.cumsum(tile_count, 0))
    number = tl.sum(tile_count, 0)
    tl.store(tiles, number - tl.sum(tl.where(bins == experts, tile_count, 0), 0))
    tl.store(tiles + 1, number)


@triton.jit
def moe_place(
    ids, table, order, tiles, rows, experts, limit,
    CHUNK: tl.constexpr, BINS: tl.constexpr, TILES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Each program puts CHUNK rows in their places, and describes every so many TILES tiles."""
    if OVERLAP:
        launch_dependents()
        wait()
    program = tl.program_id(0)
    row = program * CHUNK + tl.arange(0, CHUNK)
    here = row < rows
    place = tl.atomic_add(table + _experts(ids, row, rows, experts), 1, mask=here, sem="relaxed")
    tl.store(order + place, row, mask=here)
    number = tl.load(tiles + 1)
    for block in range(program, tl.cdiv(number, TILES), tl.num_programs(0)):
        tile = block * TILES + tl.arange(0, TILES)
        tile_end = tl.load(table + 3 * BINS + tl.arange(0, BINS))
        expert = tl.minimum(tl.sum((tile_end[None, :] <= tile[:, None]).to(tl.int32), 1), experts)
        live = tile < number
        first = tl.load(table + 3 * BINS + expert - 1, mask=live & (expert > 0), other=0)
        begin = tl.load(table + BINS + expert, mask=live, other=0)
        total = tl.load(table + 2 * BINS + expert, mask=live, other=0)
        tl.store(tiles + 2 + tile, expert, mask=live)
        tl.store(tiles + 2 + limit + tile, begin, mask=live)
        tl.store(tiles + 2 + 2 * limit + tile, begin + total, mask=live)
        tl.store(tiles + 2 + 3 * limit + tile, first, mask=live)


def align(ids: Tensor, experts: int, tile_rows: int, start: Start, overlap: bool) -> Alignment:
    """ids [T, k], contiguous; tile_rows: rows of a full tile, a power of two; overlap: launches of the call may overlap."""
    rows = ids.numel()
    bins = max(32, triton.next_power_of_2(experts + 2))
    chunks = triton.cdiv(rows, CHUNK)
    counted = rows > SINGLE
    each = triton.cdiv(chunks, PROGRAMS)
    parts = triton.cdiv(chunks, each) if counted else chunks
    limit = min(rows, rows // tile_rows + min(experts + 1, rows))
    table, order, tiles = (
        torch.empty(n, dtype=torch.int32, device=ids.device) for n in (4 * bins, rows, 2 + 4 * limit)
    )
    described = min(TILES, MOST // bins) if platform(ids.device) == "xpu" else TILES
    programs = max(chunks, triton.cdiv(limit, described))
    counts = table
    if counted:
        counts = torch.empty(parts * bins, dtype=torch.int32, device=ids.device)
        constants = {"CHUNKS": each, "CHUNK": CHUNK, "BINS": bins}
        (counts,) = start(moe_count, (parts,), (ids, counts, rows, experts), constants, ["counts"], warps=4)
    table, tiles = start(
        moe_scan, (1,), (ids, counts, table, tiles, rows, experts, parts),
        {"CHUNK": CHUNK, "BINS": bins, "COUNTED": counted, "BM": tile_rows, "OVERLAP": overlap},
        ["table", "tiles"], warps=spread(ids, 16 * bins, 8), overlap=overlap and counted,
    )  # fmt: skip
    _, order, tiles = start(
        moe_place, (programs,), (ids, table, order, tiles, rows, experts, limit),
        {"CHUNK": CHUNK, "BINS": bins, "TILES": described, "OVERLAP": overlap},
        ["table", "order", "tiles"], warps=spread(ids, described * bins, 4), overlap=overlap,
    )  # fmt: skip
    return Alignment(order, tiles, limit)
