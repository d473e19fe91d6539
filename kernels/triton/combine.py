"""What stands around the products: rows copied in the order of their experts, and the sum over each token's results.

Both only move memory; the sum is made in float32 and always in the same order.
"""

import triton
import triton.language as tl
from torch import Tensor

from braze.kernels.triton.compat import Start, spread
from braze.kernels.triton.intrinsics import launch_dependents, wait


@triton.jit
def moe_permute(
    x, copy, order, rows, hidden, x_row, TOP_K: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr, OVERLAP: tl.constexpr
):
    """copy[i] = x[order[i] // TOP_K]."""
    if OVERLAP:
        launch_dependents()
        wait()
    i = tl.program_id(0) * BR + tl.arange(0, BR)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    row = tl.load(order + i, mask=i < rows, other=0) // TOP_K
    mask = (i < rows)[:, None] & (h < hidden)[None, :]
    value = tl.load(x + row.to(tl.int64)[:, None] * x_row + h[None, :], mask=mask)
    tl.store(copy + i.to(tl.int64)[:, None] * hidden + h[None, :], value, mask=mask)


@triton.jit
def moe_combine(
    y, out, hidden, split, TOP_K: tl.constexpr, SPLIT: tl.constexpr, BH: tl.constexpr, OVERLAP: tl.constexpr
):
    """out[t] = sum over the SPLIT * TOP_K parts y[s, t, j], always in the same order; a token's programs are neighbours."""
    if OVERLAP:
        wait()
    blocks = tl.cdiv(hidden, BH)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    h = tl.program_id(0) % blocks * BH + tl.arange(0, BH)
    total = tl.zeros((BH,), tl.float32)
    source = y + token * TOP_K * hidden + h
    for _ in tl.static_range(SPLIT):
        for j in tl.static_range(TOP_K):
            total += tl.load(source + j * hidden, mask=h < hidden, other=0.0).to(tl.float32)
        source += split
    tl.store(out + token * hidden + h, total.to(out.dtype.element_ty), mask=h < hidden)


def permute(x: Tensor, order: Tensor, top_k: int, start: Start, overlap: bool) -> Tensor:
    """x's rows in the order of the call's rows [T*k, H]."""
    rows, hidden = order.numel(), x.shape[1]
    copy = x.new_empty(rows, hidden)
    block = min(1024, triton.next_power_of_2(hidden))
    grid = (triton.cdiv(rows, 4), triton.cdiv(hidden, block))
    constants = {"TOP_K": top_k, "BR": 4, "BH": block, "OVERLAP": overlap}
    arguments = (x, copy, order, rows, hidden, x.stride(0))
    return start(moe_permute, grid, arguments, constants, ["copy"], warps=spread(x, 4 * block, 4), overlap=overlap)[0]


def combine(y: Tensor, out: Tensor, top_k: int, start: Start, overlap: bool) -> Tensor:
    """y [split, T * k, H] summed over splits and slots into out [T, H]."""
    split, _, hidden = y.shape
    tokens = out.shape[0]
    block = 256 if tokens < 16 else min(1024, triton.next_power_of_2(hidden))
    constants = {"TOP_K": top_k, "SPLIT": split, "BH": block, "OVERLAP": overlap}
    grid = (tokens * triton.cdiv(hidden, block),)
    (out,) = start(
        moe_combine,
        grid,
        (y, out, hidden, y.stride(0)),
        constants,
        ["out"],
        warps=spread(y, 4 * block, max(1, block // 256)),
        overlap=overlap,
    )
    return out
