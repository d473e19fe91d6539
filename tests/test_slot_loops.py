"""Loops whose results wait in a row for each slot of each token, until they are weighted and added up."""

import copy
import logging

import pytest
import torch
from torch import Tensor

from braze import slots
from braze.loops import without_loops
from braze.slots import Held, Other
from tests.harness import Fused, assert_close
from tests.test_routed_loops import E, H, K, Layer, taken_out, tokens

aten = torch.ops.aten


class Repeated(Layer):
    """Each token K times, the results in a tensor like that."""

    def slots(self, rows: Tensor, which: Tensor) -> Tensor:
        y = torch.empty_like(rows)
        for e, expert in enumerate(self.experts):
            y[which == e] = expert(rows[which == e])
        return y

    def together(self, y: Tensor, weights: Tensor) -> Tensor:
        return (y.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, H)
        weights, ids = self.choose(self.gate(flat))
        y = self.slots(flat.repeat_interleave(K, dim=0), ids.view(-1))
        return self.together(y, weights.to(y.dtype)).view_as(x)


class Wide(Repeated):
    """In float32, whatever the experts compute in; experts without tokens are skipped."""

    def slots(self, rows: Tensor, which: Tensor) -> Tensor:
        y = torch.empty_like(rows, dtype=torch.float32)
        for e, expert in enumerate(self.experts):
            mask = which == e
            if mask.any():
                y[mask] = expert(rows[mask]).float()
        return y

    def together(self, y: Tensor, weights: Tensor) -> Tensor:
        return super().together(y, weights).to(self.gate.weight.dtype)


class Product(Repeated):
    """Weighted and added up by a product."""

    def together(self, y: Tensor, weights: Tensor) -> Tensor:
        return torch.bmm(weights.unsqueeze(1), y.view(-1, K, H))


class Einsum(Repeated):
    def together(self, y: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("tk,tkh->th", weights, y.view(-1, K, H))


class Sorted(Repeated):
    """Rows in the order of their experts; the results in the tokens' order again."""

    def slots(self, rows: Tensor, which: Tensor) -> Tensor:
        order = which.argsort()
        counts = which.bincount(minlength=E).tolist()
        parts = zip(self.experts, rows[order].split(counts), strict=True)
        return torch.cat([expert(part) for expert, part in parts if len(part)])[order.argsort()]


class Places(Layer):
    """[tokens, K, hidden], written where a mask of two dimensions says."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, H)
        weights, ids = self.choose(self.gate(flat))
        copies = flat.unsqueeze(1).expand(-1, K, -1)
        y = torch.zeros_like(copies)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            if mask.any():
                y[mask] = expert(copies[mask])
        return (y * weights.unsqueeze(-1)).sum(1).to(x.dtype).view_as(x)


class AddedUp(Layer):
    """All results, weighted, are added up by index at once."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, H)
        weights, ids = self.choose(self.gate(flat))
        order = ids.view(-1).argsort()
        token = order // K
        rows = flat[token].split(ids.view(-1).bincount(minlength=E).tolist())
        y = torch.cat([e(r) for e, r in zip(self.experts, rows, strict=True) if len(r)])
        return torch.zeros_like(flat).index_add_(0, token, (y * weights.view(-1, 1)[order]).to(x.dtype)).view_as(x)


class OwnMask(Layer):
    """A mask of tokens for each expert, weights summed over slots first."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, H)
        weights, ids = self.choose(self.gate(flat))
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            mask = (ids == e).any(dim=-1)
            if mask.any():
                own = (weights * (ids == e)).sum(-1).to(x.dtype)
                out[mask] += own[mask].unsqueeze(-1) * expert(flat[mask])
        return out.view_as(x)


@pytest.mark.parametrize("kind", [Repeated, Wide, Product, Einsum, Sorted, Places, AddedUp, OwnMask])
def test_one_graph_with_the_same_result(kind: type[Layer]) -> None:
    taken_out(kind)


class OfAll(Layer):
    """A softmax over all experts, of which those that were not chosen are at minus infinity."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, H)
        logits = self.gate(flat)
        top, ids = logits.topk(K, dim=-1)
        scores = torch.full_like(logits, float("-inf")).scatter(-1, ids, top).softmax(-1)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            mask = (ids == e).any(dim=-1)
            if mask.any():
                out[mask] += expert(flat[mask]) * scores[mask, e].unsqueeze(1)
        return out.view_as(x)


def test_weights_that_are_scores_of_all_experts() -> None:
    layer = OfAll().eval()
    exact = copy.deepcopy(layer).double()
    without_loops(layer)
    fused = Fused(layer, dynamic=False)
    with torch.no_grad():
        assert_close(fused(tokens()), exact(tokens().double()), 2e-6)
    assert fused.count("moe") == [1], fused.reasons


def test_in_bfloat16_the_casts_stay() -> None:
    layer = Wide().bfloat16().eval()
    exact = copy.deepcopy(layer)
    without_loops(layer)
    fused = Fused(layer, dynamic=False)
    x = tokens().bfloat16()
    with torch.no_grad():
        assert_close(fused(x), exact(x), 2e-2)
    assert fused.count("moe") == [1]


class Largest(Repeated):
    """The largest of the slots' results."""

    def together(self, y: Tensor, weights: Tensor) -> Tensor:
        return (y.view(*weights.shape, -1) * weights.unsqueeze(-1)).amax(dim=1)


class Crossed(Repeated):
    """Each result has the weight of the other slot."""

    def together(self, y: Tensor, weights: Tensor) -> Tensor:
        return super().together(y, weights.flip(-1))


class Neighbour(Repeated):
    """A result comes to the slot that is next."""

    def slots(self, rows: Tensor, which: Tensor) -> Tensor:
        return super().slots(rows, which).roll(1, 0)


class Skipped(Repeated):
    """One expert's results are not written."""

    def slots(self, rows: Tensor, which: Tensor) -> Tensor:
        y = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            if e != 3 and (which == e).any():
                y[which == e] = expert(rows[which == e])
        return y


@pytest.mark.parametrize("kind", [Largest, Crossed, Neighbour, Skipped])
def test_what_is_no_weighted_sum_keeps_its_loop(kind: type[Layer], caplog: pytest.LogCaptureFixture) -> None:
    layer = kind().eval()
    with caplog.at_level(logging.WARNING, "braze"):
        without_loops(layer)
    assert "keeps its loop over experts" in caplog.text
    assert "forward" not in vars(layer)


def test_rows_are_followed_through_what_moves_them() -> None:
    a, b = torch.zeros(2, 3), torch.ones(1, 3)
    held = {id(a): Held((Other.ZERO, Other.UNKNOWN)), id(b): Held((Other.ZERO,))}

    def moved(func: object, name: str, *args: object) -> Held | None:
        return slots.moved(func, name, args, {}, 3, lambda t: held.get(id(t)))

    flipped = moved(aten.index.Tensor, "index", a, [torch.tensor([1, 0, 1])])
    assert flipped == Held((Other.UNKNOWN, Other.ZERO, Other.UNKNOWN))
    turned = moved(aten.permute.default, "permute", a, [1, 0])
    assert turned is not None and turned.at is not None
    t = a.t()
    held[id(t)] = turned
    assert moved(aten.permute.default, "permute", t, [1, 0]) == held[id(a)]
    assert moved(aten.slice.Tensor, "slice", a, 1, 0, 2) is None  # not whole rows
    assert moved(aten.add.Tensor, "add", a, b) is None
