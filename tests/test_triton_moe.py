"""The Triton experts against the float64 reference, on a GPU; tests/xpu_sim/test_moe.py runs some of this as XPU code."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from braze.kernels import reference
from braze.kernels.expression import apply_torch
from braze.kernels.spec import MoeSpec
from braze.kernels.triton import activation, compat, moe, separate
from braze.kernels.triton.choose_config import CONFIGS, FEW, Config, Problem, Tile, choose_config, model
from braze.kernels.triton.weights import Weights
from braze.lowering import inductor
from braze.lowering.lower import lower

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1.5e-3, torch.bfloat16: 6e-3}
needs_device = pytest.mark.skipif(not GPU, reason="no GPU")

SILU = "g*u*sigmoid(g)"
GPT_OSS = "(Min(Max(u, -7.0), 7.0) + 1.0) * Min(g, 7.0) * sigmoid(1.702*Min(g, 7.0))"
GELU = "g*u*(1 + tanh(0.7978845608028654*(g + 0.044715*g**3)))/2"
RELU2 = "Max(g, 0.0)**2"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and features of one call."""

    tokens: int = 5
    top_k: int = 2
    experts: int = 4
    hidden: int = 64
    intermediate: int = 48
    spec: MoeSpec = MoeSpec()
    dtype: torch.dtype = torch.bfloat16
    bias: torch.dtype | None = None
    ids: str = "random"
    id_dtype: torch.dtype = torch.int64


def make(c: Case) -> tuple[Any, ...]:
    n = c.intermediate * (1 if c.spec.layout == "none" else 2)

    def normal(*shape: int, dtype: torch.dtype = c.dtype, size: float = 1.0) -> Tensor:
        return (torch.randn(*shape) * size).to(DEVICE, dtype)

    x = normal(c.tokens, c.hidden)
    w1 = normal(c.experts, n, c.hidden, size=c.hidden**-0.5)
    w2 = normal(c.experts, c.hidden, c.intermediate, size=c.intermediate**-0.5)
    if c.spec.transposed:
        w1, w2 = w1.transpose(1, 2).contiguous(), w2.transpose(1, 2).contiguous()
    b1 = normal(c.experts, n, dtype=c.bias) if c.bias else None
    b2 = normal(c.experts, c.hidden, dtype=c.bias) if c.bias else None
    shape = (c.tokens, c.top_k)
    ids = {
        "random": lambda: torch.randint(0, c.experts, shape),
        "one": lambda: torch.full(shape, c.experts - 1),
        "invalid": lambda: torch.randint(-2, c.experts + 2, shape),
        "huge": lambda: torch.randint(0, c.experts, shape) + (torch.rand(shape) < 0.5).long() * 2**32,
    }[c.ids]()
    return x, ids.to(DEVICE, c.id_dtype), torch.rand(shape).to(DEVICE), w1, w2, b1, b2


def stored(how: str, w1: Tensor, w2: Tensor, spec: MoeSpec) -> tuple[tuple[Any, Any], list[Tensor]]:
    """Stacked weights as they are, with gate's and up's "apart", or with a tensor for each expert: "separate", "pairs"; and
    what has to be kept for as long as they are used."""
    if how == "stacked":
        return (w1, w2), []
    halves = [w.contiguous() for w in w1.chunk(2, 2 if spec.transposed else 1)] if how in ("apart", "pairs") else [w1]
    if how == "apart":
        return (Weights(*halves), w2), []
    firsts = [half[e].clone() for e in range(len(w2)) for half in halves]
    seconds = [w.clone() for w in w2]
    return separate.stacked(firsts, seconds), firsts + seconds


def compare(c: Case, config: Config | None = None, how: str = "stacked") -> None:
    x, ids, weights, w1, w2, b1, b2 = make(c)
    wide = [t if t is None else t.double() for t in (w1, w2, b1, b2)]
    exact = dataclasses.replace(c.spec, out_dtype=torch.float64)
    want = reference.moe(x.double(), ids, weights.double(), *wide, exact)  # type: ignore[arg-type]
    (w1, w2), _kept = stored(how, w1, w2, c.spec)
    got = moe.launch(x, ids, weights, w1, w2, b1, b2, c.spec, config)
    assert got.dtype == (c.spec.out_dtype or c.dtype)
    assert got.shape == want.shape
    error = (got.double() - want).norm() / want.norm().clamp_min(1e-30)
    assert error < TOLERANCE[c.dtype], error
    again = moe.launch(x, ids, weights, w1, w2, b1, b2, c.spec, config)
    assert torch.equal(got, again)


