"""Finds expert blocks by following rows: from a pair of expert products to where each token's rows are added up.

    out[t] = scale * sum_j wo_j (act(wi_j x[t] W1[e_j] + b1[e_j]) W2[e_j] + b2[e_j]),   e_j = ids[t, j]

Anchored at two products with a scalar function between, an output element is a sum of elements of the second product times
weights; each names its row, the row its expert and its token. Sorted and grouped, gathered and batched, or dense over all
experts, the dispatch is only a way to say the same rows. The proof (braze.passes.proof) then decides.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from braze.kernels.expression import g as G
from braze.kernels.expression import u as U
from braze.kernels.spec import GateUpLayout, MoeSpec, WeightOn
from braze.passes import activation, products, unrolled
from braze.passes.dense import sparse_scores
from braze.passes.elements import Elements, Expr, Position, Sizes, Unknown, leaves, trail
from braze.passes.linear import TooLarge, polynomial
from braze.passes.sites import MoeSite, NearMiss, source_line

aten = torch.ops.aten
_CAST = torch.ops.prims.convert_element_type.default


class NoExperts(Exception):
    """Why a pair of products is no expert block."""


@dataclass(frozen=True)
class Pair:
    """Two expert products, the second fed by a scalar function of the first. rows_left: of a batched product, whether its
    first operand holds the rows (its second the weights)."""

    first: fx.Node
    second: fx.Node
    first_left: bool
    second_left: bool


@dataclass
class Term:
    """One expert row of an output element: the second product's element and what it is multiplied by."""

    idx: Position
    constant: float
    atoms: frozenset[Expr]
    biases: list[Expr] = field(default_factory=list)


def find(graph: fx.Graph, sizes: Sizes) -> tuple[list[MoeSite], list[NearMiss]]:
    """Every expert block of the graph, and every pair of expert products that is none, with the reason."""
    sites: list[MoeSite] = []
    misses: list[NearMiss] = []
    seconds: set[fx.Node] = set()
    ev = Elements(sizes)
    for node in graph.nodes:
        if not products.is_product(node):
            continue
        pair = _pair(node, ev)
        if pair is None or pair.first in seconds:  # a block after a block, joined by the residual stream
            continue
        seconds.add(pair.second)
        try:
            sites.append(_site(pair, ev))
        except (NoExperts, Unknown, TooLarge) as e:
            if _looks_like_experts(pair, ev):
                misses.append(NearMiss("moe", node.name, "find", str(e), source_line([node])))
    loops, loop_misses = unrolled.find(graph, sizes)
    return sites + loops, misses + loop_misses


def _pair(second: fx.Node, ev: Elements) -> Pair | None:
    for left in (True,) if products.is_grouped(second) else (True, False):
        start = (0,) * len(ev.shape(second))
        try:
            element = ev.at(*products.input_element(second, start, 0, left))
        except (Unknown, RecursionError):
            continue
        loads = leaves([element])
        firsts = {e.args[0] for e in loads if products.is_product(e.args[0])}
        if len(firsts) == 1:
            first = firsts.pop()
            if not products.is_grouped(first) and any(e.args[0] > first for e in loads):
                continue  # attention: a softmax between two products
            if products.is_grouped(first) == products.is_grouped(second):
                first_left = left if products.is_grouped(first) else _rows_left(first, ev)
                return Pair(first, second, first_left, left)
    return None


def _looks_like_experts(pair: Pair, ev: Elements) -> bool:
    """Whether a pair of products is worth a word: any two batched products with a scalar function between are a pair."""
    if products.is_grouped(pair.second):
        return True
    side = products.weight_side(pair.second, (0, 0, 0), pair.second_left, ev)
    return side is not None and side.weight.op in ("placeholder", "get_attr")


def _rows_left(product: fx.Node, ev: Elements) -> bool:
    """Which operand of a batched product holds the rows: the other one's is picked by expert ids, or is a parameter."""
    start = (0,) * len(ev.shape(product))
    sides = {left: products.weight_side(product, start, left, ev) for left in (True, False)}
    for left, side in sides.items():
        if side is not None and isinstance(side.expert, Expr):
            return left
    right = sides[False]
    return right is None or right.weight.op not in ("placeholder", "get_attr")


