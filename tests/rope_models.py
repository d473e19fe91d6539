"""Tiny models of one or two layers that rotate in some way of their own, from transformers' own classes."""

from typing import Any

import pytest
import torch

from tests.tiny import _COMMON, _MOE, fill

transformers = pytest.importorskip("transformers", reason="needs the extra 'hf' (pip install 'braze[hf]')")

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
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float32, layers: int = 1) -> Any:
    """A model in eval mode with random parameters."""
    config, model, extra = MODELS[name]
    known = {**_COMMON, "num_hidden_layers": layers, **extra}
    torch.manual_seed(0)
    return fill(getattr(transformers, model)._from_config(getattr(transformers, config)(**known), dtype=dtype).eval())
