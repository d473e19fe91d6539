"""Vendors' kernels, by stand-ins of the same schemas: what is found, what is refused and why, and the results."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

import braze
from braze.doctor import checks
from braze.explain import Report
from braze.kernels import reference
from braze.kernels.spec import MoeSpec, RouteSpec
from braze.kernels.triton import compat
from braze.kernels.triton import route as triton_route
from braze.kernels.vendor import activation, detect, moe, route, sgl_kernel, vllm_xpu
from braze.lowering import inductor, vendor
from braze.lowering.lower import lower
from tests import vendor_ops
from tests.harness import assert_close

BF16 = torch.bfloat16
SILU, GELU_ERF = "g*u*sigmoid(g)", "0.5*g*u*(1 + erf(0.70710678*g))"
GELU_TANH = "0.5*g*u*(1 + tanh(0.79788456*g*(1 + 0.044715*g*g)))"
OSS = "Min(7.0, g)*sigmoid(1.702*Min(7.0, g))*(Max(-7.0, Min(7.0, u)) + 1)"


@pytest.fixture(autouse=True)
def xe2(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors are taken for an Arc B's, for which braze's own kernels are not installed."""
    for module in (compat, triton_route):
        monkeypatch.setattr(module, "HAVE_TRITON", False)
    monkeypatch.setitem(compat.simulated, "cpu", compat.Simulated("xpu", "bmg", 20))


@pytest.fixture
def sgl() -> Iterator[list[Any]]:
    with vendor_ops.loaded("sgl_kernel", vendor_ops.SGL_GROUPED_MM, vendor_ops.sgl_grouped_mm) as calls:
        yield calls


@pytest.fixture
def sgl_topk() -> Iterator[list[Any]]:
    with vendor_ops.loaded("sgl_kernel", vendor_ops.SGL_TOPK, vendor_ops.sgl_topk) as calls:
        yield calls


def vllm(form: int) -> Any:
    return vendor_ops.loaded("_xpu_C", vendor_ops.VLLM_GROUPED_MM[form], vendor_ops.vllm_grouped_mm(form))


def compiled(f: Any, kernel: dict[str, str], dynamic: bool | None = None) -> tuple[Any, Any]:
    """(compiled f, list to which each graph's (kernel, why) go): calls of semantic ops in f get their kernels as finds do."""
    choices: list[tuple[str, str]] = []

    def transform(graph: torch.fx.Graph) -> None:
        ops = (torch.ops.braze.moe.default, torch.ops.braze.route.default, torch.ops.braze.rope.default)
        choices.extend(lower([n for op in ops for n in graph.find_nodes(op="call_function", target=op)], kernel))
        graph.lint()

    def backend(gm: Any, inputs: Any) -> Any:
        return inductor.compile_graph(gm, inputs, transform, "test", {"force_disable_caches": True})

    torch._dynamo.reset()
    return torch.compile(f, backend=backend, dynamic=dynamic), choices


def run(f: Any, kernel: dict[str, str], *args: Tensor) -> tuple[Any, tuple[str, str]]:
    """(result, (kernel, why)) of a function with one call of a semantic op."""
    with torch.no_grad():
        call, choices = compiled(f, kernel)
        result = call(*args)
    (choice,) = choices
    return result, choice


def experts(transposed: bool, biases: bool, layout: str = "halves", dtype: torch.dtype = BF16, count: int = 8) -> Any:
    """x, ids of which some name no expert, weights, and experts of hidden size 64 and inner size 32."""
    gen = torch.Generator().manual_seed(0)
    rand = lambda *s: (torch.randn(s, generator=gen) / 4).to(dtype)  # noqa: E731
    columns = 32 if layout == "none" else 64
    x, w1, w2 = rand(11, 64) * 4, rand(count, columns, 64), rand(count, 64, 32)
    if transposed:
        w1, w2 = w1.transpose(1, 2).contiguous(), w2.transpose(1, 2).contiguous()
    weights, ids = torch.rand(11, count, generator=gen).topk(3)
    ids[2, 1], ids[7, 0] = -1, count
    b1, b2 = (rand(count, columns), rand(count, 64)) if biases else (None, None)
    return x, ids, weights, w1, w2, b1, b2


def exact(inputs: Any, spec: MoeSpec) -> Tensor:
    return reference.moe(*(t.double() if t is not None and t.is_floating_point() else t for t in inputs), spec=spec)


