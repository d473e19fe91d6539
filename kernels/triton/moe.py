"""Experts as a sequence of launches: [sort] -> first product -> second product -> [sum over each token's experts].

Only the [T*k, I] activations and the [T*k, H] results pass through memory; rows of x are gathered inside the first product.
For few rows there is no sort, and for k = 1 or one token the second product writes the result itself: two to five launches, one
more where rows are copied first.
One token on CUDA, or few, takes two launches of its own where weights are contiguous along what is summed over (`vector`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from braze.kernels.expression import apply_torch
from braze.kernels.reference import split_gate_up
from braze.kernels.spec import MoeSpec
from braze.kernels.triton import activation, compat, plan
from braze.kernels.triton.choose_config import Config, Problem, Tile, choose_config
from braze.kernels.triton.compat import Start

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_EXPERTS = 2046
MAX_DIRECT_ROWS = 1024


#: Called with rows [T*k, N], which it may change in place, and their order [T*k]: row r is slot order[r] % k of token
#: order[r] // k. Rows without an expert come last and hold nothing.
Hook = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class Hooks:
    """What is called between the launches: a LoRA adds its products so.

    gate_up: after the first product, its bias and a weight on the input, before the activation, which then is a step of its own
    on rows in x's dtype. activated: before the second product.
    """

    gate_up: Hook | None = None
    activated: Hook | None = None


NO_HOOKS = Hooks()


def supports(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    spec: MoeSpec,
) -> str | None:
    """Why `run` can't take these tensors (fake ones too), in words; None where it can. Shapes as for `run`."""
    biases = [b for b in (b1, b2) if b is not None]
    # Text is made where it is needed: this is a part of every eager call.
    checks: tuple[tuple[bool, Callable[[], str]], ...] = (
        (compat.HAVE_TRITON, lambda: "Triton is not installed"),
        (compat.platform(x.device) in ("cuda", "xpu"), lambda: f"Triton has no {x.device.type} backend here"),
        (x.dtype in DTYPES, lambda: f"rows in {x.dtype}, not float16, bfloat16 or float32"),
        (w1.dtype == w2.dtype == x.dtype, lambda: f"weights in {w1.dtype} and {w2.dtype} for rows in {x.dtype}"),
        (
            (spec.out_dtype or x.dtype) in DTYPES,
            lambda: f"a result in {spec.out_dtype}, not float16, bfloat16 or float32",
        ),
        (ids.dtype in (torch.int32, torch.int64), lambda: f"ids in {ids.dtype}"),
        (weights.dtype in DTYPES, lambda: f"router weights in {weights.dtype}"),
        (all(b.dtype in DTYPES for b in biases), lambda: "biases that are no 16-bit or 32-bit floats"),
        (x.stride(-1) == 1, lambda: "rows of x that are not contiguous"),
        (all(1 in w.stride()[1:] for w in (w1, w2)), lambda: "weights with neither inner stride 1"),
        (all(b.stride(-1) == 1 for b in biases), lambda: "biases that are not contiguous"),
        (0 < w1.shape[0] <= MAX_EXPERTS, lambda: f"{w1.shape[0]} experts, not 1 to {MAX_EXPERTS}"),
        (w1.shape[1] > 0 and w1.shape[2] > 0 and w2.shape[1] > 0, lambda: "weights without elements"),
    )
    reason = next((reason() for fine, reason in checks if not fine), None)
    return reason or _activation_refusal(spec.activation)


@lru_cache(maxsize=256)
def _activation_refusal(text: str) -> str | None:
    try:
        activation.source(text)
    except (NotImplementedError, ValueError) as e:
        return f"no Triton code for the activation: {e}"
    return None


def run(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    spec: MoeSpec,
    *,
    config: Config | None = None,
    out: Tensor | None = None,
    combine: bool = True,
    hooks: Hooks = NO_HOOKS,
) -> Tensor:
    """`braze.kernels.reference.moe` on a GPU, accumulated in float32: x [T, H], ids and weights [T, k] -> [T, H].

    config: tiles to use instead of the ones chosen. out: what the result is written to, which may be x. combine: False for
    each slot's weighted result [T, k, H] instead of their sum. ValueError where `supports` has a reason, or out does not fit.
    """
    given = (x, ids, weights, w1, w2, b1, b2, out)
    plannable = x.device.type == "cuda" and hooks == NO_HOOKS
    pointers = [0 if t is None else t.data_ptr() for t in given] if plannable else []
    key = plan.signature(given, pointers, (spec, config, combine)) if plannable else None
    kept = plan.find(key)
    if kept is not None:
        result = _result(x, ids, spec, combine) if out is None else out
        kept.start([*pointers[:-1], result.data_ptr()], x.device)
        return result
    reason = supports(x, ids, weights, w1, w2, b1, b2, spec)
    if reason is not None:
        raise ValueError(f"moe: {reason}")
    result = _result(x, ids, spec, combine)
    if out is not None:
        if (out.shape, out.dtype, out.is_contiguous()) != (result.shape, result.dtype, True):
            shape = tuple(result.shape)
            raise ValueError(f"moe: the result needs a contiguous tensor {shape} of {result.dtype} to be written to")
        result = out
    overlap = compat.overlaps_launches(x.device)
    recorder = plan.Recorder((*given[:-1], result)) if key is not None else None
    launch(
        x, ids, weights, w1, w2, b1, b2, spec, config, result, combine, hooks,
        start=recorder or compat.start, overlap=overlap,
    )  # fmt: skip
    if recorder is not None and ids.numel() > 0 and ids.is_contiguous() and weights.is_contiguous():
        plan.keep(key, recorder.plan())
    return result


