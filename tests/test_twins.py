"""Layers that are the same up to names share what is found and proven; layers that differ in anything do not."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from braze.passes import proof, rope
from braze.passes.twins import subgraph
from tests.harness import Fused, assert_close, capture

D = 16
Rotation = Callable[[Tensor, Tensor, Tensor], Tensor]


def half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1) * sin


def unsigned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat((x[..., D // 2 :], x[..., : D // 2]), -1) * sin


def doubled(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return half(x, cos, sin * 2.0)


def shifted(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Not a rotation of x: an element of another token is mixed in."""
    return x * cos + torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1).roll(1, 0) * sin


class Layers(nn.Module):
    """Projections, each followed by its own rotation; tables are made once for all."""

    def __init__(self, *rotations: Rotation) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rotations = rotations
        self.projections = nn.ParameterList(torch.randn(D, D) * 0.2 for _ in rotations)

    def forward(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[0], device=x.device)[:, None] * torch.logspace(0, -3, D // 2, dtype=x.dtype)
        cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
        for rotation, w in zip(self.rotations, self.projections, strict=True):
            x = x + rotation(x @ w, cos, sin)
        return x


def query(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(6, D, generator=torch.Generator().manual_seed(1)).to(dtype)


class Count:
    """Counts the calls of a function of a module while the test runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        self.calls = 0
        original = getattr(module, name)

        def counted(*args: Any) -> Any:
            self.calls += 1
            return original(*args)

        monkeypatch.setattr(module, name, counted)


def test_twin_rotations_are_worked_out_and_proven_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found, proofs = Count(monkeypatch, rope, "form_of"), Count(monkeypatch, proof, "rope")
    model = Layers(*[half] * 6)
    fused = Fused(model)
    got = fused(query())
    assert fused.count("rope") == [6]
    assert found.calls == proofs.calls == 1
    assert_close(got, model.double()(query(torch.float64)).detach(), 1e-5)


@pytest.mark.parametrize("other", [unsigned, shifted])
def test_a_layer_that_is_no_rotation_is_refused_among_twins_that_are(other: Rotation) -> None:
    model = Layers(half, other, half, half)
    fused = Fused(model)
    got = fused(query())
    assert fused.count("rope") == [3]
    assert_close(got, model.double()(query(torch.float64)).detach(), 1e-5)


def test_a_layer_with_other_tables_has_a_proof_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    proofs = Count(monkeypatch, proof, "rope")
    model = Layers(half, doubled, half, doubled)
    fused = Fused(model)
    got = fused(query())
    assert fused.count("rope") == [4]
    assert proofs.calls == 2
    assert_close(got, model.double()(query(torch.float64)).detach(), 1e-5)


def expert_layers(x: Tensor, router: Tensor, w1: Tensor, w2: Tensor, acts: list[Callable[[Tensor], Tensor]]) -> Tensor:
    for layer, act in enumerate(acts):
        weights, ids = (x @ router[layer].T).softmax(-1).topk(2)
        e = ids.flatten()
        gate, up = (w1[layer][e] @ x.repeat_interleave(2, 0).unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        y = (w2[layer][e] @ (act(gate) * up).unsqueeze(-1)).squeeze(-1)
        x = x + (y * weights.flatten()[:, None]).view(x.shape[0], 2, -1).sum(1)
    return x


def test_expert_layers_share_a_proof_only_with_their_own_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    proofs = Count(monkeypatch, proof, "moe")
    silu = nn.functional.silu
    acts = [silu, lambda g: silu(g * 1.5), silu, lambda g: silu(g * 1.5), silu]
    rng = torch.Generator().manual_seed(0)
    shapes = [(6, 16), (5, 4, 16), (5, 4, 24, 16), (5, 4, 16, 12)]
    args = [torch.randn(s, generator=rng) * (0.3 if len(s) == 4 else 1.0) for s in shapes]
    fused = Fused(lambda *a: expert_layers(*a, acts))
    got = fused(*args)
    assert fused.count("moe") == [5]
    assert proofs.calls == 2
    assert_close(got, expert_layers(*(a.double() for a in args), acts), 1e-5)


def text(f: Callable[..., Tensor], *inputs: Tensor) -> Any:
    (gm,) = capture(f, *inputs)
    found = subgraph(outputs(gm.graph), [])
    assert found is not None
    return found.text


def outputs(graph: fx.Graph) -> list[fx.Node]:
    return list(graph.output_node().all_input_nodes)


def base(x: Tensor, y: Tensor) -> Tensor:
    return (x * 2.0 - y).cumsum(0).exp()


OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "operands exchanged": lambda x, y: (y - x * 2.0).cumsum(0).exp(),
    "another constant": lambda x, y: (x * math.nextafter(2.0, 3.0) - y).cumsum(0).exp(),
    "a constant of another type": lambda x, y: (x * 2 - y).cumsum(0).exp(),
    "another axis": lambda x, y: (x * 2.0 - y).cumsum(1).exp(),
    "another op": lambda x, y: (x * 2.0 - y).cumsum(0).sin(),
    "one input twice": lambda x, y: (x * 2.0 - x).cumsum(0).exp(),
}


def test_a_computation_is_itself_whatever_its_nodes_are_called() -> None:
    a, b = torch.randn(4, 4), torch.randn(4, 4)
    (gm,) = capture(lambda x, y: (base(x, y), base(y, x)), a, b)
    first, second = outputs(gm.graph)
    one, other = subgraph([first], []), subgraph([second], [])
    assert one is not None
    assert other is not None
    assert one.text == other.text
    assert one.nodes != other.nodes


@pytest.mark.parametrize("what", OTHERS)
def test_any_difference_shows(what: str) -> None:
    a, b = torch.randn(4, 4), torch.randn(4, 4)
    assert text(base, a, b) != text(OTHERS[what], a, b)


@pytest.mark.parametrize("other", [torch.randn(4, 5), torch.randn(4, 4, dtype=torch.float64)])
def test_shapes_and_dtypes_are_part_of_it(other: Tensor) -> None:
    assert text(base, torch.randn(4, 4), torch.randn(4, 4)) != text(base, other, other.clone())
