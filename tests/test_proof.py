"""A site whose tensors are not the ones that the graph computes with is refused, though every shape fits."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from braze.passes import experts, proof, rope
from braze.passes.elements import Sizes
from braze.passes.sites import MoeSite, RopeSite
from tests.harness import capture

#: SIZE is small enough that the proof's instance keeps it, so that there, too, shapes do not tell tensors apart.
T, SIZE, E, K = 5, 4, 4, 2


def square_experts(
    x: Tensor, ids: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """No gate and square weights, so that any two tensors of a kind can be exchanged; and other ids and weights."""
    e = ids.flatten()
    h = (w1[e] @ x.repeat_interleave(K, 0).unsqueeze(-1)).squeeze(-1) + b1[e]
    y = (w2[e] @ torch.tanh(h).unsqueeze(-1)).squeeze(-1) + b2[e]
    return (y * weights.flatten().unsqueeze(-1)).view(-1, K, SIZE).sum(1), ids.flip(1), weights.flip(1)


def moe_site() -> MoeSite:
    rng = torch.Generator().manual_seed(0)
    shapes = ((E, SIZE, SIZE), (E, SIZE, SIZE), (E, SIZE), (E, SIZE))
    ids = torch.rand((T, E), generator=rng).topk(K).indices
    tensors = [torch.randn(s, generator=rng) for s in ((T, SIZE), (T, K), *shapes)]
    (gm,) = capture(square_experts, tensors[0], ids, *tensors[1:])
    ((site,), _) = experts.find(gm.graph, Sizes())
    return site


MOE: dict[str, tuple[Any, str]] = {
    "weights exchanged": (lambda s: {"w1": s.w2, "w2": s.w1}, "the subgraph and the op differ"),
    "stored the other way": (lambda s: {"spec": replace(s.spec, transposed=True)}, "the subgraph and the op differ"),
    "biases exchanged": (lambda s: {"b1": s.b2, "b2": s.b1}, "the subgraph and the op differ"),
    "the same weight twice": (lambda s: {"w2": s.w1}, "also depends on"),
    "no first bias": (lambda s: {"b1": None}, "also depends on"),
    "no second bias": (lambda s: {"b2": None}, "also depends on"),
}


@pytest.mark.parametrize("name", MOE)
def test_an_expert_block_of_other_tensors_is_refused(name: str) -> None:
    site = moe_site()
    assert "agrees" in proof.moe(site, [Sizes()])
    change, reason = MOE[name]
    with pytest.raises(proof.Refused, match=reason):
        proof.moe(replace(site, **change(site)), [Sizes()])


def two_rotations(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(turn(t, angle.cos(), angle.sin()) for t, angle in ((x, a), (y, b)))  # type: ignore[return-value]


def turn(t: Tensor, c: Tensor, s: Tensor) -> Tensor:
    first, second = t.chunk(2, -1)
    return torch.cat((first * c - second * s, second * c + first * s), -1)


def rope_sites() -> tuple[RopeSite, RopeSite]:
    shape, angle = (2, 3, 7, 16), (7, 8)
    (gm,) = capture(two_rotations, torch.randn(shape), torch.randn(shape), torch.randn(angle), torch.randn(angle))
    (first, second), _ = rope.find(gm.graph, Sizes())
    return first, second


@pytest.mark.parametrize("fields", [("x",), ("cos",), ("sin",), ("cos", "sin"), ("root",)])
def test_a_rotation_of_another_tensor_or_by_another_angle_is_refused(fields: tuple[str, ...]) -> None:
    """Two rotations of one shape in one graph: each part of one is taken for the other's."""
    site, other = rope_sites()
    assert "agree" in proof.rope(site, [Sizes()])
    assert "agree" in proof.rope(other, [Sizes()])
    with pytest.raises(proof.Refused, match="the subgraph and the op differ"):
        proof.rope(replace(site, **{f: getattr(other, f) for f in fields}), [Sizes()])


def test_both_bindings_of_symbolic_sizes_are_proven() -> None:
    x, cos, sin = torch.randn(2, 3, 7, 16), torch.randn(7, 8), torch.randn(7, 8)
    for tensor, tokens in ((x, 2), (cos, 0), (sin, 0)):
        torch._dynamo.mark_dynamic(tensor, tokens)
    (gm,) = capture(turn, x, cos, sin)
    ((site,), _) = rope.find(gm.graph, Sizes())
    sizes = proof.bindings(gm.graph)
    assert len(sizes) == 2
    elements = [int(proof.rope(site, chosen).split()[0]) for chosen in (sizes[:1], sizes)]
    assert elements[1] > elements[0]
