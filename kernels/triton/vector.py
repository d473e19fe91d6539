"""Experts of so few tokens that hardly two share one: weights times a vector, each weight from memory into registers once.

A few rows of weights make a program of either product; the second takes those rows of all of a token's experts, so it sums
them itself, in a fixed order. Its first weights are under way while the first product still runs. A shared expert n times as
wide is n experts more, which every token has.
"""

import triton
import triton.language as tl
from torch import Tensor

from braze.kernels.spec import MoeSpec
from braze.kernels.triton import activation as activations
from braze.kernels.triton.choose_config import Config
from braze.kernels.triton.compat import Start
from braze.kernels.triton.intrinsics import launch_dependents, wait
from braze.kernels.triton.rows import expert_weight
from braze.kernels.triton.weights import Shared, Weights


@triton.jit
def activation(g, u):
    """Stands for the activation of the first product: `braze.kernels.triton.activation.bind` puts another in its place."""
    return g * u


@triton.jit
def moe_vector_up(
    x, w, up, bias, weight, out, ids, shared, shared_up, inner, columns, experts, x_row, w_expert, w_column, bias_expert,
    TOP_K: tl.constexpr, COLS: tl.constexpr, BK: tl.constexpr, LAYOUT: tl.constexpr, BIAS: tl.constexpr, WEIGHT: tl.constexpr,
    EVEN_K: tl.constexpr, TABLE: tl.constexpr, DENSE: tl.constexpr, SHARED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out[row] = activation(x[row // k] @ w[ids[row]] + bias), COLS columns: x [T, inner], w [E, N, inner] -> [T * k, columns].

    LAYOUT: of gate and up among w's N columns, "apart" where up has up's; TABLE: as in `gemm`. WEIGHT: the router's weight is
    on the input. Nothing is written for an id that is none. SHARED: of one token, rows from k on are parts of shared experts,
    whose gate and up are `shared` and `shared_up` [SHARED * columns, inner]. OVERLAP: the launches of a call may overlap.
    """
    if OVERLAP:
        wait()
        launch_dependents()  # only now: the second product reads ids before it waits
    this = tl.program_id(1)
    n0 = tl.program_id(0) * COLS
    if DENSE:
        expert = tl.zeros((), tl.int32)
    elif SHARED > 0:
        expert = tl.load(ids + this, mask=this < TOP_K, other=0)
    else:
        expert = tl.load(ids + this)
    if (expert >= 0) & (expert < experts):
        PAIR: tl.constexpr = LAYOUT == "apart"
        R: tl.constexpr = COLS if LAYOUT == "none" or PAIR else 2 * COLS
        e = expert.to(tl.int64)
        j = tl.arange(0, R)
        if LAYOUT == "halves":
            column = n0 + j % COLS + j // COLS * columns
            fits = n0 + j % COLS < columns
        elif LAYOUT == "interleaved":
            column = 2 * n0 + j
            fits = column < 2 * columns
        else:
            column = n0 + j
            fits = column < columns
        k = tl.arange(0, BK)
        offset = column.to(tl.int64)[:, None] * w_column + k[None, :]
        row = expert_weight(w, e, w_expert, x, 0, TABLE, LAYOUT) + offset
        if PAIR:
            up_row = expert_weight(up, e, w_expert, x, 1, TABLE, LAYOUT) + offset
        if SHARED > 0:
            if this >= TOP_K:
                first = offset + (this - TOP_K).to(tl.int64) * columns * w_column
                if PAIR:
                    row = shared + first
                    up_row = shared_up + first
                else:
                    row = tl.where((j < COLS)[:, None], shared + first, shared_up - columns * w_column + first)
        else:
            x += (this // TOP_K).to(tl.int64) * x_row
        acc = tl.zeros((R, BK // 8), tl.float32)
        acc_up = tl.zeros((R if PAIR else 1, BK // 8), tl.float32)
        for k0 in range(0, inner, BK):
            inside = k0 + k < inner
            mask = fits[:, None] if EVEN_K else fits[:, None] & inside[None, :]
            part = tl.load(row + k0, mask=mask, other=0.0)
            if PAIR:
                up_part = tl.load(up_row + k0, mask=mask, other=0.0)
            vector = tl.load(x + k0 + k, mask=inside, other=0.0)
            acc += _products(part, vector[None, :], R, BK)
            if PAIR:
                acc_up += _products(up_part, vector[None, :], R, BK)
        total = tl.sum(acc, 1)
        total_up = tl.sum(acc_up, 1)
        if WEIGHT:
            factor = tl.load(weight + this, mask=this < TOP_K, other=1.0) if SHARED > 0 else tl.load(weight + this)
            factor = factor.to(tl.float32)
            total *= factor
            total_up *= factor
        if BIAS:
            b = bias + e * bias_expert + column
            total += tl.load(b, mask=fits, other=0.0).to(tl.float32)
            if PAIR:
                total_up += tl.load(b + columns, mask=fits, other=0.0).to(tl.float32)
        if PAIR:
            y = activation(total, total_up)
        elif LAYOUT == "halves":
            g, u = tl.split(tl.permute(tl.reshape(total, (2, COLS)), (1, 0)))
            y = activation(g, u)
        elif LAYOUT == "interleaved":
            g, u = tl.split(tl.reshape(total, (COLS, 2)))
            y = activation(g, u)
        else:
            y = activation(total, total)
        n = n0 + tl.arange(0, COLS)
        tl.store(out + this.to(tl.int64) * columns + n, y.to(out.dtype.element_ty), mask=n < columns)


@triton.jit
def moe_vector_down(
    a, w, bias, weight, out, ids, shared, gate, inner, columns, experts, scale, w_expert, w_column, bias_expert, shared_row,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, COLS: tl.constexpr, BK: tl.constexpr, BIAS: tl.constexpr,
    WEIGHT: tl.constexpr, EVEN_K: tl.constexpr, COMBINE: tl.constexpr, TABLE: tl.constexpr, DENSE: tl.constexpr,
    SHARED: tl.constexpr, GATED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out[t] = scale * sum_j weight * (a[row] @ w[ids[row]] + bias), row = t * k + j, COLS columns: a [T * k, inner],
    w [E, columns, inner].

    SLOTS: a power of two >= TOP_K + SHARED. COMBINE: out is [T, columns]; otherwise [T * k, columns], each row's own result.
    DENSE, SHARED: as in `moe_vector_up`; shared experts' weight is `shared` [columns, SHARED * inner], and GATED: their results
    are multiplied by `gate`, one number.
    """
    token = tl.program_id(1).to(tl.int64)
    ids += token * TOP_K
    weight += token * TOP_K
    a += token * TOP_K * inner
    out += token * columns if COMBINE else token * TOP_K * columns
    R: tl.constexpr = SLOTS * COLS
    j = tl.arange(0, R)
    slot = j // COLS
    column = tl.program_id(0) * COLS + j % COLS
    expert = tl.zeros((R,), tl.int32) if DENSE else tl.load(ids + slot, mask=slot < TOP_K, other=-1)
    there = (expert >= 0) & (expert < experts)
    e = tl.where(there, expert, 0).to(tl.int64)
    if SHARED > 0:
        there |= (slot >= TOP_K) & (slot < TOP_K + SHARED)
    live = there & (column < columns)
    k = tl.arange(0, BK)
    first = expert_weight(w, e, w_expert, a, 0, TABLE, "none")
    if SHARED > 0:
        part = shared + column.to(tl.int64) * shared_row + (slot - TOP_K) * inner
        first = tl.multiple_of(tl.where(slot < TOP_K, first + column.to(tl.int64) * w_column, part), 16)
        row = first[:, None] + k[None, :]
    else:
        row = first[:, None] + column.to(tl.int64)[:, None] * w_column + k[None, :]
    vector = a + tl.where(there, slot, 0)[:, None] * inner + k[None, :]
    mask = live[:, None] if EVEN_K else live[:, None] & (k < inner)[None, :]
    part = tl.load(row, mask=mask, other=0.0)
    if OVERLAP:
        wait()
        launch_dependents()
    acc = _products(part, tl.load(vector, mask=mask, other=0.0), R, BK)
    for k0 in range(BK, inner, BK):
        mask = live[:, None] if EVEN_K else live[:, None] & (k0 + k < inner)[None, :]
        part = tl.load(row + k0, mask=mask, other=0.0)
        acc += _products(part, tl.load(vector + k0, mask=mask, other=0.0), R, BK)
    total = tl.sum(acc, 1)
    if BIAS:
        total += tl.load(bias + e * bias_expert + column, mask=live, other=0.0).to(tl.float32)
    factor = tl.zeros((R,), tl.float32) + tl.cast(scale, tl.float32)  # inside a graph a number comes as float64
    if WEIGHT:
        factor *= tl.load(weight + slot, mask=there & (slot < TOP_K), other=0.0).to(tl.float32)
    if SHARED > 0:
        alone = tl.load(gate).to(tl.float32) if GATED else 1.0
        factor = tl.where(slot < TOP_K, factor, alone)
    total = tl.where(live, total * factor, 0.0)
    if COMBINE:
        n = tl.program_id(0) * COLS + tl.arange(0, COLS)
        y = tl.sum(tl.reshape(total, (SLOTS, COLS)), 0)
        tl.store(out + n, y.to(out.dtype.element_ty), mask=n < columns)
    else:
        target = out + slot * columns + column
        tl.store(target, total.to(out.dtype.element_ty), mask=(slot < TOP_K) & (column < columns))


@triton.jit
def _products(part, vector, R: tl.constexpr, BK: tl.constexpr):
    """Products of rows with a vector, summed over the 8 that one thread has side by side: [R, BK // 8]."""
    return tl.sum(tl.reshape(part.to(tl.float32) * vector.to(tl.float32), (R, BK // 8, 8)), 2)


def launch(
    x: Tensor, ids: Tensor | None, weights: Tensor | None, up: Weights, down: Weights, b1: Tensor | None, b2: Tensor | None,
    spec: MoeSpec, config: Config, out: Tensor, combine: bool, start: Start, overlap: bool, shared: Shared | None = None,
) -> Tensor:  # fmt: skip
    """x [T, H], ids and weights [T, k] -> out, [T, H] or, without combine, [T, k, H]. Without ids and weights all rows are
    expert 0's.

    up [E, N, H] and down [E, H, I], whose last strides are 1. config: its tiles' columns, inner and warps. shared: added to
    one token's combined result, where gate and up are halves or apart and nothing has a bias.
    """
    tokens, hidden = x.shape
    k = 1 if ids is None else ids.shape[1]
    dense, ids, weights = ids is None, x if ids is None else ids, x if weights is None else weights
    experts, _, inner = down.each.shape
    first, second = config.first, config.second
    layout = up.layout(spec.layout)
    cols = first.columns if layout == "none" else first.columns // 2
    more = 0 if shared is None else shared.down.shape[1] // inner
    slots = triton.next_power_of_2(k + more)
    rows = tokens * k + more
    h = x.new_empty(rows, inner)
    constants = {
        "TOP_K": k, "COLS": cols, "BK": first.inner, "LAYOUT": layout, "BIAS": b1 is not None,
        "WEIGHT": spec.weight_on == "input", "EVEN_K": hidden % first.inner == 0, "TABLE": up.table is not None,
        "DENSE": dense, "SHARED": more, "OVERLAP": overlap,
    }  # fmt: skip
    gate_pointer, up_pointer = up.pointers
    shared_gate, shared_up = (x, x) if shared is None else (shared.gate, shared.up)
    (h,) = start(
        activations.bind(moe_vector_up, spec.activation), (triton.cdiv(inner, cols), rows),
        (
            x, gate_pointer, up_pointer, gate_pointer if b1 is None else b1, weights, h, ids, shared_gate, shared_up,
            hidden, inner, experts, x.stride(0), up.each.stride(0), up.each.stride(1), 0 if b1 is None else b1.stride(0),
        ),
        constants, ["out"], warps=first.warps, overlap=overlap,
    )  # fmt: skip
    # As many rows of weights a program as without shared experts.
    columns = max(1, second.columns * triton.next_power_of_2(k) // slots)
    constants = {
        "TOP_K": k, "SLOTS": slots, "COLS": columns, "BK": second.inner, "BIAS": b2 is not None,
        "WEIGHT": spec.weight_on == "output" and not dense, "EVEN_K": inner % second.inner == 0, "COMBINE": combine,
        "TABLE": down.table is not None, "DENSE": dense, "SHARED": more,
        "GATED": shared is not None and shared.factor is not None, "OVERLAP": overlap,
    }  # fmt: skip
    pointer, _ = down.pointers
    shared_down, factor = (x, None) if shared is None else (shared.down, shared.factor)
    (out,) = start(
        moe_vector_down, (triton.cdiv(hidden, columns), tokens),
        (
            h, pointer, pointer if b2 is None else b2, weights, out, ids, shared_down, x if factor is None else factor,
            inner, hidden, experts, spec.scale, down.each.stride(0), down.each.stride(1), 0 if b2 is None else b2.stride(0),
            shared_down.stride(0),
        ),
        constants, ["out"], warps=second.warps, overlap=overlap,
    )  # fmt: skip
    return out
