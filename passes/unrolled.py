"""Finds experts that a loop wrote one after the other: every expert on every token, masked, and added up.

    out[t] = sum_e g_e[t] F_e(x[t]),   g_e[t] = sum_j [ids[t, j] = e] w[t, j]

An element of the sum, expanded, names for each of its terms an expert's last product and the mask that chooses it; a select
between a sum and itself with one more term is such a mask too: where(c, a, b) = b + c (a - b). The proof then decides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from braze.kernels.expression import g as G
from braze.kernels.expression import u as U
from braze.kernels.spec import GateUpLayout, MoeSpec, WeightOn
from braze.passes import activation, separate
from braze.passes.between import linear_in
from braze.passes.chosen import is_top_k, sparse
from braze.passes.dense import slots_of
from braze.passes.elements import Elements, Expr, Position, Sizes, Unknown, leaves, trail
from braze.passes.linear import TooLarge
from braze.passes.masked import NoLoop, Term, behind, is_choice, masks, root_of
from braze.passes.products import NoExperts
from braze.passes.rows import count
from braze.passes.separate import is_plain
from braze.passes.sites import MoeSite, NearMiss, source_line

aten = torch.ops.aten

#: A loop over more experts than this is left as it is: finding it would cost more than the user is told of.
MAX_EXPERTS = 256


@dataclass(frozen=True)
class Expert:
    """One expert's products and what lies between: firsts in the order of g, u; meaning: equal for equal functions."""

    firsts: tuple[fx.Node, ...]
    columns: tuple[int, ...]
    element: Expr
    symbols: tuple[Expr, ...]
    meaning: object


def find(graph: fx.Graph, sizes: Sizes) -> tuple[list[MoeSite], list[NearMiss]]:
    """Every unrolled expert block of the graph, and every masked sum of experts that is none, with the reason."""
    sites: list[MoeSite] = []
    misses: list[NearMiss] = []
    if not any(map(is_choice, graph.nodes)):
        return sites, misses
    ev = Elements(sizes, stop=is_plain)
    downs = [n for n in graph.nodes if is_plain(n) and _firsts(n, 0, ev)]
    ways = list(dict.fromkeys(frozenset(behind({*downs, *chosen})) for chosen in masks(graph)))
    done: set[fx.Node] = set()
    for down in downs:
        if down in done:
            continue
        for inside in ways:
            found = root_of(down, inside, lambda d: separate.left(_firsts(d, 0, ev)[0].args[0]), ev)
            if found.root is not None:
                break
        done |= found.products
        try:
            if found.root is not None:
                sites.append(_site(found.root, found.terms, ev))
            elif len(found.products) > 1:
                raise NoLoop(f"the experts' outputs are not added up, each masked or weighted: {found.reason}")
        except (NoExperts, Unknown, TooLarge, separate.NotStored) as e:
            misses.append(
                NearMiss("moe", (found.root or down).name, "find", str(e), source_line([found.root or down, down]))
            )
    return sites, misses


# ---------------------------------------------------------------------------------------------------- the site


