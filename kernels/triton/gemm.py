"""One kernel for both expert products: out[row] = f(a[row] @ W[expert of row]), over tiles of rows that share an expert.

A tile comes from a list (`align`) or, for few rows, from the ids themselves: the row that is number 0, BM, 2*BM ... of its
expert leads a tile, and every program finds out alone. All that is elementwise happens on the float32 accumulator.
"""

import triton
import triton.language as tl

from braze.kernels.triton.intrinsics import launch_dependents, prefetch, wait

PREFETCH = tl.constexpr(512)  # elements of each row
LINE = tl.constexpr(64)  # elements of a cache line, 16 bits each


@triton.jit
def activation(g, u):
    """Stands for the activation of the first product: `braze.kernels.triton.activation.bind` puts another in its place."""
    return g * u


@triton.jit
def _direct(ids, slot, rows, experts, SLOTS: tl.constexpr, BM: tl.constexpr):
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
def _prefetch(
    w, ids, rows, columns, inner, experts, span, w_expert, w_column, blocks, BN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Brings the first PREFETCH elements of each weight row of a direct second product's first tile into L2."""
    unit = tl.program_id(0)
    expert = tl.load(ids + unit // blocks).to(tl.int64)
    block = unit % blocks
    column = block // SPLIT * BN + tl.arange(0, BN)
    k = block % SPLIT * span + tl.arange(0, PREFETCH // LINE) * LINE
    k = tl.minimum(k, inner - 1)
    expert = tl.where((expert >= 0) & (expert < experts), expert, 0)
    pointer = w + expert * w_expert + tl.minimum(column, columns - 1).to(tl.int64)[:, None] * w_column + k[None, :]
    prefetch(pointer)


@triton.jit
def _block(
    w, inner, columns, w_column, w_inner, k, n, BK: tl.constexpr, N: tl.constexpr, W_ROWS: tl.constexpr
):  # fmt: skip
    """A pointer to the block [BK, N] at (k, n) of one expert's weight [inner, columns]; its stride 1 must be seen here."""
    if W_ROWS:
        found = tl.make_block_ptr(w, (inner, columns), (1, w_column), (k, n), (BK, N), (0, 1))
    else:
        found = tl.make_block_ptr(w, (inner, columns), (w_inner, 1), (k, n), (BK, N), (1, 0))
    return found


@triton.jit
def moe_gemm(
    a, w, bias, weight, out, ids, order, tiles, a_desc, w_desc,
    rows, columns, inner, experts, limit, span, scale,
    a_row, w_expert, w_column, w_inner, bias_expert, out_row, out_split,
    TOP_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    SPLIT: tl.constexpr, SLOTS: tl.constexpr, LAYOUT: tl.constexpr,
    FIRST: tl.constexpr, BIAS: tl.constexpr, WEIGHT: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    A_DESC: tl.constexpr, W_DESC: tl.constexpr, W_ROWS: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
    FLATTEN: tl.constexpr, A_BLOCK: tl.constexpr, W_BLOCK: tl.constexpr,
):  # fmt: skip
    """FIRST: a is x, read at row // TOP_K; otherwise a is the first product's result, in this call's order of rows.

    columns: of `out`; LAYOUT: of gate and up among w's columns, "none" where there is no gate; SLOTS: 0 for tiles from the
    list, otherwise a power of two >= rows. The inner dimension is cut in SPLIT stretches of `span`, each with a result of
    its own. W_ROWS: w's inner dimension is contiguous. OVERLAP: the launches of a call may overlap. A_BLOCK, W_BLOCK: read in
    blocks as an XPU loads them, a in this call's order of rows even where it is x. FLATTEN: the loop over tiles and that over
    the inner dimension become one, so that a tile's first loads are made during the one before.
    """
    GATED: tl.constexpr = LAYOUT != "none"
    PAIR: tl.constexpr = (W_DESC and LAYOUT == "halves") and not W_ROWS  # gate and up in two boxes of a descriptor
    TWICE: tl.constexpr = W_BLOCK and LAYOUT == "halves"  # gate and up in two loops: two products in one loop spill
    COLS: tl.constexpr = BN // 2 if GATED else BN
    blocks = tl.cdiv(columns, COLS) * SPLIT
    if OVERLAP:
        launch_dependents()
        if (not FIRST and SLOTS > 0) and W_ROWS:
            _prefetch(w, ids, rows, columns, inner, experts, span, w_expert, w_column, blocks, BN, SPLIT)
        if not FIRST or SLOTS == 0:
            wait()
    count = rows if SLOTS > 0 else tl.load(tiles)
    steps = tl.cdiv(span, BK)
    for unit in tl.range(tl.program_id(0), count * blocks, tl.num_programs(0), flatten=FLATTEN):
        if SLOTS > 0:
            block = unit % blocks
            expert, row = _direct(ids, unit // blocks, rows, experts, SLOTS, BM)
            inside = row >= 0
            row = tl.where(inside, row, 0)
            position = row
            start = 0
        else:
            width = GROUP * blocks
            first = unit // width * GROUP
            size = tl.minimum(count - first, GROUP)
            tile = first + unit % width % size
            block = unit % width // size
            expert = tl.load(tiles + 2 + tile)
            start = tl.load(tiles + 2 + limit + tile)
            inside = tl.arange(0, BM) < tl.load(tiles + 2 + 2 * limit + tile)
            position = start + tl.arange(0, BM)
            row = tl.load(order + position, mask=inside, other=0)
            position = tl.where(inside, position, 0)
        n0 = block // SPLIT * COLS
        k0 = block % SPLIT * span
        if SLOTS > 0:
            there = expert < experts
            steps = tl.where(there & (tl.max(inside.to(tl.int32), 0) > 0), tl.cdiv(span, BK), 0)
        e = tl.minimum(expert, experts - 1).to(tl.int64)

        j = tl.arange(0, BN)
        if LAYOUT == "halves":
            column = n0 + j % COLS + j // COLS * columns
            column_fits = n0 + j % COLS < columns
        elif LAYOUT == "interleaved":
            column = 2 * n0 + j
            column_fits = column < 2 * columns
        else:
            column = n0 + j
            column_fits = column < columns
        k = tl.arange(0, BK)
        a_index = row // TOP_K if FIRST and not A_BLOCK else position
        a_pointer = a + a_index.to(tl.int64)[:, None] * a_row + (k0 + k)[None, :]
        w_pointer = w + e * w_expert + column.to(tl.int64)[None, :] * w_column
        w_pointer += (k0 + k).to(tl.int64)[:, None] * w_inner
        acc = tl.zeros((BM, COLS if PAIR or TWICE else BN), tl.float32)
        acc_up = tl.zeros((BM, COLS if PAIR or TWICE else 16), tl.float32)
        e32 = e.to(tl.int32)
        wide: tl.constexpr = COLS if TWICE else BN
        if W_BLOCK:
            w_first = w + e * w_expert
            total = 2 * columns if GATED and not TWICE else columns
            w_block = _block(w_first, inner, total, w_column, w_inner, k0, column_start(n0, LAYOUT), BK, wide, W_ROWS)
        if A_BLOCK:
            a_block = tl.make_block_ptr(a, (rows, inner), (a_row, 1), (start, k0), (BM, BK), (1, 0))
        for step in range(steps):
            kk = k0 + step * BK
            if A_DESC:
                x_tile = a_desc.load([start, kk])
            elif A_BLOCK:
                x_tile = tl.load(a_block, boundary_check=(0, 1), padding_option="zero")
                a_block = tl.advance(a_block, (0, BK))
            else:
                a_mask = inside[:, None] if EVEN_K else inside[:, None] & (kk + k < inner)[None, :]
                x_tile = tl.load(a_pointer, mask=a_mask, other=0.0)
                a_pointer += BK
            if W_DESC and W_ROWS:
                if LAYOUT == "halves":
                    w_tile = w_desc.load([e32, 0, n0, kk]).reshape(BN, BK).T
                else:
                    w_tile = w_desc.load([e32, column_start(n0, LAYOUT), kk]).reshape(BN, BK).T
            elif W_BLOCK:
                w_tile = tl.load(w_block, boundary_check=(0, 1), padding_option="zero")
                w_block = tl.advance(w_block, (BK, 0))
            elif W_DESC:
                w_tile = w_desc.load([e32, kk, column_start(n0, LAYOUT)]).reshape(BK, COLS if PAIR else BN)
            else:
                if EVEN_N and EVEN_K:
                    w_tile = tl.load(w_pointer)
                elif EVEN_N:
                    w_tile = tl.load(w_pointer, mask=(kk + k < inner)[:, None], other=0.0)
                else:
                    w_tile = tl.load(w_pointer, mask=(kk + k < inner)[:, None] & column_fits[None, :], other=0.0)
                w_pointer += BK * w_inner
            acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
            if PAIR:
                up_tile = w_desc.load([e32, kk, columns + n0]).reshape(BK, COLS)
                acc_up = tl.dot(x_tile, up_tile, acc_up, input_precision=PRECISION)
        if TWICE:
            a_pointer = a + a_index.to(tl.int64)[:, None] * a_row + (k0 + k)[None, :]
            w_first += columns.to(tl.int64) * w_column
            w_block = _block(w_first, inner, columns, w_column, w_inner, k0, n0, BK, COLS, W_ROWS)
            if A_BLOCK:
                a_block = tl.make_block_ptr(a, (rows, inner), (a_row, 1), (start, k0), (BM, BK), (1, 0))
            for step in range(steps):
                if A_BLOCK:
                    x_tile = tl.load(a_block, boundary_check=(0, 1), padding_option="zero")
                    a_block = tl.advance(a_block, (0, BK))
                else:
                    a_mask = inside[:, None] if EVEN_K else inside[:, None] & (k0 + step * BK + k < inner)[None, :]
                    x_tile = tl.load(a_pointer, mask=a_mask, other=0.0)
                    a_pointer += BK
                up_tile = tl.load(w_block, boundary_check=(0, 1), padding_option="zero")
                w_block = tl.advance(w_block, (BK, 0))
                acc_up = tl.dot(x_tile, up_tile, acc_up, input_precision=PRECISION)

        n = n0 + tl.arange(0, COLS)
        if WEIGHT:
            factor = tl.load(weight + row, mask=inside, other=0.0).to(tl.float32)[:, None]
        if FIRST and WEIGHT:
            acc = acc * factor
            acc_up = acc_up * factor
        if BIAS and not (PAIR or TWICE):
            b = tl.load(bias + e * bias_expert + column, mask=column_fits, other=0.0).to(tl.float32)
            acc += tl.where(k0 == 0, b, 0.0)[None, :]
        if PAIR or TWICE:
            g, u = acc, acc_up
            if BIAS:
                g += tl.load(bias + e * bias_expert + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
                u += tl.load(bias + e * bias_expert + columns + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
            y = activation(g, u)
        elif LAYOUT == "halves":
            g, u = tl.split(tl.permute(tl.reshape(acc, (BM, 2, COLS)), (0, 2, 1)))
            y = activation(g, u)
        elif LAYOUT == "interleaved":
            g, u = tl.split(tl.reshape(acc, (BM, COLS, 2)))
            y = activation(g, u)
        elif FIRST:
            y = activation(acc, acc)
        else:
            y = acc
        if not FIRST:
            if WEIGHT:
                y = y * factor
            y = y * scale.to(tl.float32)  # inside a graph a number comes as float64
            if SLOTS > 0:
                y = tl.where(there, y, 0.0)
        target = out + (block % SPLIT).to(tl.int64) * out_split
        target += (position if FIRST else row).to(tl.int64)[:, None] * out_row + n[None, :]
        tl.store(target, y.to(out.dtype.element_ty), mask=inside[:, None] & (n < columns)[None, :])

    if SLOTS == 0 and not FIRST:
        _zero_rows(out, order, tiles, count, columns, limit, out_row, out_split, BM, BN, SPLIT)


@triton.jit
def _zero_rows(
    out,
    order,
    tiles,
    count,
    columns,
    limit,
    out_row,
    out_split,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """The results of rows that have no expert: the tiles of the list from `count` on."""
    for tile in range(count + tl.program_id(0), tl.load(tiles + 1), tl.num_programs(0)):
        start = tl.load(tiles + 2 + limit + tile)
        inside = tl.arange(0, BM) < tl.load(tiles + 2 + 2 * limit + tile)
        row = tl.load(order + start + tl.arange(0, BM), mask=inside, other=0).to(tl.int64)
        target = out + row[:, None] * out_row
        for _ in range(SPLIT):
            for n0 in range(0, columns, BN):
                n = n0 + tl.arange(0, BN)
                zero = tl.zeros((BM, BN), out.dtype.element_ty)
                tl.store(target + n[None, :], zero, mask=inside[:, None] & (n < columns)[None, :])
            target += out_split


@triton.jit
def column_start(n0, LAYOUT: tl.constexpr):
    """Where output column n0's first weight column lies."""
    return 2 * n0 if LAYOUT == "interleaved" else n0


@triton.jit
def moe_combine(
    y, out, hidden, split, TOP_K: tl.constexpr, SPLIT: tl.constexpr, BH: tl.constexpr, OVERLAP: tl.constexpr
):
    """out[t] = sum over the SPLIT * TOP_K parts y[s, t, j], always in the same order."""
    if OVERLAP:
        wait()
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    total = tl.zeros((BH,), tl.float32)
    source = y + token * TOP_K * hidden + h
    for _ in tl.static_range(SPLIT):
        for j in tl.static_range(TOP_K):
            total += tl.load(source + j * hidden, mask=h < hidden, other=0.0).to(tl.float32)
        source += split
    tl.store(out + token * hidden + h, total.to(out.dtype.element_ty), mask=h < hidden)
