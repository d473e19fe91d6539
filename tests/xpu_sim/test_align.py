"""The sort of rows by expert as XPU code."""

from __future__ import annotations

import pytest

from braze import xpu_sim
from tests.test_triton_align import KINDS, SIZES, check


@pytest.mark.parametrize(("rows", "experts", "tile"), SIZES)
def test_rows_are_sorted_and_tiles_described(rows: int, experts: int, tile: int) -> None:
    with xpu_sim.device("pvc"), xpu_sim.record() as launches:
        for kind in KINDS:
            check(rows, experts, tile, kind, "cpu", False)
    assert {launch.kernel for launch in launches} == ({"moe_sort"} if rows <= 1024 else {"moe_count", "moe_place"})


def test_on_a_gpu_without_a_matrix_engine() -> None:
    for rows in (40, 3000):
        with xpu_sim.device("generic"):
            check(rows, 12, 16, "invalid", "cpu", False)
