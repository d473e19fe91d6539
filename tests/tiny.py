"""Tiny random language models of real architectures, from transformers' own classes."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the extra 'hf' (pip install 'braze[hf]')")
transformers.logging.set_verbosity_error()

VOCAB = 96
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {"num_experts_per_tok": 2, "num_local_experts": 8}


@dataclass(frozen=True)
class Family:
    """How to build one architecture, and how many sites its two layers have."""

    config: str
    model: str
    extra: dict[str, Any] = field(default_factory=dict)
    rope: int = 4
    moe: int = 0
    #: Whether the class takes transformers' experts implementations (grouped_mm, batched_mm, eager).
    switchable: bool = True


FAMILIES = {
    "llama": Family("LlamaConfig", "LlamaForCausalLM", switchable=False),
    "cohere": Family("CohereConfig", "CohereForCausalLM", switchable=False),
    "glm4": Family("Glm4Config", "Glm4ForCausalLM", switchable=False),
    "gpt_neox": Family("GPTNeoXConfig", "GPTNeoXForCausalLM", switchable=False),
    "mixtral": Family("MixtralConfig", "MixtralForCausalLM", _MOE, moe=2),
    "qwen3_moe": Family(
        "Qwen3MoeConfig", "Qwen3MoeForCausalLM",
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}, moe=2,
    ),
    "llama4": Family(
        "Llama4TextConfig", "Llama4ForCausalLM",
        {
            "num_local_experts": 8, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 96,
            "no_rope_layers": [1, 0], "attention_chunk_size": 32,
        }, rope=2, moe=2, switchable=False,
    ),
    "gpt_oss": Family("GptOssConfig", "GptOssForCausalLM", {**_MOE, "sliding_window": 32, "intermediate_size": 32}, moe=2),
    "deepseek_v3": Family(
        "DeepseekV3Config", "DeepseekV3ForCausalLM",
        {
            "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32, "n_group": 2,
            "topk_group": 1, "first_k_dense_replace": 0, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4,
        }, moe=2,
    ),
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float32, experts: str | None = None) -> Any:
    """A model of the family in eval mode; experts: the implementation of its experts, where it has a choice."""
    family = FAMILIES[name]
    config_class, model_class = getattr(transformers, family.config), getattr(transformers, family.model)
    known = {**_COMMON, **family.extra}
    config = config_class(**known)
    if family.switchable and experts:
        config._experts_implementation = experts
    torch.manual_seed(0)
    return fill(model_class._from_config(config, dtype=dtype).eval())


def fill(model: Any) -> Any:
    """Random parameters, the same ones each time: some classes leave them empty or zero."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.08 + (parameter.ndim == 1))
    return model


def as_float64(model: Any) -> Any:
    """The same model in float64, its experts as a plain loop: what results are compared with."""
    import copy

    twin = copy.deepcopy(model).double()
    twin.config._experts_implementation = "eager"
    return twin


def tokens(batch: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(2))
