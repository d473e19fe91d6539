"""Experts in a loop over their number, each on every token and masked: one call, and the weights stay where they are."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, silu

from tests.harness import Fused, assert_close

T, H, INNER, E, K = 6, 32, 16, 4, 2
Masks = Callable[[Tensor, Tensor, int], Tensor]
Between = Callable[[Tensor, Tensor], Tensor]


def masked_sum(w: Tensor, ids: Tensor, e: int) -> Tensor:
    return (w * (ids == e)).sum(-1, keepdim=True)


def selected(w: Tensor, ids: Tensor, e: int) -> Tensor:
    return torch.where(ids == e, w, 0.0).sum(-1, keepdim=True)


def by_one_hot(w: Tensor, ids: Tensor, e: int) -> Tensor:
    return (one_hot(ids, E).to(w.dtype) * w.unsqueeze(-1)).sum(-2)[..., e : e + 1]


def slot_by_slot(w: Tensor, ids: Tensor, e: int) -> Tensor:
    total = torch.zeros(*w.shape[:-1], 1, dtype=w.dtype)
    for j in range(K):
        total = total + (ids[..., j : j + 1] == e).to(w.dtype) * w[..., j : j + 1]
    return total


class Gated(nn.Module):
    """One expert of three linear layers."""

    def __init__(self, bias: bool, between: Between) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(H, INNER, bias), nn.Linear(H, INNER, bias)
        self.down, self.between = nn.Linear(INNER, H, bias), between

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(self.gate(x), self.up(x)))  # type: ignore[no-any-return]


class Joint(nn.Module):
    """One expert of two linear layers, gate and up in halves."""

    def __init__(self, bias: bool, between: Between) -> None:
        super().__init__()
        self.first, self.down, self.between = nn.Linear(H, 2 * INNER, bias), nn.Linear(INNER, H, bias), between

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(*self.first(x).chunk(2, -1)))  # type: ignore[no-any-return]


class Loop(nn.Module):
    """A layer of E experts, each by itself."""

    def __init__(
        self,
        masks: Masks = masked_sum,
        expert: type[nn.Module] = Gated,
        bias: bool = False,
        between: Between = lambda g, u: silu(g) * u,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(expert(bias, between) for _ in range(E))
        self.masks = masks

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = self.router(x).softmax(-1).topk(K)
        return w / w.sum(-1, keepdim=True), ids

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            y = y + self.masks(w, ids, e) * expert(x)
        return y


class Selected(Loop):
    """The sum so far or one more term, slot by slot."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = expert(x)
            for j in range(K):
                y = torch.where((ids[..., j] == e)[..., None], y + w[..., j, None] * out, y)
        return y


