"""The rotary kernel as XPU code: every form it takes, on both kinds of GPU, against float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from braze import xpu_sim
from braze.backend import collect
from braze.kernels.spec import RopeSpec
from braze.kernels.triton import rope
from tests import rope_models, tiny
from tests.harness import assert_close
from tests.test_rope_sites import PASSED
from tests.test_triton_rope import ROWS, SPECS, compare, compare_one_batch, compare_rows, inputs, tables

TARGETS = ["pvc", "generic"]


@pytest.mark.parametrize(("spec", "size"), SPECS, ids=str)
@pytest.mark.parametrize("wide", [True, False], ids=["R", "R/2"])
@pytest.mark.parametrize("target", TARGETS)
def test_every_form(target: str, spec: RopeSpec, size: int, wide: bool) -> None:
    width = spec.rotary_dim if wide else spec.rotary_dim // 2
    forms = [("bhsd", torch.bfloat16), ("packed", torch.float16)] if wide else [("bshd", torch.float32)]
    for n, (layout, dtype) in enumerate(forms):
        q, k = inputs(5, size, layout, dtype, n), inputs(2, size, layout, dtype, n + 9)
        with xpu_sim.device(target), xpu_sim.record() as launches:
            compare(q, k, *tables(width, dtype if wide else torch.float32, 1 + n % 2), spec)
        assert [launch.kernel for launch in launches] == ["rope_kernel"]


@pytest.mark.parametrize("near", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_one_batch_and_heads_far_apart(monkeypatch: pytest.MonkeyPatch, target: str, near: bool) -> None:
    monkeypatch.setattr(rope, "_near", lambda *_: near)
    with xpu_sim.device(target):
        compare_one_batch()


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("target", TARGETS)
def test_in_place_and_blocks_of_heads(target: str, layout: Any) -> None:
    spec = RopeSpec(32, start=16, layout_in=layout, layout_out=layout)
    q, k = inputs(5, 64, "packed", torch.float32, 1), inputs(3, 64, "packed", torch.float32, 2)
    with xpu_sim.device(target):
        compare(q, k, *tables(32, torch.float32, 1), spec, in_place=True, tile=128)


@pytest.mark.parametrize(
    ("layout", "add_one", "size", "start"), [("half", True, 64, 0), ("interleaved", False, 80, 16)]
)
@pytest.mark.parametrize("target", TARGETS)
def test_norm_before_the_rotation(target: str, layout: Any, add_one: bool, size: int, start: int) -> None:
    spec = RopeSpec(64, start=start, layout_in=layout, layout_out=layout)
    weights = torch.randn(2, size)
    q, k = inputs(4, size, "bshd", torch.float32, 4), inputs(2, size, "bshd", torch.float32, 5)
    cos, sin = tables(64, torch.float32, 2)
    with xpu_sim.device(target):
        compare(q, k, cos, sin, spec, rope.Norm(1e-6, weights[0], weights[1], add_one))
        compare(q, None, cos, sin, spec, rope.Norm(1e-5))


@pytest.mark.parametrize(("layout", "index"), ROWS, ids=str)
def test_rows_of_a_cache(layout: str, index: Tensor | None) -> None:
    for target, rotary in zip(TARGETS, (32, 24), strict=True):
        with xpu_sim.device(target):
            compare_rows(layout, index, 32, rotary)


@pytest.mark.parametrize(("name", "form"), [("qwen3", ", weight)"), ("gemma3", ", 1 + weight)"), ("olmo2", "half")])
def test_one_launch_a_layer_norms_of_q_and_k_included(name: str, form: str) -> None:
    """The launches inside a model's graph, as on a GPU."""
    model, ids = rope_models.build(name, layers=2), tiny.tokens()
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        exact = tiny.as_float64(model)(ids, use_cache=False).logits
        torch._dynamo.reset()
        with xpu_sim.compiled_graphs("pvc"), xpu_sim.record() as launches, collect() as reports:
            got = torch.compile(model, backend="braze", dynamic=False)(ids, use_cache=False).logits
    assert all(s.form.endswith(form) for s in reports[0].sites) and len(reports[0].sites) == 4
    assert [x.kernel for x in launches if "rope" in x.kernel] == ["rope_kernel"] * 2
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def with_tail(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.cat((turned(x[..., :16], cos, sin), x[..., 16:]), -1)


def pairs_to_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return turned(x.unflatten(-1, (-1, 2)).transpose(-1, -2).reshape(x.shape), cos, sin)


def complex_product(x: Tensor, table: Tensor) -> Tensor:
    product = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * table[:, None]
    return torch.view_as_real(product).flatten(-2)


def with_tables_of_its_own(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return turned(x, cos.cos().unsqueeze(0), sin.sin().unsqueeze(0))


def preamble(rotate: Callable[..., Tensor], q: Tensor, k: Tensor, *tables: Tensor) -> tuple[Tensor, Tensor]:
    """q and k [1, T, H * D] -> heads [1, H, T, D], rotated."""
    q, k = (rotate(x.unflatten(-1, (-1, 32)).transpose(1, 2), *tables) for x in (q, k))
    return q, k


@pytest.mark.parametrize("rotate", [with_tail, pairs_to_halves, complex_product, with_tables_of_its_own])
def test_one_launch_for_q_and_k_and_nothing_else(rotate: Callable[..., Tensor]) -> None:
    """No copy of a tail, of pairs put in another order, of a result in another layout, or of a complex table's parts."""
    q, k = torch.randn(1, 6, 3 * 32), torch.randn(1, 6, 2 * 32)
    width = 16 if rotate is with_tail else 32
    angle = torch.cat((torch.rand(6, width // 2),) * 2, -1) * 6
    tables = (torch.polar(torch.ones(1, 6, 16), angle[None, :, :16]),)
    if rotate is not complex_product:
        tables = (angle, angle) if rotate is with_tables_of_its_own else (angle.cos(), angle.sin())
    exact = preamble(rotate, *(t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (q, k, *tables)))
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        torch._dynamo.reset()
        with xpu_sim.compiled_graphs("pvc"), xpu_sim.record() as launches:
            compiled = torch.compile(partial(preamble, rotate), backend="braze", dynamic=False)
            got = compiled(q, k, *tables)
    ropes = [x.kernel for x in launches if x.kernel == "rope_kernel"]
    made = 2 if rotate is with_tables_of_its_own else 0  # cos and sin themselves: once, not again for k
    assert len(ropes) == 1 and len(launches) - 1 <= made
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
        assert a.stride()[1:] == b.stride()[1:]


NOT_THE_KERNELS = {"coefficients of a head": "vary from head to head", "float64": "only float16, bfloat16 and float32"}


def test_wherever_tables_and_heads_are_from() -> None:
    """mrope, yarn, positions of both widths, rows of a cache, packed projections, [T, H, D], x alone ...: all in one graph."""
    cases = {name: case for name, case in PASSED.items() if not name.startswith("two ")}
    flat = [t for _, inputs, _ in cases.values() for t in inputs]

    def graph(*tensors: Tensor) -> list[Any]:
        left, results = list(tensors), []
        for rotate, args, _ in cases.values():
            given, left = left[: len(args)], left[len(args) :]
            result = rotate(*given)
            results += result if isinstance(result, tuple) else (result,)
        return results

    exact = graph(*(t.double() if t.is_floating_point() else t for t in flat))
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        torch._dynamo.reset()
        with xpu_sim.compiled_graphs("pvc"), xpu_sim.record() as launches, collect() as reports:
            got = torch.compile(lambda *a: graph(*a), backend="braze", dynamic=False)(*flat)
    for a, b in zip(got, exact, strict=True):
        assert_close(a, b, 5e-6)
    (report,) = reports
    others = [s.why for s in report.sites if s.kernel != "triton"]
    assert len(report.sites) == sum(len(forms) for _, _, forms in cases.values())
    assert len(others) == len(NOT_THE_KERNELS) and all(
        any(w in why for why in others) for w in NOT_THE_KERNELS.values()
    )
    made = sum(x.kernel == "rope_kernel" for x in launches)
    pairs = 1  # q and k of one packed projection
    assert made == len(report.sites) - len(others) - pairs
