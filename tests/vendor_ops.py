"""Stand-ins for vendors' ops on CPU: their schemas, their checks, and results by plain float32 products and sums."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

SGL_GROUPED_MM = (
    "moe_grouped_mm_nt_xe20(Tensor! output, Tensor activations, Tensor weights, Tensor? bias, Tensor total_rows_for_experts, "
    "int n_experts, int activation_type, bool fuse_act, float gemm1_alpha=1.702, float gemm1_limit=7.0) -> ()"
)
SGL_TOPK = "topk_softmax(Tensor! topk_weights, Tensor! topk_indices, Tensor gating_output, bool renormalize) -> ()"
_QUANTIZED = "int N, int K, int num_experts, bool is_B_int4, bool is_B_mxfp4) -> Tensor"
_VLLM = "cutlass_grouped_gemm_interface(Tensor ptr_A, Tensor"
VLLM_GROUPED_MM = (
    f"{_VLLM} ptr_B, Tensor? ptr_scales, Tensor? ptr_bias, Tensor ptr_D, Tensor expert_first_token_offset, {_QUANTIZED}",
    f"{_VLLM} ptr_B, Tensor? ptr_scales, Tensor? ptr_bias, Tensor ptr_D, Tensor rows_per_expert, {_QUANTIZED}",
    f"{_VLLM}? ptr_A_scale, Tensor ptr_B, Tensor? ptr_B_scale, Tensor? ptr_bias, Tensor ptr_D, Tensor rows_per_expert, "
    "int N, int K, int num_experts) -> Tensor",
)


@contextmanager
def loaded(namespace: str, schema: str, body: Any = None, key: str = "CPU") -> Iterator[list[tuple[Any, ...]]]:
    """Registers an op for the time of the block; yields the arguments of its calls."""
    calls: list[tuple[Any, ...]] = []

    def run(*args: Any) -> Any:
        calls.append(args)
        return body(*args)

    library = torch.library.Library(namespace, "FRAGMENT")
    library.define(schema)
    library.impl(schema.partition("(")[0], run, key)
    try:
        yield calls
    finally:
        library._destroy()


def _blocks(out: Tensor, a: Tensor, counts: Tensor, rows: Any) -> None:
    """out[block e] = rows(a[block e], e); rows past the blocks are NaN, as memory that nobody wrote may be."""
    out.fill_(float("nan"))
    begin = 0
    for e, count in enumerate(counts.tolist()):
        out[begin : begin + count] = rows(a[begin : begin + count].float(), e).to(out.dtype)
        begin += count


def sgl_grouped_mm(
    out: Tensor, a: Tensor, w: Tensor, bias: Tensor | None, counts: Tensor, experts: int, kind: int, fuse: bool,
    alpha: float = 1.702, limit: float = 7.0,
) -> None:  # fmt: skip
    """src/sycl/GroupGemmXe20.cpp: weights [E, N, K]."""
    assert a.dtype == w.dtype == out.dtype == torch.bfloat16 and experts % 8 == 0 and a.is_contiguous()
    assert w.stride(2) == 1 and w.stride(0) == w.shape[1] * w.stride(1) and counts.dtype == torch.int32
    assert bias is None or (bias.dtype == torch.float32 and bias.is_contiguous())

    def rows(x: Tensor, e: int) -> Tensor:
        h = x @ w[e].float().T + (0 if bias is None else bias[e])
        if not fuse:
            return h
        if kind == 2:
            gate, up = h[:, 0::2].clamp(max=limit), h[:, 1::2].clamp(-limit, limit)
            return gate * torch.sigmoid(alpha * gate) * (up + 1)
        gate, up = h.chunk(2, 1)
        return (
            torch.nn.functional.silu(gate) if kind == 0 else torch.nn.functional.gelu(gate, approximate="tanh")
        ) * up

    _blocks(out, a, counts, rows)


def vllm_grouped_mm(form: int) -> Any:
    """csrc/xpu/grouped_gemm/xe_2/grouped_gemm_xe2_interface.hpp: weights [E, K, N]."""

    def product(a: Tensor, w: Tensor, out: Tensor, counts: Tensor, n: int, k: int, experts: int) -> Tensor:
        assert w.shape == (experts, k, n) and w.is_contiguous() and a.is_contiguous() and n % 8 == 0
        assert a.dtype == w.dtype == out.dtype and a.dtype in (torch.bfloat16, torch.float16)
        _blocks(out, a, counts, lambda x, e: x @ w[e].float())
        return out.clone()

    def by_offsets(
        a: Any, w: Any, s: Any, bias: Any, out: Any, offsets: Any, n: Any, k: Any, e: Any, *_: Any
    ) -> Tensor:
        assert s is None and bias is None and offsets.dtype == torch.int64 and offsets.shape == (e + 1,)
        return product(a, w, out, offsets.diff(), n, k, e)

    def by_counts(a: Any, w: Any, s: Any, bias: Any, out: Any, counts: Any, n: Any, k: Any, e: Any, *_: Any) -> Tensor:
        assert s is None and bias is None and counts.dtype == torch.int32 and counts.shape == (e,)
        return product(a, w, out, counts, n, k, e)

    def newest(a: Any, sa: Any, w: Any, sw: Any, bias: Any, out: Any, counts: Any, n: Any, k: Any, e: Any) -> Tensor:
        assert sa is None
        return by_counts(a, w, sw, bias, out, counts, n, k, e)

    return (by_offsets, by_counts, newest)[form]


def sgl_topk(weights: Tensor, ids: Tensor, logits: Tensor, renormalize: bool) -> None:
    """src/sycl/TopKSoftMax.cpp."""
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32 and logits.is_contiguous()
    assert logits.dtype in (torch.bfloat16, torch.float16) and logits.shape[1] <= 256 and ids.shape[1] <= 8
    values, chosen = logits.float().softmax(-1).topk(ids.shape[1])
    weights.copy_(values / values.sum(-1, keepdim=True) if renormalize else values)
    ids.copy_(chosen)


SGL_SIGMOID = (
    "topk_sigmoid(Tensor! topk_weights, Tensor! topk_indices, Tensor gating_output, bool renormalize, "
    "Tensor? correction_bias, float routed_scaling_factor=1.0, int num_fused_shared_experts=0) -> ()"
)
_GATE = (
    "moe_fused_gate(Tensor input, Tensor bias, int num_expert_group, int topk_group, int topk, "
    "int num_fused_shared_experts, "
)
_GATE_END = "float routed_scaling_factor, bool apply_routed_scaling_factor_on_output) -> Tensor[]"
SGL_GATE = (f"{_GATE}int scoring_func, {_GATE_END}", f"{_GATE}{_GATE_END}")
SGL_ROTARY = (
    "rotary_embedding(Tensor positions, Tensor query, Tensor key, int head_size, Tensor cos_sin_cache, bool is_neox) "
    "-> (Tensor, Tensor)"
)
_VLLM_TOPK = (
    "(Tensor! topk_weights, Tensor! topk_indices, Tensor! token_expert_indices, Tensor gating_output, bool renormalize"
)
VLLM_SOFTMAX = tuple(
    f"topk_softmax{_VLLM_TOPK}{more}) -> ()" for more in (", Tensor? bias, Tensor? is_padding", ", Tensor? bias", "")
)
VLLM_SIGMOID = tuple(
    f"topk_sigmoid{_VLLM_TOPK}, Tensor? bias{more}) -> ()"
    for more in (", float routed_scaling_factor, Tensor? is_padding", "")
)
VLLM_GROUPED_TOPK = (
    "fused_grouped_topk(Tensor hidden_states, Tensor gating_output, int n_topk, bool renormalize, int n_expert_group, "
    "int n_topk_group, str scoring_func, float routed_scaling_factor, Tensor? bias=None) -> (Tensor, Tensor)"
)
VLLM_ROTARY = (
    "rotary_embedding(Tensor positions, Tensor! query, Tensor!? key, int head_size, Tensor cos_sin_cache, bool is_neox) "
    "-> ()"
)
IPEX_ROTATE = {
    half: f"apply_rotary_embedding_{'half' if half else 'two'}(Tensor _0, Tensor _1, Tensor _2, Tensor _3) -> ()"
    for half in (True, False)
}
IPEX_SOFTMAX = "topk_softmax(Tensor _0, int _1, bool _2) -> (Tensor _0, Tensor _1)"


def _write(weights: Tensor, ids: Tensor, choice: Tensor, scores: Tensor, renormalize: bool) -> None:
    """The largest choices' ids, and their scores as weights."""
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32 and weights.is_contiguous()
    chosen = choice.topk(ids.shape[1]).indices
    values = scores.gather(-1, chosen)
    weights.copy_(values / values.sum(-1, keepdim=True) if renormalize else values)
    ids.copy_(chosen)