def run_experts(provider: str, inputs: Any, **attributes: Any) -> Any:
    given = [t for t in inputs if t is not None]
    f = lambda *args: torch.ops.braze.moe(*args, **attributes) * 1.0  # noqa: E731
    return run(f, {"moe": provider}, *given)


SPECS = [
    (MoeSpec(SILU), False, True, "silu"),
    (MoeSpec(GELU_TANH, scale=0.5, out_dtype=torch.float32), True, False, "gelu_tanh"),
    (MoeSpec(OSS, "interleaved", transposed=True), True, True, "swiglu_oss"),
    (MoeSpec(GELU_ERF), False, True, ""),
    (MoeSpec(SILU, "interleaved"), False, False, ""),
    (MoeSpec(SILU, weight_on="input"), False, True, ""),
    (MoeSpec("Max(0, g)**2", "none"), False, True, ""),
]


@pytest.mark.parametrize(
    ("spec", "view", "biases", "fused"), SPECS, ids=lambda v: str(v) if isinstance(v, str) else None
)
def test_experts_by_sgl_kernel(sgl: list[Any], spec: MoeSpec, view: bool, biases: bool, fused: str) -> None:
    """The first product ends with the activation where there is such a one; weights are read where they lie."""
    x, ids, weights, w1, w2, b1, b2 = experts(False, biases, spec.layout)
    if spec.transposed:
        w1, w2 = w1.transpose(1, 2), w2.transpose(1, 2)
    inputs = (x, ids, weights, w1, w2, b1, b2)
    attributes = {k: getattr(spec, k) for k in MoeSpec.__dataclass_fields__}
    got, choice = run_experts("sgl_kernel", inputs, **attributes)
    assert choice == ("sgl_kernel", "asked for")
    assert [(c[6], c[7]) for c in sgl] == [
        (sgl_kernel.ACTIVATIONS[fused][0], True) if fused else (0, False),
        (0, False),
    ]
    assert sgl[0][2].data_ptr() == w1.data_ptr()
    assert_close(got, exact(inputs, spec), 2e-2)


@pytest.mark.parametrize("form", range(3))
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_experts_by_vllm(form: int, dtype: torch.dtype) -> None:
    inputs = experts(True, True, "interleaved", dtype)
    with vllm(form) as calls:
        got, (kernel, _) = run_experts("vllm_xpu", inputs, activation=OSS, layout="interleaved", transposed=True)
    assert kernel == "vllm_xpu" and len(calls) == 2
    assert_close(got, exact(inputs, MoeSpec(OSS, "interleaved", True)), 2e-2)


def test_any_number_of_tokens(sgl: list[Any]) -> None:
    x, ids, weights, w1, w2, *_ = experts(False, False)
    f = lambda *args: torch.ops.braze.moe(*args) + 0  # noqa: E731
    call, _ = compiled(f, {"moe": "sgl_kernel"}, dynamic=True)
    with torch.no_grad():
        for n in (11, 4):
            inputs = (x[:n], ids[:n], weights[:n], w1, w2)
            assert_close(call(*inputs), exact((*inputs, None, None), MoeSpec()), 2e-2)
    assert len(sgl) == 4


def refusal(provider: str, spec: MoeSpec, inputs: Any) -> str | None:
    return moe.supports(*inputs, spec, provider)


