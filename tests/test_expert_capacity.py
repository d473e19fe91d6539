"""Dispatch by masks [tokens, experts, places]: GShard's and Switch's einsums, with tokens that find no place, and without.

The reference goes through the rows in the order in which they take their expert's places, in float64.
"""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, einsum
from torch.nn.functional import one_hot, silu

from tests.harness import Fused, assert_close

T, H, INNER, E, C = 22, 24, 20, 4, 3
GROUPS = 2
Layer = Callable[..., Tensor]


def inputs(tokens: int = T) -> list[Tensor]:
    """x, router, w1 [E, H, 2I], w2 [E, I, H], b1, b2."""
    rng = torch.Generator().manual_seed(0)
    shapes = ((tokens, H), (H, E), (E, H, 2 * INNER), (E, INNER, H), (E, 2 * INNER), (E, H))
    return [torch.randn(s, generator=rng) * 0.5 for s in shapes]


def glu(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, -1)
    return silu(gate) * up


def experts(z: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return einsum("eci,eih->ech", glu(einsum("ech,ehi->eci", z, w1)), w2)


def switch(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    """The best expert, with the first C of its tokens."""
    gate, ids = (x @ router).softmax(-1).max(-1)
    mask = one_hot(ids, E)
    place = (mask.cumsum(0) * mask).sum(-1) - 1
    kept = mask * (place < C)[:, None]
    dispatch = (kept[..., None] * one_hot(place.clamp(0, C - 1), C)[:, None]).to(x.dtype)
    y = experts(einsum("tec,th->ech", dispatch, x), w1, w2)
    return einsum("tec,ech->th", dispatch * gate[:, None, None], y)


def switch_with_biases(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    """An empty place gives what the biases give, with no weight; masks by comparison and scatter, plain products."""
    gate, ids = (x @ router).softmax(-1).max(-1)
    mask = torch.zeros(x.shape[0], E, dtype=torch.int64).scatter_(1, ids[:, None], 1)
    place = ((mask.cumsum(0) - 1) * mask).sum(-1)
    dispatch = (mask[..., None] * (place[:, None] == torch.arange(C))[:, None]).to(x.dtype).flatten(1)
    z = (dispatch.t() @ x).view(E, C, H)
    y = torch.bmm(glu(torch.bmm(z, w1) + b1[:, None]), w2) + b2[:, None]
    return (dispatch * gate[:, None]) @ y.flatten(0, 1)


def gshard(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    """The best expert and the best of the others, which waits until all first choices have places; weights are divided by the
    sum of those that are kept, and the dispatch is where the weights are."""
    logits = x @ router
    gates = logits.softmax(-1)
    first = one_hot(gates.argmax(-1), E)
    second = one_hot(logits.masked_fill(first.bool(), float("-inf")).argmax(-1), E)
    places = [first.cumsum(0) - 1, second.cumsum(0) - 1 + first.sum(0, keepdim=True)]
    masks = [m * (p < C) for m, p in zip((first, second), places, strict=True)]
    g = [(gates * m).sum(1) for m in masks]
    total = (g[0] + g[1]).clamp(min=torch.finfo(x.dtype).eps)
    combine = sum(
        einsum("se,sc->sec", (w / total)[:, None] * m, one_hot((p * m).sum(1), C).to(x.dtype))
        for w, m, p in zip(g, masks, places, strict=True)
    )
    y = experts(einsum("sec,sm->ecm", combine.bool().to(x.dtype), x), w1, w2)
    return einsum("sec,ecm->sm", combine, y)


def top_two_in_turn(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    """Rows (token, slot) one after the other; the experts' dimension last but one."""
    weights, ids = (x @ router).softmax(-1).topk(2)
    rows = one_hot(ids, E).flatten(0, 1)
    place = (rows.cumsum(0) * rows - 1).view(-1, 2, E)
    dispatch = one_hot(place.clamp(-1, C) + 1, C + 2)[..., 1 : C + 1].to(x.dtype)  # t k e c
    y = experts(einsum("tkec,th->ech", dispatch, x), w1, w2)
    return einsum("tkec,tk,ech->th", dispatch, weights, y)


def a_place_for_everyone(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    weights, ids = (x @ router).softmax(-1).topk(2)
    mask = one_hot(ids, E).sum(1)
    place = mask.cumsum(0) - 1
    dispatch = (mask[..., None] * (place[..., None] == torch.arange(x.shape[0]))).to(x.dtype)
    scores = torch.zeros(x.shape[0], E).scatter(1, ids, weights)
    y = experts(einsum("tec,th->ech", dispatch, x), w1, w2)
    return einsum("tec,te,ech->th", dispatch, scores, y)


def groups_of_tokens(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    """Tokens in groups, each with its own places."""
    x = x.view(GROUPS, -1, H)
    gate, ids = (x @ router).softmax(-1).max(-1)
    mask = one_hot(ids, E)
    place = ((mask.cumsum(1) - 1) * mask).sum(-1)
    dispatch = (mask[..., None] * (place[..., None] == torch.arange(C))[:, :, None]).to(x.dtype)
    z = einsum("gsec,gsm->egcm", dispatch, x)
    y = einsum("egci,eih->egch", glu(einsum("egch,ehi->egci", z, w1)), w2)
    return einsum("gsec,egch->gsh", dispatch * gate[..., None, None], y).reshape(-1, H)


Row = tuple[int, int, float, bool]


def first_choices(gates: Tensor, capacity: int = C) -> list[Row]:
    """(token, expert, weight, kept) in order."""
    best = gates.max(-1)
    return kept(((t, e, w) for t, (w, e) in enumerate(zip(*map(Tensor.tolist, best), strict=True))), capacity)


def in_groups(gates: Tensor) -> list[Row]:
    size = len(gates) // GROUPS
    parts = [first_choices(gates[i * size : (i + 1) * size]) for i in range(GROUPS)]
    return [(t + i * size, *rest) for i, part in enumerate(parts) for t, *rest in part]  # type: ignore[misc]


def kept(rows: Iterable[tuple[int, int, float]], capacity: int) -> list[Row]:
    taken = dict.fromkeys(range(E), 0)
    out = []
    for t, e, w in rows:
        out.append((t, e, w, taken[e] < capacity))
        taken[e] += 1
    return out


def two_choices(gates: Tensor) -> list[Row]:
    w, e = (v.t().flatten().tolist() for v in gates.topk(2))
    rows = kept(zip(list(range(len(gates))) * 2, e, w, strict=True), C)
    total = dict.fromkeys(range(len(gates)), 0.0)
    for t, _, v, has in rows:
        total[t] += v * has
    return [(t, e, v / max(total[t], 1e-7), has) for t, e, v, has in rows]


def in_turn(gates: Tensor, capacity: int = C) -> list[Row]:
    w, e = gates.topk(2)
    rows = ((t, int(e[t, j]), float(w[t, j])) for t in range(len(gates)) for j in range(2))
    return kept(rows, capacity)


LAYERS: dict[Layer, Callable[[Tensor], list[Row]]] = {
    switch: first_choices,
    switch_with_biases: first_choices,
    gshard: two_choices,
    top_two_in_turn: in_turn,
    groups_of_tokens: in_groups,
    a_place_for_everyone: lambda gates: in_turn(gates, len(gates)),
}


def exact(layer: Layer, args: list[Tensor]) -> tuple[Tensor, int]:
    """(the result in float64, how many rows were dropped)."""
    x, router, w1, w2, b1, b2 = (t.double() for t in args)
    biased = layer is switch_with_biases
    out = torch.zeros_like(x)
    rows = LAYERS[layer]((x @ router).softmax(-1))
    for t, e, w, has in rows:
        if has:
            out[t] += w * (glu(x[t] @ w1[e] + biased * b1[e]) @ w2[e] + biased * b2[e])
    return out, sum(not has for *_, has in rows)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda f: f.__name__)
def test_rows_without_a_place_are_dropped(layer: Layer) -> None:
    args = inputs()
    fused = Fused(layer)
    got = fused(*args)
    assert fused.count("moe") == [1], fused.reasons
    (finding,) = (f for f in fused.findings if f.kind == "moe")
    assert finding.form.startswith("capacity, act(g, u) = g*u*sigmoid(g), gate/up halves, weight on output")
    assert (finding.dims["hidden"], finding.dims["inner"]) == (H, INNER)
    expected, dropped = exact(layer, args)
    assert (dropped > 0) == (layer is not a_place_for_everyone)
    assert_close(got, expected, 1e-5)


@pytest.mark.parametrize("layer", [switch, top_two_in_turn], ids=lambda f: f.__name__)
def test_a_dropped_row_costs_nothing(layer: Layer) -> None:
    """Its id is -1: kernels leave it out."""
    fused = Fused(layer)
    args = inputs()
    fused(*args)
    (call,) = (c for r in fused.results for c, f in r.calls if f.kind == "moe")
    seen: list[Tensor] = []

    class Seeing(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            value = super().run_node(n)
            if n is call.args[1]:
                seen.append(value)
            return value

    graph = call.graph
    order = {p.meta["val"].shape: p for p in graph.find_nodes(op="placeholder")}
    given = {order[torch.Size(a.shape)]: a for a in args if torch.Size(a.shape) in order}
    Seeing(torch.fx.GraphModule({}, graph)).run(*(given[p] for p in graph.find_nodes(op="placeholder")))
    assert int((seen[0] == -1).sum()) == exact(layer, args)[1]


@pytest.mark.parametrize("layer", [switch, gshard], ids=lambda f: f.__name__)
def test_compiled(layer: Layer) -> None:
    """Inductor takes what chooses the ids."""
    torch._dynamo.reset()
    args = inputs()
    with torch.no_grad():
        got = torch.compile(layer, backend="braze", options={"require": ["moe"]})(*args)
    assert_close(got, exact(layer, args)[0], 1e-5)


def test_token_counts_that_change() -> None:
    for layer in (switch, a_place_for_everyone):
        fused = Fused(layer)
        for tokens in (22, 17, 11):
            args = inputs(tokens)
            assert_close(fused(*args), exact(layer, args)[0], 1e-5)
        assert fused.count("moe") == [1, 1], fused.reasons


# --------------------------------------------------------------------------------------------------- refusals


def masks(x: Tensor, router: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(gate, mask [T, E], place [T], dispatch [T, E, C])."""
    gate, ids = (x @ router).softmax(-1).max(-1)
    mask = one_hot(ids, E)
    place = ((mask.cumsum(0) - 1) * mask).sum(-1)
    return gate, mask, place, (mask[..., None] * (place[:, None] == torch.arange(C))[:, None]).to(x.dtype)


def two_tokens_a_place(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    gate, mask, place, _ = masks(x, router)
    dispatch = (mask[..., None] * (place[:, None] // 2 == torch.arange(C))[:, None]).to(x.dtype)
    y = experts(einsum("tec,th->ech", dispatch, x), w1, w2)
    return einsum("tec,ech->th", dispatch * gate[:, None, None], y)


def weights_on_both_sides(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    gate, *_, dispatch = masks(x, router)
    combine = dispatch * gate[:, None, None]
    return einsum("tec,ech->th", combine, experts(einsum("tec,th->ech", combine, x), w1, w2))


def another_place(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    gate, *_, dispatch = masks(x, router)
    y = experts(einsum("tec,th->ech", dispatch, x), w1, w2)
    return einsum("tec,ech->th", dispatch.roll(1, -1) * gate[:, None, None], y)


def another_token(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    gate, *_, dispatch = masks(x, router)
    y = experts(einsum("tec,th->ech", dispatch, x), w1, w2)
    return einsum("tec,ech->th", torch.cat((dispatch[1:], dispatch[:1])) * gate[:, None, None], y)


def signs_decide(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    """Tokens are given to the experts where the weight is positive; these weights may be negative."""
    gate, _ = (x @ router).max(-1)
    *_, dispatch = masks(x, router)
    combine = dispatch * gate[:, None, None]
    return einsum("tec,ech->th", combine, experts(einsum("tec,th->ech", (combine > 0).to(x.dtype), x), w1, w2))


def soft(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    """Soft MoE: places hold mixtures of all tokens."""
    logits = einsum("th,eh->te", x, router.t())[..., None] + torch.arange(C)
    y = experts(einsum("tec,th->ech", logits.softmax(0), x), w1, w2)
    return einsum("tec,ech->th", logits.flatten(1).softmax(-1).view(-1, E, C), y)


def experts_out_of_order(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    gate, *_, dispatch = masks(x, router)
    y = experts(einsum("tec,th->ech", dispatch, x), w1, w2)
    return einsum("tec,ech->th", dispatch * gate[:, None, None], torch.cat((y[1:], y[:1])))


def outputs_kept(x, router, w1, w2, b1, b2):  # type: ignore[no-untyped-def]
    gate, *_, dispatch = masks(x, router)
    y = experts(einsum("tec,th->ech", dispatch, x), w1, w2)
    return einsum("tec,ech->th", dispatch * gate[:, None, None], y), y


REFUSED: dict[Layer, str] = {
    two_tokens_a_place: "the subgraph and the op differ",
    weights_on_both_sides: "the subgraph and the op differ",
    another_place: "the subgraph and the op differ",
    another_token: "are no top-k: none is chosen by comparing ids",
    signs_decide: "the subgraph and the op differ",
    soft: "are no top-k: none is chosen by comparing ids",
    experts_out_of_order: "are not in the order of 4 experts",
    outputs_kept: "is also saved for the backward pass or returned",
}


@pytest.mark.parametrize("layer", REFUSED, ids=lambda f: f.__name__)
def test_masks_that_mix_are_refused(layer: Layer) -> None:
    args = inputs()
    fused = Fused(layer)
    torch.testing.assert_close(fused(*args), layer(*args), rtol=1e-5, atol=1e-5)
    assert fused.count("moe") == [0]
    assert any(REFUSED[layer] in r for r in fused.reasons), fused.reasons
