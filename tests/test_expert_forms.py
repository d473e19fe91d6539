"""Expert parallelism: ids past the last expert stand for experts elsewhere, in hand-written grouped and gathered layers."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from braze.kernels import reference
from braze.kernels.spec import MoeSpec
from tests.harness import Fused, assert_close

T, H, INNER, E, K = 6, 32, 16, 5, 2


def inputs() -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    ids = torch.rand((T, E + 2), generator=rng).argsort(1)[:, :K]  # two of seven experts are elsewhere
    assert (ids >= E).any()
    dense = [torch.randn(s, generator=rng) for s in ((T, H), (E, 2 * INNER, H), (E, H, INNER))]
    x, w1, w2 = (t.bfloat16() for t in dense)
    return [x, ids, torch.rand((T, K), generator=rng), w1, w2]


def masked_grouped(x: Tensor, ids: Tensor, weights: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Sorted rows; those of absent experts come last, past the last offset, and are masked before and after."""
    expert, perm = torch.sort(ids.flatten())
    absent = (expert >= E).unsqueeze(-1)
    offsets = torch.histc(expert.float(), bins=E, min=0, max=E - 1).cumsum(0).to(torch.int32)
    rows = x[perm // K].masked_fill(absent, 0.0)
    h = torch._grouped_mm(rows, w1.transpose(1, 2), offs=offsets).masked_fill(absent, 0.0)
    gate, up = h.chunk(2, -1)
    y = torch._grouped_mm(silu(gate) * up, w2.transpose(1, 2), offs=offsets)
    y = (y * weights.flatten()[perm].unsqueeze(-1)).masked_fill(absent, 0.0)
    inverse = torch.empty_like(perm)
    inverse[perm] = torch.arange(perm.shape[0])
    return y[inverse].view(T, K, H).sum(1).to(x.dtype)


def clamped_gathered(x: Tensor, ids: Tensor, weights: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Gathered weights; ids are clamped so that the gather stays in bounds: the last expert then counts."""
    e = ids.flatten().clamp(max=E - 1)
    rows = x.repeat_interleave(K, 0)
    gate, up = (w1[e] @ rows.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
    y = (w2[e] @ (silu(gate) * up).unsqueeze(-1)).squeeze(-1)
    return (y * weights.flatten().unsqueeze(-1)).view(T, K, H).sum(1).to(x.dtype)


@pytest.mark.parametrize("layer", [masked_grouped, clamped_gathered])
def test_absent_experts_count_as_the_graph_says(layer: object) -> None:
    x, ids, weights, w1, w2 = inputs()
    fused = Fused(layer)  # type: ignore[arg-type]
    got = fused(x, ids, weights, w1, w2)
    assert fused.count("moe") == [1], fused.reasons
    meant = ids if layer is masked_grouped else ids.clamp(max=E - 1)
    exact = reference.moe(x.double(), meant, weights, w1.double(), w2.double(), None, None, MoeSpec())
    assert_close(got, exact, 1e-2)


def test_a_mask_that_is_not_about_absent_experts_is_refused() -> None:
    def layer(x: Tensor, ids: Tensor, weights: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        e = ids.flatten().clamp(max=E - 1)
        rows = x.repeat_interleave(K, 0)
        gate, up = (w1[e] @ rows.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        y = (w2[e] @ (silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        y = (y * weights.flatten().unsqueeze(-1)).masked_fill((e >= 2).unsqueeze(-1), 0.0)
        return y.view(T, K, H).sum(1).to(x.dtype)

    args = inputs()
    fused = Fused(layer)
    torch.testing.assert_close(fused(*args), layer(*args), rtol=2e-2, atol=2e-2)
    assert fused.count("moe") == [0]
