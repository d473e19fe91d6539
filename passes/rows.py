"""Whose rows the expert products' are: the expert, the token and the router's weight of each, as tensors of the graph.

A row's index, followed through a sort and its inverse (perm[inverse(s)] = s), a gather or a dense layout, leads to an
element of ids [.., slots], of the tokens [.., hidden] and of the weights [.., slots].
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from braze.passes import products, separate
from braze.passes.combine import Term, masks_absent
from braze.passes.elements import Elements, Expr, Position, trail
from braze.passes.products import NoExperts, Pair

aten = torch.ops.aten

Source = tuple[fx.Node, Position]


def count(shape: tuple[int, ...]) -> int:
    """How many elements a shape has."""
    out = 1
    for s in shape:
        out *= s
    return out


def matrices(source: Source, shape: tuple[int, int], ev: Elements) -> Iterator[Source]:
    """The nodes behind an element, nearest first, that are tensors [.., shape[1]] of shape[0] rows and have the element in
    their last row; each with the element's position."""
    for node, idx in trail(*source, ev):
        own = ev.shape(node)
        if len(own) < 2 or own[-1] != shape[1] or count(own[:-1]) != shape[0]:
            continue
        if idx[:-1] == tuple(s - 1 for s in own[:-1]):
            yield node, idx


def matrix(source: Source, last: int, shape: tuple[int, int], ev: Elements) -> fx.Node | None:
    """The nearest of `matrices` that has the element in column `last`, one of two dimensions if there is one."""
    found = [n for n, idx in matrices(source, shape, ev) if idx[-1] == last]
    return next((n for n in found if len(ev.shape(n)) == 2), found[0] if found else None)


def expert_of(pair: Pair, term: Term, ev: Elements) -> Any:
    """The expert of a row: an int, or the element of the ids that names it."""
    if not products.is_grouped(pair.second):
        return second_side(pair, term, ev).expert
    sort = products.sort_of_rows(term.idx[0])
    if sort is None:
        raise NoExperts("the grouped rows are not put back by the inverse of their sort")
    return ev.at(sort.args[0], (term.idx[0].args[1].const,))


def second_side(pair: Pair, term: Term, ev: Elements) -> products.Side:
    """The weights of the second product's row; NoExperts where there are none."""
    side = products.weight_side(pair.second, term.idx, pair.second_left, ev, term.start, term.step)
    if side is None:
        raise NoExperts("the second product's weights are no [experts, ., .] tensor, indexed plainly")
    if isinstance(side.expert, Expr):
        return side
    seen = products.weight_side(pair.second, term.idx, pair.second_left, ev, term.start, term.step, cast=True)
    if seen is not None and isinstance(seen.expert, Expr):
        raise NoExperts(
            "the weights are cast after they are picked, as autocast does: kernels read them where they lie"
        )
    return side


def ids_of(pair: Pair, term: Term, shape: tuple[int, int], root: fx.Node, ev: Elements) -> tuple[fx.Node, int]:
    """(ids [tokens, slots], slot) that name a row's expert; other ids get a view before root."""
    sort = products.sort_of_rows(term.idx[0]) if products.is_grouped(pair.second) else None
    if sort is not None:
        source: Source = (sort.args[0], (term.idx[0].args[1].const,))  # type: ignore[assignment]
    else:
        start = products.weight_element(pair.second, term.idx, term.start, pair.second_left)
        picks = [p for n, idx in trail(*start, ev) if (p := _pick(n, idx, ev)) is not None]
        if not picks:
            raise NoExperts("the experts' weights are not picked by ids")
        source = picks[-1]
    found = list(matrices(source, shape, ev))
    if found:
        flat = [f for f in found if len(f[1]) == 2]
        node, idx = (flat or found)[-1]  # the farthest: ids may be flattened more than once
        return separate.rows_of(node, shape[1], ev, root), int(idx[-1])
    node, idx = source
    t = shape[0] - 1
    if len(idx) == 1 and isinstance(idx[0], int) and ev.shape(node) == (count(shape),) and idx[0] // shape[1] == t:
        with root.graph.inserting_before(root):
            return separate.reshaped(node, [-1, shape[1]]), idx[0] % shape[1]
    raise NoExperts(f"the rows' experts {node.name} are no [tokens, slots] = {shape} tensor of ids")