def _site(root: fx.Node, terms: Sequence[Term], ev: Elements) -> MoeSite:
    products = {t.expert: t.product for t in terms}
    if sorted(products) != list(range(len(products))):
        raise NoLoop(f"the loop's experts are {sorted(products)[:4]}..., not 0 up to their number")
    if len({t.product for t in terms}) != len(products):
        raise NoLoop("an expert's product is masked by two experts' numbers")
    if len(products) > MAX_EXPERTS:
        raise NoLoop(f"a loop over more than {MAX_EXPERTS} experts")
    scales = {t.scale for t in terms}
    if len(scales) != 1:
        raise NoLoop("rows are scaled by different constants")
    downs = [products[e] for e in range(len(products))]
    experts = [_expert(d, ev) for d in downs]
    text, layout = _activation(downs[0], experts[0], ev)
    for e in experts:
        if e.meaning != experts[0].meaning:
            raise NoLoop("the experts have different activations")
    if layout == "halves" and len(experts[0].firsts) == 1 and not _width_fits(downs[0], experts[0], 2, ev):
        raise NoLoop("the first product has columns that are not used")

    tokens = count(ev.shape(root)[:-1])
    x, weight_on = _input(experts, terms, ev)
    if ev.shape(x)[-1] != ev.shape(root)[-1]:
        raise NoLoop("the experts' input and output have different sizes")
    ups = [[separate.stored(f, ev) for f in e.firsts] for e in experts]
    lows = [[separate.stored(d, ev)] for d in downs]
    _check_private(root, experts, downs)
    scored = all(t.ids is None for t in terms)
    ids, weights = _scores(terms, root, ev) if scored else _routing(root, terms, tokens, ev)
    site_root = separate.flat(root, ev)
    stored_x = separate.rows_of(x, ev.shape(x)[-1], ev, site_root)
    w1, w2, transposed = separate.weights(ups, lows, site_root, ev)
    b1 = separate.biases(ups, bool(separate.lists(w1)), site_root, ev)
    b2 = separate.biases(lows, bool(separate.lists(w2)), site_root, ev)
    spec = MoeSpec(text, layout, transposed, weight_on, scales.pop(), root.meta["val"].dtype)
    site = MoeSite(site_root, stored_x, ids, weights, w1, w2, b1, b2, weights, spec, "unrolled")
    return sparse(site, ev) if scored else site


def _check_private(root: fx.Node, experts: Sequence[Expert], downs: Sequence[fx.Node]) -> None:
    """NoLoop where something between the products and the root is used elsewhere: it would be computed twice."""
    between: set[fx.Node] = {f for e in experts for f in e.firsts} | set(downs)
    inner: set[fx.Node] = {root}
    node, begin = root, min(between)
    while node is not begin:
        node = node.prev
        if any(u in inner for u in node.users):
            inner.add(node)
    for node in sorted(inner):
        if node in between or any(n in between for n in node.all_input_nodes):
            between.add(node)
            for user in node.users:
                if node is not root and user not in inner:
                    what = "saved for the backward pass or returned" if user.op == "output" else f"used by {user.name}"
                    raise NoLoop(f"the intermediate {node.name} is also {what}")


def _scores(terms: Sequence[Term], root: fx.Node, ev: Elements) -> tuple[fx.Node, fx.Node]:
    """The scores [tokens, experts] whose columns weight the terms, in place of ids and of weights."""
    scores = terms[0].weight.args[0]
    if any(t.weight.args[0] is not scores for t in terms):
        raise NoLoop("the experts' scores are columns of different tensors")
    flat = separate.rows_of(scores, ev.shape(scores)[-1], ev, root)
    return flat, flat


def _routing(root: fx.Node, terms: Sequence[Term], tokens: int, ev: Elements) -> tuple[fx.Node, fx.Node]:
    """(ids, weights), each [tokens, slots], from the terms' masks."""
    if any(t.ids is None for t in terms):
        raise NoLoop("only some experts are masked by ids")
    pairs = [(t.ids, t.weight) for t in terms if t.ids is not None]
    experts = len({t.expert for t in terms})
    slots = len(terms) // experts
    ids, weights = slots_of(pairs, tokens, slots, root, ev)
    if len(terms) != slots * experts:
        raise NoLoop("not every expert is masked by every slot of the ids")
    return ids, weights


# --------------------------------------------------------------------------------------------- between the products


def _firsts(down: fx.Node, i: int, ev: Elements) -> list[Expr]:
    """The elements of other products that inner index i of a product's rows depends on; none where there is anything
    that is not a product's element with a function of one row around it."""
    rows = separate.left(down)
    try:
        t = ev.shape(down)[0] - 1
        element = ev.at(rows, (t, i))
    except (Unknown, RecursionError):
        return []
    loads = leaves([element])
    if element.op == "load" or not 1 <= len(loads) <= 2 or not all(is_plain(e.args[0]) for e in loads):
        return []
    return loads if all(e.args[1][0] == t for e in loads) else []