def sgl_sigmoid(
    weights: Tensor,
    ids: Tensor,
    logits: Tensor,
    renormalize: bool,
    bias: Tensor | None,
    scale: float = 1.0,
    shared: int = 0,
) -> None:
    """src/sycl/TopKSigMoid.cpp."""
    assert logits.is_contiguous() and logits.shape[1] <= 256 and ids.shape[1] <= min(8, logits.shape[1])
    assert bias is None or (bias.dtype == torch.float32 and bias.shape == logits.shape[1:])
    scores = logits.float().sigmoid()
    _write(weights, ids, scores if bias is None else scores + bias, scores, renormalize)


def _grouped(scores: Tensor, bias: Tensor | None, groups: int, open_groups: int, top2: bool) -> Tensor:
    """Choices [T, E], minus infinity in closed groups."""
    choice = scores if bias is None else scores + bias
    by_group = choice.unflatten(-1, (groups, -1))
    rank = by_group.topk(2).values.sum(-1) if top2 else by_group.amax(-1)
    kept = torch.zeros_like(rank, dtype=torch.bool).scatter(-1, rank.topk(open_groups).indices, True)
    return by_group.masked_fill(~kept[..., None], float("-inf")).flatten(-2)


def sgl_gate(form: int) -> Any:
    """src/sycl/MoE_fused_gate.cpp: always divided by the sum."""

    def gate(
        logits: Tensor, bias: Tensor, groups: int, open_groups: int, k: int, shared: int, *rest: Any
    ) -> list[Tensor]:
        kind = rest[0] if form == 0 else 0
        assert logits.dtype == bias.dtype and shared == 0 and rest[-2:] == (1.0, False) and kind in (0, 1)
        scores = logits.softmax(-1) if kind else logits.sigmoid()
        weights, ids = logits.new_empty(len(logits), k), logits.new_empty(len(logits), k, dtype=torch.int32)
        _write(weights, ids, _grouped(scores, bias, groups, open_groups, True), scores, True)
        return [weights, ids]

    return gate


