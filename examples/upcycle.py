"""SmolLM2-135M upcycled: every MLP copied into 8 experts, top-2 with weights that sum to 1: the dense model's function.

    sum_j w_j MLP(x) = MLP(x)  where  sum_j w_j = 1

whatever the router says; so the mixture must give the dense model's text.
"""

from typing import Any

import torch
from smollm2 import arguments, compare, first_layers, greedy, load, prompt, show
from transformers import MixtralConfig, MixtralForCausalLM

EXPERTS, TOP_K = 8, 2


def upcycle(dense: Any) -> Any:
    """A Mixtral with the dense Llama's weights, each MLP in every expert, and a random router."""
    source = dense.config
    config = MixtralConfig(
        **{
            name: getattr(source, name)
            for name in (
                "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
                "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id",
            )
        },
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        sliding_window=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MixtralForCausalLM._from_config(config, dtype=torch.float32).eval()
    state = model.state_dict()
    for name, value in dense.state_dict().items():
        if ".mlp." not in name:
            state[name] = value
    for i, layer in enumerate(dense.model.layers):
        mlp, experts = layer.mlp, f"model.layers.{i}.mlp.experts."
        gate_up = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))
        state[experts + "gate_up_proj"] = gate_up.expand(EXPERTS, -1, -1)
        state[experts + "down_proj"] = mlp.down_proj.weight.expand(EXPERTS, -1, -1)
        router = f"model.layers.{i}.mlp.gate.weight"
        state[router] = torch.randn_like(state[router])
    model.load_state_dict(state)
    return model


def main() -> None:
    args = arguments(__doc__)
    dense, tokenizer = load()
    if args.quick:
        dense = first_layers(dense, 4)
    ids = prompt(tokenizer)
    text = greedy(dense, dense.config, ids, args.tokens).ids
    model = upcycle(dense)
    del dense
    runs = compare(model, ids, args.tokens)
    show(f"SmolLM2-135M upcycled to {EXPERTS} experts, top-{TOP_K}", model, tokenizer, ids, runs)
    for name, run in runs.items():
        if run.ids != text:
            raise SystemExit(f"the mixture's text ({name}) differs from the dense model's")
    print("the mixture gives the dense model's text")


if __name__ == "__main__":
    main()
