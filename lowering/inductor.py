"""The one place that touches Inductor's private API: its compile function, pass hooks, cache keys and decompositions.

braze's passes run as Inductor's custom post-grad pre-pass. The pass's uuid is part of Inductor's cache keys, so it covers all that
decides what the pass makes: the sources of the package, its settings, and the versions of torch and Triton.
"""

import hashlib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table

HOOK = "post_grad_custom_pre_pass"


class GraphPass(CustomGraphPass):  # type: ignore[misc]
    """A graph transformation with a cache key, after a pass that the user had set."""

    def __init__(self, transform: Callable[[fx.Graph], object], key: str, before: Any) -> None:
        self.transform = transform
        self.key = key
        self.before = list(before) if isinstance(before, list | tuple) else [before] if before else []

    def __call__(self, graph: fx.Graph) -> None:
        for earlier in self.before:
            earlier(graph)
        self.transform(graph)

    def uuid(self) -> Any | None:
        """The cache key; None, which turns Inductor's caches off, where an earlier pass has none."""
        keys = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.before]
        if None in keys:
            return None
        return ("braze", source_key(), self.key, versions(), *map(str, keys))


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    transform: Callable[[fx.Graph], object],
    key: str,
    patches: Mapping[str, Any],
) -> Callable[..., Any]:
    """Inductor's compilation of a Dynamo graph with `transform` before its post-grad passes.

    key: what `transform` depends on besides the package's sources. patches: Inductor settings for this graph.
    """
    before = patches.get(HOOK, getattr(config, HOOK))
    hooked = {**patches, HOOK: GraphPass(transform, key, before)}
    return compile_fx(gm, example_inputs, config_patches=hooked)  # type: ignore[no-any-return, arg-type]


@lru_cache(maxsize=1)
def source_key() -> str:
    """A digest of every source file of the package, wherever it is installed."""
    import braze.kernels
    import braze.lowering
    import braze.passes

    digest = hashlib.sha256()
    for package in (braze, braze.passes, braze.lowering, braze.kernels):
        root = Path(next(iter(package.__path__)))
        for file in sorted(f for f in root.rglob("*") if f.suffix in (".py", ".h", ".cpp", ".json", ".cl")):
            digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


@lru_cache(maxsize=1)
def versions() -> str:
    """torch's and Triton's versions, and those of the providers of kernels."""
    found = [f"torch {torch.__version__}"]
    for name in ("triton", "triton-xpu", "pytorch-triton-xpu"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def decompositions() -> Mapping[Any, Callable[..., Any]]:
    """The table that puts ATen ops into the dialect of Inductor's post-grad graphs."""
    return select_decomp_table()
