"""Gives each semantic op its kernel: left whole for a registered lowering or kernel, or opened up into what it consists of."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from braze.kernels import aten, separate
from braze.kernels.spec import MoeSpec, RouteSpec
from braze.kernels.triton import mlp as triton_mlp
from braze.kernels.triton import moe as triton_moe
from braze.kernels.triton import route as triton_route
from braze.kernels.triton.weights import Weights
from braze.lowering import cpp_call, cpp_rope, gate, inductor, places, rope_loops, rotations, shared, vendor
from braze.lowering.choose import choose_apart, choose_mlp, choose_moe, choose_rope, choose_route, choose_separate
from braze.lowering.inline import inline, inline_all
from braze.lowering.rotations import Turn


def register() -> None:
    """Tells Inductor how to lower the semantic ops that stay in a graph, and launches, once; the ops must have been defined."""
    inductor.launches_that_overlap()
    inductor.descriptors_of_views()
    inductor.register(torch.ops.braze.rope.default, rope_loops.lower)
    inductor.register(torch.ops.braze.rope_into.default, cpp_rope.lower)
    inductor.register(torch.ops.braze.gate_into.default, gate.lower)
    inductor.register(torch.ops.braze.moe.default, cpp_call.lower_moe)
    inductor.register(torch.ops.braze.moe_separate.default, cpp_call.lower_separate)
    inductor.register(torch.ops.braze.moe_apart.default, inductor.whole(torch.ops.braze.moe_apart.default))
    inductor.register(torch.ops.braze.mlp.default, cpp_call.lower_mlp)


def lower(calls: Sequence[fx.Node], forced: Mapping[str, str]) -> list[tuple[str, str]]:
    """(kernel, why) for each semantic op's call, after making the graph use it."""
    register()
    turns: list[Turn] = []
    choices: list[tuple[str, str]] = []
    place: dict[Turn, int] = {}
    joins = shared.find(calls, forced)
    for call in calls:
        if call.target.name() == "braze::rope":  # type: ignore[union-attr]
            kernel, why, turn = _choose_rope(call, forced.get("rope", "auto"))
            if turn is not None:
                turns.append(turn)
                place[turn] = len(choices)
            norm = rotations.norm_before(call) if turn is None else None
            if norm is not None:
                rotations.open_norm(norm)
            by_vendor = vendor.composed("rope", kernel)
            if by_vendor is not None:
                inline(call, by_vendor, inductor.decompositions())
        elif call.target.name() == "braze::route":  # type: ignore[union-attr]
            kernel, why = vendor.choose(call, "router", forced.get("router", "auto"), choose_route)
            why += _apply_route(call, kernel)
        elif call.target.name() == "braze::moe_separate":  # type: ignore[union-attr]
            kernel, why = choose_separate(call)
        elif call.target.name() == "braze::mlp" and call in joins:  # type: ignore[union-attr]
            kernel, why = "triton", "in the two launches of the experts that it is added to, each weight read once"
        elif call.target.name() == "braze::mlp":  # type: ignore[union-attr]
            kernel, why = choose_mlp(call, forced.get("mlp", "auto"))
            if kernel != "cpp":
                launch = partial(_launch_mlp, overlap=_overlaps(call.args[2]))
                inline(call, launch if kernel == "triton" else _compose_mlp, inductor.decompositions())
        elif call.target.name() == "braze::moe_apart":  # type: ignore[union-attr]
            kernel, why = choose_apart(call)
            _apply_apart(call, kernel, joins.get(call))
        else:
            kernel, why = vendor.choose(call, "moe", forced.get("moe", "auto"), choose_moe)
            _apply_moe(call, kernel, joins.get(call))
        choices.append((kernel, f"{why}; its shared experts too" if call in joins and kernel == "triton" else why))
    graph = turns[0].call.graph if turns else None
    for group in rotations.pairs(turns):
        words = rotations.launch(group)
        for turn in group if words else ():
            kernel, why = choices[place[turn]]
            choices[place[turn]] = kernel, f"{why}; {words}"
    if graph is not None:
        graph.eliminate_dead_code()  # tables that were made again for k, norms, what was written into a cache
    return choices


def _choose_rope(call: fx.Node, forced: str) -> tuple[str, str, Turn | None]:
    """(kernel, why, the call as braze's own kernel takes it, where that is the choice)."""
    found: list[Turn | None] = [None]

    def own(call: fx.Node, forced: str) -> tuple[str, str]:
        kernel, why, found[0] = choose_rope(call, forced)
        return kernel, why

    kernel, why = vendor.choose(call, "rope", forced, own)
    return kernel, why, found[0]


def _apply_moe(call: fx.Node, kernel: str, join: shared.Join | None) -> None:
    by_vendor = vendor.composed("moe", kernel)
    if by_vendor is not None:
        inline(call, by_vendor, inductor.decompositions())
    elif kernel == "aten":
        inline(call, _compose_moe, inductor.decompositions())
    elif kernel == "triton" and join is not None:
        shared.fuse(join, _overlaps(call.args[4], join.mlp.args[2]))
    elif kernel == "triton" and _sized(call):
        inline(call, partial(_launch_moe, overlap=_overlaps(call.args[4])), inductor.decompositions())


