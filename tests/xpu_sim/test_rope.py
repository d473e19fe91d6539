"""The rotary kernel as XPU code: every form it takes, on both kinds of GPU, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from braze import xpu_sim
from braze.backend import collect
from braze.kernels.spec import RopeSpec
from braze.kernels.triton import rope
from braze.lowering import lower, rotations
from tests import rope_models, tiny
from tests.test_triton_rope import SPECS, compare, inputs, tables

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


@pytest.mark.parametrize(("name", "form"), [("qwen3", ", weight)"), ("gemma3", ", 1 + weight)"), ("olmo2", "half")])
def test_one_launch_a_layer_norms_of_q_and_k_included(monkeypatch: pytest.MonkeyPatch, name: str, form: str) -> None:
    """The launches inside a model's graph, as on a GPU, which these tensors are not on."""
    monkeypatch.setattr(lower, "choose_rope", lambda call, forced: ("triton", "", rotations.turn(call)))
    monkeypatch.setattr(rotations.triton_rope, "supports", lambda *args: None)
    model, ids = rope_models.build(name, layers=2), tiny.tokens()
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        exact = tiny.as_float64(model)(ids, use_cache=False).logits
        torch._dynamo.reset()
        with xpu_sim.compiled_graphs("pvc"), xpu_sim.record() as launches, collect() as reports:
            got = torch.compile(model, backend="braze", dynamic=False)(ids, use_cache=False).logits
    assert all(s.form.endswith(form) for s in reports[0].sites) and len(reports[0].sites) == 4
    assert [x.kernel for x in launches if "rope" in x.kernel] == ["rope_kernel"] * 2
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5)
