"""The Triton experts as XPU code: every feature, both ways to find rows, on both kinds of GPU, against float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from braze import xpu_sim
from braze.kernels.triton import moe
from braze.kernels.triton.choose_config import Config, Problem, Tile, choose_config
from tests.test_triton_moe import CASES, STAGES, Case, compare, compare_stages, make

TARGETS = ["pvc", "generic"]
#: How rows are found and what is done to them have no code in common, and each kernel takes seconds to build.
DIRECT = {
    "pvc": ["silu", "gpt_oss", "llama4", "odd", "invalid", "fp16", "fp32"],
    "generic": ["gpt_oss", "invalid k=1"],
}


def narrow(direct: bool, rows: int = 16, split: int = 1) -> Config:
    """The smallest tiles with a product for each warp: the CPU compiler's time grows with a tile."""
    tile = Tile(32, 32, 4, 2, group=2)
    return Config(rows, direct, tile, dataclasses.replace(tile, split=split))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_every_feature(target: str, name: str) -> None:
    with xpu_sim.device(target), xpu_sim.record() as launches:
        compare(CASES[name], narrow(False))
    names = [launch.kernel for launch in launches]
    assert names.count("moe_gemm") == 4 and "moe_sort" in names


@pytest.mark.parametrize(("target", "name"), [(t, name) for t, names in DIRECT.items() for name in names])
def test_rows_found_without_a_sort(target: str, name: str) -> None:
    with xpu_sim.device(target), xpu_sim.record() as launches:
        compare(CASES[name], narrow(True))
    assert "moe_sort" not in {launch.kernel for launch in launches}


STORED = {
    "apart": ["silu", "llama4", "on_input", "odd halves", "odd transposed", "invalid", "fp32"],
    "pairs": ["silu", "odd transposed", "invalid"],
    "separate": ["silu", "none", "gpt_oss", "odd"],
}


@pytest.mark.parametrize(("how", "name"), [(how, name) for how, names in STORED.items() for name in names])
def test_weights_of_several_tensors(how: str, name: str) -> None:
    with xpu_sim.device("pvc"):
        compare(CASES[name], narrow(False), how)


def test_weights_of_several_tensors_without_a_sort_or_blocks() -> None:
    with xpu_sim.device("generic"):
        for how in STORED:
            compare(CASES["silu"], narrow(True), how)
            compare(CASES["odd halves"], narrow(False), how)


COPIED = ["silu", "gpt_oss", "llama4", "on_input", "none", "odd", "invalid", "fp16", "many"]


@pytest.mark.parametrize(("target", "name"), [*(("pvc", name) for name in COPIED), ("generic", "silu")])
def test_rows_copied_in_the_order_of_the_sort(target: str, name: str) -> None:
    """Then both products read their rows in blocks, where the rows' length allows it."""
    with xpu_sim.device(target), xpu_sim.record() as launches:
        compare(CASES[name], dataclasses.replace(narrow(False), permute=True))
    assert [launch.kernel for launch in launches].count("moe_permute") == 2


#: shape -> (what is shipped for it: sizes, tokens, GPU)
SHIPPED = {
    "mixtral, 1 token": (Problem(1, 2, 8, 4096, 14336, True, 2, "pvc", 64), 3),
    "gpt_oss, 8192 tokens": (Problem(8192, 4, 32, 2880, 2880, True, 2, "pvc", 64, "interleaved", "columns"), 150),
    "qwen3, 512 tokens": (Problem(512, 8, 128, 2048, 768, True, 2, "bmg", 20), 60),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_tiles_as_they_are_shipped(name: str) -> None:
    """On fewer and smaller experts, which the CPU can multiply."""
    p, tokens = SHIPPED[name]
    spec = CASES["gpt_oss" if p.layout == "interleaved" else "silu"].spec
    case = Case(tokens, 2, 2, 128, 128, spec, bias=torch.bfloat16)
    with xpu_sim.device(p.device), xpu_sim.record() as launches:
        compare(case, choose_config(p, []))
    assert {launch.target for launch in launches} == {p.device}


@pytest.mark.parametrize("target", TARGETS)
def test_split_of_the_inner_dimension(target: str) -> None:
    with xpu_sim.device(target):
        compare(dataclasses.replace(CASES["on_input"], intermediate=160), narrow(True, split=4))
        compare(dataclasses.replace(CASES["llama4"], intermediate=160), narrow(False, split=2))


@pytest.mark.parametrize(("target", "name"), zip(TARGETS * 2, STAGES, strict=True))
def test_stages(target: str, name: str) -> None:
    with xpu_sim.device(target):
        compare_stages(CASES[name], narrow(False))


def test_a_place_for_the_result_must_fit() -> None:
    x, *rest = make(CASES["silu"])
    with xpu_sim.device("pvc"):
        for out in (x[1:], x.float(), torch.empty(64, 5, dtype=x.dtype).T):
            with pytest.raises(ValueError, match=r"contiguous tensor \(5, 64\) of torch.bfloat16"):
                moe.run(x, *rest, CASES["silu"].spec, out=out)


def test_a_dtype_that_no_kernel_takes_is_an_error_that_says_which_do() -> None:
    inputs = [t if t is None or not t.is_floating_point() else t.double() for t in make(CASES["gpt_oss"])]
    with xpu_sim.device("pvc"), pytest.raises(ValueError, match=r"float64, not float16, bfloat16 or float32"):
        moe.run(*inputs, CASES["gpt_oss"].spec)


def test_more_programs_than_one_sorts() -> None:
    many = dataclasses.replace(CASES["silu"], tokens=600, hidden=32, intermediate=32, ids="invalid", bias=torch.float32)
    with xpu_sim.device("generic"), xpu_sim.record() as launches:
        compare(many, narrow(False, rows=32))
    assert {"moe_count", "moe_place"} <= {launch.kernel for launch in launches}


@pytest.mark.parametrize("tokens", [3, 40])
def test_chosen_config(tokens: int) -> None:
    """`run` takes what is on a simulated GPU, by the tiles that its model of an XPU chooses."""
    case = Case(tokens=tokens, hidden=128, intermediate=128)
    with xpu_sim.device("pvc"):
        compare(case)
        x, ids, weights, w1, w2, b1, b2 = make(case)
        assert moe.supports(x, ids, weights, w1, w2, b1, b2, case.spec) is None
    assert "cpu" in str(moe.supports(x, ids, weights, w1, w2, b1, b2, case.spec))
