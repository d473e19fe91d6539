"""From coefficients to a table: which graph node, viewed how, holds a rotation's cos or sin.

A coefficient is known as an atom, an element of some node. Looking through views, slices, copies and signs gives an element
of a base node; if the base's index is an affine image of (position, column), the base itself, sliced, permuted and
unsqueezed, is the table, and no copy of it is made.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from braze.kernels.spec import PairLayout
from braze.passes.elements import Elements, Expr, Position, Sizes, is_complex, trail

aten = torch.ops.aten

Coefficients = dict[tuple[Position, int], Expr]


class NoTable(Exception):
    """Why no node of the graph serves as the table."""


@dataclass(frozen=True)
class Table:
    """A node and the view of it that broadcasts against [..., width]; `node` makes that view."""

    base: fx.Node
    width: int
    column: int  # the first column
    axes: tuple[int | None, ...]  # for each dimension before the last: the base's dimension, or None to broadcast
    fixed: dict[int, int] = field(default_factory=dict)  # dimensions of the base taken at one index
    part: str = ""  # of a complex base: "re" or "im"
    last: tuple[int, ...] = ()  # where columns are no last dimension: the indices at which those after them are taken

    def node(self, before: fx.Node) -> fx.Node:
        """The view, as nodes inserted before `before` (none where the base serves as it is, or has it already)."""
        make = _maker(before)
        node = self.base
        if self.part:
            node = real_part(node, self.part, make)
        for k in reversed(self.last):
            node = make(aten.select.int, (node, -1, k))
        if self.width != node.meta["val"].shape[-1]:
            node = make(aten.slice.Tensor, (node, -1, self.column, self.column + self.width))
        last = node.meta["val"].ndim - 1
        kept = [d for d in range(last) if d not in self.fixed]
        for d in sorted(self.fixed, reverse=True):
            node = make(aten.select.int, (node, d, self.fixed[d]))
        order = [kept.index(a) for a in self.axes if a is not None]
        if order != sorted(order):
            node = make(aten.permute.default, (node, [*order, len(order)]))
        place = 0
        for a in self.axes:
            if a is None and place:
                node = make(aten.unsqueeze.default, (node, place))
            place += bool(place) or a is not None
        return node


def _maker(before: fx.Node) -> Callable[[Any, tuple[Any, ...]], fx.Node]:
    """Makes nodes before `before`, or finds them there: rotations by one table are told by its being one node."""

    def make(target: Any, args: tuple[Any, ...]) -> fx.Node:
        for known in next(a for a in args if isinstance(a, fx.Node)).users:
            if known.target is target and known.args == args and not known.kwargs and known < before:
                return known
        with before.graph.inserting_before(before):
            node = before.graph.call_function(target, args)
        values = fx.node.map_arg(args, lambda n: n.meta["val"])
        node.meta["val"] = target(*values)
        return node

    return make


def real_part(node: fx.Node, part: str, make: Callable[[Any, tuple[Any, ...]], fx.Node]) -> fx.Node:
    """The real or imaginary part of a complex node, as real nodes: polar(r, a) is (r cos a, r sin a)."""
    args = node.args
    if node.target is aten.polar.default:
        angle = make(aten.cos.default if part == "re" else aten.sin.default, (args[1],))
        return make(aten.mul.Tensor, (args[0], angle))
    if node.target is aten.mul.Tensor:
        a, b = args[:2]
        if isinstance(b, fx.Node) and is_complex(b):
            a, b = b, a
        if isinstance(a, fx.Node) and is_complex(a) and not (isinstance(b, fx.Node) and is_complex(b)):
            return make(aten.mul.Tensor, (real_part(a, part, make), b))
    if node.meta["val"].is_conj():  # what a backward pass is given: only a copy can be viewed
        node = make(aten.clone.default, (node,))
    return make(aten.select.int, (make(aten.view_as_real.default, (node,)), -1, int(part == "im")))


def table(atoms: Coefficients, shape: tuple[int, ...], rotary: int, layout: PairLayout, sizes: Sizes) -> Table:
    """The table of `atoms`, {(position, output element): atom}, for a rotation of [*shape]; NoTable if there is none."""
    looked = Elements(sizes, stop=lambda n: not is_view(n))
    base = {key: _through(looked, atom) for key, atom in atoms.items()}
    for choice in (_written_once(base, sizes), atoms, *_along(atoms, sizes)):
        found = _fit(choice, shape, rotary, layout, sizes)
        if found is not None:
            return found
    names = sorted({a.args[0].name for a in atoms.values() if a.op == "load"})
    raise NoTable(f"no table holds the coefficients (from {', '.join(names[:3])})")


_VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
    aten.repeat.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.clone.default,
    aten.cat.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
    aten.view_as_real.default,
}


def is_view(node: fx.Node) -> bool:
    """Whether a node only moves elements: a table is looked for behind it."""
    return node.target in _VIEWS or getattr(node.target, "__name__", "") == "getitem"


def _through(ev: Elements, atom: Expr) -> Expr:
    return ev.at(*atom.args) if atom.op == "load" else atom


def _along(atoms: Coefficients, sizes: Sizes) -> Iterator[Coefficients]:
    """`atoms` as elements of each node that all of them are views of, the one furthest behind first. Views that are written
    twice are one."""
    if any(a.op != "load" for a in atoms.values()):
        return
    ways = {key: dict(_views_behind(atom, sizes)) for key, atom in atoms.items()}
    first = next(iter(ways.values()))
    for same in reversed(first):
        if all(same in way for way in ways.values()):
            node = first[same].args[0]
            yield {key: Expr("load", (node, way[same].args[1])) for key, way in ways.items()}


def _views_behind(atom: Expr, sizes: Sizes) -> Iterator[tuple[Any, Expr]]:
    """(what is the same for a node that is written twice, the element there) for each view that an atom is looked through."""
    for node, idx in trail(atom.args[0], atom.args[1], Elements(sizes, stop=lambda n: True)):
        yield _writing(node), Expr("load", (node, idx))
        if not is_view(node):
            return


def _writing(node: fx.Node) -> Any:
    """Equal for views of one node that are written alike."""
    if node.op != "call_function" or not is_view(node):
        return node
    return node.target, str(node.kwargs), fx.node.map_arg(_hashable(node.args), _writing)


def _hashable(arg: Any) -> Any:
    return tuple(map(_hashable, arg)) if isinstance(arg, list | tuple) else arg


def _written_once(atoms: Coefficients, sizes: Sizes) -> Coefficients:
    """`atoms` with elements of one node for those of others that are computed alike: cos(a) may be written twice."""
    deep = Elements(sizes)
    first: dict[Expr, Expr] = {}
    out = {}
    for key, atom in atoms.items():
        same = atom
        if atom.op == "load" and not is_complex(atom.args[0]):
            same = first.setdefault(deep.at(*atom.args), atom)
        out[key] = same if same.args[1:] == atom.args[1:] else atom
    return out


def _fit(atoms: Coefficients, shape: tuple[int, ...], rotary: int, layout: PairLayout, sizes: Sizes) -> Table | None:
    """The view of one base node that holds `atoms`, if there is one."""
    if any(a.op != "load" for a in atoms.values()):
        return None
    bases = {a.args[0] for a in atoms.values()}
    if len(bases) != 1:
        return None
    base = bases.pop()
    part = ""
    if is_complex(base):
        parts = {a.args[1][-1] for a in atoms.values()}
        if len(parts) != 1:
            return None
        part = parts.pop()
    index = {key: a.args[1][: -1 if part else None] for key, a in atoms.items()}
    if any(not isinstance(i, int) for idx in index.values() for i in idx):
        return None
    rank = len(next(iter(index.values())))
    last: tuple[int, ...] = ()
    while rank and rotary > 2 and len({idx[-1] for idx in index.values()}) == 1:
        last = (next(iter(index.values()))[-1], *last)
        index, rank = {key: idx[:-1] for key, idx in index.items()}, rank - 1
    if rank == 0:
        return None
    columns = [{idx[-1] for (_, d), idx in index.items() if d == c} for c in range(rotary)]
    if any(len(c) != 1 for c in columns):
        return None
    flat = [c.pop() for c in columns]
    width = _width(flat, rotary, layout)
    if width is None:
        return None
    axes, fixed = _axes({p: idx for (p, d), idx in index.items() if d == 0}, sizes.shape(base)[: rank - 1], shape)
    if axes is None or any(not _at(p, idx, axes, fixed) for (p, _), idx in index.items()):
        return None
    return Table(base, width, flat[0], axes, fixed, part, last)


def _at(p: Position, idx: Position, axes: tuple[int | None, ...], fixed: dict[int, int]) -> bool:
    """Whether idx, but for its column, is where the view has the element of position p."""
    return all(idx[b] == k for b, k in fixed.items()) and all(
        idx[b] == p[d] for d, b in enumerate(axes) if b is not None
    )


def _width(columns: list[int], rotary: int, layout: PairLayout) -> int | None:
    """rotary where columns run with the outputs, rotary/2 where with the pairs."""
    first, half = columns[0], rotary // 2
    if columns == [first + d for d in range(rotary)]:
        return rotary
    pair = (lambda d: d // 2) if layout == "interleaved" else (lambda d: d % half)
    return half if columns == [first + pair(d) for d in range(rotary)] else None


def _axes(
    index: dict[Position, Position], base: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[tuple[int | None, ...] | None, dict[int, int]]:
    """Which dimension of the base each dimension of the position is; None where one is not simply the other."""
    (p0, i0), *others = index.items()
    axes: list[int | None] = [None] * (len(shape) - 1)
    used: set[int] = set()
    for p, i in others:
        (dim,) = (d for d in range(len(p)) if p[d] != p0[d])
        moved = [b for b in range(len(base)) if i[b] != i0[b]]
        if not moved:
            continue
        if len(moved) > 1 or moved[0] in used or (i[moved[0]], i0[moved[0]]) != (p[dim], p0[dim]):
            return None, {}
        axes[dim] = moved[0]
        used.add(moved[0])
        if base[moved[0]] != shape[dim]:
            return None, {}
    fixed = {b: i0[b] for b in range(len(base)) if b not in used}
    return tuple(axes), fixed