def _expert(down: fx.Node, ev: Elements) -> Expert:
    loads = sorted(_firsts(down, 0, ev), key=lambda e: (e.args[0], e.args[1]))
    if not loads:
        raise NoLoop("an expert's last product is not fed by a scalar function of others")
    element = ev.at(separate.left(down), (ev.shape(down)[0] - 1, 0))
    if len({e.args[0] for e in loads}) == 2 and linear_in(element, loads[0]):
        loads = loads[::-1]  # the gate is what passes through the function
    numbers = {e: i for i, e in enumerate(loads)}
    meaning = (_meaning(element, numbers, {}), tuple(e.args[1][1] for e in loads), ev.shape(down))
    firsts = tuple(dict.fromkeys(e.args[0] for e in loads))
    return Expert(firsts, tuple(e.args[1][1] for e in loads), element, tuple(loads), meaning)


def _meaning(expr: Expr, numbers: dict[Expr, int], memo: dict[Expr, Any]) -> Any:
    """An expression with its loads numbered, to compare those of two experts by."""
    if expr in numbers:
        return numbers[expr]
    if expr.op == "const":
        return ("const", expr.args[0])
    if expr not in memo:
        memo[expr] = (expr.op, *(_meaning(a, numbers, memo) for a in expr.args))
    return memo[expr]


def _activation(down: fx.Node, expert: Expert, ev: Elements) -> tuple[str, GateUpLayout]:
    try:
        text = activation.text(expert.element, dict(zip(expert.symbols, (G, U), strict=False)))
    except activation.NotScalar as e:
        raise NoLoop(str(e)) from None
    inner = ev.shape(separate.left(down))[1]
    if len(expert.symbols) == 1:
        layout: GateUpLayout = "none"
        fits = expert.columns == (0,)
    elif len(expert.firsts) == 2:
        layout, fits = "halves", expert.columns == (0, 0)
    else:
        layout = "interleaved" if expert.columns == (0, 1) and inner > 1 else "halves"
        fits = expert.columns == ((0, 1) if layout == "interleaved" else (0, inner))
    if not fits:
        raise NoLoop(f"gate and up are columns {expert.columns} of the first product: neither halves nor interleaved")
    return text, layout


def _width_fits(down: fx.Node, expert: Expert, gates: int, ev: Elements) -> bool:
    return ev.shape(expert.firsts[0])[1] == gates * ev.shape(separate.left(down))[1]


def _input(experts: Sequence[Expert], terms: Sequence[Term], ev: Elements) -> tuple[fx.Node, WeightOn]:
    """The tensor [.., hidden] whose rows all experts read, the farthest one that views lead to; whether they are weighted."""
    operands = [separate.left(f) for e in experts for f in e.firsts]
    starts = [(rows, (rows, (ev.shape(rows)[0] - 1, 0))) for rows in operands]
    weighted = [t for t in terms if t.x is not None]
    if weighted:
        if len(weighted) != len(terms) or len(set(operands)) != len(experts):
            raise NoLoop("only some of the experts' inputs are weighted")
        if not all(t.ids is not None and is_top_k(t.ids.args[0]) for t in terms):
            raise NoLoop("experts whose input is weighted are not chosen by a top-k: one may be chosen twice")
        starts = [(operands[0], t.x.args) for t in weighted if t.x is not None]
    shared: list[fx.Node] | None = None
    for rows, start in starts:
        own = [n for n, idx in trail(*start, ev) if _holds_rows(n, idx, rows, ev)]
        shared = own if shared is None else [n for n in shared if n in own]
    if not shared:
        raise NoLoop("the experts do not read one tensor [tokens, hidden]")
    return shared[0], "input" if weighted else "output"


def _holds_rows(node: fx.Node, idx: Position, rows: fx.Node, ev: Elements) -> bool:
    shape = ev.shape(node)
    tokens, hidden = ev.shape(rows)
    return (
        shape[-1] == hidden
        and idx == (*(s - 1 for s in shape[:-1]), 0)
        and count(shape[:-1]) == tokens
        and node.meta["val"].dtype == rows.meta["val"].dtype
    )
