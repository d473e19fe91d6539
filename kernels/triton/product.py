"""One launch of the experts' kernel (`gemm`): a product's tensors and tiles become its arguments.

Weights are read through descriptors where hardware copies tiles, in blocks where an XPU loads such, through pointers elsewhere.
"""

from dataclasses import dataclass

from torch import Tensor

from braze.kernels.triton import activation, compat
from braze.kernels.triton.choose_config import Config, Tile
from braze.kernels.triton.compat import Start
from braze.kernels.triton.weights import Weights, box


@dataclass(frozen=True)
class Rows:
    """Where tiles of rows come from: ids [T, k] alone, or the sorted order and the list of tiles."""

    ids: Tensor
    order: Tensor
    tiles: Tensor
    limit: int
    direct: bool


@dataclass(frozen=True)
class Product:
    """One of the two products: out[row] = f(a[row] @ w[e] + bias[e])."""

    a: Tensor
    w: Weights
    bias: Tensor | None
    out: Tensor  # [split, rows, columns]
    first: bool
    weighted: bool
    layout: str  # of gate and up in w, "apart" where they are two tensors
    scale: float
    tile: Tile
    gathers: bool = False  # a's rows lie in the order of tokens
    arrivals: Tensor | None = (
        None  # where a token's parts are counted: set to 0 by the first product, used by the second
    )
    result: Tensor | None = None  # their sum


def product(
    p: Product, found: Rows, weights: Tensor, function: str, config: Config, start: Start, overlap: bool
) -> list[Tensor]:
    """What the launch wrote: out, then arrivals and result where there are any."""
    import triton

    from braze.kernels.triton.gemm import moe_gemm

    tile, w = p.tile, p.w.each
    experts, _, inner = w.shape
    split, rows, columns = p.out.shape
    gated = p.layout != "none"
    cols = tile.columns // 2 if gated else tile.columns
    span = triton.cdiv(triton.cdiv(inner, tile.inner), split) * tile.inner
    blocks = triton.cdiv(columns, cols) * split
    units = (rows if found.direct else found.limit) * blocks
    w_pointer, up_pointer = p.w.pointers
    w_desc = tile.descriptors and p.w.takes_descriptor(p.layout)
    w_block = p.w.takes_block(p.layout)
    a_desc = tile.descriptors and not p.gathers and not found.direct and compat.takes_descriptor(p.a)
    grid = min(units, tile.programs * compat.processors(p.a.device)) if tile.programs else units
    arguments = (
        p.a, w_pointer, up_pointer, p.bias if p.bias is not None else w_pointer, weights, p.out,
        found.ids, found.order, found.tiles,
        found.ids if p.arrivals is None else p.arrivals, p.out if p.result is None else p.result,
        compat.Box(p.a, (config.rows, tile.inner)) if a_desc else p.a,
        compat.Box(p.a, (config.rows // 2, tile.inner)) if a_desc and tile.halves else p.a,
        box(w, p.layout, tile.columns, tile.inner) if w_desc else w_pointer,
        rows, columns, inner, experts, found.limit, span, p.scale,
        p.a.stride(0), w.stride(0), w.stride(1), w.stride(2),
        p.bias.stride(0) if p.bias is not None else 0, p.out.stride(1), p.out.stride(0),
    )  # fmt: skip
    constants = {
        "TOP_K": found.ids.shape[1],
        "GATHER": p.gathers,
        "BM": config.rows,
        "BN": tile.columns,
        "BK": tile.inner,
        "GROUP": tile.group,
        "SPLIT": split,
        "SLOTS": triton.next_power_of_2(rows) if found.direct else 0,
        "LAYOUT": p.layout,
        "FIRST": p.first,
        "BIAS": p.bias is not None,
        "WEIGHT": p.weighted,
        "EVEN_N": columns % cols == 0,
        "EVEN_K": inner % (tile.inner * split) == 0,
        "A_DESC": a_desc,
        "W_DESC": w_desc,
        "W_ROWS": w.stride(2) == 1,
        "PRECISION": compat.dot_precision(p.a),
        "OVERLAP": overlap,
        "FLATTEN": tile.programs > 0 and not tile.halves,
        "A_BLOCK": not p.gathers and not found.direct and compat.takes_block(p.a),
        "W_BLOCK": w_block,
        "TWICE": (w_block and p.layout == "halves") or (p.layout == "apart" and compat.platform(p.a.device) == "xpu"),
        "TABLE": p.w.table is not None,
        "HALVES": tile.halves and not found.direct,
        "SUM": p.arrivals is not None,
    }
    kernel = activation.bind(moe_gemm, function) if p.first else moe_gemm
    # A direct first product that began before its predecessor ends would let the second's prefetches in among what that still
    # reads: 2 to 8 % more time on an H100.
    overlap = overlap and not (p.first and found.direct)
    writes = ["out"] + ["arrivals"] * (p.arrivals is not None) + ["result"] * (p.result is not None)
    return start(
        kernel, (grid,), arguments, constants, writes,
        warps=tile.warps, stages=tile.stages, overlap=overlap, registers=tile.registers,
    )  # fmt: skip