def test_reasons_of_sgl_kernel(sgl: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    spec = MoeSpec()
    assert refusal("sgl_kernel", spec, experts(False, True)) is None
    assert "6 experts, not a multiple of 8" in str(refusal("sgl_kernel", spec, experts(False, False, count=6)))
    assert "not bfloat16" in str(refusal("sgl_kernel", spec, experts(False, False, dtype=torch.float16)))
    assert "do not lie as [E, N, K]" in str(refusal("sgl_kernel", MoeSpec(transposed=True), experts(True, False)))
    x, ids, weights, w1, w2, b1, b2 = experts(False, False)
    apart = torch.cat((w1, w1), 1)[:, :64]
    assert "one after the other" in str(refusal("sgl_kernel", spec, (x, ids, weights, apart, w2, b1, b2)))
    assert "weights in torch.float32" in str(refusal("sgl_kernel", spec, (x, ids, weights, w1.float(), w2, b1, b2)))
    shifted = torch.cat((w2.flatten(), w2.flatten()))[16 : 16 + w2.numel()].view(w2.shape)
    assert "begin at 64 bytes" in str(refusal("sgl_kernel", spec, (x, ids, weights, w1, shifted, b1, b2)))
    monkeypatch.setitem(compat.simulated, "cpu", compat.Simulated("xpu", "pvc", 64))
    assert "made for Xe2 GPUs, not for pvc" in str(refusal("sgl_kernel", spec, experts(False, False)))


def test_reasons_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = MoeSpec(transposed=True)
    with vllm(2):
        assert refusal("vllm_xpu", spec, experts(True, True)) is None
        assert refusal("vllm_xpu", spec, experts(True, False, count=6)) is None
        assert "not bfloat16 or float16" in str(refusal("vllm_xpu", spec, experts(True, False, dtype=torch.float32)))
        assert "do not lie as [E, K, N]" in str(refusal("vllm_xpu", MoeSpec(), experts(False, False)))
        x, ids, weights, w1, w2, b1, b2 = experts(True, False)
        odd = w1[:, :, :40].contiguous()
        assert "multiple of 32" in str(refusal("vllm_xpu", spec, (x, ids, weights, odd, w2, b1, b2)))
        narrow = w1[:, :, :60].contiguous()
        assert "60 and 64 columns" in str(refusal("vllm_xpu", spec, (x, ids, weights, narrow, w2, b1, b2)))
        monkeypatch.setitem(compat.simulated, "cpu", compat.Simulated("xpu", "pvc", 64))
        assert "made for Xe2 GPUs, not for pvc" in str(refusal("vllm_xpu", spec, experts(True, False)))


@pytest.mark.parametrize(
    ("logits", "attributes"),
    [
        (torch.randn(9, 16).to(BF16), {"top_k": 4, "renorm": "add", "out_dtype": torch.float32}),
        (torch.randn(2, 5, 64).half(), {"top_k": 8, "scale": 2.5, "ids_dtype": torch.int32}),
    ],
    ids=["renormalised", "scaled"],
)
def test_router_by_sgl_kernel(sgl_topk: list[Any], logits: Tensor, attributes: Any) -> None:
    f = lambda x: torch.ops.braze.route(x, **attributes)  # noqa: E731
    (weights, ids), choice = run(f, {"router": "sgl_kernel"}, logits)
    spec = RouteSpec(**attributes)
    want, chosen = reference.route(logits.double(), None, RouteSpec(**{**attributes, "out_dtype": torch.float64}))
    assert choice == ("sgl_kernel", "asked for") and len(sgl_topk) == 1
    assert ids.dtype == spec.ids_dtype and weights.dtype == (spec.out_dtype or logits.dtype)
    # equal 16-bit logits may come in either order: the weights tell that the choice is as good
    scores = logits.double().softmax(-1)
    assert torch.allclose(scores.gather(-1, ids.long()), scores.gather(-1, chosen), rtol=1e-6)
    assert_close(weights, want, 1e-6 if weights.dtype == torch.float32 else 1e-3)


def test_reasons_of_sgl_kernels_router(sgl_topk: list[Any]) -> None:
    def reason(spec: RouteSpec, logits: Tensor | None = None, bias: Tensor | None = None) -> str:
        logits = torch.zeros(3, 16, dtype=BF16) if logits is None else logits
        return str(route.supports(logits, bias, spec, "sgl_kernel"))

    assert reason(RouteSpec(4)) == "None"
    assert "scores by sqrtsoftplus" in reason(RouteSpec(4, "sqrtsoftplus"))
    assert "a bias" in reason(RouteSpec(4), bias=torch.zeros(16))
    assert "groups" in reason(RouteSpec(4, groups=4, top_groups=2))
    assert "more than 8" in reason(RouteSpec(9))
    assert "not bfloat16 or float16" in reason(RouteSpec(4), torch.zeros(3, 16))
    assert "60 experts, not a power of two" in reason(RouteSpec(4), torch.zeros(3, 60, dtype=BF16))
    assert "512 experts" in reason(RouteSpec(4), torch.zeros(3, 512, dtype=BF16))


def test_no_op_no_kernel() -> None:
    """Nothing is loaded: braze's own choice is made, and the report says why it is not what was asked for."""
    inputs = experts(False, False)
    got, (kernel, why) = run_experts("sgl_kernel", inputs)
    assert kernel != "sgl_kernel"
    assert "sgl_kernel was asked for and does not take this (no op sgl_kernel::moe_grouped_mm_nt_xe20 is loaded)" in why
    assert_close(got, exact(inputs, MoeSpec()), 2e-2)


@pytest.mark.parametrize(
    "schema",
    [
        vendor_ops.SGL_GROUPED_MM.replace("Tensor! output", "Tensor output"),
        vendor_ops.SGL_GROUPED_MM.replace("bool fuse_act", "bool fuse_act, int split"),
        vendor_ops.SGL_GROUPED_MM.replace("Tensor? bias", "Tensor bias"),
        "moe_grouped_mm_nt_xe20(Tensor x) -> Tensor",
    ],
)
def test_the_name_alone_is_not_enough(schema: str) -> None:
    with vendor_ops.loaded("sgl_kernel", schema):
        assert "has another schema" in str(detect.find(sgl_kernel.GROUPED_MM))
        assert "has another schema" in str(refusal("sgl_kernel", MoeSpec(), experts(False, False)))
    assert "no op" in str(detect.find(sgl_kernel.GROUPED_MM))


def test_later_schemas_with_defaults_are_taken() -> None:
    with vendor_ops.loaded("sgl_kernel", vendor_ops.SGL_GROUPED_MM.replace("limit=7.0", "limit=7.0, bool fast=False")):
        assert isinstance(detect.find(sgl_kernel.GROUPED_MM), detect.Found)


def test_an_op_without_a_kernel_for_the_device() -> None:
    with vendor_ops.loaded("_xpu_C", vendor_ops.VLLM_GROUPED_MM[0], key="CUDA"):
        reason = refusal("vllm_xpu", MoeSpec(transposed=True), experts(True, False))
    assert reason == "_xpu_C::cutlass_grouped_gemm_interface has no cpu kernel"
    assert vllm_xpu.GROUPED_MM.full_name in str(reason)


def test_own_kernels_are_the_default_until_a_measurement_says_else(
    sgl_topk: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(9, 16).to(BF16)
    f = lambda x: torch.ops.braze.route(x, top_k=2)  # noqa: E731
    _, (kernel, _) = run(f, {}, logits)
    assert kernel != "sgl_kernel" and not sgl_topk
    monkeypatch.setattr(vendor, "FASTER", {("router", "bmg"): ("sgl_kernel",)})
    assert run(f, {}, logits)[1] == ("sgl_kernel", "measured to be faster on bmg")
    assert run(f, {"router": "aten"}, logits)[1][0] == "aten"


def test_activations_are_told_apart() -> None:
    assert activation.same(GELU_TANH, sgl_kernel.ACTIVATIONS["gelu_tanh"][1])
    assert not activation.same(GELU_ERF, sgl_kernel.ACTIVATIONS["gelu_tanh"][1])
    assert not activation.same(OSS.replace("7.0", "10.0"), sgl_kernel.ACTIVATIONS["swiglu_oss"][1])
    assert not activation.same(SILU, SILU.replace("sigmoid(g)", "sigmoid(1.001*g)"))


def test_a_model(sgl: list[Any], sgl_topk: list[Any]) -> None:
    """Mixtral in bfloat16 through torch.compile, experts and routers by sgl_kernel; explain says so."""
    from tests import tiny

    model = tiny.build("mixtral", experts="grouped_mm").to(BF16)
    options = {"kernel": {"moe": "sgl_kernel", "router": "sgl_kernel", "rope": "pointwise"}, "strict": True}
    tokens = tiny.tokens(1, 6)  # few, so that no two experts' scores are equal in bfloat16
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        with braze.collect() as reports:
            got = torch.compile(model, backend="braze", options=options)(tokens, use_cache=False).logits
        want = tiny.as_float64(model)(tokens, use_cache=False).logits
    sites = [s for r in reports for s in r.sites if s.kind != "rope"]
    assert sorted((s.kind, s.kernel) for s in sites) == [("moe", "sgl_kernel")] * 2 + [("router", "sgl_kernel")] * 2
    assert len(sgl) == 4 and len(sgl_topk) == 2
    assert_close(got, want, 2e-2)
    assert "sgl_kernel: asked for" in Report(tuple(reports)).to_html()


def test_doctor_lists_them(sgl: list[Any]) -> None:
    with ExitStack() as stack:
        stack.enter_context(vllm(1))
        found = {check.what: check.found for check in checks()}
    assert found["op sgl_kernel::moe_grouped_mm_nt_xe20"] == "found, schema 1"
    assert found["op _xpu_C::cutlass_grouped_gemm_interface"] == "found, schema 2"
    assert found["op sgl_kernel::topk_softmax"] == "no op sgl_kernel::topk_softmax is loaded"
