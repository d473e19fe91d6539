"""Finds an RMSNorm over each head just before a rotation: what the rotation turns is, but for layout,

    normed[p, d] = y[p, d] / sqrt(mean_d(y[p, d]^2) + eps) * w[d],   w = 1, weight or 1 + weight.

The mean of squares anchors it. Both it and y are leaves, so that an element is a short expression of y[p, d], the mean and a
weight; which eps of the graph's constants and which w it is, is tried on one row; the proof (braze.passes.proof) decides.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import fx

from braze.kernels.spec import NormSpec
from braze.passes import proof
from braze.passes.elements import Elements, Expr, Position, Sizes, Unknown, leaves
from braze.passes.sites import NearMiss, NormSite, source_line
from braze.passes.twins import Subgraph, evaluated, subgraph

aten = torch.ops.aten
_CAST = torch.ops.prims.convert_element_type.default

#: Nodes searched for the mean of squares behind what is normed; the longest spelling known has 12.
CONE = 24
MAX_EPS = 0.1

#: Ops that move whole rows of the last dimension, or nothing.
_LAYOUT = {
    _CAST,
    aten.permute.default,
    aten.transpose.int,
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.clone.default,
    aten.slice.Tensor,
    aten.select.int,
}
_POINTWISE = {
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.add.Tensor,
    aten.add.Scalar,
    aten.div.Tensor,
    aten.rsqrt.default,
    aten.sqrt.default,
    aten.pow.Tensor_Scalar,
    aten.reciprocal.default,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.maximum.default,
    aten.expand.default,
}


#: The norms that were told, with the subgraphs they were found in: layers repeat.
Known = dict[object, tuple[Subgraph, NormSite]]


class NoNorm(Exception):
    """Why the norm before a rotation does not join it."""


def find(turned: fx.Node, sizes: Sizes, known: Known) -> NormSite | NearMiss | None:
    """The norm whose result is `turned`, what is close to one, or None where there is no mean of squares behind it."""
    layout, normed = _behind_layout(turned)
    mean = _mean_of_squares(normed)
    if mean is None:
        return None
    try:
        return _site(turned, layout, normed, mean, sizes, known)
    except (NoNorm, Unknown) as e:
        return NearMiss("rope", turned.name, "find", f"the RMSNorm before it stays outside: {e}", source_line([normed]))


def _behind_layout(node: fx.Node) -> tuple[tuple[fx.Node, ...], fx.Node]:
    """(layout ops from `node` back, what they lay out)"""
    layout = []
    while node.target in _LAYOUT and isinstance(node.args[0], fx.Node):
        layout.append(node)
        node = node.args[0]
    return tuple(layout), node


def _mean_of_squares(normed: fx.Node) -> fx.Node | None:
    """The nearest mean of squares that `normed` is computed from by pointwise and layout ops."""
    seen, queue = {normed}, [normed]
    while queue and len(seen) < CONE:
        node = queue.pop(0)
        if node.target is aten.mean.dim and _squared(node) is not None:
            return node
        if node.target in _POINTWISE or node.target in _LAYOUT:
            new = [n for n in node.all_input_nodes if n not in seen]
            seen.update(new)
            queue.extend(new)
    return None


def _squared(mean: fx.Node) -> fx.Node | None:
    """The tensor whose squares `mean` adds up, before any upcast; None where it adds up something else."""
    square = mean.args[0]
    assert isinstance(square, fx.Node)
    power = square.target is aten.pow.Tensor_Scalar and square.args[1] == 2
    product = square.target is aten.mul.Tensor and square.args[0] is square.args[1]
    if not power and not product:
        return None
    base = square.args[0]
    assert isinstance(base, fx.Node)
    while base.target is _CAST and isinstance(base.args[0], fx.Node) and _widens(base.args[0], base):
        base = base.args[0]
    return base


def _widens(source: fx.Node, cast: fx.Node) -> bool:
    a, b = source.meta["val"].dtype, cast.meta["val"].dtype
    return bool(a.is_floating_point and a.itemsize < b.itemsize)


def _site(
    turned: fx.Node, layout: tuple[fx.Node, ...], normed: fx.Node, mean: fx.Node, sizes: Sizes, known: Known
) -> NormSite:
    source = _squared(mean)
    assert source is not None
    shape, head = sizes.shape(normed), sizes.shape(turned)[-1]
    if sizes.shape(source) != shape:
        raise NoNorm(f"it squares a tensor of shape {sizes.shape(source)} and gives one of {shape}")
    dims = {int(d) % len(shape) for d in mean.args[1]}  # type: ignore[union-attr, arg-type]
    spanned = [shape[d] for d in sorted(dims)]
    if dims != {len(shape) - 1} or shape[-1] != head:
        raise NoNorm(f"it spans {' x '.join(map(str, spanned))} elements, and not one head of {head}")
    if _used_elsewhere(turned, layout, normed, source):
        raise NoNorm("its result, or a value it computes on the way, is used elsewhere too")
    here = subgraph([turned], [source], evaluated)
    if here is not None and here.text in known:
        there, twin = known[here.text]
        weight = None if twin.weight is None else here.nodes[there.number(twin.weight) or 0]
        return replace(twin, root=turned, normed=normed, source=source, weight=weight, mean=mean, layout=layout)
    ev = Elements(sizes, stop=lambda n: n is source or n is mean)
    lead = (0,) * (len(shape) - 1)
    row = [ev.at(normed, (*lead, d)) for d in range(head)]
    weight = _weight(row, source, mean, ev)
    dtype = turned.meta["val"].dtype
    for spec in _specs(row[0], weight, dtype):
        site = NormSite(turned, normed, source, weight, mean, layout, spec)
        try:
            proof.norm_row(ev, site, lead)
        except proof.Refused:
            continue
        if here is not None:
            known[here.text] = here, site
        return site
    raise NoNorm("it is not x / sqrt(mean(x^2) + eps), by a weight or by 1 + weight")


def _used_elsewhere(turned: fx.Node, layout: tuple[fx.Node, ...], normed: fx.Node, source: fx.Node) -> bool:
    """Whether anything between source and turned has a user that is not between them."""
    between = _between(normed, source) | set(layout) | {turned, normed}
    inner = between - {turned}
    casts = {n for n in inner if n.target is _CAST and n.args[0] is source}
    rotation = set(turned.users)
    return len(rotation) != 1 or any(u not in between and u not in rotation for n in inner - casts for u in n.users)


def _between(normed: fx.Node, source: fx.Node) -> set[fx.Node]:
    """The nodes that `normed` needs and that need `source`, without source."""
    behind, queue = {normed}, [normed]
    while queue:
        node = queue.pop()
        if node.target in _POINTWISE or node.target in _LAYOUT or node.target is aten.mean.dim:
            new = [n for n in node.all_input_nodes if n is not source and n not in behind]
            behind.update(new)
            queue.extend(new)
    needs = {source}
    for node in sorted(behind):
        if any(n in needs for n in node.all_input_nodes):
            needs.add(node)
    return needs - {source}


def _weight(row: list[Expr], source: fx.Node, mean: fx.Node, ev: Elements) -> fx.Node | None:
    """The node whose d-th element is a factor of row[d]; None where there is none."""
    found: set[fx.Node] = set()
    for d, expr in enumerate(row):
        for load in leaves([expr]):
            node, idx = load.args
            if node in (source, mean):
                continue
            if idx and not _is_row(node):
                node = _row_of(node, idx, ev)
            shape = tuple(node.meta["val"].shape)
            if not idx or idx[-1] != d or shape[-1] != len(row) or not _is_row(node):
                raise NoNorm(f"{node.name} of shape {shape} is no weight of one head's elements")
            found.add(node)
    if len(found) > 1:
        raise NoNorm(f"it has several weights ({', '.join(sorted(n.name for n in found))})")
    return found.pop() if found else None


def _row_of(node: fx.Node, idx: Position, ev: Elements) -> fx.Node:
    """The view of a tensor [.., D], such as the weights of all layers, that is the one row which idx is in; else the tensor."""
    for user in node.users:
        if user.target not in _LAYOUT or not _is_row(user):
            continue
        *lead, width = ev.shape(user)
        if width == ev.shape(node)[-1] and ev.at(user, (*(0 for _ in lead), idx[-1])) is ev.load(node, idx):
            return user
    return node


def _is_row(node: fx.Node) -> bool:
    """Whether a tensor is [D], perhaps with dimensions of size 1 before."""
    shape = node.meta["val"].shape
    return len(shape) > 0 and all(s == 1 for s in shape[:-1])


def _specs(element: Expr, weight: fx.Node | None, dtype: torch.dtype) -> Iterator[NormSpec]:
    """What it may be: every constant that may be its epsilon, by weight or 1 + weight."""
    for eps in sorted({*_constants(element), 0.0}, reverse=True):
        for add_one in (False, True) if weight is not None else (False,):
            yield NormSpec(eps, add_one, dtype)


def _constants(expr: Expr) -> set[float]:
    value = expr.const
    if value is not None:
        return {float(value)} if 0.0 < value < MAX_EPS else set()
    return set().union(*(_constants(a) for a in expr.args if isinstance(a, Expr)))