def _site(pair: Pair, ev: Elements) -> MoeSite:
    root = _root(pair.second)
    chain = _inner(pair.second, root)
    _check_private(_inner(pair.first, root), root)
    shape = ev.shape(root)
    if len(shape) != 2:
        raise NoExperts(f"the combined output has shape {shape}, not [tokens, hidden]")
    tokens, hidden = shape
    t = tokens - 1
    terms = list(_terms(pair, root, chain, (t, hidden - 1), ev).values())
    if not terms:
        raise NoExperts("the output does not depend on the second product")
    experts = [_expert(pair, term, ev) for term in terms]
    up = products.weight_side(pair.second, terms[0].idx, pair.second_left, ev)
    if up is None:
        raise NoExperts("the second product's weights are no [experts, ., .] tensor, indexed plainly")
    w2, w2_transposed = up.weight, up.transposed
    act = _activation(pair, terms[0], experts[0], ev)
    side = products.weight_side(pair.first, act.idx, pair.first_left, ev)
    if side is None:
        raise NoExperts("the first product's weights are no [experts, ., .] tensor, indexed plainly")

    if all(isinstance(e, int) for e in experts):
        slots, dispatch = len(experts), "dense"
        if experts != list(range(ev.shape(w2)[0])):
            raise NoExperts(f"an output adds up experts {experts[:4]}..., not each one once")
    else:
        slots, dispatch = len(terms), "grouped" if products.is_grouped(pair.second) else "batched"
    ids, slot = (None, experts[0]) if dispatch == "dense" else _ids(pair, terms[0], t, (tokens, slots), root, ev)
    x, input_weight = _input(pair, act.idx, (t, 0), (tokens, hidden), ev)
    output_weights = [_one_atom(term) for term in terms]
    weight_on: WeightOn = "input" if input_weight is not None else "output"
    if input_weight is not None:
        if any(a is not None for a in output_weights):
            raise NoExperts("rows are weighted both before and after the experts")
        source = input_weight
    else:
        first = output_weights[0]
        if first is None:
            raise NoExperts("rows are not weighted by the router")
        source = (first.args[0], first.args[1])
    weights = _matrix(source, (t, slot), (tokens, slots), ev)
    if weights is None:
        raise NoExperts(f"the rows' weight {source[0].name} is no [tokens, slots] tensor")
    b2 = _second_bias(terms, experts, w2, ev)
    if side.transposed != w2_transposed:
        raise NoExperts("the two weights are stored in different orders")  # mended by a view where one is needed
    values = weights
    if ids is None:
        ids, values, weights = _sparse(weights, root, ev)
    scale = _scale(terms)
    masked = any(n.target is aten.where.self for n in chain)
    spec = MoeSpec(act.text, act.layout, side.transposed, weight_on, scale, root.meta["val"].dtype)
    return MoeSite(root, x, ids, weights, side.weight, w2, act.bias, b2, values, spec, dispatch, masked)


# ------------------------------------------------------------------------------------------------ the output


def _root(second: fx.Node) -> fx.Node:
    """Where the rows of a token have been added up: the first sum after the second product, with casts and a constant factor
    after it; without a sum, the last matrix of one row a token."""
    node = second
    last = second
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
            break
        if node.target is aten.sum.dim_IntList:
            return _with_tail(node)
        if node.meta["val"].ndim == 2:
            last = node
    return last


def _with_tail(root: fx.Node) -> fx.Node:
    while len(root.users) == 1:
        after = next(iter(root.users))
        cast = after.target is _CAST and after.meta["val"].is_floating_point()
        scaled = after.target in (aten.mul.Tensor, aten.mul.Scalar) and isinstance(after.args[1], int | float)
        if not cast and not scaled:
            break
        root = after
    return root


def _inner(start: fx.Node, root: fx.Node) -> set[fx.Node]:
    """The nodes on the ways from start to root, both included."""
    behind: set[fx.Node] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if node in behind or node < start:
            continue
        behind.add(node)
        stack.extend(node.all_input_nodes)
    inner = {start}
    for node in sorted(behind):
        if any(s in inner for s in node.all_input_nodes):
            inner.add(node)
    return inner


