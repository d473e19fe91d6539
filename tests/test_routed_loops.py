"""Layers with router and loop over experts in one forward, as models spelled them before transformers 5: one graph, fused."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, silu

from braze.loops import without_loops
from braze.routed import routed
from braze.unlooped import Routed
from tests.harness import Fused, assert_close

H, INNER, E, K = 32, 24, 6, 2


class Mlp(nn.Module):
    def __init__(self, inner: int = INNER) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(H, inner, bias=False), nn.Linear(H, inner, bias=False)
        self.down_proj = nn.Linear(inner, H, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """A token's experts by softmax and top-k; the experts in order, each with the tokens that a mask has for it."""

    k, jitter = K, 0.1

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(Mlp() for _ in range(E))

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = torch.topk(logits.softmax(1, dtype=torch.float), self.k, dim=-1)
        return weights / weights.sum(-1, keepdim=True), ids

    def forward(self, hidden_states: Tensor) -> Any:
        batch, length, hidden = hidden_states.shape
        if self.training and self.jitter > 0:
            hidden_states = hidden_states * torch.empty_like(hidden_states).uniform_(1 - self.jitter, 1 + self.jitter)
        hidden_states = hidden_states.view(-1, hidden)
        logits = self.gate(hidden_states)
        weights, ids = self.choose(logits)
        weights = weights.to(hidden_states.dtype)
        out = torch.zeros((batch * length, hidden), dtype=hidden_states.dtype, device=hidden_states.device)
        mask = one_hot(ids, num_classes=E).permute(2, 1, 0)
        for e in range(E):
            slot, token = torch.where(mask[e])
            rows = hidden_states[None, token].reshape(-1, hidden)
            out.index_add_(0, token, (self.experts[e](rows) * weights[token, slot, None]).to(hidden_states.dtype))
        return out.reshape(batch, length, hidden), logits


class Hit(Layer):
    """Only the experts that were hit, and their sum alone."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        flat = hidden_states.view(-1, H)
        weights, ids = self.choose(self.gate(flat))
        out = torch.zeros_like(flat)
        mask = one_hot(ids, num_classes=E).permute(2, 1, 0)
        for e in (mask.sum((-1, -2)) > 0).nonzero():
            slot, token = torch.where(mask[e].squeeze(0))
            out.index_add_(0, token, self.experts[e](flat[token]) * weights[token, slot, None])
        return out.view_as(hidden_states)


class Shared(Hit):
    """A shared expert with a gate of its own, beside the routed ones."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.shared_gate = Mlp(40), nn.Linear(H, 1, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        shared = torch.sigmoid(self.shared_gate(hidden_states)) * self.shared(hidden_states)
        return super().forward(hidden_states) + shared


class One(Layer):
    """Every token has one expert, whose probability stays its weight."""

    k = 1

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return logits.softmax(-1).topk(1)


class Masked(Layer):
    """Masks of tokens; rows are written where a token has the expert, [tokens, hidden] in and out."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(self.gate(x))
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            if token.numel() == 0:
                continue
            out[token] += weights[token, slot].unsqueeze(1) * expert(x[token])
        return out


class ByName(Layer):
    """Experts by name, as switch_transformers holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({f"expert_{e}": Mlp() for e in range(E)})  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(self.gate(x))
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts.values()):  # type: ignore[operator]
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


