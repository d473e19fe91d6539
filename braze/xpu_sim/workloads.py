"""Calls that between them launch every Triton kernel of braze's in every form it is generated in, and with the tiles it ships.

Sizes specialise a kernel as real ones do (divisible by 16); memory is not filled, since what is wanted is the code.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from braze.kernels.spec import MoeSpec, RopeSpec, RouteSpec
from braze.kernels.triton import align, compat, moe, rope, route, separate
from braze.kernels.triton.weights import Weights
from braze.kernels.turning import Norm

SILU = "g*u*sigmoid(g)"
GPT_OSS = "(Min(Max(u, -7.0), 7.0) + 1.0) * Min(g, 7.0) * sigmoid(1.702*Min(g, 7.0))"
RELU2 = "Max(g, 0.0)**2"
BF16 = torch.bfloat16
TOKENS = (1, 8, 32, 128, 512, 2048, 8192)


@dataclass(frozen=True)
class Workload:
    """A call that launches kernels, and what it stands for in words. shipped: with the tiles chosen for a model's shape;
    matrix: its products' loops must have DPAS and 2D block loads."""

    name: str
    call: Callable[[], Any]
    shipped: bool = False
    matrix: bool = False


@dataclass(frozen=True)
class Experts:
    """Sizes and form of an expert layer; bias: its dtype; aligned: whether weights begin where 2D block loads can; stored:
    "stacked", "apart" where gate and up are two tensors, "separate" where each expert's are besides."""

    spec: MoeSpec
    experts: int = 8
    top_k: int = 2
    hidden: int = 1024
    intermediate: int = 512
    dtype: torch.dtype = BF16
    bias: torch.dtype | None = None
    aligned: bool = True
    stored: str = "stacked"

    def weights(self) -> tuple[Tensor, Tensor]:
        columns = self.intermediate * (1 if self.spec.layout == "none" else 2)
        shapes = [(self.experts, columns, self.hidden), (self.experts, self.hidden, self.intermediate)]
        if self.spec.transposed:
            shapes = [(e, k, n) for e, n, k in shapes]
        offset = 0 if self.aligned else 1
        w1, w2 = (torch.empty(offset + e * n * k, dtype=self.dtype)[offset:].view(e, n, k) for e, n, k in shapes)
        return w1, w2

    def launch(self, tokens: int) -> None:
        w1, w2 = self.weights()
        columns = self.intermediate * (1 if self.spec.layout == "none" else 2)
        b1, b2 = (
            None if self.bias is None else torch.empty(self.experts, n, dtype=self.bias) for n in (columns, self.hidden)
        )
        x = torch.empty(tokens, self.hidden, dtype=self.dtype)
        ids, weights = torch.zeros(tokens, self.top_k, dtype=torch.int64), torch.zeros(tokens, self.top_k)
        moe.run(x, ids, weights, *self.stores(w1, w2), b1, b2, self.spec)

    def stores(self, w1: Tensor, w2: Tensor) -> tuple[Tensor | Weights, Tensor | Weights]:
        if self.stored == "stacked":
            return w1, w2
        gate, up = (torch.empty_like(half) for half in w1.chunk(2, 2 if self.spec.transposed else 1))
        if self.stored == "apart":
            return Weights(gate, up), w2
        pairs = [w for pair in zip(gate, up, strict=True) for w in pair]
        return separate.stacked(pairs, w2.unbind())


#: The expert layers whose tiles are shipped: those of the models as transformers has them.
MODELS = {
    "mixtral": Experts(MoeSpec(SILU), 8, 2, 4096, 14336),
    "llama4": Experts(MoeSpec(SILU, transposed=True, weight_on="input"), 16, 1, 5120, 8192),
    "gpt_oss": Experts(MoeSpec(GPT_OSS, "interleaved", transposed=True), 32, 4, 2880, 2880, bias=BF16),
    "qwen3": Experts(MoeSpec(SILU), 128, 8, 2048, 768),
    "deepseek": Experts(MoeSpec(SILU), 64, 6, 2048, 1408),
}

