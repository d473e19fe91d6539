"""Graphs whose rotations may be written over what a projection made or into a cache, and a comparison with float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

B, S, ROOM, D, HIDDEN = 2, 3, 8, 32, 48
HEADS, GROUPS = 3, 2
Graph = Callable[..., tuple[Tensor, ...]]


def half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first columns turned, as many as the tables have."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = turned.chunk(2, -1)
    return torch.cat((turned * cos + torch.cat((-b, a), -1) * sin, rest), -1)


def make(batch: int = B, tokens: int = S, rotary: int = D) -> tuple[Tensor, ...]:
    """h [B, S, HIDDEN], weights of q and k, tables [S, rotary]"""
    angle = torch.rand(tokens, rotary // 2) * 6
    angle = torch.cat((angle, angle), -1)
    weights = torch.randn(HIDDEN, HEADS * D) / 7, torch.randn(HIDDEN, GROUPS * D) / 7
    return torch.randn(batch, tokens, HIDDEN), *weights, angle.cos(), angle.sin()


def heads(h: Tensor, weight: Tensor) -> Tensor:
    return (h @ weight).unflatten(-1, (-1, D)).transpose(1, 2)


def compare(graph: Graph, inputs: tuple[Tensor, ...], compile: Callable[[Graph], Graph]) -> None:
    """The compiled graph's results, and what it left in its inputs, against float64."""
    exact_inputs = [t.double() if t.is_floating_point() else t.clone() for t in inputs]
    exact = graph(*exact_inputs)
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        got = compile(lambda *a: graph(*a))(*inputs)
    for a, b in zip((*got, *inputs), (*exact, *exact_inputs), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------- over its input


def projected(h: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    return half(heads(h, wq), cos, sin), half(heads(h, wk), cos, sin)


def read_by_loops(h: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    q, k = projected(h, wq, wk, cos, sin)
    return torch.cat((q, k), 1), torch.cat((k, q), 1)


def read_again(h: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    q, k = heads(h, wq), heads(h, wk)
    return half(q, cos, sin), half(k, cos, sin), q


def inputs_themselves(h: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    x = h.unflatten(-1, (-1, 16)).transpose(1, 2)
    return (half(x, cos[:, :16], sin[:, :16]),)


def packed(h: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    q, k, v = heads(h, wq).split(1, 1)
    return half(q, cos, sin), half(k, cos, sin), v.relu()


#: graph, how many elements turn, what is told of the places
OVER: dict[str, tuple[Graph, int, str]] = {
    "what projections made": (projected, D, "q and k in place"),
    "a part that turns": (read_by_loops, D // 2, "q and k in place"),
    "a part that turns, returned": (projected, D // 2, ""),
    "what is read again": (read_again, D, "; k in place"),
    "the caller's tensors": (inputs_themselves, D, ""),
    "parts of one projection": (packed, D, ""),
}


# ------------------------------------------------------------------------------------------------- into a cache

INDEX = torch.tensor([6, 1, -3])


def static(h: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, index: Tensor) -> Any:
    """[B, H, ROOM, D], one list of positions for the batch, as transformers' StaticCache has it."""
    q, k = half(heads(h, wq), cos, sin), half(heads(h, wk), cos, sin)
    cache.index_copy_(2, index % ROOM, k)
    return q, cache.sum(2)


def by_index(h: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, index: Tensor) -> Any:
    q, k = half(heads(h, wq), cos, sin), half(heads(h, wk), cos, sin)
    cache[:, :, index] = k
    return q, cache


def paged(h: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, index: Tensor) -> Any:
    """[blocks, rows of a block, H, D], a row for each token of a flat batch."""
    q, k = half(heads(h, wq), cos, sin), half(heads(h, wk), cos, sin)
    cache.view(-1, GROUPS, D)[index] = k.transpose(1, 2).reshape(-1, GROUPS, D)
    return q, cache.sum(1)


def part(h: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, index: Tensor) -> Any:
    """Rows that are known when it is compiled."""
    q, k = half(heads(h, wq), cos, sin), half(heads(h, wk), cos, sin)
    cache[:, :, 2 : 2 + S] = k
    return q, cache.sum(2)


def normed(h: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, index: Tensor) -> Any:
    """An RMSNorm over the heads of both before they turn."""

    def norm(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    q, k = half(norm(heads(h, wq)), cos, sin), half(norm(heads(h, wk)), cos, sin)
    cache.index_copy_(2, index, k)
    return q, cache.sum(2)


CACHES: dict[str, tuple[Graph, int, int, tuple[int, ...], Tensor]] = {
    "static": (static, B, S, (B, GROUPS, ROOM, D), INDEX),
    "norms before": (normed, B, S, (B, GROUPS, ROOM, D), INDEX % ROOM),
    "by index, int32": (by_index, B, S, (B, GROUPS, ROOM, D), INDEX.int()),
    "one token": (static, B, 1, (B, GROUPS, ROOM, D), INDEX[:1]),
    "paged": (paged, 1, S, (3, 4, GROUPS, D), torch.tensor([11, 0, 5])),
    "paged, a batch of one token": (paged, 3, 1, (3, 4, GROUPS, D), torch.tensor([11, 0, 5])),
    "rows known": (part, B, S, (B, GROUPS, ROOM, D), INDEX),
}
