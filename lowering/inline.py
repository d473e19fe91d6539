"""Opens a semantic op's call up into the ATen ops it is composed of, in the dialect that Inductor lowers."""

from collections.abc import Callable, Mapping
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
        return compose(*fx.node.map_arg(call.args, lambda n: tensors[place[n]]), **call.kwargs)

    values = [n.meta["val"] for n in inputs]
    mode = next(v.fake_mode for v in values if isinstance(v, FakeTensor))
    with mode, torch.no_grad():
        traced = make_fx(body, decomposition_table=dict(decompositions), tracing_mode="real")(*values)
    traced.graph.eliminate_dead_code()
    new: dict[fx.Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    for node in traced.graph.nodes:
        if node.op == "output":
            call.replace_all_uses_with(new[node.args[0]])
        elif node.op != "placeholder":
            with call.graph.inserting_before(call):
                new[node] = copy = call.graph.node_copy(node, lambda n: new[n])
            copy.meta = {**call.meta, "val": node.meta["val"]}
    call.graph.erase_node(call)