class Grouped(Hit):
    """Sigmoid scores, a bias for the choice only, two of three groups, a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.randn(E) * 0.1)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.sigmoid()
        choice = scores + self.bias.unsqueeze(0)
        best = choice.view(-1, 3, 2).topk(2, dim=-1)[0].sum(-1)
        groups = torch.topk(best, k=2, dim=-1, sorted=False)[1]
        open_ = torch.zeros_like(best).scatter_(1, groups, 1).unsqueeze(-1).expand(-1, 3, 2).reshape(-1, E)
        ids = torch.topk(choice.masked_fill(~open_.bool(), 0.0), k=K, dim=-1, sorted=False)[1]
        weights = scores.gather(1, ids)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5, ids


class Infer(Layer):
    """The loop in a method of its own, rows sorted by expert, counts on the host; shared experts outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = Mlp(48)

    @torch.no_grad()
    def moe_infer(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        counts = ids.new_zeros((ids.shape[0], E)).scatter_(1, ids, 1).sum(0)
        order = ids.view(-1).argsort()
        rows, outputs, start = x[order // ids.shape[1]], [], 0
        for e, count in enumerate(counts.cpu().numpy()):
            if count:
                outputs.append(self.experts[e](rows[start : start + count]))
                start += count
        results = torch.cat(outputs, 0) if outputs else rows.new_empty(0)
        back = torch.empty_like(results)
        back[order] = results
        parts = back.view(*ids.shape, -1).type(weights.dtype)
        return parts.mul_(weights.unsqueeze(-1)).sum(1).type(back.dtype)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, H)
        weights, ids = self.choose(self.gate(flat))
        return self.moe_infer(flat, ids, weights).view(*x.shape) + self.shared(x)


class Method(Layer):
    """The loop in a method, masks of slots; weights in float32, whatever the rest is in."""

    def moe(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x, dtype=weights.dtype)
        mask = one_hot(ids, num_classes=E).permute(2, 0, 1)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(mask[e])
            if token.numel() > 0:
                out.index_add_(0, token, expert(x[token]) * weights[token, slot].unsqueeze(-1))
        return out.type(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, H)
        weights, ids = self.choose(self.gate(flat))
        return self.moe(flat, ids, weights).view(*x.shape)


class AnyOfSlots(Layer):
    """A mask of tokens, and weights that are summed over slots by it."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, H)
        weights, ids = self.choose(self.gate(flat))
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            mask = (ids == e).any(dim=-1)
            if mask.any():
                token = mask.nonzero().squeeze(-1)
                own = (weights * (ids == e)).sum(-1)[token]
                out[token] += expert(flat[token]) * own.unsqueeze(-1)
        return out.view_as(x)


class Flat(Layer):
    """Ids and weights in one row, in a method that only runs outside of training; rows added up by a scatter."""

    @torch.no_grad()
    def moe_infer(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, order = torch.zeros_like(x), ids.argsort()
        ends, token = ids.bincount().cpu().numpy().cumsum(0), order // K
        for e, end in enumerate(ends):
            start = 0 if e == 0 else ends[e - 1]
            if start == end:
                continue
            row = token[start:end]
            y = self.experts[e](x[row])
            y.mul_(weights[order[start:end]])
            out.scatter_reduce_(0, row.view(-1, 1).repeat(1, x.shape[-1]), y, reduce="sum")
        return out

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(self.gate(x.view(-1, H)))
        if self.training:
            return x
        return self.moe_infer(x.view(-1, H), ids.view(-1), weights.view(-1, 1)).view(*x.shape) + x


def tokens(kind: type[Layer] = Layer) -> Tensor:
    shape = (10, H) if issubclass(kind, Masked | ByName) else (2, 5, H)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


LAYERS = [Layer, Hit, Shared, One, Masked, ByName, Grouped, Infer, Method, AnyOfSlots, Flat]


def taken_out(kind: type[Layer], routers: int = 1) -> Fused:
    """A layer without its loop, after its one graph was compared with the loop; routers: how many are fused there."""
    layer = kind().eval()
    dtype = torch.float32 if kind is Method else torch.float64
    exact = copy.deepcopy(layer).to(dtype)
    without_loops(layer)
    fused = Fused(layer, dynamic=False)
    x = tokens(kind)
    got = fused(x)
    with torch.no_grad():
        want = exact(x.to(dtype))
    assert fused.count("moe") == [1], fused.reasons
    assert fused.count("router") == [routers], fused.reasons
    pairs = [(got, want)] if isinstance(want, Tensor) else zip(got, want, strict=True)
    for a, b in pairs:
        assert a.shape == b.shape
        assert_close(a, b, 2e-6)
    return fused


@pytest.mark.parametrize("kind", LAYERS)
def test_one_graph_with_the_same_result(kind: type[Layer]) -> None:
    taken_out(kind)


class Caller(nn.Module):
    """What has such a layer in it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Hit()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [Caller, Method])
def test_what_is_told_names_a_line_of_the_model(kind: type[nn.Module]) -> None:
    """That of the call, since the loop's own lines are not run."""
    model = kind().eval()
    without_loops(model)
    fused = Fused(model, dynamic=False)
    fused(tokens(Hit))
    assert {f.kind for f in fused.findings} == {"moe", "router"}
    assert all("test_routed_loops.py" in f.source for f in fused.findings)


def test_another_number_of_tokens_is_the_same_graph() -> None:
    layer = Shared().eval()
    exact = copy.deepcopy(layer).double()
    without_loops(layer)
    fused = Fused(layer, dynamic=True)
    for length in (5, 9, 17):
        x = torch.randn(2, length, H)
        with torch.no_grad():
            assert_close(fused(x), exact(x.double()), 2e-6)
    assert fused.count("moe") == [1]


