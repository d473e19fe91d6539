"""The sort of rows by expert on a GPU; tests/xpu_sim/test_align.py runs it as XPU code."""

import pytest
import torch

from braze.kernels.triton import compat

GPU = torch.cuda.is_available()
#: rows, experts, rows of a tile: sorted by one launch, in parts, in parts of several chunks
SIZES = [(1, 8, 16), (33, 8, 16), (1000, 128, 32), (1024, 500, 128), (1025, 3, 16), (5000, 60, 64), (9000, 300, 128)]
LARGE = [(70000, 128, 128), (140000, 2046, 64)]
KINDS = ["random", "one expert", "invalid", "int32"]


def make(rows: int, experts: int, kind: str) -> torch.Tensor:
    """ids [rows, 1] on the CPU."""
    torch.manual_seed(0)
    ids = torch.randint(experts, (rows, 1), dtype=torch.int32 if kind == "int32" else torch.int64)
    if kind == "one expert":
        ids[:] = experts - 1
    if kind == "invalid":
        ids[torch.rand(rows, 1) < 0.3] = -1
        ids[0] = experts + 5
    return ids


def check(rows: int, experts: int, tile: int, kind: str, device: str, overlap: bool) -> None:
    """What `Alignment` promises, from sorting by torch."""
    from braze.kernels.triton.align import LISTED, align

    ids = make(rows, experts, kind)
    found = align(ids.to(device), experts, tile, compat.start, overlap)
    flat = ids.flatten().long()
    expert = torch.where((flat >= 0) & (flat < experts), flat, experts)
    order = found.order.cpu().long()
    assert torch.equal(order.sort().values, torch.arange(rows))
    assert torch.equal(expert[order], expert.sort().values)
    if rows <= LISTED:
        assert torch.equal(order, expert.sort(stable=True).indices)
    total = expert.bincount(minlength=experts + 1)
    count = (total + tile - 1) // tile
    of = torch.arange(experts + 1).repeat_interleave(count)
    begin, first = total.cumsum(0) - total, count.cumsum(0) - count
    tiles = found.tiles.cpu().long()
    assert tiles[0] == count[:-1].sum() and tiles[1] == len(of) <= found.limit
    described = tiles[2:].view(4, found.limit)[:, : len(of)]
    assert torch.equal(described, torch.stack([of, begin[of], (begin + total)[of], first[of]]))


@pytest.mark.skipif(not GPU, reason="no GPU")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "experts", "tile"), SIZES + LARGE)
def test_rows_are_sorted_and_tiles_described(rows: int, experts: int, tile: int, kind: str) -> None:
    check(rows, experts, tile, kind, "cuda", compat.overlaps_launches(torch.device("cuda")))
