"""Rows of x in the order of a sort: out[r] = x[order[r] // k].

An Intel GPU then loads them in blocks, in a third to a fourteenth of the instructions that rows found one by one take; worth
the copy where there are many (`xpu_tiles`).
"""

import triton
import triton.language as tl
from torch import Tensor

from braze.kernels.triton.compat import Start

BLOCK = 1024
WARPS = 4


@triton.jit
def moe_gather(x, order, out, hidden, x_row, TOP_K: tl.constexpr, BH: tl.constexpr):
    """One row and BH of its columns."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    token = (tl.load(order + row) // TOP_K).to(tl.int64)
    value = tl.load(x + token * x_row + h, mask=h < hidden, other=0.0)
    tl.store(out + row * hidden + h, value, mask=h < hidden)


def gather(x: Tensor, order: Tensor, top_k: int, start: Start) -> Tensor:
    """x [T, H], order [T*k] -> [T*k, H]."""
    rows, hidden = order.numel(), x.shape[1]
    out = x.new_empty(rows, hidden)
    grid = (rows, triton.cdiv(hidden, BLOCK))
    constants = {"TOP_K": top_k, "BH": BLOCK}
    (out,) = start(moe_gather, grid, (x, order, out, hidden, x.stride(0)), constants, ["out"], warps=WARPS)
    return out