def test_bfloat16_keeps_the_casts() -> None:
    layer = Layer().bfloat16().eval()
    exact = copy.deepcopy(layer)
    without_loops(layer)
    fused = Fused(layer, dynamic=False)
    x = tokens(Layer).bfloat16()
    with torch.no_grad():
        (got, logits), (want, wanted) = fused(x), exact(x)
    assert fused.count("moe") == fused.count("router") == [1]
    assert_close(logits, wanted, 1e-2)
    assert_close(got, want, 2e-2)


def test_parameters_and_buffers_are_read_at_each_call() -> None:
    layer = Grouped().eval()
    without_loops(layer)
    fused = Fused(layer, dynamic=False)
    exact = Grouped().double().eval()
    for _ in range(2):
        with torch.no_grad():
            for t in (*layer.parameters(), *layer.buffers()):
                t.add_(0.05 * torch.randn_like(t))
            exact.load_state_dict(layer.state_dict())
            assert_close(fused(tokens(Hit)), exact(tokens(Hit).double()), 2e-6)
    assert fused.count("moe") == [1]


def test_in_training_and_with_gradients_it_is_the_loop() -> None:
    layer = Layer()
    without_loops(layer)
    assert isinstance(vars(layer)["forward"], Routed) and layer.training
    torch.manual_seed(1)
    got = layer(tokens(Layer))[0]
    torch.manual_seed(1)
    assert torch.equal(got, Layer.forward(layer, tokens(Layer))[0])  # the jitter included
    got.sum().backward()
    assert layer.gate.weight.grad is not None


class Remembers(Hit):
    """Sets an attribute."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.last = hidden_states
        return super().forward(hidden_states)


class AddedUp(Layer):
    """What `one` makes of the rows of each expert, added up."""

    def one(self, e: int, rows: Tensor, own: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(self.gate(x))
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.one(e, x[token], weights[token, slot, None], x))
        return out


class Clamps(Masked):
    """Looks at the token before the experts."""

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().amax() > 3:
            x = x.clamp(-3, 3)
        return super().forward(x)


class OfAll(AddedUp):
    """Experts see a mean over all tokens, which no token alone has."""

    def one(self, e: int, rows: Tensor, own: Tensor, x: Tensor) -> Tensor:
        return self.experts[e](rows + x.mean(0, keepdim=True)) * own  # type: ignore[no-any-return]


class Different(AddedUp):
    """One expert is another function."""

    def one(self, e: int, rows: Tensor, own: Tensor, x: Tensor) -> Tensor:
        expert: Any = self.experts[e]
        return (expert(rows) if e != 3 else expert.down_proj(silu(expert.gate_proj(rows)))) * own  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Clamps, "reads a number"),
        (OfAll, "not recognised"),
        (Different, "expert 3 does not compute"),
        (Remembers, "sets attributes"),
    ],
)
def test_what_is_no_weighted_sum_of_experts_keeps_its_loop(
    kind: type[Layer], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    layer = kind().eval()
    with caplog.at_level(logging.WARNING, "braze"):
        without_loops(layer)
    assert "keeps its loop over experts" in caplog.text and reason in caplog.text
    assert "forward" not in vars(layer)


def test_layers_that_are_alike_share_what_was_worked_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that differ in an attribute do not."""
    seen: list[nn.Module] = []
    monkeypatch.setattr("braze.loops.routed", lambda module: seen.append(module) or routed(module))
    model = nn.Sequential(*(Hit() for _ in range(4))).eval()
    model[2].k = 1
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    exact = copy.deepcopy(model).double()
    without_loops(model)
    assert seen == [model[0], model[2]]
    fused = Fused(model, dynamic=False)
    with torch.no_grad():
        assert_close(fused(tokens(Hit)), exact(tokens(Hit).double()), 1e-5)
    assert fused.count("moe") == [4]


class Pyramid(nn.Module):
    """No experts: layers one after the other, with a look at values."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mlp() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.where(x > 0, layer(x), x)
        return x


def test_what_chooses_no_experts_is_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "braze"):
        without_loops(Pyramid().eval())
    assert [r.levelno for r in caplog.records] == [logging.INFO] and "no top-k" in caplog.text


def test_hooks_keep_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    layer = Hit().eval()
    layer.experts[2].register_forward_hook(lambda module, args, out: out * 2)
    with caplog.at_level(logging.WARNING, "braze"):
        without_loops(layer)
    assert "hooks" in caplog.text and "forward" not in vars(layer)
