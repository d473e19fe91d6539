"""A site becomes one call of its semantic op; what only the site used is gone afterwards."""

from dataclasses import asdict
from typing import Any

import torch
from torch import fx

from braze.passes.sites import RopeSite, Site


def rewrite(site: Site) -> fx.Node:
    """Replaces root by the op's call, which keeps its meta data; returns the call. Dead nodes stay until `clean`."""
    root = site.root
    args: tuple[fx.Node | None, ...]
    target: Any
    if isinstance(site, RopeSite):
        target, args = torch.ops.braze.rope.default, (site.x, site.cos, site.sin)
    else:
        target = torch.ops.braze.moe.default
        args = (site.x, site.ids, site.weights, site.w1, site.w2, site.b1, site.b2)
    kwargs = _attributes(site)
    with root.graph.inserting_before(root):
        call = root.graph.call_function(target, args, kwargs)
    call.meta = {
        k: v for k, v in root.meta.items() if k in ("stack_trace", "nn_module_stack", "original_aten", "from_node")
    }
    value = target(*fx.node.map_arg(args, lambda n: n.meta["val"]), **kwargs)
    old = root.meta["val"]
    if tuple(map(str, value.shape)) != tuple(map(str, old.shape)) or value.dtype != old.dtype:
        root.graph.erase_node(call)
        raise ValueError(f"the op gives {value.dtype} {tuple(value.shape)}, the graph {old.dtype} {tuple(old.shape)}")
    call.meta["val"] = value
    root.replace_all_uses_with(call)
    return call


def _attributes(site: Site) -> dict[str, Any]:
    attributes = asdict(site.spec)
    if attributes["out_dtype"] == site.x.meta["val"].dtype:
        attributes["out_dtype"] = None
    return attributes


def source_nodes(site: Site) -> list[fx.Node]:
    """The nodes whose stack traces tell where a site is in the model's source, best first."""
    return [site.root, *site.root.all_input_nodes, site.x]


def clean(graph: fx.Graph) -> None:
    """Removes what no site left needed, assertions on unneeded values included."""
    graph.eliminate_dead_code()
