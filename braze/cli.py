"""The command line: `braze explain | doctor | options | bench | tune`."""

import argparse
import importlib
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

console = Console()


class UsageError(Exception):
    """What the user asked for cannot be done; the message says what can."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status (2 for a usage error)."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if args.run is _tune:
        args.rest = rest  # its own parser takes them, leading options included
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return int(args.run(args) or 0)
    except UsageError as e:
        Console(stderr=True).print(f"[red]braze:[/red] {escape(str(e))}", highlight=False, soft_wrap=True)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="braze", description="Finds MoE and RoPE in models and lowers them to fused kernels."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    explain = commands.add_parser("explain", help="what is fused in a model, and what is not and why")
    source = explain.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "target", nargs="?", help="MODULE:FUNCTION that returns (model, inputs tuple), or FILE.py:FUNCTION"
    )
    source.add_argument(
        "--hf", metavar="FOLDER", help="a Hugging Face model folder or config.json, built with random weights"
    )
    explain.add_argument("--layers", type=int, default=2, help="layers to keep of an --hf model (default 2)")
    explain.add_argument("--tokens", type=int, default=16, help="tokens of an --hf model's input (default 16)")
    explain.add_argument("--dtype", default="bfloat16", help="dtype of an --hf model (default bfloat16)")
    explain.add_argument("--json", action="store_true", help="print the report as JSON")
    explain.add_argument("--html", metavar="FILE", help="write the report as a page")
    explain.set_defaults(run=_explain)

    doctor = commands.add_parser("doctor", help="versions, devices, compilers, and which kernels can run here")
    doctor.add_argument(
        "--xpu", action="store_true",
        help="compile every kernel for Intel GPUs and look for spills and calls in its machine code; none is needed here",
    )  # fmt: skip
    doctor.add_argument("--jobs", type=int, default=2, help="with --xpu: compilers at work together (default 2)")
    doctor.set_defaults(run=_doctor)

    options = commands.add_parser("options", help="the backend's options, as a Markdown table")
    options.set_defaults(run=_options)

    bench = commands.add_parser("bench", help="run one of the benchmarks of a source checkout")
    bench.add_argument("name", help="the benchmark's name: a file of benchmarks/ without .py")
    bench.add_argument("rest", nargs=argparse.REMAINDER, help="its own arguments, such as --quick or --json FILE")
    bench.set_defaults(run=_bench)

    tune = commands.add_parser("tune", help="measure kernel configurations for a shape on this device", add_help=False)
    tune.set_defaults(run=_tune)
    return parser


def _explain(args: argparse.Namespace) -> None:
    from braze.explain import explain

    model, inputs, kwargs = _hf_model(args) if args.hf else (*_load(args.target), {})
    report = explain(model, *inputs, **kwargs)
    if args.html:
        Path(args.html).write_text(report.to_html())
    if args.json:
        print(report.to_json())
    else:
        console.print(report)


def _load(target: str) -> tuple[Any, tuple[Any, ...]]:
    """(model, inputs) of MODULE:FUNCTION or FILE.py:FUNCTION."""
    module, colon, name = target.rpartition(":")
    if not colon:
        raise UsageError(f"{target!r} has no function: write MODULE:FUNCTION or FILE.py:FUNCTION")
    try:
        if module.endswith(".py"):
            found = runpy.run_path(module)
        else:
            sys.path.insert(0, str(Path.cwd()))
            found = vars(importlib.import_module(module))
    except (ImportError, FileNotFoundError) as e:
        raise UsageError(f"cannot load {module!r}: {e}") from None
    if name not in found:
        raise UsageError(f"{module} has no {name!r}")
    made = found[name]()
    if not isinstance(made, tuple) or len(made) != 2:
        raise UsageError(f"{target} must return (model, inputs), not {type(made).__name__}")
    model, inputs = made
    return model, inputs if isinstance(inputs, tuple) else (inputs,)


def _hf_model(args: argparse.Namespace) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A Hugging Face model of a local config, cut to a few layers, with random weights."""
    import torch

    try:
        import transformers
    except ImportError:
        raise UsageError("--hf needs transformers: pip install 'braze[hf]'") from None
    if not Path(args.hf).exists():
        raise UsageError(f"no folder or file {args.hf!r}: --hf takes a local model folder or its config.json")
    config = transformers.AutoConfig.from_pretrained(args.hf)
    text = config.get_text_config()
    if hasattr(text, "num_hidden_layers"):
        text.num_hidden_layers = min(text.num_hidden_layers, args.layers)
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[: text.num_hidden_layers]
    dtype = getattr(torch, args.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise UsageError(f"unknown dtype {args.dtype!r}; for instance bfloat16, float16 or float32")
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return model, (torch.randint(text.vocab_size, (1, args.tokens)),), {"use_cache": False}


def _doctor(args: argparse.Namespace) -> int:
    from braze.doctor import XpuUnavailable, check_xpu, table

    if not args.xpu:
        console.print(table())
        return 0
    try:
        return check_xpu(console, args.jobs)
    except XpuUnavailable as e:
        raise UsageError(str(e)) from None


def _options(args: argparse.Namespace) -> None:
    from braze.options import table

    print("# Options\n\nMade by `make docs`. Options that are not braze's own go to Inductor.\n")
    print(table())


def _bench(args: argparse.Namespace) -> None:
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    known = sorted(f.stem for f in folder.glob("*.py") if not f.stem.startswith("_"))
    if not known:
        raise UsageError("benchmarks are part of the source checkout, not of the installed package")
    if args.name not in known:
        raise UsageError(f"no benchmark {args.name!r}; there are {', '.join(known)}")
    sys.argv = [args.name, *args.rest]
    sys.path.insert(0, str(folder))
    runpy.run_path(str(folder / f"{args.name}.py"), run_name="__main__")


def _tune(args: argparse.Namespace) -> int:
    try:
        tune = importlib.import_module("braze.tune")
    except ImportError as e:
        raise UsageError(f"tuning needs a GPU build of this package: {e}") from None
    return int(tune.main(args.rest) or 0)


if __name__ == "__main__":
    sys.exit(main())
