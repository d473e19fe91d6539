"""Scores, chooses and weighs a token's experts in one launch: the logits are read once and nothing between is stored.

Choices are compared as integers whose order is that of the numbers, the expert's index below them: k times the largest
is taken. Of equal choices the lower index comes first, NaN before all else; torch.topk leaves the order of equals open.
"""

from typing import Any

import torch
from torch import Tensor

from braze.kernels.spec import RouteSpec
from braze.kernels.triton import compat
from braze.kernels.triton.compat import HAVE_TRITON, Start

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_EXPERTS = 1024  # with the places that groups of no power of two leave open
MAX_CHOSEN = 64
TILE = 32  # logits of one program at least
WARPS = 1

if HAVE_TRITON:
    import triton
    import triton.language as tl

    from braze.kernels.triton.intrinsics import launch_dependents, wait

    @triton.jit
    def _scores(x, peak, total, SCORING: tl.constexpr):
        """Scores of logits; peak and total: their largest and the sum of exp(x - peak), for the softmax."""
        if SCORING == "softmax":
            score = tl.exp(x - peak) / total
        elif SCORING == "sigmoid":
            score = 1.0 / (1.0 + tl.exp(-x))
        else:  # log1p(y) = log(u) y / (u - 1) with u = 1 + y, which cancels the rounding of u
            y = tl.exp(-tl.abs(x))
            u = 1.0 + y
            log1p = tl.where(u == 1.0, y, tl.log(u) * y / tl.where(u == 1.0, 1.0, u - 1.0))
            score = tl.sqrt(tl.maximum(x, 0.0) + log1p)
        return score

    @triton.jit
    def _open(
        choice, GROUPS: tl.constexpr, OPEN: tl.constexpr, TOP2: tl.constexpr, ZERO: tl.constexpr,
        ROWS: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr,
    ):  # fmt: skip
        """Choices [ROWS, WIDE * SIZE] with those of closed groups masked: a group is open if fewer than OPEN are better."""
        grouped = tl.reshape(choice, (ROWS, WIDE, SIZE))
        rank = tl.max(grouped, 2)
        if TOP2:
            place = tl.arange(0, SIZE)[None, None, :]
            first = tl.argmax(grouped, 2)[:, :, None]
            rank += tl.max(tl.where(place == first, -float("inf"), grouped), 2)
        group = tl.arange(0, WIDE)
        rank = tl.where(group[None, :] < GROUPS, rank, -float("inf"))
        mine, other = rank[:, :, None], rank[:, None, :]
        ahead = (other > mine) | ((other == mine) & (group[None, None, :] < group[None, :, None]))
        kept = tl.sum(ahead.to(tl.int32), 2) < OPEN
        return tl.reshape(tl.where(kept[:, :, None], grouped, 0.0 if ZERO else -float("inf")), (ROWS, WIDE * SIZE))

    @triton.jit
    def _expert(place, EXPERTS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr):
        """The expert at a place, whose group has SIZE of them."""
        exact: tl.constexpr = GROUPS == 1 or GROUPS * SIZE == EXPERTS
        return place if exact else place // SIZE * (EXPERTS // GROUPS) + place % SIZE

    @triton.jit
    def _ordered(choice, there):
        """Integers [ROWS, N] in the order of the choices, equals by falling index; what is not there comes last."""
        bits = tl.where(choice == 0.0, 0.0, choice).to(tl.int32, bitcast=True)  # -0 and 0 are equal
        rising = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        rising = tl.where(choice != choice, 0x7FFFFFFF, rising)
        index = tl.arange(0, choice.shape[1])[None, :].to(tl.int64)
        return tl.where(there, (rising.to(tl.int64) << 32) | (0x7FFFFFFF - index), -0x7FFFFFFFFFFFFFFF)

    @triton.jit
    def route_kernel(
        logits, bias, weights, ids, rows, stride, eps, scale,
        EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SHARED: tl.constexpr, SCORING: tl.constexpr, ON_SCORES: tl.constexpr,
        BIAS: tl.constexpr, GROUPS: tl.constexpr, OPEN: tl.constexpr, TOP2: tl.constexpr, ZERO: tl.constexpr,
        RENORM: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr, CHOSEN: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):  # fmt: skip
        """ROWS tokens a program; experts lie in WIDE groups of SIZE places, powers of two; CHOSEN places for results. OVERLAP:
        launches before and after may overlap with this one."""
        if OVERLAP:
            launch_dependents()
            wait()
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = row < rows
        source = logits + row.to(tl.int64) * stride
        place = tl.arange(0, WIDE * SIZE)[None, :]
        expert = _expert(place, EXPERTS, GROUPS, SIZE)
        there = expert < EXPERTS
        if GROUPS > 1 and GROUPS * SIZE != EXPERTS:
            there &= place % SIZE < EXPERTS // GROUPS
        x = tl.load(source + expert, mask=inside & there, other=-float("inf")).to(tl.float32)
        peak = x
        total = x
        if SCORING == "softmax":
            peak = tl.max(x, 1)[:, None]
            total = tl.sum(tl.exp(x - peak), 1)[:, None]
        choice = x
        if ON_SCORES:
            choice = _scores(x, peak, total, SCORING)
        if BIAS:
            choice += tl.load(bias + expert, mask=there, other=0.0).to(tl.float32)
        choice = tl.where(there, choice, -float("inf"))
        if GROUPS > 1:
            choice = _open(choice, GROUPS, OPEN, TOP2, ZERO, ROWS, WIDE, SIZE)
        order = _ordered(choice, there)
        column = tl.arange(0, CHOSEN)[None, :]
        chosen = tl.zeros((ROWS, CHOSEN), tl.int32) + EXPERTS - TOP_K + column  # behind the k, the shared experts
        for j in range(TOP_K):
            best = tl.max(order, 1)[:, None]
            at = (0x7FFFFFFF - (best & 0x7FFFFFFF)).to(tl.int32)
            chosen = tl.where(column == j, _expert(at, EXPERTS, GROUPS, SIZE), chosen)
            order = tl.where(order == best, -0x7FFFFFFFFFFFFFFF, order)
        used = inside & (column < TOP_K + SHARED)
        picked = tl.load(source + chosen, mask=used, other=-float("inf")).to(tl.float32)
        weight = tl.where(used, _scores(picked, peak, total, SCORING), 0.0)
        if RENORM != "no":
            norm = tl.sum(weight, 1)[:, None]
            least = tl.cast(eps, tl.float32)
            weight /= norm + least if RENORM == "add" else tl.maximum(norm, least)
        out = row.to(tl.int64) * (TOP_K + SHARED) + column
        tl.store(weights + out, (weight * tl.cast(scale, tl.float32)).to(weights.dtype.element_ty), mask=used)
        out = row.to(tl.int64) * TOP_K + column
        tl.store(ids + out, chosen.to(ids.dtype.element_ty), mask=inside & (column < TOP_K))


