"""Where the rows of a tile are: in the list that `align` made, or for few rows found from the ids by every program alone.

A row that is number 0, BM, 2*BM ... of its expert leads a tile; the list has an expert's tiles side by side, and a pass over
the expert's weights takes as many of them at a time as share the weights in L2.
"""

import triton
import triton.language as tl

from braze.kernels.triton.intrinsics import prefetch

PREFETCH = tl.constexpr(512)  # elements of each row
LINE = tl.constexpr(64)  # elements of a cache line, 16 bits each


@triton.jit
def direct(ids, slot, rows, experts, SLOTS: tl.constexpr, BM: tl.constexpr):
    """(expert, the BM rows of the tile that row `slot` leads, -1 for none); no rows where it leads none."""
    s = tl.arange(0, SLOTS)
    all_ids = tl.load(ids + s, mask=s < rows, other=0)
    every = tl.where((all_ids >= 0) & (all_ids < experts), all_ids, experts).to(tl.int32)
    every = tl.where(s < rows, every, -1)
    own = tl.load(ids + slot)
    expert = tl.where((own >= 0) & (own < experts), own, experts).to(tl.int32)
    match = every == expert
    earlier = tl.sum((match & (s < slot)).to(tl.int32), 0)
    rank = tl.cumsum(match.to(tl.int32), 0) - 1 - earlier
    wanted = tl.arange(0, BM)[:, None]
    here = match[None, :] & (rank[None, :] == wanted) & (earlier % BM == 0)
    return expert, tl.sum(tl.where(here, s[None, :] + 1, 0), 1) - 1


@triton.jit
def listed(tiles, unit, blocks, limit, GROUP: tl.constexpr, BM: tl.constexpr):
    """(expert, first position, rows, column block) of a unit of work: tiles of one expert, up to GROUP of them, go through
    the weights' column blocks together."""
    tile = unit // blocks
    expert = tl.load(tiles + 2 + tile)
    begin = tl.load(tiles + 2 + limit + tile)
    end = tl.load(tiles + 2 + 2 * limit + tile)
    first = tl.load(tiles + 2 + 3 * limit + tile)
    number = tl.cdiv(end - begin, BM)  # tiles of this expert, in passes of equal size
    size = tl.cdiv(number, tl.cdiv(number, GROUP))
    nth = (tile - first) // size * size
    size = tl.minimum(number - nth, size)
    within = unit - (first + nth) * blocks
    start = begin + (nth + within % size) * BM
    return expert, start, tl.minimum(end - start, BM), within // size


@triton.jit
def expert_weight(w, e, w_expert, a, part, TABLE: tl.constexpr, LAYOUT: tl.constexpr):
    """Where expert e's weight begins: at e * w_expert, or at the address in a table; the element is a's.

    part: 1 for up's weight, whose address follows gate's in the table where they are "apart". Addresses are multiples of 16.
    """
    if TABLE:
        place = w + (2 * e + part if LAYOUT == "apart" else e)
        found = tl.multiple_of(tl.load(place).to(tl.pointer_type(a.dtype.element_ty)), 16)
    else:
        found = w + e * w_expert
    return found


@triton.jit
def send_table(table, host, count, BLOCK: tl.constexpr):
    """table = host, which is in pinned memory."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(table + n, tl.load(host + n, mask=n < count), mask=n < count)


@triton.jit
def prefetch_weights(
    a, w, ids, columns, inner, experts, span, w_expert, w_column, blocks,
    BN: tl.constexpr, SPLIT: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """Brings the first PREFETCH elements of each weight row of a direct second product's first tile into L2."""
    unit = tl.program_id(0)
    expert = tl.load(ids + unit // blocks).to(tl.int64)
    block = unit % blocks
    column = block // SPLIT * BN + tl.arange(0, BN)
    k = block % SPLIT * span + tl.arange(0, PREFETCH // LINE) * LINE
    k = tl.minimum(k, inner - 1)
    expert = tl.where((expert >= 0) & (expert < experts), expert, 0)
    first = expert_weight(w, expert, w_expert, a, 0, TABLE, "none")
    pointer = first + tl.minimum(column, columns - 1).to(tl.int64)[:, None] * w_column + k[None, :]
    prefetch(pointer)


@triton.jit
def zero_rows(
    out, order, tiles, count, columns, limit, out_row, out_split,
    BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The results of rows that have no expert: the tiles of the list from `count` on."""
    for tile in range(count + tl.program_id(0), tl.load(tiles + 1), tl.num_programs(0)):
        begin = tl.load(tiles + 2 + limit + tile)
        start = begin + (tile - tl.load(tiles + 2 + 3 * limit + tile)) * BM
        inside = start + tl.arange(0, BM) < tl.load(tiles + 2 + 2 * limit + tile)
        row = tl.load(order + start + tl.arange(0, BM), mask=inside, other=0).to(tl.int64)
        target = out + row[:, None] * out_row
        for _ in range(SPLIT):
            for n0 in range(0, columns, BN):
                n = n0 + tl.arange(0, BN)
                zero = tl.zeros((BM, BN), out.dtype.element_ty)
                tl.store(target + n[None, :], zero, mask=inside[:, None] & (n < columns)[None, :])
            target += out_split
