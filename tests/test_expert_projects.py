"""Expert blocks as projects outside of transformers write them: rows added up over shared experts' results (torchtitan,
torchtune, Llama 4), rows sorted slot by slot, gate and up as parts of one gathered tensor (SGLang).

Each is one call with the float64 result; each with one thing bent is refused, and what was moved for it is put back.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot, silu

from braze.passes import pipeline
from tests.harness import Fused, assert_close, capture
from tests.test_expert_styles import (
    INNER,
    E,
    H,
    K,
    Layer,
    gathered_three,
    grouped,
    layer,
    reference,
    sort,
    sorted_rows,
    tokens,
)

Style = Callable[[Layer, Tensor], Tensor]


def shared(m: Layer, x: Tensor) -> Tensor:
    """A dense MLP beside the experts."""
    return (silu(x @ m.gate[0].t()) * (x @ m.up[1].t())) @ m.down[2].t()


def by_token(perm: Tensor) -> Tensor:
    return (perm // K).reshape(-1, 1).expand(-1, H)


def added_over_shared(m: Layer, x: Tensor) -> Tensor:
    y, perm, weights = sorted_rows(m, x)
    y = (y.float() * weights.flatten()[perm].reshape(-1, 1)).to(x.dtype)
    return shared(m, x).scatter_add(0, by_token(perm), y)


def added_over_shared_in_place(m: Layer, x: Tensor) -> Tensor:
    y, perm, weights = sorted_rows(m, x)
    out = shared(m, x)
    out.index_add_(0, perm // K, y * weights.flatten()[perm].unsqueeze(1))
    return out


def weighted_before(m: Layer, x: Tensor) -> Tensor:
    """The weight on the experts' input."""
    weights, ids = m.route(x)
    perm, ends = sort(ids)
    rows = torch.gather(x, 0, by_token(perm)) * weights.flatten()[perm].reshape(-1, 1)
    y = grouped(silu(grouped(rows, m.gate, ends)) * grouped(rows, m.up, ends), m.down, ends).to(x.dtype)
    return shared(m, x).scatter_add(0, by_token(perm), y)


def all_over_shared(m: Layer, x: Tensor) -> Tensor:
    """All experts on all tokens, scores [experts, tokens] on their input."""
    logits = x @ m.router.to(x.dtype).t()
    top = logits.topk(1, -1)
    scores = torch.full_like(logits, -torch.inf).scatter_(1, top.indices, top.values).t().sigmoid()
    places = torch.arange(len(x)).view(1, -1).expand(E, -1).reshape(-1, 1).expand(-1, H)
    rows = (torch.gather(x, 0, places) * scores.reshape(-1, 1)).view(E, -1, H)
    g = silu(torch.bmm(rows, m.gate.transpose(1, 2))) * torch.bmm(rows, m.up.transpose(1, 2))
    return shared(m, x).scatter_add_(0, places, torch.bmm(g, m.down.transpose(1, 2)).view(-1, H))


def slot_by_slot(m: Layer, x: Tensor) -> Tensor:
    """Every token's first slot comes before the second ones."""
    weights, ids = m.route(x)
    flat = ids.t().reshape(-1)
    perm = flat.argsort(stable=True)
    ends = one_hot(flat, E).sum(0).cumsum(0).to(torch.int32)
    rows = x[perm % len(x)]
    y = grouped(silu(grouped(rows, m.gate, ends)) * grouped(rows, m.up, ends), m.down, ends).to(x.dtype)
    return torch.zeros_like(x).index_add(0, perm % len(x), y * weights.t().reshape(-1)[perm].unsqueeze(1))


LEFT, RIGHT = slice(0, INNER), slice(INNER, 2 * INNER)
STYLES: dict[str, Style] = {
    "over shared experts": added_over_shared,
    "over shared experts, in place": added_over_shared_in_place,
    "over shared experts, weighted before": weighted_before,
    "slot by slot": slot_by_slot,
}


@pytest.mark.parametrize("name", STYLES)
def test_a_style_is_one_call(name: str) -> None:
    m, x = layer(), tokens()
    fused = Fused(lambda x: STYLES[name](m, x))
    got = fused(x)
    assert fused.count("moe") == fused.count("router") == [1], fused.reasons
    wide, exact = m.to(torch.float64), x.double()
    expected = reference(m, x, name)
    if "before" in name:
        expected = in_turn(wide, exact)
    assert_close(got, expected + (shared(wide, exact) if "shared" in name else 0), 2e-2)


def in_turn(m: Layer, x: Tensor) -> Tensor:
    """The weight on the input, token by token."""
    weights, ids = m.route(x)
    rows = x.unsqueeze(1) * weights.unsqueeze(-1)
    g = silu(torch.einsum("tai,taoi->tao", rows, m.gate[ids])) * torch.einsum("tai,taoi->tao", rows, m.up[ids])
    return torch.einsum("tao,taio->ti", g, m.down[ids])


@pytest.mark.parametrize("dynamic", [False, True])
def test_all_experts_over_shared_ones(dynamic: bool) -> None:
    m = layer()
    fused = Fused(lambda x: all_over_shared(m, x), dynamic=dynamic)
    for x in (tokens(), tokens(14)):
        assert_close(fused(x), all_over_shared(m.to(torch.float64), x.double()), 1e-5)
    assert set(fused.count("moe")) == set(fused.count("router")) == {1}, fused.reasons


