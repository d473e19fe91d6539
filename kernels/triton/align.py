"""Sorts the T*k rows by expert on the device, without a host that waits: a counting sort in at most two launches.

Row r = t*k + j belongs to expert ids[t, j]. Every program counts one stretch of rows; knowing all the counts, each can place
its own rows. The same counts give the list of row tiles, cut per expert from how many rows it really has. Rows with an id
outside 0..E-1 form one last "expert" E, so that the kernels after this one have one rule for all rows.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from braze.kernels.triton.intrinsics import lookup

CHUNK = 128  # rows that are ranked against each other at once
SINGLE = 512  # rows up to which one program does all
PROGRAMS = 64


@dataclass(frozen=True)
class Alignment:
    """order [S]: rows sorted by expert. tiles [2 + 3*limit] int32: how many tiles have an expert, how many there are with
    those that have none, then each one's expert, its first position in `order`, and its number of rows. limit: a bound on
    the number of tiles, from what the host knows."""

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
def moe_place(
    ids, counts, order, tiles, rows, experts, limit,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr, ALONE: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Writes `order` for a program's rows and its share of the tiles. ALONE: the only program, with no counts to read."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    bins = tl.arange(0, BINS)
    total = tl.zeros((BINS,), tl.int32)
    before = tl.zeros((BINS,), tl.int32)
    if ALONE:
        for c in range(CHUNKS):
            row = c * CHUNK + tl.arange(0, CHUNK)
            total += tl.histogram(_experts(ids, row, rows, experts), BINS)
    else:
        for first in range(0, programs, 8):
            other = first + tl.arange(0, 8)[:, None]
            some = tl.load(counts + other * BINS + bins[None, :], mask=other < programs, other=0)
            total += tl.sum(some, 0)
            before += tl.sum(tl.where(other < program, some, 0), 0)
    begin = tl.cumsum(total, 0) - total

    base = begin + before
    member = tl.arange(0, CHUNK)
    for c in range(CHUNKS):
        row = (program * CHUNKS + c) * CHUNK + member
        expert = _experts(ids, row, rows, experts)
        # A second load lays the same values out along the other axis.
        other_row = (program * CHUNKS + c) * CHUNK + tl.arange(0, CHUNK)
        other = _experts(ids, other_row, rows, experts)
        same = (expert[:, None] == other[None, :]) & (member[None, :] < member[:, None])
        rank = tl.sum(same.to(tl.int32), 1)
        tl.store(order + lookup(base, expert, BINS) + rank, row, mask=row < rows)
        base += tl.histogram(expert, BINS)

    tile_count = tl.where(bins <= experts, (total + BM - 1) // BM, 0)
    tile_end = tl.cumsum(tile_count, 0)
    number = tl.sum(tile_count, 0)
    if program == 0:
        tl.store(tiles, number - tl.sum(tl.where(bins == experts, tile_count, 0), 0))
        tl.store(tiles + 1, number)
    for block in range(program, (number + 31) // 32, programs):
        tile = block * 32 + tl.arange(0, 32)
        expert = tl.sum((tile_end[None, :] <= tile[:, None]).to(tl.int32), 1)
        expert = tl.minimum(expert, experts)
        nth = tile - lookup(tile_end - tile_count, expert, BINS)
        live = tile < number
        tl.store(tiles + 2 + tile, expert, mask=live)
        tl.store(tiles + 2 + limit + tile, lookup(begin, expert, BINS) + nth * BM, mask=live)
        size = tl.minimum(lookup(total, expert, BINS) - nth * BM, BM)
        tl.store(tiles + 2 + 2 * limit + tile, size, mask=live)


def align(ids: Tensor, experts: int, tile_rows: int) -> Alignment:
    """ids [T, k], contiguous; tile_rows: rows of a full tile, a power of two."""
    rows = ids.numel()
    bins = max(16, triton.next_power_of_2(experts + 2))
    chunks = triton.cdiv(rows, CHUNK)
    alone = rows <= SINGLE
    per_program = chunks if alone else max(1, triton.cdiv(chunks, PROGRAMS))
    programs = 1 if alone else triton.cdiv(chunks, per_program)
    limit = min(rows, rows // tile_rows + min(experts + 1, rows))
    order = torch.empty(rows, dtype=torch.int32, device=ids.device)
    tiles = torch.empty(2 + 3 * limit, dtype=torch.int32, device=ids.device)
    counts = order if alone else torch.empty(programs * bins, dtype=torch.int32, device=ids.device)
    if not alone:
        moe_count[(programs,)](ids, counts, rows, experts, per_program, CHUNK, bins, num_warps=4)
    moe_place[(programs,)](
        ids, counts, order, tiles, rows, experts, limit, per_program, CHUNK, bins, alone, tile_rows, num_warps=8
    )
    return Alignment(order, tiles, limit)
