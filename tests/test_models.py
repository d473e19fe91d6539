"""Real architectures end to end, short of code generation: sites, normal forms and numbers against float64."""

import pytest
import torch

from tests.harness import Fused, assert_close
from tests.tiny import FAMILIES, as_float64, build, tokens

SILU = "g*u*sigmoid(g)"
FORMS = {
    "mixtral": [SILU, "gate/up halves", "weight on output"],
    "qwen3_moe": [SILU, "gate/up halves", "weight on output"],
    "llama4": ["dense", SILU, "weight on input", "weights [E, in, out]"],
    "gpt_oss": ["(Min(7, Max(-7, u)) + 1)*sigmoid(1.702*Min(7, g))*Min(7, g)", "interleaved", "biases b1+b2"],
    "deepseek_v3": [SILU, "gate/up halves", "weight on output"],
}
ROPE_FORMS = {
    "llama": {"half"},
    "cohere": {"interleaved"},
    "glm4": {"interleaved, partial 8 of 16"},
    "gpt_neox": {"half, partial 4 of 16"},
    "mixtral": {"half"},
    "qwen3_moe": {"half, rms_norm before (eps 1e-06, weight)"},
    "llama4": {"interleaved"},
    "gpt_oss": {"half"},
    "deepseek_v3": {"interleaved to half", "interleaved to half, partial [16:32] of 32"},
}
DTYPES = [torch.float32, torch.bfloat16]
CASES = [
    (name, dtype, experts)
    for name, family in FAMILIES.items()
    for dtype in DTYPES
    for experts in (("grouped_mm", "batched_mm") if family.moe and family.switchable else (None,))
]


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).abs().max() / exact.abs().max())


def assert_no_worse_than_eager(got: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
    assert exact.abs().max() > 0
    slack = 8 * torch.finfo(got.dtype).eps
    assert error(got, exact) <= 1.25 * error(eager, exact) + slack


@pytest.mark.parametrize(("name", "dtype", "experts"), CASES)
def test_prefill(name: str, dtype: torch.dtype, experts: str | None) -> None:
    model, family = build(name, dtype, experts), FAMILIES[name]
    ids = tokens()
    fused = Fused(model)
    with torch.no_grad():
        got = fused(ids, use_cache=False).logits
        eager, exact = model(ids, use_cache=False).logits, as_float64(model)(ids, use_cache=False).logits
    assert fused.count("rope") == [family.rope]
    assert fused.count("moe") == [family.moe]
    assert {f.form for f in fused.findings if f.kind == "rope"} == ROPE_FORMS[name]
    for finding in fused.findings:
        assert "agree" in finding.proof
        assert ".py:" in finding.source
        if finding.kind == "moe":
            wanted = FORMS[name] + ([experts.removesuffix("_mm")] if experts else [])
            assert [w for w in wanted if w not in finding.form] == []
    assert_no_worse_than_eager(got, eager, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_moe", "llama4", "gpt_oss", "deepseek_v3"])
def test_decode_with_cache_at_growing_lengths(name: str, dtype: torch.dtype) -> None:
    """Prefill, then single tokens on a growing cache: first a static graph, then a dynamic one, all sites found."""
    model, family = build(name, dtype), FAMILIES[name]
    twin = as_float64(model)
    ids = tokens(1, 12)
    fused = Fused(model)
    with torch.no_grad():
        ours, eagers, exacts = (m(ids[:, :8], use_cache=True) for m in (fused, model, twin))
        for i in range(8, 12):
            assert_no_worse_than_eager(ours.logits, eagers.logits, exacts.logits)
            step = ids[:, i : i + 1]
            ours, eagers, exacts = (
                m(step, past_key_values=o.past_key_values, use_cache=True)
                for m, o in ((fused, ours), (model, eagers), (twin, exacts))
            )
    assert_no_worse_than_eager(ours.logits, eagers.logits, exacts.logits)
    assert set(fused.count("rope")) == {family.rope}
    assert set(fused.count("moe")) == {family.moe}
    assert len(fused.results) >= 2


@pytest.mark.parametrize("name", ["llama", "mixtral", "llama4", "gpt_oss", "deepseek_v3"])
def test_lengths_that_change(name: str) -> None:
    """The second length makes the graph dynamic: its proof covers two bindings of the sizes."""
    model, family = build(name), FAMILIES[name]
    twin = as_float64(model)
    fused = Fused(model)
    for length in (7, 12, 20):
        ids = tokens(2, length)
        with torch.no_grad():
            got, exact = fused(ids, use_cache=False).logits, twin(ids, use_cache=False).logits
        assert_close(got, exact, 1e-5)
    assert fused.count("rope") == [family.rope] * 2
    assert fused.count("moe") == [family.moe] * 2
