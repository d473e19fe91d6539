"""Triton experts on a GPU beside other forms of the same layer, all of a cell measured in one run, their replays in turn.

A GPU that has become warm is slower by up to 15 %, so that times of another day decide nothing. The forms:
- braze: `braze.kernels.triton.moe.run`.
- grouped: torch's grouped products, as transformers' `grouped_mm` experts: ids sorted, rows gathered, `torch._grouped_mm`,
  activation, `_grouped_mm`, rows put back by the inverse permutation, weighted and added up, all of it under torch.compile with
  all sizes fixed, which makes it faster than a symbolic number of tokens.
- triton_kernels: OpenAI's, where it can be imported (`matmul_ogs`, as vLLM ships it), and where it takes the shape: top_k must
  be a power of two. Its activation is gpt_oss's: gate and up interleaved, clamped, 1 added to up. It so computes another
  function of the same weights, as much work, and is checked against that function. From the ids it sorts by itself within the
  time; softmax and top-k, which its router does in the same launch, are outside.
- dense: torch.mm (cuBLAS) of the same two products' sizes, as if all rows belonged to one expert, and nothing else. Not a form
  of the layer: what the products of many rows could take at best, and less than reading all experts with few.

    python benchmarks/moe_beside.py [--json FILE] [--shape NAME ...] [--tokens N ...]
"""

import argparse
import gc
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from moe import SHAPES, SWIGLU_OAI, error, floor
from rich.console import Console
from rich.table import Table
from torch import Tensor

from braze.kernels.spec import MoeSpec
from braze.kernels.triton import moe
from braze.tune import TOKENS, Shape, graph_times

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Cell:
    """Microseconds of each form in one run, None where it does not take the shape. of_dense: dense / braze."""

    shape: str
    tokens: int
    provider: str
    braze: float
    grouped: float | None
    triton_kernels: float | None
    dense: float
    of_dense: float
    of_floor: float


def activate(up: Tensor, spec: MoeSpec) -> Tensor:
    """As transformers writes it: gpt_oss's, or SiLU of the first half times the second."""
    if spec == SWIGLU_OAI:
        gate, linear = up[:, ::2].clamp(max=7.0), up[:, 1::2].clamp(-7.0, 7.0)
        return gate * torch.sigmoid(gate * 1.702) * (linear + 1)
    gate, linear = up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * linear


