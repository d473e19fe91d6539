"""Shared experts and the residual are added to the experts' result in one pass: there is none to save by an epilogue."""

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from tests.tiny import build


class Block(nn.Module):
    """Norm, experts with a shared one, residual, and the norm that the next layer begins with."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.before, self.mlp, self.after = layer.post_attention_layernorm, layer.mlp, layer.input_layernorm

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.mlp(self.before(x))
        return x, self.after(x)


def test_one_pass_adds_all_and_is_the_next_norms() -> None:
    block = Block(build("deepseek_v3", experts="grouped_mm").model.layers[0]).eval()
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="braze", options={"require": ["moe", "router"]})
    x = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        got, codes = run_and_get_code(compiled, x)
        for ours, theirs in zip(got, block(x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    calls = re.findall(r"^ +(cpp_\w+|extern_kernels\.\w+)\(", codes[0][codes[0].index("def call") :], re.MULTILINE)
    after = calls[next(i for i, c in enumerate(calls) if c.startswith("cpp_braze")) + 1 :]
    passes = [c for c in after if c.startswith("cpp_fused") and "silu" not in c]
    assert len(passes) == 1, calls
    assert "rsqrt" in passes[0]
    assert "add" in passes[0]
