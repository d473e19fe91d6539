"""Whole graphs: every kernel that Inductor makes of a function or a model, run as XPU code, equals eager."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from braze import xpu_sim
from braze.xpu_sim import spirv
from tests import tiny
from tests.harness import assert_close

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
    assert len(products) == 4 and "moe_place" not in {launch.kernel for launch in launches}
    if dtype == torch.bfloat16:
        imported = [{one.name for one in spirv.imports(launch.module)} for launch in products]
        assert all(any("matrix_mad" in name for name in names) for names in imported)
        assert all(any("2d_block_read" in name for name in names) for names in imported)
    assert_close(output, exact, 2e-2 if dtype == torch.bfloat16 else 1e-4)
