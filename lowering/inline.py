"""Opens calls of semantic ops up into what they are composed of, in the dialect that Inductor lowers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx


def inline(call: fx.Node, compose: Callable[..., Any], decompositions: Mapping[Any, Callable[..., Any]]) -> None:
    """Replaces `call` by `compose` of the same arguments, traced into ATen nodes and decomposed."""
    inputs = call.all_input_nodes
    place = {n: i for i, n in enumerate(inputs)}

    def body(*tensors: Any) -> Any:
        return (compose(*fx.node.map_arg(call.args, lambda n: tensors[place[n]]), **call.kwargs),)

    inline_all([call], inputs, body, decompositions)


def inline_all(
    calls: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    body: Callable[..., Any],
    decompositions: Mapping[Any, Callable[..., Any]],
) -> None:
    """Replaces `calls` by the results of `body(*inputs)`, one for each, at the place of the last call in the graph.

    No user of an earlier call may come before the last one.
    """
    values = [n.meta["val"] for n in inputs]
    mode = next(v.fake_mode for v in values if isinstance(v, FakeTensor))
    with mode, torch.no_grad():
        traced = make_fx(body, decomposition_table=dict(decompositions), tracing_mode="real")(*values)
    traced.graph.eliminate_dead_code()
    last = calls[-1]
    new: dict[fx.Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    for node in traced.graph.nodes:
        if node.op == "output":
            for call, result in zip(calls, node.args[0], strict=True):
                call.replace_all_uses_with(new[result])
        elif node.op != "placeholder":
            with last.graph.inserting_before(last):
                new[node] = copy = last.graph.node_copy(node, lambda n: new[n])
            copy.meta = {**last.meta, "val": node.meta.get("val")}
            copy.meta.pop("eager_input_vals", None)  # are those of the call, not of this node
    for call in reversed(calls):
        call.graph.erase_node(call)
