"""Rotates the heads of q and k in one launch, with cos and sin read once for a token and not once for a head.

A program owns one token and a block of its heads: the tables are one row that is broadcast down a [heads, pairs] tile. An
RMSNorm over the head before the rotation costs no more memory traffic, since the tile holds whole heads.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from braze.kernels.spec import RopeSpec
from braze.kernels.triton import compat
from braze.kernels.triton.compat import HAVE_TRITON, Start
from braze.kernels.turning import Norm, Rows

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_SIZE = 512
TILE = 2048  # elements of one program's heads
WARPS = 4
MANY = 512  # tokens with which a GPU is full
XPU_TILE, XPU_WARPS = 2048, 8  # a warp of an XPU has 16 lanes: more elements for each spill (docs/xpu.md)

if HAVE_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _load(at, mask, WHOLE: tl.constexpr):
        """float32; WHOLE: the mask holds everywhere, and costs nothing."""
        return (tl.load(at) if WHOLE else tl.load(at, mask=mask, other=0.0)).to(tl.float32)

    @triton.jit
    def _store(at, value, mask, WHOLE: tl.constexpr):
        if WHOLE:
            tl.store(at, value)
        else:
            tl.store(at, value, mask=mask)

    @triton.jit
    def _heads(block, HEADS: tl.constexpr, NEAR: tl.constexpr):
        """The numbers of a block of heads; NEAR: a token's heads lie within 2^31 elements."""
        n = (block * HEADS + tl.arange(0, HEADS))[:, None]
        return n if NEAR else n.to(tl.int64)

    @triton.jit
    def _components(
        row, columns, mask, HALF: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, FULL: tl.constexpr
    ):
        """The two components of each pair in rows of pointers [N, 1]: contiguous loads in both layouts; float32 [N, PAIRS].
        FULL: the mask of rows holds everywhere."""
        WHOLE: tl.constexpr = FULL and PAIRS == HALF
        if INTERLEAVED:
            both = tl.arange(0, 2 * PAIRS)[None, :]
            value = _load(row + both, mask & (both < 2 * HALF), WHOLE)
            a, b = tl.split(tl.reshape(value, (value.shape[0], PAIRS, 2)))
        else:
            a = _load(row + columns, mask & (columns < HALF), WHOLE)
            b = _load(row + HALF + columns, mask & (columns < HALF), WHOLE)
        return a, b

    @triton.jit
    def _rotate(
        x, out, weight, x_row, out_row, x_head, out_head, heads, block, ca, cb, sa, sb,
        SIZE: tl.constexpr, START: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, HEADS: tl.constexpr,
        IN: tl.constexpr, OUT: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr, ONE: tl.constexpr,
        EPS: tl.constexpr, FULL: tl.constexpr, NEAR: tl.constexpr,
    ):  # fmt: skip
        """The part that turns of a block of heads of one token; NORM, WEIGHT, ONE: RMSNorm first, by weight or 1 + weight."""
        WHOLE: tl.constexpr = FULL and PAIRS == HALF
        n = _heads(block, HEADS, NEAR)
        mask = n < heads
        pair = tl.arange(0, PAIRS)[None, :]
        target = out + out_row + START + n * out_head
        a, b = _components(x + x_row + START + n * x_head, pair, mask, HALF, PAIRS, IN, FULL)
        if NORM:
            scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / SIZE + EPS)[:, None]
            a, b = a * scale, b * scale
            if WEIGHT:
                origin = tl.zeros((1, 1), tl.int32)
                wa, wb = _components(weight + START + origin, pair, origin == 0, HALF, PAIRS, IN, True)
                a, b = a * (wa + ONE), b * (wb + ONE)
        c = (a * ca - b * sa).to(out.dtype.element_ty)
        d = (b * cb + a * sb).to(out.dtype.element_ty)
        if OUT:
            both = tl.arange(0, 2 * PAIRS)[None, :]
            _store(target + both, tl.reshape(tl.join(c, d), (HEADS, 2 * PAIRS)), mask & (both < 2 * HALF), WHOLE)
        else:
            _store(target + pair, c, mask & (pair < HALF), WHOLE)
            _store(target + HALF + pair, d, mask & (pair < HALF), WHOLE)

    @triton.jit
    def _rotate_part(
        x, out, weight, x_row, out_row, x_head, out_head, heads, block, cos, sin, own, partner, column, inside,
        SIZE: tl.constexpr, HEADS: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr, ONE: tl.constexpr,
        EPS: tl.constexpr, NEAR: tl.constexpr,
    ):  # fmt: skip
        """Whole heads of which a part turns: x[own] cos + x[partner] sin, the rest by cos = 1 and without a partner. One layout
        for all columns, so that a norm's sum and what it scales need no exchange between threads but one."""
        n = _heads(block, HEADS, NEAR)
        mask = (n < heads) & (column < SIZE)
        source = x + x_row + n * x_head
        a = tl.load(source + own, mask=mask, other=0.0, eviction_policy="evict_first" if NORM else "").to(tl.float32)
        b = tl.load(source + partner, mask=mask & inside, other=0.0).to(tl.float32)
        if NORM:
            scale = tl.rsqrt(tl.sum(a * a, 1) / SIZE + EPS)[:, None]
            a, b = a * scale, b * scale
            if WEIGHT:
                a *= tl.load(weight + own, mask=column < SIZE, other=0.0).to(tl.float32) + ONE
                b *= tl.load(weight + partner, mask=inside, other=0.0).to(tl.float32) + ONE
        tl.debug_barrier()  # in place, another thread may still have to read what this one writes
        result = (a * cos + b * sin).to(out.dtype.element_ty)
        tl.store(out + out_row + n * out_head + column, result, mask=mask, cache_modifier=".cs" if NORM else "")

    @triton.jit
    def _tables(
        cos_row, sin_row, HALF: tl.constexpr, PAIRS: tl.constexpr, OUT: tl.constexpr, WIDE: tl.constexpr,
        STEP: tl.constexpr, INVERSE: tl.constexpr,
    ):  # fmt: skip
        """A token's cos and sin of each pair's two components, float32 [1, PAIRS] each."""
        origin = tl.zeros((1, 1), tl.int32)
        pair = tl.arange(0, PAIRS)[None, :]
        if WIDE:
            ca, cb = _components(cos_row + origin, pair, origin == 0, HALF, PAIRS, OUT, True)
            sa, sb = _components(sin_row + origin, pair, origin == 0, HALF, PAIRS, OUT, True)
        else:
            ca = _load(cos_row + origin + pair * STEP, pair < HALF, HALF == PAIRS)
            sa = _load(sin_row + origin + pair * STEP, pair < HALF, HALF == PAIRS)
            cb, sb = ca, sa
        if INVERSE:
            sa, sb = -sa, -sb
        return ca, cb, sa, sb

    @triton.jit
    def _turn_heads(
        x, out, weight, x_row, out_row, x_head, out_head, heads, block, cos_row, sin_row,
        SIZE: tl.constexpr, START: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, COLUMNS: tl.constexpr,
        HEADS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, WIDE: tl.constexpr, STEP: tl.constexpr,
        INVERSE: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr, ONE: tl.constexpr, EPS: tl.constexpr,
        FULL: tl.constexpr, NEAR: tl.constexpr,
    ):  # fmt: skip
        """A block of heads of one token by its row of the tables. COLUMNS: 0, or a power of 2 that holds the head, of which a
        part turns and the rest is carried over."""
        origin = tl.zeros((1, 1), tl.int32)
        cos_row += origin
        sin_row += origin
        if COLUMNS:
            column = tl.arange(0, COLUMNS)[None, :]
            n = column - START
            inside = (n >= 0) & (n < 2 * HALF)
            second = (n % 2) if OUT else (n // HALF)
            pair = (n // 2) if OUT else (n % HALF)
            own = START + (2 * pair + second if IN else HALF * second + pair)
            own = column if IN == OUT else tl.where(inside, own, column)  # contiguous where the compiler can see it
            partner = START + (2 * pair + 1 - second if IN else HALF * (1 - second) + pair)
            place = n if WIDE else pair * STEP
            c = tl.load(cos_row + place, mask=inside, other=1.0).to(tl.float32)
            s = tl.load(sin_row + place, mask=inside, other=0.0).to(tl.float32)
            s = tl.where((second == 1) != INVERSE, s, -s)
            _rotate_part(
                x, out, weight, x_row, out_row, x_head, out_head, heads, block, c, s, own, partner, column, inside,
                SIZE, HEADS, NORM, WEIGHT, ONE, EPS, NEAR,
            )  # fmt: skip
        else:
            ca, cb, sa, sb = _tables(cos_row, sin_row, HALF, PAIRS, OUT, WIDE, STEP, INVERSE)
            _rotate(
                x, out, weight, x_row, out_row, x_head, out_head, heads, block, ca, cb, sa, sb,
                SIZE, START, HALF, PAIRS, HEADS, IN, OUT, NORM, WEIGHT, ONE, EPS, FULL, NEAR,
            )  # fmt: skip

    @triton.jit
    def rope_kernel(
        q, k, q_out, k_out, cos, sin, q_weight, k_weight, rows, tokens,
        q_batch, q_token, q_head, k_batch, k_token, k_head,
        qo_batch, qo_token, qo_head, ko_batch, ko_token, ko_head,
        cos_batch, cos_token, sin_batch, sin_token, q_heads, k_heads, rows_batch, rows_token, first_row, all_rows,
        SIZE: tl.constexpr, START: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr,
        Q_COLUMNS: tl.constexpr, K_COLUMNS: tl.constexpr,
        Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, Q_BLOCKS: tl.constexpr, K_BLOCKS: tl.constexpr,
        IN: tl.constexpr, OUT: tl.constexpr, WIDE: tl.constexpr, STEP: tl.constexpr, INVERSE: tl.constexpr,
        NORM: tl.constexpr, WEIGHT: tl.constexpr, ONE: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr,
        Q_FULL: tl.constexpr, K_FULL: tl.constexpr, NEAR: tl.constexpr, SINGLE: tl.constexpr,
    ):  # fmt: skip
        """STEP: from one column of a table to the next: 2 in the real and imaginary parts of a complex one. ROWS: where a token
        of k is written: "same", its own row; "from", as many rows further on as first_row says; "index", where rows says.
        Q_FULL, K_FULL: no block has fewer heads than it could. NEAR: a token's heads lie within 2^31 elements. SINGLE: there
        is one batch."""
        program = tl.program_id(0)
        row = program // (Q_BLOCKS + K_BLOCKS)  # a token's programs are neighbours, which read its tables together
        block = program % (Q_BLOCKS + K_BLOCKS)
        batch, token = tl.zeros((), tl.int64), row.to(tl.int64)
        if not SINGLE:
            batch, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
        cos_row = cos + batch * cos_batch + token * cos_token
        sin_row = sin + batch * sin_batch + token * sin_token
        if block < Q_BLOCKS:
            _turn_heads(
                q, q_out, q_weight, batch * q_batch + token * q_token, batch * qo_batch + token * qo_token, q_head, qo_head,
                q_heads, block, cos_row, sin_row, SIZE, START, HALF, PAIRS, Q_COLUMNS, Q_HEADS, IN, OUT, WIDE, STEP, INVERSE,
                NORM, WEIGHT, ONE, EPS, Q_FULL, NEAR,
            )  # fmt: skip
        else:
            place, heads = token, k_heads
            if ROWS == "from":
                place += first_row
            if ROWS == "index":
                place = tl.load(rows + batch * rows_batch + token * rows_token).to(tl.int64)
                place = tl.where(place < 0, place + all_rows, place)
                known = (place >= 0) & (place < all_rows)
                tl.device_assert(known, "index out of bounds for the rows of a cache")
                heads = tl.where(known, heads, 0)  # where assertions are off, nothing is written
            _turn_heads(
                k, k_out, k_weight, batch * k_batch + token * k_token, batch * ko_batch + place * ko_token, k_head, ko_head,
                heads, block - Q_BLOCKS, cos_row, sin_row, SIZE, START, HALF, PAIRS, K_COLUMNS, K_HEADS, IN, OUT, WIDE, STEP,
                INVERSE, NORM, WEIGHT, ONE, EPS, K_FULL, NEAR,
            )  # fmt: skip


def supports(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    spec: RopeSpec,
    norm: Norm | None = None,
    in_place: bool = False,
) -> str | None:
    """Why `run` can't take these tensors (fake ones too), in words; None where it can. Shapes as for `run`."""
    xs = [q] if k is None else [q, k]
    size = q.shape[-1]
    checks = (
        (HAVE_TRITON, "Triton is not installed"),
        (compat.platform(q.device) in ("cuda", "xpu"), f"Triton has no {q.device.type} backend here"),
        (all(x.ndim == 4 for x in xs), "q and k must be [B, H, S, D]"),
        (all(x.dtype in DTYPES for x in (*xs, cos, sin)), "only float16, bfloat16 and float32"),
        ((spec.out_dtype or q.dtype) in DTYPES, f"no result in {spec.out_dtype}"),
        (all(x.shape[-1] == size for x in xs), "q and k have different head sizes"),
        (all(x.stride(-1) == 1 for x in xs), "a last dimension is not contiguous"),
        (readable(cos, spec) and readable(sin, spec), "the rows of a table are not contiguous"),
        (cos.stride(-1) == sin.stride(-1), "the two tables lie differently in memory"),
        (size <= MAX_HEAD_SIZE, f"head size {size} exceeds {MAX_HEAD_SIZE}"),
        (spec.start + spec.rotary_dim <= size, f"{spec.start} + {spec.rotary_dim} exceeds the head size {size}"),
        (cos.shape == sin.shape and cos.ndim == 3, "tables must be [B or 1, S, W]"),
        (cos.shape[-1] in (spec.rotary_dim, spec.rotary_dim // 2), f"tables of {cos.shape[-1]} columns"),
        (k is None or (q.shape[0], q.shape[2]) == (k.shape[0], k.shape[2]), "q and k have different tokens"),
        (not in_place or spec.layout_in == spec.layout_out, "a change of pair layout can't be made in place"),
        (not in_place or spec.out_dtype in (None, q.dtype), "a change of dtype can't be made in place"),
        (norm is None or k is None or (norm.q_weight is None) == (norm.k_weight is None), "only one norm has a weight"),
    )
    return next((reason for fine, reason in checks if not fine), None)


def readable(table: Tensor, spec: RopeSpec) -> bool:
    """Whether the kernel reads the table as it lies: rows contiguous, or, with a column for a pair, in equal steps."""
    step = table.stride(-1)
    return isinstance(step, int) and (step == 1 or (step > 1 and table.shape[-1] == spec.rotary_dim // 2))


def run(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    spec: RopeSpec,
    *,
    norm: Norm | None = None,
    in_place: bool = False,
    tile: int | None = None,
    warps: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Rotates q [B, H, S, D] and k [B, K, S, D] by cos and sin [B or 1, S, R or R/2]; any strides but the last, 1.

    [B, S, H, D] is passed as `x.transpose(1, 2)`, [T, H, D] as `x.transpose(0, 1)[None]`. A result is laid out in memory as
    its input is; with in_place it is the input. ValueError where `supports` has a reason.
    """
    reason = supports(q, k, cos, sin, spec, norm, in_place)
    if reason is not None:
        raise ValueError(f"rope: {reason}")
    best = tiling(q, spec, norm is not None, cos.shape[-1])
    return launch(q, k, cos, sin, spec, norm, in_place, tile or best[0], warps or best[1])


def tiling(q: Tensor, spec: RopeSpec, norm: bool, width: int) -> tuple[int, int]:
    """(elements of a program's heads, warps) for q's device and tables of `width` columns, as measured on an H100
    (benchmarks/rope.py --tune)."""
    if compat.platform(q.device) == "xpu":
        return XPU_TILE, XPU_WARPS
    size = q.shape[-1]
    if norm and size > 128:  # fewer threads a head, fewer steps of its sum
        return TILE // 2, WARPS // 2 if size == spec.rotary_dim else 1
    if spec.layout_out == "interleaved" and width == spec.rotary_dim:  # pairs of tables, too, are put in another order
        return TILE, WARPS // 2
    halves = spec.layout_in == spec.layout_out == "half"
    if not halves or norm or size != spec.rotary_dim:
        return TILE // 2 if size <= 64 else TILE, WARPS
    known = all(isinstance(n, int) for n in q.shape)
    tokens = q.shape[0] * q.shape[2] if known else MANY
    if size <= 64:  # all heads of q in one warp, once there are programs for all
        return (TILE // 2, WARPS) if tokens < MANY // 2 else (TILE, 1)
    few = size == 128 and tokens < MANY  # fewer steps of what a program waits for
    return TILE, 2 * WARPS if few else WARPS


def launch(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    spec: RopeSpec,
    norm: Norm | None,
    in_place: bool,
    tile: int,
    warps: int,
    start: Start = compat.start,
    outs: Sequence[Tensor] | None = None,
    rows: Rows | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`run` without its checks, by whatever starts kernels. outs: what results are written to, of any strides. rows: where k's
    is written, whose whole cache is then returned in k's place."""
    dtype = spec.out_dtype or q.dtype
    q_out, k_out = (*outs, None)[:2] if outs is not None else (q, k) if in_place else (None, None)
    q_out = torch.empty_like(q, dtype=dtype) if q_out is None else q_out
    k_out = rows.cache if rows is not None else k_out
    k_out = torch.empty_like(k, dtype=dtype) if k_out is None and k is not None else k_out
    if q.numel() == 0:
        return q_out, k_out
    batch, q_heads, tokens, size = q.shape
    k_heads = 0 if k is None else k.shape[1]
    pairs = triton.next_power_of_2(spec.rotary_dim // 2)
    whole = triton.next_power_of_2(size)
    q_block = min(triton.next_power_of_2(q_heads), max(1, tile // whole))
    k_block = min(triton.next_power_of_2(max(1, k_heads)), max(1, tile // whole))
    q_blocks = triton.cdiv(q_heads, q_block)
    k_blocks = triton.cdiv(k_heads, k_block)
    weight = norm is not None and norm.q_weight is not None
    other, other_out = (q, q_out) if k is None or k_out is None else (k, k_out)
    q_weight = norm.q_weight if weight and norm is not None else cos
    k_weight = norm.k_weight if weight and norm is not None and norm.k_weight is not None else q_weight
    index = rows.index if rows is not None else None
    strides = (_strides(q), _strides(other), _strides(q_out), _strides(other_out) if rows is None else rows.strides)
    arguments = (
        q, other, q_out, other_out, cos, sin, q_weight, k_weight, cos if index is None else index, tokens,
        *chain(*strides),
        _batch_stride(cos), cos.stride(1), _batch_stride(sin), sin.stride(1), q_heads, k_heads,
        *(rows.index_strides if rows is not None else (0, 0)), *((rows.first, rows.count) if rows is not None else (0, 0)),
    )  # fmt: skip
    constants = {
        "SIZE": size,
        "START": spec.start,
        "HALF": spec.rotary_dim // 2,
        "PAIRS": pairs,
        "Q_COLUMNS": _columns(q, q_out, spec, norm),
        "K_COLUMNS": _columns(other, other_out, spec, norm),
        "Q_HEADS": q_block,
        "K_HEADS": k_block,
        "Q_BLOCKS": q_blocks,
        "K_BLOCKS": k_blocks,
        "IN": spec.layout_in == "interleaved",
        "OUT": spec.layout_out == "interleaved",
        "WIDE": cos.shape[-1] == spec.rotary_dim,
        "STEP": cos.stride(-1),
        "INVERSE": spec.inverse,
        "NORM": norm is not None,
        "WEIGHT": weight,
        "ONE": 1.0 if norm is not None and norm.add_one else 0.0,
        "EPS": norm.eps if norm is not None else 0.0,  # an argument would come as float64, and make the norm so
        "ROWS": "same" if rows is None else "from" if index is None else "index",
        "Q_FULL": q_heads % q_block == 0,
        "K_FULL": k_heads % k_block == 0 and index is None,
        "NEAR": all(map(_near, (q_heads, k_heads, q_heads, k_heads), strides)),
        "SINGLE": isinstance(batch, int) and batch == 1,
    }
    written = ["q_out"] if k is None else ["q_out", "k_out"]
    results = start(rope_kernel, (batch * tokens * (q_blocks + k_blocks),), arguments, constants, written, warps=warps)
    return results[0], results[1] if k is not None else None


def _columns(x: Tensor, out: Tensor, spec: RopeSpec, norm: Norm | None) -> int:
    """What a program holds of a head of which a part turns: all of it, or, in place without a norm, that part (0)."""
    rest = x.shape[-1] > spec.rotary_dim
    return int(triton.next_power_of_2(x.shape[-1])) if rest and (out is not x or norm is not None) else 0


def _strides(x: Tensor) -> tuple[Any, Any, Any]:
    """(batch, token, head) strides of [B, H, S, D]."""
    return x.stride(0), x.stride(2), x.stride(1)


def _near(heads: int, strides: tuple[Any, Any, Any]) -> bool:
    """Whether the heads of a token are known to lie within 2^31 elements."""
    return isinstance(strides[2], int) and heads * strides[2] < 2**31


def _batch_stride(table: Tensor) -> int:
    return 0 if table.shape[0] == 1 else table.stride(0)
