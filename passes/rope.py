"""Finds rotations: where in a graph one may lie, of which tensor, and how much of the graph around it belongs to it.

A root is what a rotation may end in, its cone the linear and layout ops behind it, and x where paths through the cone meet
again. Whether root is a rotation of x is told by its elements (braze.passes.rotation).
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import fx

from braze.passes.element_layout import FLIPS
from braze.passes.element_pointwise import FMA
from braze.passes.elements import Elements, Sizes, Unknown, is_empty
from braze.passes.linear import TooLarge
from braze.passes.rotation import Form, NoRotation, form_of, row_of, words
from braze.passes.sites import NearMiss, RopeSite, source_line
from braze.passes.tables import Table
from braze.passes.twins import Subgraph, evaluated, subgraph

aten = torch.ops.aten
_CAST = torch.ops.prims.convert_element_type.default
_PRODUCTS = {aten.mul.Tensor, aten.addcmul.default, FMA}

#: Nodes searched behind a candidate; the longest spelling known has about 25.
CONE = 48
MAX_HEAD = 1024

_RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
_LAYOUT = {aten.clone.default, aten.permute.default, aten.transpose.int, *_RESHAPES}
_LINEAR = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.neg.default,
    aten.mul.Scalar,
    aten.cat.default,
    aten.stack.default,
    aten.permute.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.select.int,
    aten.slice.Tensor,
    aten.slice_scatter.default,
    aten.copy.default,
    aten.clone.default,
    aten.expand.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
    aten.view_as_complex.default,
    aten.view_as_real.default,
    aten.complex.default,
    aten.index.Tensor,
    torch.ops.prims.rev.default,
    aten.sum.dim_IntList,
    _CAST,
    *_RESHAPES,
    *_PRODUCTS,
}
_ROOTS = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.addcmul.default,
    FMA,
    aten.cat.default,
    aten.view.default,
    aten.reshape.default,
    aten.slice_scatter.default,
    aten.sum.dim_IntList,
}


#: The forms of the rotations that were worked out, with the subgraphs they were found in.
Known = dict[object, tuple[Subgraph, Form]]


def find(graph: fx.Graph, sizes: Sizes) -> tuple[list[RopeSite], list[NearMiss]]:
    """Every rotation of the graph, and what nearly was one. Tables that need new view nodes get them, before root."""
    sites: dict[fx.Node, RopeSite] = {}
    misses: dict[fx.Node, NearMiss] = {}
    known: Known = {}
    for root in list(graph.nodes):
        if not _may_be_root(root, sizes):
            continue
        cone = _cone(root)
        inner = [n for n in cone if n in sites]
        try:
            site = _match(root, cone, sizes, known)
        except NoRotation as e:
            if e.near and not inner:
                misses[root] = NearMiss("rope", root.name, "find", str(e), source_line([root]))
            continue
        if any(_same_work(sites[n], site) for n in inner):
            continue
        between = _between(root, site.x, cone)
        for n in inner:
            if n in between and n is not site.x:
                del sites[n]  # the same rotation with its head or tail: this one says more
        sites[root] = _with_casts(site)
    rotated = set().union(*(_cone(s.root).keys() for s in sites.values())) if sites else set()
    return list(sites.values()), [m for n, m in misses.items() if n not in rotated]


def _may_be_root(node: fx.Node, sizes: Sizes) -> bool:
    val = node.meta.get("val")
    if node.op != "call_function" or node.target not in _ROOTS or not isinstance(val, torch.Tensor):
        return False
    if not val.is_floating_point() or val.ndim < 2 or not isinstance(val.shape[-1], int) or is_empty(node):
        return False
    return 4 <= val.shape[-1] <= MAX_HEAD


def _cone(root: fx.Node) -> dict[fx.Node, int]:
    """The linear and layout nodes behind `root`, nearest first, with the number of edges that lead to each from within;
    what is not linear is its rim. Empty where there is no product of tensors in it."""
    edges: dict[fx.Node, int] = {root: 0}
    queue = [root]
    products = 0
    while queue and len(edges) < CONE:
        node = queue.pop(0)
        if node.target not in _LINEAR and not _is_part(node):
            continue
        products += node.target in _PRODUCTS
        for source in node.all_input_nodes:
            if source not in edges:
                edges[source] = 0
                queue.append(source)
            edges[source] += sum(a is source for a in _flat_args(node))
    return edges if products else {}


def _is_part(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"


def _flat_args(node: fx.Node) -> Iterator[object]:
    for a in node.args:
        if isinstance(a, list | tuple):
            yield from a
        else:
            yield a


def _candidates(root: fx.Node, cone: dict[fx.Node, int]) -> Iterator[fx.Node]:
    """Nodes where paths from root meet again, or pairs are made, nearest first: what may be rotated."""
    for node, edges in cone.items():
        val = node.meta.get("val")
        if node is root or not isinstance(val, torch.Tensor) or not val.is_floating_point():
            continue
        paired = any(u.target is aten.view_as_complex.default and u in cone for u in node.users)
        split = any(
            u.target in (aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int) and cone.get(u, 0) > 1
            for u in node.users
        )
        summed = any(u.target is aten.mul.Tensor and any(_is_sum(v) for v in u.users) for u in node.users)
        if edges > 1 or paired or split or summed:
            yield node
            while node.target in _LAYOUT and node.args[0] in cone:  # pairs are often a dimension of their own
                node = node.all_input_nodes[0]
                yield node


def _is_sum(node: fx.Node) -> bool:
    return node.target is aten.sum.dim_IntList


def _match(root: fx.Node, cone: dict[fx.Node, int], sizes: Sizes, known: Known) -> RopeSite:
    found: list[RopeSite] = []
    closest = NoRotation("no tensor is tapped twice an element")
    for x in _candidates(root, cone):
        if x.meta["val"].ndim != root.meta["val"].ndim or not _same_shape(x, root):
            continue
        try:
            found.append(_rotation(root, x, cone, sizes, known))
        except NoRotation as e:
            closest = e if e.near else closest
        except (Unknown, TooLarge):
            continue
    if not found:
        raise closest
    # Both factors of a product are tapped alike where one head is rotated: x is what a projection made. Of one chain the
    # nearest, but for copies that put pairs in another order: a kernel reads through them.
    copies = {s.x: sum(n.target is aten.clone.default for n in _between(root, s.x, cone)) for s in found}
    return max(found, key=lambda s: (_projected(s.x) and not _projected(s.cos), copies[s.x], -found.index(s)))


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    return tuple(map(str, a.meta["val"].shape)) == tuple(map(str, b.meta["val"].shape))


def _projected(node: fx.Node, depth: int = 24) -> bool:
    """Whether a matrix product or an attention-sized input lies close behind."""
    seen, queue = {node}, [node]
    while queue and len(seen) < depth:
        n = queue.pop(0)
        if n.target in (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default):
            return True
        for s in n.all_input_nodes:
            if s not in seen:
                seen.add(s)
                queue.append(s)
    return False


def _rotation(root: fx.Node, x: fx.Node, cone: dict[fx.Node, int], sizes: Sizes, known: Known) -> RopeSite:
    """root as a rotation of x; NoRotation where it is none. What is known of a twin is not worked out again."""
    between = _between(root, x, cone)
    ev = Elements(sizes, stop=lambda n: n is x or n not in between, indices=Elements(sizes), also=FLIPS)
    shape = ev.shape(root)
    row_of(ev, root, x, (0,) * (len(shape) - 1), 1)
    here = subgraph([root], [x], evaluated)
    key = (here.text, frozenset(map(here.number, between))) if here is not None else None
    if here is not None and key in known:
        there, form = known[key]
        form = replace(form, cos=_moved(form.cos, there, here), sin=_moved(form.sin, there, here))
    else:
        form = form_of(root, x, ev, sizes)
        if here is not None and key is not None and {form.cos.base, form.sin.base} <= set(here.nodes):
            known[key] = here, form
    spec = form.spec
    return RopeSite(root, x, form.cos.node(root), form.sin.node(root), spec, words(spec, shape[-1]))


def _moved(table_: Table, there: Subgraph, here: Subgraph) -> Table:
    number = there.number(table_.base)
    assert number is not None
    return replace(table_, base=here.nodes[number])


def _between(root: fx.Node, x: fx.Node, cone: dict[fx.Node, int]) -> set[fx.Node]:
    """The nodes of the cone that depend on x."""
    out = {x}
    for node in sorted(cone):
        if any(s in out for s in node.all_input_nodes):
            out.add(node)
    return out


def _same_work(inner: RopeSite, outer: RopeSite) -> bool:
    """Whether `outer` only looks at the result of `inner` again."""
    return inner.x is outer.x and inner.spec == outer.spec and _same_shape(inner.root, outer.root)


def _with_casts(site: RopeSite) -> RopeSite:
    """Takes in an upcast before the rotation and a cast after it: the op computes in float32 whatever its ends are."""
    x, root, spec = site.x, site.root, site.spec
    source = x.args[0] if x.target is _CAST else None
    if isinstance(source, fx.Node) and source.meta["val"].is_floating_point():
        narrow = source.meta["val"].dtype.itemsize < x.meta["val"].dtype.itemsize <= 4
        x = source if narrow else x
    after = next(iter(root.users)) if len(root.users) == 1 else root
    if after.target is _CAST and after.meta["val"].is_floating_point():
        root, spec = after, replace(spec, out_dtype=after.meta["val"].dtype)
    return replace(site, root=root, x=x, spec=spec)
