"""Vendors' routers and rotations, by stand-ins of the same schemas: what they take, why not, and the results."""

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from braze.kernels import reference
from braze.kernels.spec import RopeSpec, RouteSpec
from braze.kernels.triton import compat
from braze.kernels.triton import route as triton_route
from braze.kernels.vendor import providers, rope, route
from tests import vendor_ops as ops
from tests.harness import assert_close
from tests.test_vendor import run

BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def xe2(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU tensors are taken for an Arc B's, for which braze's own kernels are not installed."""
    for module in (compat, triton_route):
        monkeypatch.setattr(module, "HAVE_TRITON", False)
    monkeypatch.setitem(compat.simulated, "cpu", compat.Simulated("xpu", "bmg", 20))
    torch.manual_seed(0)
    yield


def loaded(name: str) -> AbstractContextManager[list[Any]]:
    """The stand-in of a vendor's op by its short name."""
    namespace, schema, body = {
        "sgl softmax": ("sgl_kernel", ops.SGL_TOPK, ops.sgl_topk),
        "sgl sigmoid": ("sgl_kernel", ops.SGL_SIGMOID, ops.sgl_sigmoid),
        "sgl gate": ("sgl_kernel", ops.SGL_GATE[0], ops.sgl_gate(0)),
        "sgl old gate": ("sgl_kernel", ops.SGL_GATE[1], ops.sgl_gate(1)),
        "sgl rotary": ("sgl_kernel", ops.SGL_ROTARY, ops.rotary),
        **{f"vllm softmax {n}": ("_moe_C", s, ops.vllm_topk("softmax")) for n, s in enumerate(ops.VLLM_SOFTMAX)},
        **{f"vllm sigmoid {n}": ("_moe_C", s, ops.vllm_topk("sigmoid")) for n, s in enumerate(ops.VLLM_SIGMOID)},
        "vllm grouped": ("_moe_C", ops.VLLM_GROUPED_TOPK, ops.vllm_grouped_topk),
        "vllm rotary": ("_C", ops.VLLM_ROTARY, ops.vllm_rotary),
        "ipex half": ("torch_ipex", ops.IPEX_ROTATE[True], ops.ipex_rotate(True)),
        "ipex two": ("torch_ipex", ops.IPEX_ROTATE[False], ops.ipex_rotate(False)),
        "ipex softmax": ("torch_ipex", ops.IPEX_SOFTMAX, ops.ipex_softmax),
    }[name]
    return ops.loaded(namespace, schema, body)


GROUPS: dict[str, Any] = {"groups": 4, "top_groups": 2, "select_on": "scores"}
ROUTERS = [
    ("sgl sigmoid", "sgl_kernel", RouteSpec(4, "sigmoid", renorm="add", eps=1e-20, select_on="scores"), BF16, 64, True),
    ("sgl sigmoid", "sgl_kernel", RouteSpec(1, "sigmoid", out_dtype=BF16), F32, 16, False),
    ("sgl gate", "sgl_kernel", RouteSpec(4, "sigmoid", renorm="add", scale=2.5, group_score="top2", **GROUPS), F32, 128, True),
    ("sgl gate", "sgl_kernel", RouteSpec(4, "softmax", renorm="add", group_score="top2", **GROUPS), F32, 128, True),
    ("sgl old gate", "sgl_kernel", RouteSpec(6, "sigmoid", renorm="add", group_score="top2", **GROUPS), F32, 128, False),
    ("vllm softmax 0", "vllm_xpu", RouteSpec(4, renorm="add"), F32, 60, False),
    ("vllm softmax 0", "vllm_xpu", RouteSpec(3, renorm="clamp", eps=1e-9, select_on="scores"), F32, 60, True),
    ("vllm softmax 1", "vllm_xpu", RouteSpec(4, select_on="scores"), F32, 32, True),
    ("vllm softmax 2", "vllm_xpu", RouteSpec(4, renorm="add"), F32, 32, False),
    ("vllm sigmoid 0", "vllm_xpu", RouteSpec(12, "sigmoid", renorm="add", select_on="scores"), F32, 48, True),
    ("vllm sigmoid 1", "vllm_xpu", RouteSpec(2, "sigmoid"), F32, 48, False),
    ("vllm grouped", "vllm_xpu", RouteSpec(4, "sigmoid", renorm="add", eps=1e-20, group_score="top2", **GROUPS), F32, 64, True),
    ("vllm grouped", "vllm_xpu", RouteSpec(4, "sigmoid", **GROUPS), F32, 64, False),
    ("ipex softmax", "ipex", RouteSpec(2, renorm="add", ids_dtype=torch.int32), BF16, 8, False),
]  # fmt: skip


@pytest.mark.parametrize(("op", "provider", "spec", "dtype", "experts", "bias"), ROUTERS, ids=str)
def test_routers(op: str, provider: str, spec: RouteSpec, dtype: torch.dtype, experts: int, bias: bool) -> None:
    logits = (torch.randn(3, 5, experts) * 2).to(dtype)
    added = [torch.randn(experts) / 4] if bias else []
    attributes = {name: getattr(spec, name) for name in RouteSpec.__dataclass_fields__}
    f = lambda *args: torch.ops.braze.route(*args, **attributes)  # noqa: E731
    with loaded(op) as calls:
        (weights, ids), choice = run(f, {"router": provider}, logits, *added)
    assert choice == (provider, "asked for") and len(calls) == 1
    exact = dataclasses.replace(spec, out_dtype=torch.float64)
    want, chosen = reference.route(logits.double(), added[0].double() if bias else None, exact)
    assert ids.dtype == spec.ids_dtype and weights.dtype == (spec.out_dtype or dtype)
    if dtype == F32:  # equal 16-bit logits may come in either order
        assert torch.equal(ids.long(), chosen)
    assert_close(weights, want, 2e-6 if weights.dtype == F32 else 5e-3)


def test_reasons_of_routers() -> None:
    def reason(op: str, provider: str, spec: RouteSpec, logits: Tensor, bias: Tensor | None = None) -> str:
        with loaded(op):
            return str(route.supports(logits, bias, spec, provider))

    wide, narrow = torch.zeros(3, 128), torch.zeros(3, 128, dtype=BF16)
    grouped = RouteSpec(4, "sigmoid", renorm="add", group_score="top2", **GROUPS)
    zeros = torch.zeros(128)
    assert "count as zero" in reason("vllm grouped", "vllm_xpu", dataclasses.replace(grouped, closed="zero"), wide)
    assert "on logits" in reason("vllm softmax 0", "vllm_xpu", RouteSpec(4), wide, zeros)
    assert "every token gets" in reason("sgl sigmoid", "sgl_kernel", RouteSpec(4, "sigmoid", shared=1), wide)
    assert "softmax with a bias" in reason("sgl softmax", "sgl_kernel", RouteSpec(4, select_on="scores"), narrow, zeros)
    assert "more than 8" in reason("sgl sigmoid", "sgl_kernel", RouteSpec(9, "sigmoid"), wide)
    assert "512 experts, more" in reason("sgl sigmoid", "sgl_kernel", RouteSpec(4, "sigmoid"), torch.zeros(3, 512))
    assert "sqrtsoftplus" in reason("sgl sigmoid", "sgl_kernel", RouteSpec(4, "sqrtsoftplus"), wide)
    assert "no op sgl_kernel::moe_fused_gate" in reason("sgl sigmoid", "sgl_kernel", grouped, wide)
    assert "to which scores are rounded" in reason("sgl gate", "sgl_kernel", grouped, narrow)
    assert "64 experts in 4 groups" in reason("sgl gate", "sgl_kernel", grouped, torch.zeros(3, 64))
    assert "by their largest" in reason("sgl gate", "sgl_kernel", dataclasses.replace(grouped, group_score="max"), wide)
    assert "sum alone" in reason("sgl gate", "sgl_kernel", dataclasses.replace(grouped, eps=1e-20), wide)
    softmax = dataclasses.replace(grouped, scoring="softmax")
    assert reason("sgl gate", "sgl_kernel", softmax, wide) == "None"
    assert "does not know" in reason("sgl old gate", "sgl_kernel", softmax, wide)
    assert "to which scores are rounded" in reason("vllm sigmoid 0", "vllm_xpu", RouteSpec(4, "sigmoid"), narrow)
    assert "does not take" in reason("vllm softmax 2", "vllm_xpu", RouteSpec(4, select_on="scores"), wide, zeros)
    assert "by top2, where the op does by max" in reason("vllm grouped", "vllm_xpu", grouped, wide)
    assert "not sigmoid" in reason("vllm grouped", "vllm_xpu", softmax, wide)
    assert "512 experts in groups" in reason("vllm grouped", "vllm_xpu", grouped, torch.zeros(3, 512), torch.zeros(512))
    assert "128 experts, not an even number up to 32" in reason("ipex softmax", "ipex", RouteSpec(2), narrow)
    assert "3 experts a token" in reason("ipex softmax", "ipex", RouteSpec(3), narrow[:, :8])
    assert "not softmax" in reason("ipex softmax", "ipex", RouteSpec(2, "sigmoid"), narrow[:, :8])


ROTATIONS = [
    ("sgl rotary", "sgl_kernel", RopeSpec(32), 32, BF16, False),
    ("sgl rotary", "sgl_kernel", RopeSpec(16, layout_in="interleaved", layout_out="interleaved"), 32, F32, False),
    ("vllm rotary", "vllm_xpu", RopeSpec(32, inverse=True), 32, F32, False),
    ("vllm rotary", "vllm_xpu", RopeSpec(16), 48, F32, False),
    ("ipex half", "ipex", RopeSpec(32), 32, BF16, True),
    ("ipex two", "ipex", RopeSpec(64, layout_in="interleaved", layout_out="interleaved"), 64, F32, True),
]


@pytest.mark.parametrize("shape", ["bhsd", "bshd", "shd"])
@pytest.mark.parametrize(("op", "provider", "spec", "size", "dtype", "wide"), ROTATIONS, ids=str)
def test_rotations(
    op: str, provider: str, spec: RopeSpec, size: int, dtype: torch.dtype, wide: bool, shape: str
) -> None:
    x = torch.randn({"bhsd": (2, 3, 5, size), "bshd": (2, 5, 3, size), "shd": (5, 3, size)}[shape]).to(dtype)
    angle = torch.randn(5, spec.rotary_dim if wide else spec.rotary_dim // 2)
    angle = angle.unsqueeze({"bhsd": 0, "bshd": 1, "shd": 1}[shape])
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    attributes = {name: getattr(spec, name) for name in RopeSpec.__dataclass_fields__}
    f = lambda *args: torch.ops.braze.rope(*args, **attributes) + 0  # noqa: E731
    with loaded(op) as calls:
        before = x.clone()
        got, choice = run(f, {"rope": provider}, x, cos, sin)
    assert choice == (provider, "asked for") and len(calls) == 1 and torch.equal(x, before)
    want = reference.rope(x.double(), cos.double(), sin.double(), spec)
    assert got.dtype == dtype
    assert_close(got, want, 2e-6 if dtype == F32 else 5e-3)


def test_reasons_of_rotations() -> None:
    def reason(
        op: str, provider: str, spec: RopeSpec, dtype: torch.dtype = F32, width: int = 16, heads: int = 1
    ) -> str:
        x, table = torch.zeros(2, 3, 5, 32, dtype=dtype), torch.zeros(2, heads, 5, width)
        with loaded(op):
            return str(rope.supports(x, table, table, spec, provider))

    assert reason("vllm rotary", "vllm_xpu", RopeSpec(32)) == "None"
    assert "rounds at every step" in reason("vllm rotary", "vllm_xpu", RopeSpec(32), BF16)
    assert "two columns a pair" in reason("vllm rotary", "vllm_xpu", RopeSpec(32), width=32)
    assert "tables in torch.float32 for x" in reason("sgl rotary", "sgl_kernel", RopeSpec(32), BF16)
    assert "first element" in reason("sgl rotary", "sgl_kernel", RopeSpec(16, start=16), width=8)
    assert "pair layout" in reason("sgl rotary", "sgl_kernel", RopeSpec(32, layout_in="interleaved"))
    assert "change of dtype" in reason("sgl rotary", "sgl_kernel", RopeSpec(32, out_dtype=BF16))
    assert "from head to head" in reason("sgl rotary", "sgl_kernel", RopeSpec(32), heads=3)
    assert "no op torch_ipex::apply_rotary_embedding_half" in reason("ipex two", "ipex", RopeSpec(32), width=32)
    assert reason("ipex half", "ipex", RopeSpec(32), BF16, width=32) == "None"
    assert "a column a pair" in reason("ipex half", "ipex", RopeSpec(32))
    assert "16 of 32 elements" in reason("ipex half", "ipex", RopeSpec(16), width=16)


def test_a_model_turns_by_ipex() -> None:
    """Llama, whose tables have two columns a pair, through torch.compile."""
    from tests import tiny

    model, tokens = tiny.build("llama"), tiny.tokens(1, 6)
    options = {"kernel": {"rope": "ipex"}, "strict": True, "require": ["rope"]}
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True), loaded("ipex half") as calls:
        got = torch.compile(model, backend="braze", options=options)(tokens, use_cache=False).logits
        want = tiny.as_float64(model)(tokens, use_cache=False).logits
    assert len(calls) == 4  # q and k of two layers
    assert_close(got, want, 1e-5)


def test_all_are_looked_for() -> None:
    with loaded("ipex half"), loaded("vllm sigmoid 1"), loaded("sgl old gate"):
        found = dict(providers.present())
    assert found["torch_ipex::apply_rotary_embedding_half"] == "found, schema 1"
    assert found["_moe_C::topk_sigmoid"] == "found, schema 2"
    assert found["sgl_kernel::moe_fused_gate"] == "found, schema 2"
    assert found["_C::rotary_embedding"] == "no op _C::rotary_embedding is loaded"
