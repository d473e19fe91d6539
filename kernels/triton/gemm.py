"""One kernel for both expert products: out[row] = f(a[row] @ W[expert of row]), over tiles of rows that share an expert.

Where a tile's rows are is known from a list or from the ids (`rows`); a tile is multiplied, and then finished: all that is
elementwise happens on the float32 accumulator. A tile at most half full takes half the rows and half the arithmetic.
"""

import triton
import triton.language as tl

from braze.kernels.triton import compat
from braze.kernels.triton.intrinsics import launch_dependents, wait
from braze.kernels.triton.rows import direct, expert_weight, listed, prefetch_weights, zero_rows

ARRIVALS = tl.constexpr(compat.ARRIVALS)


@triton.jit
def activation(g, u):
    """Stands for the activation of the first product: `braze.kernels.triton.activation.bind` puts another in its place."""
    return g * u


@triton.jit
def moe_gemm(
    a, w, up, bias, weight, out, ids, order, tiles, arrivals, result, a_desc, a_half, w_desc,
    rows, columns, inner, experts, limit, span, scale,
    a_row, w_expert, w_column, w_inner, bias_expert, out_row, out_split,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    SPLIT: tl.constexpr, SLOTS: tl.constexpr, LAYOUT: tl.constexpr,
    FIRST: tl.constexpr, BIAS: tl.constexpr, WEIGHT: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    A_DESC: tl.constexpr, W_DESC: tl.constexpr, W_ROWS: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
    FLATTEN: tl.constexpr, A_BLOCK: tl.constexpr, W_BLOCK: tl.constexpr, HALVES: tl.constexpr,
    TWICE: tl.constexpr, TABLE: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """FIRST: of the two products. GATHER: a is x, read at row // TOP_K; otherwise a's rows are in this call's order of rows.

    columns: of `out`; LAYOUT: of gate and up among w's columns, "none" where there is no gate, "apart" where `up` has up's;
    TABLE: w has the experts' addresses, gate's and up's in turn where they are apart. SLOTS: 0 for tiles from the list,
    otherwise a power of two >= rows. The inner dimension is cut in SPLIT stretches of `span`, each with a result of its own.
    W_ROWS: w's inner dimension is contiguous. OVERLAP: the launches of a call may overlap. A_BLOCK, W_BLOCK: read in blocks as
    an XPU loads them. TWICE: gate and up in two loops, as two products in one spill there. FLATTEN: the loop over tiles and
    that over the inner dimension become one, so that a tile's first loads are made during the one before. HALVES: tiles at
    most half full are multiplied as half as many rows. SUM: of a single token's results; the first product sets `arrivals`,
    a number for each block of columns, to 0, and the program that finishes the last part of a block in the second writes the
    sum to `result`.
    """
    COLS: tl.constexpr = BN // 2 if LAYOUT != "none" else BN
    blocks = tl.cdiv(columns, COLS) * SPLIT
    if OVERLAP:
        launch_dependents()
        if (not FIRST and SLOTS > 0) and W_ROWS:
            prefetch_weights(a, w, ids, columns, inner, experts, span, w_expert, w_column, blocks, BN, SPLIT, TABLE)
        if not FIRST or SLOTS == 0:
            wait()
    if SUM and FIRST:  # noqa: SIM102
        if tl.program_id(0) == 0:
            tl.store(arrivals + tl.arange(0, ARRIVALS), tl.zeros((ARRIVALS,), tl.int32))
    count = rows if SLOTS > 0 else tl.load(tiles)
    for unit in tl.range(tl.program_id(0), count * blocks, tl.num_programs(0), flatten=FLATTEN):
        if SLOTS > 0:
            expert, own = direct(ids, unit // blocks, rows, experts, SLOTS, BM)
            start, height, block = 0, BM, unit % blocks
        else:
            own = order
            expert, start, height, block = listed(tiles, unit, blocks, limit, GROUP, BM)
        if HALVES:
            if height <= BM // 2:
                _tile(
                    a, w, up, bias, weight, out, order, a_half, w_desc, expert, own, start, height, block,
                    rows, columns, inner, experts, span, scale,
                    a_row, w_expert, w_column, w_inner, bias_expert, out_row, out_split,
                    TOP_K, GATHER, BM // 2, BN, BK, SPLIT, SLOTS > 0, LAYOUT, FIRST, BIAS, WEIGHT, EVEN_N, EVEN_K,
                    A_DESC, W_DESC, W_ROWS, PRECISION, A_BLOCK, W_BLOCK, TWICE, TABLE,
                )  # fmt: skip
            else:
                _tile(
                    a, w, up, bias, weight, out, order, a_desc, w_desc, expert, own, start, height, block,
                    rows, columns, inner, experts, span, scale,
                    a_row, w_expert, w_column, w_inner, bias_expert, out_row, out_split,
                    TOP_K, GATHER, BM, BN, BK, SPLIT, SLOTS > 0, LAYOUT, FIRST, BIAS, WEIGHT, EVEN_N, EVEN_K,
                    A_DESC, W_DESC, W_ROWS, PRECISION, A_BLOCK, W_BLOCK, TWICE, TABLE,
                )  # fmt: skip
        else:
            _tile(
                a, w, up, bias, weight, out, order, a_desc, w_desc, expert, own, start, height, block,
                rows, columns, inner, experts, span, scale,
                a_row, w_expert, w_column, w_inner, bias_expert, out_row, out_split,
                TOP_K, GATHER, BM, BN, BK, SPLIT, SLOTS > 0, LAYOUT, FIRST, BIAS, WEIGHT, EVEN_N, EVEN_K,
                A_DESC, W_DESC, W_ROWS, PRECISION, A_BLOCK, W_BLOCK, TWICE, TABLE,
            )  # fmt: skip

        if SUM and not FIRST:
            finished = tl.sum((own >= 0).to(tl.int32), 0)
            _sum_by_last(out, result, arrivals, finished, block, columns, out_row, out_split, TOP_K, COLS, SPLIT)

    if SLOTS == 0 and not FIRST:
        zero_rows(out, order, tiles, count, columns, limit, out_row, out_split, BM, BN, SPLIT)


@triton.jit
def _tile(
    a, w, up, bias, weight, out, order, a_desc, w_desc, expert, own, start, height, block,
    rows, columns, inner, experts, span, scale,
    a_row, w_expert, w_column, w_inner, bias_expert, out_row, out_split,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    DIRECT: tl.constexpr, LAYOUT: tl.constexpr, FIRST: tl.constexpr, BIAS: tl.constexpr, WEIGHT: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, A_DESC: tl.constexpr, W_DESC: tl.constexpr, W_ROWS: tl.constexpr,
    PRECISION: tl.constexpr, A_BLOCK: tl.constexpr, W_BLOCK: tl.constexpr, TWICE: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """Block `block` of one tile's columns: rows `own` (-1: none) where DIRECT, otherwise `height` rows from `start` on."""
    BESIDE: tl.constexpr = (LAYOUT == "halves" or LAYOUT == "apart") and not TWICE  # a tile of gate, then one of up
    COLS: tl.constexpr = BN // 2 if LAYOUT != "none" else BN
    WIDE: tl.constexpr = COLS if TWICE else BN
    steps = tl.cdiv(span, BK)
    if DIRECT:
        inside = own >= 0
        row = tl.where(inside, own, 0)
        position = row
        there = expert < experts
        steps = tl.where(there & (tl.max(inside.to(tl.int32), 0) > 0), steps, 0)
    else:
        inside = tl.arange(0, BM) < height
        position = start + tl.arange(0, BM)
        row = tl.load(order + position, mask=inside, other=0)
        position = tl.where(inside, position, 0)
    n0 = block // SPLIT * COLS
    k0 = block % SPLIT * span
    e = tl.minimum(expert, experts - 1).to(tl.int64)

    j = tl.arange(0, WIDE)
    if BESIDE:
        column = n0 + j % COLS + j // COLS * columns
        column_fits = n0 + j % COLS < columns
    elif LAYOUT == "interleaved":
        column = 2 * n0 + j
        column_fits = column < 2 * columns
    else:
        column = n0 + j
        column_fits = column < columns
    k = tl.arange(0, BK)
    a_index = row // TOP_K if GATHER else position
    a_pointer = a + a_index.to(tl.int64)[:, None] * a_row + (k0 + k)[None, :]
    w_first = expert_weight(w, e, w_expert, a, 0, TABLE, LAYOUT)
    w_pointer = w_first + (k0 + k).to(tl.int64)[:, None] * w_inner
    if LAYOUT == "apart":
        up_first = expert_weight(up, e, w_expert, a, 1, TABLE, LAYOUT)
        if BESIDE:  # one product: two of half the width would read the rows from shared memory twice
            first = tl.where(j < COLS, w_first, up_first)
            w_pointer = first[None, :] + (k0 + k).to(tl.int64)[:, None] * w_inner
            w_pointer += (n0 + j % COLS).to(tl.int64)[None, :] * w_column
        else:
            w_pointer += column.to(tl.int64)[None, :] * w_column
    else:
        w_pointer += column.to(tl.int64)[None, :] * w_column
    acc = tl.zeros((BM, WIDE), tl.float32)
    acc_up = tl.zeros((BM, COLS if TWICE else 16), tl.float32)
    e32 = e.to(tl.int32)
    if W_BLOCK:
        total = columns if LAYOUT == "none" or TWICE else 2 * columns
        w_block = _block(w_first, inner, total, w_column, w_inner, k0, column_start(n0, LAYOUT), BK, WIDE, W_ROWS)
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
            w_tile = w_desc.load([e32, kk, column_start(n0, LAYOUT)]).reshape(BK, BN)
        else:
            w_tile = _weights(w_pointer, kk + k < inner, column_fits, EVEN_N, EVEN_K)
            w_pointer += BK * w_inner
        acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
    if TWICE:
        a_pointer = a + a_index.to(tl.int64)[:, None] * a_row + (k0 + k)[None, :]
        if LAYOUT == "halves":
            up_first = w_first + columns.to(tl.int64) * w_column
        else:
            w_pointer = up_first + (k0 + k).to(tl.int64)[:, None] * w_inner + column.to(tl.int64)[None, :] * w_column
        if W_BLOCK:
            w_block = _block(up_first, inner, columns, w_column, w_inner, k0, n0, BK, COLS, W_ROWS)
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
            if W_BLOCK:
                up_tile = tl.load(w_block, boundary_check=(0, 1), padding_option="zero")
                w_block = tl.advance(w_block, (BK, 0))
            else:
                up_tile = _weights(w_pointer, k0 + step * BK + k < inner, column_fits, EVEN_N, EVEN_K)
                w_pointer += BK * w_inner
            acc_up = tl.dot(x_tile, up_tile, acc_up, input_precision=PRECISION)

    n = n0 + tl.arange(0, COLS)
    if WEIGHT:
        factor = tl.load(weight + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    if FIRST and WEIGHT:
        acc = acc * factor
        acc_up = acc_up * factor
    if BIAS and not TWICE:
        b = tl.load(bias + e * bias_expert + column, mask=column_fits, other=0.0).to(tl.float32)
        acc += tl.where(k0 == 0, b, 0.0)[None, :]
    if TWICE:
        g, u = acc, acc_up
        if BIAS:
            g += tl.load(bias + e * bias_expert + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
            u += tl.load(bias + e * bias_expert + columns + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
        y = activation(g, u)
    elif BESIDE:
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
        y = y * tl.cast(scale, tl.float32)  # inside a graph a number comes as float64
        if DIRECT:
            y = tl.where(there, y, 0.0)
    target = out + (block % SPLIT).to(tl.int64) * out_split
    target += (position if FIRST else row).to(tl.int64)[:, None] * out_row
    _store(target, y.to(out.dtype.element_ty), inside, n0, columns, BM, COLS)


@triton.jit
def _weights(pointer, inside, fits, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr):
    """A tile [BK, N] of weights through pointers, zeros beyond the ends."""
    if EVEN_N and EVEN_K:
        tile = tl.load(pointer)
    elif EVEN_N:
        tile = tl.load(pointer, mask=inside[:, None], other=0.0)
    else:
        tile = tl.load(pointer, mask=inside[:, None] & fits[None, :], other=0.0)
    return tile


@triton.jit
def _store(target, y, inside, n0, columns, BM: tl.constexpr, COLS: tl.constexpr):
    """Writes y [BM, COLS] to the rows `target`; a wide one in two parts, which take half the registers and shared memory."""
    if COLS > 128:
        left, right = tl.split(tl.permute(tl.reshape(y, (BM, 2, COLS // 2)), (0, 2, 1)))
        _store_part(target, left, inside, n0, columns, COLS // 2)
        _store_part(target, right, inside, n0 + COLS // 2, columns, COLS // 2)
    else:
        _store_part(target, y, inside, n0, columns, COLS)


@triton.jit
def _store_part(target, y, inside, n0, columns, COLS: tl.constexpr):
    n = n0 + tl.arange(0, COLS)
    tl.store(target + n[None, :], y, mask=inside[:, None] & (n < columns)[None, :])


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
def column_start(n0, LAYOUT: tl.constexpr):
    """Where output column n0's first weight column lies."""
    return 2 * n0 if LAYOUT == "interleaved" else n0


@triton.jit
def _sum_by_last(
    y, result, arrivals, finished, block, columns, y_row, y_split,
    TOP_K: tl.constexpr, COLS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Counts `finished` rows of a token's TOP_K in a block of columns; who counts the last sums them as `moe_combine` does."""
    tl.debug_barrier()  # what every thread wrote comes before the count
    before = tl.atomic_add(arrivals + block // SPLIT, finished, sem="acq_rel")
    if (finished > 0) & (before + finished == TOP_K * SPLIT):
        n = block // SPLIT * COLS + tl.arange(0, COLS)
        total = tl.zeros((COLS,), tl.float32)
        for s in tl.static_range(SPLIT):
            for j in tl.static_range(TOP_K):
                part = y + s * y_split + j * y_row + n
                total += tl.load(part, mask=n < columns, other=0.0, cache_modifier=".cg").to(tl.float32)
        tl.store(result + n, total.to(result.dtype.element_ty), mask=n < columns)
