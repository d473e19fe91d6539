"""Loops that split sorted rows by a list of numbers and have a whole expert in each part, as torchtitan and torchtune write
them: all parts are one grouped computation, one call, with the float64 result; with one thing bent they stay what they are.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, one_hot, silu

import braze
from braze.backend import collect
from tests.harness import Fused, assert_close
from tests.test_expert_projects import by_token, in_turn, shared
from tests.test_expert_styles import E, H, K, Layer, layer, reference, tokens

Style = Callable[[Layer, Tensor], Tensor]
Expert = Callable[[Layer, int, Tensor], Tensor]


@pytest.fixture(autouse=True)
def captured() -> object:
    """As while braze captures a program again for the numbers in it."""
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        yield


def counted(ids: Tensor) -> Tensor:
    return torch.histc(ids.flatten().float(), bins=E, min=0, max=E - 1).long()


def expert(m: Layer, e: int, x: Tensor) -> Tensor:
    return (silu(x @ m.gate[e].t()) * (x @ m.up[e].t())) @ m.down[e].t()


def in_parts(m: Layer, rows: Tensor, counts: Tensor, one: Expert = expert) -> Tensor:
    """Each expert on its part of all rows."""
    parts = torch.split(rows, counts.tolist(), dim=0)
    return torch.cat([one(m, e, part) for e, part in enumerate(parts)])


def padded(m: Layer, rows: Tensor, counts: Tensor, one: Expert = expert) -> Tensor:
    """Rows may come after those of all experts: their results are zero."""
    sizes = counts.tolist()
    total = sum(sizes)
    out = torch.cat([one(m, e, part) for e, part in enumerate(rows[:total].split(sizes))])
    return torch.vstack((out, out.new_zeros((rows.shape[0] - total, out.shape[-1]))))


def style(one: Expert = expert, parts: Callable[..., Tensor] = in_parts, before: bool = False) -> Style:
    def run(m: Layer, x: Tensor) -> Tensor:
        weights, ids = m.route(x)
        perm = ids.flatten().argsort(stable=True)
        rows = torch.gather(x, 0, by_token(perm))
        scores = weights.flatten()[perm].reshape(-1, 1)
        y = parts(m, rows * scores if before else rows, counted(ids), one)
        return torch.zeros_like(x).scatter_add(0, by_token(perm), y if before else y * scores)

    return run


BOTH = torch.cat((layer().gate, layer().up), 1)
GATE, UP = (w.transpose(1, 2).contiguous() for w in (layer().gate, layer().up))


def of_one_product(m: Layer, e: int, x: Tensor) -> Tensor:
    """Gate and up by one product, its columns apart afterwards."""
    gate, up = linear(x, BOTH[e]).chunk(2, dim=-1)
    return linear(silu(gate) * up, m.down[e])


def stored_turned(m: Layer, e: int, x: Tensor) -> Tensor:
    """Weights [E, in, out]."""
    return (silu(x @ GATE[e]) * (x @ UP[e])) @ m.turned[e]


def over_shared(m: Layer, x: Tensor) -> Tensor:
    weights, ids = m.route(x)
    perm = ids.flatten().argsort(stable=True)
    y = padded(m, x[perm // K], counted(ids)) * weights.flatten()[perm].unsqueeze(1)
    return shared(m, x).index_add(0, perm // K, y)


def put_back(m: Layer, x: Tensor) -> Tensor:
    """Results written to where the sort had the rows from; counts by a one-hot."""
    weights, ids = m.route(x)
    perm = ids.flatten().argsort()
    y = in_parts(m, x[perm // K], one_hot(ids.flatten(), E).sum(0))
    out = torch.empty_like(y)
    out[perm] = y
    return (out.view(-1, K, H) * weights.unsqueeze(-1)).sum(1)


def weighted_in_parts(m: Layer, x: Tensor) -> Tensor:
    """Each part's results are weighted by the same part of the weights."""
    weights, ids = m.route(x)
    perm = ids.flatten().argsort(stable=True)
    sizes = counted(ids).tolist()
    parts = zip(x[perm // K].split(sizes), weights.flatten()[perm].unsqueeze(1).split(sizes), strict=True)
    y = torch.cat([expert(m, e, rows) * w for e, (rows, w) in enumerate(parts)])
    return torch.zeros_like(x).index_add(0, perm // K, y)


STYLES: dict[str, Style] = {
    "in parts": style(),
    "padded": style(parts=padded),
    "weighted before": style(before=True),
    "padded, weighted before": style(parts=padded, before=True),
    "of one product": style(of_one_product),
    "stored turned": style(stored_turned, padded),
    "over shared": over_shared,
    "put back": put_back,
    "weighted in parts": weighted_in_parts,
}


def exact(name: str, n: int = 10) -> Tensor:
    m, x = layer().to(torch.float64), tokens(n).double()
    if "before" in name:
        return in_turn(m, x)
    return reference(m, x, "") + (shared(m, x) if "shared" in name else 0)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", STYLES)
def test_a_style_is_one_call(name: str, dynamic: bool) -> None:
    m = layer()
    fused = Fused(lambda x: STYLES[name](m, x), dynamic=dynamic)
    for n in (10, 13):
        assert_close(fused(tokens(n)), exact(name, n), 1e-5)
    assert set(fused.count("moe")) == set(fused.count("router")) == {1}, fused.reasons
    said = next(f.form for f in fused.findings if f.kind == "moe")
    assert f"weight on {'input' if 'before' in name else 'output'}" in said
    assert "act(g, u) = g*u*sigmoid(g), gate/up halves" in said


def test_in_bfloat16() -> None:
    m = layer().to(torch.bfloat16)
    fused = Fused(lambda x: STYLES["padded"](m, x))
    x = tokens().bfloat16()
    got = fused(x)
    assert fused.count("moe") == [1], fused.reasons
    weights, ids = m.route(x)
    wide = m.to(torch.float64)
    y = torch.stack(
        [torch.stack([expert(wide, e, t.double()) for e in row]) for t, row in zip(x, ids.tolist(), strict=True)]
    )
    assert_close(got, (y * weights.double().unsqueeze(-1)).sum(1), 5e-2)


# ------------------------------------------------------------------------------------------------------ one thing bent


def next_experts_weights(m: Layer, e: int, x: Tensor) -> Tensor:
    return (silu(x @ m.gate[e].t()) * (x @ m.up[(e + 1) % E].t())) @ m.down[e].t()


def another_activation(m: Layer, e: int, x: Tensor) -> Tensor:
    act = silu if e else gelu
    return (act(x @ m.gate[e].t()) * (x @ m.up[e].t())) @ m.down[e].t()


def another_constant(m: Layer, e: int, x: Tensor) -> Tensor:
    return (silu(x @ m.gate[e].t()) * (x @ m.up[e].t() + e)) @ m.down[e].t()


def over_the_part(m: Layer, e: int, x: Tensor) -> Tensor:
    return ((x @ m.gate[e].t()).softmax(0) * (x @ m.up[e].t())) @ m.down[e].t()


def size_of_the_part(m: Layer, e: int, x: Tensor) -> Tensor:
    return expert(m, e, x) * x.shape[0]


def in_another_order(m: Layer, rows: Tensor, counts: Tensor, one: Expert) -> Tensor:
    parts = rows.split(counts.tolist())
    return torch.cat([one(m, e, parts[e]) for e in reversed(range(E))])


def sizes_of_others(m: Layer, rows: Tensor, counts: Tensor, one: Expert) -> Tensor:
    return in_parts(m, rows, counts.flip(0), one)


BENT: dict[str, tuple[Style, str]] = {
    "next expert's weights": (style(next_experts_weights), "no parts, in order, of one tensor"),
    "another activation": (style(another_activation), "in different ways"),
    "another constant": (style(another_constant), "experts"),
    "over the part": (style(over_the_part), "no function of a row"),
    "size of the part": (style(size_of_the_part), "experts"),
    "in another order": (style(parts=in_another_order), "in order"),
    "sizes of others": (style(parts=sizes_of_others), "differ"),
}


@pytest.mark.parametrize("name", BENT)
def test_one_thing_bent_is_told_and_stays(name: str) -> None:
    m, x = layer(), tokens()
    bent, reason = BENT[name]
    fused = Fused(lambda x: bent(m, x))
    got = fused(x)
    assert fused.count("moe") == [0]
    assert any(reason in r for r in fused.reasons), fused.reasons
    assert_close(got, bent(m.to(torch.float64), x.double()), 1e-5)


def test_rows_that_no_expert_has() -> None:
    """Rows after those of all experts are zeros: an expert's id is past the last one's where others have them."""

    def elsewhere(m: Layer, x: Tensor) -> Tensor:
        weights, ids = (x @ m.router.t()).softmax(-1).topk(K)
        ids = ids + 1  # the last expert is on another machine
        perm = ids.flatten().argsort(stable=True)
        y = padded(m, x[perm // K], counted(ids)) * weights.flatten()[perm].unsqueeze(1)
        return torch.zeros_like(x).index_add(0, perm // K, y)

    m, x = layer(), tokens()
    fused = Fused(lambda x: elsewhere(m, x))
    got = fused(x)
    assert fused.count("moe") == [1], fused.reasons
    assert_close(got, elsewhere(m.to(torch.float64), x.double()), 1e-5)


def test_padded_rows_of_no_block_are_zeros() -> None:
    """Without experts that are found, too: nothing of a product's rows that are nobody's is left."""
    m = layer()

    def alone(rows: Tensor, counts: Tensor) -> Tensor:
        return padded(m, rows, counts)

    rows, counts = tokens(), torch.tensor([2, 0, 3, 1, 2])
    products: list[object] = []
    fused = Fused(alone, after=lambda graph: products.extend(n for n in graph.nodes if "grouped_mm" in n.name))
    got = fused(rows, counts)
    assert fused.count("moe") == [0]
    assert len(products) == 3
    assert_close(got, padded(m.to(torch.float64), rows.double(), counts), 1e-5)
    assert not got[8:].any()


# ------------------------------------------------------------------------------------------------------------- captured


class Block(nn.Module):
    """A layer of a model: experts in parts, after something else."""

    def __init__(self, run: Style) -> None:
        super().__init__()
        self.run = run
        for name, value in vars(layer()).items():
            setattr(self, name, nn.Parameter(value))

    route = Layer.route

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x.tanh()) + x  # type: ignore[arg-type]

    def exact(self, x: Tensor) -> Tensor:
        m = Layer(**{n: p.detach() for n, p in self.named_parameters()}).to(torch.float64)
        return reference(m, x.double().tanh(), "") + x.double()


class Stack(nn.Module):
    def __init__(self, run: Style, kind: type[Block] = Block) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind(run) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return x

    def exact(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block.exact(x)
        return x


@pytest.fixture
def plain() -> object:
    """Torch's own settings."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=False), torch.no_grad():
        with torch._inductor.config.patch(force_disable_caches=True):
            yield
        assert not torch._dynamo.config.capture_scalar_outputs


@pytest.mark.parametrize("parts", [in_parts, padded])
def test_a_compiled_layer_is_captured_with_the_numbers(plain: None, parts: Callable[..., Tensor]) -> None:
    """Dynamo breaks no graph in a loop, over layers say: each layer is a graph."""
    model = Stack(style(parts=parts))
    with collect() as reports:
        compiled = torch.compile(model, backend="braze")
        for n in (10, 13, 7):
            assert_close(compiled(tokens(n)), model.exact(tokens(n)), 1e-5)
    assert {tuple(s.kind for s in r.sites) for r in reports} == {("moe", "router")}
    assert not any(r.errors or r.near_misses for r in reports)


class Own(Block):
    """Its forward calls what splits."""

    def forward(self, x: Tensor) -> Tensor:
        return calls_parts(self, x.tanh()) + x


def calls_parts(m: nn.Module, x: Tensor) -> Tensor:
    weights, ids = m.route(x)  # type: ignore[operator]
    perm = ids.flatten().argsort(stable=True)
    y = in_parts(m, x[perm // K], counted(ids), next_experts_weights if m.run == "bent" else expert)  # type: ignore[arg-type]
    return torch.zeros_like(x).index_add(0, perm // K, y * weights.flatten()[perm].unsqueeze(1))


def test_a_fused_model_is_one_graph(plain: None) -> None:
    model = Stack("", Own)  # type: ignore[arg-type]
    with collect() as reports:
        braze.fuse(model)
        for n in (10, 13):
            assert_close(model(tokens(n)), model.exact(tokens(n)), 1e-5)
    assert {tuple(s.kind for s in r.sites) for r in reports} == {("moe", "moe", "router", "router")}


def test_a_fused_model_whose_parts_are_not_grouped_breaks(plain: None) -> None:
    model = Stack("bent", Own)  # type: ignore[arg-type]
    expected = Stack("bent", Own)(tokens())  # type: ignore[arg-type]
    with collect() as reports:
        braze.fuse(model)
        assert_close(model(tokens()), expected.double(), 1e-5)
    assert len(reports) > 1
    assert any("no parts, in order, of one tensor" in m.reason for r in reports for m in r.near_misses)


def test_what_is_not_grouped_keeps_its_break_and_is_told(plain: None) -> None:
    model = Stack(style(another_activation))
    report = braze.explain(model.eval(), tokens())
    assert report.graphs > 1
    assert any("in different ways" in m.reason and "test_expert_splits.py" in m.source for m in report.near_misses)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="braze")
    assert_close(compiled(tokens()), model(tokens()).double(), 1e-5)


def test_a_required_kind_names_the_reason(plain: None) -> None:
    compiled = torch.compile(Stack(style(another_activation)), backend="braze", options={"require": ["moe"]})
    with pytest.raises(Exception, match=r"fused no moe .*in different ways"):
        compiled(tokens())


def test_in_training_the_model_is_as_it_was(plain: None) -> None:
    model, twin = Stack(style()), Stack(style())
    twin.load_state_dict(model.state_dict())
    compiled = torch.compile(model, backend="braze")
    with torch.enable_grad():
        compiled(tokens()).square().sum().backward()
        twin(tokens()).square().sum().backward()
    for ours, plain_ in zip(model.parameters(), twin.parameters(), strict=True):
        if plain_.grad is not None:
            assert_close(ours.grad, plain_.grad.double(), 1e-4)  # type: ignore[arg-type]
