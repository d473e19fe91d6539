"""Routers of real architectures: the normal form of each, with its constants, and the numbers against float64."""

import pytest
import torch

from tests import tiny
from tests.harness import Fused
from tests.test_models import assert_no_worse_than_eager
from tests.tiny import Family, as_float64, build, tokens

_E = {"num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 2}
_SMALL = {**_E, "moe_intermediate_size": 32, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0}
_MLA = {
    **_SMALL, "n_shared_experts": 1, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 16, "num_key_value_heads": 4,
}  # fmt: skip

#: family -> (how to build it, its router)
MODELS: dict[str, tuple[Family, str]] = {
    "deepseek_v2": (
        Family("DeepseekV2Config", "DeepseekV2ForCausalLM", {**_MLA, "topk_method": "group_limited_greedy"}, moe=2),
        "softmax, top 2 of the logits, in 1 of 2 groups by their largest",
    ),
    "ernie4_5_moe": (
        Family(
            "Ernie4_5_MoeConfig", "Ernie4_5_MoeForCausalLM",
            {
                "moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 0,
                "moe_layer_end_index": -1, "moe_layer_interval": 1, "moe_intermediate_size": 32,
            }, moe=2,
        ),
        "softmax, top 2 of the scores + bias, divided by their sum at least 1e-12",
    ),
    "lfm2_moe": (
        Family(
            "Lfm2MoeConfig", "Lfm2MoeForCausalLM",
            {**_SMALL, "num_dense_layers": 0, "layer_types": ["conv", "full_attention"]}, moe=2,
        ),
        "sigmoid, top 2 of the scores + bias, divided by their sum + 1e-06",
    ),
    "gemma4": (  # times a scale an expert, which stays behind the router
        Family(
            "Gemma4TextConfig", "Gemma4ForCausalLM",
            {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32}, moe=2,
        ),
        "softmax, top 2, divided by their sum",
    ),
    "inkling": (
        Family("InklingTextConfig", "InklingTextModel", {**_SMALL, "n_shared_experts": 1, "num_shared_experts": 1}, moe=2),
        "sigmoid, top 2 of the scores + bias, divided by their sum, with 1 shared, scale 8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_normal_form_and_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, form = MODELS[name]
    monkeypatch.setitem(tiny.FAMILIES, name, family)
    model, ids = build(name), tokens()
    fused = Fused(lambda i: model(i, use_cache=False)[0])
    got = fused(ids)
    assert fused.count("router") == [family.moe], fused.reasons
    assert {f.form for f in fused.findings if f.kind == "router"} == {form}
    with torch.no_grad():
        eager, exact = model(ids, use_cache=False)[0], as_float64(model)(ids, use_cache=False)[0]
    assert_no_worse_than_eager(got, eager, exact)


def test_logits_of_a_model_are_what_they_were() -> None:
    """A model that returns its router's logits for the auxiliary loss keeps them, and its routers are fused."""
    model, ids = build("mixtral"), tokens()
    fused = Fused(lambda i: model(i, use_cache=False, output_router_logits=True).router_logits)
    got = fused(ids)
    with torch.no_grad():
        expected = as_float64(model)(ids, use_cache=False, output_router_logits=True).router_logits
    assert sum(fused.count("router")) == 2
    for ours, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)


def test_a_router_without_a_top_k_is_told_and_its_experts_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    family = Family("PhimoeConfig", "PhimoeForCausalLM", {**_E, "intermediate_size": 32}, moe=2)
    monkeypatch.setitem(tiny.FAMILIES, "phimoe", family)
    model = build("phimoe")
    fused = Fused(lambda i: model(i, use_cache=False)[0])
    fused(tokens())
    assert fused.count("moe") == [2]
    assert fused.count("router") == [0]
    assert all("no top-k" in r for r in fused.reasons) and len(fused.reasons) == 2
    (miss,) = {m.source.split(" in ")[0].rsplit("/", 1)[-1].split(":")[0] for m in fused.results[0].near_misses}
    assert miss == "modeling_phimoe.py"
