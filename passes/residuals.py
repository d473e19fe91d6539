"""A sum of masked experts that starts from something else, the residual or shared experts' results, is their sum first:

    ((base + g_0 F_0) + g_1 F_1) + ...  =  base + ((g_0 F_0 + g_1 F_1) + ...)

What no site took is added up again as it was.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from braze.passes.elements import HANDLERS
from braze.passes.masked import TOTAL, is_choice
from braze.passes.separate import is_plain

aten = torch.ops.aten

#: A mask and a product are found within so many nodes before a term, or it is none.
MAX_NODES = 64


@dataclass(frozen=True)
class Apart:
    """total = base + last, the sum of terms of which `second` adds up the first two; before, it added to base + term."""

    term: fx.Node
    second: fx.Node
    last: fx.Node
    total: fx.Node


def take_apart(graph: fx.Graph) -> list[Apart]:
    """Takes what a sum of masked experts starts from out of each that starts from something else."""
    if not any(map(is_choice, graph.nodes)):
        return []
    done: set[fx.Node] = set()
    out = []
    for node in [n for n in graph.nodes if _is_sum(n)]:
        terms = [] if node in done else [n for n in node.all_input_nodes if _is_term(n)]
        if not terms:
            continue
        run = [node]
        while (after := _next(run[-1])) is not None:
            run.append(after)
        done.update(run)
        if len(run) > 1 and len(terms) == 1:  # two terms start from nothing else
            (base,) = [n for n in node.all_input_nodes if n is not terms[0]]
            out.append(_apart(run, base, terms[0]))
    return out


def put_together(apart: Sequence[Apart]) -> None:
    """Puts it back where the sum is still there as it was."""
    for a in apart:
        gone = any(n._erased for n in (a.term, a.second, a.last, a.total))
        if gone or not a.total.users or a.total.args[1] is not a.last:
            continue
        with a.total.graph.inserting_before(a.second):
            first = a.total.graph.call_function(aten.add.Tensor, (a.total.args[0], a.term))
        first.meta = dict(a.second.meta)
        a.second.replace_input_with(a.term, first)
        a.total.replace_all_uses_with(a.last)
        a.total.graph.erase_node(a.total)


def _is_sum(node: fx.Node) -> bool:
    """Whether a node adds two floating tensors that are like it."""
    if node.target is not aten.add.Tensor or node.kwargs or len(node.all_input_nodes) != 2:
        return False
    values = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
    if not all(isinstance(v, torch.Tensor) and v.is_floating_point() for v in values):  # a number may be a symbol
        return False
    return len({(str(tuple(v.shape)), v.dtype) for v in values}) == 1  # type: ignore[union-attr]


def _next(node: fx.Node) -> fx.Node | None:
    """The sum that adds one more term to a sum, which nothing else uses."""
    after = next(iter(node.users)) if len(node.users) == 1 else None
    if after is None or not _is_sum(after):
        return None
    (term,) = [n for n in after.all_input_nodes if n is not node]
    return after if _is_term(term) else None


def _is_term(node: fx.Node) -> bool:
    """Whether a node is an expert's result with its mask, as far as what is close before it tells."""
    if len(node.users) != 1 or _is_sum(node):
        return False
    seen, queue = {node}, [node]
    product = choice = False
    while queue and len(seen) < MAX_NODES and not (product and choice):
        n = queue.pop(0)
        product |= is_plain(n)
        choice |= is_choice(n)
        for i in n.all_input_nodes if n is node or (n.target in HANDLERS and not is_plain(n)) else ():
            if i not in seen:
                seen.add(i)
                queue.append(i)
    return product and choice


def _apart(run: Sequence[fx.Node], base: fx.Node, term: fx.Node) -> Apart:
    first, second, last = run[0], run[1], run[-1]
    with first.graph.inserting_after(last):
        total = first.graph.call_function(aten.add.Tensor, (base, last))
    total.meta = {**last.meta, TOTAL: True}
    last.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    second.replace_input_with(first, term)
    first.graph.erase_node(first)
    return Apart(term, second, last, total)
