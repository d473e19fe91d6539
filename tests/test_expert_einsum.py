"""Expert layers written with einsum: all experts on all tokens combined by a score matrix, and weights gathered per token.

The reference is a loop over tokens in float64. Sizes are different, so that mixing them up shows.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, einsum
from torch.nn.functional import embedding, one_hot, silu

from tests.harness import Fused, assert_close

T, H, INNER, E, K = 7, 24, 20, 5, 2
Layer = Callable[..., Tensor]


def inputs(*lead: int) -> list[Tensor]:
    """x, router, w1 [E, H, 2I], w2 [E, I, H], b1, b2."""
    rng = torch.Generator().manual_seed(0)
    shapes = ((*(lead or (T,)), H), (H, E), (E, H, 2 * INNER), (E, INNER, H), (E, 2 * INNER), (E, H))
    return [torch.randn(s, generator=rng) * 0.5 for s in shapes]


def route(x: Tensor, router: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = (x @ router).softmax(-1).topk(K)
    return weights / weights.sum(-1, keepdim=True), ids


def glu(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, -1)
    return silu(gate) * up


def exact(x: Tensor, router: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor, *, biases: bool = False) -> Tensor:
    """Token by token, in float64."""
    rows, router, w1, w2, b1, b2 = (t.double() for t in (x.reshape(-1, H), router, w1, w2, b1, b2))
    weights, ids = route(rows, router)
    out = torch.zeros_like(rows)
    for t in range(rows.shape[0]):
        for w, e in zip(weights[t], ids[t].tolist(), strict=True):
            out[t] += w * (glu(rows[t] @ w1[e] + biases * b1[e]) @ w2[e] + biases * b2[e])
    return out.reshape(x.shape)


def scores_of(x: Tensor, router: Tensor) -> Tensor:
    weights, ids = route(x, router)
    return einsum("...ke,...k->...e", one_hot(ids, E).to(x.dtype), weights)


def all_then_combined(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    y = einsum("tei,eih->teh", glu(einsum("th,ehi->tei", x, w1)), w2)
    return einsum("te,teh->th", scores_of(x, router), y)


def all_with_biases(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    y = einsum("tei,eih->teh", glu(einsum("th,ehi->tei", x, w1) + b1), w2) + b2
    return einsum("te,teh->th", scores_of(x, router), y)


def batches_of_tokens(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    y = einsum("bsei,eih->bseh", glu(einsum("bsh,ehi->bsei", x, w1)), w2)
    return einsum("bse,bseh->bsh", scores_of(x, router), y)


def scores_masked(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    """All scores, masked, and divided by the sum of those that are left."""
    scores = (x @ router).softmax(-1)
    scores = scores * torch.zeros_like(scores).scatter_(-1, scores.topk(K).indices, 1.0)
    scores = scores / scores.sum(-1, keepdim=True)
    y = einsum("tei,eih->teh", glu(einsum("th,ehi->tei", x, w1)), w2)
    return einsum("te,teh->th", scores, y)


def two_arg_maxima(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    """The best, and the best of the others."""
    logits = x @ router
    first = one_hot(logits.argmax(-1), E)
    second = one_hot(logits.masked_fill(first.bool(), float("-inf")).argmax(-1), E)
    scores = logits.masked_fill((first + second) == 0, float("-inf")).softmax(-1)
    y = einsum("tei,eih->teh", glu(einsum("th,ehi->tei", x, w1)), w2)
    return einsum("te,teh->th", scores, y)


def experts_first(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    weights, ids = route(x, router)
    scores = torch.zeros(x.shape[0], E).scatter(1, ids, weights)
    y = einsum("eti,eih->eth", glu(einsum("th,ehi->eti", x, w1)), w2)
    return (y * scores.t()[..., None]).sum(0)


def masked_rows(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    """Experts see zeros in place of the tokens that are not theirs."""
    weights, ids = route(x, router)
    chosen = one_hot(ids, E).to(x.dtype)
    rows = einsum("tke,th->eth", chosen, x)
    y = einsum("eti,eih->eth", glu(einsum("eth,ehi->eti", rows, w1)), w2)
    return einsum("te,eth->th", einsum("tke,tk->te", chosen, weights), y)


def one_product_sums_experts(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    """The weight is on the activation, and the second product sums over experts and inner columns."""
    weights, ids = route(x, router)
    scores = (one_hot(ids, E) * weights[..., None]).sum(1)
    h = glu(einsum("th,ehi->tei", x, w1))
    return einsum("tei,eih->th", h * scores[..., None], w2)


def three_operands(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    return einsum("te,tei,eih->th", scores_of(x, router), glu(einsum("th,ehi->tei", x, w1)), w2)


def one_big_matrix(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    """No einsum: plain products with all experts' weights side by side."""
    h = glu((x @ w1.permute(1, 0, 2).reshape(H, -1)).view(-1, E, 2 * INNER))
    return (h * scores_of(x, router)[..., None]).flatten(1) @ w2.flatten(0, 1)


