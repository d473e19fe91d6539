"""Captures the graph that braze's passes see, without compiling it: after AOTAutograd, decompositions and joint passes."""

from collections.abc import Callable
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import fx
from torch._inductor.compile_fx import compile_fx


def capture(model: Callable[..., Any], *inputs: Any, dynamic: bool | None = None, **kwargs: Any) -> list[fx.GraphModule]:
    """The functional graphs of one call of `model`, in order."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, example_inputs: Any, **_: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return make_boxed_func(gm.forward)

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        return compile_fx(gm, example_inputs, inner_compile=keep)

    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        torch.compile(model, backend=backend, dynamic=dynamic)(*inputs, **kwargs)
    return graphs
