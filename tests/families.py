"""Every mixture-of-experts family of transformers, as a tiny random model: what docs/support.md is made from.

A family's configuration takes those of the common sizes below that it has a field for, and its own settings over them.
"""

import dataclasses
import importlib
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from tests.tiny import VOCAB, fill

#: Sizes small enough to run anywhere, and different enough not to be mistaken for each other.
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_k": 2, "moe_topk": 2, "top_k_experts": 2,
    "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1,
    "shared_expert_intermediate_size": 32, "shared_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0, "num_dense_layers": 0, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "qk_head_dim": 32, "v_head_dim": 16, "sliding_window": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4, "index_head_dim": 16,
    "index_n_heads": 2, "index_topk": 64,  # every key: in bfloat16 a choice of keys changes as one of experts does
}  # fmt: skip

_LATENT = {"num_key_value_heads": 4}
_NARROW = {"intermediate_size": 32}
_SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}


@dataclass(frozen=True)
class Family:
    """config, model: class names in transformers.models.NAME; extra: settings over SMALL; inputs: what the model takes;
    unlike: why it has no expert blocks to fuse, where that is so; wide: parts of names of parameters that stay float32."""

    config: str
    model: str
    extra: dict[str, Any] = field(default_factory=dict)
    inputs: Literal["ids", "seq2seq", "image"] = "ids"
    unlike: str = ""
    wide: str = ""


def _lm(stem: str, **extra: Any) -> Family:
    return Family(f"{stem}Config", f"{stem}ForCausalLM", extra)


def _text(stem: str, **extra: Any) -> Family:
    return Family(f"{stem}TextConfig", f"{stem}TextModel", extra)


