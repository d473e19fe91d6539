"""Layers with loops over experts as projects outside of transformers write them: taken out, or left with a reason."""

import logging

import pytest
import torch
from torch import Tensor, nn

from braze import loops
from braze.loops import without_loops
from tests.harness import Fused, assert_close
from tests.test_routed_loops import E, H, K, Layer, Mlp


class Counted(Layer):
    """DeepSeek-V3's own inference code: groups closed by a new mask, counts of an expert's rows, a shared expert."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.randn(E) * 0.1)
        self.shared = Mlp(40)

    def open_groups(self, choice: Tensor, groups: Tensor) -> Tensor:
        return choice.new_ones(choice.size(0), 3, dtype=torch.bool).scatter_(1, groups, False)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.sigmoid()
        choice = (scores + self.bias).view(logits.size(0), 3, -1)
        groups = choice.topk(2, dim=-1)[0].sum(-1).topk(2, dim=-1)[1]
        choice = choice.masked_fill(self.open_groups(choice, groups).unsqueeze(-1), float("-inf")).flatten(1)
        ids = choice.topk(K, dim=-1)[1]
        weights = scores.gather(1, ids)
        return weights / weights.sum(-1, keepdim=True) * 2.5, ids

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, H)
        weights, ids = self.choose(self.gate(flat))
        y = torch.zeros_like(flat)
        counts = torch.bincount(ids.flatten(), minlength=E).tolist()
        for e in range(E):
            if counts[e] == 0:
                continue
            token, slot = torch.where(ids == e)
            y[token] += self.experts[e](flat[token]) * weights[token, slot, None]
        return (y + self.shared(flat)).view(x.shape)


class Filled(Counted):
    """The mask made by another function, of another value."""

    def open_groups(self, choice: Tensor, groups: Tensor) -> Tensor:
        return choice.new_full((choice.size(0), 3), 2.0).scatter_(1, groups, 0.0) > 1


class AlwaysOneRow(Counted):
    """The mask of the first token is everyone's: what one token does is not what many do."""

    def open_groups(self, choice: Tensor, groups: Tensor) -> Tensor:
        return super().open_groups(choice, groups[:1].expand_as(groups))


@pytest.mark.parametrize("kind", [Counted, Filled])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_tensors_have_as_many_rows_as_there_are_tokens(kind: type[Layer], dtype: torch.dtype) -> None:
    layer = kind().to(dtype).eval()
    exact = kind().double().eval()
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(2, 9, H, generator=torch.Generator().manual_seed(3)).to(dtype)
    with torch.no_grad():
        expected, eager = exact(x.double()), layer(x)
    without_loops(layer)
    fused = Fused(layer)
    got = fused(x)
    assert fused.count("moe") == fused.count("router") == [1], fused.reasons
    assert "in 2 of 3 groups" in next(f.form for f in fused.findings if f.kind == "router")
    if dtype == torch.float32:
        assert_close(got, expected, 1e-5)
    else:  # near ties are chosen otherwise than in float64
        assert_close(got, eager.double(), 2.0**-5)


def test_what_is_another_thing_for_more_tokens_keeps_its_loop(caplog: pytest.LogCaptureFixture) -> None:
    layer = AlwaysOneRow().eval()
    with caplog.at_level(logging.WARNING, "braze"):
        without_loops(layer)
    assert "forward" not in vars(layer)
    assert "keeps its loop over experts" in caplog.text


def test_an_error_of_what_takes_the_loops_place_leaves_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(module: nn.Module) -> None:
        raise ZeroDivisionError("of braze's own")

    monkeypatch.setattr(loops, "routed", fails)
    layer = Counted().eval()
    x = torch.randn(1, 5, H)
    with torch.no_grad():
        expected = layer(x)
    with caplog.at_level(logging.WARNING, "braze"):
        without_loops(layer)
    assert "internal error: ZeroDivisionError: of braze's own" in caplog.text
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
