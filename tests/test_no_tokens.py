"""A batch of no tokens is compiled like any other: nothing to find in it, nothing that ends in an error."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.harness import Fused
from tests.test_expert_projects import STYLES as PROJECTS
from tests.test_expert_projects import all_over_shared
from tests.test_expert_styles import STYLES, H, layer, tokens
from tests.test_rope_projects import FOUND, angles, heads

BLOCKS: dict[str, Callable[..., Tensor]] = {**STYLES, **PROJECTS, "all over shared": all_over_shared}


@pytest.mark.parametrize("name", BLOCKS)
def test_experts(name: str) -> None:
    m = layer()
    fused = Fused(lambda x: BLOCKS[name](m, x))
    assert fused(tokens(0)).shape == (0, H)
    assert fused.count("moe") == [0]


@pytest.mark.parametrize("name", BLOCKS)
def test_experts_for_any_number(name: str) -> None:
    """What was compiled for some is called with none."""
    m = layer()
    fused = Fused(lambda x: BLOCKS[name](m, x), dynamic=True)
    fused(tokens(12))
    assert fused(tokens(0)).shape == (0, H)


@pytest.mark.parametrize("name", [n for n in FOUND if "matrices" not in n])  # those are of a known number of batches
def test_rotations(name: str) -> None:
    fused = Fused(FOUND[name][0])
    x = heads()[:0]
    assert fused(x, angles()).shape == x.shape
    assert fused.count("rope") == [0]


def test_compiled() -> None:
    torch._dynamo.reset()
    m = layer()
    compiled = torch.compile(lambda x: STYLES["gathered_three"](m, x), backend="braze", options={"strict": True})
    with torch.no_grad():
        assert compiled(tokens(0)).shape == (0, H)
