"""Whole graphs: every kernel that Inductor makes of a function or a model, run as XPU code, equals eager."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from braze import xpu_sim
from braze.kernels import reference
from braze.kernels.spec import MoeSpec
from braze.kernels.triton import moe
from braze.kernels.triton.choose_config import Config, Tile
from braze.lowering import inductor
from braze.lowering.lower import lower
from braze.xpu_sim import spirv
from tests import tiny
from tests.harness import assert_close
from tests.test_triton_moe import CASES, make

TARGETS = ["pvc", "generic"]


@pytest.fixture(autouse=True)
def reset() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", TARGETS)
def test_fused_function(target: str, dtype: torch.dtype) -> None:
    def block(x: torch.Tensor, gate: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.softmax(x.float() * torch.sigmoid(gate), -1)
        return y.to(x.dtype)[index], (x.float() ** 2).sum(0)

    inputs = torch.randn(33, 70).to(dtype), torch.randn(70), torch.randint(0, 33, (12,))
    with xpu_sim.compiled_graphs(target), xpu_sim.record() as launches:
        outputs = torch.compile(block, dynamic=False)(*inputs)
    assert launches and {launch.target for launch in launches} == {target}
    for output, expected in zip(
        outputs, block(*(i.double() if i.is_floating_point() else i for i in inputs)), strict=True
    ):
        tolerance = 1e-5 if output.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(output.double(), expected.double(), rtol=tolerance, atol=tolerance / 10)


def test_training_step() -> None:
    model = nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 40), nn.GELU(), nn.Linear(40, 8))
    x = torch.randn(9, 48)
    model(x).square().mean().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    with xpu_sim.compiled_graphs("pvc"), xpu_sim.record() as launches:
        torch.compile(model, dynamic=False)(x).square().mean().backward()
    assert len(launches) >= 2
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


#: family -> the kernels of braze's that its graph launches
KERNELS = {
    "llama": {"rope_kernel"},
    "mixtral": {"rope_kernel", "route_kernel", "moe_gemm", "moe_combine"},
    "llama4": {"rope_kernel", "moe_gemm"},
    "gpt_oss": {"rope_kernel", "route_kernel", "moe_gemm", "moe_combine"},
}


@pytest.mark.parametrize(
    ("family", "target"),
    [("llama", "generic"), ("mixtral", "generic"), *((family, "pvc") for family in KERNELS)],
)
def test_model_compiled_by_braze(family: str, target: str) -> None:
    """From tokens to logits as on an Intel GPU: braze's kernels are launches in the graph, Inductor's around them."""
    model = tiny.build(family)
    tokens = torch.randint(3, tiny.VOCAB, (2, 13))
    require = ["rope"] + ["moe"] * (family != "llama")
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        with xpu_sim.compiled_graphs(target), xpu_sim.record() as launches:
            compiled = torch.compile(
                model, backend="braze", options={"require": require, "strict": True}, dynamic=False
            )
            output = compiled(tokens, use_cache=False).logits
    names = {launch.kernel for launch in launches}
    assert names >= KERNELS[family]
    assert any(name.startswith("triton_") for name in names)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "dtype"), [("mixtral", torch.bfloat16), ("gpt_oss", torch.float32)], ids=str)
def test_a_token_after_those_in_the_cache(family: str, dtype: torch.dtype) -> None:
    """Decode: one token, few rows, found by their ids; in bfloat16 the products use the matrix engine inside the graph."""
    model, tokens = tiny.build(family).to(dtype), tiny.tokens(1, 9)
    options = {"require": ["rope", "moe"], "strict": True}
    with torch.no_grad():
        exact = tiny.as_float64(model)(tokens, use_cache=False).logits[:, -1:]
        cache = model(tokens[:, :-1], use_cache=True).past_key_values
        with xpu_sim.compiled_graphs("pvc"), xpu_sim.record() as launches:
            compiled = torch.compile(model, backend="braze", options=options, dynamic=False)
            output = compiled(tokens[:, -1:], past_key_values=cache, use_cache=True).logits
    products = [launch for launch in launches if launch.kernel == "moe_gemm"]
    assert len(products) == 4 and "moe_sort" not in {launch.kernel for launch in launches}
    if dtype == torch.bfloat16:
        imported = [{one.name for one in spirv.imports(launch.module)} for launch in products]
        assert all(any("matrix_mad" in name for name in names) for names in imported)
        assert all(any("2d_block_read" in name for name in names) for names in imported)
    assert_close(output, exact, 2e-2 if dtype == torch.bfloat16 else 1e-4)


def test_rows_copied_inside_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for many tokens: the copy is a launch of the graph too, and a number of registers is left to the compiler."""
    tile = Tile(32, 32, 4, 2, group=2, registers=256)
    monkeypatch.setattr(moe, "choose_config", lambda problem: Config(16, False, tile, tile, permute=True))
    x, ids, weights, w1, w2, *_ = make(CASES["silu"])

    def transform(graph: torch.fx.Graph) -> None:
        calls = graph.find_nodes(op="call_function", target=torch.ops.braze.moe.default)
        assert lower(calls, {})[0][0] == "triton"

    def backend(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        return inductor.compile_graph(gm, inputs, transform, "test", {"force_disable_caches": True})

    def layer(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return torch.ops.braze.moe(x * 2, ids, weights, w1, w2) + 1  # type: ignore[no-any-return]

    with torch.no_grad(), xpu_sim.compiled_graphs("pvc"), xpu_sim.record() as launches:
        got = torch.compile(layer, backend=backend, dynamic=False)(x, weights)
    want = reference.moe(2 * x.double(), ids, weights.double(), w1.double(), w2.double(), None, None, MoeSpec()) + 1
    kernels = [launch.kernel for launch in launches if launch.kernel in ("moe_permute", "moe_gemm")]
    assert kernels == ["moe_permute", "moe_gemm", "moe_gemm"]
    assert not any("GRF" in launch.flags for launch in launches)
    assert_close(got, want, 1e-2)


@pytest.mark.parametrize("dynamic", [False, True], ids=["sizes fixed", "tokens symbolic"])
@pytest.mark.parametrize("how", ["apart", "separate"])
def test_weights_of_several_tensors_inside_a_graph(how: str, dynamic: bool) -> None:
    """Gate and up of two tensors are launches of the graph; a tensor an expert, or a symbolic number of tokens, is one call."""
    case = dataclasses.replace(CASES["odd halves"], hidden=64)
    x, ids, weights, w1, w2, b1, b2 = make(case)
    halves, biases = w1.chunk(2, 1), b1.chunk(2, 1)
    firsts, seconds = [half[e].clone() for e in range(4) for half in halves], list(w2.clone().unbind())
    b_first, b_second = [b[e] for e in range(4) for b in biases], list(b2.unbind())
    found: list[str] = []

    def transform(graph: torch.fx.Graph) -> None:
        for op in (torch.ops.braze.moe_apart.default, torch.ops.braze.moe_separate.default):
            found.extend(kernel for kernel, _ in lower(graph.find_nodes(op="call_function", target=op), {}))

    def backend(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        return inductor.compile_graph(gm, inputs, transform, "test", {"force_disable_caches": True})

    def layer(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if how == "apart":
            return torch.ops.braze.moe_apart(x * 2, ids, weights, *halves, w2, *biases, b2) + 1  # type: ignore[no-any-return]
        lists = firsts, seconds, b_first, b_second
        return torch.ops.braze.moe_separate(x * 2, ids, weights, *lists) + 1  # type: ignore[no-any-return]

    given = x, ids, weights
    if dynamic:
        for t in given:
            torch._dynamo.mark_dynamic(t, 0)
    with torch.no_grad(), xpu_sim.compiled_graphs("pvc"), xpu_sim.record() as launches:
        got = torch.compile(layer, backend=backend)(*given)
    wide = [t.double() for t in (w1, w2, b1, b2)]
    want = reference.moe(2 * x.double(), ids, weights.double(), *wide, MoeSpec()) + 1
    assert found == ["triton"]
    assert [launch.kernel for launch in launches].count("moe_gemm") == 2
    assert_close(got, want, 1e-2)
