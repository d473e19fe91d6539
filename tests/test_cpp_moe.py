"""The C++ experts kernel against the float64 reference: storage, edges of every size, corners of routing."""

import ctypes
import itertools
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import Tensor

import braze.ops  # noqa: F401 (registers the op)
from braze.kernels import reference
from braze.kernels.cpp import moe, source
from braze.kernels.spec import MoeSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Half a unit in the last place of the result, and of the act columns where those are rounded, with some slack.
BOUND = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def inputs(
    spec: MoeSpec,
    dtype: torch.dtype,
    tokens: int = 9,
    experts: int = 5,
    top_k: int = 2,
    hidden: int = 64,
    inner: int = 48,
    bias: torch.dtype | None = None,
    seed: int = 0,
) -> Inputs:
    gen = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(shape, generator=gen)  # noqa: E731
    columns = inner * (1 if spec.layout == "none" else 2)
    w1, w2 = rand(experts, columns, hidden) / hidden**0.5, rand(experts, hidden, inner) / inner**0.5
    if spec.transposed:
        w1, w2 = w1.mT.contiguous(), w2.mT.contiguous()
    ids = torch.stack(
        [torch.randperm(experts, generator=gen)[:top_k] for _ in range(tokens)] or [torch.empty(0, top_k)]
    )
    return (
        rand(tokens, hidden).to(dtype),
        ids.long().reshape(tokens, top_k),
        torch.rand(tokens, top_k, generator=gen),
        w1.to(dtype),
        w2.to(dtype),
        rand(experts, columns).to(bias) if bias else None,
        rand(experts, hidden).to(bias) if bias else None,
    )


def expected(args: Inputs, spec: MoeSpec) -> Tensor:
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in args]
    exact = MoeSpec(**{**vars(spec), "out_dtype": None})
    return reference.moe(*wide, exact)  # type: ignore[arg-type]


def check(args: Inputs, spec: MoeSpec, bound: float | None = None) -> Tensor:
    assert moe.supports(*args, spec) is None
    got, want = moe.run(*args, spec), expected(args, spec)
    assert got.dtype == (spec.out_dtype or args[0].dtype) and got.shape == want.shape
    if bound is None:
        bound = max(BOUND[args[0].dtype], BOUND[got.dtype])
    scale = want.abs().max().item() if want.numel() else 0.0
    assert (got.double() - want).abs().max().item() <= bound * scale if want.numel() else True
    assert not scale or got.abs().max().item() > 0.5 * scale
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("layout", ("halves", "interleaved", "none"))
def test_storage(dtype: torch.dtype, transposed: bool, layout: str) -> None:
    spec = MoeSpec("g*sigmoid(g)" if layout == "none" else "g*u*sigmoid(g)", layout, transposed)  # type: ignore[arg-type]
    for seed, tokens in enumerate((1, 9, 150)):
        check(inputs(spec, dtype, tokens, seed=seed), spec)
    check(inputs(spec, dtype, 1, hidden=550, inner=523), spec)  # whole runs and a rest along K
    check(inputs(spec, dtype, 40, 3, 2, hidden=71, inner=37, bias=torch.float32), spec)
    check(inputs(spec, dtype, 6, 3, 1, hidden=130, inner=75, bias=dtype), spec)
    for weight_on, scale in itertools.product(("input", "output"), (1.0, 2.5)):
        other = MoeSpec(**{**vars(spec), "weight_on": weight_on, "scale": scale})
        check(inputs(other, dtype, 33, bias=dtype), other)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("layout", ("halves", "interleaved", "none"))
def test_long_rows_of_weights(dtype: torch.dtype, layout: str) -> None:
    """More columns than one task takes of weights stored along them, for few and for many rows, alone and mixed."""
    spec = MoeSpec("g*sigmoid(g)" if layout == "none" else "g*u*sigmoid(g)", layout, True)  # type: ignore[arg-type]
    for tokens, experts in ((1, 2), (40, 4), (70, 2)):
        check(inputs(spec, dtype, tokens, experts, 1, hidden=1070, inner=1105, bias=torch.float32), spec)
    x, ids, *rest = inputs(spec, dtype, 60, 4, 1, hidden=33, inner=1105)
    ids[:50] = 1
    check((x, ids, *rest), spec)


