"""Expert products with something between them that no word is for: told of with its reason, and attention is not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, scaled_dot_product_attention, silu

from tests.harness import Fused

T, H, INNER, E, K = 6, 24, 16, 4, 2
Between = Callable[[Tensor, Tensor], Tensor]


def inputs() -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = ((T, H), (H, E), (E, H, INNER), (E, H, INNER), (E, INNER, H))
    return [torch.randn(s, generator=rng) * 0.4 for s in shapes]


def route(x: Tensor, router: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = (x @ router).softmax(-1).topk(K)
    return weights, ids


def scores(x: Tensor, router: Tensor) -> Tensor:
    weights, ids = route(x, router)
    return torch.zeros(T, E).scatter(1, ids, weights)


def gathered(act: Between) -> Callable[..., Tensor]:
    def layer(x: Tensor, router: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        weights, ids = route(x, router)
        a = act(torch.einsum("th,tkhi->tki", x, w1[ids]), torch.einsum("th,tkhi->tki", x, w3[ids]))
        return (torch.einsum("tki,tkih->tkh", a, w2[ids]) * weights[..., None]).sum(1)

    return layer


def gathered_rows(act: Between) -> Callable[..., Tensor]:
    def layer(x: Tensor, router: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        weights, ids = route(x, router)
        rows, experts = x.repeat_interleave(K, 0)[:, None], ids.flatten()
        a = act(torch.bmm(rows, w1[experts]), torch.bmm(rows, w3[experts]))
        return (torch.bmm(a, w2[experts]).view(T, K, H) * weights[..., None]).sum(1)

    return layer


def dense(act: Between) -> Callable[..., Tensor]:
    def layer(x: Tensor, router: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        rows = x.expand(E, T, H)
        y = torch.bmm(act(torch.bmm(rows, w1), torch.bmm(rows, w3)), w2)
        return (y * scores(x, router).t()[..., None]).sum(0)

    return layer


def dense_einsum(act: Between) -> Callable[..., Tensor]:
    def layer(x: Tensor, router: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        a = act(torch.einsum("th,ehi->tei", x, w1), torch.einsum("th,ehi->tei", x, w3))
        return torch.einsum("tei,eih,te->th", a, w2, scores(x, router))

    return layer


LAYERS = [gathered, gathered_rows, dense, dense_einsum]
STRANGE: dict[str, tuple[Between, str]] = {
    "a running sum": (lambda g, u: silu(g).cumsum(-1) * u, "aten.cumsum.default"),
    "a norm": (lambda g, u: layer_norm(silu(g) * u, (INNER,)), "aten."),
    "a function without a word": (lambda g, u: torch.special.bessel_j0(g) * u, "bessel_j0"),
}


def reasons(f: Callable[..., object], *args: Tensor) -> list[str]:
    fused = Fused(f)
    fused(*args)
    assert fused.count("moe") == [0]
    told = [m for r in fused.results for m in r.near_misses if m.kind == "moe"]
    assert all("test_expert_unread.py" in m.source for m in told), [m.source for m in told]
    return [m.reason for m in told]


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("name", STRANGE)
def test_what_lies_between_is_told(make: Callable[[Between], Callable[..., Tensor]], name: str) -> None:
    act, word = STRANGE[name]
    (reason,) = reasons(make(act), *inputs())
    assert "no function of one row's elements" in reason or "the activation" in reason, reason
    assert word in reason or "the activation" in reason, reason


@pytest.mark.parametrize("make", LAYERS)
def test_the_layers_themselves_are_found(make: Callable[[Between], Callable[..., Tensor]]) -> None:
    fused = Fused(make(lambda g, u: silu(g) * u))
    fused(*inputs())
    assert (fused.count("moe"), fused.reasons) == ([1], [])


def softmaxed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.bmm(q, k.transpose(1, 2)) / 4
    s = s.masked_fill(torch.ones(s.shape[1:], dtype=torch.bool).triu(1), -torch.inf)
    return torch.bmm(s.float().softmax(-1).to(q.dtype), v)


def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return softmaxed(q, k.repeat_interleave(2, 0)[: len(q)], v.repeat_interleave(2, 0)[: len(q)])


def paged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    blocks = torch.tensor([2, 0, 3, 1])
    return softmaxed(q, k[blocks], v[blocks])


def projected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return softmaxed(torch.relu(q @ q.mT), k @ k.mT, v @ v.mT)


def in_four_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t[None] for t in (q, k, v))
    return (q @ k.mT).softmax(-1) @ v


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q[None], k[None], v[None])


def a_chain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.bmm(torch.bmm(q, k.mT), v)


@pytest.mark.parametrize(
    "f", [softmaxed, masked, repeated, paged, projected, in_four_dimensions, fused_attention, a_chain]
)
def test_attention_is_no_near_miss(f: Callable[..., Tensor]) -> None:
    assert reasons(f, *(torch.randn(4, 8, 16) for _ in range(3))) == []
