"""Where a rotation is written in compiled graphs, on the devices that there are: a CPU's C++ call, a GPU's launch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from braze.backend import collect
from tests.rope_graphs import CACHES, OVER, ROOM, D, Graph, by_index, compare, half, make

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def run(graph: Graph, inputs: tuple[Tensor, ...], device: str, kernel: str = "auto") -> tuple[str, str]:
    """Inductor's code and braze's words, after a check of the results and of what the graph left in its inputs."""
    codes: list[str] = []

    def compile(g: Graph) -> Graph:
        options: Any = {"kernel": {"rope": kernel}, "require": ["rope"], "strict": True}
        compiled = torch.compile(g, backend="braze", dynamic=False, options=options)

        def called(*args: Tensor) -> Any:
            result, found = run_and_get_code(compiled, *args)
            codes.extend(found)
            return result

        return called

    with collect() as reports:
        compare(graph, tuple(t.to(device) for t in inputs), compile)
    (code,) = codes
    return code[code.index("def call(") : code.index("runner = ")], "; ".join(s.why for r in reports for s in r.sites)


def calls(code: str) -> int:
    return sum(line.lstrip().startswith(("cpp_braze_", "rope_kernel")) for line in code.splitlines())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OVER)
def test_over_its_input(name: str, device: str) -> None:
    """One call for q and k; where it is in place the graph has no buffers but those of the two products."""
    graph, rotary, told = OVER[name]
    code, words = run(graph, make(rotary=rotary), device, "cpp" if device == "cpu" else "auto")
    assert calls(code) == 1, code
    assert told in words and ("in place" in words) == bool(told), words
    if name == "what projections made" and device == "cpu":  # a GPU's products may be padded
        assert code.count(" = empty_strided") == 2, code


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CACHES)
def test_k_goes_straight_into_its_cache(name: str, device: str) -> None:
    """One call, which alone writes to the cache."""
    graph, batch, tokens, shape, index = CACHES[name]
    code, words = run(graph, (*make(batch, tokens), torch.randn(shape), index), device)
    assert calls(code) == 1, code
    assert words.count("q in place, k straight into its cache") == 2, words
    assert ("norms in the same pass" in words) == (name == "norms before"), words


@pytest.mark.parametrize("device", DEVICES)
def test_one_tensor_that_is_turned_twice_in_place(device: str) -> None:
    """q and k are one: a rotation that ends in what the next one writes over is read past, and not called."""

    def graph(h: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        both = (h @ q).unflatten(-1, (-1, D))
        views = both.transpose(1, 2), both.transpose(1, 2)
        for x in views:
            x[..., :D] = half(x[..., :D].clone(), cos[:, None], sin[:, None])
        return *views, views[0] + views[1]

    h, q, k, cos, sin = make(1)
    run(graph, (h, q, k, cos.double()[None], sin.double()[None]), device, "pointwise")


@pytest.mark.parametrize("row", [ROOM, -ROOM - 1])
def test_a_row_beyond_the_cache_is_refused(row: int) -> None:
    """As eager refuses it, and nothing is written."""
    cache = torch.randn(2, 2, ROOM, 32)
    before = cache.clone()
    compiled = torch.compile(lambda *a: by_index(*a), backend="braze", options={"require": ["rope"]})
    with torch.no_grad(), pytest.raises(RuntimeError, match="out of bounds"):
        compiled(*make(), cache, torch.tensor([0, row, 1]))
    assert torch.equal(cache, before)
