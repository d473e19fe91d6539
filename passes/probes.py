"""Logits on which two routers that differ, differ: rows of every kind that an epsilon, a bias or a group limit shows at.

Ordinary rows tell scorings apart. Rows far below zero bring sigmoids down to an epsilon, one large logit does so to
the others of a softmax. Each run has a bias of its own. All values are distinct: ties have no agreed order.
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
ROWS, RUNS = 96, 3
TOLERANCE = 1e-9


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


def probes(cut: Routing, epsilons: Sequence[float], sizes: Sizes, seed: int) -> list[Probe]:
    """What the graph makes of enough rows, with `epsilons` within their reach; CannotShrink where it does not run."""
    rng = torch.Generator().manual_seed(seed)
    shape = sizes.shape(cut.logits)
    rows = math.prod(shape[:-1])
    found = []
    for n in range(max(RUNS, math.ceil(ROWS / max(rows, 1)))):
        logits = _logits(rows, shape[-1], epsilons, n, rng).reshape(shape)
        inputs = {cut.logits: logits}
        bias = None
        if cut.bias is not None:
            bias = torch.randn(sizes.shape(cut.bias), generator=rng, dtype=torch.float64)
            inputs[cut.bias] = bias
        weights, ids = small.run_all((cut.weights, cut.ids), inputs, sizes)
        if ids.ndim < logits.ndim:
            ids = ids.unsqueeze(-1)
        found.append(Probe(logits, bias, weights, ids, _in_order(cut.ids)))
    return found


def _logits(rows: int, experts: int, epsilons: Sequence[float], run: int, rng: torch.Generator) -> Tensor:
    """Rows of all kinds in turn; the first row's kind changes from run to run."""
    logits = 2.0 * torch.randn(rows, experts, generator=rng, dtype=torch.float64)
    kinds = 2 + 2 * len(epsilons)
    for row in range(min(rows, ROWS)):
        kind = (row + run) % kinds
        if kind >= 2:
            depth = -math.log(epsilons[(kind - 2) // 2])
            if kind % 2:
                logits[row] -= depth
            else:
                logits[row, int(torch.randint(experts, (), generator=rng))] += depth
    return logits


def _in_order(ids: fx.Node) -> bool:
    """Whether the order of the ids means something: a top-k may be asked for without."""
    top: Any = ids.args[0]
    return not (top.target is torch.ops.aten.topk.default and len(top.args) > 4 and not top.args[4])


def agree(runs: list[Probe], spec: RouteSpec, ids_only: bool = False) -> bool:
    """Whether `braze::route` gives what the runs gave."""
    return all(difference(run, spec, ids_only) <= TOLERANCE for run in runs)


def difference(run: Probe, spec: RouteSpec, ids_only: bool = False) -> float:
    """The largest difference of a weight relative to its token's largest; infinity where other experts are chosen."""
    weights, ids = reference.route(run.logits, run.bias, replace(spec, out_dtype=torch.float64))
    k = ids.shape[-1]
    theirs, chosen = run.weights, run.ids
    if not run.in_order:
        ids, order = ids.sort(-1)
        weights = torch.cat((weights[..., :k].gather(-1, order), weights[..., k:]), -1)
        chosen, order = chosen.sort(-1)
        theirs = torch.cat((theirs[..., :k].gather(-1, order), theirs[..., k:]), -1)
    if not torch.equal(ids, chosen.to(ids.dtype)):
        return math.inf
    if ids_only:
        return 0.0
    if weights.shape != theirs.shape:
        return math.inf
    scale = weights.abs().amax(-1, keepdim=True).clamp(min=1e-300)
    worst = float(((weights - theirs) / scale).abs().max())
    return worst if math.isfinite(worst) else math.inf
