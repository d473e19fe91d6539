"""Captures the graphs that the passes see, fuses them, and interprets them: all of braze but code generation."""

from collections.abc import Callable
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import decompositions
from torch._inductor.lowering import lowerings

from braze.loops import splits_by_numbers
from braze.lowering.inductor import no_modes
from braze.passes import pipeline


def compiled_by(
    inner: Callable[[fx.GraphModule], None],
    called: Callable[[fx.GraphModule, tuple[Any, ...]], None] = lambda gm, args: None,
) -> Callable[..., Any]:
    """A backend that hands each functional, decomposed graph to `inner`, then interprets it. called: at each of its calls."""

    def run(gm: fx.GraphModule, example_inputs: Any, **_: Any) -> Callable[..., Any]:
        for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
            node.target = torch.ops.aten.reshape.default  # as Inductor does first: strides are not fixed yet
        inner(gm)
        gm.recompile()

        def forward(*args: Any) -> Any:
            called(gm, args)
            return gm.forward(*args)

        return make_boxed_func(forward)  # type: ignore[no-any-return]

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        return compile_fx(gm, example_inputs, inner_compile=run)

    return backend


def capture(model: Callable[..., Any], *inputs: Any, dynamic: bool | None = None) -> list[fx.GraphModule]:
    """The graphs of one call of `model`, in order."""
    graphs: list[fx.GraphModule] = []
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        torch.compile(model, backend=compiled_by(graphs.append), dynamic=dynamic)(*inputs)
    return graphs


class Fused:
    """A model whose graphs are fused by braze and interpreted; results: what the passes did to each graph, in order."""

    def __init__(
        self,
        model: Callable[..., Any],
        dynamic: bool | None = None,
        strict: bool = True,
        after: Callable[[fx.Graph], None] = lambda graph: None,
    ) -> None:
        self.results: list[pipeline.Result] = []

        def fuse(gm: fx.GraphModule) -> None:
            before = {n.target for n in gm.graph.nodes}
            with no_modes():
                self.results.append(pipeline.run(gm.graph, strict=strict))
            after(gm.graph)
            gm.graph.lint()
            assert_known(gm.graph, before)

        torch._dynamo.reset()
        splits = isinstance(model, nn.Module) and splits_by_numbers(model)
        self.settings = {"capture_scalar_outputs": True} if splits else {}
        self.compiled = torch.compile(model, backend=compiled_by(fuse), dynamic=dynamic)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        caches = torch._inductor.config.patch(force_disable_caches=True)
        with torch.no_grad(), caches, torch._dynamo.config.patch(**self.settings):
            return self.compiled(*args, **kwargs)

    def count(self, kind: str) -> list[int]:
        """Sites of a kind in each graph."""
        return [sum(f.kind == kind for _, f in r.calls) for r in self.results]

    @property
    def findings(self) -> list[Any]:
        return [f for r in self.results for _, f in r.calls]

    @property
    def reasons(self) -> list[str]:
        return [m.reason for r in self.results for m in r.near_misses]


def assert_known(graph: fx.Graph, before: set[Any]) -> None:
    """That the passes brought in no op of which Inductor knows the decomposition only: that came before them."""
    brought = {n.target for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload)} - before
    assert not brought & set(decompositions) - set(lowerings)


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Largest difference relative to the largest value of a float64 reference; fails on zeros and on NaN."""
    scale = expected.abs().max().item()
    assert scale > 0, "the reference is zero: it proves nothing"
    assert got.shape == expected.shape
    error = (got.double() - expected).abs().max().item() / scale
    assert error <= tolerance, f"relative error {error:.2e} above {tolerance:.0e}"