def _pick(node: fx.Node, idx: Position, ev: Elements) -> Source | None:
    """The element of the ids by which a gather along its first dimension picks the element at idx."""
    ids: Any
    if node.target in (aten.index.Tensor, aten._unsafe_index.Tensor):
        ids = node.args[1][0]  # type: ignore[index]
    elif node.target is aten.index_select.default:
        ids = node.args[2] if node.args[1] == 0 else None
    else:
        ids = node.args[1] if node.target is aten.embedding.default else None
    if not isinstance(ids, fx.Node):
        return None
    return ids, tuple(0 if s == 1 else k for k, s in zip(idx, ev.shape(ids), strict=False))


def input_of(
    pair: Pair, at: Sequence[Position], shape: tuple[int, int], ev: Elements, weighted: bool = False
) -> tuple[fx.Node, Source | None]:
    """(x, the element of the weight on it if there is one) behind the rows of the first products. at: an element of each.

    weighted: x times its weight is not taken for x, which it may be where a token has one row.
    """
    firsts = list(zip(pair.firsts, at, strict=True))
    found = {_input_of(f, pair.first_left, idx, shape, ev, weighted) for f, idx in firsts}
    if len(found) == 1:
        return found.pop()
    starts = [products.input_element(f, idx, 0, pair.first_left) for f, idx in firsts]
    nodes = [[n for n, idx in matrices(s, shape, ev) if idx[-1] == 0] for s in starts]
    both = [n for n in nodes[0] if all(n in others for others in nodes)]  # casts of one tensor, for instance
    if not both:
        raise NoExperts("gate and up are products of different rows")
    return both[0], None


def _input_of(
    first: fx.Node, left: bool, idx: Position, shape: tuple[int, int], ev: Elements, weighted: bool
) -> tuple[fx.Node, Source | None]:
    start = products.input_element(first, idx, 0, left)
    if shape[1] != products.inner_size(first, ev, left):
        raise NoExperts("the experts' input and output have different sizes")
    x = matrix(start, 0, shape, ev)
    if x is not None and not weighted:
        return x, None
    node, end = list(trail(*start, ev))[-1]
    if (
        node.target is aten.where.self
        and isinstance(node.args[2], fx.Node)
        and masks_absent(ev.operand(node.args[0], node, end), ev)
    ):
        x = matrix((node.args[2], _broadcast(node.args[2], end, ev)), 0, shape, ev)
        if x is not None:
            return x, None
    if node.target is aten.mul.Tensor:
        for a, b in (node.args[:2], node.args[1::-1]):
            if isinstance(a, fx.Node) and isinstance(b, fx.Node):
                x = matrix((a, _broadcast(a, end, ev)), 0, shape, ev)
                if x is not None:
                    return x, (b, _broadcast(b, end, ev))
    raise NoExperts(f"the first product's rows come from {node.name}, no [tokens, hidden] tensor")


def _broadcast(node: fx.Node, idx: Position, ev: Elements) -> Position:
    shape = ev.shape(node)
    offset = len(idx) - len(shape)
    return tuple(0 if s == 1 else idx[offset + i] for i, s in enumerate(shape))


def second_bias(terms: list[Term], experts: list[Any], number: int, ev: Elements) -> fx.Node | None:
    """The bias [number of experts, hidden] that is added to the rows; None where none is."""
    added = [b for t in terms for b in t.biases]
    if not added:
        return None
    if len(added) != len(terms):
        raise NoExperts("only some of the rows have a bias")
    for node, idx in trail(added[0].args[0], added[0].args[1], ev):
        if len(idx) == 2 and (idx[0] in experts or _unclamped(idx[0]) in experts) and ev.shape(node)[0] == number:
            return node
    raise NoExperts(f"what is added to a row, {added[0]}, is no bias [experts, hidden]")


def _unclamped(expert: Any) -> Any:
    """An expert id without the clamp that keeps absent experts' ids within bounds."""
    return expert.args[0] if isinstance(expert, Expr) and expert.op == "min" else expert
