"""The C++ experts kernel inside compiled programs: threads, freezing, inference mode, wrappers, packages, no compiler."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import braze
from braze.kernels import reference
from braze.kernels.spec import MoeSpec
from tests.harness import assert_close

GELU = "0.5*g*u*(1 + erf(0.70710678*g))"


class Experts(torch.nn.Module):
    """Two expert layers with different activations and storage between pointwise ops, as `braze::moe` itself."""

    def __init__(self) -> None:
        super().__init__()
        rand = lambda *s: torch.nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(s[1])) / 8)  # noqa: E731
        self.a1, self.a2 = rand(4, 96, 64), rand(4, 64, 48)
        self.b1, self.b2, self.bias = rand(4, 64, 96), rand(4, 48, 64), rand(4, 96)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        moe = torch.ops.braze.moe
        y = moe(x * 2, ids, weights, self.a1, self.a2) + 1
        return (
            moe(y, ids, weights, self.b1, self.b2, self.bias, activation=GELU, layout="interleaved", transposed=True)
            - 1
        )  # type: ignore[no-any-return]

    def exact(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        a1, a2, b1, b2, bias = (p.detach().double() for p in (self.a1, self.a2, self.b1, self.b2, self.bias))
        y = reference.moe(x.double() * 2, ids, weights.double(), a1, a2, None, None, MoeSpec()) + 1
        spec = MoeSpec(GELU, "interleaved", True)
        return reference.moe(y, ids, weights.double(), b1, b2, bias, None, spec) - 1


def inputs(tokens: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(tokens)
    weights, ids = torch.rand(tokens, 4, generator=gen).topk(2)
    return torch.randn(tokens, 64, generator=gen), ids, weights


def compiled(model: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(model, backend="braze", **settings)


@pytest.fixture
def no_whole_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op itself must not run: the kernel is part of the generated code."""
    from braze.kernels.cpp import moe

    def run(*_: object) -> None:
        raise AssertionError("the op was called through Python")

    monkeypatch.setattr(moe, "run", run)


@pytest.mark.parametrize("settings", ({}, {"options": {"cpp_wrapper": True}}, {"options": {"freezing": True}}), ids=str)
@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_settings_of_inductor(settings: Any, mode: Any, no_whole_op: None) -> None:
    model = Experts().eval()
    with mode():
        assert_close(compiled(model, **settings)(*inputs()), model.exact(*inputs()), 3e-6)


def test_any_number_of_tokens(no_whole_op: None) -> None:
    model = Experts()
    run = compiled(model, dynamic=True)
    with torch.no_grad():
        for tokens in (3, 9, 50):
            assert_close(run(*inputs(tokens)), model.exact(*inputs(tokens)), 3e-6)


def test_threads_changed_between_calls(no_whole_op: None) -> None:
    model = Experts()
    run = compiled(model)
    before = torch.get_num_threads()
    try:
        with torch.no_grad():
            results = []
            for threads in (2, 1, 3):
                torch.set_num_threads(threads)
                results.append(run(*inputs()))
    finally:
        torch.set_num_threads(before)
    assert_close(results[0], model.exact(*inputs()), 3e-6)
    assert all(torch.equal(r, results[0]) for r in results)


def test_weights_changed_in_place_are_seen(no_whole_op: None) -> None:
    model = Experts()
    run = compiled(model)
    with torch.no_grad():
        run(*inputs())
        model.a1.mul_(-1)
        assert_close(run(*inputs()), model.exact(*inputs()), 3e-6)


def test_views_of_one_tensor(no_whole_op: None) -> None:
    """Weights that are slices of one buffer: the pointers carry the offsets."""
    both = torch.randn(9, 96, 64, generator=torch.Generator().manual_seed(1)) / 8

    def run(both: Tensor, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y = torch.ops.braze.moe(x, ids, weights, both[1:5], both[5:, :64, :48])
        return y.relu()  # type: ignore[no-any-return]

    with torch.no_grad():
        x, ids, weights = inputs()
        wide = (x.double(), ids, weights.double(), both[1:5].double(), both[5:, :64, :48].double())
        assert_close(compiled(run)(both, x, ids, weights), reference.moe(*wide, None, None, MoeSpec()).relu(), 3e-6)


def test_what_the_kernel_refuses_stays_an_op() -> None:
    model = Experts().double()
    x, ids, weights = inputs()
    with torch.no_grad():
        assert_close(compiled(model)(x.double(), ids, weights.double()), model.exact(x, ids, weights), 1e-6)


LOAD = """
import sys, torch
run = torch._inductor.aoti_load_package(sys.argv[1])
torch.save(run(*torch.load(sys.argv[2])), sys.argv[2])
assert "braze" not in sys.modules
"""


def test_package_needs_no_braze(tmp_path: Path) -> None:
    model = Experts().eval()
    with torch.no_grad():
        program = torch.export.export(model, inputs())
    file = braze.package(program, tmp_path / "experts.pt2")
    torch.save(inputs(), tmp_path / "tensors.pt")
    subprocess.run([sys.executable, "-c", LOAD, file, str(tmp_path / "tensors.pt")], check=True, cwd="/", timeout=120)
    assert_close(torch.load(tmp_path / "tensors.pt"), model.exact(*inputs()), 3e-6)


def test_package_of_a_model(tmp_path: Path) -> None:
    """A model as transformers writes it: its exported graph is fused too, and the package gives its logits."""
    from tests.tiny import as_float64, build, tokens

    model = build("mixtral", experts="grouped_mm")

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids, use_cache=False).logits  # type: ignore[no-any-return]

    with torch.no_grad():
        program = torch.export.export(Logits(), (tokens(),), strict=False)
        with braze.collect() as reports:
            file = braze.package(program, tmp_path / "model.pt2", {"require": ["moe", "rope"]})
        assert [f.kernel for r in reports for f in r.sites if f.kind == "moe"] == ["cpp", "cpp"]
        got = torch._inductor.aoti_load_package(file)(tokens())
        assert_close(got, as_float64(model)(tokens(), use_cache=False).logits, 2e-5)


NO_COMPILER = """
import torch, braze
from braze.kernels import reference
from braze.kernels.spec import MoeSpec
w1, w2 = torch.randn(4, 96, 64), torch.randn(4, 64, 48)
weights, ids = torch.rand(5, 4).topk(2)
x = torch.randn(5, 64)
for _ in range(2):
    got = torch.ops.braze.moe(x, ids, weights, w1, w2)
want = reference.moe(*(t.double() if t.is_floating_point() else t for t in (x, ids, weights, w1, w2)), None, None, MoeSpec())
assert (got - want).abs().max() < 1e-5 * want.abs().max(), "wrong"
"""


def test_without_a_compiler(tmp_path: Path) -> None:
    """The op runs as ATen ops and says so once."""
    env = {**os.environ, "CXX": str(tmp_path / "no-such-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", NO_COMPILER], env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("experts run as ATen ops") == 1, run.stderr
