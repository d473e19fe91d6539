"""What braze's passes add to compilation: their seconds as a share of stock torch.compile's, and their growth with layers.

Tiny hidden sizes, real head sizes and depths: compile time depends on the graph, not on the widths of its tensors. Both are
measured in one run, caches off; the passes' time is what they report of the graph they fused.
"""

import argparse
import json
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from braze.backend import collect

_COMMON = {
    "vocab_size": 96, "hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "max_position_embeddings": 256,
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "LlamaConfig": {},
    "MixtralConfig": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "Qwen3MoeConfig": {
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True,
    },
    "GptOssConfig": {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 32},
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One model at one depth. Seconds: in braze's passes, and of the first call with either backend; share: passes / stock."""

    model: str
    layers: int
    nodes: int
    sites: int
    passes: float
    stock: float
    braze: float
    share: float


def build(config: str, layers: int) -> Any:
    import transformers

    made = getattr(transformers, config)(**_COMMON, **SIZES[config], num_hidden_layers=layers)
    model_class = getattr(transformers, config.replace("Config", "ForCausalLM"))
    torch.manual_seed(0)
    return model_class._from_config(made, dtype=torch.bfloat16).eval()


def first_call(model: Any, backend: str, ids: torch.Tensor) -> float:
    """Seconds until a compiled model's first call returns."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=False)
    began = time.perf_counter()
    compiled(ids, use_cache=False)
    return time.perf_counter() - began


def measure(config: str, layers: int) -> Cell:
    model, ids = build(config, layers), torch.randint(3, 96, (1, 16))
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        stock = first_call(model, "inductor", ids)
        with collect() as reports:
            braze = first_call(model, "braze", ids)
    passes = sum(r.seconds for r in reports)
    nodes, sites = sum(r.nodes for r in reports), sum(len(r.sites) for r in reports)
    return Cell(config.removesuffix("Config"), layers, nodes, sites, passes, stock, braze, passes / stock)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 12, 24, 48])
    parser.add_argument("--models", nargs="+", choices=[c.removesuffix("Config") for c in SIZES], metavar="MODEL")
    parser.add_argument("--quick", action="store_true", help="one model, 4 and 8 layers")
    parser.add_argument("--json", metavar="FILE", help="write the cells there")
    args = parser.parse_args()
    if args.quick:
        args.models, args.layers = ["Mixtral"], [4, 8]
    warnings.filterwarnings("ignore")
    cells: list[Cell] = []
    table = Table(title="first call on CPU, caches off", title_justify="left")
    for column in ("model", "layers", "nodes", "sites", "stock s", "braze s", "passes s", "ms / layer", "share"):
        table.add_column(column, justify="left" if column == "model" else "right")
    measure("LlamaConfig", 1)  # imports, tool chain and tables that the first compilation of a process pays for
    for config in SIZES if args.models is None else [f"{m}Config" for m in args.models]:
        for layers in args.layers:
            c = measure(config, layers)
            cells.append(c)
            times = [f"{c.stock:.1f}", f"{c.braze:.1f}", f"{c.passes:.2f}", f"{c.passes / layers * 1e3:.0f}"]
            table.add_row(c.model, *map(str, (layers, c.nodes, c.sites)), *times, f"{c.share:.1%}")
            if args.json:
                Path(args.json).write_text(json.dumps([asdict(c) for c in cells], indent=1))
    Console().print(table)


if __name__ == "__main__":
    main()