FAMILIES: dict[str, Family] = {
    "afmoe": _lm("Afmoe"),
    "aria": Family("AriaTextConfig", "AriaTextForCausalLM", _NARROW),
    "axk1": _lm("AXK1", **_LATENT),
    "axk2": _lm("AXK2", **_LATENT),
    "bailing_hybrid": _lm("BailingHybrid", **_LATENT, **_HYBRID),
    "beam": _lm("Beam", **_LATENT, **_SPARSE),
    "cohere2_moe": _lm("Cohere2Moe", **_NARROW),
    "dbrx": _lm(
        "Dbrx", d_model=64, n_heads=4, n_layers=2, max_seq_len=256,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2, "hidden_size": 64},
    ),
    "deepseek_ocr2": _text("DeepseekOcr2", **_LATENT, **_SPARSE),
    "deepseek_v2": _lm("DeepseekV2", topk_method="group_limited_greedy", **_LATENT),
    "deepseek_v3": _lm("DeepseekV3", **_LATENT),
    "deepseek_v32": _lm("DeepseekV32", **_LATENT),
    "deepseek_v4": _lm("DeepseekV4"),
    "diffusion_gemma": Family("DiffusionGemmaTextConfig", "DiffusionGemmaEncoderTextModel"),
    "doge": Family("DogeConfig", "DogeForCausalLM", {"is_moe": True, "num_experts": 16},
                   unlike="an expert is one row of an embedding: no expert products"),
    "dots1": _lm("Dots1"),
    "dots3_note": _text("Dots3Note", **_LATENT),
    "ernie4_5_moe": _lm("Ernie4_5_Moe", moe_layer_start_index=0, moe_layer_end_index=-1, moe_layer_interval=1),
    "ernie4_5_vl_moe": _text(
        "Ernie4_5_VLMoe", moe_intermediate_size=[32, 32],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]},
    ),
    "exaone_moe": _lm("ExaoneMoe"),
    "flex_olmo": _lm("FlexOlmo", **_NARROW),
    "flint": _lm("Flint"),
    "gemma4": Family("Gemma4TextConfig", "Gemma4ForCausalLM", {"enable_moe_block": True}),
    "glm4_moe": _lm("Glm4Moe"),
    "glm4_moe_lite": _lm("Glm4MoeLite", **_LATENT),
    "glm4v_moe": _text("Glm4vMoe", rope_parameters={**_MROPE, "partial_rotary_factor": 1.0}),
    "glm5_next": _text("Glm5Next", qk_rope_head_dim=0, **_LATENT, **_HYBRID, **_SPARSE),
    "glm_moe_dsa": _lm("GlmMoeDsa", **_LATENT),
    "gpt_oss": _lm("GptOss", **_NARROW),
    "granitemoe": _lm("GraniteMoe", **_NARROW),
    "granitemoe_swa": _lm("GraniteMoeSWA", **_NARROW),
    "granitemoehybrid": _lm("GraniteMoeHybrid", layer_types=["attention", "attention"], **_NARROW),
    "granitemoeshared": _lm("GraniteMoeShared", **_NARROW),
    "hunyuan_v1_moe": _lm(
        "HunYuanMoEV1", intermediate_size=32, moe_topk=[2, 2], num_shared_expert=[1, 1], moe_intermediate_size=None
    ),
    "hy_v3": _lm("HYV3"),
    "hy_v4": _lm("HYV4"),
    "inkling": _text("Inkling"),
    "inkling2": Family("Inkling2TextConfig", "Inkling2TextModel", wide=".gate.weight"),
    "jamba": _lm(
        "Jamba", intermediate_size=32, expert_layer_period=1, expert_layer_offset=0, attn_layer_period=2,
        attn_layer_offset=1, use_mamba_kernels=False, mamba_d_state=8, mamba_d_conv=4, mamba_expand=2, mamba_dt_rank=4,
    ),
    "jetmoe": _lm("JetMoe", kv_channels=16, **_NARROW),
    "kimi_linear": _lm("KimiLinear", **_LATENT, **_HYBRID),
    "kolibri1": _lm("Kolibri1"),
    "laguna": _lm("Laguna"),
    "lfm2_moe": _lm("Lfm2Moe", layer_types=["conv", "full_attention"]),
    "llama4": Family(
        "Llama4TextConfig", "Llama4ForCausalLM",
        {"intermediate_size": 32, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 1, "num_experts_per_tok": 1,
         "no_rope_layers": [1, 0], "attention_chunk_size": 8},
    ),
    "longcat_flash": _lm(
        "LongcatFlash", num_layers=1, ffn_hidden_size=96, expert_ffn_hidden_size=32, zero_expert_num=2, **_LATENT
    ),
    "mellum": _lm("Mellum"),
    "mimo_v2_flash": _lm("MiMoV2Flash"),
    "minimax": _lm("MiniMax", block_size=8, **_NARROW, **_HYBRID),
    "minimax_m2": _lm("MiniMaxM2", rotary_dim=8, **_NARROW),
    "minimax_m3_vl": _text("MiniMaxM3VL"),
    "mistral4": _lm("Mistral4", **_LATENT),
    "mistral_large4": _text("MistralLarge4", **_LATENT),
    "mixtral": _lm("Mixtral"),
    "muse_spark": _text("MuseSpark"),
    "nemotron_h": _lm("NemotronH"),
    "nllb_moe": Family(
        "NllbMoeConfig", "NllbMoeForConditionalGeneration",
        {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_sparse_step": 1, "decoder_sparse_step": 1,
         "decoder_start_token_id": 1, "expert_capacity": 32, "router_jitter_noise": 0.0}, inputs="seq2seq",
    ),
    "olmoe": _lm("Olmoe", **_NARROW),
    "openai_privacy_filter": Family("OpenAIPrivacyFilterConfig", "OpenAIPrivacyFilterModel", _NARROW),
    "phimoe": _lm("Phimoe", **_NARROW),
    "qwen2_moe": _lm("Qwen2Moe"),
    "qwen3_5_moe": Family("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", _HYBRID),
    "qwen3_moe": _lm("Qwen3Moe"),
    "qwen3_next": _lm("Qwen3Next", **_HYBRID),
    "qwen3_omni_moe": Family(
        "Qwen3OmniMoeTextConfig", "Qwen3OmniMoeThinkerTextModel", {"rope_parameters": {**_MROPE, "mrope_interleaved": True}}
    ),
    "qwen3_vl_moe": _text("Qwen3VLMoe", rope_parameters={**_MROPE, "mrope_interleaved": True}),
    "qwen4_exp": Family(
        "Qwen4ExpTextConfig", "Qwen4ExpForCausalLM",
        {**_HYBRID, "indexer_budget": 8, "indexer_compress_ratio": 4, "indexer_n_heads": 2, "indexer_kv_heads": 1,
         "indexer_head_dim": 16},
    ),
    "solar_open": _lm("SolarOpen"),
    "step3p7": _text("Step3p7", **_SPARSE),
    "switch_transformers": Family(
        "SwitchTransformersConfig", "SwitchTransformersEncoderModel",
        {"d_model": 64, "d_kv": 16, "d_ff": 32, "num_layers": 2, "num_sparse_encoder_layers": 2, "num_heads": 4,
         "expert_capacity": 32, "router_jitter_noise": 0.0},
    ),
    "unlimited_ocr": _text("UnlimitedOcr", **_LATENT, **_SPARSE),
    "vitpose_backbone": Family(
        "VitPoseBackboneConfig", "VitPoseBackbone",
        {"image_size": [32, 32], "patch_size": [8, 8], "num_experts": 3, "part_features": 16}, inputs="image",
        unlike="the expert is chosen for the whole batch, by the dataset",
    ),
    "zaya": _lm("Zaya", num_experts_per_tok=1),
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float32, experts: str | None = None) -> Any:
    """A model of the family in eval mode; experts: the implementation of its experts, where it has a choice."""
    family = FAMILIES[name]
    config = _configured(_class(name, "configuration", family.config), family.extra)
    if experts is not None:
        config._experts_implementation = experts
    torch.manual_seed(0)
    model = fill(_class(name, "modeling", family.model)._from_config(config, dtype=dtype).eval())
    for parameter, value in model.named_parameters():
        if family.wide and family.wide in parameter:
            value.data = value.data.float()
    return model


def inputs(name: str, length: int = 12) -> dict[str, torch.Tensor]:
    """A batch of two for the family's model."""
    rng = torch.Generator().manual_seed(2)
    family = FAMILIES[name]
    if family.inputs == "image":
        return {
            "pixel_values": torch.randn(2, 3, 32, 32, generator=rng), "dataset_index": torch.tensor([0, 1]),
        }  # fmt: skip
    ids = torch.randint(3, VOCAB, (2, length), generator=rng)
    return {"input_ids": ids, "decoder_input_ids": ids.flip(1)} if family.inputs == "seq2seq" else {"input_ids": ids}


def _class(name: str, part: str, which: str) -> Any:
    return getattr(importlib.import_module(f"transformers.models.{name}.{part}_{name}"), which)


def _configured(config_class: Any, extra: dict[str, Any]) -> Any:
    fields = {f.name for f in dataclasses.fields(config_class)}
    aliases: dict[str, str] = config_class.attribute_map
    known = {aliases.get(k, k): v for k, v in SMALL.items() if aliases.get(k, k) in fields}
    return config_class(**{**known, **{aliases.get(k, k): v for k, v in extra.items()}})
