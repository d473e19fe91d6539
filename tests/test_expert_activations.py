"""Activations by what they compute, in every form of dispatch, with biases of any dtype and the router's weight on any side.

Not every combination is tried: each activation meets each form, with biases and the weight's place in turn, so that each of
those meets each form too. The reference goes token by token in float64.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from torch import Tensor, einsum
from torch.nn.functional import elu, gelu, leaky_relu, mish, one_hot, relu, silu, softplus

from braze.kernels.expression import apply_torch
from tests.harness import Fused, assert_close

T, H, INNER, E, K = 6, 24, 16, 4, 2
Form = Literal["grouped", "batched", "dense", "loop"]
Place = Literal["output", "input", "between", "first product"]


@dataclass(frozen=True)
class Activation:
    """f of g and u, or of g alone where there is no gate; text: its normal form."""

    f: Callable[..., Tensor]
    text: str
    gate: bool = True

    def __call__(self, h: Tensor) -> Tensor:
        return self.f(*h.chunk(2, -1)) if self.gate else self.f(h)


ACTIVATIONS = {
    "silu": Activation(lambda g, u: silu(g) * u, "g*u*sigmoid(g)"),
    "silu of the second half": Activation(lambda g, u: silu(u) * g, "g*u*sigmoid(u)"),
    "gelu, erf": Activation(lambda g, u: gelu(g) * u, "0.5*g*u*(1 + erf(0.7071067811865476*g))"),
    "gelu, tanh": Activation(
        lambda g, u: gelu(g, approximate="tanh") * u,
        "0.5*g*u*(1 + tanh(0.7978845608028654*(g + 0.044715*g*g*g)))",
    ),
    "relu squared, no gate": Activation(lambda g: relu(g).square(), "Max(0, g)**2", gate=False),
    "clamped before": Activation(
        lambda g, u: silu(g.clamp(max=2.0)) * u.clamp(-2.0, 2.0),
        "Min(2, g)*sigmoid(Min(2, g))*Min(2, Max(-2, u))",
    ),
    "clamped after": Activation(lambda g, u: (silu(g) * u).clamp(-1.5, 1.5), "Min(1.5, Max(-1.5, g*u*sigmoid(g)))"),
    "alpha-sigmoid, up + 1": Activation(
        lambda g, u: (u + 1) * (g * torch.sigmoid(1.702 * g)), "(u + 1)*g*sigmoid(1.702*g)"
    ),
    "softcap": Activation(lambda g, u: 3.0 * torch.tanh(silu(g) / 3.0) * u, "3*u*tanh(g*sigmoid(g)/3)"),
    "gate in float32": Activation(lambda g, u: silu(g.float()).to(u.dtype) * u, "g*u*sigmoid(g)"),
    "leaky relu": Activation(lambda g, u: leaky_relu(g, 0.1) * u, "u*where_gt(g, 0, g, 0.1*g)"),
    "elu, no gate": Activation(lambda g: elu(g, 0.7), "where_gt(g, 0, g, 0.7*expm1(g))", gate=False),
    "softplus": Activation(lambda g, u: softplus(g, 2.0, 3.0) * u, "u*where_gt(2*g, 3, g, log1p(exp(2*g))/2)"),
    "mish": Activation(lambda g, u: mish(g) * u, "g*u*tanh(where_gt(g, 20, g, log1p(exp(g))))"),
    "below a bound": Activation(lambda g, u: torch.where(g <= u, g, 0.5 * u) * u, "where_ge(u, g, g, 0.5*u)*u"),
    "nobody's": Activation(lambda g, u: g * torch.exp(-g.abs()) * (u - 0.3 * g), "g*exp(-Abs(g))*(u - 0.3*g)"),
    "nobody's, no gate": Activation(lambda g: torch.tanh(g) * torch.sigmoid(2 * g), "tanh(g)*sigmoid(2*g)", gate=False),
}
BIASES: dict[str, torch.dtype | None] = {"no bias": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
PLACES: dict[Form, tuple[Place, ...]] = {
    "grouped": ("output", "input", "between", "first product"),
    "batched": ("output", "input", "between", "first product"),
    "dense": ("output", "input"),
    "loop": ("output", "input"),
}


@dataclass(frozen=True)
class Case:
    activation: Activation
    form: Form
    bias: torch.dtype | None
    place: Place

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.form == "grouped" or self.bias is torch.bfloat16 else torch.float32

    @property
    def b1(self) -> bool:
        """Where dense experts are weighted on the input, those that are not chosen must give nothing."""
        return self.bias is not None and not (self.form == "dense" and self.place == "input")

    @property
    def b2(self) -> bool:
        return self.b1 and self.place != "between"


def _case(i: int, activation: Activation, form: Form, j: int) -> tuple[str, Case]:
    """The i-th activation in the j-th form, with the bias and the place whose turn it is."""
    bias = list(BIASES)[(i + j) % 3]
    place = PLACES[form][(i + j) % len(PLACES[form])]
    return f"{form}, {bias}, {place}", Case(activation, form, BIASES[bias], place)


CASES = {
    f"{name}, {case[0]}": case[1]
    for i, (name, activation) in enumerate(ACTIVATIONS.items())
    for j, form in enumerate(PLACES)
    for case in [_case(i, activation, form, j)]
}


def layer(case: Case) -> Callable[..., Tensor]:
    act, place = case.activation, case.place

    def first(rows: Tensor, product: Callable[[Tensor], Tensor], bias: Tensor, w: Tensor) -> Tensor:
        """The activation of the rows [.., H], weighted where that is before the second product."""
        h = product(rows * w if place == "input" else rows)
        h = h * w if place == "first product" else h
        a = act(h + bias if case.b1 else h).to(rows.dtype)
        return a * w if place == "between" else a

    def last(y: Tensor, bias: Tensor, w: Tensor) -> Tensor:
        y = y + bias if case.b2 else y
        return y * w if place == "output" else y

    def grouped(x: Tensor, ids: Tensor, w: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
        expert, perm = ids.flatten().sort(stable=True)
        ends = (expert[:, None] == torch.arange(E)).sum(0).cumsum(0).to(torch.int32)
        weight = w.flatten()[perm, None]
        a = first(x[perm // K], lambda r: torch._grouped_mm(r, w1, offs=ends), b1[expert], weight)
        y = last(torch._grouped_mm(a, w2, offs=ends), b2[expert], weight)
        inverse = torch.empty_like(perm)
        inverse[perm] = torch.arange(perm.shape[0])
        return y[inverse].view(T, K, H).sum(1).to(x.dtype)

    def batched(x: Tensor, ids: Tensor, w: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
        e, weight = ids.flatten(), w.flatten()[:, None]
        a = first(x.repeat_interleave(K, 0), lambda r: torch.bmm(r[:, None], w1[e]).squeeze(1), b1[e], weight)
        y = last(torch.bmm(a[:, None], w2[e]).squeeze(1), b2[e], weight)
        return y.view(T, K, H).sum(1).to(x.dtype)

    def dense(x: Tensor, ids: Tensor, w: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
        scores = (one_hot(ids, E) * w[..., None]).sum(1).t()[..., None].to(x.dtype)
        a = first(x.expand(E, T, H), lambda r: einsum("eth,ehi->eti", r, w1), b1[:, None], scores)
        return last(einsum("eti,eih->eth", a, w2), b2[:, None], scores).sum(0).to(x.dtype)

    def loop(x: Tensor, ids: Tensor, w: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            chosen = ids == e
            weight = (w * chosen).sum(-1, keepdim=True)
            y = last(first(x, lambda r, e=e: r @ w1[e], b1[e], weight) @ w2[e], b2[e], weight)  # type: ignore[misc]
            out = out + (y * chosen.any(-1, keepdim=True) if place == "input" else y)
        return out.to(x.dtype)

    return {"grouped": grouped, "batched": batched, "dense": dense, "loop": loop}[case.form]


def inputs(case: Case) -> list[Tensor]:
    """x, logits, w1 [E, H, N], w2 [E, I, H], b1, b2."""
    rng = torch.Generator().manual_seed(0)
    columns = INNER * (2 if case.activation.gate else 1)
    shapes = ((T, H), (T, E), (E, H, columns), (E, INNER, H), (E, columns), (E, H))
    dtypes = (case.dtype, torch.float32, case.dtype, case.dtype, *(case.bias or case.dtype,) * 2)
    return [(torch.randn(s, generator=rng) * 0.6).to(d) for s, d in zip(shapes, dtypes, strict=True)]


def exact(case: Case, args: list[Tensor]) -> Tensor:
    x, _, w1, w2, b1, b2 = (t.double() for t in args)
    weights, ids = args[1].softmax(-1).topk(K)
    weights = weights.to(case.dtype).double()
    out = torch.zeros_like(x)
    for t in range(T):
        for w, e in zip(weights[t], ids[t].tolist(), strict=True):
            before = w if case.place in ("input", "first product") else 1.0
            h = before * x[t] @ w1[e] + case.b1 * b1[e]
            f = Activation(lambda *a: case.activation.f(*(v.double() for v in a)), "", case.activation.gate)
            y = f(h) @ w2[e] + case.b2 * b2[e]
            out[t] += y if case.place in ("input", "first product") else w * y
    return out


def same(a: str, b: str) -> bool:
    """Whether two activations agree, at points on all sides of their clamps."""
    points = torch.linspace(-3, 3, 13, dtype=torch.float64)
    g, u = (v.flatten() for v in torch.meshgrid(points, points, indexing="ij"))
    return torch.allclose(apply_torch(a, g, u), apply_torch(b, g, u), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_an_activation_in_a_form(name: str) -> None:
    case = CASES[name]
    write = layer(case)

    def routed(x: Tensor, logits: Tensor, *rest: Tensor) -> Tensor:
        weights, ids = logits.softmax(-1).topk(K)
        return write(x, ids, weights.to(x.dtype), *rest)

    args = inputs(case)
    fused = Fused(routed)
    got = fused(*args)
    assert fused.count("moe") == [1], fused.reasons
    (form,) = (f.form for f in fused.findings if f.kind == "moe")
    found = re.search(r"act\(.*?\) = (.*), (gate/up halves|no gate), weight on (\w+)", form)
    assert found is not None, form
    assert same(found[1], case.activation.text), found[1]
    assert found[2] == ("gate/up halves" if case.activation.gate else "no gate")
    assert found[3] == ("input" if case.place in ("input", "first product") else "output")
    assert [b in form for b in ("b1", "b2")] == [case.b1, case.b2]
    assert_close(got, exact(case, args), 3e-2 if case.dtype is torch.bfloat16 else 1e-5)


def test_each_pair_is_tried() -> None:
    """Forms meet activations, biases in each place."""
    triples = {(c.form, c.bias, c.place) for c in CASES.values()}
    assert len(triples) == 3 * sum(map(len, PLACES.values()))
    assert len(CASES) == len(ACTIVATIONS) * len(PLACES)
