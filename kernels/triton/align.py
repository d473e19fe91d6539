"""Sorts the T*k rows by expert on the device, without a host that waits: a counting sort in one or two launches.

Row r = t*k + j belongs to expert ids[t, j]. From how many rows each expert has follow where its rows begin and how many tiles
they make. Of up to LISTED rows every program counts all, and ranks some: a row's place is the number of rows before it, by
expert and then by number. More rows are counted by parts first; a part's rows of an expert follow those of the parts before
it, and within the part take the next free place, in an order that is left to chance: a row's result does not depend on its
neighbours. Counters that one part has to itself are hardly waited for; of a counter that all share, every increment waits for
the one before. Rows with an id outside 0..E-1 form one last "expert" E.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from braze.kernels.triton.compat import Start, platform, spread
from braze.kernels.triton.intrinsics import launch_dependents, wait

LISTED = 1024  # rows up to which one launch sorts
OWN = 8  # of which each of its programs puts so many in their places
LOOK = 512  # and looks at so many together
PARTS = 64  # that more rows are cut in, at most
PART = 128  # rows of the smallest part
CHUNK = 1024  # rows of a part that are looked at together, at most
COUNTS = {"cuda": 4096, "xpu": 1024}  # of all parts, that are added up together
GATHERED = 1024  # elements that Intel's Triton 3.3 needs to gather from, with up to 32 warps


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
def _describe(tiles, total, experts, limit, BINS: tl.constexpr, BM: tl.constexpr):
    """Writes the tiles of experts with `total` [BINS] rows: each program every so many of every expert's."""
    bins = tl.arange(0, BINS)
    begin = tl.cumsum(total, 0) - total
    count = tl.where(bins <= experts, (total + BM - 1) // BM, 0)
    first = tl.cumsum(count, 0) - count
    if tl.program_id(0) == 0:
        tl.store(tiles, tl.sum(tl.where(bins < experts, count, 0), 0))
        tl.store(tiles + 1, tl.sum(count, 0))
    for nth in range(tl.program_id(0), tl.max(count, 0), tl.num_programs(0)):
        tile = tiles + 2 + first + nth
        tl.store(tile, bins, mask=nth < count)
        tl.store(tile + limit, begin, mask=nth < count)
        tl.store(tile + 2 * limit, begin + total, mask=nth < count)
        tl.store(tile + 3 * limit, first, mask=nth < count)


@triton.jit
def moe_sort(
    ids, order, tiles, rows, experts, limit,
    OWN: tl.constexpr, LOOK: tl.constexpr, BINS: tl.constexpr, BM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Each program counts all rows, and puts OWN of them in their places."""
    if OVERLAP:
        launch_dependents()
    own = tl.program_id(0) * OWN + tl.arange(0, OWN)
    key = _experts(ids, own, rows, experts) * rows + own
    before = tl.zeros((OWN, LOOK), tl.int32)
    total = tl.zeros((BINS,), tl.int32)
    for first in range(0, rows, LOOK):
        row = first + tl.arange(0, LOOK)
        expert = _experts(ids, row, rows, experts)
        total += tl.histogram(expert, BINS)
        before += ((expert * rows + row)[None, :] < key[:, None]).to(tl.int32)
    tl.store(order + tl.sum(before, 1), own, mask=own < rows)
    _describe(tiles, total, experts, limit, BINS, BM)


@triton.jit
def moe_count(
    ids, counts, ranks, rows, experts, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """counts [programs, BINS]: rows of each expert among a program's CHUNKS * CHUNK rows; ranks, as large, becomes 0."""
    if OVERLAP:
        launch_dependents()
    program = tl.program_id(0)
    total = tl.zeros((BINS,), tl.int32)
    for c in range(CHUNKS):
        row = (program * CHUNKS + c) * CHUNK + tl.arange(0, CHUNK)
        total += tl.histogram(_experts(ids, row, rows, experts), BINS)
    tl.store(counts + program * BINS + tl.arange(0, BINS), total)
    tl.store(ranks + program * BINS + tl.arange(0, BINS), tl.zeros((BINS,), tl.int32))


@triton.jit
def moe_place(
    ids, counts, ranks, order, tiles, rows, experts, limit, parts,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr, WIDE: tl.constexpr, BINS: tl.constexpr,
    BM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Each program puts its part's rows in their places, by counts [parts, BINS] of all parts; ranks: how many rows of a part
    already have theirs."""
    if OVERLAP:
        launch_dependents()
        wait()
    program = tl.program_id(0)
    bins = tl.arange(0, BINS)
    total = tl.zeros((STEP, BINS), tl.int32)
    earlier = tl.zeros((STEP, BINS), tl.int32)
    for first in range(0, parts, STEP):
        part = first + tl.arange(0, STEP)[:, None]
        found = tl.load(counts + part * BINS + bins[None, :], mask=part < parts, other=0)
        total += found
        earlier += tl.where(part < program, found, 0)
    total = tl.sum(total, 0)
    free = tl.cumsum(total, 0) - total + tl.sum(earlier, 0)  # where each expert's rows of this part begin
    if BINS < WIDE:
        free = tl.reshape(tl.broadcast_to(free[None, :], (WIDE // BINS, BINS)), (WIDE,))
    for c in range(CHUNKS):
        row = (program * CHUNKS + c) * CHUNK + tl.arange(0, CHUNK)
        expert = _experts(ids, row, rows, experts)
        here = row < rows
        rank = tl.atomic_add(ranks + program * BINS + expert, 1, mask=here, sem="relaxed")
        tl.store(order + tl.gather(free, expert, 0) + rank, row, mask=here)
    _describe(tiles, total, experts, limit, BINS, BM)


def align(ids: Tensor, experts: int, tile_rows: int, start: Start, overlap: bool) -> Alignment:
    """ids [T, k], contiguous; tile_rows: rows of a full tile, a power of two; overlap: launches of the call may overlap."""
    rows = ids.numel()
    bins = max(32, triton.next_power_of_2(experts + 2))
    limit = min(rows, rows // tile_rows + min(experts + 1, rows))
    order, tiles = (torch.empty(n, dtype=torch.int32, device=ids.device) for n in (rows, 2 + 4 * limit))
    constants = {"BINS": bins, "BM": tile_rows, "OVERLAP": overlap}
    if rows <= LISTED:
        look = min(LOOK, max(32, triton.next_power_of_2(rows)))
        order, tiles = start(
            moe_sort, (triton.cdiv(rows, OWN),), (ids, order, tiles, rows, experts, limit),
            {"OWN": OWN, "LOOK": look} | constants, ["order", "tiles"], warps=spread(ids, max(OWN * look, 16 * bins), 4),
        )  # fmt: skip
        return Alignment(order, tiles, limit)
    each = max(PART, triton.next_power_of_2(triton.cdiv(rows, PARTS)))
    kind = platform(ids.device)
    parts, chunk, step = triton.cdiv(rows, each), min(each, CHUNK), max(1, COUNTS[kind] // bins)
    counts, ranks = (torch.empty(parts * bins, dtype=torch.int32, device=ids.device) for _ in range(2))
    split = {"CHUNKS": each // chunk, "CHUNK": chunk}
    wide = max(bins, GATHERED) if kind == "xpu" else bins
    counts, ranks = start(
        moe_count, (parts,), (ids, counts, ranks, rows, experts), split | {"BINS": bins, "OVERLAP": overlap},
        ["counts", "ranks"], warps=spread(ids, 8 * max(chunk, bins), 4),
    )  # fmt: skip
    _, order, tiles = start(
        moe_place, (parts,), (ids, counts, ranks, order, tiles, rows, experts, limit, parts),
        split | {"STEP": step, "WIDE": wide} | constants, ["ranks", "order", "tiles"],
        warps=spread(ids, 16 * step * bins, 4), overlap=overlap,
    )  # fmt: skip
    return Alignment(order, tiles, limit)
