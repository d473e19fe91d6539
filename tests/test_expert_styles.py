"""Layers as people write them, one style each: weights of three tensors, sorted rows added up by index, weights in two orders.

Every style is one call with the float64 result; each with one thing bent is refused, with its reason.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, one_hot, silu

from tests.harness import Fused, assert_close

T, H, INNER, E, K = 10, 24, 16, 5, 2


@dataclass(frozen=True)
class Layer:
    """A router [E, H]; gate, up [E, INNER, H], down [E, H, INNER]; biases of the three; turned: down
    as [E, INNER, H]."""

    router: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    b_gate: Tensor
    b_up: Tensor
    b_down: Tensor
    turned: Tensor

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = (x @ self.router.to(x.dtype).t()).softmax(-1).topk(K)
        return weights / weights.sum(-1, keepdim=True), ids

    def to(self, dtype: torch.dtype) -> "Layer":
        return Layer(*(t.to(dtype) for t in vars(self).values()))


Style = Callable[[Layer, Tensor], Tensor]


def layer() -> Layer:
    rng = torch.Generator().manual_seed(0)
    shapes = ((E, H), (E, INNER, H), (E, INNER, H), (E, H, INNER), (E, INNER), (E, INNER), (E, H))
    values = [torch.randn(s, generator=rng) * 0.3 for s in shapes]
    return Layer(*values, values[3].transpose(1, 2).contiguous())


def tokens(n: int = T) -> Tensor:
    return torch.randn(n, H, generator=torch.Generator().manual_seed(1))


def sort(ids: Tensor) -> tuple[Tensor, Tensor]:
    """(permutation of the rows by expert, where each expert's end)."""
    counts = torch.histc(ids.flatten().float(), bins=E, min=0, max=E - 1)
    return ids.flatten().argsort(stable=True), counts.cumsum(0).to(torch.int32)


def grouped(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """[rows, in] x [E, out, in] in bfloat16, as torch's grouped product takes it."""
    return torch._grouped_mm(x.bfloat16(), w.bfloat16().transpose(1, 2), offs=ends)


def sorted_rows(m: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(results of the rows by expert, the permutation, weights)."""
    weights, ids = m.route(x)
    perm, ends = sort(ids)
    gate, up = grouped(x[perm // K], torch.cat((m.gate, m.up), 1), ends).chunk(2, -1)
    return grouped(silu(gate) * up, m.down, ends).to(x.dtype), perm, weights


def batched(m: Layer, x: Tensor, scores: Tensor) -> Tensor:
    """All experts in batched products, weighted by scores [T, E]."""
    rows = x.expand(E, *x.shape)
    g = silu(torch.bmm(rows, m.gate.transpose(1, 2))) * torch.bmm(rows, m.up.transpose(1, 2))
    return (torch.bmm(g, m.down.transpose(1, 2)) * scores.t()[..., None]).sum(0)


# ------------------------------------------------------------------------------------------------------ the styles


def gathered_three(m: Layer, x: Tensor) -> Tensor:
    """Weights gathered per token, gate and up apart, einsums all the way."""
    weights, ids = m.route(x)
    g = silu(torch.einsum("ti,taoi->tao", x, m.gate[ids])) * torch.einsum("ti,taoi->tao", x, m.up[ids])
    return torch.einsum("tai,ta->ti", torch.einsum("tao,taio->tai", g, m.down[ids]), weights)


def gathered_three_with_biases(m: Layer, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    g = torch.einsum("ti,taoi->tao", x, m.gate[ids]) + m.b_gate[ids]
    u = torch.einsum("ti,taoi->tao", x, m.up[ids]) + m.b_up[ids]
    y = torch.einsum("tao,taio->tai", gelu(g, approximate="tanh") * (u + 1), m.down[ids]) + m.b_down[ids]
    return (y * weights.unsqueeze(-1)).sum(1)


def up_first(m: Layer, x: Tensor) -> Tensor:
    """The linear factor is computed, and written, before the gate."""
    weights, ids = m.route(x)
    u = torch.einsum("ti,taoi->tao", x, m.up[ids])
    g = torch.einsum("ti,taoi->tao", x, m.gate[ids])
    return torch.einsum("tao,taio,ta->ti", u * silu(g), m.down[ids], weights)


def dense_three(m: Layer, x: Tensor) -> Tensor:
    """All experts on all tokens."""
    weights, ids = m.route(x)
    scores = torch.zeros(x.shape[0], E, dtype=x.dtype).scatter(1, ids, weights)
    g = silu(torch.einsum("th,eih->tei", x, m.gate)) * torch.einsum("th,eih->tei", x, m.up)
    return torch.einsum("teh,te->th", torch.einsum("tei,ehi->teh", g, m.down), scores)


def batched_three(m: Layer, x: Tensor) -> Tensor:
    """All experts in batched products, down stored [in, out] beside gate and up [out, in]."""
    weights, ids = m.route(x)
    scores = torch.zeros(x.shape[0], E, dtype=x.dtype).scatter(1, ids, weights)
    return batched(m, x, scores)


def sorted_scattered(m: Layer, x: Tensor) -> Tensor:
    """Sorted rows in grouped products; scatter_add with the tokens' numbers repeated for every column."""
    weights, ids = m.route(x)
    perm, ends = sort(ids)
    token = (perm // K).reshape(-1, 1).expand(-1, H)
    rows = torch.gather(x, 0, token)
    y = grouped(silu(grouped(rows, m.gate, ends)) * grouped(rows, m.up, ends), m.down, ends)
    y = (y.float() * weights.flatten()[perm].reshape(-1, 1)).to(x.dtype)
    return torch.zeros_like(x).scatter_add(0, token, y)


def sorted_added(m: Layer, x: Tensor) -> Tensor:
    """Gate and up in one product of sorted rows; index_add."""
    y, perm, weights = sorted_rows(m, x)
    return torch.zeros_like(x).index_add(0, perm // K, y * weights.flatten()[perm].unsqueeze(1))


def sorted_put_back(m: Layer, x: Tensor) -> Tensor:
    """Rows written to where the sort had them from, over a tensor that holds nothing yet."""
    y, perm, weights = sorted_rows(m, x)
    out = torch.empty_like(y)
    out[perm] = y
    return (out.view(-1, K, H) * weights.unsqueeze(-1)).sum(1)


def sorted_scattered_back(m: Layer, x: Tensor) -> Tensor:
    """The same by a scatter, each place repeated for every column."""
    y, perm, weights = sorted_rows(m, x)
    out = torch.zeros_like(y).scatter_(0, perm.unsqueeze(1).expand(-1, H), y)
    return (out.view(-1, K, H) * weights.unsqueeze(-1)).sum(1)


def scores_added(m: Layer, x: Tensor) -> Tensor:
    """All experts in batched products, weights added up into scores."""
    weights, ids = m.route(x)
    scores = torch.zeros(x.shape[0], E, dtype=x.dtype).scatter_add(1, ids, weights)
    return batched(m, x, scores)


def in_two_orders(m: Layer, x: Tensor) -> Tensor:
    """gate and up [out, in], down [in, out]."""
    weights, ids = m.route(x)
    g = silu(torch.einsum("ti,taoi->tao", x, m.gate[ids])) * torch.einsum("ti,taoi->tao", x, m.up[ids])
    return torch.einsum("tai,ta->ti", torch.einsum("tao,taoi->tai", g, m.turned[ids]), weights)


def masked_places(m: Layer, x: Tensor) -> Tensor:
    """Masks of places [tokens, experts, places], gate and up apart."""
    weights, ids = m.route(x)
    chosen = one_hot(ids, E).to(x.dtype)
    place = ((chosen.sum(1).cumsum(0) - 1).unsqueeze(1) * chosen).sum(-1).long()
    where = chosen.unsqueeze(-1) * one_hot(place, x.shape[0]).to(x.dtype).unsqueeze(2)
    rows = torch.einsum("tec,th->ech", where.sum(1), x)
    g = silu(torch.einsum("ech,eih->eci", rows, m.gate)) * torch.einsum("ech,eih->eci", rows, m.up)
    y = torch.einsum("eci,ehi->ech", g, m.down)
    return torch.einsum("tec,ech->th", (where * weights[:, :, None, None]).sum(1), y)


def one_by_one(m: Layer, x: Tensor) -> Tensor:
    """A loop over all experts on all tokens."""
    weights, ids = m.route(x)
    out = torch.zeros_like(x)
    for e in range(E):
        y = (silu(x @ m.gate[e].t()) * (x @ m.up[e].t())) @ m.down[e].t()
        out = out + y * (weights * (ids == e)).sum(-1, keepdim=True)
    return out


STYLES: dict[str, Style] = {
    s.__name__: s
    for s in (
        gathered_three, gathered_three_with_biases, up_first, dense_three, batched_three, sorted_scattered, sorted_added,
        sorted_put_back, sorted_scattered_back, scores_added, in_two_orders, masked_places, one_by_one,
    )
}  # fmt: skip


def reference(m: Layer, x: Tensor, name: str) -> Tensor:
    m, x = m.to(torch.float64), x.double()
    return gathered_three_with_biases(m, x) if "biases" in name else gathered_three(m, x)


@pytest.mark.parametrize("name", STYLES)
def test_a_style_is_one_call(name: str) -> None:
    m, x = layer(), tokens()
    fused = Fused(lambda x: STYLES[name](m, x))
    got = fused(x)
    assert fused.count("moe") == [1], fused.reasons
    if name != "masked_places":  # there the masks are made of its ids
        assert fused.count("router") == [1], fused.reasons
    assert_close(got, reference(m, x, name), 2e-2 if "sorted" in name else 1e-5)


def test_one_expert_a_token_weighted_before() -> None:
    """Where a token has one row, its weighted row is a tensor like x."""
    m, x = layer(), tokens()

    def style(m: Layer, x: Tensor) -> Tensor:
        weights, ids = (x @ m.router.t()).sigmoid().topk(1)
        rows = x.unsqueeze(1) * weights.unsqueeze(-1)
        g = silu(torch.einsum("tai,taoi->tao", rows, m.gate[ids])) * torch.einsum("tai,taoi->tao", rows, m.up[ids])
        return torch.einsum("tao,taio->ti", g, m.down[ids])

    fused = Fused(lambda x: style(m, x))
    got = fused(x)
    assert fused.count("moe") == fused.count("router") == [1], fused.reasons
    assert "weight on input" in next(f.form for f in fused.findings if f.kind == "moe")
    assert_close(got, style(m.to(torch.float64), x.double()), 1e-5)


def scores_on_repeated_rows(m: Layer, x: Tensor, shift: int = 0, other: bool = False) -> Tensor:
    """As Llama 4 began: scores [experts, tokens] on rows that are gathered for each expert and added up by the same indices.

    shift: how far off the tokens are that rows are added to. other: whether scores of experts that are not chosen are not 0.
    """

    def places(shift: int) -> Tensor:
        t = (torch.arange(len(x)) + shift) % len(x) if shift else torch.arange(len(x))
        return t.view(1, -1).expand(E, -1).reshape(-1, 1).expand(-1, x.shape[1])

    logits = x @ m.router.t()
    top = logits.topk(1, -1)
    scores = torch.full_like(logits, -torch.inf).scatter_(1, top.indices, top.values).t()
    scores = scores.sigmoid() if not other else scores.exp() + 0.5
    rows = (torch.gather(x, 0, places(0)) * scores.reshape(-1, 1)).view(E, -1, x.shape[1])
    g = silu(torch.bmm(rows, m.gate.transpose(1, 2))) * torch.bmm(rows, m.up.transpose(1, 2))
    y = torch.bmm(g, m.down.transpose(1, 2)).view(-1, x.shape[1])
    return torch.zeros_like(x).scatter_add_(0, places(shift), y)


@pytest.mark.parametrize("dynamic", [False, True])
def test_scores_by_expert_on_repeated_rows(dynamic: bool) -> None:
    m = layer()
    fused = Fused(lambda x: scores_on_repeated_rows(m, x), dynamic=dynamic)
    for x in (tokens(), tokens(T + 4)):
        assert_close(fused(x), scores_on_repeated_rows(m.to(torch.float64), x.double()), 1e-5)
    found = 1 if dynamic else 2
    assert (fused.count("moe"), fused.count("router")) == ([1] * found, [1] * found), fused.reasons


@pytest.mark.parametrize("bent", [{"shift": 1}, {"other": True}])
def test_scores_by_expert_on_repeated_rows_that_are_bent(bent: dict[str, int]) -> None:
    m, x = layer(), tokens()
    fused = Fused(lambda x: scores_on_repeated_rows(m, x, **bent))
    assert_close(fused(x), scores_on_repeated_rows(m.to(torch.float64), x.double(), **bent), 1e-5)
    assert fused.count("moe") == [0]
    assert fused.reasons


@pytest.mark.parametrize(
    "name", ["gathered_three", "dense_three", "sorted_scattered", "sorted_put_back", "scores_added"]
)
def test_compiled_with_other_numbers_of_tokens(name: str) -> None:
    m = layer()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: STYLES[name](m, x), backend="braze", options={"require": ["moe"]})
    for n in (7, 12):
        x = tokens(n)
        with torch.no_grad():
            assert_close(compiled(x), reference(m, x, name), 2e-2 if "sorted" in name else 1e-5)


# ------------------------------------------------------------------------------------------------------ one thing bent


def other_rows(m: Layer, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    g = silu(torch.einsum("ti,taoi->tao", x, m.gate[ids])) * torch.einsum("ti,taoi->tao", x.flip(0), m.up[ids])
    return torch.einsum("tai,ta->ti", torch.einsum("tao,taio->tai", g, m.down[ids]), weights)


def other_experts(m: Layer, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    g = silu(torch.einsum("ti,taoi->tao", x, m.gate[ids])) * torch.einsum("ti,taoi->tao", x, m.up[(ids + 1) % E])
    return torch.einsum("tai,ta->ti", torch.einsum("tao,taio->tai", g, m.down[ids]), weights)


def one_bias(m: Layer, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    g = torch.einsum("ti,taoi->tao", x, m.gate[ids]) + m.b_gate[ids]
    y = torch.einsum("tao,taio->tai", silu(g) * torch.einsum("ti,taoi->tao", x, m.up[ids]), m.down[ids])
    return (y * weights.unsqueeze(-1)).sum(1)


def columns_turned(m: Layer, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    g = silu(torch.einsum("ti,taoi->tao", x, m.gate[ids])) * torch.einsum("ti,taoi->tao", x, m.up[ids]).flip(-1)
    return torch.einsum("tai,ta->ti", torch.einsum("tao,taio->tai", g, m.down[ids]), weights)


def gate_returned(m: Layer, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    gate = torch.einsum("ti,taoi->tao", x, m.gate[ids])
    y = torch.einsum("tao,taio->tai", silu(gate) * torch.einsum("ti,taoi->tao", x, m.up[ids]), m.down[ids])
    return torch.einsum("tai,ta->ti", y, weights) + gate.mean()


def added_at_rows(m: Layer, x: Tensor) -> Tensor:
    """Rows are added up as if the tokens' slots were apart."""
    y, perm, weights = sorted_rows(m, x)
    return torch.zeros_like(x).index_add(0, perm % x.shape[0], y * weights.flatten()[perm].unsqueeze(1))


def added_in_order(m: Layer, x: Tensor) -> Tensor:
    """Rows are added up without the permutation that sorted them."""
    y, perm, weights = sorted_rows(m, x)
    return torch.zeros_like(x).index_add(0, torch.arange(T * K) // K, y * weights.flatten()[perm].unsqueeze(1))


def added_to_something(m: Layer, x: Tensor) -> Tensor:
    """The rows' sum begins with a multiple of the tokens, which no op of experts has a place for."""
    y, perm, weights = sorted_rows(m, x)
    return (2 * x).index_add(0, perm // K, y * weights.flatten()[perm].unsqueeze(1))


def another_router(m: Layer, x: Tensor) -> Tensor:
    """Ids and weights of two choices."""
    y, perm, weights = sorted_rows(m, x)
    other = m.route(x.flip(1))[1].flatten().argsort(stable=True)
    return torch.zeros_like(x).index_add(0, perm // K, y * weights.flatten()[other].unsqueeze(1))


def put_back_in_reverse(m: Layer, x: Tensor) -> Tensor:
    y, perm, weights = sorted_rows(m, x)
    out = torch.empty_like(y)
    out[perm.flip(0)] = y
    return (out.view(-1, K, H) * weights.unsqueeze(-1)).sum(1)


def a_row_kept(m: Layer, x: Tensor) -> Tensor:
    """All rows but the first are put back."""
    y, perm, weights = sorted_rows(m, x)
    out = torch.ones_like(y)
    out[perm[1:]] = y[1:]
    return (out.view(-1, K, H) * weights.unsqueeze(-1)).sum(1)


def by_a_strange_function(m: Layer, x: Tensor) -> Tensor:
    """Of which no recogniser has heard: that the products belong together is told all the same."""
    weights, ids = m.route(x)
    perm, ends = sort(ids)
    y = grouped(torch.atan(grouped(x[perm // K], m.gate, ends)), m.down, ends).to(x.dtype)
    return torch.zeros_like(x).index_add(0, perm // K, y * weights.flatten()[perm].unsqueeze(1))


def root_of_added(m: Layer, x: Tensor) -> Tensor:
    """A function of added weights, which ids that are alike would make another one than the sum of the functions."""
    weights, ids = m.route(x)
    scores = torch.zeros(x.shape[0], E, dtype=x.dtype).scatter_add(1, ids, weights).sqrt()
    return batched(m, x, scores)


REFUSED: dict[Style, str] = {
    other_rows: "product",
    other_experts: "different experts' weights",
    one_bias: "only one of gate and up has a bias",
    columns_turned: "the activation depends on",
    gate_returned: "is also used by",
    added_at_rows: "not linear in the second product's rows",
    added_in_order: "are not put back by the inverse of their sort",
    added_to_something: "not weighted as they are",
    another_router: "weight",
    put_back_in_reverse: "not linear in the second product's rows",
    a_row_kept: "not linear in the second product's rows",
    root_of_added: "no top-k",
    by_a_strange_function: "no function of one row's elements",
}


@pytest.mark.parametrize("style", REFUSED, ids=lambda s: s.__name__)
def test_one_thing_bent_is_refused(style: Style) -> None:
    m, x = layer(), tokens()
    fused = Fused(lambda x: style(m, x))
    assert_close(fused(x), style(m.to(torch.float64), x.double()), 2e-2)
    assert fused.count("moe") == [0]
    assert any(REFUSED[style] in r for r in fused.reasons), fused.reasons
