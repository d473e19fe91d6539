"""Which writes into a cache a launch can make, and the reason where it can't; the launches are in tests/xpu_sim."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from braze.lowering import places
from tests.harness import Fused

B, H, S, D, ROOM = 2, 3, 4, 16, 8
INDEX = torch.tensor([5, 1, 0, 7])


def half(x: Tensor, a: Tensor) -> Tensor:
    c, s = a.cos().repeat(1, 2), a.sin().repeat(1, 2)
    first, second = x.chunk(2, -1)
    return x * c + torch.cat((-second, first), -1) * s


def by_copy(x: Tensor, a: Tensor, cache: Tensor, rows: Tensor) -> Any:
    cache.index_copy_(2, rows, half(x, a))


def by_index(x: Tensor, a: Tensor, cache: Tensor, rows: Tensor) -> Any:
    cache[:, :, rows] = half(x, a)
    return cache


def known_rows(x: Tensor, a: Tensor, cache: Tensor, rows: Tensor) -> Any:
    cache[:, :, 2 : 2 + S] = half(x, a)
    return cache.sum()


def flat(x: Tensor, a: Tensor, cache: Tensor, rows: Tensor) -> Any:
    """A row for each token of the batch; x is [B, S, H, D]."""
    c, s = (t.repeat(1, 2)[:, None] for t in (a.cos(), a.sin()))
    x = x.transpose(1, 2)
    first, second = x.chunk(2, -1)
    k = x * c + torch.cat((-second, first), -1) * s
    cache.view(-1, H, D)[rows.repeat(B)] = k.reshape(B * S, H, D)
    return cache.sum()


def grows(x: Tensor, a: Tensor, cache: Tensor, rows: Tensor) -> Any:
    return torch.cat((cache, half(x, a)), 2)


def twice(x: Tensor, a: Tensor, cache: Tensor, rows: Tensor) -> Any:
    k = half(x, a)
    cache[:, :, rows] = k
    return k


def paired_indices(x: Tensor, a: Tensor, cache: Tensor, rows: Tensor) -> Any:
    cache[rows // 4, :, rows % 4] = half(x, a)[0].transpose(0, 1)


def added(x: Tensor, a: Tensor, cache: Tensor, rows: Tensor) -> Any:
    torch.ops.aten.index_put_(cache, [None, None, rows], half(x, a), True)


def own_cache(x: Tensor, a: Tensor, cache: Tensor, rows: Tensor) -> Any:
    return torch.zeros_like(cache).index_copy(2, rows, half(x, a))


def not_updated(x: Tensor, a: Tensor, cache: Tensor, rows: Tensor) -> Any:
    return cache.index_copy(2, rows, half(x, a))


def half_of_it(x: Tensor, a: Tensor, cache: Tensor, rows: Tensor) -> Any:
    cache[1:, :, :S] = half(x, a)[1:]


def other_dimension(x: Tensor, a: Tensor, cache: Tensor, rows: Tensor) -> Any:
    cache[:, rows[:H] % H, :S] = half(x, a)


CACHE = (B, H, ROOM, D)
DENSE = (H * ROOM * D, D, ROOM * D)
FITS: dict[str, tuple[Callable[..., Any], tuple[int, ...], tuple[Any, ...], int]] = {
    "index_copy": (by_copy, CACHE, (DENSE, (0, 1)), 0),
    "index_put": (by_index, CACHE, (DENSE, (0, 1)), 0),
    "rows that are known": (known_rows, CACHE, (DENSE, (0, 1)), 2),
    "a row for each token": (flat, (4, 2, H, D), ((0, H * D, D), (S, 1)), 0),
}
DOES_NOT: dict[str, tuple[Callable[..., Any], str]] = {
    "concatenation": (grows, "a new tensor"),
    "another use": (twice, "used elsewhere"),
    "several indices": (paired_indices, "several indices"),
    "added": (added, "several indices, or added"),
    "no input": (own_cache, "no input of the graph"),
    "no update": (not_updated, "no input that the graph updates"),
    "a part of a tensor": (half_of_it, "part|dimensions are not"),
    "heads are told": (other_dimension, "several indices|dimensions are not|another shape|no input"),
}


def found(graph: Callable[..., Any], shape: tuple[int, ...]) -> list[Any]:
    writes: list[Any] = []

    def look(g: fx.Graph) -> None:
        for call in g.find_nodes(op="call_function", target=torch.ops.braze.rope.default):
            rank = call.meta["val"].ndim
            axis = next(d for d in range(rank - 3, rank - 1) if call.meta["val"].shape[d] == H)
            writes.append(places.cache_write(call, axis))

    x, a = torch.randn(B, H, S, D), torch.randn(S, D // 2)
    Fused(graph, after=look)(x, a, torch.zeros(shape), INDEX)
    return writes


@pytest.mark.parametrize("name", FITS)
def test_rows_of_a_cache(name: str) -> None:
    graph, shape, (strides, steps), first = FITS[name]
    (write,) = found(graph, shape)
    assert isinstance(write, places.CacheWrite), write
    assert (write.strides, write.index_strides, write.first) == (strides, steps, first)
    assert write.cache.op == "placeholder"


@pytest.mark.parametrize("name", DOES_NOT)
def test_the_reason_where_it_cannot(name: str) -> None:
    graph, words = DOES_NOT[name]
    (write,) = found(graph, CACHE)
    assert isinstance(write, str), write
    assert any(w in write for w in words.split("|")), write