def _result(x: Tensor, ids: Tensor, spec: MoeSpec, combine: bool) -> Tensor:
    shape = x.shape if combine else (*ids.shape, x.shape[1])
    return x.new_empty(shape, dtype=spec.out_dtype or x.dtype)


def problem(x: Tensor, ids: Tensor, w1: Tensor, w2: Tensor, spec: MoeSpec) -> Problem:
    """What the choice of tiles depends on."""
    hidden = x.shape[1]
    up, down = (w.transpose(1, 2) if spec.transposed else w for w in (w1, w2))
    blocks = _takes_block(up, spec.layout) and _takes_block(down, "none")
    return Problem(
        tokens=x.shape[0],
        top_k=ids.shape[1],
        experts=w1.shape[0],
        hidden=hidden,
        intermediate=w2.shape[1] if spec.transposed else w2.shape[2],
        gated=spec.layout != "none",
        element=x.element_size(),
        device=compat.device_name(x.device),
        processors=compat.processors(x.device),
        layout=spec.layout,
        result=(spec.out_dtype or x.dtype).itemsize,
        reads=("rows" if up.stride(2) == 1 else "columns") if blocks else "pointers",
        vector=compat.platform(x.device) == "cuda" and up.stride(2) == down.stride(2) == 1,
    )


def _takes_block(w: Tensor, layout: str) -> bool:
    """Whether an XPU loads blocks of a weight [E, N, K] whose gate and up lie so."""
    second_half = w.shape[1] // 2 * w.stride(1) if layout == "halves" else 0
    return compat.takes_block(w if w.stride(2) == 1 else w.transpose(1, 2), second_half)


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
    """One of the two products: out[row] = f(a[row] @ w[e] + bias[e]), its w as [E, N, K] whatever its strides."""

    a: Tensor
    w: Tensor
    bias: Tensor | None
    out: Tensor  # [split, rows, columns]
    first: bool
    weighted: bool
    layout: str
    scale: float
    tile: Tile
    gathers: bool = False  # a's rows lie in the order of tokens
    arrivals: Tensor | None = (
        None  # where a token's parts are counted: set to 0 by the first product, used by the second
    )
    result: Tensor | None = None  # their sum


def launch(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    spec: MoeSpec,
    config: Config | None = None,
    out: Tensor | None = None,
    combine: bool = True,
    hooks: Hooks = NO_HOOKS,
    *,
    start: Start = compat.start,
    overlap: bool = False,
) -> Tensor:
    """`run` without its checks, by whatever starts kernels; overlap: launches of the call may overlap."""
    tokens, k = ids.shape
    rows, hidden = tokens * k, x.shape[1]
    if out is None:
        out = _result(x, ids, spec, combine)
    if rows == 0:
        return out.zero_()
    sizes = problem(x, ids, w1, w2, spec)
    sizes = replace(sizes, vector=sizes.vector and hooks == NO_HOOKS)
    config = config or choose_config(sizes)
    if config.rows == 1 and not (sizes.vector and rows <= MAX_DIRECT_ROWS):
        raise ValueError(
            "moe: single rows are for few tokens, no hooks, and weights contiguous along what is summed over"
        )
    if not combine:
        config = replace(config, second=replace(config.second, split=1))
    if hooks != NO_HOOKS:
        config = replace(config, direct=False)
    up = w1.transpose(1, 2) if spec.transposed else w1
    down = w2.transpose(1, 2) if spec.transposed else w2
    ids, weights = ids.contiguous(), weights.contiguous()
    if config.rows == 1:
        from braze.kernels.triton import vector

        return vector.launch(x, ids, weights, up, down, b1, b2, spec, config, out, combine, start, overlap)
    found = prepare(ids, w1.shape[0], config, start, overlap)

    split = config.second.split
    # One token's parts are summed by the program that finishes the last of them: a launch less.
    counted = tokens == 1 < k * split and combine and found.direct and hidden <= compat.ARRIVALS * config.second.columns
    sums = counted and compat.platform(x.device) == "cuda"
    arrivals = x.new_empty(compat.ARRIVALS, dtype=torch.int32) if sums else None
    h, arrivals = _activations(x, up, b1, found, weights, spec, config, hooks, arrivals, start, overlap)
    alone = split == 1 and (k == 1 or not combine)
    # Partial sums are kept in float32; whole results of an expert are rounded as the result is.
    y = (
        out.view(1, rows, hidden)
        if alone
        else x.new_empty(split, rows, hidden, dtype=torch.float32 if split > 1 else out.dtype)
    )
    on_output = spec.weight_on == "output"
    second = Product(h, down, b2, y, False, on_output, "none", spec.scale, config.second)
    second = replace(second, arrivals=arrivals, result=out if sums else None)
    y, *summed = _product(second, found, weights, "", config, start, overlap)
    if sums:
        return summed[-1]
    if alone:
        return y.view(out.shape)
    from braze.kernels.triton.combine import combine as sum_up

    return sum_up(y, out, k, start, overlap)


