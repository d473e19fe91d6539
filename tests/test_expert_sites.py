"""Expert layers written by hand, three dispatches in several styles: what is extracted, what is rewired, what is refused.

The reference is a loop over tokens in float64 that knows nothing of braze. An expert without tokens is among them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from braze.kernels.expression import parse
from braze.kernels.spec import GateUpLayout, MoeSpec
from braze.lowering.inductor import no_modes
from braze.passes import experts, pipeline
from braze.passes.elements import Sizes
from tests.harness import Fused, assert_close, capture

T, H, INNER, E, K = 6, 32, 16, 5, 2
Activation = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Style:
    """How a layer is written. text: its activation's normal form."""

    act: Activation = lambda g, u: silu(g) * u
    text: str = "g*u*sigmoid(g)"
    layout: GateUpLayout = "halves"
    transposed: bool = False
    biases: bool = False
    scale: float = 1.0

    def columns(self, h: Tensor) -> tuple[Tensor, Tensor]:
        if self.layout == "none":
            return h, h
        if self.layout == "interleaved":
            return h[..., ::2], h[..., 1::2]
        gate, up = h.chunk(2, -1)
        return gate, up

    def between(self, h: Tensor) -> Tensor:
        return self.act(*self.columns(h))

    def up(self, w: Tensor) -> Tensor:
        """A stored weight as [..., in, out]."""
        return w if self.transposed else w.transpose(-1, -2)


def clamped(g: Tensor, u: Tensor) -> Tensor:
    g, u = g.clamp(max=7.0), u.clamp(-7.0, 7.0)
    return (u + 1) * (g * torch.sigmoid(1.702 * g))


STYLES = {
    "silu, halves": Style(),
    "weights stored in, out": Style(transposed=True),
    "clamped, interleaved, biases": Style(
        clamped,
        "(Min(7, Max(-7, u)) + 1)*sigmoid(1.702*Min(7, g))*Min(7, g)",
        "interleaved",
        biases=True,
    ),
    "relu squared, no gate": Style(lambda g, u: torch.relu(g).square(), "Max(0, g)**2", "none"),
    "tanh of the gate, an invented one": Style(
        lambda g, u: torch.tanh(g * 0.75) * (u + 0.5 * g), "tanh(0.75*g)*(u + 0.5*g)", biases=True
    ),
    "exact gelu": Style(
        lambda g, u: torch.nn.functional.gelu(g) * u, "0.5*g*u*(1 + erf(0.7071067811865476*g))", transposed=True
    ),
    "scaled": Style(scale=2.5),
}


@dataclass(frozen=True)
class Block:
    """The tensors of a layer, in the order that a layer takes them."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    w1: Tensor
    w2: Tensor
    b1: Tensor
    b2: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.x, self.ids, self.weights, self.w1, self.w2, self.b1, self.b2))


def block(style: Style, dtype: torch.dtype, tokens: int = T) -> Block:
    rng = torch.Generator().manual_seed(0)
    columns = INNER * (1 if style.layout == "none" else 2)
    up, down = ((E, H, columns), (E, INNER, H)) if style.transposed else ((E, columns, H), (E, H, INNER))

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=rng) * std).to(dtype)

    ids = torch.rand((tokens, E - 1), generator=rng).argsort(1)[:, :K].contiguous()  # as a top-k gives them
    return Block(
        normal(tokens, H), ids, torch.rand((tokens, K), generator=rng).to(dtype),
        normal(*up, std=0.5), normal(*down, std=0.5), normal(E, columns), normal(E, H),
    )  # fmt: skip


def exact(style: Style, b: Block) -> Tensor:
    """The sum over a token's experts, token by token, in float64."""
    x, _, weights, w1, w2, b1, b2 = (t.double() for t in b)
    out = torch.zeros_like(x)
    for t in range(x.shape[0]):
        for j, e in enumerate(b.ids[t].tolist()):
            h = x[t] @ style.up(w1[e]) + b1[e] * style.biases
            y = style.between(h) @ style.up(w2[e]) + b2[e] * style.biases
            out[t] += weights[t, j] * y * style.scale
    return out


Layer = Callable[..., Tensor]