@pytest.mark.parametrize("name", ["over shared experts", "over shared experts, in place", "slot by slot"])
def test_other_numbers_of_tokens_are_the_same_graph(name: str) -> None:
    m = layer()
    fused = Fused(lambda x: STYLES[name](m, x), dynamic=True)
    for n in (7, 12, 1):
        got = fused(tokens(n))
        wide, exact = m.to(torch.float64), tokens(n).double()
        assert_close(got, reference(m, tokens(n), "") + (shared(wide, exact) if "shared" in name else 0), 2e-2)
    assert set(fused.count("moe")) == {1}, fused.reasons


class Gathered(torch.nn.Module):
    """One tensor with gate and up [E, 2 INNER, H], parts of it by two slices of what a token gathers."""

    def __init__(self, first: slice, second: slice, swapped: bool = False, biased: str = "") -> None:
        super().__init__()
        m = layer()
        self.m, self.first, self.second, self.biased = m, first, second, biased
        self.w = torch.nn.Parameter(torch.cat((m.gate, m.up), 1))
        self.b = torch.nn.Parameter(torch.cat((m.b_gate, m.b_up), 1))
        self.swapped = swapped

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.m.route(x)
        w, b = self.w.to(x.dtype)[ids], self.b.to(x.dtype)[ids]
        a = torch.einsum("ti,taoi->tao", x, w[:, :, self.first]) + (b[:, :, self.first] if self.biased else 0)
        c = torch.einsum("ti,taoi->tao", x, w[:, :, self.second]) + (b[:, :, self.second] if self.biased == "ab" else 0)
        g = a * silu(c) if self.swapped else silu(a) * c
        return torch.einsum("tao,taio,ta->ti", g, self.m.down.to(x.dtype)[ids], weights)


@pytest.mark.parametrize(
    ("first", "second", "swapped", "biased", "said"),
    [
        (LEFT, RIGHT, False, "", "gate/up halves"),
        (LEFT, RIGHT, True, "", "act(g, u) = g*u*sigmoid(u), gate/up halves"),
        (RIGHT, LEFT, False, "", "act(g, u) = g*u*sigmoid(u), gate/up halves"),
        (LEFT, RIGHT, False, "ab", "gate/up halves, weight on output, biases b1"),
    ],
)
def test_gate_and_up_are_parts_of_one_gathered_tensor(
    first: slice, second: slice, swapped: bool, biased: str, said: str
) -> None:
    m = Gathered(first, second, swapped, biased)
    fused = Fused(m)
    got = fused(tokens())
    assert fused.count("moe") == fused.count("router") == [1], fused.reasons
    assert said in next(f.form for f in fused.findings if f.kind == "moe")
    assert "moe_apart" not in str({n.target for r in fused.results for n, _ in r.calls})
    wide = Gathered(first, second, swapped, biased).double()
    wide.m = wide.m.to(torch.float64)
    with torch.no_grad():
        assert_close(got, wide(tokens().double()), 1e-5)


@pytest.mark.parametrize(
    ("first", "second", "biased", "reason"),
    [
        (slice(0, INNER), slice(1, INNER + 1), "", "neither halves nor interleaved"),
        (slice(0, INNER), slice(0, INNER), "", "neither halves nor interleaved"),
        (LEFT, RIGHT, "a", "only one of gate and up has a bias"),
    ],
)
def test_other_parts_are_refused(first: slice, second: slice, biased: str, reason: str) -> None:
    m = Gathered(first, second, biased=biased)
    fused = Fused(m)
    got = fused(tokens())
    assert fused.count("moe") == [0]
    assert any(reason in r for r in fused.reasons), fused.reasons
    with torch.no_grad():
        assert_close(got, m(tokens()).double(), 1e-5)


# ------------------------------------------------------------------------------------------------ what is put back


def no_experts(m: Layer, x: Tensor) -> Tensor:
    """Rows added over something, of a graph that has no experts: node features, say."""
    return (2 * x).index_add(0, torch.arange(len(x)).flip(0), x @ m.router.t() @ m.router)


def other_rows_over_shared(m: Layer, x: Tensor) -> Tensor:
    """Rows go to the next token: no expert block."""
    y, perm, weights = sorted_rows(m, x)
    rows = y * weights.flatten()[perm].unsqueeze(1)
    return shared(m, x).index_add(0, (perm // K + 1) % len(x), rows)


@pytest.mark.parametrize("style", [no_experts, other_rows_over_shared])
@pytest.mark.parametrize("dynamic", [False, True])
def test_what_is_not_taken_is_put_back(style: Style, dynamic: bool) -> None:
    m = layer()
    (before,) = capture(lambda x: style(m, x), tokens(), dynamic=dynamic)
    before.graph.eliminate_dead_code()
    text = before.code
    result = pipeline.run(before.graph, strict=True)
    before.recompile()
    assert [f.kind for _, f in result.calls] == []
    assert before.code.replace(" ", "") == text.replace(" ", "")


def test_a_block_over_a_base_that_reads_it_again() -> None:
    """The base is used after the sum too: nothing of it may be lost."""

    def style(x: Tensor) -> tuple[Tensor, Tensor]:
        y, perm, weights = sorted_rows(m, x)
        base = shared(m, x)
        return base.index_add(0, perm // K, y * weights.flatten()[perm].unsqueeze(1)), base.exp()

    m, x = layer(), tokens()
    fused = Fused(style)
    got, base = fused(x)
    assert fused.count("moe") == [1], fused.reasons
    wide, exact = m.to(torch.float64), x.double()
    assert_close(got, gathered_three(wide, exact) + shared(wide, exact), 2e-2)
    assert_close(base, shared(wide, exact).exp(), 1e-5)
