"""Whole language models: prefill, and one token's step with a static cache; stock torch.compile and braze, paired in one run.

Stock is, in each cell, the faster of transformers' grouped_mm and batched_mm forms under stock torch.compile. Weights are
random. On a GPU layers have their real sizes, there are few of them, the vocabulary is small, and both sides run in CUDA
graphs (mode="reduce-overhead"); on CPU layers are scaled down. Whole calls, the host's time included; on a GPU also the
GPU's time alone, in calls that begin behind a long kernel, so that the host is done before the GPU begins.

    python benchmarks/models.py [--device cuda] [--quick] [--json FILE] [--models NAME ...]
"""

import argparse
import copy
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

SCALED: dict[str, dict[str, Any]] = {
    "Mixtral": {
        "hidden_size": 512, "intermediate_size": 896, "num_local_experts": 8, "num_experts_per_tok": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    },
    "Qwen3Moe": {
        "hidden_size": 512, "moe_intermediate_size": 256, "num_experts": 32, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    },
    "GptOss": {
        "hidden_size": 512, "intermediate_size": 512, "num_local_experts": 16, "num_experts_per_tok": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    },
    "Llama": {
        "hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    },
}  # fmt: skip
REAL: dict[str, dict[str, Any]] = {
    "Mixtral": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    },
    "Qwen3Moe": {
        "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    },
    "GptOss": {
        "hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 32, "num_experts_per_tok": 4,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
    },
    "DeepseekV3": {
        "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64,
        "num_experts_per_tok": 6, "n_shared_experts": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0,
        "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None, "kv_lora_rank": 512,
    },
    "Llama": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    },
}  # fmt: skip
STOCK = ("grouped_mm", "batched_mm")
PREFILL = {"cpu": 128, "cuda": 2048}  # tokens
CONTEXT, ROOM = 128, 512  # tokens in the cache before the first step, places in it
AHEAD = 50_000_000  # cycles that a GPU is busy for before a call begins
GATHERED = 256  # tokens from which batched_mm, which copies the weights of each token's experts, is not tried


@dataclass(frozen=True)
class Cell:
    """One measurement: median milliseconds of a provider's calls, and of the GPU's part of them."""

    model: str
    dtype: str
    layers: int
    tokens: int
    provider: str
    median: float
    gpu: float | None


def build(name: str, dtype: torch.dtype, layers: int, device: str = "cpu") -> Any:
    import transformers

    sizes = (SCALED if device == "cpu" else REAL)[name]
    config = getattr(transformers, f"{name}Config")(**sizes, num_hidden_layers=layers, vocab_size=1024, pad_token_id=0)
    if name == "GptOss":  # a sliding window's cache counts tokens by a number in Python: no step's graph fits the next
        config.layer_types = ["full_attention"] * layers
    torch.manual_seed(0)
    with torch.device(device):
        return getattr(transformers, f"{name}ForCausalLM")._from_config(config, dtype=dtype).eval()


def forms(model: Any, tokens: int, device: str) -> dict[str, Any]:
    """Compiled models that share their weights: braze's, and stock's in each form of the experts, where there are any."""
    stock: dict[str, Any] = {"mode": "reduce-overhead"} if device == "cuda" else {}
    options = {"triton.cudagraphs": True} if device == "cuda" else {}

    def sharing(experts: str) -> Any:
        twin = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
        twin.set_experts_implementation(experts)
        return twin

    if type(model).__name__.startswith("Llama"):
        own, others = model, {"dense": model}
    else:
        own, others = sharing("grouped_mm"), {n: sharing(n) for n in (STOCK if tokens < GATHERED else STOCK[:1])}
    compiled = {n: torch.compile(other, **stock) for n, other in others.items()}
    return {"braze": torch.compile(own, backend="braze", options=options), **compiled}


def step(model: Any, compiled: Any, device: str) -> Callable[[], Any]:
    """A call that reads one more token into a cache of its own, which an eager prefill filled."""
    import transformers

    cache = transformers.StaticCache(config=model.config, max_cache_len=ROOM)
    model(torch.randint(1024, (1, CONTEXT), device=device), past_key_values=cache)
    ids = torch.randint(1024, (1, 1), device=device)
    return lambda: compiled(ids, past_key_values=cache)


def medians(
    calls: dict[str, Callable[[], Any]], rounds: int, timed: Callable[[Callable[[], Any]], float]
) -> dict[str, float]:
    """Median milliseconds of each call, taken in turn so that the machine's drift meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(4):
            call()
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timed(call))
    return {name: statistics.median(t) for name, t in times.items()}


def wall(call: Callable[[], Any]) -> float:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began = time.perf_counter()
    call()
    wait()
    return (time.perf_counter() - began) * 1e3


def on_gpu(call: Callable[[], Any]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(AHEAD)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def measure(name: str, dtype: torch.dtype, tokens: int, layers: int, device: str, rounds: int) -> list[Cell]:
    torch._dynamo.reset()
    model = build(name, dtype, layers, device)
    ids = torch.randint(1024, (1, tokens), device=device)

    def call(compiled: Any) -> Callable[[], Any]:
        return step(model, compiled, device) if tokens == 1 else lambda: compiled(ids, use_cache=False)

    calls = {n: call(compiled) for n, compiled in {"eager": model, **forms(model, tokens, device)}.items()}
    whole = medians(calls, rounds, wall)
    gpu = medians(calls, rounds, on_gpu) if device == "cuda" else {}
    kind = str(dtype).removeprefix("torch.")
    return [Cell(name, kind, layers, tokens, n, round(t, 4), gpu.get(n) and round(gpu[n], 4)) for n, t in whole.items()]


def show(cells: list[Cell], device: str, console: Console) -> None:
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    table = Table(title=f"whole models on {where}: milliseconds", title_justify="left")
    for column in ("model", "layers", "tokens", "eager", "stock", "braze", "ratio", "GPU: stock", "braze", "ratio"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in dict.fromkeys((c.model, c.dtype, c.layers, c.tokens) for c in cells):
        own = {c.provider: c for c in cells if (c.model, c.dtype, c.layers, c.tokens) == row}
        eager, braze = own.pop("eager"), own.pop("braze")
        stock = min(c.median for c in own.values())
        figures = [eager.median, stock, braze.median, stock / braze.median]
        if braze.gpu is not None:
            stock = min(c.gpu for c in own.values() if c.gpu is not None)
            figures += [stock, braze.gpu, stock / braze.gpu]
        table.add_row(f"{row[0]} {row[1]}", str(row[2]), str(row[3]), *(f"{f:.2f}" for f in figures))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(PREFILL), default="cpu")
    parser.add_argument("--quick", action="store_true", help="one model and dtype, fewer rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the cells there, after each")
    parser.add_argument("--models", nargs="+", help="only these")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    names = args.models or (["Qwen3Moe"] if args.quick else list(SCALED if args.device == "cpu" else REAL))
    dtypes = [torch.bfloat16] if args.quick or args.device == "cuda" else [torch.bfloat16, torch.float32]
    cells: list[Cell] = []
    for name in names:
        for dtype in dtypes:
            for tokens in (1, PREFILL[args.device]):
                layers = 2 if args.device == "cpu" else 4
                with torch.no_grad():
                    cells += measure(name, dtype, tokens, layers, args.device, 7 if args.quick else 25)
                if args.json:
                    args.json.write_text(json.dumps([asdict(c) for c in cells], indent=1) + "\n")
    show(cells, args.device, Console(width=110))


if __name__ == "__main__":
    main()
