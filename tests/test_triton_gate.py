"""A router's product for few tokens on a GPU: against float64, inside a graph, and what is left to Inductor."""

import copy

import pytest
import torch
from torch import Tensor, nn

from braze.backend import collect
from braze.kernels.triton import gate
from tests import gathered
from tests.harness import assert_close

GPU = torch.cuda.is_available()
needs_device = pytest.mark.skipif(not GPU, reason="no GPU")


#: dtypes of x and of the weight
DTYPES = ((torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float32))


def check_kernel(device: str, tokens: int, experts: int, hidden: int, dtype: torch.dtype, weight: torch.dtype) -> None:
    x = torch.randn(tokens, hidden, device=device).to(dtype)
    w = (torch.randn(experts, hidden, device=device) / hidden**0.5).to(weight)
    b = torch.randn(experts, device=device).to(weight)
    for bias in (None, b):
        exact = x.double() @ w.double().T + (0.0 if bias is None else bias.double())
        assert_close(gate.launch(x, w, bias, torch.float32), exact, 1e-6)
        assert_close(gate.launch(x, w, bias, torch.bfloat16), exact, 4e-3)


@needs_device
@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize(("experts", "hidden"), [(5, 96), (128, 2048), (32, 2880), (200, 2048)])
@pytest.mark.parametrize(("dtype", "weight"), DTYPES, ids=str)
def test_kernel(tokens: int, experts: int, hidden: int, dtype: torch.dtype, weight: torch.dtype) -> None:
    torch.manual_seed(0)
    check_kernel("cuda", tokens, experts, hidden, dtype, weight)


class Layer(nn.Module):
    """Logits in float32 from a router whose weight is narrower, or logits that are a result too."""

    def __init__(self, widened: bool) -> None:
        super().__init__()
        self.widened = widened
        self.router = nn.Linear(128, 16, bias=not widened)
        self.w1 = nn.Parameter(torch.randn(16, 96, 128) / 11)
        self.w2 = nn.Parameter(torch.randn(16, 128, 48) / 7)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.router(x) if not self.widened else x.float() @ self.router.weight.float().T
        weights, ids = logits.softmax(-1).topk(2)
        return gathered.experts(x, weights, ids, self.w1, self.w2), logits


@needs_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("widened", [False, True])
@pytest.mark.parametrize("tokens", [1, 8, 9, 300])
def test_inside_a_graph(tokens: int, widened: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Layer(widened).to("cuda", dtype)
    run = torch.compile(model, backend="braze", dynamic=False, options={"strict": True})
    x = torch.randn(tokens, 128, device="cuda").to(dtype)
    with collect() as reports, torch.no_grad():
        y, logits = run(x)
    exact, scores = copy.deepcopy(model).double()(x.double())
    assert_close(logits, scores, 1e-5 if dtype == torch.float32 or widened else 5e-3)
    if dtype == torch.float32:  # elsewhere two may be as good as equal
        assert_close(y, exact, 1e-5)
    routers = [s for r in reports for s in r.sites if s.kind == "router"]
    assert len(routers) == 1
    assert ("a launch for the product" in routers[0].why) == (tokens <= gate.FEW), routers[0].why
    narrow = widened and dtype != torch.float32 and tokens > gate.FEW
    assert ("reads 16 bits" in routers[0].why) == narrow, routers[0].why
