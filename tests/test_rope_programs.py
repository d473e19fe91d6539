"""Programs put together at random around a rotation, compiled for good: what a graph reads again, writes over or returns.

Where a rotation is written (over its input, into a cache, to a buffer of its own) depends on everything that its graph does
with q and k. Whatever that is, results and what is left in the inputs are those of the program in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from tests.rope_graphs import compare, half

HIDDEN, ROOM = 24, 16
Turn = Callable[[Tensor, Tensor, Tensor], Tensor]


def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotary = cos.shape[-1]
    a, b = x[..., :rotary:2], x[..., 1:rotary:2]
    c, s = cos[..., : rotary // 2], sin[..., : rotary // 2]
    return torch.cat((torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2), x[..., rotary:]), -1)


def in_place(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotary = cos.shape[-1]
    x[..., :rotary] = half(x[..., :rotary].clone(), cos, sin)
    return x


def normed(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return half(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), cos, sin)


def twice(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return half(half(x, cos, sin), cos, sin)


TURNS: dict[str, Turn] = {t.__name__: t for t in (half, interleaved, in_place, normed, twice)}
SOURCES = ("projections", "one projection", "split", "inputs", "parts of an input", "k is q", "k is a part of q")
ENDS = ("heads", "rows", "attention", "cache by index", "cache by rows", "joined")
ALSO = ("q before", "k before", "sum of q before", "both", "columns of q", "added")


@dataclass(frozen=True)
class Program:
    """sizes: batch, tokens, heads of q and of k, head size, how many elements turn; heads_first: [B, H, S, D] when they turn;
    table_of_each: of the batch; wide_tables: in float64."""

    source: str
    turns: tuple[str, str]
    end: str
    also: frozenset[str]
    heads_first: bool
    sizes: tuple[int, int, int, int, int, int]
    table_of_each: bool
    wide_tables: bool

    def inputs(self) -> list[Tensor]:
        """x, weights of q, k and all three, q, k, all three, cos, sin, cache, rows of the cache."""
        batch, tokens, q, k, head, rotary = self.sizes
        rng = torch.Generator().manual_seed(0)
        all_heads = q + 2 * k
        shapes = [(batch, tokens, HIDDEN), *((n * head, HIDDEN) for n in (q, k, all_heads))]
        shapes += [(batch, tokens, n, head) for n in (q, k, all_heads)]
        angle = torch.rand(batch if self.table_of_each else 1, tokens, rotary // 2, generator=rng) * 6
        angle = torch.cat((angle, angle), -1)
        cache = torch.randn(batch, ROOM, max(q, k), head, generator=rng)
        rows = torch.stack([torch.randperm(ROOM, generator=rng)[:tokens] for _ in range(batch)])
        tables = (t.double() if self.wide_tables else t for t in (angle.cos(), angle.sin()))
        return [*(torch.randn(s, generator=rng) for s in shapes), *tables, cache, rows]

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        q, k, out = self.heads(*inputs[:7])
        cos, sin, cache, rows = inputs[7:]
        if self.heads_first:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        cos, sin = (t.unsqueeze(1 if self.heads_first else 2) for t in (cos, sin))
        before = q, k
        out += [
            t for name, t in (("q before", q), ("k before", k * 2), ("sum of q before", q.sum(-1))) if name in self.also
        ]
        q, k = (TURNS[name](t, cos, sin).to(t.dtype) for name, t in zip(self.turns, (q, k), strict=True))
        out += [q + before[0]] if "both" in self.also else []
        out += [q[..., 1:3]] if "columns of q" in self.also else []
        q = q + before[0] if "added" in self.also else q
        return out + self.finish(q, k, cache, rows)

    def heads(
        self, x: Tensor, wq: Tensor, wk: Tensor, w: Tensor, q: Tensor, k: Tensor, packed: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """q, k [B, S, H, D], and what else of them is a result."""
        lead, (h, g, d) = x.shape[:2], self.sizes[2:5]
        out: list[Tensor] = []
        if self.source in ("projections", "k is q", "k is a part of q"):
            q, k = linear(x, wq).view(*lead, h, d), linear(x, wk).view(*lead, g, d)
        elif self.source == "one projection":
            packed = linear(x, w).view(*lead, -1, d)
        elif self.source == "split":
            q, k, v = linear(x, w).split([h * d, g * d, g * d], -1)
            q, k, out = q.view(*lead, h, d), k.view(*lead, g, d), [v + 1]
        if self.source in ("one projection", "parts of an input"):
            q, k = packed[:, :, :h], packed[:, :, h : h + g]
        if self.source.startswith("k is"):
            k = q if self.source == "k is q" else q[:, :, :g]
        return q, k, out

    def finish(self, q: Tensor, k: Tensor, cache: Tensor, rows: Tensor) -> list[Tensor]:
        first = (q, k) if self.heads_first else (q.transpose(1, 2), k.transpose(1, 2))
        last = first[0].transpose(1, 2), first[1].transpose(1, 2)
        if self.end == "rows":
            return [last[0].flatten(2), last[1].flatten(2)]
        if self.end == "attention":
            keys = first[1].repeat_interleave(q.shape[1 if self.heads_first else 2] // first[1].shape[1], 1)
            return [scaled_dot_product_attention(first[0], keys, keys), k]
        if self.end == "cache by index":
            batch = torch.arange(len(rows)).unsqueeze(1)
            cache[:, :, : last[1].shape[2]].index_put_((batch, rows), last[1])
            return [q, cache.sum(1)]
        if self.end == "cache by rows":
            cache[:, 1 : 1 + rows.shape[1], : last[1].shape[2]] = last[1]
            return [q]
        return [torch.cat((k, k * 0 + 1), 1), q] if self.end == "joined" else [q, k]


@st.composite
def programs(draw: st.DrawFn) -> Program:
    head, groups = draw(st.sampled_from((8, 24, 32))), draw(st.sampled_from((1, 2)))
    rotary = draw(st.sampled_from((head, head // 2, 4)))
    sizes = (
        draw(st.sampled_from((1, 2))),
        draw(st.sampled_from((1, 3, 9))),
        groups * draw(st.sampled_from((1, 3))),
        groups,
    )
    turns = draw(st.sampled_from(tuple(TURNS)))
    other = draw(st.sampled_from((turns, turns, *TURNS)))
    also = draw(st.frozensets(st.sampled_from(ALSO), max_size=2))
    return Program(
        draw(st.sampled_from(SOURCES)), (turns, other), draw(st.sampled_from(ENDS)), also, draw(st.booleans()),
        (*sizes, head, rotary), draw(st.booleans()), draw(st.booleans()),
    )  # fmt: skip


@pytest.mark.parametrize("number", range(4))
def test_whatever_a_graph_does_with_q_and_k(number: int) -> None:
    @seed(number)
    @settings(max_examples=6, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(programs())
    def check(program: Program) -> None:
        compare(program, tuple(program.inputs()), lambda f: torch.compile(f, backend="braze", options={"strict": True}))

    check()