def _check_private(inner: set[fx.Node], root: fx.Node) -> None:
    for node in sorted(inner):
        for user in node.users:
            if node is not root and user not in inner:
                what = "saved for the backward pass or returned" if user.op == "output" else f"used by {user.name}"
                raise NoExperts(f"the intermediate {node.name} is also {what}")


def _terms(pair: Pair, root: fx.Node, chain: set[fx.Node], at: Position, ev: Elements) -> dict[Position, Term]:
    """The rows that make up the element root[at], biases beside the row whose weights they share."""
    down = Elements(ev.sizes, stop=lambda n: n is pair.second or n not in chain, indices=ev)
    terms: dict[Position, Term] = {}
    biases: list[tuple[float, frozenset[Expr], Expr]] = []
    for atoms, constant in polynomial(_present(down.at(root, at), ev)).items():
        rows = [a for a in atoms if a.op == "load" and a.args[0] is pair.second]
        rest = [a for a in atoms if a not in rows]
        if len(rows) == 1:
            terms[rows[0].args[1]] = Term(rows[0].args[1], constant, frozenset(rest))
            continue
        added = [a for a in rest if a.op == "load" and _is_bias(a, at[1], ev)]
        if rows or len(added) != 1:
            raise NoExperts("the output is not linear in the second product's rows")
        biases.append((constant, frozenset(a for a in rest if a is not added[0]), added[0]))
    for constant, factors, bias in biases:
        owners = [t for t in terms.values() if (t.constant, t.atoms) == (constant, factors)]
        if not owners:
            raise NoExperts("something is added to the rows that is not weighted as they are")
        # Terms with equal factors are told apart by the expert, when the biases are read.
        owners[min(len(o.biases) for o in owners) and 0].biases.append(bias)
    return terms


def _present(expr: Expr, ev: Elements) -> Expr:
    """An element for rows whose expert is here: a mask of ids past the last expert is False. For such ids the op adds nothing,
    and the proof gives the block some where it has a mask."""
    memo: dict[Expr, Expr] = {}

    def go(e: Expr) -> Expr:
        if e.op in ("const", "load"):
            return e
        if e not in memo:
            if e.op == "where" and masks_absent(e.args[0], ev):
                memo[e] = go(e.args[2])
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


def _is_bias(atom: Expr, column: int, ev: Elements) -> bool:
    """Whether an added element comes from the last column of a bias [experts, hidden]."""
    return any(
        len(idx) == 2 and idx[1] == column and ev.shape(node)[1] == column + 1
        for node, idx in trail(atom.args[0], atom.args[1], ev)
    )


def _one_atom(term: Term) -> Expr | None:
    if len(term.atoms) > 1:
        names = ", ".join(sorted(str(a) for a in term.atoms))
        raise NoExperts(f"a row is multiplied by several tensors ({names[:120]})")
    atom = next(iter(term.atoms), None)
    if atom is not None and atom.op != "load":
        raise NoExperts(f"a row's weight is a {atom.op}, no tensor's element")
    return atom


def _scale(terms: list[Term]) -> float:
    constants = {t.constant for t in terms}
    if len(constants) != 1:
        raise NoExperts("rows are scaled by different constants")
    return constants.pop()


# -------------------------------------------------------------------------------------------- rows and experts


def _expert(pair: Pair, term: Term, ev: Elements) -> Any:
    """The expert of a row: an int, or the element of the ids that names it."""
    if not products.is_grouped(pair.second):
        side = products.weight_side(pair.second, term.idx, pair.second_left, ev)
        if side is None:
            raise NoExperts("the second product's weights are no [experts, ., .] tensor, indexed plainly")
        return side.expert
    sort = products.sort_of_rows(term.idx[0])
    if sort is None:
        raise NoExperts("the grouped rows are not put back by the inverse of their sort")
    return ev.at(sort.args[0], (term.idx[0].args[1].const,))


