"""Routers in the spellings that models use: found behind their experts, their constants read off, and what is bent refused."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot, softplus

from braze.kernels import reference
from braze.kernels.spec import RouteSpec
from braze.passes import pipeline, proof
from tests.harness import Fused, assert_close
from tests.tiny import FAMILIES, build, tokens

T, E, K, H = 9, 16, 3, 8
GROUPS, OPEN = 4, 2

Router = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def inputs(length: int = T, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Hidden states, the router's weight and bias, and the experts' weights."""
    rng = torch.Generator().manual_seed(0)
    shapes = ((length, H), (E, H), (E,), (E, 4 * H, H), (E, H, 2 * H))
    return tuple(torch.randn(s, generator=rng).to(dtype) for s in shapes)


def experts(x: Tensor, weights: Tensor, ids: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    rows = x[:, None].expand(-1, ids.shape[1], -1).reshape(-1, H)
    e = ids.reshape(-1)
    gate, up = torch.bmm(w1[e], rows.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
    y = torch.bmm(w2[e], (torch.nn.functional.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
    return (y * weights.reshape(-1, 1)).view(x.shape[0], -1, H).sum(1)


def layer(router: Router) -> Callable[..., Tensor]:
    def run(x: Tensor, gate: Tensor, bias: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        weights, ids = router(x @ gate.T, bias)
        return experts(x, weights.to(x.dtype), ids, w1, w2)

    return run


def in_groups(choice: Tensor, rank: Tensor, closed: float) -> Tensor:
    kept = torch.zeros_like(rank).scatter_(1, rank.topk(OPEN, sorted=False).indices, 1)
    mask = kept.unsqueeze(-1).expand(-1, GROUPS, E // GROUPS).reshape(-1, E)
    return choice.masked_fill(~mask.bool(), closed)


# ------------------------------------------------------------------------------------------------ the spellings


def softmax_first(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = torch.softmax(x, -1, dtype=torch.float32).topk(K)
    return weights / weights.sum(-1, keepdim=True), ids


def softmax_last(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    values, ids = x.topk(K)
    return values.softmax(-1), ids


def softmax_by_hand(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    exponents = torch.exp(x - x.logsumexp(-1, keepdim=True))
    ids = exponents.topk(K, -1).indices
    return normalize(exponents.gather(1, ids), p=1, dim=-1, eps=1e-12), ids


def softmax_unnormalised(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = x.double().softmax(-1).topk(K, sorted=False)
    return 0.5 * weights.float(), ids


def sigmoid_last(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    values, ids = x.topk(K)
    return 1 / (1 + torch.exp(-values)), ids


def deepseek_v3(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = x.sigmoid()
    choice = scores + bias
    rank = choice.view(-1, GROUPS, E // GROUPS).topk(2, -1)[0].sum(-1)
    ids = in_groups(choice, rank, float("-inf")).topk(K, sorted=False)[1]
    weights = scores.gather(1, ids)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5, ids


def groups_that_count_as_zero(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = x.softmax(-1)
    choice = bias + scores
    ids = in_groups(choice, choice.view(-1, GROUPS, E // GROUPS).amax(-1), 0.0).topk(K)[1]
    return 16.0 * scores.gather(1, ids), ids


def sqrtsoftplus(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = softplus(x).sqrt()
    ids = (scores + bias.to(scores.dtype)).topk(K).indices
    weights = torch.take_along_dim(scores, ids, 1)
    return 1.5 * weights / (weights.sum(-1, keepdim=True) + 1e-20), ids


def clamped_sum(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = x.softmax(1)
    ids = torch.topk(scores + bias[None], K, dim=1).indices
    weights = scores.gather(-1, ids)
    return weights / torch.clamp(weights.sum(1, keepdim=True), min=1e-12), ids


def bias_on_logits(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    ids = (x + bias).topk(K).indices
    weights = x.gather(1, ids).sigmoid()
    return weights / (weights.sum(-1, keepdim=True) + 1e-6), ids


def softcapped(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = (10.0 * torch.tanh(x / 10.0)).sigmoid()
    ids = (scores + bias).topk(K).indices
    return scores.gather(1, ids), ids


def with_a_scale_an_expert(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = x.softmax(-1).topk(K)
    return weights / weights.sum(-1, keepdim=True) * bias[ids], ids


def top_1(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = x.softmax(-1).max(-1)
    return weights.unsqueeze(1), ids.unsqueeze(1)


def joint_with_shared(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    routed, always = x[:, :-2], x[:, -2:]
    ids = (routed.sigmoid() + bias[:-2]).topk(K).indices
    joint = torch.cat((routed.gather(1, ids), always), 1)
    return (torch.nn.functional.logsigmoid(joint).softmax(-1) * 8.0)[:, :K], ids


# A part of these is a router; what is before or after it stays.


def computed_bias(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = x.sigmoid()
    ids = (scores + 0.5 * bias).topk(K).indices
    return scores.gather(1, ids), ids


def groups_by_the_sum_of_all(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    rank = x.view(-1, GROUPS, E // GROUPS).sum(-1)
    values, ids = in_groups(x, rank, float("-inf")).topk(K)
    return values.softmax(-1), ids


def euclidean_norm(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = x.sigmoid().topk(K)
    return weights / weights.norm(dim=-1, keepdim=True), ids


def exchanged(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = x.softmax(-1).topk(K)
    return weights, ids.flip(1)


SPELLINGS: dict[str, tuple[Router, RouteSpec]] = {
    "softmax first": (softmax_first, RouteSpec(K, renorm="add")),
    "softmax last": (softmax_last, RouteSpec(K, renorm="add")),
    "softmax by hand": (softmax_by_hand, RouteSpec(K, renorm="add")),
    "softmax unnormalised": (softmax_unnormalised, RouteSpec(K, scale=0.5)),
    "sigmoid last": (sigmoid_last, RouteSpec(K, "sigmoid")),
    "deepseek_v3": (
        deepseek_v3, RouteSpec(K, "sigmoid", "scores", GROUPS, OPEN, "top2", renorm="add", eps=1e-20, scale=2.5),
    ),
    "groups that count as zero": (
        groups_that_count_as_zero, RouteSpec(K, "softmax", "scores", GROUPS, OPEN, "max", "zero", scale=16.0),
    ),
    "sqrtsoftplus": (sqrtsoftplus, RouteSpec(K, "sqrtsoftplus", "scores", renorm="add", eps=1e-20, scale=1.5)),
    "clamped sum": (clamped_sum, RouteSpec(K, "softmax", "scores", renorm="clamp", eps=1e-12)),
    "bias on logits": (bias_on_logits, RouteSpec(K, "sigmoid", renorm="add", eps=1e-6)),
    "softcapped": (softcapped, RouteSpec(K, "sigmoid", "scores")),
    "a scale an expert": (with_a_scale_an_expert, RouteSpec(K, renorm="add")),
    "top 1": (top_1, RouteSpec(1)),
    "joint with shared": (joint_with_shared, RouteSpec(K, "sigmoid", "scores", renorm="add", scale=8.0, shared=2)),
    "computed bias": (computed_bias, RouteSpec(K, "sigmoid", "scores")),
    "groups by the sum of all": (groups_by_the_sum_of_all, RouteSpec(K, renorm="add")),
    "another norm": (euclidean_norm, RouteSpec(K, "sigmoid")),
    "exchanged": (exchanged, RouteSpec(K)),
}  # fmt: skip


class Seen:
    """The sites that passes found, through a hook on the rewrite."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sites: list[Any] = []
        rewrite = pipeline.rewrite

        def record(site: Any) -> Any:
            self.sites.append(site)
            return rewrite(site)

        monkeypatch.setattr(pipeline, "rewrite", record)

    @property
    def specs(self) -> list[RouteSpec]:
        return [s.spec for s in self.sites if isinstance(s.spec, RouteSpec)]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return Seen(monkeypatch)


def meaning(spec: RouteSpec) -> RouteSpec:
    return RouteSpec(
        spec.top_k, spec.scoring, spec.select_on, spec.groups, spec.top_groups, spec.group_score, spec.closed,
        spec.renorm, spec.eps, spec.scale, spec.shared,
    )  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_has_its_normal_form(name: str, seen: Seen) -> None:
    router, wanted = SPELLINGS[name]
    given = inputs()
    fused = Fused(layer(router))
    got = fused(*given)
    assert fused.reasons == []
    assert fused.count("router") == [1]
    assert list(map(meaning, seen.specs)) == [wanted]
    assert "agree" in next(f.proof for f in fused.findings if f.kind == "router")
    assert_close(got, layer(router)(*(v.double() for v in given)), 1e-5)


@pytest.mark.parametrize("name", ["softmax first", "deepseek_v3", "clamped sum", "joint with shared"])
@pytest.mark.parametrize("length", [1, 200])
def test_any_number_of_tokens_tells_as_much(name: str, length: int, seen: Seen) -> None:
    """One token is one row of probes a run: there are more runs then."""
    router, wanted = SPELLINGS[name]
    fused = Fused(layer(router), dynamic=False)
    fused(*inputs(length))
    assert list(map(meaning, seen.specs)) == [wanted], fused.reasons


def test_lengths_that_change(seen: Seen) -> None:
    router, wanted = SPELLINGS["deepseek_v3"]
    fused = Fused(layer(router))
    for length in (5, 8, 12):
        given = inputs(length)
        assert_close(fused(*given), layer(router)(*(v.double() for v in given)), 1e-5)
    assert fused.count("router") == [1, 1], fused.reasons
    assert list(map(meaning, seen.specs)) == [wanted] * 2


def test_logits_and_scores_may_have_other_uses(seen: Seen) -> None:
    """A model returns its logits for a loss: they stay what they were."""

    def run(x: Tensor, gate: Tensor, bias: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, ...]:
        logits = x @ gate.T
        scores = logits.softmax(-1)
        weights, ids = scores.topk(K)
        weights = weights / weights.sum(-1, keepdim=True)
        counts = one_hot(ids, E).sum((0, 1))
        return experts(x, weights, ids, w1, w2), logits, scores.mean(0), counts, weights

    given = inputs()
    fused = Fused(run)
    got, expected = fused(*given), run(*(v.double() for v in given))
    assert list(map(meaning, seen.specs)) == [SPELLINGS["softmax first"][1]], fused.reasons
    for ours, exact in zip(got, expected, strict=True):
        assert_close(ours, exact.double(), 1e-5)


def test_rounding_is_once_and_at_the_end(seen: Seen) -> None:
    router, _ = SPELLINGS["softmax first"]
    fused = Fused(layer(router))
    fused(*inputs(dtype=torch.bfloat16))
    (spec,) = seen.specs
    assert spec.out_dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------------- refusals


def least_likely(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = x.softmax(-1).topk(K, largest=False)
    return weights, ids


def bias_in_the_weights(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = (x.sigmoid() + bias).topk(K)
    return weights, ids


def another_scoring(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = (x.atan() + 2).topk(K)
    return weights, ids


def ids_from_a_table(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    ids = torch.arange(E).view(-1, 1).expand(-1, K)[x.argmax(-1)]
    return x.softmax(-1).gather(1, ids), ids


def two_routers(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return x.flip(0).sigmoid().topk(K).values, x.topk(K).indices


def over_tokens(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = x.softmax(0).topk(K)
    return weights, ids


REFUSALS: dict[str, tuple[Router, str]] = {
    "the least likely": (least_likely, "chooses experts as"),
    "the bias in the weights": (bias_in_the_weights, "gives the weights"),
    "another scoring": (another_scoring, "gives the weights"),
    "ids from a table": (ids_from_a_table, "no top-k"),
    "weights of another token": (two_routers, "gives the weights"),
    "a softmax over tokens": (over_tokens, "chooses experts as"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_no_known_router_stays_and_the_experts_are_fused(name: str) -> None:
    router, reason = REFUSALS[name]
    given = inputs()
    fused = Fused(layer(router))
    got = fused(*given)
    assert fused.count("moe") == [1]
    assert fused.count("router") == [0]
    assert [r for r in fused.reasons if reason in r] == fused.reasons != [], fused.reasons
    assert_close(got, layer(router)(*(v.double() for v in given)), 1e-5)


def test_a_top_k_with_other_uses_is_not_computed_twice() -> None:
    def run(x: Tensor, gate: Tensor, bias: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
        scores = (x @ gate.T).sigmoid()
        values, ids = (scores + bias).topk(K)
        return experts(x, scores.gather(1, ids), ids, w1, w2), values

    fused = Fused(run)
    fused(*inputs())
    assert fused.count("router") == [0]
    (reason,) = fused.reasons
    assert "is also used by" in reason


def test_routing_given_by_the_caller_is_no_near_miss() -> None:
    x, _, _, w1, w2 = inputs()
    ids = torch.arange(T * K).view(T, K) % E
    fused = Fused(experts)
    fused(x, torch.rand(T, K), ids, w1, w2)
    assert fused.count("moe") == [1]
    assert fused.reasons == []


BENDS: dict[str, list[dict[str, Any]]] = {
    "deepseek_v3": [
        {"eps": 0.0}, {"eps": 1e-19}, {"renorm": "clamp"}, {"renorm": "no"}, {"scale": 2.5001}, {"group_score": "max"},
        {"top_groups": 3}, {"scoring": "sqrtsoftplus"}, {"select_on": "logits"}, {"groups": 2},
    ],
    "groups that count as zero": [{"closed": "out"}, {"group_score": "top2"}, {"groups": 1, "top_groups": 1}],
    "clamped sum": [{"renorm": "add"}, {"eps": 1e-10}, {"select_on": "logits"}, {"scoring": "sigmoid"}],
}  # fmt: skip


@pytest.mark.parametrize("name", BENDS)
@pytest.mark.parametrize("length", [1, 60])
def test_a_bent_site_fails_its_proof(name: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof tells apart what differs in one attribute only, at one token too."""
    prove = proof.router
    refused: list[str] = []

    def bent(site: Any, sizes: Any) -> str:
        for change in BENDS[name]:
            with pytest.raises(proof.Refused) as refusal:
                prove(replace(site, spec=replace(site.spec, **change)), sizes)
            refused.append(str(refusal.value))
        return prove(site, sizes)

    monkeypatch.setattr(proof, "router", bent)
    fused = Fused(layer(SPELLINGS[name][0]), dynamic=False)
    fused(*inputs(length))
    assert fused.count("router") == [1]
    assert len(refused) == len(BENDS[name])


# --------------------------------------------------------------------------------------------------- real models

FORMS = {
    "mixtral": "softmax, top 2, divided by their sum",
    "qwen3_moe": "softmax, top 2, divided by their sum",
    "llama4": "sigmoid, top 1",
    "gpt_oss": "softmax, top 2, divided by their sum",
    "deepseek_v3": (
        "sigmoid, top 2 of the scores + bias, in 1 of 2 groups by their sum of the top 2, divided by their sum + 1e-20, "
        "scale 2.5"
    ),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_models(name: str, dtype: torch.dtype) -> None:
    fused = Fused(build(name, dtype))
    fused(tokens(), use_cache=False)
    assert fused.count("router") == [FAMILIES[name].moe], fused.reasons
    found = [f for f in fused.findings if f.kind == "router"]
    assert {f.form for f in found} == {FORMS[name]}
    assert all(f"modeling_{name}.py" in f.source for f in found)


def test_reference_spelled_out() -> None:
    """One token by hand: biased choice in the best group, unbiased weights, a sum with its epsilon."""
    spec = RouteSpec(2, "sigmoid", "scores", 2, 1, "max", renorm="add", eps=1.0, scale=3.0)
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0], dtype=torch.float64)
    bias = torch.tensor([1.0, 0.0, 0.0, 0.0])
    weights, ids = reference.route(logits, bias, spec)
    a, b = 1 / (1 + torch.tensor(-0.0).exp()), 1 / (1 + torch.tensor(-1.0).double().exp())
    assert ids.tolist() == [0, 1]  # 0.5 + 1 leads its group to the front; 2.0 is in the other
    torch.testing.assert_close(weights, 3.0 * torch.stack((a.double(), b)) / (a + b + 1.0))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["softmax_first", "softmax_last", "softmax_by_hand_in_batches"])
def test_tokens_in_batches(name: str, dynamic: bool) -> None:
    """The router keeps [batch, tokens, .] and its experts have rows: what it gives is as it gives it, before a view."""

    def by_hand(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        ids = x.softmax(-1).topk(K).indices
        return normalize(x.softmax(-1).gather(-1, ids), p=1, dim=-1, eps=1e-12), ids

    router = {"softmax_first": softmax_first, "softmax_last": softmax_last}.get(name, by_hand)

    def run(x: Tensor, gate: Tensor, bias: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        weights, ids = router(x @ gate.T, bias)
        y = experts(x.reshape(-1, H), weights.reshape(-1, K), ids.reshape(-1, K), w1, w2)
        return y.view(x.shape)

    x, *rest = inputs(15)
    fused = Fused(run, dynamic=dynamic)
    args = (x.view(5, 3, H), *rest)
    assert_close(fused(*args), run(*(t.double() for t in args)), 1e-5)
    assert (fused.count("moe"), fused.count("router")) == ([1], [1]), fused.reasons
