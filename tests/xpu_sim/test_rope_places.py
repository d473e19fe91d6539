"""Where the rotary kernel writes: over what a projection made, straight into a cache, and elsewhere where it may not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from braze import xpu_sim
from braze.backend import collect
from tests import rope_models, tiny
from tests.rope_graphs import CACHES, OVER, Graph, compare, make


def run(graph: Graph, inputs: tuple[Tensor, ...]) -> tuple[list[str], str]:
    """The launches' names and braze's words, after a check of the results and of what the graph left in its inputs."""
    with xpu_sim.compiled_graphs("pvc"), xpu_sim.record() as launches, collect() as reports:
        compare(graph, inputs, lambda g: torch.compile(g, backend="braze", dynamic=False))
    return [x.kernel for x in launches], "; ".join(s.why for r in reports for s in r.sites)


@pytest.mark.parametrize("name", OVER)
def test_over_its_input(name: str) -> None:
    """One launch, and neither a buffer nor a clone where it is in place."""
    graph, rotary, told = OVER[name]
    names, words = run(graph, make(rotary=rotary))
    assert names.count("rope_kernel") == 1
    assert told in words and ("in place" in words) == bool(told), words
    if name == "what projections made":
        assert names == ["rope_kernel"]


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