_HALVES, _INTERLEAVED = MoeSpec(SILU), MoeSpec(GPT_OSS, "interleaved", transposed=True)
#: What changes the code of an expert product, one after the other.
FORMS = {
    "halves": Experts(_HALVES),
    "halves transposed": Experts(replace(_HALVES, transposed=True)),
    "interleaved": Experts(replace(_INTERLEAVED, transposed=False)),
    "interleaved transposed": Experts(_INTERLEAVED),
    "no gate": Experts(MoeSpec(RELU2, "none")),
    "no gate transposed": Experts(MoeSpec(RELU2, "none", transposed=True)),
    "halves, bias bf16": Experts(_HALVES, bias=BF16),
    "halves, bias fp32": Experts(_HALVES, bias=torch.float32),
    "interleaved transposed, bias bf16": Experts(_INTERLEAVED, bias=BF16),
    "interleaved transposed, bias fp32": Experts(_INTERLEAVED, bias=torch.float32),
    "halves transposed, weight on input, k 1": Experts(replace(_HALVES, transposed=True, weight_on="input"), top_k=1),
    "halves, weight on input, bias fp32": Experts(replace(_HALVES, weight_on="input"), bias=torch.float32),
    "halves, result fp32": Experts(replace(_HALVES, out_dtype=torch.float32, scale=2.5)),
    "halves, fp16": Experts(_HALVES, dtype=torch.float16),
    "interleaved transposed, fp16": Experts(_INTERLEAVED, dtype=torch.float16),
    "halves, fp32": Experts(_HALVES, dtype=torch.float32),
    "interleaved transposed, fp32": Experts(_INTERLEAVED, dtype=torch.float32),
    "apart": Experts(_HALVES, stored="apart"),
    "apart transposed, bias bf16": Experts(replace(_HALVES, transposed=True), bias=BF16, stored="apart"),
    "separate, bias fp32": Experts(_HALVES, bias=torch.float32, stored="separate"),
    "separate transposed": Experts(replace(_HALVES, transposed=True), stored="separate"),
    "halves, unaligned": Experts(_HALVES, aligned=False),
    "interleaved transposed, unaligned": Experts(_INTERLEAVED, aligned=False),
}


def workloads() -> Iterator[Workload]:
    yield from rope_workloads()
    yield from route_workloads()
    yield from sort_workloads()
    yield from expert_workloads()
    yield from model_workloads()


def expert_workloads() -> Iterator[Workload]:
    ways = {"rows by ids": 4, "sorted": 64, "many rows": 2048}
    for (name, case), (way, tokens) in itertools.product(FORMS.items(), ways.items()):
        matrix = case.aligned and case.dtype.itemsize == 2
        yield Workload(f"{name}, {way}", partial(case.launch, tokens), matrix=matrix)


def model_workloads() -> Iterator[Workload]:
    for (name, case), tokens in itertools.product(MODELS.items(), TOKENS):
        yield Workload(f"{name}, {tokens} tokens", partial(case.launch, tokens), shipped=True, matrix=True)


def sort_workloads() -> Iterator[Workload]:
    """The sort by itself; the sum over a token's experts comes with the experts."""

    def sort(rows: int, experts: int, tile: int, dtype: torch.dtype) -> Callable[[], Any]:
        ids = torch.zeros(rows, 1, dtype=dtype)
        return lambda: align.align(ids, experts, tile, compat.start, False)

    for rows, experts, tile, dtype in (
        (64, 8, 16, torch.int64),
        (1024, 512, 16, torch.int64),
        (4096, 8, 64, torch.int64),
        (4096, 128, 64, torch.int32),
        (65536, 512, 256, torch.int64),
    ):
        kind = str(dtype).removeprefix("torch.")
        name = f"{rows} rows, {experts} experts, tiles of {tile}, {kind}"
        yield Workload(name, sort(rows, experts, tile, dtype))


