"""Dense MLPs of few tokens on CPU: the experts' kernel with one expert, against float64; what is one, and what is none."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from braze.backend import collect
from braze.kernels import reference, separate
from braze.kernels.cpp import mlp
from braze.kernels.spec import MoeSpec
from tests.harness import Fused, assert_close
from tests.tiny import as_float64, build, tokens

HIDDEN, INNER = 71, 37
BOUND = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
SILU, GELU = "g*u*sigmoid(g)", "0.5*g*(erf(0.7071067811865476*g) + 1)"


def tensors(spec: MoeSpec, dtype: torch.dtype, apart: bool, bias: torch.dtype | None) -> tuple[Any, ...]:
    """(w1, w2, b1, b2) for HIDDEN and INNER."""
    rng = torch.Generator().manual_seed(3)
    columns = INNER * (1 if apart or spec.layout == "none" else 2)

    def weight(out: int, inner: int) -> Tensor:
        value = torch.randn(out, inner, generator=rng).to(dtype) / 6
        return value.mT.contiguous() if spec.transposed else value

    w1 = [weight(columns, HIDDEN) for _ in range(2 if apart else 1)]
    b1 = [torch.randn(columns, generator=rng).to(bias) for _ in w1] if bias else []
    b2 = torch.randn(HIDDEN, generator=rng).to(bias) if bias else None
    return w1, weight(HIDDEN, INNER), b1, b2


#: layout, whether gate and up are apart, whether transposed, dtype, that of the biases, activation: each a kernel to build.
FORMS = (
    ("halves", True, False, torch.float32, None, SILU),
    ("halves", True, True, torch.bfloat16, torch.float32, SILU),
    ("halves", False, False, torch.bfloat16, torch.bfloat16, SILU),
    ("interleaved", False, False, torch.float16, None, SILU),
    ("none", False, True, torch.float32, torch.float32, GELU),
)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, mlp.FEW])
def test_kernel(form: Any, tokens: int) -> None:
    layout, apart, transposed, dtype, bias, activation = form
    spec = MoeSpec(activation, layout, transposed)
    w1, w2, b1, b2 = tensors(spec, dtype, apart, bias)
    x = torch.randn(tokens, 2 * HIDDEN, generator=torch.Generator().manual_seed(tokens)).to(dtype)[:, :HIDDEN]
    assert mlp.supports(x, w1, w2, b1, b2, spec) is None
    wide = [w.double() for w in w1], w2.double(), [b.double() for b in b1], None if b2 is None else b2.double()
    exact = reference.mlp(x.double(), *wide, spec)
    assert_close(mlp.run(x, w1, w2, b1, b2, spec), exact, BOUND[dtype])
    assert_close(separate.mlp(x.double(), *wide, spec), exact, 1e-14)
    attributes = {"activation": activation, "layout": layout, "transposed": transposed}
    assert_close(torch.ops.braze.mlp(x, w1, w2, b1, b2, **attributes), exact, BOUND[dtype])
    torch.library.opcheck(
        torch.ops.braze.mlp.default, (x, w1, w2, b1, b2), attributes, test_utils=("test_schema", "test_faketensor")
    )


def test_many_rows_run_as_products() -> None:
    spec = MoeSpec()
    w1, w2, b1, b2 = tensors(spec, torch.float32, True, None)
    x = torch.randn(mlp.FEW + 1, HIDDEN, generator=torch.Generator().manual_seed(0))
    assert "are not 1 to" in str(mlp.supports(x, w1, w2, b1, b2, spec))
    exact = reference.mlp(x.double(), [w.double() for w in w1], w2.double(), [], None, spec)
    assert_close(torch.ops.braze.mlp(x, w1, w2, b1, b2), exact, 3e-6)


def test_reasons() -> None:
    spec = MoeSpec()
    w1, w2, _, _ = tensors(spec, torch.float32, True, None)
    x = torch.zeros(2, HIDDEN)
    for given, reason in (
        ((x.double(), w1, w2, [], None), "float64"),
        ((x, [w1[0], w1[1].half()], w2, [], None), "gate and up differ"),
        ((x, [w1[0].T.contiguous().T, w1[1].T.contiguous().T], w2, [], None), "last stride of w1"),
        ((x, w1, w2, [torch.zeros(INNER), torch.zeros(INNER, dtype=torch.half)], None), "biases of gate and up differ"),
    ):
        assert reason in str(mlp.supports(*given, spec))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- in a graph


class Gated(nn.Module):
    """x + down(act(gate x) * up x), as most models have it."""

    def __init__(self, bias: bool = False, act: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up = (nn.Linear(HIDDEN, INNER, bias=bias) for _ in range(2))
        self.down, self.act = nn.Linear(INNER, HIDDEN, bias=bias), act

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.gate(x)) * self.up(x))


class Packed(Gated):
    """Gate and up in one product, the one's columns after the other's."""

    def forward(self, x: Tensor) -> Tensor:
        both = F.linear(x, torch.cat((self.gate.weight, self.up.weight)).clone())
        gate, up = both.chunk(2, -1)
        return x + self.down(up * self.act(gate))


class Plain(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.gate(x)))


def tokens_of(*shape: int) -> Tensor:
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(1))


FOUND = {
    "silu": (Gated(), SILU, "gate and up apart"),
    "silu, biases": (Gated(bias=True), SILU, "biases b1+b2"),
    "gelu of one product": (Packed(act=F.gelu), "0.5*g*u*(erf(0.7071067811865476*g) + 1)", "gate/up halves"),
    "squared relu": (Plain(bias=True, act=lambda v: F.relu(v).square()), "Max(0, g)**2", "no gate"),
    "clamped": (
        Gated(act=lambda v: v.clamp(max=7.0) * torch.sigmoid(1.702 * v.clamp(max=7.0))),
        "u*sigmoid(1.702*Min(7, g))*Min(7, g)", "gate and up apart",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str) -> None:
    model, activation, words = FOUND[name]
    x = tokens_of(2, 3)
    fused = Fused(model)
    assert_close(fused(x), model(x), 1e-5)
    (finding,) = fused.findings
    assert finding.kind == "mlp"
    assert f"= {activation}," in finding.form + ","
    assert words in finding.form
    assert finding.dims == {"tokens": 6, "hidden": HIDDEN, "inner": INNER, "dtype": "float32"}
    assert "test_mlp.py" in finding.source


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"kernel": {"mlp": "aten"}}, {"cpp_wrapper": True}], ids=str)
def test_compiled(dtype: torch.dtype, settings: Any) -> None:
    model, x = Gated(bias=True).to(dtype), tokens_of(1, 4).to(dtype)
    torch._dynamo.reset()
    options = {"require": ["mlp"], "strict": True, **settings}
    with torch.no_grad(), collect() as reports, torch._inductor.config.patch(force_disable_caches=True):
        got = torch.compile(model, backend="braze", options=options)(x)
        exact = Gated(bias=True).to(dtype).double()(x.double())
    assert_close(got, exact, {torch.float32: 3e-6, torch.bfloat16: 1e-2}[dtype])
    (site,) = [s for r in reports for s in r.sites]
    assert site.kernel == ("aten" if "kernel" in settings else "cpp")


#: How many MLPs two layers of a model have, shared experts' among them, and the experts' own sites.
MODELS = {
    "llama": (2, 0), "glm4": (2, 0), "gpt_neox": (2, 0), "mixtral": (0, 2), "deepseek_v3": (2, 2), "llama4": (2, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    model, given = build(name), tokens(1, 4)
    run = Fused(model)
    with torch.no_grad():
        exact = as_float64(model)(given, use_cache=False).logits
    assert_close(run(given, use_cache=False).logits, exact, 1e-5)
    assert (sum(run.count("mlp")), sum(run.count("moe"))) == MODELS[name], run.findings


# --------------------------------------------------------------------------------------------------- what is none


def fused(model: Callable[..., Any], *given: Tensor, **options: Any) -> Fused:
    """The model, fused, after a call whose result is as eager's."""
    run = Fused(model, **options)
    torch.testing.assert_close(run(*given), model(*given), rtol=1e-4, atol=1e-5)
    return run