class Scattered(Loop):
    """Scores [tokens, experts], zero where the top-k did not choose."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        scores = torch.zeros(x.shape[0], E).scatter(1, ids, w)
        return sum((scores[:, e, None] * f(x) for e, f in enumerate(self.experts)), torch.zeros_like(x))


class Indexed(Loop):
    """Experts that are parts of two tensors, stored [E, in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(E, H, 2 * INNER) * 0.3)
        self.w2 = nn.Parameter(torch.randn(E, INNER, H) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        y = torch.zeros_like(x)
        for e in range(E):
            gate, up = (x @ self.w1[e]).chunk(2, -1)
            y = y + masked_sum(w, ids, e) * ((silu(gate) * up) @ self.w2[e])
        return y


class AnyMask(Loop):
    """Experts' outputs where any slot chose them, as the loops of many models skip the others."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            chosen = ids == e
            weight = (w * chosen).sum(-1, keepdim=True)
            y = y + torch.where(chosen.any(-1, keepdim=True), expert(x) * weight, 0.0)
        return y


class Stacked(Loop):
    """All outputs side by side, of which a token's are gathered."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        outs = torch.stack([f(x) for f in self.experts], 1)
        return (outs.gather(1, ids[..., None].expand(-1, -1, H)) * w[..., None]).sum(1)


class Picked(Loop):
    """As above, by an index."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        outs = torch.stack([f(x) for f in self.experts], 1)
        return (outs[torch.arange(x.shape[0])[:, None], ids] * w[..., None]).sum(1)


class Mixed(Loop):
    """As above, mixed by an einsum."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        scores = torch.zeros(x.shape[0], E).scatter(1, ids, w)
        return torch.einsum("te,teh->th", scores, torch.stack([f(x) for f in self.experts], 1))


class Normalised(Loop):
    """All scores, masked, then divided by their sum."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        scores = scores * torch.zeros_like(scores).scatter_(-1, scores.topk(K).indices, 1.0)
        scores = scores / scores.sum(-1, keepdim=True)
        return sum((scores[..., e, None] * f(x) for e, f in enumerate(self.experts)), torch.zeros_like(x))


class OnInput(Loop):
    """The weight is on the expert's input; without biases, an expert of nothing gives nothing."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        return sum((f(x * masked_sum(w, ids, e)) for e, f in enumerate(self.experts)), torch.zeros_like(x))


class OnInputMasked(Loop):
    """The weight is on the expert's input, and outputs of experts that are not chosen are left out."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            y = y + expert(x * masked_sum(w, ids, e)) * (ids == e).any(-1, keepdim=True)
        return y


class Flattened(Loop):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, H)).view(x.shape)


class WithShared(Loop):
    """A shared expert and the residual are added to the routed ones."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x) + self.experts[0](x)  # type: ignore[no-any-return]


def tokens(*lead: int) -> Tensor:
    return torch.randn(*lead, H, generator=torch.Generator().manual_seed(1))


def exact(model: Loop, x: Tensor) -> Tensor:
    """Token by token in float64, each through its own experts."""
    with torch.no_grad():
        model = model.double()
        rows = x.double().reshape(-1, H)
        w, ids = model.route(rows)
        out = torch.zeros_like(rows)
        for t in range(rows.shape[0]):
            for j, e in enumerate(ids[t].tolist()):
                if isinstance(model, OnInput | OnInputMasked):
                    out[t] += model.experts[e](w[t, j] * rows[t])
                else:
                    out[t] += w[t, j] * model.experts[e](rows[t])
    model.float()
    return out.reshape(x.shape)


LAYERS: dict[str, Callable[[], Loop]] = {
    "masked sum": Loop,
    "masked sum, biases": lambda: Loop(bias=True),
    "a select": lambda: Loop(selected, Joint),
    "one-hot": lambda: Loop(by_one_hot, Joint, True),
    "scattered scores": Scattered,
    "slot by slot": lambda: Loop(slot_by_slot, Joint),
    "any slot": lambda: AnyMask(bias=True),
    "gathered outputs": lambda: Stacked(bias=True),
    "indexed outputs": Picked,
    "an einsum of outputs": Mixed,
    "scores masked and normalised": Normalised,
    "weight on input": OnInput,
    "weight on input, biases": lambda: OnInputMasked(bias=True),
    "a sum or one more": lambda: Selected(bias=True),
    "clamped, alpha-sigmoid": lambda: Loop(
        between=lambda g, u: (u.clamp(-1, 1) + 1) * g.clamp(max=1.0) * torch.sigmoid(1.702 * g.clamp(max=1.0))
    ),
    "softcap, nobody's": lambda: Loop(
        expert=Joint, bias=True, between=lambda g, u: 3 * torch.tanh(g / 3) * (u - 0.2 * g)
    ),
    "gelu, tanh": lambda: Loop(between=lambda g, u: nn.functional.gelu(g, approximate="tanh") * u),
    "gelu, erf": lambda: Loop(expert=Joint, between=lambda g, u: nn.functional.gelu(g) * u),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_loop_over_experts_is_one_call(name: str) -> None:
    model, x = LAYERS[name](), tokens(T)
    fused = Fused(model)
    got = fused(x)
    assert fused.count("moe") == [1], fused.reasons
    assert "unrolled" in fused.findings[0].form
    targets = [c.target.name() for r in fused.results for c, f in r.calls if f.kind == "moe"]
    assert targets == ["braze::moe_separate"]
    assert_close(got, exact(model, x), 1e-5)


def test_tokens_in_two_dimensions() -> None:
    model, x = Selected(), tokens(2, 3)
    fused = Fused(model)
    got = fused(x)
    assert fused.count("moe") == [1], fused.reasons
    assert_close(got, exact(model, x), 1e-5)


@pytest.mark.parametrize("make", [Loop, Selected, Flattened], ids=lambda c: c.__name__)
def test_tokens_in_two_dimensions_of_any_size(make: type[Loop]) -> None:
    model = make()
    fused = Fused(model, dynamic=True)
    for lead in ((2, 3), (4, 5)):
        x = tokens(*lead)
        assert_close(fused(x), exact(model, x), 1e-5)
    assert fused.count("moe") == [1], fused.reasons


def test_parts_of_one_tensor_are_given_as_that_tensor() -> None:
    model, x = Indexed(), tokens(T)
    fused = Fused(model)
    got = fused(x)
    assert fused.count("moe") == [1], fused.reasons
    assert [c.target.name() for r in fused.results for c, f in r.calls if f.kind == "moe"] == ["braze::moe"]
    with torch.no_grad():
        assert_close(got, model.double()(x.double()), 1e-5)


def test_a_sum_over_the_columns_of_the_output_stays_outside() -> None:
    model, x = Loop(), tokens(T)
    fused = Fused(lambda x: (out := model(x), out.sum(-1)))
    got = fused(x)
    assert fused.count("moe") == [1], fused.reasons
    assert_close(got[0], exact(model, x), 1e-5)
    assert_close(got[1], exact(model, x).sum(-1), 1e-5)


def test_what_is_added_to_the_experts_stays_outside() -> None:
    model, x = WithShared(), tokens(T)
    fused = Fused(model)
    got = fused(x)
    assert fused.count("moe") == [1], fused.reasons
    with torch.no_grad():
        assert_close(got, model.double()(x.double()), 1e-5)


def test_weights_that_change_are_read_as_they_are() -> None:
    """In place, as an optimizer or a merged adapter changes them; and no tensor of all experts' weights is made."""
    model, x = Loop(), tokens(T)
    fused = Fused(model)
    before = fused(x)
    with torch.no_grad():
        for p in model.experts.parameters():
            p.copy_(torch.randn(p.shape) * 0.3)
    after = fused(x)
    assert len(fused.results) == 1, "compiled anew: the test shows nothing"
    assert_close(after, exact(model, x), 1e-5)
    assert (after - before).abs().max() > 0.01
    names = {n.target.name() for r in fused.results for n in r.calls[0][0].graph.nodes if hasattr(n.target, "name")}
    assert not names & {"aten::stack", "aten::cat"}


# --------------------------------------------------------------------------------------------------- refusals


class TwoRouters(Loop):
    """Chosen by one router's ids, weighted by the columns of the ids the other way round."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        return sum(((w * (ids.flip(-1) == e)).sum(-1, keepdim=True) * f(x) for e, f in enumerate(self.experts)))


class OtherActivation(Loop):
    def __init__(self) -> None:
        super().__init__()
        self.experts[2].between = lambda g, u: torch.relu(g) * u


class ExpertSkipped(Loop):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        return sum((masked_sum(w, ids, e) * self.experts[e](x) for e in (0, 2, 3)), torch.zeros_like(x))


class SlotDropped(Loop):
    """One expert counts in its first slot only."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        y = masked_sum(w[:, :1], ids[:, :1], 0) * self.experts[0](x)
        for e in range(1, E):
            y = y + masked_sum(w, ids, e) * self.experts[e](x)
        return y


class OtherInput(Loop):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            y = y + masked_sum(w, ids, e) * expert(x if e else x.flip(0))
        return y


class Kept(Loop):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        w, ids = self.route(x)
        outs = [expert(x) for expert in self.experts]
        return sum((masked_sum(w, ids, e) * out for e, out in enumerate(outs)), torch.zeros_like(x)), outs[1]


class Everyone(Loop):
    """Scores of all experts, none chosen."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        scores = torch.zeros_like(scores).scatter(1, self.route(x)[1], 1.0) * 0.5 + scores
        return sum((scores[:, e, None] * f(x) for e, f in enumerate(self.experts)), torch.zeros_like(x))


class FirstOnly(Loop):
    """Scores of all experts, some chosen; experts of the first half."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        scores = torch.zeros_like(scores).scatter(1, self.route(x)[1], 1.0) * 0.5 + scores
        return sum((scores[:, e, None] * self.experts[e](x) for e in range(E // 2)), torch.zeros_like(x))


class BiasOfNothing(OnInput):
    """With biases, an expert that is not chosen gives something."""

    def __init__(self) -> None:
        super().__init__(bias=True)


class ChosenTwice(OnInput):
    """Ids that may be equal: F(w x + v x) is not F(w x) + F(v x)."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.router(x)
        w = logits.softmax(-1)[:, :K]
        return w, torch.stack((logits.argmax(-1), logits.abs().argmax(-1)), -1)


class HalfWeighted(Loop):
    """The gate reads weighted rows, the other half does not."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        y = torch.zeros_like(x)
        for e, f in enumerate(self.experts):
            y = y + f.down(silu(f.gate(x * masked_sum(w, ids, e))) * f.up(x))  # type: ignore[operator, union-attr]
        return y


class Largest(Loop):
    """The largest of the masked outputs, no sum."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        return torch.stack([masked_sum(w, ids, e) * f(x) for e, f in enumerate(self.experts)]).amax(0)


REFUSED: dict[str, tuple[type[Loop], str]] = {
    "ids and weights of different slots": (TwoRouters, "is weighted by"),
    "another activation": (OtherActivation, "different activations"),
    "an expert left out": (ExpertSkipped, "not 0 up to their number"),
    "a slot left out": (SlotDropped, "is weighted by"),
    "another input": (OtherInput, "do not read one tensor"),
    "an expert's output used elsewhere": (Kept, "is also"),
    "weight on input, biases that are not masked": (BiasOfNothing, "the subgraph and the op differ"),
    "weight on input, an expert chosen twice": (ChosenTwice, "one may be chosen twice"),
    "weight on half of the input": (HalfWeighted, "only some of the experts' inputs are weighted"),
    "no sum": (Largest, "are not added up"),
    "scores of more experts": (FirstOnly, "scores of more experts"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bent_loop_is_refused(name: str) -> None:
    make, reason = REFUSED[name]
    model, x = make(), tokens(T)
    fused = Fused(model)
    got = fused(x)
    with torch.no_grad():
        torch.testing.assert_close(got, model(x), rtol=1e-5, atol=1e-5)
    assert fused.count("moe") == [0]
    assert any(reason in r for r in fused.reasons), fused.reasons


def test_scores_of_all_experts_are_left_alone() -> None:
    model, x = Everyone(), tokens(T)
    fused = Fused(model)
    got = fused(x)
    with torch.no_grad():
        torch.testing.assert_close(got, model(x), rtol=1e-5, atol=1e-5)
    assert fused.count("moe") == [0]


def test_biases_of_one_tensor_beside_separate_weights() -> None:
    """All of a list's weights have their biases, though these are parts of one tensor, and one weight is too."""

    class Mixed(Loop):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.b1 = nn.Parameter(torch.randn(E, 2 * INNER, H) * 0.3), nn.Parameter(torch.randn(E, 2 * INNER))

        def forward(self, x: Tensor) -> Tensor:
            w, ids = self.route(x)
            y = torch.zeros_like(x)
            for e, expert in enumerate(self.experts):
                gate, up = nn.functional.linear(x, self.w1[e], self.b1[e]).chunk(2, -1)
                y = y + masked_sum(w, ids, e) * expert.down(silu(gate) * up)  # type: ignore[operator, union-attr]
            return y

    model, x = Mixed(), tokens(T)
    fused = Fused(model)
    got = fused(x)
    assert fused.count("moe") == [1], fused.reasons
    with torch.no_grad():
        assert_close(got, model.double()(x.double()), 1e-5)