def grouped(shape: Shape, w1: Tensor, w2: Tensor) -> Call:
    """Products of torch, everything around them compiled for each number of tokens."""
    spec, experts, k = shape.spec, shape.experts, shape.top_k
    v1, v2 = (w if spec.transposed else w.transpose(1, 2) for w in (w1, w2))

    def layer(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat, order = torch.sort(ids.flatten())
        ends = torch.histc(flat.int(), bins=experts, min=0, max=experts - 1).cumsum(0, dtype=torch.int32)
        rows = x[order // k]
        if spec.weight_on == "input":
            rows = (rows * weights.flatten()[order, None]).to(x.dtype)
        down = torch._grouped_mm(activate(torch._grouped_mm(rows, v1, offs=ends), spec), v2, offs=ends)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        parts = down[back].view(*ids.shape, -1).float()
        if spec.weight_on == "output":
            parts = parts * weights[..., None]
        return parts.sum(1).to(x.dtype)

    compiled: Call = torch.compile(layer, dynamic=False)
    return compiled


def triton_kernels(shape: Shape, w1: Tensor, w2: Tensor) -> Call | None:
    """OpenAI's kernels with their swiglu; None where they are missing or do not take the shape."""
    try:
        from triton_kernels import matmul_ogs as ogs
        from triton_kernels import swiglu, topk
        from triton_kernels.tensor import SparseMatrix, make_ragged_tensor_metadata
    except ImportError:
        return None
    if shape.top_k & (shape.top_k - 1) or shape.spec.weight_on == "input":
        return None
    specs = ogs.FnSpecs("swiglu", swiglu.swiglu_fn, ("alpha", "limit"), reduction_n=2)
    activation = ogs.FusedActivation(specs, (1.702, 7.0))
    v1, v2 = w1.transpose(1, 2), w2.transpose(1, 2)
    routed: dict[int, tuple[Tensor, Any, Any]] = {}  # the ids are kept, so that no others get their id

    def call(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if id(ids) not in routed:  # before anything is captured
            scores = torch.zeros(x.shape[0], shape.experts, device=x.device).scatter_(1, ids, weights)
            _, named, mask = topk.topk_forward(scores, shape.top_k, apply_softmax=False, y_indx=ids.int())
            routed[id(ids)] = ids, named, mask
        _, named, mask = routed[id(ids)]
        sorted_by = SparseMatrix(indx=named, vals=weights, mask=mask).mask_metadata
        dispatch, combine = sorted_by.row_sorted_indx, sorted_by.col_sorted_indx
        ragged = make_ragged_tensor_metadata(sorted_by.col_sum, dispatch.shape[0])
        scale = weights.flatten()[combine]
        routing = ogs.RoutingData(scale, ragged.slice_sizes, shape.experts, shape.top_k, ragged)
        precise = ogs.PrecisionConfig()
        gather, scatter = ogs.GatherIndx(combine, dispatch), ogs.ScatterIndx(dispatch, combine)
        h = ogs.matmul_ogs(
            x, v1, None, routing, gather_indx=gather, precision_config=precise, fused_activation=activation
        )
        return ogs.matmul_ogs(h, v2, None, routing, scatter_indx=scatter, precision_config=precise, gammas=scale)

    return call


def dense(shape: Shape, tokens: int, w1: Tensor, w2: Tensor) -> Callable[..., None]:
    """The two products of all rows with one expert's weights."""
    rows = tokens * shape.top_k
    d1, d2 = (w[0] if shape.spec.transposed else w[0].t() for w in (w1, w2))
    a, b = (torch.randn(rows, d.shape[0], device=d.device, dtype=d.dtype) for d in (d1, d2))
    one, two = (torch.empty(rows, d.shape[1], device=d.device, dtype=d.dtype) for d in (d1, d2))

    def call(*_: Any) -> None:
        torch.mm(a, d1, out=one)
        torch.mm(b, d2, out=two)

    return call


def checked(
    name: str, call: Call | None, spec: MoeSpec, sets: Sequence[Any], w1: Tensor, w2: Tensor, say: Callable[[str], None]
) -> Call | None:
    """The call if it computes `spec`; None where it refuses the shape. AssertionError where its result is another."""
    if call is None:
        return None
    try:
        for inputs in sets:
            result = call(*inputs)
    except Exception as e:
        say(f"{name} refuses: {type(e).__name__}: {str(e)[:200]}")
        torch.cuda.synchronize()
        return None
    off = error(result, *sets[-1], w1, w2, spec)
    assert off < TOLERANCE, (name, off)
    return call


def forms(shape: Shape, w1: Tensor, w2: Tensor) -> list[tuple[str, Call | None, MoeSpec]]:
    """(name, call, what it computes) of each form of the layer."""

    def braze(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return moe.run(x, ids, weights, w1, w2, None, None, shape.spec)

    return [
        ("braze", braze, shape.spec),
        ("grouped", grouped(shape, w1, w2), shape.spec),
        ("triton_kernels", triton_kernels(shape, w1, w2), SWIGLU_OAI),
    ]


def measure(
    name: str, tokens: int, layers: list[tuple[str, Call | None, MoeSpec]], w1: Tensor, w2: Tensor, repeats: int,
    say: Callable[[str], None],
) -> Cell:  # fmt: skip
    """One cell: all forms in turn."""
    shape = SHAPES[name]
    sets = shape.sets(tokens)
    calls = {n: checked(n, call, spec, sets, w1, w2, say) for n, call, spec in layers}
    taken: dict[str, Callable[..., Any]] = {n: c for n, c in calls.items() if c is not None}
    taken["dense"] = dense(shape, tokens, w1, w2)
    times = dict(zip(taken, graph_times(list(taken.values()), sets, repeats), strict=True))
    us = {n: round(t, 2) for n, t in times.items() if math.isfinite(t)}
    return Cell(
        name, tokens, "braze", us["braze"], us.get("grouped"), us.get("triton_kernels"), us["dense"],
        round(us["dense"] / us["braze"], 3), round(floor(shape, sets) / us["braze"], 3),
    )  # fmt: skip


def show(cells: Sequence[Cell], console: Console) -> None:
    table = Table(title=f"MoE on {torch.cuda.get_device_name()}, bfloat16, microseconds in turn")
    for header in ("shape", "T", "braze", "grouped", "triton_kernels", "dense", "of dense", "of floor"):
        table.add_column(header, justify="left" if header == "shape" else "right")
    for c in cells:
        us = (f"{t:.1f} ({t / c.braze:.2f})" if t else "-" for t in (c.grouped, c.triton_kernels))
        table.add_row(
            c.shape, str(c.tokens), f"{c.braze:.1f}", *us, f"{c.dense:.1f}", f"{c.of_dense:.2f}", f"{c.of_floor:.2f}"
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the cells to this file")
    parser.add_argument("--shape", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    parser.add_argument("--repeats", type=int, default=25)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    torch._dynamo.config.recompile_limit = 64  # for all shapes; beyond it functions would run as they are written
    console = Console(width=130)
    cells: list[Cell] = []
    torch.manual_seed(0)
    for name in options.shape:
        w1, w2 = SHAPES[name].weights()
        layers = forms(SHAPES[name], w1, w2)
        for tokens in options.tokens:
            cells.append(measure(name, tokens, layers, w1, w2, options.repeats, console.print))
            if options.json:
                options.json.write_text(json.dumps([asdict(c) for c in cells], indent=1))
            gc.collect()
            torch.cuda.empty_cache()
        del w1, w2, layers
    show(cells, console)


if __name__ == "__main__":
    main()
