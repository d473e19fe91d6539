"""Captured graphs with one thing changed: a number, an op, an operand; or with a step left out or put in.

Such a graph is no model's, and may be no expert block and no rotation any more; whatever it is, fusing must not change it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from tests.harness import compiled_by

aten = torch.ops.aten
RINGS: tuple[tuple[Any, ...], ...] = (
    (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.maximum.default, aten.minimum.default),
    (aten.sigmoid.default, aten.tanh.default, aten.relu.default, aten.exp.default, aten.neg.default),
    (aten.sin.default, aten.cos.default),
    (aten.eq.Tensor, aten.ne.Tensor),
    (aten.lt.Scalar, aten.le.Scalar, aten.gt.Scalar, aten.ge.Scalar, aten.eq.Scalar, aten.ne.Scalar),
    (aten.amax.default, aten.sum.dim_IntList, aten.mean.dim, aten.amin.default),
    (aten.rsqrt.default, aten.sqrt.default, aten.reciprocal.default),
)
STEPS: tuple[tuple[Any, ...], ...] = (
    (aten.neg.default,), (aten.mul.Tensor, 1.5), (aten.mul.Tensor, 1.003), (aten.add.Tensor, 0.3), (aten.add.Tensor, 1e-3),
    (aten.clamp.default, -0.2, 0.2), (aten.clamp.default, -40.0, 40.0), (aten.relu.default,), (aten.tanh.default,),
)  # fmt: skip


def grab(model: Callable[..., Any], *inputs: Any, **settings: Any) -> tuple[fx.GraphModule, list[Any]]:
    """The last graph of one call of `model` as the passes see it, and what it was called with."""
    found: list[tuple[fx.GraphModule, list[Any]]] = []

    backend = compiled_by(lambda gm: None, lambda gm, args: found.append((gm, list(args))))
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        torch.compile(model, backend=backend)(*inputs, **settings)
    return found[-1]


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    graph, names = fx.Graph(), {}
    graph.output(graph.graph_copy(gm.graph, names))
    for old, new in names.items():
        new.meta = dict(old.meta)
    graph.output_node().meta = dict(gm.graph.output_node().meta)
    return fx.GraphModule(gm, graph)


def mutant(gm: fx.GraphModule, names: frozenset[str], rng: Random) -> tuple[fx.GraphModule, str] | None:
    """A copy with one of the nodes `names` changed, and how, in words; None where what was tried makes no graph."""
    new = copied(gm)
    node = rng.choice([n for n in new.graph.nodes if n.name in names and n.op == "call_function" and n.users])
    change = rng.choice((_number, _number, _target, _operand, _order, _without, _step, _step))
    try:
        words = change(node, rng)
        if words is None:
            return None
        new.graph.lint()
        new.graph.eliminate_dead_code()
        new.recompile()
        _propagate(new)
    except Exception:  # shapes, dtypes, dimensions that no longer fit
        return None
    return new, f"{node.name} ({node.target}): {words}"


def _propagate(gm: fx.GraphModule) -> None:
    """Fake values of every node anew."""

    class Values(FakeTensorProp):  # type: ignore[misc]
        def run_node(self, n: fx.Node) -> Any:
            n.meta["val"] = fx.Interpreter.run_node(self, n)
            return n.meta["val"]

    values = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
    mode = next(v.fake_mode for v in values if isinstance(v, Tensor))
    with mode:
        fx.Interpreter.run(Values(gm, mode), *values)


def _number(node: fx.Node, rng: Random) -> str | None:
    places = list(_numbers(node.args, ()))
    if not places:
        return None
    place, old = rng.choice(places)
    if isinstance(old, bool):
        new: Any = not old
    else:
        new = (
            old + rng.choice((1, -1, 2)) if isinstance(old, int) else rng.choice((old * 1.1, old + 0.5, -old, 2 * old))
        )
    node.args = _replaced(node.args, place, new)
    return f"{old} becomes {new}"


def _numbers(value: Any, place: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Any]]:
    if isinstance(value, list | tuple):
        for i, v in enumerate(value):
            yield from _numbers(v, (*place, i))
    elif isinstance(value, bool | int | float):
        yield place, value


def _replaced(value: Any, place: tuple[int, ...], new: Any) -> Any:
    if not place:
        return new
    parts = list(value)
    parts[place[0]] = _replaced(parts[place[0]], place[1:], new)
    return type(value)(parts) if isinstance(value, tuple) else parts


def _target(node: fx.Node, rng: Random) -> str | None:
    others = [op for ring in RINGS if node.target in ring for op in ring if op is not node.target]
    if not others:
        return None
    node.target = rng.choice(others)
    return f"becomes {node.target}"


def _alike(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta.get("val"), b.meta.get("val")
    return isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape and x.dtype == y.dtype


def _operand(node: fx.Node, rng: Random) -> str | None:
    """Another tensor of the same shape and dtype."""
    old = rng.choice(node.all_input_nodes) if node.all_input_nodes else None
    others = [n for n in node.graph.nodes if old is not None and n is not old and n < node and _alike(n, old)]
    others = [n for n in others if n.target is not aten.empty.memory_format]  # nobody knows what it holds
    if old is None or not others:
        return None
    new = rng.choice(others[-12:])
    node.replace_input_with(old, new)
    return f"reads {new.name}, not {old.name}"


def _order(node: fx.Node, rng: Random) -> str | None:
    first, *rest = node.args
    if isinstance(first, list | tuple) and len(first) > 1:
        node.args = (list(reversed(first)), *rest)
    elif rest and isinstance(first, fx.Node) and isinstance(rest[0], fx.Node):
        node.args = (rest[0], first, *rest[1:])
    else:
        return None
    return "operands in the other order"


def _without(node: fx.Node, rng: Random) -> str | None:
    like = [n for n in node.all_input_nodes if _alike(n, node)]
    if not like:
        return None
    node.replace_all_uses_with(like[0])
    return f"left out: {like[0].name} in its place"


def _step(node: fx.Node, rng: Random) -> str | None:
    if not isinstance(node.meta["val"], Tensor) or not node.meta["val"].is_floating_point():
        return None
    users = list(node.users)
    target, *rest = rng.choice(STEPS)
    with node.graph.inserting_after(node):
        new = node.graph.call_function(target, (node, *rest))
    for user in rng.choice((users, users[:1])):
        user.replace_input_with(node, new)
    return f"{target} {rest} after it"
