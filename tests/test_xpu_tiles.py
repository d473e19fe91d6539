"""Tiles for Intel GPUs: candidates without a spill, and a model that chooses between them as a roofline would."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest

from braze.kernels.triton import compat
from braze.kernels.triton.choose_config import Problem, choose_config
from braze.kernels.triton.xpu_tiles import FILE, GPUS, SHARED_BYTES, Candidate, Work, seconds

MIXTRAL = Problem(1, 2, 8, 4096, 14336, True, 2, "pvc", 64)


def test_candidates_are_what_a_gpu_can_launch() -> None:
    facts = json.loads(FILE.read_text())
    tried, kept = facts.pop("tried"), 0
    facts.pop("ocloc")
    for name, entries in facts.items():
        for entry in entries:
            kept += 1
            rows, columns, inner, warps = entry["tile"]
            assert entry["slm"] <= SHARED_BYTES and entry["registers"] in (0, 256)
            assert warps <= compat.MAX_WARPS[entry["registers"] or 128]
            assert all(n & (n - 1) == 0 for n in (rows, columns, inner, warps))
            for gpu in GPUS:
                matrix = entry[gpu]["dpas"] > 0 and entry[gpu]["loads"] > 0
                assert matrix or "pointers" in name, (name, entry)
    assert 0 < kept < tried


@pytest.mark.parametrize("gpu", GPUS)
def test_few_rows_take_small_tiles_and_many_large_ones(gpu: str) -> None:
    few, many = (choose_config(replace(MIXTRAL, tokens=n, device=gpu), []) for n in (1, 8192))
    assert few.direct and few.rows <= 16 and not few.permute
    assert not many.direct and many.permute and many.rows >= 64
    assert many.rows * many.second.columns > few.rows * few.second.columns


def test_every_problem_has_tiles() -> None:
    """No form, dtype, device or number of tokens is left without a candidate."""
    forms: Any = itertools.product(
        ("halves", "interleaved", "none"), ("rows", "columns", "pointers"), (2, 4), (2, 4), ("pvc", "bmg", "xpu", "generic"),
        (1, 9, 3000),
    )  # fmt: skip
    for layout, reads, element, result, device, tokens in forms:
        p = Problem(
            tokens, 2, 8, 1024, 512, layout != "none", element, device, 64, layout=layout, reads=reads, result=result
        )
        assert choose_config(p, []).rows >= 8, p


def test_the_model_is_a_roofline() -> None:
    """Never faster than memory or the matrix engines allow, and near to them where tiles divide the problem."""
    gpu = GPUS["pvc"]
    tile = Candidate(128, 128, 32, 16, 256, 0, dpas=16, others=40)
    prefill, decode = Work(65536, 8, 16384, 4096, 2), Work(8, 8, 16384, 4096, 2)
    compute = 2 * prefill.rows * prefill.columns * prefill.inner / gpu.flops
    assert compute <= seconds(tile, prefill, gpu) <= 1.2 * compute
    read = 2 * decode.active * decode.columns * decode.inner / gpu.bandwidth
    small = Candidate(8, 64, 32, 4, 0, 0, dpas=2, others=20)
    assert read <= seconds(small, decode, gpu) <= 1.2 * read
    assert seconds(small, prefill, gpu) > 2 * seconds(tile, prefill, gpu)
    assert GPUS["bmg"].flops == pytest.approx(117e12, rel=0.01) and gpu.flops == pytest.approx(419e12, rel=0.01)
