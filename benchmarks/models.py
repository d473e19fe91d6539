"""Whole language models on CPU: eager, stock torch.compile and braze, prefill and decode, paired in one run.

Layers are scaled-down copies of real architectures with random weights; what counts is the ratio stock / braze of one run.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

SIZES: dict[str, dict[str, Any]] = {
    "MixtralConfig": {
        "hidden_size": 512, "intermediate_size": 896, "num_local_experts": 8, "num_experts_per_tok": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    },
    "Qwen3MoeConfig": {
        "hidden_size": 512, "moe_intermediate_size": 256, "num_experts": 32, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    },
    "GptOssConfig": {
        "hidden_size": 512, "intermediate_size": 512, "num_local_experts": 16, "num_experts_per_tok": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    },
    "LlamaConfig": {
        "hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One measurement: median seconds of a provider; ratio is stock's median over its own."""

    shape: str
    provider: str
    median: float
    ratio: float


def build(config: str, dtype: torch.dtype, layers: int) -> Any:
    import transformers

    made = getattr(transformers, config)(**SIZES[config], num_hidden_layers=layers, vocab_size=1024)
    model_class = getattr(transformers, config.replace("Config", "ForCausalLM"))
    torch.manual_seed(0)
    return model_class._from_config(made, dtype=dtype).eval()


def medians(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each call, taken in turn so that the machine's drift meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(2):
            call()
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(t) for name, t in times.items()}


def measure(config: str, dtype: torch.dtype, tokens: int, layers: int, rounds: int) -> list[Cell]:
    model = build(config, dtype, layers)
    ids = torch.randint(1024, (1, tokens))
    torch._dynamo.reset()
    providers = {
        "eager": model,
        "stock": torch.compile(model, dynamic=False),
        "braze": torch.compile(model, backend="braze", dynamic=False),
    }
    calls = {n: (lambda m=m: m(ids, use_cache=False)) for n, m in providers.items()}
    with torch.no_grad():
        found = medians(calls, rounds)
    shape = f"{config.removesuffix('Config')} {str(dtype).removeprefix('torch.')} {tokens} token(s)"
    return [Cell(shape, name, t, found["stock"] / t) for name, t in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one model, two cells")
    parser.add_argument("--json", metavar="FILE", help="write the cells there")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    configs = ["Qwen3MoeConfig"] if args.quick else list(SIZES)
    dtypes = [torch.bfloat16] if args.quick else [torch.bfloat16, torch.float32]
    cells: list[Cell] = []
    table = Table(title="whole model on CPU, 2 layers", title_justify="left")
    for column in ("model", "eager ms", "stock ms", "braze ms", "stock / braze"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for config in configs:
        for dtype in dtypes:
            for tokens in (1, 128):
                row = measure(config, dtype, tokens, 2, 7 if args.quick else 15)
                cells += row
                times = [f"{c.median * 1e3:.2f}" for c in row]
                table.add_row(row[0].shape, *times, f"{row[-1].ratio:.2f}")
    Console().print(table)
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(c) for c in cells], indent=1))


if __name__ == "__main__":
    main()