def _ids(pair: Pair, term: Term, t: int, shape: tuple[int, int], root: fx.Node, ev: Elements) -> tuple[fx.Node, int]:
    """(ids [tokens, slots], slot) that name a row's expert; a flat list of ids gets a view before root."""
    sort = products.sort_of_rows(term.idx[0]) if products.is_grouped(pair.second) else None
    source: tuple[Any, Position]
    if sort is not None:
        source = (sort.args[0], (term.idx[0].args[1].const,))
    else:
        start = products.weight_element(pair.second, term.idx, 0, pair.second_left)
        picks = [(n.args[1][0], idx[:1]) for n, idx in trail(*start, ev) if n.target is aten.index.Tensor]  # type: ignore[index,union-attr]
        if not picks:
            raise NoExperts("the experts' weights are not picked by ids")
        source = picks[-1]
    for node, idx in trail(*source, ev):
        if len(idx) == 2 and idx[0] == t and ev.shape(node) == shape:
            return node, int(idx[1])
    node, idx = source
    if (
        len(idx) == 1
        and isinstance(idx[0], int)
        and ev.shape(node) == (shape[0] * shape[1],)
        and idx[0] // shape[1] == t
    ):
        with root.graph.inserting_before(root):
            view = root.graph.call_function(aten.reshape.default, (node, [-1, shape[1]]))
        view.meta["val"] = node.meta["val"].reshape(-1, shape[1])
        return view, idx[0] % shape[1]
    raise NoExperts(f"the rows' experts {node.name} are no [tokens, slots] = {shape} tensor of ids")


def _matrix(source: tuple[fx.Node, Position], at: Position, shape: tuple[int, ...], ev: Elements) -> fx.Node | None:
    """The node nearest to `source` that is a matrix of `shape` whose element `at` it is."""
    for node, idx in trail(*source, ev):
        if idx == at and ev.shape(node) == shape:
            return node
    return None


def _input(
    pair: Pair, idx: Position, at: Position, shape: tuple[int, int], ev: Elements
) -> tuple[fx.Node, tuple[fx.Node, Position] | None]:
    """(x, the weight on it if there is one) behind the rows of the first product."""
    start = products.input_element(pair.first, idx, 0, pair.first_left)
    if shape[1] != products.inner_size(pair.first, ev, pair.first_left):
        raise NoExperts("the experts' input and output have different sizes")
    x = _matrix(start, at, shape, ev)
    if x is not None:
        return x, None
    node, end = list(trail(*start, ev))[-1]
    if (
        node.target is aten.where.self
        and isinstance(node.args[2], fx.Node)
        and masks_absent(ev.operand(node.args[0], node, end), ev)
    ):
        start = (node.args[2], _broadcast(node.args[2], end, ev))
        x = _matrix(start, at, shape, ev)
        if x is not None:
            return x, None
    if node.target is aten.mul.Tensor:
        for a, b in (node.args[:2], node.args[1::-1]):
            if isinstance(a, fx.Node) and isinstance(b, fx.Node):
                x = _matrix((a, _broadcast(a, end, ev)), at, shape, ev)
                if x is not None:
                    return x, (b, _broadcast(b, end, ev))
    raise NoExperts(f"the first product's rows come from {node.name}, no [tokens, hidden] tensor")


def _broadcast(node: fx.Node, idx: Position, ev: Elements) -> Position:
    shape = ev.shape(node)
    offset = len(idx) - len(shape)
    return tuple(0 if s == 1 else idx[offset + i] for i, s in enumerate(shape))


# ------------------------------------------------------------------------------------------- between the products


@dataclass(frozen=True)
class Between:
    """The scalar function between the products; idx: the first product's element that g stands for."""

    text: str
    layout: GateUpLayout
    bias: fx.Node | None
    idx: Position


def _activation(pair: Pair, term: Term, expert: Any, ev: Elements) -> Between:
    size = products.inner_size(pair.second, ev, pair.second_left)
    found = [_activation_at(pair, term, i, ev) for i in range(min(2, size))]
    columns = [f[0] for f in found]
    layout = _layout(columns, size, ev.shape(pair.first), pair)
    texts = [f[2] for f in found]
    if len(set(texts)) != 1:
        raise NoExperts(f"the activation differs between columns: {texts[0]} and {texts[-1]}")
    return Between(texts[0], layout, found[0][3], found[0][1])