@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("layout", ("halves", "interleaved"))
def test_dot_product_of_bfloat16(monkeypatch: pytest.MonkeyPatch, transposed: bool, layout: str) -> None:
    """The form for CPUs whose own bfloat16 dot is the faster one; elsewhere it compiles to the widening form."""
    monkeypatch.setattr(moe, "_bf16_dot", lambda: True)
    forget()
    spec = MoeSpec(layout=layout, transposed=transposed)  # type: ignore[arg-type]
    for tokens, hidden, inner in ((1, 64, 32), (9, 71, 37), (150, 130, 48)):
        check(inputs(spec, torch.bfloat16, tokens, hidden=hidden, inner=inner, bias=torch.float32), spec)
    forget()


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("g++"), reason="needs g++ for x86-64")
def test_the_matrix_unit_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the processor, and of the compiler."""
    for processor, compiles, used in (("avx2", True, 0), ("avx2 amx_bf16 amx_tile", True, 1), ("x amx_bf16", False, 0)):
        monkeypatch.setattr(moe, "_cpu", lambda text=processor: text)
        if not compiles:
            monkeypatch.setattr(moe, "compile_cpp", refuse)
        assert moe._amx.__wrapped__() == used


def refuse(*_: object) -> None:
    raise RuntimeError("no such instruction")


def forget() -> None:
    """Makes kernels be written and built anew."""
    moe._build.cache_clear()
    moe._source.cache_clear()


@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("layout", ("halves", "interleaved", "none"))
def test_matrix_unit(monkeypatch: pytest.MonkeyPatch, transposed: bool, layout: str) -> None:
    """The form for CPUs with AMX, its instructions as plain code: rows and depths that fill tiles, and that do not."""
    monkeypatch.setattr(moe, "_amx", lambda: 2)
    forget()
    spec = MoeSpec("g*sigmoid(g)" if layout == "none" else "g*u*sigmoid(g)", layout, transposed)  # type: ignore[arg-type]
    for tokens, hidden, inner in ((13, 64, 32), (150, 131, 75), (200, 128, 320)):
        check(inputs(spec, torch.bfloat16, tokens, hidden=hidden, inner=inner, bias=torch.float32), spec)
    x, ids, *rest = inputs(spec, torch.bfloat16, 64, 3, 1, hidden=64, inner=64)
    for rows in (16, 32, 33, 64):  # of one expert: whole tiles are read where they lie
        ids[:] = 1
        ids[rows:] = 2
        check((x, ids, *rest), spec)
    forget()


@pytest.mark.parametrize(("dtype", "transposed"), [(torch.bfloat16, False), (torch.float32, True)], ids=str)
def test_vectors_of_256_bits(dtype: torch.dtype, transposed: bool) -> None:
    """What a CPU with AVX2 alone builds: other register tiles, no split order."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    spec = MoeSpec(transposed=transposed)
    with torch._inductor.config.patch({"cpp.simdlen": 256}):
        if not pick_vec_isa():
            pytest.skip("a CPU without AVX2")
        forget()
        for tokens, hidden, inner in ((1, 64, 32), (2, 71, 37), (9, 71, 37), (150, 130, 48)):
            check(inputs(spec, dtype, tokens, hidden=hidden, inner=inner, bias=torch.float32), spec)
    forget()


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("g++"), reason="needs g++ for x86-64")
@pytest.mark.parametrize(("dtype", "transposed"), [(torch.bfloat16, False), (torch.float16, True)], ids=str)
def test_machine_code_without_avx512(tmp_path: Path, dtype: torch.dtype, transposed: bool) -> None:
    """The same text compiled for a CPU that has no instruction beyond AVX2, FMA and F16C."""
    from torch.utils.cpp_extension import include_paths, library_paths

    spec = MoeSpec(transposed=transposed)
    text, library = tmp_path / "kernel.cpp", tmp_path / "kernel.so"
    text.write_text(source.moe_source(dtype, spec.layout, transposed, spec.activation, bf16_dot=True))
    subprocess.run(
        [
            "g++", "-O1", "-std=c++20", "-fPIC", "-shared", "-fopenmp", "-march=haswell", "-DCPU_CAPABILITY=AVX2",
            "-DCPU_CAPABILITY_AVX2", "-DTORCH_INDUCTOR_CPP_WRAPPER", "-DSTANDALONE_TORCH_HEADER",
            *(f"-I{p}" for p in (*include_paths(), sysconfig.get_paths()["include"])),
            str(text), "-o", str(library), *(f"-L{p}" for p in library_paths()), "-ltorch_cpu", "-lc10",
        ],
        check=True,
    )  # fmt: skip
    kernel = ctypes.CDLL(str(library)).kernel
    for tokens, hidden, inner in ((1, 64, 32), (9, 71, 37), (60, 130, 48)):
        args = inputs(spec, dtype, tokens, experts=3, hidden=hidden, inner=inner)
        x, ids, weights, w1, w2, _, _ = args
        out = torch.zeros(tokens, hidden, dtype=dtype)
        *numbers, scale = moe.numbers(*args, spec)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (out, x, ids, weights, w1, w2, x, x)]
        kernel(*pointers, *map(ctypes.c_int64, numbers), ctypes.c_float(scale))
        want = expected(args, spec)
        assert (out.double() - want).abs().max().item() <= BOUND[dtype] * want.abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_of_the_rest(dtype: torch.dtype) -> None:
    for out_dtype, id_dtype in itertools.product(DTYPES, (torch.int32, torch.int64)):
        spec = MoeSpec(out_dtype=out_dtype)
        x, ids, weights, *rest = inputs(spec, dtype, bias=torch.float32)
        check((x, ids.to(id_dtype), weights.to(dtype), *rest), spec)  # type: ignore[arg-type]


