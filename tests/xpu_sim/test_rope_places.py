"""Where the rotary kernel writes: over what a projection made, straight into a cache, and elsewhere where it may not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from braze import xpu_sim
from braze.backend import collect
from tests import rope_models, tiny

B, S, ROOM, D, HIDDEN = 2, 3, 8, 32, 48
HEADS, GROUPS = 3, 2


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


Graph = Callable[..., tuple[Tensor, ...]]


def run(graph: Graph, inputs: tuple[Tensor, ...], dynamic: bool = False) -> tuple[list[str], str]:
    """The launches' names and braze's words, after a check of the results and of what the graph left in its inputs."""
    exact_inputs = [t.double() if t.is_floating_point() else t.clone() for t in inputs]
    exact = graph(*exact_inputs)
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        torch._dynamo.reset()
        with xpu_sim.compiled_graphs("pvc"), xpu_sim.record() as launches, collect() as reports:
            got = torch.compile(lambda *a: graph(*a), backend="braze", dynamic=dynamic)(*inputs)
    for a, b in zip((*got, *inputs), (*exact, *exact_inputs), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5)
    return [x.kernel for x in launches], "; ".join(s.why for r in reports for s in r.sites)


def test_over_what_the_projections_made() -> None:
    """One launch, and neither a buffer nor a clone."""

    def graph(h: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return half(heads(h, wq), cos, sin), half(heads(h, wk), cos, sin)

    names, words = run(graph, make())
    assert names == ["rope_kernel"]
    assert words.count("q and k in place") == 2


def test_a_part_that_turns_is_all_that_is_touched() -> None:
    """The model's concatenation would lie otherwise; what reads it is a loop, which takes it as it lies."""

    def graph(h: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        q, k = half(heads(h, wq), cos, sin), half(heads(h, wk), cos, sin)
        return torch.cat((q, k), 1), torch.cat((k, q), 1)

    def returned(h: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return half(heads(h, wq), cos, sin), half(heads(h, wk), cos, sin)

    _, words = run(graph, make(rotary=16))
    assert words.count("q and k in place") == 2
    names, words = run(returned, make(rotary=16))
    assert names == ["rope_kernel"] and "in place" not in words


def test_not_over_what_is_read_again() -> None:
    def graph(h: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        q, k = heads(h, wq), heads(h, wk)
        return half(q, cos, sin), half(k, cos, sin), q

    names, words = run(graph, make())
    assert names == ["rope_kernel"]
    assert words.count("; k in place") == 2


def test_not_over_the_callers_tensors_nor_parts_of_one_projection() -> None:
    def inputs_themselves(h: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        x = h.unflatten(-1, (-1, 16)).transpose(1, 2)
        return (half(x, cos[:, :16], sin[:, :16]),)

    def packed(h: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        q, k, v = heads(h, wq).split(1, 1)
        return half(q, cos, sin), half(k, cos, sin), v.relu()

    for graph in (inputs_themselves, packed):
        names, words = run(graph, make())
        assert names.count("rope_kernel") == 1
        assert "in place" not in words


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


CACHES = {
    "static": (static, B, S, (B, GROUPS, ROOM, D), INDEX),
    "by index, int32": (by_index, B, S, (B, GROUPS, ROOM, D), INDEX.int()),
    "one token": (static, B, 1, (B, GROUPS, ROOM, D), INDEX[:1]),
    "paged": (paged, 1, S, (3, 4, GROUPS, D), torch.tensor([11, 0, 5])),
    "paged, a batch of one token": (paged, 3, 1, (3, 4, GROUPS, D), torch.tensor([11, 0, 5])),
    "rows known": (part, B, S, (B, GROUPS, ROOM, D), INDEX),
}


@pytest.mark.parametrize("name", CACHES)
def test_k_goes_straight_into_its_cache(name: str) -> None:
    """One launch; what else runs reads the cache."""
    graph, batch, tokens, shape, index = CACHES[name]
    names, words = run(graph, (*make(batch, tokens), torch.randn(shape), index))
    assert names.count("rope_kernel") == 1 and len(names) <= 3, names
    assert words.count("q in place, k straight into its cache") == 2, words


def test_a_models_static_cache() -> None:
    """transformers' own: one launch a layer, and no other kernel that writes k."""
    transformers = pytest.importorskip("transformers")
    model, ids = rope_models.build("qwen3"), tiny.tokens()[:, :5]
    config = model.config

    def cache(dtype: torch.dtype) -> Any:
        made = transformers.StaticCache(config=config, max_cache_len=16)
        made.early_initialization(ids.shape[0], config.num_key_value_heads, config.head_dim, dtype, ids.device)
        return made

    exact_cache, own = cache(torch.float64), cache(torch.float32)
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        exact = tiny.as_float64(model)(ids, past_key_values=exact_cache).logits
        torch._dynamo.reset()
        with xpu_sim.compiled_graphs("pvc"), xpu_sim.record() as launches, collect() as reports:
            got = torch.compile(model, backend="braze", dynamic=False)(ids, past_key_values=own).logits
    assert [x.kernel for x in launches if "rope" in x.kernel] == ["rope_kernel"]
    assert all("k straight into its cache" in s.why for s in reports[0].sites), reports[0].sites
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own.layers[0].keys.double(), exact_cache.layers[0].keys, rtol=1e-4, atol=1e-5)
