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
from braze.kernels.triton.choose_config import Config, Problem, choose_config
from braze.kernels.triton.compat import Start
from braze.kernels.triton.product import Product, Rows, product
from braze.kernels.triton.weights import Shared, Weights

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
    w1: Tensor | Weights,
    w2: Tensor | Weights,
    b1: Tensor | None,
    b2: Tensor | None,
    spec: MoeSpec,
) -> str | None:
    """Why `run` can't take these tensors (fake ones too), in words; None where it can. Shapes as for `run`."""
    reason = refusal(x, w1, w2, b1, b2, spec)
    if reason is None and ids.dtype not in (torch.int32, torch.int64):
        return f"ids in {ids.dtype}"
    if reason is None and weights.dtype not in DTYPES:
        return f"router weights in {weights.dtype}"
    return reason


def refusal(
    x: Tensor, w1: Tensor | Weights, w2: Tensor | Weights, b1: Tensor | None, b2: Tensor | None, spec: MoeSpec
) -> str | None:
    """`supports`, but for ids and weights."""
    first, second = map(Weights.of, (w1, w2))
    each, up = first.each, first.up
    biases = [b for b in (b1, b2) if b is not None]
    # Text is made where it is needed: this is a part of every eager call.
    checks: tuple[tuple[bool, Callable[[], str]], ...] = (
        (compat.HAVE_TRITON, lambda: "Triton is not installed"),
        (compat.platform(x.device) in ("cuda", "xpu"), lambda: f"Triton has no {x.device.type} backend here"),
        (x.dtype in DTYPES, lambda: f"rows in {x.dtype}, not float16, bfloat16 or float32"),
        (
            each.dtype == second.each.dtype == x.dtype,
            lambda: f"weights in {each.dtype} and {second.each.dtype} for rows in {x.dtype}",
        ),
        (up is None or _alike(each, up), lambda: "gate and up that differ in dtype or lie in different ways"),
        (
            (spec.out_dtype or x.dtype) in DTYPES,
            lambda: f"a result in {spec.out_dtype}, not float16, bfloat16 or float32",
        ),
        (all(b.dtype in DTYPES for b in biases), lambda: "biases that are no 16-bit or 32-bit floats"),
        (x.stride(-1) == 1, lambda: "rows of x that are not contiguous"),
        (all(1 in w.each.stride()[1:] for w in (first, second)), lambda: "weights with neither inner stride 1"),
        (all(b.stride(-1) == 1 for b in biases), lambda: "biases that are not contiguous"),
        (0 < each.shape[0] <= MAX_EXPERTS, lambda: f"{each.shape[0]} experts, not 1 to {MAX_EXPERTS}"),
        (0 not in (*each.shape, *second.each.shape), lambda: "weights without elements"),
    )
    reason = next((reason() for fine, reason in checks if not fine), None)
    return reason or _activation_refusal(spec.activation)


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())


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
    w1: Tensor | Weights,
    w2: Tensor | Weights,
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
    each slot's weighted result [T, k, H] instead of their sum. b1 [E, 2I] has gate's half first where they are two tensors.
    ValueError where `supports` has a reason, or out does not fit.
    """
    first, second = map(Weights.of, (w1, w2))
    given = (x, ids, weights, *first.tensors, *second.tensors, b1, b2, out)
    plannable = x.device.type == "cuda" and hooks == NO_HOOKS
    pointers = [0 if t is None else t.data_ptr() for t in given] if plannable else []
    key = plan.signature(given, pointers, (spec, config, combine, first.lie, second.lie)) if plannable else None
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


def problem(x: Tensor, top_k: int, first: Weights, second: Weights, spec: MoeSpec) -> Problem:
    """What the choice of tiles depends on."""
    layout = first.layout(spec.layout)
    blocks = first.takes_block(layout) and second.takes_block("none")
    up, down = first.each, second.each
    return Problem(
        tokens=x.shape[0],
        top_k=top_k,
        experts=down.shape[0],
        hidden=x.shape[1],
        intermediate=down.shape[2],
        gated=spec.layout != "none",
        element=x.element_size(),
        device=compat.device_name(x.device),
        processors=compat.processors(x.device),
        layout=layout,
        result=(spec.out_dtype or x.dtype).itemsize,
        reads=("rows" if up.stride(2) == 1 else "columns") if blocks else "pointers",
        vector=compat.platform(x.device) == "cuda" and up.stride(2) == down.stride(2) == 1,
    )


def launch(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w1: Tensor | Weights,
    w2: Tensor | Weights,
    b1: Tensor | None,
    b2: Tensor | None,
    spec: MoeSpec,
    config: Config | None = None,
    out: Tensor | None = None,
    combine: bool = True,
    hooks: Hooks = NO_HOOKS,
    *,
    shared: Shared | None = None,
    start: Start = compat.start,
    overlap: bool = False,
) -> Tensor:
    """`run` without its checks, by whatever starts kernels; overlap: launches of the call may overlap. shared: of one
    token whose config has single rows."""
    tokens, k = ids.shape
    rows, hidden = tokens * k, x.shape[1]
    if out is None:
        out = _result(x, ids, spec, combine)
    if rows == 0:
        return out.zero_()
    first, second = map(Weights.of, (w1, w2))
    if spec.transposed:
        first, second = first.transposed(), second.transposed()
    sizes = problem(x, k, first, second, spec)
    sizes = replace(sizes, vector=sizes.vector and hooks == NO_HOOKS)
    config = config or choose_config(sizes)
    if config.rows == 1 and not (sizes.vector and rows <= MAX_DIRECT_ROWS):
        raise ValueError(
            "moe: single rows are for few tokens, no hooks, and weights contiguous along what is summed over"
        )
    if not combine:
        config = replace(config, second=replace(config.second, split=1))
    if hooks != NO_HOOKS:
        if first.up is not None:
            raise ValueError("moe: hooks are for gate and up of one tensor")
        config = replace(config, direct=False)
    ids, weights = ids.contiguous(), weights.contiguous()
    if config.rows == 1:
        from braze.kernels.triton import vector

        return vector.launch(x, ids, weights, first, second, b1, b2, spec, config, out, combine, start, overlap, shared)
    found = prepare(ids, first.each.shape[0], config, start, overlap)

    split = config.second.split
    # One token's parts are summed by the program that finishes the last of them: a launch less.
    counted = tokens == 1 < k * split and combine and found.direct and hidden <= compat.ARRIVALS * config.second.columns
    sums = counted and compat.platform(x.device) == "cuda"
    arrivals = x.new_empty(compat.ARRIVALS, dtype=torch.int32) if sums else None
    h, arrivals = _activations(x, first, b1, found, weights, spec, config, hooks, arrivals, start, overlap)
    alone = split == 1 and (k == 1 or not combine)
    # Partial sums are kept in float32; whole results of an expert are rounded as the result is.
    y = (
        out.view(1, rows, hidden)
        if alone
        else x.new_empty(split, rows, hidden, dtype=torch.float32 if split > 1 else out.dtype)
    )
    on_output = spec.weight_on == "output"
    last = Product(h, second, b2, y, False, on_output, "none", spec.scale, config.second)
    last = replace(last, arrivals=arrivals, result=out if sums else None)
    y, *summed = product(last, found, weights, "", config, start, overlap)
    if sums:
        return summed[-1]
    if alone:
        return y.view(out.shape)
    from braze.kernels.triton.combine import combine as sum_up

    return sum_up(y, out, k, start, overlap)


def _activations(
    x: Tensor, w: Weights, bias: Tensor | None, found: Rows, weights: Tensor, spec: MoeSpec, config: Config, hooks: Hooks,
    arrivals: Tensor | None, start: Start, overlap: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The first product and the activation [T*k, I], in the order of the call's rows; and `arrivals`, set to 0."""
    from braze.kernels.triton.combine import permute

    rows, columns = found.ids.numel(), w.columns
    layout = w.layout(spec.layout)
    gathers = found.direct or not config.permute
    a = x if gathers else permute(x, found.order, found.ids.shape[1], start, overlap)
    first = Product(a, w, bias, x, True, spec.weight_on == "input", layout, 1.0, config.first, gathers)
    if hooks.gate_up is None:
        first = replace(first, out=x.new_empty(1, rows, columns if layout == "none" else columns // 2))
        first = replace(first, arrivals=arrivals)
        out, *zeros = product(first, found, weights, spec.activation, config, start, overlap)
        h, arrivals = out[0], zeros[0] if zeros else None
    else:
        first = replace(first, layout="none", out=x.new_empty(1, rows, columns))
        raw = product(first, found, weights, "g", config, start, overlap)[0][0]
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