ACTIVATIONS = (
    "g*u*sigmoid(g)",
    "0.5*g*u*(1 + erf(0.70710678*g))",
    "0.5*g*u*(1 + tanh(0.7978845608*(g + 0.044715*g**3)))",
    "(Min(Max(u, -7.0), 7.0) + 1)*Min(g, 7.0)*sigmoid(1.702*Min(g, 7.0))",
    "u*Max(g, 0)**2",
    "u*log(1 + exp(-Abs(g))) + sqrt(g*g + 1)/(2 + u*u)",
    "u*where_gt(g, 0, g, 0.7*expm1(g)) + where_ge(u, g, g, 0.5)*log1p(exp(g))",
)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation(activation: str) -> None:
    spec = MoeSpec(activation)
    check(inputs(spec, torch.float32, 20, bias=torch.float32), spec, 5e-6)


def test_extreme_values_of_the_activation() -> None:
    """Sigmoid's approximation at both ends: no overflow, and infinities end where they should."""
    spec = MoeSpec("sigmoid(g)", "none")
    values = torch.tensor(
        [-1e30, -200.0, -88.5, -30.0, -1e-3, 0.0, 1e-3, 30.0, 88.5, 200.0, 1e30, float("inf"), -float("inf")]
    )
    x, one, eye = values[:, None], torch.ones(13, 1), torch.ones(1, 1, 1)
    got = moe.run(x, torch.zeros(13, 1, dtype=torch.int64), one, eye, eye, None, None, spec)[:, 0]
    torch.testing.assert_close(got, values.sigmoid(), rtol=3e-6, atol=1e-37)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_routing_corners(dtype: torch.dtype) -> None:
    spec = MoeSpec()
    check(inputs(spec, dtype, 21, experts=1, top_k=1), spec)
    x, ids, *rest = inputs(spec, dtype, 600, experts=4, top_k=2)
    one_expert = torch.full_like(ids, 2)  # and twice by the same token
    check((x, one_expert, *rest), spec)  # type: ignore[arg-type]
    outside = ids.clone()
    outside[::3, 0], outside[1::3, 1], outside[5] = -1, 4, 1 << 20
    got = check((x, outside, *rest), spec)  # type: ignore[arg-type]
    assert not got[5].any()
    assert moe.run(x[:0], ids[:0], rest[0][:0], *rest[1:], spec).shape == (0, 64)  # type: ignore[arg-type]
    nowhere = torch.full_like(ids, -1)
    assert not moe.run(x, nowhere, *rest, spec).any()  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_views(dtype: torch.dtype) -> None:
    spec = MoeSpec()
    x, ids, weights, w1, w2, b1, b2 = inputs(spec, dtype, 30, bias=dtype)
    wide = lambda t: torch.cat([t, torch.full_like(t, float("nan"))], -1)[..., : t.shape[-1]]  # noqa: E731
    turned = (ids.T.contiguous().T, weights.T.contiguous().T)
    assert b1 is not None and b2 is not None
    check((wide(x), *turned, wide(w1), wide(w2), wide(b1), b2.T.contiguous().T), spec)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_deterministic_for_any_number_of_threads(dtype: torch.dtype) -> None:
    spec = MoeSpec()
    args = inputs(spec, dtype, 77, experts=8, top_k=3, hidden=96)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results += [moe.run(*args, spec), moe.run(*args, spec)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_with_its_token(dtype: torch.dtype) -> None:
    spec = MoeSpec()
    x, *rest = inputs(spec, dtype, 25)
    x[3, 5] = float("nan")
    got = moe.run(x, *rest, spec)
    assert got[3].isnan().all() and not got[:3].isnan().any() and not got[4:].isnan().any()


def test_a_changed_weight_is_seen() -> None:
    spec = MoeSpec()
    args = inputs(spec, torch.float32)
    first = check(args, spec)
    args[3].mul_(2)
    assert not torch.equal(check(args, spec), first)


def test_refusals_are_words() -> None:
    spec = MoeSpec()
    x, ids, weights, w1, w2, b1, b2 = inputs(spec, torch.float32, bias=torch.float32)
    ask = lambda *a, s=spec: moe.supports(*a, s)  # noqa: E731
    assert "float64" in ask(x.double(), ids, weights, w1, w2, b1, b2)
    assert "w1" in ask(x, ids, weights, w1.bfloat16(), w2, b1, b2)
    assert "stride of w2" in ask(x, ids, weights, w1, w2.mT.contiguous().mT, b1, b2)
    assert "stride of x" in ask(x.T.contiguous().T, ids, weights, w1, w2, b1, b2)
    assert "router" in ask(x, ids, weights.double(), w1, w2, b1, b2)
    assert "b2" in ask(x, ids, weights, w1, w2, b1, b2.half())
    assert "ids" in ask(x, ids.to(torch.int16), weights, w1, w2, b1, b2)
    assert "device" in ask(*(t.to("meta") for t in (x, ids, weights, w1, w2, b1, b2)))


def test_fake_tensors_are_judged() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    spec = MoeSpec()
    args = inputs(spec, torch.float32)
    with FakeTensorMode() as mode:
        fakes = [None if t is None else mode.from_tensor(t) for t in args]
        assert moe.supports(*fakes, spec) is None  # type: ignore[arg-type]


def test_no_compiler_is_a_reason_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def refuse(*_: object) -> None:
        calls.append(1)
        raise RuntimeError("no compiler")

    monkeypatch.setattr(moe, "compile_cpp", refuse)
    spec = MoeSpec("g*u*Abs(g)")
    args = inputs(spec, torch.float32)
    attributes = vars(spec)
    moe._warned.cache_clear()
    for _ in range(2):
        assert "no compiler" in (moe.supports(*args, spec) or "")
        torch.testing.assert_close(
            torch.ops.braze.moe(*args, **attributes).double(), expected(args, spec), rtol=1e-4, atol=1e-5
        )
    assert len(calls) == 1
    assert len([r for r in caplog.records if "no compiler" in r.getMessage()]) == 1
    moe._build.cache_clear()


def test_a_compilers_complaint_is_passed_on() -> None:
    from braze.kernels.cpp.toolchain import compile_cpp

    with pytest.raises(RuntimeError, match="nonsense"):
        compile_cpp(("int64_t",), 'extern "C" void kernel(int64_t a) { nonsense; }')


def test_the_op_runs_it() -> None:
    spec = MoeSpec()
    args = inputs(spec, torch.bfloat16)
    assert torch.equal(torch.ops.braze.moe(*args, **vars(spec)), moe.run(*args, spec))


def test_source_depends_on_what_it_should() -> None:
    texts = {
        source.moe_source(d, layout, t, a, False)  # type: ignore[arg-type]
        for d, layout, t, a in itertools.product(
            DTYPES, ("halves", "none"), (False, True), ("g*sigmoid(g)", "Max(g, 0)")
        )
    }
    assert len(texts) == 24