def config(direct: bool, rows: int = 16, split: int = 1, descriptors: bool = False, programs: int = 0) -> Config:
    tile = Tile(64, 32, 4, 2, group=2, descriptors=descriptors, programs=programs)
    return Config(rows, direct, tile, dataclasses.replace(tile, split=split))


CASES = {
    "silu": Case(),
    "none": Case(spec=MoeSpec(RELU2, layout="none", transposed=True)),
    "gpt_oss": Case(spec=MoeSpec(GPT_OSS, layout="interleaved", transposed=True), bias=torch.float32),
    "llama4": Case(top_k=1, spec=MoeSpec(SILU, transposed=True, weight_on="input", scale=0.5)),
    "on_input": Case(top_k=3, spec=MoeSpec(GELU, weight_on="input"), bias=torch.bfloat16),
    "scale": Case(spec=MoeSpec(SILU, scale=2.5, out_dtype=torch.float32), bias=torch.float32),
    "odd": Case(hidden=72, intermediate=40, spec=MoeSpec(SILU, layout="interleaved")),
    "odd halves": Case(hidden=72, intermediate=40, bias=torch.float32),
    "odd transposed": Case(hidden=72, intermediate=40, spec=MoeSpec(SILU, transposed=True)),
    "invalid": Case(tokens=9, ids="invalid", bias=torch.float32),
    "invalid k=1": Case(tokens=9, top_k=1, ids="invalid", id_dtype=torch.int32),
    "huge ids": Case(tokens=9, ids="huge"),
    "one expert": Case(tokens=24, ids="one"),
    "E=1": Case(experts=1, top_k=1),
    "fp16": Case(dtype=torch.float16),
    "fp32": Case(dtype=torch.float32),
    "many": Case(tokens=150, top_k=4, experts=9),
}


@needs_device
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "sorted"])
def test_every_feature(name: str, direct: bool) -> None:
    compare(CASES[name], config(direct))


@needs_device
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "sorted"])
def test_split_of_the_inner_dimension(direct: bool) -> None:
    case = Case(intermediate=160, bias=torch.float32, ids="invalid", tokens=7)
    compare(case, config(direct, split=4))
    compare(dataclasses.replace(case, top_k=1), config(direct, split=2))


@needs_device
def test_more_programs_than_one_sorts() -> None:
    case = Case(tokens=300, top_k=2, experts=5, hidden=32, intermediate=32, ids="invalid")
    compare(case, config(False, rows=32))


@needs_device
@pytest.mark.parametrize("name", ["silu", "gpt_oss", "odd", "odd transposed", "invalid", "many", "fp32"])
def test_descriptors_and_persistent_programs(name: str) -> None:
    """On a GPU without tile copies the same configs run through pointers."""
    case = dataclasses.replace(CASES[name], hidden=80, tokens=2 * CASES[name].tokens)
    compare(case, config(False, rows=64, descriptors=True, programs=1))


APART = ["silu", "llama4", "on_input", "scale", "odd halves", "odd transposed", "invalid", "fp16", "fp32", "many"]
SEPARATE = ["silu", "none", "gpt_oss", "llama4", "odd", "invalid", "fp32", "many"]
STORED = [("apart", n) for n in APART] + [("pairs", n) for n in APART] + [("separate", n) for n in SEPARATE]


@needs_device
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "sorted"])
@pytest.mark.parametrize(("how", "name"), STORED)
def test_weights_of_several_tensors(how: str, name: str, direct: bool) -> None:
    compare(CASES[name], config(direct), how)


@needs_device
@pytest.mark.parametrize("name", ["silu", "llama4", "odd halves", "odd transposed", "many"])
def test_descriptors_of_gate_and_up(name: str) -> None:
    case = dataclasses.replace(CASES[name], hidden=80, tokens=2 * CASES[name].tokens)
    for tiles in (config(False, rows=64, descriptors=True, programs=1), config(False, rows=64, descriptors=True)):
        compare(case, dataclasses.replace(tiles, permute=True), "apart")
        compare(case, dataclasses.replace(tiles, permute=True), "pairs")


@needs_device
def test_chosen_config() -> None:
    for tokens in (1, 3, 40):
        compare(Case(tokens=tokens, hidden=128, intermediate=128))


