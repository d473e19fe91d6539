"""Finds rotations: nodes whose last dimension D is linear in one tensor x, two taps an element, in pairs.

    out[a'] = C[a'] x[a] - S[a'] x[b],   out[b'] = C[b'] x[b] + S[b'] x[a],   out[d] = x[d] elsewhere

with C, S elements of tables that do not depend on x. Half, interleaved, complex, split-subtract, sign-swapped, partial
and interleaved-in/halves-out are values of the index maps (a, b) -> (a', b'), read off a few positions; the
proof (braze.passes.proof) then decides.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

from braze.kernels.spec import PairLayout, RopeSpec
from braze.passes.elements import Elements, Expr, Position, Sizes, Unknown
from braze.passes.linear import TooLarge, polynomial
from braze.passes.sites import NearMiss, RopeSite, source_line
from braze.passes.tables import NoTable, Table, is_view, table
from braze.passes.twins import Subgraph, evaluated, subgraph

aten = torch.ops.aten
_CAST = torch.ops.prims.convert_element_type.default

#: Nodes searched behind a candidate; the longest spelling known has about 25.
CONE = 48
MAX_HEAD = 1024
#: An element of more terms than this comes close to no rotation: attention's own recurrences have sums like that.
MAX_TERMS_NEAR = 4

_RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
_LAYOUT = {aten.clone.default, aten.permute.default, aten.transpose.int, *_RESHAPES}
_LINEAR = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.neg.default,
    aten.mul.Tensor,
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
    aten.sum.dim_IntList,
    _CAST,
    *_RESHAPES,
}
_ROOTS = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.cat.default,
    aten.view.default,
    aten.reshape.default,
    aten.slice_scatter.default,
    aten.sum.dim_IntList,
}


class NoRotation(Exception):
    """Why a candidate is no rotation; `near` where it came close enough to be worth telling."""

    def __init__(self, reason: str, near: bool = False) -> None:
        super().__init__(reason)
        self.near = near


@dataclass(frozen=True)
class Row:
    """One position's rotation: for each output element, its taps {input element: (constant, atom or None)}."""

    taps: tuple[dict[int, tuple[float, Expr | None]], ...]


@dataclass(frozen=True)
class Form:
    """A rotation's attributes and the tables that hold its coefficients."""

    spec: RopeSpec
    cos: Table
    sin: Table


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
    if not val.is_floating_point() or val.ndim < 2 or not isinstance(val.shape[-1], int):
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
        products += node.target is aten.mul.Tensor
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
    ev = Elements(sizes, stop=lambda n: n is x or n not in between)
    shape = ev.shape(root)
    _row(ev, root, x, (0,) * (len(shape) - 1), 1)
    here = subgraph([root], [x], evaluated)
    key = (here.text, frozenset(map(here.number, between))) if here is not None else None
    if here is not None and key in known:
        there, form = known[key]
        form = replace(form, cos=_moved(form.cos, there, here), sin=_moved(form.sin, there, here))
    else:
        form = _form_of(root, x, ev, sizes)
        if here is not None and key is not None and {form.cos.base, form.sin.base} <= set(here.nodes):
            known[key] = here, form
    spec = form.spec
    return RopeSite(root, x, form.cos.node(root), form.sin.node(root), spec, _words(spec, shape[-1]))


def _moved(table_: Table, there: Subgraph, here: Subgraph) -> Table:
    number = there.number(table_.base)
    assert number is not None
    return replace(table_, base=here.nodes[number])


def _form_of(root: fx.Node, x: fx.Node, ev: Elements, sizes: Sizes) -> Form:
    shape = ev.shape(root)
    head = shape[-1]
    rows = {p: _row(ev, root, x, p, head) for p in positions(shape[:-1])}
    first = next(iter(rows.values()))
    start, rotary = _rotary_range(first)
    layout_in, layout_out = _layouts(first, start, rotary)
    cosines: dict[tuple[Position, int], tuple[float, Expr]] = {}
    sines: dict[tuple[Position, int], tuple[float, Expr]] = {}
    looked = Elements(sizes, stop=lambda n: not is_view(n) and n.target is not aten.neg.default)
    for p, row in rows.items():
        if any(row.taps[d].keys() != first.taps[d].keys() for d in range(head)):
            raise NoRotation("the pairs differ from one position to another", near=True)
        for d in range(rotary):
            own, other, sign = _own_and_other(d, rotary, layout_in, layout_out)
            tap = row.taps[start + d]
            cosines[p, d] = _coefficient(tap[start + own], 1.0, looked)
            sines[p, d] = _coefficient(tap[start + other], sign, looked)
    inverse = _signs(cosines, sines)
    try:
        cos = _table(root, cosines, shape, rotary, layout_out, sizes)
        sin = _table(root, sines, shape, rotary, layout_out, sizes)
    except NoTable as e:
        raise NoRotation(str(e), near=True) from None
    cos, sin = _same_width(cos, sin)
    return Form(RopeSpec(rotary, start, layout_in, layout_out, inverse, root.meta["val"].dtype), cos, sin)


def _between(root: fx.Node, x: fx.Node, cone: dict[fx.Node, int]) -> set[fx.Node]:
    """The nodes of the cone that depend on x."""
    out = {x}
    for node in sorted(cone):
        if any(s in out for s in node.all_input_nodes):
            out.add(node)
    return out


