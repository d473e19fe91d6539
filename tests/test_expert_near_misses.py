"""One thing wrong with a layer of sorted rows, for each thing that must be right: refused with its reason, and left as it was.

Whose router ids and weights come from is not the experts' business: that is found all the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from tests.harness import Fused

T, H, INNER, E, K = 6, 24, 16, 4, 2
Bend = Callable[["Layer"], "Layer"]


def ends_of(ids: Tensor) -> Tensor:
    return (ids.flatten()[:, None] == torch.arange(E)).sum(0).cumsum(0).to(torch.int32)


@dataclass(frozen=True)
class Layer:
    """A layer's steps, each of which may be bent. perm: the order of the sorted rows; ids, other: two choices of experts."""

    order: Callable[[Tensor, Tensor], Tensor] = lambda ids, other: ids
    rows: Callable[[Tensor], Tensor] = lambda perm: perm // K
    ends: Callable[[Tensor, Tensor], Tensor] = lambda ids, other: ends_of(ids)
    ends_below: Callable[[Tensor, Tensor], Tensor] = lambda ids, other: ends_of(ids)
    bias_above: Callable[[Tensor], Tensor] = lambda expert: expert
    bias_below: Callable[[Tensor], Tensor] = lambda expert: expert
    columns: Callable[[Tensor], tuple[Tensor, ...]] = lambda h: h.chunk(2, -1)
    between: Callable[[Tensor, Tensor], Tensor] = lambda a, h: a
    weighted: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda y, w, perm: y * w.flatten()[perm, None]
    inverse: Callable[[Tensor], Tensor] = lambda perm: torch.empty_like(perm).scatter(0, perm, torch.arange(T * K))
    combine: Callable[[Tensor], Tensor] = lambda y: y.view(T, K, H).sum(1)
    returned: Callable[[Tensor, Tensor, Tensor], object] = lambda out, h, y: out

    def __call__(
        self, x: Tensor, logits: Tensor, second: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor
    ) -> object:
        weights, ids = logits.softmax(-1).topk(K)
        other = second.topk(K).indices
        expert, perm = self.order(ids, other).flatten().sort(stable=True)
        h = torch._grouped_mm(x[self.rows(perm)], w1, offs=self.ends(ids, other)) + b1[self.bias_above(expert)]
        gate, up = self.columns(h)
        a = self.between(silu(gate) * up, h)
        y = torch._grouped_mm(a, w2, offs=self.ends_below(ids, other)) + b2[self.bias_below(expert)]
        y = self.weighted(y, weights.to(y.dtype), perm)
        return self.returned(self.combine(y[self.inverse(perm)]), h, y)


def inputs() -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = ((T, H), (T, E), (T, E), (E, H, 2 * INNER), (E, INNER, H), (E, 2 * INNER), (E, H))
    return [
        (torch.randn(s, generator=rng) * 0.6).to(torch.bfloat16 if i not in (1, 2) else torch.float32)
        for i, s in enumerate(shapes)
    ]