def _apply_apart(call: fx.Node, kernel: str, join: shared.Join | None) -> None:
    if kernel != "triton":
        inline(call, _compose_apart if kernel == "aten" else _as_separate, inductor.decompositions())
    elif join is not None:
        shared.fuse(join, _overlaps(call.args[5], join.mlp.args[2]))
    elif _sized(call):
        inline(call, partial(_launch_apart, overlap=_overlaps(call.args[5])), inductor.decompositions())


def _overlaps(*down: Any) -> bool:
    """Whether a call's launches may overlap. down: weights of the second product, which reads them before the first has ended:
    they must be there before the graph runs, since whatever lies between the two launches may still be writing."""
    there = all(places.base(w).op in ("placeholder", "get_attr") for w in down)
    return there and inductor.overlaps_launches(down[0].meta["val"].device)


def _sized(call: fx.Node) -> bool:
    """Whether the number of tokens is known, by which tiles are chosen: then the launches become a part of the graph."""
    return all(isinstance(s, int) for s in call.meta["val"].shape)


def _apply_route(call: fx.Node, kernel: str) -> str:
    """What more there is to say of the choice."""
    by_vendor = vendor.composed("router", kernel)
    if by_vendor is not None:
        _inline_results(call, by_vendor)
    elif kernel == "aten":
        _inline_results(call, _compose_route)
    else:
        product = gate.behind(call)
        if kernel == "triton":
            narrow = product is None and gate.as_stored(call)
            if product is not None:
                gate.launch(product)
            _inline_results(call, _launch_route)
            return "; the product before it reads 16 bits, no widened copies" if narrow else ""
        if product is not None:
            gate.fuse(call, product)
    return ""


def _inline_results(call: fx.Node, compose: Callable[..., tuple[Tensor, ...]]) -> None:
    """Opens up a call of several results: those that are used take the place of the nodes that pick them."""
    inputs, picks = call.all_input_nodes, sorted(call.users)
    place = {n: i for i, n in enumerate(inputs)}

    def body(*tensors: Tensor) -> tuple[Tensor, ...]:
        results = compose(*fx.node.map_arg(call.args, lambda n: tensors[place[n]]), **call.kwargs)
        return tuple(results[pick.args[1]] for pick in picks)  # type: ignore[index]

    inline_all(picks, inputs, body, inductor.decompositions())
    call.graph.erase_node(call)


def _compose_route(logits, bias=None, **attributes):  # type: ignore[no-untyped-def]
    return aten.route(logits, bias, RouteSpec(**attributes))


def _launch_route(logits, bias=None, **attributes) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    overlap = inductor.overlaps_launches(logits.device)
    return triton_route.launch(logits, bias, RouteSpec(**attributes), inductor.start, overlap)


def _compose_moe(x, ids, weights, w1, w2, b1=None, b2=None, **attributes):  # type: ignore[no-untyped-def]
    return aten.moe(x, ids, weights, w1, w2, b1, b2, MoeSpec(**attributes))


def _compose_apart(x, ids, weights, gate, up, w2, b_gate, b_up, b2, **attributes):  # type: ignore[no-untyped-def]
    return aten.moe_apart(x, ids, weights, gate, up, w2, b_gate, b_up, b2, MoeSpec(**attributes))


def _compose_mlp(x, w1, w2, b1, b2, **attributes) -> Tensor:  # type: ignore[no-untyped-def]
    return separate.mlp(x, w1, w2, b1, b2, MoeSpec(**attributes))


def _launch_mlp(x, w1, w2, b1, b2, overlap=False, **attributes) -> Tensor:  # type: ignore[no-untyped-def]
    return triton_mlp.launch(x, w1, w2, b1, b2, MoeSpec(**attributes), start=inductor.start, overlap=overlap)


def _as_separate(x, ids, weights, gate, up, w2, b_gate, b_up, b2, **attributes):  # type: ignore[no-untyped-def]
    lists = separate.lists(gate, up, w2, b_gate, b_up, b2)
    return torch.ops.braze.moe_separate(x, ids, weights, *lists, **attributes)


def _launch_apart(x, ids, weights, gate, up, w2, b_gate, b_up, b2, overlap=False, **attributes) -> Tensor:  # type: ignore[no-untyped-def]
    first, b1 = Weights(gate, up), separate.joined(b_gate, b_up)
    return triton_moe.launch(
        x, ids, weights, first, w2, b1, b2, MoeSpec(**attributes), start=inductor.start, overlap=overlap
    )


def _launch_moe(x, ids, weights, w1, w2, b1=None, b2=None, overlap=False, **attributes) -> Tensor:  # type: ignore[no-untyped-def]
    return triton_moe.launch(
        x, ids, weights, w1, w2, b1, b2, MoeSpec(**attributes), start=inductor.start, overlap=overlap
    )
