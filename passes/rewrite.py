"""A site becomes one call of its semantic op; what only the site used is gone afterwards."""

import operator
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import fx

from braze.passes import separate
from braze.passes.sites import MlpSite, NormSite, RopeSite, RouterSite, Site

aten = torch.ops.aten
_CAST = torch.ops.prims.convert_element_type.default


def rewrite(site: Site) -> fx.Node:
    """Replaces root by the op's call, which keeps its meta data; returns the call. Dead nodes stay until `clean`."""
    if isinstance(site, RouterSite):
        return _rewrite_router(site)
    root = site.root
    args: tuple[Any, ...]
    target: Any
    if isinstance(site, RopeSite):
        target, args = torch.ops.braze.rope.default, (site.x, site.cos, site.sin)
    elif isinstance(site, MlpSite):
        target, args = torch.ops.braze.mlp.default, (site.x, list(site.w1), site.w2, list(site.b1), site.b2)
    elif separate.lists(site.w1) and separate.lists(site.w2):
        target = torch.ops.braze.moe_separate.default
        lists = map(separate.lists, (site.w1, site.w2, site.b1, site.b2))
        args = (site.x, site.ids, site.weights, *lists)
    elif separate.apart(site.w1):
        target = torch.ops.braze.moe_apart.default
        biases = separate.apart(site.b1) or (None, None)
        args = (site.x, site.ids, site.weights, *separate.apart(site.w1), site.w2, *biases, site.b2)
    else:
        target = torch.ops.braze.moe.default
        args = (site.x, site.ids, site.weights, site.w1, site.w2, site.b1, site.b2)
    if isinstance(site, MlpSite):
        _check_dtypes(site.x, [*site.w1, site.w2])
    elif not isinstance(site, RopeSite):
        _check_dtypes(site.x, [site.w1, site.w2])
    kwargs = _attributes(site)
    with root.graph.inserting_before(root):
        call = root.graph.call_function(target, args, kwargs)
    call.meta = _provenance(root)
    value = target(*fx.node.map_arg(args, lambda n: n.meta["val"]), **kwargs)
    try:
        _check_like(value, root.meta["val"])
    except ValueError:
        root.graph.erase_node(call)
        raise
    # A rotation's root may lie in memory as its input does not, and what follows may need that.
    call.meta["val"] = root.meta["val"] if isinstance(site, RopeSite) else value
    root.replace_all_uses_with(call)
    return call


def _rewrite_router(site: RouterSite) -> fx.Node:
    """Replaces both results; the call takes the place of the top-k, which comes after the logits and before all users."""
    graph = site.ids.graph
    target: Any = torch.ops.braze.route.default
    args, kwargs = (site.logits, site.bias), _attributes(site)
    values = target(*fx.node.map_arg(args, lambda n: n.meta["val"]), **kwargs)
    squeezed = site.ids.meta["val"].ndim < values[1].ndim
    _check_like(values[0], site.weights.meta["val"])
    _check_like(values[1].squeeze(-1) if squeezed else values[1], site.ids.meta["val"])
    with graph.inserting_before(chooser_of(site.ids)):
        call = graph.call_function(target, args, kwargs)
        results = [graph.call_function(operator.getitem, (call, i)) for i in range(2)]
        for node, value in zip((call, *results), (values, *values), strict=True):
            node.meta = {**_provenance(site.ids), "val": value}
        if squeezed:
            results[1] = graph.call_function(torch.ops.aten.squeeze.dim, (results[1], -1))
            results[1].meta = {**_provenance(site.ids), "val": values[1].squeeze(-1)}
    site.weights.replace_all_uses_with(results[0])
    site.ids.replace_all_uses_with(results[1])
    return call


def chooser_of(ids: fx.Node) -> fx.Node:
    """What chooses: the node of several results that the ids are one of, or the first ones of; or the ids themselves."""
    if ids.target is aten.argmax.default:
        return ids
    source = ids.args[0]
    assert isinstance(source, fx.Node)
    return chooser_of(source) if ids.target is aten.slice.Tensor else source


def share(calls: Sequence[fx.Node]) -> None:
    """Calls of one op with the same arguments, and results that lie alike, become the first; the others are dead nodes then.
    Nothing is shared past an op that writes into a tensor."""
    first: dict[Any, fx.Node] = {}
    for node in calls[0].graph.nodes if calls else ():
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            first.clear()
        if node in calls:
            lie = tuple(map(str, node.meta["val"].stride()))
            one = first.setdefault((node.target, node.args, tuple(node.kwargs.items()), lie), node)
            if one is not node:
                node.replace_all_uses_with(one)


def rewrite_norm(site: NormSite) -> fx.Node:
    """Replaces root by braze::rms_norm of the source, laid out as root is; returns the call."""
    root = site.root
    graph = root.graph

    def make(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        with graph.inserting_before(root):
            node = graph.call_function(target, args, kwargs)
        values = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta = {**_provenance(root), "val": target(*values[0], **values[1])}
        return node

    source, weight = site.source, site.weight
    for op in reversed(site.layout):
        if op.target in (_CAST, aten.clone.default):
            continue
        target = aten.reshape.default if op.target is aten.view.default else op.target
        source = make(target, (source, *op.args[1:]), op.kwargs)
    if weight is not None and weight.meta["val"].ndim > 1:
        weight = make(aten.reshape.default, (weight, [-1]), {})
    attributes = asdict(site.spec)
    if attributes["out_dtype"] == source.meta["val"].dtype:
        attributes["out_dtype"] = None
    call = make(torch.ops.braze.rms_norm.default, (source, weight), attributes)
    _check_like(call.meta["val"], root.meta["val"])
    root.replace_all_uses_with(call)
    return call


def _provenance(node: fx.Node) -> dict[str, Any]:
    """What of a node's meta data tells where in the model it is from."""
    return {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack", "original_aten", "from_node")}


def _check_dtypes(x: fx.Node, weights: Sequence[fx.Node]) -> None:
    """A proof runs in float64, where the dtypes that a kernel multiplies do not show."""
    own = x.meta["val"].dtype
    other = {w.meta["val"].dtype for w in weights} - {own}
    if other:
        raise ValueError(f"the rows are {own}, and weights {', '.join(map(str, other))}")


def _check_like(value: torch.Tensor, old: torch.Tensor) -> None:
    if tuple(map(str, value.shape)) != tuple(map(str, old.shape)) or value.dtype != old.dtype:
        raise ValueError(f"the op gives {value.dtype} {tuple(value.shape)}, the graph {old.dtype} {tuple(old.shape)}")


def _attributes(site: Site) -> dict[str, Any]:
    attributes = asdict(site.spec)
    source = site.logits if isinstance(site, RouterSite) else site.x
    if attributes["out_dtype"] == source.meta["val"].dtype:
        attributes["out_dtype"] = None
    if isinstance(site, MlpSite):  # nothing weights its rows
        del attributes["weight_on"], attributes["scale"]
    return attributes


def source_nodes(site: Site) -> list[fx.Node]:
    """The nodes whose stack traces tell where a site is in the model's source, best first."""
    if isinstance(site, RouterSite):
        return [site.ids, site.weights, site.logits]
    return [site.root, *site.root.all_input_nodes, site.x]


def clean(graph: fx.Graph) -> None:
    """Removes what no site left needed, assertions on unneeded values included."""
    graph.eliminate_dead_code()
