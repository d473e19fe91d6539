"""Under dynamic=True, numbers that a find needs are fixed by guards, and numbers of tokens stay symbols."""

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from braze.backend import collect
from tests.harness import assert_close

EXPERTS, HIDDEN, INNER = 8, 32, 24
HEADS, HEAD = 4, 16


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch._inductor.config.patch(force_disable_caches=True), torch.no_grad():
        yield


def counted(f: Callable[..., Any], dynamic: bool | None = True) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    counter = CompileCounterWithBackend("braze")
    return torch.compile(f, backend=counter, dynamic=dynamic), counter


def as_float64(args: Any) -> list[Any]:
    """Arguments in float64, or complex128."""
    return [a.to(torch.promote_types(a.dtype, torch.float64)) if isinstance(a, Tensor) else a for a in args]


def rotated(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = q.shape[-1] // 2
    return q * cos + torch.cat((-q[..., half:], q[..., :half]), -1) * sin


def turn(x: Tensor, wq: Tensor, cos: Tensor, sin: Tensor, heads: int, head: int) -> Tensor:
    b, t, _ = x.shape
    return rotated((x @ wq).view(b, t, heads, head).transpose(1, 2), cos, sin)


def closed_over(x: Tensor, wq: Tensor, cos: Tensor, sin: Tensor, heads: int = HEADS, head: int = HEAD) -> Any:
    def f(x: Tensor, wq: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return turn(x, wq, cos, sin, heads, head)

    return f, (x, wq, cos, sin)


def with_arguments(x: Tensor, wq: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return turn, (x, wq, cos, sin, HEADS, HEAD)


def with_config(x: Tensor, wq: Tensor, cos: Tensor, sin: Tensor) -> Any:
    def f(x: Tensor, wq: Tensor, cos: Tensor, sin: Tensor, config: Any) -> Tensor:
        return turn(x, wq, cos, sin, config.heads, config.head)

    return f, (x, wq, cos, sin, SimpleNamespace(heads=HEADS, head=HEAD))


def in_part(x: Tensor, wq: Tensor, cos: Tensor, sin: Tensor) -> Any:
    def f(x: Tensor, wq: Tensor, cos: Tensor, sin: Tensor, rotary: int, heads: int, head: int) -> Tensor:
        b, t, _ = x.shape
        q = (x @ wq).view(b, t, heads, head).transpose(1, 2)
        return torch.cat((rotated(q[..., :rotary], cos, sin), q[..., rotary:]), -1)

    return f, (x, wq, cos[:, : HEAD // 2], sin[:, : HEAD // 2], HEAD // 2, HEADS, HEAD)


def interleaved(x: Tensor, wq: Tensor, cos: Tensor, sin: Tensor) -> Any:
    def f(x: Tensor, wq: Tensor, turns: Tensor, heads: int, head: int) -> Tensor:
        b, t, _ = x.shape
        q = torch.view_as_complex((x @ wq).view(b, t, heads, head).reshape(b, t, heads, -1, 2))
        return torch.view_as_real(q * turns[:, None]).flatten(3)

    return f, (x, wq, torch.polar(torch.ones(len(cos), HEAD // 2), cos[:, : HEAD // 2]), HEADS, HEAD)


def alone(x: Tensor, wq: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return rotated, (torch.randn(*x.shape[:1], HEADS, len(cos), HEAD), cos, sin)


def rope_inputs(tokens: int = 5) -> tuple[Tensor, ...]:
    width = HEADS * HEAD
    return (
        torch.randn(3, tokens, width),
        torch.randn(width, width) / 8,
        torch.randn(tokens, HEAD),
        torch.randn(tokens, HEAD),
    )


@pytest.mark.parametrize("make", [closed_over, with_arguments, with_config, in_part, interleaved, alone])
def test_a_rotation_with_sizes_that_were_given(make: Callable[..., Any]) -> None:
    f, args = make(*rope_inputs())
    compiled, counter = counted(f)
    with collect() as reports:
        assert_close(compiled(*args), f(*as_float64(args)), 1e-5)
        f, args = make(*rope_inputs(7))
        if make is not closed_over:  # which makes another function
            assert_close(compiled(*args), f(*as_float64(args)), 1e-5)
    assert [[s.kind for s in r.sites] for r in reports] == [["rope"]]
    assert counter.frame_count == 1, "numbers of tokens are no guards"


def test_another_number_of_heads_compiles_anew() -> None:
    x, wq, cos, sin = rope_inputs()
    compiled, counter = counted(turn)
    with collect() as reports:
        for heads, head in ((HEADS, HEAD), (2 * HEADS, HEAD // 2), (HEADS, HEAD)):
            args = (x, wq, cos[:, :head], sin[:, :head], heads, head)
            assert_close(compiled(*args), turn(*as_float64(args)), 1e-5)
    assert [[s.dims["head"] for s in r.sites] for r in reports] == [[HEAD], [HEAD // 2]]
    assert counter.frame_count == 2


def block(x: Tensor, router: Tensor, w1: Tensor, w2: Tensor, k: int, experts: int) -> Tensor:
    scores = (x @ router).softmax(-1)
    weights, ids = scores.topk(k, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    dense = torch.zeros_like(scores).scatter(1, ids, weights)
    gate, up = torch.bmm(x.unsqueeze(0).expand(experts, -1, -1), w1).chunk(2, -1)
    return (torch.bmm(F.silu(gate) * up, w2) * dense.t().unsqueeze(-1)).sum(0)


def gathered(x: Tensor, router: Tensor, w1: Tensor, w2: Tensor, k: int, experts: int) -> Tensor:
    weights, ids = (x @ router).softmax(-1).topk(k, -1)
    gate, up = torch.einsum("th,tkhi->tki", x, w1[ids]).chunk(2, -1)
    return (torch.einsum("tki,tkih->tkh", F.silu(gate) * up, w2[ids]) * weights.unsqueeze(-1)).sum(1)


def moe_inputs(tokens: int = 10) -> list[Tensor]:
    shapes = ((tokens, HIDDEN), (HIDDEN, EXPERTS), (EXPERTS, HIDDEN, 2 * INNER), (EXPERTS, INNER, HIDDEN))
    return [torch.randn(*s) / (s[-2] ** 0.5 if i else 1) for i, s in enumerate(shapes)]


@pytest.mark.parametrize("f", [block, gathered])
def test_experts_with_numbers_that_were_given(f: Callable[..., Tensor]) -> None:
    compiled, counter = counted(f)
    with collect() as reports:
        for tokens in (10, 13):
            args = (*moe_inputs(tokens), 3, EXPERTS)
            assert_close(compiled(*args), f(*as_float64(args)), 1e-5)
        for k in (2, 3):
            args = (*moe_inputs(), k, EXPERTS)
            assert_close(compiled(*args), f(*as_float64(args)), 1e-5)
    assert [[s.kind for s in r.sites] for r in reports] == [["moe", "router"]] * 2
    assert [r.sites[0].dims["top_k"] for r in reports] == [3, 2]
    assert all(
        isinstance(n, int) for r in reports for s in r.sites for k, n in s.dims.items() if k not in ("tokens", "dtype")
    )
    assert counter.frame_count == 2


class Clamped(nn.Module):
    """Experts with floats of their own, as GPT-OSS has them; `gain` is behind everything that is fused."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.limit, self.scale, self.eps = 1.702, 7.5, 2.5, 1e-5
        self.weights = nn.ParameterList(moe_inputs()[1:])

    def forward(self, x: Tensor, gain: float) -> Tensor:
        router, w1, w2 = self.weights
        weights, ids = (x @ router).softmax(-1).topk(2, -1)
        weights = weights / (weights.sum(-1, keepdim=True) + self.eps) * self.scale
        gate, up = torch.einsum("th,tkhi->tki", x, w1[ids]).chunk(2, -1)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        rows = torch.einsum("tki,tkih->tkh", (up + 1) * gate * torch.sigmoid(gate * self.alpha), w2[ids])
        return torch.tanh((rows * weights.unsqueeze(-1)).sum(1) * gain)


def test_floats_that_a_site_needs() -> None:
    model = Clamped()
    compiled, _ = counted(model)
    exact = copy.deepcopy(model).double()
    with collect() as reports:
        for alpha, gain in ((1.702, 0.5), (1.702, 0.25), (1.5, 0.25)):
            model.alpha = exact.alpha = alpha
            x = torch.randn(10, HIDDEN)
            assert_close(compiled(x, gain), exact(x.double(), gain), 1e-5)
    assert [[s.kind for s in r.sites] for r in reports] == [["moe", "router"]] * 2
    assert ["1.702" in r.sites[0].form for r in reports] == [True, False]
    assert "divided by their sum + 1e-05, scale 2.5" in reports[0].sites[1].form


def test_the_floats_of_a_norm_before_a_rotation() -> None:
    def f(q: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        return rotated(weight * (q * torch.rsqrt(q.square().mean(-1, keepdim=True) + eps)), cos, sin)

    compiled, _ = counted(f)
    args = (torch.randn(3, HEADS, 5, HEAD), torch.randn(HEAD), torch.randn(5, HEAD), torch.randn(5, HEAD), 1e-5)
    with collect() as reports:
        assert_close(compiled(*args), f(*as_float64(args)), 1e-5)
    assert "rms_norm before (eps 1e-05, weight)" in reports[0].sites[0].form


def test_numbers_that_change_at_every_call_stay_symbols_after_some() -> None:
    compiled, counter = counted(gathered)
    with collect() as reports:
        for k in range(2, EXPERTS):
            args = (*moe_inputs(), k, EXPERTS)
            assert_close(compiled(*args), gathered(*as_float64(args)), 1e-5)
    half = torch._dynamo.config.recompile_limit // 2
    assert [r.sites[0].dims["top_k"] for r in reports[:half]] == [*range(2, half + 2)]
    assert counter.frame_count == len(reports) == half + 1, "the last one serves all others"


def test_numbers_that_were_fixed_are_part_of_what_a_cache_compares(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with torch._inductor.config.patch(force_disable_caches=False):
        for k in (3, 2, 3):
            torch._dynamo.reset()
            args = (*moe_inputs(), k, EXPERTS)
            assert_close(
                torch.compile(gathered, backend="braze", dynamic=True)(*args), gathered(*as_float64(args)), 1e-5
            )


def test_sizes_that_someone_wants_dynamic_stay_so() -> None:
    compiled, counter = counted(rotated, dynamic=None)
    with collect() as reports:
        for head in (HEAD, 2 * HEAD):
            args = [torch.randn(3, HEADS, 5, head), torch.randn(5, head), torch.randn(5, head)]
            for a in args:
                torch._dynamo.mark_dynamic(a, a.ndim - 1)
            assert_close(compiled(*args), rotated(*as_float64(args)), 1e-5)
    assert [len(r.sites) for r in reports] == [0]
    assert counter.frame_count == 1


@pytest.mark.skipif(
    torch.__version__ < "2.12",
    reason="Inductor of torch 2.11 has no numbers for symbols after a pass: nothing is fused",
)
def test_a_backward_pass_after_numbers_were_fixed() -> None:
    x, wq, cos, sin = rope_inputs()
    compiled, counter = counted(turn)
    with collect() as reports, torch.enable_grad():
        for dtype in (torch.float64, torch.float32):
            w = wq.to(dtype, copy=True).requires_grad_()
            f = turn if dtype == torch.float64 else compiled
            f(x.to(dtype), w, cos.to(dtype), sin.to(dtype), HEADS, HEAD).square().sum().backward()
            if dtype == torch.float64:
                exact = w.grad
    assert_close(w.grad, exact, 1e-5)
    assert [s.kind for s in reports[0].sites] == ["rope"]
    assert counter.frame_count == 1