def grouped(style: Style, bend: str = "") -> Layer:
    """Rows sorted by expert, two grouped products, rows put back by the inverse permutation."""

    def layer(x: Tensor, ids: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
        expert, perm = torch.sort(ids.flatten())
        offsets = torch.histc(expert.float(), bins=E, min=0, max=E - 1).cumsum(0).to(torch.int32)
        h = torch._grouped_mm(x[perm // K], style.up(w1), offs=offsets)
        h = h + b1[expert] if style.biases else h
        y = torch._grouped_mm(style.between(h), style.up(w2), offs=offsets)
        y = y + b2[expert] if style.biases else y
        inverse = torch.empty_like(perm)
        inverse[perm] = torch.arange(perm.shape[0])
        if bend == "not inverted":
            inverse = perm
        if bend == "not put back":
            return (y * weights.flatten()[perm, None]).view(-1, K, H).sum(1)
        if bend == "weights not sorted":
            return (y * weights.flatten()[:, None])[inverse].view(-1, K, H).sum(1)
        y = (y * weights.flatten()[perm, None])[inverse]
        return y.view(-1, K, H).sum(1) * style.scale

    return layer


def weights_last(style: Style) -> Layer:
    """Grouped too, with counts by comparison, the inverse by a scatter, and the weights on rows that are back in order."""

    def layer(x: Tensor, ids: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
        expert, perm = ids.reshape(-1).sort(stable=True)
        counts = (ids.reshape(-1, 1) == torch.arange(E)).sum(0)
        rows = x.unsqueeze(1).expand(-1, K, -1).reshape(-1, H)[perm]
        h = torch._grouped_mm(rows, style.up(w1), offs=counts.cumsum(0).to(torch.int32))
        h = h + b1[expert] if style.biases else h
        y = torch._grouped_mm(style.between(h), style.up(w2), offs=counts.cumsum(0).to(torch.int32))
        y = y + b2[expert] if style.biases else y
        inverse = torch.zeros_like(perm).scatter_(0, perm, torch.arange(perm.shape[0]))
        return (y[inverse].view(-1, K, H) * weights.unsqueeze(-1)).sum(1) * style.scale

    return layer


def batched(style: Style) -> Layer:
    """Each row gathers its expert's weights."""

    def layer(x: Tensor, ids: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
        e = ids.flatten()
        h = torch.bmm(x.repeat_interleave(K, 0).unsqueeze(1), style.up(w1[e])).squeeze(1)
        h = h + b1[e] if style.biases else h
        y = torch.bmm(style.between(h).unsqueeze(1), style.up(w2[e])).squeeze(1)
        y = y + b2[e] if style.biases else y
        return (y * weights.flatten().unsqueeze(-1)).view(-1, K, H).sum(1) * style.scale

    return layer


WAYS: dict[str, tuple[Callable[[Style], Layer], str, torch.dtype, float]] = {
    "grouped": (grouped, "grouped", torch.bfloat16, 2e-2),
    "grouped, weights last": (weights_last, "grouped", torch.bfloat16, 2e-2),
    "batched": (batched, "batched", torch.float32, 1e-5),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", STYLES)
def test_a_layers_normal_form_and_numbers(name: str, way: str) -> None:
    style, (write, dispatch, dtype, tolerance) = STYLES[name], WAYS[way]
    b = block(style, dtype)
    layer = write(style)
    (gm,) = capture(layer, *b)
    (site,), misses = experts.find(gm.graph, Sizes())
    assert misses == []
    assert site.dispatch == dispatch
    assert parse(site.spec.activation) - parse(style.text) == 0, site.spec.activation
    assert replace(site.spec, activation="g") == MoeSpec(
        "g", style.layout, style.transposed, "output", style.scale, dtype
    )
    assert ((site.b1 is not None), (site.b2 is not None)) == (style.biases, style.biases)
    fused = Fused(layer)
    got = fused(*b)
    assert fused.count("moe") == [1], fused.reasons
    assert "agrees" in fused.findings[0].proof
    assert "test_expert_sites.py" in fused.findings[0].source
    assert_close(got, exact(style, b), tolerance)


@pytest.mark.parametrize("way", WAYS)
def test_the_block_is_one_call_and_nothing_of_it_is_left(way: str) -> None:
    """The products, the sort and the gathers are gone; what comes after the block reads the call."""
    style = Style()
    write, _, dtype, _ = WAYS[way]
    (gm,) = capture(lambda *a: write(style)(*a).relu(), *block(style, dtype))
    with no_modes():
        result = pipeline.run(gm.graph, strict=True)
    ((call, _),) = result.calls
    targets = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    assert torch.ops.braze.moe.default in targets
    assert [u.target for u in call.users] == [torch.ops.aten.relu.default]
    gone = {"aten::_grouped_mm", "aten::bmm", "aten::sort", "aten::sort.stable", "aten::index.Tensor"}
    assert not gone & {t.name() for t in targets if hasattr(t, "name")}


@pytest.mark.parametrize("way", WAYS)
def test_token_counts_that_change(way: str) -> None:
    style = STYLES["clamped, interleaved, biases"]
    write, _, dtype, tolerance = WAYS[way]
    fused = Fused(write(style))
    for tokens in (6, 9, 4):
        b = block(style, dtype, tokens)
        assert_close(fused(*b), exact(style, b), tolerance)
    assert fused.count("moe") == [1, 1], fused.reasons


@pytest.mark.parametrize("k", [1, 2, 3])
def test_dense_experts_with_scores_on_their_input(k: int) -> None:
    """Llama4's way: every expert on every token, the scores zero where the top-k did not choose."""
    b = block(Style(transposed=True), torch.float32)
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(3))

    def layer(x: Tensor, logits: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        values, ids = logits.topk(k)
        scores = torch.full_like(logits, float("-inf")).scatter(1, ids, values).sigmoid()
        rows = (x.repeat(E, 1) * scores.t().reshape(-1, 1)).view(E, -1, H)
        gate, up = torch.bmm(rows, w1).chunk(2, -1)
        return torch.bmm(silu(gate) * up, w2).sum(0)

    fused = Fused(layer)
    got = fused(b.x, logits, b.w1, b.w2)
    (finding,) = [f for f in fused.findings if f.kind == "moe"]
    assert "dense" in finding.form
    assert "weight on input" in finding.form
    assert finding.dims["top_k"] == k
    values, ids = logits.double().topk(k)
    expected = torch.zeros(T, H, dtype=torch.float64)
    for t in range(T):
        for score, e in zip(values[t].sigmoid(), ids[t].tolist(), strict=True):
            gate, up = (b.x[t].double() * score @ b.w1[e].double()).chunk(2, -1)
            expected[t] += (silu(gate) * up) @ b.w2[e].double()
    assert_close(got, expected, 1e-5)


# --------------------------------------------------------------------------------------------------- refusals


REORDERED = {
    "not inverted": "not put back by the inverse of their sort",
    "not put back": "not put back by the inverse of their sort",
    "weights not sorted": "is no [tokens, slots] tensor",
}


@pytest.mark.parametrize("bend", REORDERED)
def test_rows_out_of_order_are_refused(bend: str) -> None:
    """Right only where the sort changes nothing: the graph is kept, and gives what it gave."""
    style = Style()
    b = block(style, torch.bfloat16)
    layer = grouped(style, bend)
    fused = Fused(layer)
    got = fused(*b)
    assert fused.count("moe") == [0]
    assert any(REORDERED[bend] in r for r in fused.reasons), fused.reasons
    torch.testing.assert_close(got, layer(*b), rtol=2e-2, atol=2e-2)
    with pytest.raises(AssertionError):
        assert_close(got, exact(style, b), 2e-2)


def test_rows_without_a_weight_are_refused() -> None:
    style = Style()
    b = block(style, torch.float32)

    def layer(*args: Tensor) -> Tensor:
        x, ids, weights, *rest = args
        return batched(style)(x, ids, torch.ones_like(weights), *rest)

    fused = Fused(layer)
    got = fused(*b)
    assert fused.count("moe") == [0]
    assert "rows are not weighted by the router" in fused.reasons
    assert_close(got, exact(style, replace(b, weights=torch.ones_like(b.weights))), 1e-5)


def test_weights_stored_in_different_orders_are_seen_in_one() -> None:
    style = Style()
    b = block(style, torch.float32)

    def layer(x: Tensor, ids: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
        return batched(style)(x, ids, weights, w1, w2.transpose(1, 2), b1, b2)

    turned = replace(b, w2=b.w2.transpose(1, 2).contiguous())
    fused = Fused(layer)
    got = fused(*turned)
    assert fused.count("moe") == [1]
    assert_close(got, exact(style, b), 1e-5)


def test_other_experts_for_the_second_product_are_refused() -> None:
    style = Style()
    b = block(style, torch.float32)

    def layer(x: Tensor, ids: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
        e = ids.flatten()
        h = torch.bmm(x.repeat_interleave(K, 0).unsqueeze(1), style.up(w1[e])).squeeze(1)
        y = torch.bmm(style.between(h).unsqueeze(1), style.up(w2[E - 1 - e])).squeeze(1)
        return (y * weights.flatten().unsqueeze(-1)).view(-1, K, H).sum(1)

    fused = Fused(layer)
    got = fused(*b)
    assert fused.count("moe") == [0]
    assert any("also depends on" in r for r in fused.reasons), fused.reasons
    assert_close(got, exact(style, replace(b, w2=b.w2.flip(0))), 1e-5)