def positions(shape: tuple[int, ...]) -> list[Position]:
    """A few positions: an inner one, and for each dimension one that differs from it there alone."""
    base = tuple(min(s - 1, (s * 2 + i) // 3) for i, s in enumerate(shape))
    out = [base]
    for i, s in enumerate(shape):
        if s > 1:
            out.append(base[:i] + ((base[i] + 1) % s,) + base[i + 1 :])
    return out


def _row(ev: Elements, root: fx.Node, x: fx.Node, p: Position, head: int) -> Row:
    """The taps of the elements root[p, :head]."""
    memo: dict[Expr, dict[tuple[Expr, ...], float]] = {}
    return Row(tuple(_taps(ev.at(root, (*p, d)), x, p, d, memo) for d in range(head)))


def _taps(
    expr: Expr, x: fx.Node, p: Position, d: int, memo: dict[Expr, dict[tuple[Expr, ...], float]]
) -> dict[int, tuple[float, Expr | None]]:
    taps: dict[int, tuple[float, Expr | None]] = {}
    terms = polynomial(expr, memo)
    for atoms, constant in terms.items():
        own = [a for a in atoms if a.op == "load" and a.args[0] is x]
        rest = [a for a in atoms if a not in own]
        if len(own) != 1:
            raise NoRotation("not linear in the rotated tensor")
        idx = own[0].args[1]
        if idx[:-1] != p or not isinstance(idx[-1], int):
            raise NoRotation("an element of another token or head is mixed in")
        if len(rest) > 1:
            raise NoRotation("a coefficient is a product of several tensors", near=len(taps) == 1)
        if idx[-1] in taps:
            raise NoRotation("a coefficient is a sum of several terms", near=len(terms) <= MAX_TERMS_NEAR)
        taps[idx[-1]] = (constant, rest[0] if rest else None)
    if not (len(taps) == 2 or taps == {d: (1.0, None)}):
        raise NoRotation(f"{len(taps)} taps of an element")
    if len(taps) == 2 and any(atom is None for _, atom in taps.values()):
        raise NoRotation("a coefficient is a constant")
    return taps


def _rotary_range(row: Row) -> tuple[int, int]:
    rotated = [d for d, taps in enumerate(row.taps) if len(taps) == 2]
    if not rotated:
        raise NoRotation("no element is rotated")
    start, size = rotated[0], len(rotated)
    if rotated != list(range(start, start + size)):
        raise NoRotation("the rotated elements are not contiguous", near=True)
    if size % 2:
        raise NoRotation(f"the rotary size {size} is odd", near=True)
    return start, size


def _pair(i: int, rotary: int, layout: PairLayout) -> tuple[int, int]:
    return (2 * i, 2 * i + 1) if layout == "interleaved" else (i, i + rotary // 2)


def _layouts(row: Row, start: int, rotary: int) -> tuple[PairLayout, PairLayout]:
    """The pair layouts (in, out) that explain every element's taps."""
    choices: tuple[PairLayout, PairLayout] = ("half", "interleaved")
    for layout_in in choices:
        for layout_out in choices:
            for i in range(rotary // 2):
                taps = {start + k for k in _pair(i, rotary, layout_in)}
                if any(row.taps[start + d].keys() != taps for d in _pair(i, rotary, layout_out)):
                    break
            else:
                return layout_in, layout_out
    raise NoRotation("its pairs are neither halves nor neighbours", near=True)


def _own_and_other(d: int, rotary: int, layout_in: PairLayout, layout_out: PairLayout) -> tuple[int, int, float]:
    """For output d: the tap that cos multiplies, the tap that sin multiplies, and the sign before sin."""
    first = d % 2 == 0 if layout_out == "interleaved" else d < rotary // 2
    i = d // 2 if layout_out == "interleaved" else d % (rotary // 2)
    a, b = _pair(i, rotary, layout_in)
    return (a, b, -1.0) if first else (b, a, 1.0)


def _coefficient(tap: tuple[float, Expr | None], sign: float, looked: Elements) -> tuple[float, Expr]:
    """A tap's sign and the element that is its table's; a table of mixed signs (a matrix of 2 x 2) has them taken out."""
    constant, atom = tap
    assert atom is not None
    inner = looked.at(*atom.args) if atom.op == "load" else atom
    return (-constant * sign, inner.args[0]) if inner.op == "neg" else (constant * sign, atom)


def _signs(
    cosines: dict[tuple[Position, int], tuple[float, Expr]], sines: dict[tuple[Position, int], tuple[float, Expr]]
) -> bool:
    """Whether the rotation is by the opposite angle; NoRotation where the signs are no rotation's at all."""
    if {c for c, _ in cosines.values()} != {1.0}:
        raise NoRotation("the first coefficient has a constant factor or a sign", near=True)
    signs = {c for c, _ in sines.values()}
    if signs not in ({1.0}, {-1.0}):
        raise NoRotation("the signs of the two halves are not opposite", near=signs <= {1.0, -1.0})
    return signs == {-1.0}


def _table(
    root: fx.Node,
    coefficients: dict[tuple[Position, int], tuple[float, Expr]],
    shape: tuple[int, ...],
    rotary: int,
    layout_out: PairLayout,
    sizes: Sizes,
) -> Table:
    return table({key: atom for key, (_, atom) in coefficients.items()}, shape, rotary, layout_out, sizes)


def _same_width(cos: Table, sin: Table) -> tuple[Table, Table]:
    if cos.width != sin.width:
        raise NoRotation("cos and sin tables have different widths", near=True)
    return cos, sin


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


def _words(spec: RopeSpec, head: int) -> str:
    """The normal form in words."""
    name: str = spec.layout_in if spec.layout_in == spec.layout_out else f"{spec.layout_in} to {spec.layout_out}"
    if spec.rotary_dim < head:
        end = spec.start + spec.rotary_dim
        name += f", partial [{spec.start}:{end}] of {head}" if spec.start else f", partial {spec.rotary_dim} of {head}"
    return name + (", opposite angle" if spec.inverse else "")
