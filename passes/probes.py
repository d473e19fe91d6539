"""Logits on which two routers that differ, differ: rows of every kind that an epsilon, a bias or a group limit shows at.

Rows far below zero bring sigmoids (and, twice as far, a square root) down to an epsilon; one large logit does so to the
others of a softmax. Runs differ in their bias, which may be negative for all. No two values are equal: ties have no order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from braze.kernels import reference
from braze.kernels.spec import RouteSpec
from braze.passes import small
from braze.passes.elements import Sizes

#: Rows of logits that are tried at least, and runs.
ROWS, RUNS = 96, 2
TOLERANCE = 1e-9
MAX_EPSILON = 0.1


@dataclass(frozen=True)
class Probe:
    """One run in float64: logits [..., E + shared], bias [E] or none, and what came of them."""

    logits: Tensor
    bias: Tensor | None
    weights: Tensor
    ids: Tensor
    in_order: bool


class Routing(Protocol):
    """The nodes of what may be a router: its results, its logits [..., E + shared] and a bias [E] or none."""

    @property
    def weights(self) -> fx.Node: ...
    @property
    def ids(self) -> fx.Node: ...
    @property
    def logits(self) -> fx.Node: ...
    @property
    def bias(self) -> fx.Node | None: ...


def epsilons(cut: Routing) -> list[float]:
    """The small positive constants in the graph between the logits and the results."""
    inner = small.between((cut.weights, cut.ids), (cut.logits, *([cut.bias] if cut.bias is not None else [])))
    constants = [a for n in inner for a in (*n.args, *n.kwargs.values()) if isinstance(a, float)]
    return sorted({c for c in constants if 0.0 < c < MAX_EPSILON})


def probes(cut: Routing, sizes: Sizes, seed: int) -> list[Probe]:
    """What the graph makes of enough rows, with its epsilons within their reach; CannotShrink where it does not run."""
    depths = [-math.log(eps) for eps in epsilons(cut)]
    rng = torch.Generator().manual_seed(seed)
    shape = sizes.shape(cut.logits)
    rows = math.prod(shape[:-1])
    found = []
    for n in range(max(RUNS, math.ceil(ROWS / max(rows, 1)))):
        logits = _logits(rows, shape[-1], depths, n, rng).reshape(shape)
        inputs = {cut.logits: logits}
        bias = None
        if cut.bias is not None:
            bias = torch.randn(sizes.shape(cut.bias), generator=rng, dtype=torch.float64) - 4.0 * (n % 3 == 1)
            inputs[cut.bias] = bias
        weights, ids = small.run_all((cut.weights, cut.ids), inputs, sizes)
        if ids.ndim < logits.ndim:
            ids = ids.unsqueeze(-1)
        found.append(Probe(logits, bias, weights, ids, _in_order(cut.ids)))
    return found


def _logits(rows: int, experts: int, depths: Sequence[float], run: int, rng: torch.Generator) -> Tensor:
    """Rows of all kinds in turn; the first row's kind changes from run to run."""
    logits = 2.0 * torch.randn(rows, experts, generator=rng, dtype=torch.float64)
    kinds = [
        (0.0, 0.0),
        (4.0, 0.0),
        *(kind for d in depths for kind in ((d, 0.0), (2 * d, 0.0), (0.0, d), (0.0, 2 * d))),
    ]
    for n, row in enumerate(_rows(rows)):
        below, above = kinds[(n + run) % len(kinds)]
        logits[row] -= below
        logits[row, int(torch.randint(experts, (), generator=rng))] += above
    return logits


def _rows(count: int) -> list[int]:
    """The rows of all kinds: of few, all; of many, some from the first to the last."""
    return [n * (count - 1) // max(min(count, ROWS) - 1, 1) for n in range(min(count, ROWS))]


def sample(run: Probe) -> Probe:
    """The run's rows of all kinds: enough to tell routers apart, if not to prove one."""
    picked = torch.tensor(_rows(run.ids.numel() // run.ids.shape[-1]))
    logits, weights, ids = (t.reshape(-1, t.shape[-1])[picked] for t in (run.logits, run.weights, run.ids))
    return replace(run, logits=logits, weights=weights, ids=ids)


def _in_order(ids: fx.Node) -> bool:
    """Whether the order of the ids means something: a top-k may be asked for without."""
    top: Any = ids.args[0]
    return not (top.target is torch.ops.aten.topk.default and len(top.args) > 4 and not top.args[4])


def agree(runs: list[Probe], spec: RouteSpec, ids_only: bool = False) -> bool:
    """Whether `braze::route` gives what the runs gave."""
    return all(difference(run, spec, ids_only) <= TOLERANCE for run in runs)


def difference(run: Probe, spec: RouteSpec, ids_only: bool = False) -> float:
    """The largest difference of a weight relative to its token's largest; infinity where other experts are chosen, or results
    lie otherwise."""
    if run.weights.shape[:-1] != run.ids.shape[:-1]:
        return math.inf
    got, expected = results(run, spec)
    if not torch.equal(got.ids, expected.ids):
        return math.inf
    if ids_only:
        return 0.0
    if got.weights.shape != expected.weights.shape:
        return math.inf
    scale = got.weights.abs().amax(-1, keepdim=True).clamp(min=1e-300)
    worst = float(((got.weights - expected.weights) / scale).abs().max())
    return worst if math.isfinite(worst) else math.inf


@dataclass(frozen=True)
class Result:
    """Weights and ids of one run, in the order of the ids where the graph's own order means nothing."""

    weights: Tensor
    ids: Tensor


def results(run: Probe, spec: RouteSpec) -> tuple[Result, Result]:
    """(what `braze::route` gives, what the graph gave)"""
    weights, ids = reference.route(run.logits, run.bias, replace(spec, out_dtype=torch.float64))
    pair = Result(weights, ids), Result(run.weights, run.ids.to(ids.dtype))
    return pair if run.in_order else (_by_id(pair[0]), _by_id(pair[1]))


def _by_id(result: Result) -> Result:
    ids, order = result.ids.sort(-1)
    k = ids.shape[-1]
    return Result(torch.cat((result.weights[..., :k].gather(-1, order), result.weights[..., k:]), -1), ids)