def test_many_tokens_are_left_to_inductor() -> None:
    assert fused(Gated(), tokens_of(mlp.FEW + 1)).findings == []


def test_an_unknown_number_of_tokens_is_left_to_inductor() -> None:
    assert fused(Gated(), tokens_of(4), dynamic=True).findings == []


def test_a_product_that_is_returned_too_is_a_near_miss() -> None:
    model = Gated()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        gate = model.gate(x)
        return model.down(F.silu(gate) * model.up(x)), gate

    (result,) = fused(run, tokens_of(4)).results
    assert not result.calls
    assert ["returned" in m.reason for m in result.near_misses] == [True]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x + 1)), "do not read one tensor"),
        (lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x))[:, :9] @ x[0, :9], None),
        (lambda m, x: F.linear(F.silu(m.gate(x)) * m.up(x), m.down.weight[:9]), "different sizes"),
        (lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x) * x.sum()), None),
        (lambda m, x: m.down(F.softmax(m.gate(x), -1)), None),
        (lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x).roll(1, -1)), "neither halves nor interleaved"),
    ],
    ids=["other rows", "sliced after", "narrower", "scaled by data", "softmax", "rolled"],
)  # fmt: skip
def test_near(change: Callable[[Any, Tensor], Tensor], reason: str | None) -> None:
    model = Gated()
    run = fused(lambda x: change(model, x), tokens_of(4))
    (result,) = run.results
    if reason is None:
        assert not result.near_misses
    else:
        assert not result.calls
        assert any(reason in m.reason for m in result.near_misses), result.near_misses


def test_training_keeps_what_the_backward_pass_reads() -> None:
    model, x = Gated(), tokens_of(4)
    torch._dynamo.reset()
    with collect() as reports:
        loss = torch.compile(model, backend="braze", options={"strict": True})(x).square().sum()
        loss.backward()
    got = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model(x).square().sum().backward()
    for ours, theirs in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-4, atol=1e-5)
    assert not [s for r in reports for s in r.sites]


def test_parts_of_larger_tensors() -> None:
    """Some tokens of a sequence, one layer's part of stacked weights: nothing begins where its memory does."""

    def run(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, bias: Tensor) -> Tensor:
        x = x[3:5]
        return (F.silu(x @ gate[1].T + bias[1]) * (x @ up[1].T + bias[1])) @ down[1].T

    rng = torch.Generator().manual_seed(0)
    shapes = ((6, HIDDEN), (2, INNER, HIDDEN), (2, INNER, HIDDEN), (2, HIDDEN, INNER), (2, INNER))
    given = [torch.randn(s, generator=rng) / 4 for s in shapes]
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(run, backend="braze", options={"require": ["mlp"], "strict": True})(*given)
    assert_close(got, run(*(g.double() for g in given)), 1e-5)


def test_weights_that_change_are_read_anew() -> None:
    model, x = Gated(), tokens_of(2)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="braze", options={"require": ["mlp"]})
    with torch.no_grad():
        compiled(x)
        model.down.weight.mul_(-3)
        assert_close(compiled(x), model(x), 1e-5)
