"""An RMSNorm over the head before the rotation joins its site: real models, spellings by hand, and what must stay outside."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from braze.backend import collect
from tests import rope_models, tiny
from tests.harness import Fused, assert_close

B, S, HEADS, D = 2, 5, 3, 16
EPS = 1e-5


def query(scale: float = 1.0) -> Tensor:
    """[B, S, HEADS, D], its rows of different magnitudes."""
    rng = torch.Generator().manual_seed(0)
    return scale * torch.randn(B, S, HEADS, D, generator=rng) * torch.rand(B, S, HEADS, 1, generator=rng)


def weights(*shape: int) -> Tensor:
    return torch.randn(shape or (D,), generator=torch.Generator().manual_seed(1))


def rotated(x: Tensor, rotary: int = D) -> Tensor:
    """[B, S, H, D] -> [B, H, S, D], the first `rotary` columns turned."""
    x = x.transpose(1, 2)
    angle = torch.arange(S)[:, None] * 0.3 ** torch.arange(rotary // 2, dtype=torch.float64)
    cos, sin = angle.cos().repeat(1, 2).to(x.dtype), angle.sin().repeat(1, 2).to(x.dtype)
    turned, rest = x[..., :rotary], x[..., rotary:]
    first, second = turned.chunk(2, -1)
    return torch.cat((turned * cos + torch.cat((-second, first), -1) * sin, rest), -1)


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def normed(x: Tensor, eps: float = EPS) -> Tensor:
    y = wide(x)
    return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)


Norm = Callable[[Tensor, Tensor], Tensor]
SPELLINGS: dict[str, tuple[Norm, str]] = {
    "llama": (lambda x, w: w * normed(x).to(x.dtype), "weight"),
    "gemma": (lambda x, w: (normed(x) * (1.0 + wide(w))).type_as(x), "1 + weight"),
    "without weight": (lambda x, w: normed(x).type_as(x), ""),
    "torch": (lambda x, w: torch.nn.functional.rms_norm(x, (D,), w, EPS), "weight"),
    "divided by a root": (lambda x, w: x / torch.sqrt((x * x).mean(-1)[..., None] + EPS) * w, "weight"),
    "power of -1/2": (lambda x, w: x * torch.pow(x.pow(2).mean(-1, keepdim=True) + EPS, -0.5) * w, "weight"),
    "without eps": (lambda x, w: normed(x, 0.0).type_as(x) * w, "weight"),
}


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("rotary", [D, 6])
def test_every_spelling_joins(name: str, rotary: int) -> None:
    norm, words = SPELLINGS[name]
    x, w = query(), weights()
    fused = Fused(lambda x, w: rotated(norm(x, w), rotary))
    got = fused(x, w)
    (finding,) = fused.findings
    assert "rms_norm before" in finding.form and "norm:" in finding.proof, (finding, fused.reasons)
    assert (f", {words})" in finding.form) == bool(words)
    assert fused.reasons == []
    assert_close(got, rotated(norm(x.double(), w.double()), rotary), 2e-6)


@pytest.mark.parametrize("scale", [1.0, EPS**0.5, 1e-4])
def test_epsilon_is_the_models_own(scale: float) -> None:
    """On rows where it decides the result."""
    x, w = query(scale), weights()
    fused = Fused(lambda x, w: rotated(SPELLINGS["llama"][0](x, w)))
    got = fused(x, w)
    assert f"eps {EPS:g}" in fused.findings[0].form
    assert_close(got, rotated(SPELLINGS["llama"][0](x.double(), w.double())), 2e-6)


def test_a_weight_that_is_a_row_of_all_layers_weights() -> None:
    x, w = query(), torch.stack((2 * weights(), weights(), -weights()))

    def block(x: Tensor, w: Tensor) -> Tensor:
        return rotated(normed(x) * w[1])

    fused = Fused(block)
    assert_close(fused(x, w), block(x.double(), w.double()), 1e-6)
    (site,) = fused.findings
    assert "weight" in site.form, fused.reasons


def test_bfloat16_is_no_less_exact_than_eager() -> None:
    x, w = query().bfloat16(), weights().bfloat16()

    def block(x: Tensor, w: Tensor) -> Tensor:
        return rotated(SPELLINGS["llama"][0](x, w))

    fused = Fused(block)
    got, exact = fused(x, w), block(x.double(), w.double())
    assert got.dtype == torch.bfloat16
    assert "rms_norm before" in fused.findings[0].form
    assert (got.double() - exact).norm() <= 1.05 * (block(x, w).double() - exact).norm()


def test_both_norms_and_a_growing_length() -> None:
    """q and k have weights of their own; the second call's graph is dynamic."""

    def block(q: Tensor, k: Tensor, a: Tensor, b: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)

        def turn(x: Tensor) -> Tensor:
            x = x.transpose(1, 2)
            first, second = x.chunk(2, -1)
            return x * cos + torch.cat((-second, first), -1) * sin

        return turn(SPELLINGS["gemma"][0](q, a)), turn(SPELLINGS["gemma"][0](k, b))

    fused = Fused(block)
    for tokens in (5, 7, 9):
        rng = torch.Generator().manual_seed(tokens)
        q, k = torch.randn(2, tokens, 4, D, generator=rng), torch.randn(2, tokens, 2, D, generator=rng)
        args = q, k, weights(), 2 * weights(), torch.randn(tokens, D // 2, generator=rng)
        for got, exact in zip(fused(*args), block(*(t.double() for t in args)), strict=True):
            assert_close(got, exact, 2e-6)
    assert [f.form.count("rms_norm before") for f in fused.findings] == [1, 1, 1, 1], fused.reasons


# ---------------------------------------------------------------------------------------------------- refusals


def root_plus_eps(x: Tensor, w: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + EPS) * w


def at_least_eps(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).clamp(min=EPS)) * w


