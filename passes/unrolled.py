"""Finds experts that a loop wrote one after the other: every expert on every token, masked, and added up.

    out[t] = sum_e g_e[t] F_e(x[t]),   g_e[t] = sum_j [ids[t, j] = e] w[t, j]

An element of the sum, expanded, names for each of its terms an expert's last product and the mask that chooses it; a select
between a sum and itself with one more term is such a mask too: where(c, a, b) = b + c (a - b). The proof then decides.
"""

from collections.abc import Sequence

import torch
from torch import fx

from braze.kernels.spec import MoeSpec, WeightOn
from braze.passes import separate
from braze.passes.chosen import is_top_k, sparse
from braze.passes.dense import slots_of
from braze.passes.elements import Elements, Sizes, Unknown
from braze.passes.linear import TooLarge
from braze.passes.masked import NoLoop, Term, behind, is_choice, masks, root_of
from braze.passes.products import NoExperts
from braze.passes.rows import count
from braze.passes.separate import is_plain
from braze.passes.sites import MoeSite, NearMiss, source_line
from braze.passes.written import Expert, activation_of, check_private, expert_of, firsts, last_row, read_by

aten = torch.ops.aten

#: A loop over more experts than this is left as it is: finding it would cost more than the user is told of.
MAX_EXPERTS = 256


def find(graph: fx.Graph, sizes: Sizes) -> tuple[list[MoeSite], list[NearMiss]]:
    """Every unrolled expert block of the graph, and every masked sum of experts that is none, with the reason."""
    sites: list[MoeSite] = []
    misses: list[tuple[NearMiss, set[fx.Node]]] = []
    if not any(map(is_choice, graph.nodes)):
        return [], []
    ev = Elements(sizes, stop=is_plain)
    downs = [n for n in graph.nodes if is_plain(n) and firsts(n, 0, ev)]
    ways = list(dict.fromkeys(frozenset(behind({*downs, *chosen})) for chosen in masks(graph)))
    done: set[fx.Node] = set()
    for down in downs:
        if down in done:
            continue
        for inside in ways:
            found = root_of(down, inside, lambda d: separate.left(firsts(d, 0, ev)[0].args[0]), ev)
            if found.root is not None:
                break
        done |= found.products
        try:
            if found.root is not None:
                sites.append(_site(found.root, found.terms, ev))
            elif len(found.products) > 1:
                raise NoLoop(f"the experts' outputs are not added up, each masked or weighted: {found.reason}")
        except (NoExperts, Unknown, TooLarge, separate.NotStored) as e:
            at = found.root or down
            misses.append((NearMiss("moe", at.name, "find", str(e), source_line([at, down])), found.products))
    return sites, [miss for miss, products in misses if not any(products < others for _, others in misses)]


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
    experts = [expert_of(d, ev) for d in downs]
    text, layout = activation_of(downs[0], experts[0], ev)
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
    check_private(root, experts, downs)
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


def _scores(terms: Sequence[Term], root: fx.Node, ev: Elements) -> tuple[fx.Node, fx.Node]:
    """The scores [tokens, experts] whose columns weight the terms, in place of ids and of weights."""
    scores = terms[0].weight.args[0]
    if any(t.weight.args[0] is not scores for t in terms):
        raise NoLoop("the experts' scores are columns of different tensors")
    if ev.shape(scores)[-1] != len({t.expert for t in terms}):  # the others may be all that was chosen
        raise NoLoop("there are scores of more experts than the loop has")
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


def _width_fits(down: fx.Node, expert: Expert, gates: int, ev: Elements) -> bool:
    return ev.shape(expert.firsts[0])[1] == gates * ev.shape(separate.left(down))[1]


def _input(experts: Sequence[Expert], terms: Sequence[Term], ev: Elements) -> tuple[fx.Node, WeightOn]:
    """The tensor [.., hidden] whose rows all experts read, the farthest one that views lead to; whether they are weighted."""
    operands = [separate.left(f) for e in experts for f in e.firsts]
    starts = [(rows, last_row(rows, ev)) for rows in operands]
    weighted = [t for t in terms if t.x is not None]
    if weighted:
        if len(weighted) != len(terms) or len(set(operands)) != len(experts):
            raise NoLoop("only some of the experts' inputs are weighted")
        if not all(t.ids is not None and is_top_k(t.ids.args[0]) for t in terms):
            raise NoLoop("experts whose input is weighted are not chosen by a top-k: one may be chosen twice")
        starts = [(operands[0], t.x.args) for t in weighted if t.x is not None]
    return read_by(starts, ev), "input" if weighted else "output"