def supports(logits: Tensor, bias: Tensor | None, spec: RouteSpec) -> str | None:
    """Why `run` can't take these tensors (fake ones too), in words; None where it can. Shapes as for `run`."""
    wide, size = _places(logits.shape[-1] - spec.shared, spec.groups)
    checks = (
        (HAVE_TRITON, "Triton is not installed"),
        (compat.platform(logits.device) in ("cuda", "xpu"), f"Triton has no {logits.device.type} backend here"),
        (logits.dtype in DTYPES and (spec.out_dtype or logits.dtype) in DTYPES, "only float16, bfloat16 and float32"),
        (bias is None or bias.dtype in DTYPES, "only float16, bfloat16 and float32"),
        (spec.ids_dtype in (torch.int64, torch.int32), f"no ids in {spec.ids_dtype}"),
        (wide * size <= MAX_EXPERTS, f"{wide * size} places for experts exceed {MAX_EXPERTS}"),
        (spec.top_k + spec.shared <= MAX_CHOSEN, f"{spec.top_k + spec.shared} weights a token exceed {MAX_CHOSEN}"),
    )
    return next((reason for fine, reason in checks if not fine), None)


def _places(experts: int, groups: int) -> tuple[int, int]:
    """(groups, places in each), powers of two."""
    return _power(groups), _power(experts // groups)


def _power(n: int) -> int:
    """The smallest power of two that is no less than n."""
    return 1 << (n - 1).bit_length()


def run(logits: Tensor, bias: Tensor | None, spec: RouteSpec) -> tuple[Tensor, Tensor]:
    """logits [..., E + shared], bias of E elements -> weights [..., k + shared], ids [..., k], the best choice first.

    ValueError where `supports` has a reason.
    """
    reason = supports(logits, bias, spec)
    if reason is not None:
        raise ValueError(f"route: {reason}")
    return launch(logits, bias, spec)


def launch(
    logits: Tensor, bias: Tensor | None, spec: RouteSpec, start: Start = compat.start, overlap: bool = False
) -> tuple[Tensor, Tensor]:
    """`run` without its checks, by whatever starts kernels; overlap: with those before and after."""
    lead, experts = logits.shape[:-1], logits.shape[-1] - spec.shared
    x = logits.reshape(-1, logits.shape[-1])
    x = x if x.stride(1) == 1 else x.contiguous()
    rows = x.shape[0]
    weights = x.new_empty((rows, spec.top_k + spec.shared), dtype=spec.out_dtype or x.dtype)
    ids = x.new_empty((rows, spec.top_k), dtype=spec.ids_dtype)
    if rows == 0:
        return weights.reshape(*lead, weights.shape[1]), ids.reshape(*lead, ids.shape[1])
    wide, size = _places(experts, spec.groups)
    tokens = max(1, TILE // (wide * size))
    arguments = (x, x if bias is None else bias.reshape(-1), weights, ids, rows, x.stride(0), spec.eps, spec.scale)
    constants: dict[str, Any] = {
        "EXPERTS": experts,
        "TOP_K": spec.top_k,
        "SHARED": spec.shared,
        "SCORING": spec.scoring,
        "ON_SCORES": spec.select_on == "scores" and (bias is not None or spec.groups > 1),
        "BIAS": bias is not None,
        "GROUPS": spec.groups,
        "OPEN": spec.top_groups,
        "TOP2": spec.group_score == "top2",
        "ZERO": spec.closed == "zero",
        "RENORM": spec.renorm,
        "ROWS": tokens,
        "WIDE": wide,
        "SIZE": size,
        "CHOSEN": _power(spec.top_k + spec.shared),
        "OVERLAP": overlap,
    }
    grid = ((rows + tokens - 1) // tokens,)
    warps = compat.spread(x, 2 * tokens * wide * size, WARPS)  # choices have 64 bits
    written = ["weights", "ids"]
    weights, ids = start(route_kernel, grid, arguments, constants, written, warps=warps, overlap=overlap)
    return weights.reshape(*lead, weights.shape[1]), ids.reshape(*lead, ids.shape[1])
