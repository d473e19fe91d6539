"""The C++ experts kernel on weights that are E tensors, against the float64 reference on the same weights stacked."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import braze
from braze.kernels import reference
from braze.kernels.cpp import moe_separate
from braze.kernels.spec import MoeSpec
from tests.harness import assert_close

EXPERTS, HIDDEN, INNER = 5, 71, 37
BOUND = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def routed(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(tokens)
    weights, ids = torch.rand(tokens, EXPERTS, generator=gen).topk(2)
    return torch.randn(tokens, HIDDEN, generator=gen).to(dtype), ids, weights


def matrices(spec: MoeSpec, dtype: torch.dtype, apart: bool, bias: bool) -> Lists:
    """(w1, w2, b1, b2), each expert's in tensors of their own; gate and up too where `apart`."""
    gen = torch.Generator().manual_seed(7)
    columns = INNER * (1 if spec.layout == "none" or apart else 2)
    rand = lambda *s: (torch.randn(s, generator=gen) / 6).to(dtype)  # noqa: E731
    turned = (lambda w: w.mT.contiguous()) if spec.transposed else (lambda w: w)
    firsts = EXPERTS * (2 if apart else 1)
    return (
        [turned(rand(columns, HIDDEN)) for _ in range(firsts)],
        [turned(rand(HIDDEN, INNER)) for _ in range(EXPERTS)],
        [rand(columns) for _ in range(firsts)] if bias else [],
        [rand(HIDDEN) for _ in range(EXPERTS)] if bias else [],
    )


def exact(x: Tensor, ids: Tensor, weights: Tensor, lists: Lists, spec: MoeSpec) -> Tensor:
    """The reference; gate and up that lie apart are put together as halves."""
    w1, w2, b1, b2 = ([t.double() for t in each] for each in lists)
    if len(w1) > len(w2):
        w1 = [torch.cat(pair, 1 if spec.transposed else 0) for pair in zip(w1[::2], w1[1::2], strict=True)]
        b1 = [torch.cat(pair) for pair in zip(b1[::2], b1[1::2], strict=True)]
        spec = MoeSpec(spec.activation, "halves", spec.transposed, spec.weight_on, spec.scale)
    biases = [torch.stack(b) if b else None for b in (b1, b2)]
    return reference.moe(x.double(), ids, weights.double(), torch.stack(w1), torch.stack(w2), *biases, spec)


#: dtype, layout, whether gate and up lie apart, whether transposed, whether there are biases: each is a kernel to build.
FORMS = (
    (torch.float32, "halves", True, False, True),
    (torch.bfloat16, "halves", True, True, False),
    (torch.bfloat16, "halves", False, False, True),
    (torch.float32, "interleaved", False, True, True),
    (torch.float16, "none", False, False, False),
)


@pytest.mark.parametrize(("dtype", "layout", "apart", "transposed", "bias"), FORMS)
def test_storage(dtype: torch.dtype, layout: Any, apart: bool, transposed: bool, bias: bool) -> None:
    activation = "g*sigmoid(g)" if layout == "none" else "g*u*sigmoid(g)"
    spec = MoeSpec(activation, layout, transposed, "input" if bias else "output")
    lists = matrices(spec, dtype, apart, bias)
    for tokens in (1, 7, 150):
        given = routed(tokens, dtype)
        assert moe_separate.supports(*given, *lists, spec) is None
        assert_close(moe_separate.run(*given, *lists, spec), exact(*given, lists, spec), BOUND[dtype])


def test_experts_that_differ_are_refused() -> None:
    lists, given = matrices(MoeSpec(), torch.float32, True, False), routed(3, torch.float32)
    lists[0][3] = lists[0][3].T.contiguous().T
    reason = moe_separate.supports(*given, *lists, MoeSpec())
    assert reason is not None and "w1" in reason and "strides" in reason
    got = torch.ops.braze.moe_separate(*given, *lists)
    assert_close(got, exact(*given, lists, MoeSpec()), 3e-6)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lists = matrices(MoeSpec(), torch.float32, True, True)
        for kind, tensors in zip(("w1", "w2", "b1", "b2"), self.lists, strict=True):
            self.register_module(kind, torch.nn.ParameterList(tensors))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        lists = [[kind[i] for i in range(len(kind))] for kind in (self.w1, self.w2, self.b1, self.b2)]
        return torch.ops.braze.moe_separate(x * 2, ids, weights, *lists) + 1  # type: ignore[no-any-return]

    def exact(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return exact(x * 2, ids, weights, self.lists, MoeSpec()) + 1


@pytest.mark.parametrize("options", ({}, {"cpp_wrapper": True}), ids=str)
def test_part_of_inductors_code(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object) -> None:
        raise AssertionError("the op was called through Python")

    monkeypatch.setattr(moe_separate, "run", run)
    torch._dynamo.reset()
    model, given = Layer(), routed(9, torch.float32)
    with torch.no_grad():
        assert_close(torch.compile(model, backend="braze", options=options)(*given), model.exact(*given), 3e-6)


def test_package(tmp_path: Path) -> None:
    model, given = Layer().eval(), routed(9, torch.float32)
    with torch.no_grad():
        file = braze.package(torch.export.export(model, given), tmp_path / "experts.pt2")
        assert_close(torch._inductor.aoti_load_package(file)(*given), model.exact(*given), 3e-6)
