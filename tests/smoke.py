"""Run from a wheel in a clean environment: a hand-written MoE layer with RoPE, fused through the entry point alone."""

import torch


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = torch.nn.Parameter(torch.randn(8, 32))
        self.up = torch.nn.Parameter(torch.randn(8, 48, 32) * 0.2)
        self.down = torch.nn.Parameter(torch.randn(8, 32, 24) * 0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angle = torch.arange(x.shape[0])[:, None] * torch.logspace(0, -3, 16)
        cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
        x = x * cos + torch.cat((-x[:, 16:], x[:, :16]), -1) * sin
        weights, ids = (x @ self.router.T).softmax(-1).topk(2)
        rows = x.repeat_interleave(2, 0).unsqueeze(-1)
        gate, up = (self.up[ids.flatten()] @ rows).squeeze(-1).chunk(2, -1)
        out = (self.down[ids.flatten()] @ (torch.nn.functional.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        return (out * weights.flatten()[:, None]).view(x.shape[0], 2, -1).sum(1)


def main() -> None:
    layer, x = Layer().eval(), torch.randn(6, 32)
    with torch.no_grad():
        got = torch.compile(layer, backend="braze", options={"require": ["rope", "moe"]})(x)
        expected = layer(x)
    assert expected.abs().max() > 0
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    print("smoke test: rope and moe fused, result as eager's")


if __name__ == "__main__":
    main()
