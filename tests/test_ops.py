"""The semantic ops: what they compute, their shapes under tracing, and what they refuse."""

from typing import Any

import pytest
import torch
from torch import Tensor

from braze.kernels import aten, reference
from braze.kernels.expression import parse
from braze.kernels.spec import MoeSpec, RopeSpec
from tests.harness import assert_close

T, H, INNER, E, K = 7, 16, 8, 5, 2
GPT_OSS = "(Min(7, Max(-7, u)) + 1)*sigmoid(1.702*Min(7, g))*Min(7, g)"


def moe_inputs(spec: MoeSpec, dtype: torch.dtype = torch.float32, biases: torch.dtype | None = None) -> list[Any]:
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    columns = INNER if spec.layout == "none" else 2 * INNER
    w1, w2 = normal(E, columns, H), normal(E, H, INNER)
    if spec.transposed:
        w1, w2 = w1.transpose(1, 2).contiguous(), w2.transpose(1, 2).contiguous()
    ids = torch.rand((T, E), generator=rng).argsort(1)[:, :K]
    b = [normal(E, columns).to(biases), normal(E, H).to(biases)] if biases else [None, None]
    return [normal(T, H).to(dtype), ids, torch.rand((T, K), generator=rng), w1.to(dtype), w2.to(dtype), *b]


def plain(x: Tensor, ids: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, b1: Any, b2: Any, spec: MoeSpec) -> Tensor:
    """One token and one expert at a time, in float64: written independently of the reference."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(x.shape[0]):
        for j in range(ids.shape[1]):
            e, w = int(ids[t, j]), float(weights[t, j])
            if not 0 <= e < w1.shape[0]:
                continue
            up, down = (w1[e].double(), w2[e].double()) if spec.transposed else (w1[e].double().T, w2[e].double().T)
            h = (x[t].double() * (w if spec.weight_on == "input" else 1.0)) @ up
            h = h if b1 is None else h + b1[e].double()
            if spec.layout == "none":
                a = h.clamp(min=0) ** 2
            else:
                g, u = (h[0::2], h[1::2]) if spec.layout == "interleaved" else h.chunk(2)
                a = (u.clamp(-7, 7) + 1) * g.clamp(max=7) * torch.sigmoid(1.702 * g.clamp(max=7))
            y = a @ down
            y = y if b2 is None else y + b2[e].double()
            out[t] += y * (w if spec.weight_on == "output" else 1.0)
    return out * spec.scale


@pytest.mark.parametrize("kernel", [reference.moe, aten.moe, "op"])
@pytest.mark.parametrize("biases", [None, torch.float32])
@pytest.mark.parametrize("weight_on", ["input", "output"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", ["halves", "interleaved", "none"])
def test_moe_means_the_sum_over_experts(
    layout: Any, transposed: bool, weight_on: Any, biases: Any, kernel: Any
) -> None:
    act = "Max(0, g)**2" if layout == "none" else GPT_OSS
    spec = MoeSpec(act, layout, transposed, weight_on, scale=1.5)
    inputs = moe_inputs(spec, biases=biases)
    inputs[1][0, 0] = -1  # an expert that is not here
    inputs[1][1, 1] = E
    if kernel == "op":
        attributes = {k: getattr(spec, k) for k in ("activation", "layout", "transposed", "weight_on", "scale")}
        got = torch.ops.braze.moe(*inputs, **attributes)
    else:
        got = kernel(*inputs, spec)
    assert_close(got, plain(*inputs, spec), 2e-6)


@pytest.mark.parametrize("tokens", [0, 1])
def test_moe_takes_few_tokens(tokens: int) -> None:
    spec = MoeSpec(GPT_OSS)
    x, ids, weights, *rest = moe_inputs(spec)
    got = aten.moe(x[:tokens], ids[:tokens], weights[:tokens], *rest, spec)
    assert got.shape == (tokens, H)
    if tokens:
        assert_close(got, plain(x[:1], ids[:1], weights[:1], *rest, spec), 2e-6)


def test_ops_trace_with_symbolic_sizes() -> None:
    inputs = moe_inputs(MoeSpec())
    torch.library.opcheck(torch.ops.braze.moe.default, tuple(inputs), {"activation": GPT_OSS})
    x, cos, sin = torch.randn(2, 3, 5, 16), torch.randn(5, 4), torch.randn(5, 4)
    torch.library.opcheck(torch.ops.braze.rope.default, (x, cos, sin), {"rotary_dim": 8, "start": 4})


@pytest.mark.parametrize("width", [8, 4])
@pytest.mark.parametrize("layouts", [("half", "half"), ("interleaved", "interleaved"), ("interleaved", "half")])
def test_rope_turns_pairs_by_their_angle(layouts: Any, width: int) -> None:
    """As a complex product, pair by pair; the rest passes."""
    x, angle = torch.randn(2, 3, 5, 16, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    order = {"half": lambda i: (i, i + 4), "interleaved": lambda i: (2 * i, 2 * i + 1)}
    expected = x.clone()
    for i in range(4):
        a, b = (4 + k for k in order[layouts[0]](i))
        turned = torch.complex(x[..., a], x[..., b]) * torch.polar(torch.ones(5, dtype=torch.float64), angle[:, i])
        expected[..., 4 + order[layouts[1]](i)[0]], expected[..., 4 + order[layouts[1]](i)[1]] = (
            turned.real,
            turned.imag,
        )
    wide = (
        angle if width == 4 else angle.repeat_interleave(2, -1) if layouts[1] == "interleaved" else angle.repeat(1, 2)
    )
    spec = RopeSpec(8, 4, *layouts)
    assert_close(reference.rope(x, wide.cos(), wide.sin(), spec), expected, 1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: [a[0][0], *a[1:]], "x must be"),
        (lambda a: [a[0], a[1].float(), *a[2:]], "ids must be integers"),
        (lambda a: [a[0], a[1], a[2][:, :1], *a[3:]], "differ"),
        (lambda a: [a[0], a[1][:3], a[2][:3], *a[3:]], "rows of ids"),
        (lambda a: [*a[:3], a[3][:, :, :-1], *a[4:]], "hidden size"),
        (lambda a: [*a[:4], a[4][:, :, :-1], *a[5:]], "do not fit layout"),
    ],
)
def test_moe_refuses_tensors_that_do_not_fit(change: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.braze.moe(*change(moe_inputs(MoeSpec())))


@pytest.mark.parametrize(
    ("kwargs", "width", "error"),
    [
        ({"rotary_dim": 7}, 7, "rotary_dim must be even"),
        ({"rotary_dim": 32}, 32, "exceeds the head size"),
        ({"rotary_dim": 8}, 6, "columns for a rotary size"),
        ({"rotary_dim": 8, "layout_in": "thirds"}, 8, "a pair layout is one of"),
    ],
)
def test_rope_refuses_what_is_no_rotation(kwargs: Any, width: int, error: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=error):
        torch.ops.braze.rope(torch.randn(2, 5, 16), torch.randn(5, width), torch.randn(5, width), **kwargs)


@pytest.mark.parametrize(
    "text", ["import os", "g.real", "foo(g)", "__import__('os')", "g if u else 1", "", "x + 1", "True"]
)
def test_an_activation_is_an_expression_and_nothing_else(text: str) -> None:
    with pytest.raises(ValueError, match="not an activation"):
        parse(text)
