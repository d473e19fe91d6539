"""Where a token's rows are added up: an element of the output as a sum of the second product's rows, each with its weight.

    out[t] = sum_r w[t, r] y[r]

The sum is a reduction, a chain of additions, or a product with the weights (the end of an einsum), which is written out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from braze.passes.elements import MAX_SUM, Elements, Expr, Position, leaves, trail
from braze.passes.linear import polynomial
from braze.passes.products import NoExperts, Pair, column

aten = torch.ops.aten
_CAST = torch.ops.prims.convert_element_type.default
_VIEWS = (
    aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.permute.default, aten.clone.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.unsqueeze.default,
)  # fmt: skip


@dataclass
class Term:
    """One expert row of an output element: the second product's element and what it is multiplied by. start, step: which of the
    second product's inner indices are the row's."""

    idx: Position
    constant: float
    atoms: frozenset[Expr]
    biases: list[Expr] = field(default_factory=list)
    start: int = 0
    step: int = 1


# ------------------------------------------------------------------------------------------------ the output


def root_of(pair: Pair, left: bool, ev: Elements) -> fx.Node:
    """Where the rows of a token have been added up: the first sum after the second product, with casts and a constant factor
    after it; without a sum, the last matrix of one row a token."""
    node = last = pair.second
    returned = False
    while len(users := [n for n in node.users if n.op == "call_function"]) == 1:
        returned |= len(node.users) > 1  # where a sum comes after, that is an intermediate's other use
        node = users[0]
        if not isinstance(node.meta.get("val"), torch.Tensor):
            break
        if node.target is aten.sum.dim_IntList or adds_rows(node):
            return output_of(node, ev)
        if node.target is aten.bmm.default and _combines(node, pair, left, ev):
            return output_of(node, ev)
        if node.meta["val"].ndim == 2 and not returned:
            last = node
    return last


def adds_rows(node: fx.Node) -> bool:
    """Whether rows are added up at the places that indices say."""
    puts = (aten.index_put.default, aten._unsafe_index_put.default)
    return node.target in (aten.scatter_add.default, aten.index_add.default) or (
        node.target in puts and node.args[3:] == (True,)
    )


def _combines(node: fx.Node, pair: Pair, left: bool, ev: Elements) -> bool:
    """Whether a batched product after the second one sums over rows, not over columns."""
    for side in (0, 1):
        found = []
        for j in (0, 1 if ev.shape(node.args[0])[2] > 1 else 0):  # type: ignore[arg-type]
            operand, at = node.args[side], ((0, 0, j), (0, j, 0))[side]
            assert isinstance(operand, fx.Node)
            element = Elements(ev.sizes, stop=lambda n: n is pair.second, indices=ev).at(operand, at)
            found += [e.args[1] for e in leaves([element]) if e.args[0] is pair.second]
        if found:
            return len({column(pair.second, idx, left) for idx in found}) == 1
    return False


def output_of(node: fx.Node, ev: Elements) -> fx.Node:
    """A sum of rows as a matrix, with casts and a constant factor after it."""
    return _with_tail(as_rows(node, ev))


def as_rows(node: fx.Node, ev: Elements) -> fx.Node:
    """The first matrix that views make of a sum; where there is none, the last tensor with one row a token."""
    hidden = max(ev.shape(node)[-2:])
    found = node
    while True:
        shape = ev.shape(node)
        if shape[-1] == hidden:
            found = node
        if len(shape) == 2 or len(node.users) != 1:
            return found
        node = next(iter(node.users))
        if node.target not in _VIEWS:
            return found


def _with_tail(root: fx.Node) -> fx.Node:
    while len(root.users) == 1:
        after = next(iter(root.users))
        cast = after.target is _CAST and after.meta["val"].is_floating_point()
        scaled = after.target in (aten.mul.Tensor, aten.mul.Scalar) and isinstance(after.args[1], int | float)
        if not cast and not scaled:
            break
        root = after
    return root


def inner(starts: fx.Node | Sequence[fx.Node], root: fx.Node) -> set[fx.Node]:
    """The nodes on the ways from `starts` to root, these included."""
    found = {starts} if isinstance(starts, fx.Node) else set(starts)
    begin = min(found)
    behind: set[fx.Node] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if node in behind or node < begin:
            continue
        behind.add(node)
        stack.extend(node.all_input_nodes)
    for node in sorted(behind):
        if any(s in found for s in node.all_input_nodes):
            found.add(node)
    return found


def check_private(nodes: set[fx.Node], root: fx.Node) -> None:
    """NoExperts where a node between is used outside: it would be computed twice."""
    for node in sorted(nodes):
        for user in node.users:
            if node is not root and user not in nodes:
                what = "saved for the backward pass or returned" if user.op == "output" else f"used by {user.name}"
                raise NoExperts(f"the intermediate {node.name} is also {what}")


# ------------------------------------------------------------------------------------------------- the terms


def terms_of(pair: Pair, root: fx.Node, at: Position, ev: Elements) -> list[Term]:
    """The rows that make up the element root[at], biases beside the row whose weights they share."""
    chain = inner(pair.second, root)
    outside = Elements(
        ev.sizes,
        stop=lambda n: n is pair.second or n not in chain,
        indices=ev,
        also={aten.bmm.default: written_out},
    )
    return split(present(outside.at(root, at), ev), pair, chain, at[-1], ev)


def split(expr: Expr, pair: Pair, chain: set[fx.Node], last: int, ev: Elements) -> list[Term]:
    """The rows in an expression over the second product's elements and over elements from outside of `chain`, for the last
    column."""
    terms: dict[Position, Term] = {}
    biases: list[tuple[float, frozenset[Expr], Expr]] = []
    for atoms, constant in polynomial(expr).items():
        rows = [a for a in atoms if a.op == "load" and a.args[0] is pair.second]
        rest = [a for a in atoms if a not in rows]
        if len(rows) == 1:
            if rows[0].args[1] in terms:
                raise NoExperts("a row is added up twice")
            terms[rows[0].args[1]] = Term(rows[0].args[1], constant, frozenset(rest))
            continue
        added = [a for a in rest if a.op == "load" and a.args[0] not in chain and _is_bias(a, last, ev)]
        if rows or len(added) != 1:
            raise NoExperts("the output is not linear in the second product's rows")
        biases.append((constant, frozenset(a for a in rest if a is not added[0]), added[0]))
    for constant, factors, bias in biases:
        owners = [t for t in terms.values() if (t.constant, t.atoms) == (constant, factors)]
        if not owners:
            raise NoExperts("something is added to the rows that is not weighted as they are")
        owners[0].biases.append(bias)  # where several have equal factors, the expert tells whose it is, later
    if not terms:
        raise NoExperts("the output does not depend on the second product")
    return list(terms.values())


def written_out(ev: Elements, node: fx.Node, idx: Position) -> Expr | None:
    """An element of a batched product as the sum that it is, where that is short."""
    b, m, n = idx
    left, right = node.args
    assert isinstance(left, fx.Node)
    size = ev.shape(left)[2]
    if size > MAX_SUM:
        return None
    total = ev.const(0)
    for j in range(size):
        total = ev.make("add", total, ev.make("mul", ev.at(left, (b, m, j)), ev.at(right, (b, j, n))))
    return total


def present(expr: Expr, ev: Elements) -> Expr:
    """An element for rows whose expert is here: a mask of ids past the last expert is False. For such ids the op adds nothing,
    and the proof gives the block some where it has a mask."""
    memo: dict[Expr, Expr] = {}

    def go(e: Expr) -> Expr:
        if e.op in ("const", "load"):
            return e
        if e not in memo:
            if e.op == "where" and masks_absent(e.args[0], ev):
                memo[e] = go(e.args[2])
            elif e.op == "where" and _is_of_an_expert(e.args[0], ev):
                memo[e] = go(e.args[1])
            else:
                args = [go(a) for a in e.args]
                memo[e] = e if all(a is b for a, b in zip(args, e.args, strict=True)) else ev.make(e.op, *args)
        return memo[e]

    return go(expr)


def masks_absent(condition: Expr, ev: Elements) -> bool:
    """Whether a condition is `expert id >= a number`: true only for rows of experts that are elsewhere."""
    if condition.op == "load":
        condition = ev.at(*condition.args)
    if condition.op != "ge" or condition.args[1].const is None:
        return False
    return condition.args[0].op == "load" and not condition.args[0].args[0].meta["val"].is_floating_point()


def _is_of_an_expert(condition: Expr, ev: Elements) -> bool:
    """Whether a condition is `place < where the last expert's rows end`, of a place in sorted order."""
    if condition.op == "load":
        condition = ev.at(*condition.args)
    if condition.op != "lt" or condition.args[0].op != "inverse" or condition.args[1].op != "load":
        return False
    node, idx = condition.args[1].args
    return node.target is aten.cumsum.default and idx == (ev.shape(node)[0] - 1,)


def _is_bias(atom: Expr, last: int, ev: Elements) -> bool:
    """Whether an added element comes from the last column of a bias [experts, hidden]."""
    return any(
        len(idx) == 2 and idx[1] == last and ev.shape(node)[1] == last + 1
        for node, idx in trail(atom.args[0], atom.args[1], ev)
    )


def one_atom(term: Term) -> Expr | None:
    """The element that weights a row; None where the row is not weighted."""
    if len(term.atoms) > 1:
        names = ", ".join(sorted(str(a) for a in term.atoms))
        raise NoExperts(f"a row is multiplied by several tensors ({names[:120]})")
    atom = next(iter(term.atoms), None)
    if atom is not None and atom.op != "load":
        raise NoExperts(f"a row's weight is a {atom.op}, no tensor's element")
    return atom


def scale_of(terms: list[Term]) -> float:
    """The constant that all rows are multiplied by."""
    constants = {t.constant for t in terms}
    if len(constants) != 1:
        raise NoExperts("rows are scaled by different constants")
    return constants.pop()
