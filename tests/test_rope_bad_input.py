"""What can't be rotated: the error is that of eager code, or of Inductor's own loops where it shows as the code runs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import braze  # noqa: F401  (defines the op)
from braze.backend import collect
from braze.kernels.spec import RopeSpec

S, D = 5, 16


def half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first columns turned, as many as the tables have."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = turned.chunk(2, -1)
    return torch.cat((turned * cos + torch.cat((-b, a), -1) * sin, rest), -1)


def of_positions(x: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    cos, sin = table[positions].chunk(2, -1)
    return half(x, cos, sin)


def into_a_cache(x: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    cos, sin = table[:S].chunk(2, -1)
    cache = torch.zeros(1, 2, 8, D)
    return cache.index_copy(2, rows, half(x, cos, sin))


_SHAPES = "must match the size|Mismatching argument|broadcast"  # eager's words, or those of its shape inference
X, TABLE = torch.randn(1, 2, S, D), torch.randn(8, 2 * D)
BAD: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...], str]] = {
    "rotary size larger than the head": (half, (X, torch.randn(S, 24), torch.randn(S, 24)), _SHAPES),
    "tables of too few tokens": (half, (X, torch.randn(S - 1, D), torch.randn(S - 1, D)), _SHAPES),
    "positions beyond the table": (of_positions, (X, TABLE, torch.tensor([0, 1, 2, 3, 8])), "out of (bounds|range)"),
    "positions before the table": (of_positions, (X, TABLE, torch.tensor([0, 1, -9, 3, 4])), "out of (bounds|range)"),
    "positions in int32": (of_positions, (X, TABLE, torch.tensor([0, 1, 2, 3, 8]).int()), "out of (bounds|range)"),
    "rows beyond the cache": (into_a_cache, (X, TABLE, torch.tensor([0, 1, 2, 3, 8])), "out of (bounds|range)"),
}


@pytest.mark.parametrize("name", BAD)
def test_the_error_is_eagers(name: str) -> None:
    graph, args, words = BAD[name]
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: graph(*a), backend="braze", options={"strict": True})
    for run in (graph, compiled):
        with pytest.raises((RuntimeError, IndexError), match=words), torch.no_grad():
            run(*args)


def test_an_odd_rotary_size_stays_as_it_is() -> None:
    """Halves of 4 and 3 elements change places: no rotation, but what the model does."""
    args = X, torch.randn(S, 7), torch.randn(S, 7)
    torch._dynamo.reset()
    without_caches = torch._inductor.config.patch(force_disable_caches=True)  # a hit would run no pass
    with torch.no_grad(), without_caches, collect() as reports:
        got = torch.compile(lambda *a: half(*a), backend="braze", options={"strict": True})(*args)
    assert list(reports[0].sites) == []
    torch.testing.assert_close(got, half(*args), rtol=1e-6, atol=1e-6)


def test_no_op_of_such_a_kind() -> None:
    x, table = torch.randn(1, 2, S, D), torch.randn(1, 1, S, 8)
    with pytest.raises(ValueError, match="rotary"):
        RopeSpec(7)
    for words, (size, start, columns) in {"exceeds": (D, 2, D), "columns": (D, 0, 6)}.items():
        table = torch.randn(1, 1, S, columns)
        with pytest.raises(RuntimeError, match=words):
            torch.ops.braze.rope(x, table, table, rotary_dim=size, start=start)
    with pytest.raises(RuntimeError):
        torch.ops.braze.rope(x, torch.randn(1, 1, S - 1, D), torch.randn(1, 1, S - 1, D), rotary_dim=D)
