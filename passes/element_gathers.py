"""Constants, and ops that turn an element of an integer tensor into an index: gathers, scatters, sorts.

A permutation that was scattered back is its inverse: perm[inverse(s)] = s.
"""

from typing import Any

import torch
from torch import fx

from braze.passes.element_args import argument, tensor_of
from braze.passes.elements import Elements, Expr, Position, handles

aten = torch.ops.aten
prims = torch.ops.prims


@handles(aten.full.default)
def _full(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    return ev.at(node.args[1], ())


@handles(aten.full_like.default)
def _full_like(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    return ev.at(node.args[1], ())


@handles(aten.scalar_tensor.default)
def _scalar_tensor(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    return ev.at(node.args[0], ())


@handles(aten.zeros.default, aten.zeros_like.default)
def _zeros(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    return ev.const(0.0 if node.meta["val"].is_floating_point() else 0)


@handles(aten.ones.default, aten.ones_like.default)
def _ones(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    return ev.const(1.0 if node.meta["val"].is_floating_point() else 1)


@handles(prims.iota.default)
def _iota(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    start, step = (ev.sizes.of(node.kwargs.get(name, default)) for name, default in (("start", 0), ("step", 1)))
    k = ev.i_add(start, ev.i_mul(idx[0], step))
    return k if isinstance(k, Expr) else ev.const(k)


def sorted_element(ev: Elements, sort: fx.Node, k: int, idx: Position) -> Expr | None:
    """sort(e) of one dimension: values[r] = e[perm[r]]; perm[inverse of perm at s] = s."""
    source = tensor_of(sort.args[0])
    if len(ev.shape(source)) != 1:
        return None
    perm = _permutation(ev, sort, idx[0])
    return ev.at(source, (ev.index(perm),)) if k == 0 else perm


def _permutation(ev: Elements, sort: fx.Node, r: Any) -> Expr:
    if isinstance(r, Expr) and r.op == "inverse" and r.args[0].args[0] is sort:
        return r.args[1]  # type: ignore[no-any-return]
    return ev.load(sort, (r,))


def _inverse(ev: Elements, perm: fx.Node, s: Any) -> Expr | None:
    """The position r with perm[r] = s, where perm holds a permutation made by a sort, perhaps repeated for every column."""
    shape = ev.shape(perm)
    return _place(ev, ev.indices.at(perm, (0,) * len(shape)), shape[0], s)


def _place(ev: Elements, first: Expr, rows: int, s: Any) -> Expr | None:
    """The position that has s in a sort's permutation of `rows` rows, which begins with `first`; None where it is none."""
    if first.op != "load" or not is_sort(first.args[0]) or first.args[1] != (0,):
        return None
    sort = first.args[0]
    if ev.shape(tensor_of(sort.args[0])) != (rows,):
        return None
    return ev.make("inverse", ev.load(sort, ()), s if isinstance(s, Expr) else ev.const(s))


def is_sort(node: fx.Node) -> bool:
    return node.target in (aten.sort.default, aten.sort.stable)


def _counts_up(ev: Elements, values: Any, like: fx.Node) -> bool:
    """Whether `values`, broadcast to the shape of the one-dimensional `like`, looks like 0, 1, 2, ..."""
    (size,) = ev.shape(like)
    return all(ev.operand(values, like, (r,)).const == r for r in (0, size // 2, size - 1))


@handles(aten.index_put.default, aten._unsafe_index_put.default)
def _index_put(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    """out[perm] = iota, perm a whole permutation: out is its inverse. out[perm] = rows: each is put back to where the sort had
    it from. Rows added up at perm // k: see `_sum_at`."""
    base, where, values = node.args[:3]
    if len(where) != 1:  # type: ignore[arg-type]
        return None
    if argument(node, 3, "accumulate", False):
        return _sum_at(ev, base, where[0], values, idx)  # type: ignore[index]
    perm: Any = where[0]  # type: ignore[index]
    return _overwritten(ev, perm, base, values, idx) if len(ev.shape(perm)) == 1 else None


def _overwritten(ev: Elements, perm: fx.Node, base: Any, values: Any, idx: Position) -> Expr | None:
    """The element at idx of `base`, all of whose rows are overwritten with `values` at `perm`."""
    if len(idx) == 1:
        return _inverse_of(ev, perm, base, values, idx)
    shape = ev.shape(tensor_of(base))
    if ev.shape(perm)[0] != shape[0] or ev.shape(tensor_of(values)) != shape:
        return None
    row = _inverse(ev, perm, idx[0])
    return None if row is None else ev.at(values, (row, *idx[1:]))


def _one_a_row(ev: Elements, node: fx.Node) -> bool:
    """Whether a scatter along the first dimension repeats a column of indices for all columns."""
    dim, where, values = node.args[1:4]
    rest = tuple(s - 1 for s in ev.shape(tensor_of(where))[1:])
    if dim != 0 or ev.shape(tensor_of(where)) != ev.shape(tensor_of(values)):
        return False
    return ev.indices.at(where, (0, *rest)) is ev.indices.at(where, (0, *(0 for _ in rest)))


@handles(aten.scatter_add.default)
def _scatter_add(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    """Rows added up at the places that a column of indices, repeated for all columns, says."""
    base, _, where, values = node.args[:4]
    return _sum_at(ev, base, where, values, idx) if _one_a_row(ev, node) else None


@handles(aten.index_add.default)
def _index_add(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    base, dim, where, values = node.args[:4]
    return _sum_at(ev, base, where, values, idx) if dim == 0 and node.kwargs.get("alpha", 1) == 1 else None


#: More rows than this for each place are not added up.
MAX_ADDED = 64


def _sum_at(ev: Elements, base: Any, where: Any, values: Any, idx: Position) -> Expr | None:
    """base[t] + sum of the rows values[r] with where[r] = t. where = perm // k, perm a permutation of k rows for each t: these
    are the positions that perm has k t, ..., k t + k - 1 at; where = perm % (number of t), they are those that it has t,
    t + number, ... at; or where is known, and each t comes in every n-th row, or n times
    in a row (that it comes nowhere else is for the proof)."""
    rows, places = ev.shape(tensor_of(where))[0], ev.shape(tensor_of(base))[0]
    if rows % places or not 1 <= rows // places <= MAX_ADDED or ev.shape(tensor_of(values))[1:] != ev.shape(base)[1:]:
        return None
    count = rows // places
    total = ev.indices.at(base, idx)
    total = ev.at(base, idx) if total.const is None else total
    known = _known_rows(ev, where, idx[0], count, places)
    if known is not None:
        for r in known:
            total = ev.make("add", total, ev.at(values, (r, *idx[1:])))
        return total
    probe = ev.indices.at(where, (0,) * len(ev.shape(where)))
    in_turns = probe.op == "mod"
    if count > 1 or in_turns:
        divided = probe.op in ("floordiv", "mod")
        if not divided or probe.args[1].const != (places if in_turns else count):
            return None
        probe = probe.args[0]
    for j in range(count):
        place = ev.i_add(idx[0], j * places) if in_turns else ev.i_add(ev.i_mul(idx[0], count), j)
        row = _place(ev, probe, rows, place)
        if row is None:
            return None
        total = ev.make("add", total, ev.at(values, (row, *idx[1:])))
    return total


def _known_rows(ev: Elements, where: Any, place: Any, count: int, places: int) -> list[int] | None:
    """The rows that go to a place, where that is written into the graph."""
    if not isinstance(place, int):
        return None
    rest = (0,) * (len(ev.shape(where)) - 1)
    for rows in ([place + j * places for j in range(count)], [place * count + j for j in range(count)]):
        if all(ev.indices.at(where, (r, *rest)).const == place for r in rows):
            return rows
    return None


@handles(aten.scatter.src)
def _scatter(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    """out[perm] = iota of one dimension, or rows at a column of indices, as above; any other scatter is a leaf."""
    base, _, perm, values = node.args[:4]
    rows = len(idx) == 1 or _one_a_row(ev, node)
    return _overwritten(ev, perm, base, values, idx) if rows else None  # type: ignore[arg-type]


#: More integers a row than this, scattered, make a leaf.
MAX_SCATTERED = 64


@handles(aten.scatter.value)
def _scatter_value(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    """A number where one of a row's integers is the last index: selects, one for each integer."""
    base, dim, where, number = node.args[:4]
    assert isinstance(base, fx.Node)
    assert isinstance(where, fx.Node)
    last = len(idx) - 1
    shape = ev.shape(where)
    if dim not in (-1, last) or shape[:-1] != ev.shape(base)[:-1] or shape[-1] > MAX_SCATTERED:
        return None
    value = ev.at(base, idx)
    place = idx[-1] if isinstance(idx[-1], Expr) else ev.const(idx[-1])
    for j in range(shape[-1]):
        value = ev.make("where", ev.make("eq", ev.at(where, (*idx[:-1], j)), place), ev.at(number, ()), value)
    return value


def _inverse_of(ev: Elements, perm: Any, base: Any, values: Any, idx: Position) -> Expr | None:
    """The element at idx of `base` overwritten with `values` at `perm`, where that makes perm's inverse."""
    if not isinstance(perm, fx.Node) or ev.shape(perm) != ev.shape(tensor_of(base)) or not _counts_up(ev, values, perm):
        return None
    return _inverse(ev, perm, idx[0])


@handles(aten.index.Tensor, aten._unsafe_index.Tensor)
def _index(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    source = tensor_of(node.args[0])
    picks: Any = node.args[1]
    where = [i for i, p in enumerate(picks) if p is not None]
    if not where or where != list(range(where[0], where[-1] + 1)):
        return None
    ranks = [len(ev.shape(picks[i])) for i in where]
    rank = max(ranks)
    first = where[0]
    at = idx[first : first + rank]
    shape = ev.shape(source)
    out = list(idx[:first])
    for i in where:
        pick = picks[i]
        if pick.meta["val"].dtype in (torch.bool, torch.uint8):
            return None
        own = ev.shape(pick)
        position = tuple(0 if s == 1 else at[rank - len(own) + j] for j, s in enumerate(own))
        k = ev.pick(pick, position)
        out.append(k % shape[i] if isinstance(k, int) else k)
    out.extend(idx[first + rank :])
    return ev.at(source, tuple(out))


@handles(aten.index_select.default)
def _index_select(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    d = int(node.args[1]) % len(idx)  # type: ignore[arg-type]
    k = ev.pick(tensor_of(node.args[2]), (idx[d],))
    return ev.at(node.args[0], idx[:d] + (k,) + idx[d + 1 :])


@handles(aten.gather.default)
def _gather(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    d = int(node.args[1]) % len(idx)  # type: ignore[arg-type]
    k = ev.pick(tensor_of(node.args[2]), idx)
    return ev.at(node.args[0], idx[:d] + (k,) + idx[d + 1 :])


@handles(aten.embedding.default)
def _embedding(ev: Elements, node: fx.Node, idx: Position) -> Expr:
    k = ev.pick(tensor_of(node.args[1]), idx[:-1])
    return ev.at(node.args[0], (k, idx[-1]))