def route_workloads() -> Iterator[Workload]:
    groups: dict[str, Any] = {"groups": 8, "top_groups": 4, "group_score": "top2", "closed": "zero"}
    specs: dict[str, tuple[RouteSpec, int, bool]] = {
        "softmax, 8 experts": (RouteSpec(2, renorm="add"), 8, False),
        "softmax, 128 experts": (RouteSpec(8, renorm="add"), 128, False),
        "softmax over the chosen, 32 experts": (RouteSpec(4, renorm="add", select_on="logits"), 32, False),
        "sigmoid, bias, groups, 256 experts": (
            RouteSpec(8, "sigmoid", renorm="add", eps=1e-20, scale=2.5, **groups), 256, True,
        ),
        "sqrt of softplus, bias, 256 experts": (RouteSpec(8, "sqrtsoftplus", renorm="add"), 256, True),
        "sigmoid, 1 of 16 experts": (RouteSpec(1, "sigmoid"), 16, False),
        "softmax, 1024 experts": (RouteSpec(8), 1024, False),
    }  # fmt: skip
    for name, (spec, experts, bias) in specs.items():
        for dtype in (BF16, torch.float32):
            logits, extra = torch.zeros(64, experts, dtype=dtype), torch.zeros(experts) if bias else None
            yield Workload(
                f"{name}, {dtype}".replace("torch.", ""),
                partial(route.run, logits, extra, spec),
            )


def rope_workloads() -> Iterator[Workload]:
    def make(
        size: int,
        spec: RopeSpec,
        norm: bool = False,
        in_place: bool = False,
        wide: bool = True,
        dtype: torch.dtype = BF16,
    ) -> Callable[[], Any]:
        q, k = (torch.zeros(1, 16, heads, size, dtype=dtype).transpose(1, 2) for heads in (32, 16))
        cos, sin = (torch.zeros(1, 16, spec.rotary_dim // (1 if wide else 2), dtype=dtype) for _ in range(2))
        weight = torch.ones(size, dtype=dtype)
        before = Norm(1e-6, weight, weight) if norm else None
        return lambda: rope.run(q, k, cos, sin, spec, norm=before, in_place=in_place)

    interleaved = RopeSpec(128, layout_in="interleaved", layout_out="interleaved")
    yield Workload("half, D 64", make(64, RopeSpec(64)))
    yield Workload("half, D 128", make(128, RopeSpec(128)))
    yield Workload("half, D 128, fp16", make(128, RopeSpec(128), dtype=torch.float16))
    yield Workload("half, D 128, fp32", make(128, RopeSpec(128), dtype=torch.float32))
    yield Workload("half, D 128, tables of R/2", make(128, RopeSpec(128), wide=False))
    yield Workload("half, D 128, in place", make(128, RopeSpec(128), in_place=True))
    yield Workload("half, D 128, inverse", make(128, replace(RopeSpec(128), inverse=True)))
    yield Workload("half, D 256", make(256, RopeSpec(256)))
    yield Workload("half, D 512", make(512, RopeSpec(512)))
    yield Workload("interleaved, D 128", make(128, interleaved))
    yield Workload("interleaved to half, D 64", make(64, RopeSpec(64, layout_in="interleaved")))
    yield Workload("half, 64 of 128", make(128, RopeSpec(64)))
    yield Workload("half, 64 of 256, in place", make(256, RopeSpec(64), in_place=True))
    yield Workload("interleaved, last 64 of 192", make(192, replace(interleaved, rotary_dim=64, start=128)))
    yield Workload("RMSNorm, half, D 128", make(128, RopeSpec(128), norm=True))
    yield Workload("RMSNorm, half, D 256", make(256, RopeSpec(256), norm=True))
    yield Workload("RMSNorm, half, 64 of 256", make(256, RopeSpec(64), norm=True))
    yield Workload("RMSNorm, interleaved, D 128", make(128, interleaved, norm=True))