@needs_device
def test_no_rows() -> None:
    for tokens, k in ((0, 2), (3, 0)):
        x, ids, weights, *rest = make(Case(tokens=tokens, top_k=k))
        got = moe.launch(x, ids, weights, *rest, MoeSpec())
        assert got.shape == x.shape
        assert not got.any()


def compare_stages(c: Case, tiles: Config) -> None:
    """The result in place of x, each slot's own result, and hooks that add to both stages, against float64."""
    x, ids, weights, w1, w2, b1, b2 = make(c)
    up, down = ((w.transpose(1, 2) if c.spec.transposed else w).double() for w in (w1, w2))
    added, more = torch.randn(c.experts, up.shape[1]).double(), torch.randn(c.experts, down.shape[2]).double()
    added, more = added.to(DEVICE), more.to(DEVICE)

    def wanted(with_hooks: bool) -> Tensor:
        rows, w, factor = x.double()[:, None, None], weights.double()[..., None], float(with_hooks)
        h = (rows * up[ids]).sum(-1) * (w if c.spec.weight_on == "input" else 1.0)
        h = h + (0.0 if b1 is None else b1.double()[ids]) + factor * added[ids]
        h = apply_torch(c.spec.activation, *reference.split_gate_up(h, c.spec.layout)) + factor * more[ids]
        y = (h[:, :, None] * down[ids]).sum(-1) + (0.0 if b2 is None else b2.double()[ids])
        return y * (w if c.spec.weight_on == "output" else 1.0) * c.spec.scale

    def adds(table: Tensor) -> moe.Hook:
        return lambda h, order: h.add_(table[ids.flatten()[order.long()]].to(h.dtype))

    def check(got: Tensor, want: Tensor, roundings: int = 1) -> None:
        assert got.shape == want.shape and (got.double() - want).norm() / want.norm() < roundings * TOLERANCE[c.dtype]

    def call(**options: Any) -> Tensor:
        return moe.launch(x, ids, weights, w1, w2, b1, b2, c.spec, tiles, **options)

    check(call(combine=False), wanted(False))
    hooks = moe.Hooks(adds(added), adds(more))
    check(call(hooks=hooks), wanted(True).sum(1), 2)
    check(call(combine=False, hooks=hooks), wanted(True), 2)
    want = wanted(False).sum(1)
    assert call(out=x).data_ptr() == x.data_ptr()
    check(x, want)


STAGES = ["silu", "gpt_oss", "llama4", "none"]


@needs_device
@pytest.mark.parametrize("name", STAGES)
def test_stages(name: str) -> None:
    for tiles in (config(True), config(False), config(False, split=2)):
        compare_stages(CASES[name], tiles)


@needs_device
@pytest.mark.parametrize("ids", ["random", "one", "invalid"])
def test_one_token_is_summed_by_the_last_to_finish(ids: str) -> None:
    """No launch for the sum; as deterministic as with it."""
    for split in (1, 2):
        case = Case(tokens=1, top_k=6, hidden=320, intermediate=160, bias=torch.float32, ids=ids)
        compare(case, config(True, split=split))
        compare(dataclasses.replace(case, top_k=1), config(True, split=split))