def over_all_heads(x: Tensor, w: Tensor) -> Tensor:
    return (normed(x.flatten(2)) * w.repeat(HEADS)).view(x.shape)


def over_tokens(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS) * w


OUTSIDE: dict[str, tuple[Norm, str]] = {
    "eps outside the root": (root_plus_eps, "it is not x / sqrt"),
    "eps as a bound": (at_least_eps, "it is not x / sqrt"),
    "2 + weight": (lambda x, w: normed(x) * (2 + w), "it is not x / sqrt"),
    "weight squared": (lambda x, w: normed(x) * w * w, "it is not x / sqrt"),
    "over the whole projection": (over_all_heads, f"it spans {HEADS * D} elements, and not one head of {D}"),
    "over tokens": (over_tokens, f"it spans {S} elements"),
    "a weight for each head": (lambda x, w: normed(x) * w[:HEADS, None], "is no weight of one head's elements"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_is_no_norm_of_the_head_stays_outside(name: str) -> None:
    norm, reason = OUTSIDE[name]
    x, w = query(), weights()
    fused = Fused(lambda x, w: rotated(norm(x, w)))
    got = fused(x, w)
    assert [f.form for f in fused.findings] == ["half"]
    assert any(reason in r and "the RMSNorm before it stays outside" in r for r in fused.reasons), fused.reasons
    assert_close(got, rotated(norm(x.double(), w.double())), 2e-6)


def test_a_norm_that_is_used_elsewhere_stays_outside() -> None:
    def block(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = SPELLINGS["llama"][0](x, w)
        return rotated(y), y.sum(2)

    x, w = query(), weights()
    fused = Fused(block)
    got = fused(x, w)
    assert [f.form for f in fused.findings] == ["half"]
    assert any("used elsewhere" in r for r in fused.reasons), fused.reasons
    for a, b in zip(got, block(x.double(), w.double()), strict=True):
        assert_close(a, b, 2e-6)


def test_training_keeps_what_the_backward_needs() -> None:
    x, w = query().requires_grad_(), weights().requires_grad_()

    def block(x: Tensor, w: Tensor) -> Tensor:
        return rotated(SPELLINGS["llama"][0](x, w)).square().sum()

    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True), collect() as reports:
        torch.compile(block, backend="braze")(x, w).backward()
    assert [s.form for s in reports[0].sites] == ["half"]
    assert any("used elsewhere" in m.reason for m in reports[0].near_misses)
    got = x.grad, w.grad
    x2, w2 = (t.detach().double().requires_grad_() for t in (x, w))
    block(x2, w2).backward()
    for a, b in zip(got, (x2.grad, w2.grad), strict=True):
        assert a is not None and b is not None
        assert_close(a, b, 1e-5)


# -------------------------------------------------------------------------------------------------- real models

WANTED: dict[str, tuple[str, str]] = {
    "qwen3": ("rms_norm before (eps 1e-06, weight)", ""),
    "gemma3": ("rms_norm before (eps 1e-06, 1 + weight)", ""),
    "olmo2": ("half", "it spans 64 elements, and not one head of 16"),
    "llama4": ("interleaved", ""),  # its L2 norm comes after the rotation
}


@pytest.mark.parametrize("name", WANTED)
def test_real_models(name: str) -> None:
    form, reason = WANTED[name]
    model, ids = rope_models.build(name), tiny.tokens()
    fused = Fused(lambda ids: model(ids, use_cache=False).logits)
    got = fused(ids)
    forms = [f.form for f in fused.findings if f.kind == "rope"]
    assert len(forms) == 2 and all(f.endswith(form) for f in forms), fused.findings
    assert any(reason in r for r in fused.reasons) if reason else fused.reasons == []
    with torch.no_grad():
        exact: Any = tiny.as_float64(model)(ids, use_cache=False).logits
    assert_close(got, exact, 1e-5)