WRONG: dict[str, tuple[Layer, str]] = {
    "rows in another router's order": (Layer(order=lambda ids, other: other), "it also depends on"),
    "rows of slots, not of tokens": (
        Layer(rows=lambda perm: perm % K),
        "rows come from arg2_1, no [tokens, hidden] tensor",
    ),
    "rows in the order of arrival": (
        Layer(rows=lambda perm: torch.arange(T * K) // K),
        "rows come from arg2_1, no [tokens, hidden] tensor",
    ),
    "two routers": (Layer(ends_below=lambda ids, other: ends_of(other)), "it also depends on"),
    "counts of another router": (
        Layer(ends=lambda ids, other: ends_of(other), ends_below=lambda ids, other: ends_of(other)),
        "it also depends on",
    ),
    "counts of the experts in reverse": (
        Layer(ends=lambda ids, other: ends_of(E - 1 - ids), ends_below=lambda ids, other: ends_of(E - 1 - ids)),
        "the subgraph and the op differ",
    ),
    "another expert's bias above": (Layer(bias_above=lambda e: E - 1 - e), "the subgraph and the op differ"),
    "another expert's bias below": (Layer(bias_below=lambda e: E - 1 - e), "is no bias [experts, hidden]"),
    "halves of the rows, not of the columns": (
        Layer(columns=lambda h: h.view(T * K, 2, -1).transpose(1, 2).reshape(2, T * K, -1).unbind(0)),
        "picked by an index that is not known",
    ),
    "gate and up overlap": (
        Layer(columns=lambda h: (h[:, :INNER], h[:, 1 : INNER + 1])),
        "neither halves nor interleaved",
    ),
    "columns left over": (Layer(columns=lambda h: (h[:, :INNER], h[:, :INNER])), "columns for an inner size of"),
    "a norm between the products": (
        Layer(between=lambda a, h: a / a.float().square().mean(-1, keepdim=True).sqrt().to(a.dtype)),
        "the activation depends on mean",
    ),
    "another function of one column": (
        Layer(between=lambda a, h: torch.cat((a[:, :1].relu(), a[:, 1:]), -1)),
        "the activation differs between columns",
    ),
    "weights of the tokens, not of the rows": (
        Layer(weighted=lambda y, w, perm: y * w[perm // K, :1]),
        "the subgraph and the op differ",
    ),
    "weights before they are sorted": (
        Layer(weighted=lambda y, w, perm: y * w.flatten()[:, None]),
        "is no [tokens, slots] tensor",
    ),
    "two weights": (
        Layer(weighted=lambda y, w, perm: y * w.flatten()[perm, None] * w.flatten()[perm, None]),
        "a row is multiplied by several tensors",
    ),
    "no weight": (Layer(weighted=lambda y, w, perm: y), "rows are not weighted by the router"),
    "the permutation, not its inverse": (Layer(inverse=lambda perm: perm), "not put back by the inverse of their sort"),
    "the inverse of another order": (
        Layer(inverse=lambda perm: torch.empty_like(perm).scatter(0, perm, torch.arange(T * K).flip(0))),
        "not put back by the inverse of their sort",
    ),
    "a sum over the other axis": (Layer(combine=lambda y: y.view(K, T, H).sum(0)), "are no [tokens, slots]"),
    "a mean of unequal parts": (
        Layer(combine=lambda y: (y.view(T, K, H) * torch.tensor([1.0, 2.0], dtype=y.dtype)[:, None]).sum(1)),
        "a row is multiplied by several tensors",
    ),
    "rows returned too": (Layer(returned=lambda out, h, y: (out, y)), "is also"),
    "what is between returned too": (Layer(returned=lambda out, h, y: (out, h.float().sum())), "is also"),
}


def test_the_layer_itself_is_found() -> None:
    fused, args = Fused(Layer()), inputs()
    torch.testing.assert_close(fused(*args), Layer()(*args), rtol=3e-2, atol=3e-2)
    assert fused.count("moe") == [1], fused.reasons


@pytest.mark.parametrize("name", WRONG)
def test_one_thing_wrong_is_refused(name: str) -> None:
    layer, reason = WRONG[name]
    fused, args = Fused(layer), inputs()
    torch.testing.assert_close(fused(*args), layer(*args), rtol=0, atol=0)
    assert fused.count("moe") == [0]
    assert any(reason in r for r in fused.reasons), fused.reasons


def test_ids_and_weights_of_two_routers() -> None:
    """The experts take any ids and weights; the router is what is not found."""

    def layer(x: Tensor, logits: Tensor, second: Tensor, *rest: Tensor) -> object:
        both = replace(
            Layer(),
            order=lambda ids, other: other,
            ends=lambda ids, other: ends_of(other),
            ends_below=lambda ids, other: ends_of(other),
        )
        return both(x, logits, second, *rest)

    fused, args = Fused(layer), inputs()
    torch.testing.assert_close(fused(*args), layer(*args), rtol=3e-2, atol=3e-2)
    assert (fused.count("moe"), fused.count("router")) == ([1], [0])
    assert any("it also depends on" in r for r in fused.reasons), fused.reasons