def _activations(
    x: Tensor, up: Tensor, bias: Tensor | None, found: Rows, weights: Tensor, spec: MoeSpec, config: Config, hooks: Hooks,
    arrivals: Tensor | None, start: Start, overlap: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The first product and the activation [T*k, I], in the order of the call's rows; and `arrivals`, set to 0."""
    from braze.kernels.triton.combine import permute

    rows, columns = found.ids.numel(), up.shape[1]
    gathers = found.direct or not config.permute
    a = x if gathers else permute(x, found.order, found.ids.shape[1], start, overlap)
    first = Product(a, up, bias, x, True, spec.weight_on == "input", spec.layout, 1.0, config.first, gathers)
    if hooks.gate_up is None:
        first = replace(first, out=x.new_empty(1, rows, columns if spec.layout == "none" else columns // 2))
        first = replace(first, arrivals=arrivals)
        out, *zeros = _product(first, found, weights, spec.activation, config, start, overlap)
        h, arrivals = out[0], zeros[0] if zeros else None
    else:
        first = replace(first, layout="none", out=x.new_empty(1, rows, columns))
        raw = _product(first, found, weights, "g", config, start, overlap)[0][0]
        hooks.gate_up(raw, found.order)
        h = apply_torch(spec.activation, *split_gate_up(raw.float(), spec.layout)).to(x.dtype)
    if hooks.activated is not None:
        hooks.activated(h, found.order)
    return h, arrivals


def prepare(ids: Tensor, experts: int, config: Config, start: Start, overlap: bool) -> Rows:
    """Tiles of rows for a call: the ids as they are where rows are few, otherwise sorted."""
    from braze.kernels.triton.align import align

    if config.direct and ids.numel() <= MAX_DIRECT_ROWS:
        return Rows(ids, ids, ids, 0, True)
    found = align(ids, experts, config.rows, start, overlap)
    return Rows(ids, found.order, found.tiles, found.limit, False)


def _product(
    p: Product, found: Rows, weights: Tensor, function: str, config: Config, start: Start, overlap: bool
) -> list[Tensor]:
    """What the launch wrote: out, then arrivals and result where there are any."""
    import triton

    from braze.kernels.triton.gemm import moe_gemm

    tile = p.tile
    experts, _, inner = p.w.shape
    split, rows, columns = p.out.shape
    gated = p.layout != "none"
    cols = tile.columns // 2 if gated else tile.columns
    span = triton.cdiv(triton.cdiv(inner, tile.inner), split) * tile.inner
    blocks = triton.cdiv(columns, cols) * split
    units = (rows if found.direct else found.limit) * blocks
    w_rows = p.w.stride(2) == 1
    stored, box = _stored(p, cols, w_rows)
    w_desc = tile.descriptors and compat.takes_descriptor(stored)
    a_desc = tile.descriptors and not p.gathers and not found.direct and compat.takes_descriptor(p.a)
    grid = min(units, tile.programs * compat.processors(p.a.device)) if tile.programs else units
    arguments = (
        p.a, p.w, p.bias if p.bias is not None else p.w, weights, p.out, found.ids, found.order, found.tiles,
        found.ids if p.arrivals is None else p.arrivals, p.out if p.result is None else p.result,
        compat.Box(p.a, (config.rows, tile.inner)) if a_desc else p.a,
        compat.Box(p.a, (config.rows // 2, tile.inner)) if a_desc and tile.halves else p.a,
        compat.Box(stored, box) if w_desc else p.w,
        rows, columns, inner, experts, found.limit, span, p.scale,
        p.a.stride(0), p.w.stride(0), p.w.stride(1), p.w.stride(2),
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
        "W_ROWS": w_rows,
        "PRECISION": compat.dot_precision(p.a),
        "OVERLAP": overlap,
        "FLATTEN": tile.programs > 0 and not tile.halves,
        "A_BLOCK": not p.gathers and not found.direct and compat.takes_block(p.a),
        "W_BLOCK": _takes_block(p.w, p.layout),
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


def _stored(p: Product, cols: int, w_rows: bool) -> tuple[Tensor, tuple[int, ...]]:
    """The weight as a descriptor sees it, last stride 1, and the box of one load; gate and up in one where they can be."""
    if not w_rows:
        return p.w.transpose(1, 2), (1, p.tile.inner, cols if p.layout == "halves" else p.tile.columns)
    if p.layout == "halves":
        return p.w.unflatten(1, (2, -1)), (1, 2, cols, p.tile.inner)
    return p.w, (1, p.tile.columns, p.tile.inner)
