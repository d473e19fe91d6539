"""Products before routers on CUDA, in the graph: 16 bits are multiplied as they are stored, and nothing else changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import braze  # noqa: F401  (defines the op)
from braze.lowering import gate, inductor

aten = torch.ops.aten
TOKENS, HIDDEN, EXPERTS = 24, 64, 8


def traced(f: Callable[..., Any], x: torch.dtype, w: torch.dtype, device: str = "cuda") -> tuple[fx.Graph, fx.Node]:
    """f(x, w, b) in the form that Inductor gets, on no real device, and its router's call."""
    with FakeTensorMode():
        given = (
            torch.empty(TOKENS, HIDDEN, dtype=x, device=device),
            torch.empty(EXPERTS, HIDDEN, dtype=w, device=device),
        )
        bias = torch.empty(EXPERTS, device=device)
        graph = make_fx(f, decomposition_table=dict(inductor.decompositions()), tracing_mode="real")(*given, bias).graph
    (call,) = graph.find_nodes(op="call_function", target=torch.ops.braze.route.default)
    return graph, call


def route(logits: Tensor) -> Any:
    return torch.ops.braze.route(logits, None, top_k=2)


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "plain": lambda x, w, b: route(x.float() @ w.float().T),
    "linear": lambda x, w, b: route(torch.nn.functional.linear(x.float(), w.float(), b)),
    "a result too": lambda x, w, b: ((logits := x.float() @ w.float().T), route(logits)),
    "widened x is read elsewhere": lambda x, w, b: (route((wide := x.float()) @ w.float().T), wide.sum()),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_widened_products_read_what_is_stored(form: str, dtype: torch.dtype) -> None:
    graph, call = traced(FORMS[form], dtype, dtype)
    assert gate.as_stored(call)
    graph.eliminate_dead_code()
    graph.lint()
    (product,) = graph.find_nodes(op="call_function", target=aten.mm.dtype)
    assert [n.meta["val"].dtype for n in product.all_input_nodes] == [dtype, dtype]
    assert product.meta["val"].dtype == torch.float32 and product.meta["val"].shape == (TOKENS, EXPERTS)
    assert not [n for n in graph.nodes if n.target in (aten.mm.default, aten.addmm.default)]
    assert len(graph.find_nodes(op="call_function", target=aten.add.Tensor)) == (form == "linear")


@pytest.mark.parametrize(
    ("x", "w", "device"),
    [
        (torch.float32, torch.float32, "cuda"),
        (torch.bfloat16, torch.float32, "cuda"),
        (torch.bfloat16, torch.float16, "cuda"),
        (torch.bfloat16, torch.bfloat16, "cpu"),
        (torch.bfloat16, torch.bfloat16, "xpu"),
    ],
    ids=str,
)
def test_other_dtypes_and_devices_stay(x: torch.dtype, w: torch.dtype, device: str) -> None:
    graph, call = traced(FORMS["plain"], x, w, device)
    before = str(graph)
    assert not gate.as_stored(call)
    assert str(graph) == before


def test_products_that_round_stay() -> None:
    """Logits of 16 bits, widened only then, are those of the product as it is."""
    _, call = traced(lambda x, w, b: route((x @ w.T).float()), torch.bfloat16, torch.bfloat16)
    assert not gate.as_stored(call)
    _, call = traced(lambda x, w, b: route(x @ w.T), torch.bfloat16, torch.bfloat16)
    assert not gate.as_stored(call)