def vllm_topk(scoring: str) -> Any:
    """csrc/moe/topk.cpp: a sigmoid is rounded to the logits' dtype."""

    def topk(
        weights: Tensor, ids: Tensor, rows: Tensor, logits: Tensor, renormalize: bool,
        bias: Tensor | None = None, *rest: Any,
    ) -> None:  # fmt: skip
        assert rows.dtype == torch.int32 and rows.shape == ids.shape and logits.is_contiguous()
        assert rest in ((), (None,), (1.0, None)) and (bias is None or bias.dtype == torch.float32)
        wide = logits.float()
        scores = wide.softmax(-1) if scoring == "softmax" else wide.sigmoid().to(logits.dtype).float()
        _write(weights, ids, scores if bias is None else scores + bias, scores, renormalize)

    return topk


def vllm_grouped_topk(
    x: Tensor, logits: Tensor, k: int, renormalize: bool, groups: int, open_groups: int, scoring: str, scale: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """csrc/moe/fused_grouped_topk.cpp: groups by their best two with a bias, by their best without."""
    assert x.shape[0] == logits.shape[0] and scoring == "sigmoid" and scale == 1.0 and groups <= 32
    scores = logits.float().sigmoid()
    weights, ids = scores.new_empty(len(logits), k), scores.new_empty(len(logits), k, dtype=torch.int32)
    _write(weights, ids, _grouped(scores, bias, groups, open_groups, bias is not None), scores, renormalize)
    return weights, ids


def ipex_softmax(logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """csrc/gpu/aten/operators/MoeOps.cpp."""
    assert k in (1, 2, 4, 8) and logits.shape[1] <= 32
    scores = logits.float().softmax(-1)
    weights, ids = scores.new_empty(len(logits), k), scores.new_empty(len(logits), k, dtype=torch.int32)
    _write(weights, ids, scores, scores, renormalize)
    return weights, ids


def _pairs(x: Tensor, half: bool) -> Tensor:
    """What each element is turned against: minus the second of its pair, or the first."""
    a, b = x.chunk(2, -1) if half else (x[..., 0::2], x[..., 1::2])
    return torch.cat((-b, a), -1) if half else torch.stack((-b, a), -1).flatten(-2)


def rotary(positions: Tensor, query: Tensor, key: Tensor | None, size: int, table: Tensor, neox: bool) -> Any:
    """sgl-kernel-xpu's src/sycl/Rope.cpp and vLLM's csrc/pos_encoding_kernels.cpp: rows [T, H * D] turn where they are."""
    assert positions.dtype == torch.int64 and query.ndim == 2 and table.dtype == query.dtype
    for rows in (query, key):
        if rows is not None and rows.numel():
            heads, width = rows.view(len(rows), -1, size), table.shape[1]
            cos, sin = table[positions].float()[:, None].chunk(2, -1)
            wide = (lambda t: torch.cat((t, t), -1)) if neox else (lambda t: t.repeat_interleave(2, -1))
            part = heads[..., :width].float()
            heads[..., :width] = (part * wide(cos) + _pairs(part, neox) * wide(sin)).to(rows.dtype)
    return (query, key)


def vllm_rotary(*args: Any) -> None:
    rotary(*args)


def ipex_rotate(half: bool) -> Any:
    """csrc/gpu/aten/operators/Rope.cpp: sin before cos, the result last."""

    def rotate(x: Tensor, sin: Tensor, cos: Tensor, out: Tensor) -> None:
        assert x.ndim == sin.ndim and x.shape[-1] == sin.shape[-1] == cos.shape[-1]
        out.copy_((x.float() * cos.float() + _pairs(x.float(), half) * sin.float()).to(x.dtype))

    return rotate
