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