def gathered(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    weights, ids = route(x, router)
    y = einsum("tki,tkih->tkh", glu(einsum("th,tkhi->tki", x, w1[ids])), w2[ids])
    return einsum("tk,tkh->th", weights, y)


def gathered_with_biases(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    weights, ids = route(x, router)
    y = einsum("tki,tkih->tkh", glu(einsum("th,tkhi->tki", x, w1[ids]) + b1[ids]), w2[ids]) + b2[ids]
    return einsum("tk,tkh->th", weights, y)


def gathered_batches(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    weights, ids = route(x, router)
    y = einsum("bski,bskih->bskh", glu(einsum("bsh,bskhi->bski", x, w1[ids])), w2[ids])
    return einsum("bsk,bskh->bsh", weights, y)


def selected(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    weights, ids = route(x, router)
    rows = x.repeat_interleave(K, 0)
    h = glu(einsum("rh,rhi->ri", rows, w1.index_select(0, ids.view(-1))))
    y = einsum("ri,rih->rh", h, w2.index_select(0, ids.view(-1)))
    return (y.view(-1, K, H) * weights[..., None]).sum(1)


def looked_up(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    """Weights as rows of an embedding's table."""
    weights, ids = route(x, router)
    up = embedding(ids, w1.view(E, -1)).view(-1, K, H, 2 * INNER)
    down = embedding(ids, w2.view(E, -1)).view(-1, K, INNER, H)
    return ((glu(x[:, None, None] @ up) @ down).squeeze(2) * weights[..., None]).sum(1)


def weighted_activation(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    """w (a W2) as (w a) W2."""
    weights, ids = route(x, router)
    h = glu(einsum("th,tkhi->tki", x, w1[ids]))
    return einsum("tki,tkih->th", h * weights[..., None], w2[ids])


def ids_turned(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    """A top-k over the first dimension: ids that are not contiguous, flattened for each use."""
    weights, ids = (x @ router).softmax(-1).t().topk(K, dim=0)
    weights, ids = (weights / weights.sum(0)).t(), ids.t()
    h = glu(torch.bmm(x.repeat_interleave(K, 0)[:, None], w1[ids.flatten()]))
    y = torch.bmm(h, w2[ids.flatten()]).squeeze(1)
    return (y.view(-1, K, H) * weights[..., None]).sum(1)


LAYERS: dict[str, tuple[Layer, str]] = {
    f.__name__: (f, form)
    for form, layers in {
        "dense": (
            all_then_combined, all_with_biases, batches_of_tokens, scores_masked, two_arg_maxima,
            experts_first, masked_rows, one_product_sums_experts,
            three_operands, one_big_matrix,
        ),
        "batched": (gathered, gathered_with_biases, gathered_batches, selected, looked_up, weighted_activation, ids_turned),
    }.items()
    for f in layers
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_one_call(name: str) -> None:
    layer, form = LAYERS[name]
    args = inputs(2, 3) if "batches" in name else inputs()
    fused = Fused(layer)
    got = fused(*args)
    assert fused.count("moe") == [1], fused.reasons
    (finding,) = (f for f in fused.findings if f.kind == "moe")
    assert finding.form.startswith(f"{form}, act(g, u) = g*u*sigmoid(g), gate/up halves, weight on output")
    assert ("biases b1+b2" in finding.form) == ("biases" in name)
    assert (finding.dims["top_k"], finding.dims["hidden"], finding.dims["inner"]) == (K, H, INNER)
    assert_close(got, exact(*args, biases="biases" in name), 1e-5)


@pytest.mark.parametrize("name", ["all_then_combined", "masked_rows", "gathered_batches", "batches_of_tokens"])
def test_sizes_that_change(name: str) -> None:
    layer, _ = LAYERS[name]
    fused = Fused(layer, dynamic=True)
    for n in (3, 5):
        args = inputs(2, n) if "batches" in name else inputs(n)
        assert_close(fused(*args), exact(*args), 1e-5)
    assert fused.count("moe") == [1], fused.reasons


# --------------------------------------------------------------------------------------------------- refusals


def every_expert_counts(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    y = einsum("tei,eih->teh", glu(einsum("th,ehi->tei", x, w1)), w2)
    return einsum("te,teh->th", (x @ router).softmax(-1), y)


def one_slot_for_all(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    weights, ids = route(x, router)
    scores = (one_hot(ids[:, :1], E) * weights[..., None]).sum(1)
    y = einsum("tei,eih->teh", glu(einsum("th,ehi->tei", x, w1)), w2)
    return einsum("te,teh->th", scores, y)


def scores_of_other_tokens(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    y = einsum("tei,eih->teh", glu(einsum("th,ehi->tei", x, w1)), w2)
    return einsum("te,teh->th", scores_of(x, router).flip(0), y)


def rows_of_another_router(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    """The experts see the tokens that one router chose, weighted by another."""
    chosen = one_hot(route(x, router.flip(1))[1], E).to(x.dtype)
    y = einsum("eti,eih->eth", glu(einsum("eth,ehi->eti", einsum("tke,th->eth", chosen, x), w1)), w2)
    return einsum("te,eth->th", scores_of(x, router), y)


def experts_turned_round(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    y = einsum("eti,eih->eth", glu(einsum("th,ehi->eti", x, w1)), torch.cat((w2[1:], w2[:1])))
    return einsum("te,eth->th", scores_of(x, router), y)


def weighted_twice(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    weights, ids = route(x, router)
    h = glu(einsum("th,tkhi->tki", x, w1[ids])) * weights[..., None]
    return einsum("tk,tkh->th", weights, einsum("tki,tkih->tkh", h, w2[ids]))


def bias_not_weighted(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    """(w a) W2 + b2 is not w (a W2 + b2)."""
    weights, ids = route(x, router)
    h = glu(einsum("th,tkhi->tki", x, w1[ids])) * weights[..., None]
    return (einsum("tki,tkih->tkh", h, w2[ids]) + b2[ids]).sum(1)


def another_expert_below(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    weights, ids = route(x, router)
    y = einsum("tki,tkih->tkh", glu(einsum("th,tkhi->tki", x, w1[ids])), w2[ids.flip(-1)])
    return einsum("tk,tkh->th", weights, y)


def slots_and_tokens_exchanged(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    """Rows laid out [slots, tokens], read as [tokens, slots]."""
    weights, ids = route(x, router)
    y = einsum("tki,tkih->kth", glu(einsum("th,tkhi->tki", x, w1[ids])), w2[ids])
    return einsum("tk,tkh->th", weights, y.reshape(-1, K, H))


def a_scale_for_each_column(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    weights, ids = route(x, router)
    h = glu(einsum("th,tkhi->tki", x, w1[ids])) * b1[0, :INNER]
    return einsum("tk,tkh->th", weights, einsum("tki,tkih->tkh", h, w2[ids]))


REFUSED: dict[Layer, str] = {
    every_expert_counts: "are no top-k",
    one_slot_for_all: "is weighted by",
    scores_of_other_tokens: "are no top-k",
    rows_of_another_router: "it also depends on",
    experts_turned_round: "not each one once",
    weighted_twice: "weighted both between the products and after them",
    bias_not_weighted: "the bias after them is not",
    another_expert_below: "it also depends on",
    slots_and_tokens_exchanged: "are no [tokens, slots]",
    a_scale_for_each_column: "the activation depends on",
}


@pytest.mark.parametrize("layer", REFUSED, ids=lambda f: f.__name__)
def test_a_bent_layer_is_refused(layer: Layer) -> None:
    args = inputs()
    fused = Fused(layer)
    torch.testing.assert_close(fused(*args), layer(*args), rtol=1e-5, atol=1e-5)
    assert fused.count("moe") == [0]
    assert any(REFUSED[layer] in r for r in fused.reasons), fused.reasons