def one_row(columns: int = 8, inner: int = 64) -> Config:
    return Config(1, True, Tile(columns, inner, 4, 1), Tile(columns // 4, inner, 2, 1))


@needs_device
@pytest.mark.parametrize(
    "name",
    ["silu", "gpt_oss", "llama4", "none", "on_input", "scale", "odd", "invalid", "one expert", "E=1", "fp16", "fp32"],
)
def test_few_tokens_by_vectors(name: str) -> None:
    case = CASES[name]
    spec = dataclasses.replace(case.spec, transposed=False)
    for k in (1, 3, 8):
        for hidden, intermediate in ((case.hidden, case.intermediate), (200, 136)):
            one = dataclasses.replace(case, tokens=1, top_k=k, spec=spec, hidden=hidden, intermediate=intermediate)
            compare(one, one_row())
            compare(dataclasses.replace(one, tokens=3), one_row(16, 256))


@needs_device
def test_few_tokens_by_vectors_apart_and_in_place() -> None:
    case = Case(tokens=2, top_k=3, hidden=192, bias=torch.float32, ids="invalid")
    x, ids, weights, *rest = make(case)
    want = moe.launch(x, ids, weights, *rest, case.spec, config(True))
    apart = moe.run(x, ids, weights, *rest, case.spec, config=one_row(), combine=False)
    assert apart.shape == (2, 3, 192)
    assert (apart.double().sum(1) - want.double()).norm() / want.double().norm() < 6e-3
    moe.run(x, ids, weights, *rest, case.spec, config=one_row(), out=x)
    assert (x.double() - want.double()).norm() / want.double().norm() < 6e-3


@needs_device
def test_one_token_by_vectors_many_times_in_a_graph() -> None:
    """The second product begins while the first runs, and the next call while the second does: each has its own inputs."""
    case = Case(tokens=1, top_k=4, experts=16, hidden=1024, intermediate=512)
    inputs = [make(case) for _ in range(6)]
    shared = inputs[0][3:]
    want = [moe.launch(*i[:3], *shared, case.spec, config(True)) for i in inputs]
    tiles = one_row(8, 256)
    moe.run(*inputs[0][:3], *shared, case.spec, config=tiles)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = [moe.run(*i[:3], *shared, case.spec, config=tiles) for _ in range(20) for i in inputs]
    for _ in range(10):
        for g in got:
            g.fill_(7.0)
        graph.replay()
        first = got[: len(want)]
        assert all(
            (g.double() - w.double()).norm() / w.double().norm() < 6e-3 for g, w in zip(first, want, strict=True)
        )
        assert all(torch.equal(g, first[n % len(want)]) for n, g in enumerate(got))


def test_one_row_is_for_few_tokens() -> None:
    assert model(problem(1, vector=True)).rows == 1
    shipped = choose_config(problem(1, vector=True))
    assert shipped.rows == 1
    assert choose_config(problem(2, vector=True)) == shipped
    assert choose_config(problem(1)).rows > 1  # weights that are not contiguous
    assert choose_config(problem(2, vector=True, experts=9)).rows > 1  # tokens that share experts
    assert choose_config(problem(FEW + 1, vector=True, experts=1000, top_k=1)).rows > 1
    for inner, length in ((768, 256), (1408, 512), (2880, 1024), (8192, 1024), (40, 256)):
        assert model(problem(1, vector=True, intermediate=inner)).second.inner == length


@needs_device
def test_one_row_is_refused() -> None:
    case = Case(spec=MoeSpec(transposed=True))
    with pytest.raises(ValueError, match="contiguous"):
        moe.launch(*make(case), case.spec, one_row())
    with pytest.raises(ValueError, match="few tokens"):
        moe.launch(*make(Case(tokens=600)), MoeSpec(), one_row())


@needs_device
@pytest.mark.parametrize("name", ["silu", "gpt_oss", "odd", "odd transposed", "invalid", "many", "fp16"])
def test_half_full_tiles_and_copied_rows(name: str) -> None:
    case = dataclasses.replace(CASES[name], hidden=80, tokens=9 * CASES[name].tokens)
    for programs in (0, 1):
        tiles = config(False, rows=128, descriptors=True, programs=programs)
        tiles = dataclasses.replace(tiles, permute=True)
        halves = [dataclasses.replace(t, halves=True) for t in (tiles.first, tiles.second)]
        compare(case, dataclasses.replace(tiles, first=halves[0], second=halves[1]))
        compare(case, dataclasses.replace(tiles, first=halves[0], permute=False))


@needs_device
def test_more_tiles_of_an_expert_than_go_together() -> None:
    case = Case(tokens=700, top_k=2, experts=3, ids="invalid")
    for group in (1, 3, 16):
        tiles = config(False, rows=32)
        tiles = dataclasses.replace(tiles, first=dataclasses.replace(tiles.first, group=group))
        compare(case, dataclasses.replace(tiles, second=dataclasses.replace(tiles.second, group=group)))


@needs_device
@pytest.mark.parametrize("tokens", [1, 3, 200])
def test_a_signature_is_planned_once(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls after the first choose nothing, and are right on other tensors, in place, and of another layout."""
    case = Case(tokens=tokens, top_k=2, experts=5, hidden=192, intermediate=96)
    first, second = make(case), make(case)
    want = [moe.launch(*inputs, case.spec) for inputs in (first, second)]
    assert torch.equal(moe.run(*first, case.spec), want[0])
    with monkeypatch.context() as patch:
        patch.setattr(moe, "choose_config", None)
        for inputs, expected in zip((second, first, second), (want[1], want[0], want[1]), strict=True):
            assert torch.equal(moe.run(*inputs, case.spec), expected)
    x, ids, weights, *rest = second
    wide = torch.zeros(tokens, 2 * 192, dtype=x.dtype, device=x.device)
    wide[:, :192] = x
    assert torch.equal(moe.run(wide[:, :192], ids, weights, *rest, case.spec), want[1])
    for _ in range(2):
        apart = ids.T.contiguous().T
        assert torch.equal(moe.run(x, apart, weights, *rest, case.spec), want[1])
    for _ in range(2):
        again = x.clone()
        assert moe.run(again, ids, weights, *rest, case.spec, out=again) is again
        assert torch.equal(again, want[1])


@needs_device
def test_a_planned_call_is_captured() -> None:
    case = Case(tokens=2, hidden=128, intermediate=128)
    inputs = make(case)
    want = moe.run(*inputs, case.spec)
    moe.run(*inputs, case.spec)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = moe.run(*inputs, case.spec)
    got.fill_(7.0)
    graph.replay()
    assert torch.equal(got, want)


@needs_device
@pytest.mark.parametrize("tokens", [1, 40])
def test_inductor_understands_what_launches_write(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise it takes every input for written, weights too."""
    from torch._higher_order_ops import triton_kernel_wrap

    told: list[Any] = []
    monkeypatch.setattr(triton_kernel_wrap.log, "warning", lambda *text, **_: told.append(text))
    x, _, _, w1, w2, _, _ = make(Case(tokens=tokens, experts=16, hidden=128, intermediate=128))
    logits = torch.randn(tokens, 16, device=DEVICE)
    chosen: list[str] = []

    def layer(x: Tensor, logits: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        weights, ids = torch.ops.braze.route(logits, top_k=2, renorm="add", eps=1e-20)
        y: Tensor = torch.ops.braze.moe(x, ids, weights, w1, w2)
        return y + x

    def transform(graph: torch.fx.Graph) -> None:
        ops = (torch.ops.braze.moe.default, torch.ops.braze.route.default)
        calls = [n for op in ops for n in graph.find_nodes(op="call_function", target=op)]
        chosen.extend(kernel for kernel, _ in lower(calls, {}))

    def backend(graph: Any, inputs: Any) -> Any:
        return inductor.compile_graph(graph, inputs, transform, "test", {"force_disable_caches": True})

    want = layer(x, logits, w1, w2)
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(layer, backend=backend, dynamic=False)(x, logits, w1, w2)
    assert chosen == ["triton", "triton"]
    assert (got.double() - want.double()).norm() / want.double().norm() < 6e-3
    assert not [text for text in told if "every input is mutated" in str(text)]


@needs_device
def test_positions_beyond_32_bits() -> None:
    """A first weight and a result of more than 2**31 elements."""
    if torch.cuda.mem_get_info()[0] < 10 << 30:
        pytest.skip("needs 10 GiB")
    case = Case(tokens=70000, top_k=4, experts=3, hidden=8192, intermediate=64)
    x, _, weights, *_ = make(dataclasses.replace(case, hidden=64, intermediate=48, tokens=8))
    x = torch.randn(case.tokens, case.hidden, device=DEVICE, dtype=torch.bfloat16)
    ids = torch.randint(0, 3, (case.tokens, 4), device=DEVICE)
    weights = torch.rand(case.tokens, 4, device=DEVICE)
    w1 = torch.randn(3, 128, 8192, device=DEVICE, dtype=torch.bfloat16) * 8192**-0.5
    w2 = torch.randn(3, 8192, 64, device=DEVICE, dtype=torch.bfloat16) / 8
    got = moe.run(x, ids, weights, w1, w2, None, None, MoeSpec())
    last = slice(case.tokens - 8, case.tokens)
    wide = (x[last].double(), ids[last], weights[last].double(), w1.double(), w2.double())
    want = reference.moe(*wide, None, None, MoeSpec(out_dtype=torch.float64))
    assert (got[last].double() - want).norm() / want.norm() < TOLERANCE[torch.bfloat16]


@needs_device
def test_nan_weights_stay_with_their_token() -> None:
    x, ids, weights, *rest = make(Case(tokens=6))
    clean = moe.launch(x, ids, weights, *rest, MoeSpec(), config(False))
    weights[2, 1] = float("nan")
    got = moe.launch(x, ids, weights, *rest, MoeSpec(), config(False))
    assert got[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(got[others], clean[others])


CHOSEN = "where_gt(g, 0, log1p(exp(g)), 0.7*expm1(0.01*g)) + where_ge(u, g, 0.5, u) + where_gt(2, 1, g, u)"


@pytest.mark.parametrize(
    "text", [SILU, GPT_OSS, GELU, RELU2, CHOSEN, "Abs(g)*u/(1 + exp(-u))", "sqrt(2.0)*erf(g)*u", "3"]
)
def test_activation_source_means_the_same(text: str) -> None:
    """The generated text, evaluated with torch in Triton's place."""

    class Spelled:
        PropagateNan = type("PropagateNan", (), {"ALL": None})
        sigmoid, exp, log, erf, sqrt, abs, where = (
            staticmethod(f)
            for f in (torch.sigmoid, torch.exp, torch.log, torch.erf, torch.sqrt, torch.abs, torch.where)
        )

        @staticmethod
        def minimum(a: Any, b: Any, propagate_nan: Any) -> Tensor:
            return torch.minimum(torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64))

        @staticmethod
        def maximum(a: Any, b: Any, propagate_nan: Any) -> Tensor:
            return torch.maximum(torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64))

    g, u = torch.randn(2, 50, dtype=torch.float64) * 5
    from braze.kernels.expression import apply_torch

    got = eval(activation.source(text), {"tl": Spelled, "g": g, "u": u})
    torch.testing.assert_close(got, apply_torch(text, g, u))


def test_reasons_on_fake_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "HAVE_TRITON", True)
    with torch._subclasses.FakeTensorMode():

        def t(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda", step: int = 1) -> Tensor:
            strides = [step * math.prod(shape[n + 1 :]) for n in range(len(shape))]
            return torch.empty_strided(shape, strides, dtype=dtype, device=device)

        x, ids, weights = t(3, 64), t(3, 2, dtype=torch.int64), t(3, 2)
        w1, w2 = t(4, 96, 64), t(4, 64, 48)

        def reason(spec: MoeSpec = MoeSpec(), **other: Tensor) -> str | None:
            tensors = {"x": x, "ids": ids, "weights": weights, "w1": w1, "w2": w2, **other}
            return moe.supports(**tensors, b1=None, b2=None, spec=spec)

        assert reason() is None
        assert "cpu" in str(reason(x=t(3, 64, device="cpu")))
        assert "weights in" in str(reason(w1=t(4, 96, 64, dtype=torch.float16)))
        assert "float64" in str(reason(x=t(3, 64, dtype=torch.float64)))
        assert "ids" in str(reason(ids=t(3, 2, dtype=torch.int16)))
        assert "contiguous" in str(reason(x=t(3, 64, step=2)))
        assert "stride" in str(reason(w1=t(4, 96, 64, step=2)))
        assert "activation" in str(reason(MoeSpec("g**0.3")))


def test_refusal_raises() -> None:
    with pytest.raises(ValueError, match="Triton"):
        x, *rest = make(Case())
        moe.run(x.cpu(), *(r if r is None else r.cpu() for r in rest), MoeSpec())


def problem(tokens: int, **other: Any) -> Problem:
    return Problem(tokens, **{**SIZES, **other})


SIZES: dict[str, Any] = {
    "top_k": 8, "experts": 128, "hidden": 2048, "intermediate": 768, "gated": True, "element": 2,
    "device": "h100", "processors": 132,
}  # fmt: skip


def test_tuned_configs_are_read(tmp_path: Any) -> None:
    few, many = model(problem(1)), model(problem(8192))
    assert few != many
    data = {problem(1).shape: {"1": dataclasses.asdict(few), "8192": dataclasses.asdict(many)}}
    (tmp_path / "h100.json").write_text(json.dumps(data))
    folders = [tmp_path / "absent", tmp_path]
    assert choose_config(problem(3), folders) == few
    assert choose_config(problem(2000), folders) == many
    assert choose_config(problem(3, hidden=99), folders) == model(problem(3, hidden=99))


def test_shipped_configs_are_valid() -> None:
    for file in CONFIGS.glob("*.json"):
        for shape, by_tokens in json.loads(file.read_text()).items():
            assert shape.startswith("E")
            for tokens, data in by_tokens.items():
                c = Config.of(data)
                assert int(tokens) > 0
                assert c.rows in (1, 16, 32, 64, 128, 256)
                assert all(
                    t.columns & (t.columns - 1) == 0 and t.inner & (t.inner - 1) == 0 for t in (c.first, c.second)
                )
