"""Models' graphs with one thing changed, fused and as they are: both compute the same, whatever they compute.

A recogniser that overlooked a change, or a proof that could not tell, would show here as another result.
"""

from __future__ import annotations

from functools import cache
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from braze.lowering.inductor import no_modes
from braze.passes import pipeline
from tests.mutants import copied, grab, mutant
from tests.tiny import build, tokens

#: model, its experts' form
MODELS = {
    "mixtral, sorted rows": ("mixtral", "grouped_mm"),
    "qwen3_moe, gathered weights": ("qwen3_moe", "batched_mm"),
    "gpt_oss, biases": ("gpt_oss", "batched_mm"),
    "deepseek_v3, groups": ("deepseek_v3", "grouped_mm"),
    "llama4, weight on input": ("llama4", None),
    "glm4, interleaved": ("glm4", None),
}
MUTANTS = 20
#: A result may be another by so much, of its largest value: experts are computed in another order.
BOUND = 2e-3


@cache
def captured(name: str) -> tuple[fx.GraphModule, list[Any], frozenset[str], int]:
    """(graph, inputs, names of the nodes that fusing takes out, sites)."""
    family, experts = MODELS[name]
    gm, inputs = grab(build(family, torch.float32, experts), tokens(1, 6), use_cache=False)
    fused, sites = fuse(gm)
    return gm, inputs, frozenset(n.name for n in gm.graph.nodes) - {n.name for n in fused.graph.nodes}, sites


def fuse(gm: fx.GraphModule) -> tuple[fx.GraphModule, int]:
    fused = copied(gm)
    with no_modes():
        result = pipeline.run(fused.graph, strict=True)
    fused.graph.lint()
    fused.recompile()
    return fused, len(result.calls)


def varied(inputs: list[Any], run: int) -> list[Any]:
    """The inputs themselves, then others around them, then larger ones."""
    rng = torch.Generator().manual_seed(run)

    def value(t: Any) -> Any:
        if run == 0 or not isinstance(t, Tensor) or not t.is_floating_point():
            return t.clone() if isinstance(t, Tensor) else t
        return t * (1 + 0.5 * torch.randn(t.shape, generator=rng)) * (1.0, 1.0, 2.0)[run]

    return [value(t) for t in inputs]


def differ(got: Any, expected: Any) -> float:
    """The largest difference, relative to the largest value, of what is finite."""
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        if isinstance(b, Tensor):
            assert a.shape == b.shape and a.dtype == b.dtype
            finite = b.isfinite()
            if finite.any():
                scale = b[finite].abs().max().clamp_min(1e-30)
                worst = max(worst, float((a - b)[finite].abs().nan_to_num(float("inf")).max() / scale))
    return worst


@pytest.mark.parametrize("name", MODELS)
def test_fusing_changes_no_mutant(name: str) -> None:
    gm, inputs, names, sites = captured(name)
    assert sites >= 2
    rng, tried, whole = Random(name), 0, 0
    while tried < MUTANTS:
        changed = mutant(gm, names, rng)
        if changed is None:
            continue
        new, words = changed
        with torch.no_grad():
            try:
                expected = [new(*varied(inputs, run)) for run in range(3)]
            except (RuntimeError, IndexError):  # an index that is out of bounds now
                continue
            fused, kept = fuse(new)
            tried, whole = tried + 1, whole + (kept >= sites)
            for run, want in enumerate(expected):
                assert differ(fused(*varied(inputs, run)), want) < BOUND, (words, run)
    assert 0 < whole < tried, "changes that nobody minds, and others"
