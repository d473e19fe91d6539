"""Experts whose rows are normed, one by one, before they are weighted and added up: the rows themselves are the result.

    y[r] = F_e(r)(x[r]),   out[t] = sum_j w[t, j] norm(y[t, j])

Each row counts as a token with one expert and the weight 1; norm, weights and sum stay outside.
"""

import operator
from typing import Any

import torch
from torch import fx

from braze.kernels.spec import MoeSpec
from braze.passes import products, rows, separate
from braze.passes.between import between
from braze.passes.chosen import Chosen, with_choice
from braze.passes.combine import Term, as_rows, check_private, inner
from braze.passes.elements import Elements
from braze.passes.products import NoExperts, Pair
from braze.passes.separate import called
from braze.passes.sites import MoeSite

aten = torch.ops.aten
_CAST = torch.ops.prims.convert_element_type.default
_LAYOUT = (aten.reshape.default, aten.view.default, aten.squeeze.dim, aten.squeeze.dims, aten.permute.default, _CAST)
#: What a site of sorted rows says; its ids are in order.
SORTED = "grouped rows, added up outside"


def site(pair: Pair, ev: Elements) -> MoeSite | None:
    """The site of a pair whose rows a norm takes; None where none does; NoExperts where the rows are no experts'."""
    if not _is_normed(pair.second):
        return None
    root = as_rows(pair.second, ev)
    number, hidden = ev.shape(root)[-2:]
    check_private(inner(pair.firsts, root), root)
    element = Elements(ev.sizes, stop=lambda n: n is pair.second, indices=ev).at(root, (number - 1, hidden - 1))
    if len(ev.shape(root)) != 2 or element.op != "load":
        raise NoExperts("what is normed are no rows of the second product")
    term = Term(element.args[1], 1.0, frozenset())
    w2 = rows.second_side(pair, term, ev)
    act = between(pair, term, ev.shape(w2.weight)[1 if w2.transposed else 2], lambda load: False, ev)
    x, weight = rows.input_of(pair, act.at, (number, hidden), ev)
    if weight is not None:
        raise NoExperts("rows are weighted as they are read, and normed after the experts")
    sorted_ = products.is_grouped(pair.second)
    source = _sorted_ids(pair.second) if sorted_ else rows.ids_of(pair, term, (number, 1), root, ev)[0]
    with root.graph.inserting_before(root):
        ids = source if source.meta["val"].ndim == 2 else separate.reshaped(source, [-1, 1])
        ones = called(_CAST, called(aten.ge.Scalar, ids, 0), root.meta["val"].dtype)
    if ids.target is aten.reshape.default:
        source = ids.args[0]  # type: ignore[assignment]
    w1, b1, down = separate.named(act.sides, act.biases, w2, root)
    x = separate.cast(x, pair.first.meta["val"].dtype, root)
    spec = MoeSpec(act.text, act.layout, act.side.transposed, "output", 1.0, root.meta["val"].dtype)
    form = SORTED if sorted_ else "batched rows, added up outside"
    found = MoeSite(root, x, ids, ones, w1, down, b1, None, ones, spec, form)
    return with_choice(found, Chosen(ids, ones, (source,)))


def _is_normed(product: fx.Node) -> bool:
    """Whether a mean of squares over the last dimension is taken of a product's rows."""
    stack, seen = [product], set()
    while stack:
        for user in stack.pop().users:
            if (user.target in _LAYOUT or _by_column(user)) and user not in seen:
                seen.add(user)
                stack.append(user)
            elif _is_square(user) and any(after.target is aten.mean.dim for after in user.users):
                return True
    return False


def _is_square(node: fx.Node) -> bool:
    if node.target is aten.pow.Tensor_Scalar:
        return bool(node.args[1] == 2)
    return node.target is aten.mul.Tensor and node.args[0] is node.args[1]


def _by_column(node: fx.Node) -> bool:
    """Whether rows are multiplied by a weight of their columns."""
    return node.target is aten.mul.Tensor and any(
        getattr(n.meta.get("val"), "ndim", 0) == 1 for n in node.all_input_nodes
    )


def _sorted_ids(product: fx.Node) -> fx.Node:
    """The sorted ids whose counts are a grouped product's blocks."""
    stack: list[Any] = [product.args[2]]
    while stack:
        node = stack.pop()
        if node.target in (aten.sort.default, aten.sort.stable):
            values = [n for n in node.users if n.target is operator.getitem and n.args[1] == 0]
            if values:
                return values[0]  # type: ignore[no-any-return]
        stack.extend(node.all_input_nodes)
    raise NoExperts("the blocks of the grouped rows are no counts of sorted ids")
