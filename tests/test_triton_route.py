"""The Triton router: on a GPU where there is one, else in Triton's interpreter where Triton is installed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from braze import xpu_sim
from braze.kernels import reference
from braze.kernels.spec import RouteSpec
from braze.kernels.triton import route

GPU = torch.cuda.is_available()
# Where Triton is Intel's, tests/xpu_sim/test_route.py runs the same cases.
SIMULATED = not GPU and xpu_sim.missing() is None
DEVICE = "cuda" if GPU else "cpu"
# exp(-48) in float32 is off by 48 roundings of its argument.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
needs_triton = pytest.mark.skipif(
    SIMULATED or not route.HAVE_TRITON, reason="Triton is not installed, or runs on the XPU simulator instead"
)

#: (spec, experts, whether there is a bias)
CASES = [
    (RouteSpec(8, renorm="add"), 128, False),
    (RouteSpec(2), 8, False),
    (RouteSpec(1, "sigmoid"), 16, False),
    (RouteSpec(4, renorm="add", scale=0.5, ids_dtype=torch.int32), 32, False),
    (RouteSpec(8, "sigmoid", "scores", 8, 4, "top2", renorm="add", eps=1e-20, scale=2.5), 256, True),
    (RouteSpec(6, "softmax", "logits", 8, 3, "max", scale=16.0), 160, False),
    (RouteSpec(3, "softmax", "scores", 4, 1, "top2", "zero", "add", 1e-20), 24, True),
    (RouteSpec(6, "sqrtsoftplus", "scores", renorm="add", eps=1e-20, scale=1.5), 384, True),
    (RouteSpec(6, "softmax", "scores", renorm="clamp", eps=1e-12), 64, True),
    (RouteSpec(10, "softmax", "scores"), 512, True),
    (RouteSpec(3, "sigmoid", "logits", renorm="add", eps=1e-6), 30, True),
    (RouteSpec(6, "sigmoid", "scores", renorm="add", scale=8.0, shared=2), 20, True),
    (RouteSpec(32, "sigmoid", renorm="add"), 33, False),
]


def inputs(experts: int, shared: int, bias: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Logits [3, 7, experts + shared] without equal ones among a token's, some rows far below zero; a bias that decides."""
    rng = torch.Generator().manual_seed(experts)
    x = torch.rand(3, 7, experts + shared, generator=rng).argsort(-1).to(torch.float32) * 0.25 - 4.0
    if dtype == torch.float32:
        x += 0.1 * torch.rand(x.shape, generator=rng)
    if dtype != torch.float16:  # in which the scores would be zero
        x[0, 1:3] -= 48.0
    b = torch.randn(experts, generator=rng) if bias else None
    return x.to(DEVICE, dtype), b if b is None else b.to(DEVICE)


Kernel = Callable[[Tensor, Tensor | None, RouteSpec], tuple[Tensor, Tensor]]


def compare(spec: RouteSpec, experts: int, bias: bool, dtype: torch.dtype, kernel: Kernel = route.launch) -> None:
    logits, b = inputs(experts, spec.shared, bias, dtype)
    weights, ids = kernel(logits, b, spec)
    exact, chosen = reference.route(logits.double(), b, spec)
    exact = exact.double()
    assert weights.dtype == dtype
    assert ids.dtype == spec.ids_dtype
    assert weights.shape == exact.shape
    assert torch.equal(ids, chosen)
    assert exact.abs().amax(-1).gt(0).all()
    error = ((weights.double() - exact) / exact.abs().amax(-1, keepdim=True)).abs().max()
    assert error <= TOLERANCE[dtype], error


def check_ties(kernel: Kernel = route.launch) -> None:
    """Equal choices: the lower index first, as the docstring says; each expert once; NaN before all else; -0 equals 0."""
    x = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0, 1.0, -1.0, 1.0]] * 4, device=DEVICE)
    x[1] = 0.0
    x[1, ::2] = -0.0
    x[2, 5] = float("nan")
    x[3, :6] = float("-inf")
    _, ids = kernel(x, None, RouteSpec(5, "sigmoid"))
    assert ids.tolist() == [[1, 2, 4, 0, 5], [0, 1, 2, 3, 4], [5, 1, 2, 4, 0], [7, 6, 0, 1, 2]]
    # The second and the third group are as good: the second is open, and its experts too come by their index.
    _, ids = kernel(x[:1].abs() * 0 + 1, None, RouteSpec(3, "sigmoid", "scores", 4, 2, "top2"))
    assert ids.tolist() == [[0, 1, 2]]


def check_layouts(kernel: Kernel = route.launch) -> None:
    """Rows with gaps, and logits whose experts are not adjacent."""
    spec = RouteSpec(2, renorm="add")
    wide = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for x in (wide[:, 3:19], wide[:, :5].t(), wide[:0]):
        weights, ids = kernel(x, None, spec)
        exact, chosen = reference.route(x.double(), None, spec)
        assert torch.equal(ids, chosen)
        torch.testing.assert_close(weights.double(), exact.double(), rtol=1e-5, atol=1e-6)


@needs_triton
@pytest.mark.parametrize(("spec", "experts", "bias"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_router(spec: RouteSpec, experts: int, bias: bool, dtype: torch.dtype) -> None:
    compare(spec, experts, bias, dtype)


@needs_triton
def test_ties() -> None:
    check_ties()


@needs_triton
def test_layouts() -> None:
    check_layouts()


def test_reasons_on_fake_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "HAVE_TRITON", True)
    with torch._subclasses.FakeTensorMode():
        logits, bias = torch.empty(4, 256, device="cuda"), torch.empty(256, device="cuda")
        assert route.supports(logits, bias, RouteSpec(8, groups=8, top_groups=4)) is None
        assert "cpu" in str(route.supports(logits.cpu(), None, RouteSpec(8)))
        assert "float" in str(route.supports(logits.double(), None, RouteSpec(8)))
        assert "exceed" in str(route.supports(torch.empty(4, 2048, device="cuda"), None, RouteSpec(8)))
        assert "exceed" in str(route.supports(logits, None, RouteSpec(65)))
        assert "ids" in str(route.supports(logits, None, RouteSpec(8, ids_dtype=torch.int16)))
    with pytest.raises(ValueError, match="cpu"):
        route.run(torch.empty(4, 256), None, RouteSpec(8))
