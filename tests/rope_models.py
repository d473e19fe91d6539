"""Tiny models of one or two layers that rotate in some way of their own, from transformers' own classes."""

from typing import Any

import pytest
import torch

from tests.tiny import _COMMON, _MOE, fill

transformers = pytest.importorskip("transformers", reason="needs the extra 'hf' (pip install 'braze[hf]')")

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}

#: name: (config, model, what its config needs besides the common sizes)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
    "llama4": (
        "Llama4TextConfig", "Llama4ForCausalLM",
        {
            **_MOE, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 96,
            "no_rope_layers": [1], "attention_chunk_size": 32, "layer_types": ["chunked_attention"],
        },
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "llama, yarn": ("LlamaConfig", "LlamaForCausalLM", {"rope_parameters": _YARN}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {}),
    "glm": ("GlmConfig", "GlmForCausalLM", {}),
    "roformer": ("RoFormerConfig", "RoFormerForCausalLM", {"is_decoder": True}),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", {"rotary_dim": 8}),
    "codegen": ("CodeGenConfig", "CodeGenForCausalLM", {"rotary_dim": 8}),
    "ernie4_5": ("Ernie4_5Config", "Ernie4_5ForCausalLM", {}),
    "cohere": ("CohereConfig", "CohereForCausalLM", {}),
    "helium": ("HeliumConfig", "HeliumForCausalLM", {}),
    "nanochat": ("NanoChatConfig", "NanoChatForCausalLM", {}),
    "exaone4": ("Exaone4Config", "Exaone4ForCausalLM", {"layer_types": ["sliding_attention"]}),
    "hunyuan": ("HunYuanDenseV1Config", "HunYuanDenseV1ForCausalLM", {}),
    "persimmon": ("PersimmonConfig", "PersimmonForCausalLM", {}),
    "modernbert": ("ModernBertConfig", "ModernBertModel", {}),
    "esm": ("EsmConfig", "EsmModel", {"position_embedding_type": "rotary", "mask_token_id": 3}),
    "qwen2_vl": ("Qwen2VLTextConfig", "Qwen2VLTextModel", {"rope_parameters": _MROPE}),
    "qwen3_vl": ("Qwen3VLTextConfig", "Qwen3VLTextModel", {"rope_parameters": {**_MROPE, "mrope_interleaved": True}}),
    "glm4v": ("Glm4vTextConfig", "Glm4vTextModel", {"rope_parameters": {**_MROPE, "partial_rotary_factor": 1.0}}),
}  # fmt: skip

#: The forms of a layer's two rotations.
ROTATIONS: dict[str, list[str]] = {
    "llama": ["half"] * 2,
    "llama, yarn": ["half"] * 2,
    "phi3": ["half"] * 2,
    "gpt_neox": ["half, partial 4 of 16"] * 2,
    "glm": ["interleaved, partial 8 of 16"] * 2,
    "roformer": ["interleaved"] * 2,
    "gptj": ["interleaved, partial 8 of 16"] * 2,
    "codegen": ["interleaved, partial 8 of 16"] * 2,
    "ernie4_5": ["interleaved"] * 2,
    "cohere": ["interleaved"] * 2,
    "helium": ["interleaved"] * 2,
    "nanochat": ["half, opposite angle"] * 2,
    "exaone4": ["half, rms_norm before (eps 1e-05, weight)"] * 2,
    "hunyuan": ["half"] * 2,  # its norms come after the rotation
    "persimmon": ["half, partial 8 of 16"] * 2,
    "modernbert": ["half"] * 2,
    "esm": ["half"] * 2,
    "qwen2_vl": ["half"] * 2,
    "qwen3_vl": ["half, rms_norm before (eps 1e-06, weight)"] * 2,
    "glm4v": ["interleaved"] * 2,
}

_VISION = {
    "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 16, "intermediate_size": 96,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
_VIDEO = {
    "patch_size": 8, "crop_size": 32, "frames_per_clip": 4, "tubelet_size": 2, "mlp_ratio": 2, "hidden_size": 64,
    "num_attention_heads": 4, "num_hidden_layers": 1, "pred_hidden_size": 64, "pred_num_attention_heads": 4,
    "pred_num_hidden_layers": 1, "pred_num_mask_tokens": 1,
}  # fmt: skip
#: name: (config, model, its settings, the input's name, its shape, the forms of all its rotations)
TOWERS: dict[str, tuple[str, str, dict[str, Any], str, tuple[int, ...], list[str]]] = {
    "dinov3_vit": ("DINOv3ViTConfig", "DINOv3ViTModel", _VISION, "pixel_values", (1, 3, 32, 32), ["half"] * 2),
    "pixtral": ("PixtralVisionConfig", "PixtralVisionModel", _VISION, "pixel_values", (1, 3, 32, 32), ["half"] * 2),
    "vjepa2": (
        "VJEPA2Config", "VJEPA2Model", _VIDEO, "pixel_values_videos", (1, 4, 3, 32, 32), ["interleaved"] * 12,
    ),
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float32, layers: int = 1) -> Any:
    """A model in eval mode with random parameters."""
    config, model, extra = MODELS[name]
    return _made(config, model, {**_COMMON, "num_hidden_layers": layers, **extra}, dtype)


def build_tower(name: str) -> Any:
    config, model, settings, *_ = TOWERS[name]
    return _made(config, model, settings, torch.float32)


def _made(config: str, model: str, settings: dict[str, Any], dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    known = getattr(transformers, config)(**settings)
    return fill(getattr(transformers, model)._from_config(known, dtype=dtype).eval())
