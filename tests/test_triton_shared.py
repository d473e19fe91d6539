"""Shared experts as slots of the experts' launches on a GPU: kernels against float64, inside graphs, and what stays apart."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from braze.backend import collect
from braze.kernels import reference
from braze.kernels.spec import MoeSpec
from braze.kernels.triton import compat
from braze.kernels.triton.choose_config import Config, Tile
from braze.kernels.triton.weights import Shared, Weights
from tests import gathered
from tests.harness import assert_close

GPU = torch.cuda.is_available()
needs_device = pytest.mark.skipif(not GPU, reason="no GPU")
BOUND = {torch.float32: 3e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}


#: top-k, how many experts wide the shared one is, whether gate and up are two tensors, where the weight is.
FORMS = ((6, 2, False, "output"), (8, 1, True, "output"), (1, 1, False, "input"))


def check_kernel(device: str, form: Any, factor: float | None, dtype: torch.dtype) -> None:
    from braze.kernels.triton import vector  # which needs Triton

    top_k, wide, apart, on = form
    experts, hidden, inner = 10, 264, 72

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype) / shape[-1] ** 0.5

    x, ids = normal(1, hidden) * 16, torch.randperm(experts, device=device)[None, :top_k]
    if top_k > 1:
        ids[0, 1] = -1  # another rank's
    weights = torch.rand(1, top_k, device=device)
    w1, w2 = normal(experts, 2 * inner, hidden), normal(experts, hidden, inner)
    gate, up, down = normal(wide * inner, hidden), normal(wide * inner, hidden), normal(hidden, wide * inner)
    number = None if factor is None else torch.tensor([factor], device=device, dtype=dtype)
    spec = MoeSpec(scale=1.5, weight_on=on)
    first = Weights(*(w.contiguous() for w in w1.chunk(2, 1))) if apart else Weights(w1)
    config = Config(1, True, Tile(8, 256, 4, 1), Tile(4, 64, 4, 1))
    shared, out = Shared(gate, up, down, number), torch.empty_like(x)
    overlap = compat.overlaps_launches(x.device)
    vector.launch(
        x, ids, weights, first, Weights(w2), None, None, spec, config, out, True, compat.start, overlap, shared
    )
    exact = reference.moe(x.double(), ids, *(t.double() for t in (weights, w1, w2)), None, None, spec)
    y = F.silu(x.double() @ gate.double().T) * (x.double() @ up.double().T) @ down.double().T
    assert_close(out, exact + y * (1.0 if number is None else number.double()), BOUND[dtype])


@needs_device
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("factor", [None, 0.37])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_kernel(form: Any, factor: float | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check_kernel("cuda", form, factor, dtype)


class Layer(nn.Module):
    """Experts by a softmax's top-k, shared experts added: times a sigmoid or not, before or after them."""

    def __init__(self, wide: int, gated: bool, behind: bool, inner: int = 64, hidden: int = 256) -> None:
        super().__init__()
        self.gated, self.behind = gated, behind
        self.router = nn.Linear(hidden, 12, bias=False)
        self.w1 = nn.Parameter(torch.randn(12, 2 * inner, hidden) / hidden**0.5)
        self.w2 = nn.Parameter(torch.randn(12, hidden, inner) / inner**0.5)
        self.gate, self.up = (nn.Linear(hidden, wide, bias=False) for _ in range(2))
        self.down = nn.Linear(wide, hidden, bias=False)
        self.number = nn.Linear(hidden, 1, bias=False)

    def experts(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(3)
        return gathered.experts(x, weights, ids, self.w1, self.w2)

    def shared(self, x: Tensor) -> Tensor:
        y = self.down(F.silu(self.gate(x)) * self.up(x))
        return y * self.number(x).sigmoid() if self.gated else y

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, x.shape[-1])
        first, second = self.experts(rows).view(x.shape), self.shared(x)
        return x + (second + first if self.behind else first + second)


def compiled(model: nn.Module, tokens: int, **options: Any) -> list[Any]:
    """The sites of a compiled call, whose results were compared with float64's; without graphs replayed and with."""
    torch._dynamo.reset()
    wide = copy.deepcopy(model).double()
    run = torch.compile(model, backend="braze", dynamic=False, options={"strict": True, **options})
    with collect() as reports, torch.no_grad():
        for _ in range(3):
            x = torch.randn(1, tokens, 256, device="cuda")
            assert_close(run(x).clone(), wide(x.double()), 1e-5)
    return [s for r in reports for s in r.sites]


@needs_device
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize(("wide", "gated", "behind"), [(64, False, False), (128, False, True), (192, True, False)])
def test_inside_a_graph(wide: int, gated: bool, behind: bool, mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer(wide, gated, behind) for _ in range(2))).to("cuda")
    sites = compiled(model, 1, **{"triton.cudagraphs": mode == "reduce-overhead"})
    why = {kind: {s.why for s in sites if s.kind == kind} for kind in ("moe", "mlp")}
    assert len(sites) == 6 and all("shared experts too" in w for w in why["moe"]), why
    assert all("launches of the experts" in w for w in why["mlp"]), why


class Twice(Layer):
    """What the shared experts give is a result too."""

    def forward(self, x: Tensor) -> Tensor:
        shared = self.shared(x)
        return self.experts(x[0])[None] + shared + shared.cos()


class Other(Layer):
    """The shared experts read something else."""

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x[0])[None] + self.shared(x.cos())


@needs_device
def test_what_stays_apart() -> None:
    torch.manual_seed(0)
    cases: tuple[tuple[nn.Module, int, dict[str, Any]], ...] = (
        (Layer(64, False, False), 2, {}),  # two tokens
        (Layer(72, False, False), 1, {}),  # no multiple of an expert's width
        (Twice(64, False, False), 1, {}),
        (Other(64, False, False), 1, {}),
        (Layer(64, False, False), 1, {"kernel": {"mlp": "aten"}}),
    )
    for model, tokens, options in cases:
        sites = compiled(model.to("cuda"), tokens, **options)
        assert not any("shared experts too" in s.why for s in sites), (type(model), tokens)
