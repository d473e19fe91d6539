"""Dense MLPs of one token on a GPU: the vectors' kernels against float64, inside a graph, and refusals."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from braze.backend import collect
from braze.kernels import reference
from braze.kernels.spec import MoeSpec
from braze.kernels.triton import mlp
from braze.lowering import choose
from tests.harness import assert_close

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
needs_device = pytest.mark.skipif(not GPU, reason="no GPU")
SILU, GELU = "g*u*sigmoid(g)", "0.5*g*(erf(0.7071067811865476*g) + 1)"
BOUND = {torch.float32: 3e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}


def tensors(
    spec: MoeSpec, dtype: torch.dtype, apart: bool, bias: torch.dtype | None, hidden: int, inner: int, device: str
) -> tuple[Any, ...]:
    """(x, w1, w2, b1, b2)"""
    columns = inner * (1 if apart or spec.layout == "none" else 2)

    def weight(out: int, size: int) -> Tensor:
        # Contiguous along what is summed over, however they are stored.
        value = torch.randn(out, size, dtype=torch.float32, device=device).to(dtype) / size**0.5
        return value.t() if spec.transposed else value

    w1 = [weight(columns, hidden) for _ in range(2 if apart else 1)]
    b1 = [torch.randn(columns, device=device).to(bias) for _ in w1] if bias else []
    b2 = torch.randn(hidden, device=device).to(bias) if bias else None
    return torch.randn(1, hidden, device=device).to(dtype), w1, weight(hidden, inner), b1, b2


#: layout, whether gate and up are apart, whether transposed, dtype, that of the biases, activation.
FORMS = (
    ("halves", True, False, torch.bfloat16, None, SILU),
    ("halves", True, True, torch.float16, torch.float32, SILU),
    ("halves", False, False, torch.bfloat16, torch.bfloat16, SILU),
    ("interleaved", False, False, torch.float32, None, SILU),
    ("none", False, True, torch.float32, torch.float32, GELU),
)


@needs_device
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("hidden", "inner"), [(64, 48), (200, 136), (1024, 2816)])
def test_kernel(form: Any, hidden: int, inner: int) -> None:
    layout, apart, transposed, dtype, bias, activation = form
    torch.manual_seed(0)
    spec = MoeSpec(activation, layout, transposed)
    given = tensors(spec, dtype, apart, bias, hidden, inner, DEVICE)
    assert mlp.supports(*given, spec) is None
    x, w1, w2, b1, b2 = given
    wide = [w.double() for w in w1], w2.double(), [b.double() for b in b1], None if b2 is None else b2.double()
    exact = reference.mlp(x.double(), *wide, spec)
    assert_close(mlp.run(*given, spec), exact, BOUND[dtype])
    attributes = {"activation": activation, "layout": layout, "transposed": transposed}
    assert_close(torch.ops.braze.mlp(*given, **attributes), exact, BOUND[dtype])


class Residual(nn.Module):
    """Two layers, each an MLP after a norm, added to what it read."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(256, 96), (256, 96), (96, 256)]
        self.parts = nn.ModuleList(nn.ModuleList(nn.Linear(*s, bias=False) for s in sizes) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for gate, up, down in self.parts:  # type: ignore[misc]
            y = F.rms_norm(x, (256,))
            x = x + down(F.silu(gate(y)) * up(y))
        return x


@needs_device
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inside_a_graph(mode: str) -> None:
    """One token by the kernel; two as the model spells them."""
    torch.manual_seed(0)
    model = Residual().to(DEVICE)
    options = {"strict": True, "triton.cudagraphs": mode == "reduce-overhead"}
    for tokens, kernels in ((1, ["triton", "triton"]), (2, [])):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="braze", dynamic=False, options=options)
        with collect() as reports, torch.no_grad():
            for _ in range(3):
                x = torch.randn(1, tokens, 256, device=DEVICE)
                assert_close(compiled(x).clone(), copy.deepcopy(model).double()(x.double()), 1e-5)
        assert [s.kernel for r in reports for s in r.sites] == kernels


@needs_device  # fake tensors on a GPU need one for views
def test_what_is_refused_and_chosen() -> None:
    with torch._subclasses.FakeTensorMode():

        def t(*shape: int, dtype: torch.dtype = torch.bfloat16, turned: bool = False) -> Tensor:
            strides = (1, shape[0]) if turned else (*shape[1:], 1)
            return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")

        spec = MoeSpec(SILU)
        x, w1, w2, b2 = t(1, 64), [t(32, 64), t(32, 64)], t(64, 32), t(64)
        b1 = [t(32, dtype=torch.float32) for _ in range(2)]
        given = x, w1, w2, b1, b2
        uneven = "not contiguous along what is summed over"
        cases = (
            ((t(2, 64), w1, w2, b1, b2), spec, "2 rows on cuda"),
            (given, MoeSpec("g**0.3"), "activation"),
            ((t(1, 64, dtype=torch.float64), w1, w2, b1, b2), spec, "float64"),
            ((x, w1, t(64, 32, turned=True), b1, b2), spec, uneven),
            ((x, [w1[0], t(32, 64, turned=True)], w2, b1, b2), spec, uneven),
            ((x, w1, w2, [b1[0], t(32)], b2), spec, "biases of gate and up differ"),
        )
        for tensors_, s, reason in cases:
            assert reason in str(mlp.supports(*tensors_, s))
        assert mlp.supports(*given, spec) is None
        graph = torch.fx.Graph()
        nodes = [graph.placeholder(n) for n in ("x", "gate", "up", "down", "b_gate", "b_up", "b_down")]
        for node, value in zip(nodes, (x, *w1, w2, *b1, b2), strict=True):
            node.meta["val"] = value
        a, gate, up, down, b_gate, b_up, b_down = nodes
        call = graph.call_function(
            torch.ops.braze.mlp.default, (a, [gate, up], down, [b_gate, b_up], b_down), {"activation": SILU}
        )
        assert choose.choose_mlp(call, "auto")[0] == "triton"
        with torch._inductor.config.patch(max_autotune_gemm=True):
            assert choose.choose_mlp(call, "auto")[0] == "aten"
            assert choose.choose_mlp(call, "triton")[0] == "triton"
        assert choose.choose_mlp(call, "cpp")[0] == choose.choose_mlp(call, "aten")[0] == "aten"