def _layout(columns: list[tuple[int, ...]], size: int, shape: tuple[int, ...], pair: Pair) -> GateUpLayout:
    choices: dict[GateUpLayout, list[tuple[int, ...]]] = {
        "halves": [(i, i + size) for i in range(len(columns))],
        "interleaved": [(2 * i, 2 * i + 1) for i in range(len(columns))],
        "none": [(i,) for i in range(len(columns))],
    }
    for layout, expected in choices.items():
        if columns == expected:
            width = shape[-1] if pair.first_left or products.is_grouped(pair.first) else shape[1]
            if width != size * len(columns[0]):
                raise NoExperts(f"the first product has {width} columns for an inner size of {size}")
            return layout
    raise NoExperts(f"gate and up are columns {columns} of the first product: neither halves nor interleaved")


def _activation_at(
    pair: Pair, term: Term, i: int, ev: Elements
) -> tuple[tuple[int, ...], Position, str, fx.Node | None]:
    """(columns, first product's index, text, bias) of the activation at inner index i."""
    element = _present(ev.at(*products.input_element(pair.second, term.idx, i, pair.second_left)), ev)
    loads = [e for e in leaves([element]) if e.args[0] is pair.first]
    by_column = {products.column(pair.first, e.args[1], pair.first_left): e for e in loads}
    if not all(isinstance(c, int) for c in by_column):
        raise NoExperts("an element between the products is picked by an index that is not known")
    columns = tuple(sorted(by_column))
    if not 1 <= len(columns) <= 2 or len(loads) != len(columns):
        raise NoExperts(f"an element between the products depends on {len(loads)} elements of the first")
    symbols: dict[Expr, Any] = {}
    biases: set[fx.Node] = set()
    for column, symbol in zip(columns, (G, U), strict=False):
        summed = _with_bias(element, by_column[column], column)
        symbols[summed or by_column[column]] = symbol
        if summed is not None:
            biases.update(a.args[0] for a in summed.args if a is not by_column[column])
    try:
        text = activation.text(element, symbols)
    except activation.NotScalar as e:
        raise NoExperts(str(e)) from None
    if len(biases) > 1:
        raise NoExperts("gate and up have biases of different tensors")
    bias = next(iter(biases), None)
    return columns, by_column[columns[0]].args[1], text, bias


def _with_bias(element: Expr, load: Expr, column: int) -> Expr | None:
    """The sum of a first product's element and its bias, where the element occurs only in that sum."""
    users = [e for e in _subexpressions(element) if load in e.args]
    if len(users) == 1 and users[0].op == "add":
        (other,) = [a for a in users[0].args if a is not load] or [load]
        if other.op == "load" and len(other.args[1]) == 2 and other.args[1][1] == column:
            return users[0]
    return None


def _subexpressions(expr: Expr) -> Iterator[Expr]:
    seen: set[Expr] = set()
    stack = [expr]
    while stack:
        e = stack.pop()
        if e in seen or e.op in ("const", "load"):
            continue
        seen.add(e)
        yield e
        stack.extend(e.args)


def _second_bias(terms: list[Term], experts: list[Any], w2: fx.Node, ev: Elements) -> fx.Node | None:
    added = [b for t in terms for b in t.biases]
    if not added:
        return None
    if len(added) != len(terms):
        raise NoExperts("only some of the rows have a bias")
    for node, idx in trail(added[0].args[0], added[0].args[1], ev):
        if (
            len(idx) == 2
            and (idx[0] in experts or _unclamped(idx[0]) in experts)
            and ev.shape(node)[0] == ev.shape(w2)[0]
        ):
            return node
    raise NoExperts(f"what is added to a row, {added[0]}, is no bias [experts, hidden]")


def _unclamped(expert: Any) -> Any:
    """An expert id without the clamp that keeps absent experts' ids within bounds."""
    return expert.args[0] if isinstance(expert, Expr) and expert.op == "min" else expert


def _sparse(scores: fx.Node, root: fx.Node, ev: Elements) -> tuple[fx.Node, fx.Node, fx.Node]:
    found = sparse_scores(scores, root, ev)
    if found is None:
        raise NoExperts(f"the dense weights {scores.name} do not come from a top-k that was scattered")
    return found
