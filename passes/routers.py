"""Finds routers behind expert blocks, by what they compute: (weights, ids) = F(logits, bias), whatever F is spelled like.

Anchored at a `braze::moe`, a router is what lies between its ids' top-k, its weights and the logits. F is run on float64
probes and compared with `braze::route`: first whom it chooses, then with which weights; sizes, counts and small
constants are read from the graph, the scale is measured. Monotone scorings, spelled-out softmaxes and casts need no names.
"""

import operator
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, fx

from braze.kernels.spec import RouteSpec, Scoring
from braze.passes import small
from braze.passes.elements import Sizes, Unknown
from braze.passes.probes import Probe, agree, epsilons, probes, results, sample
from braze.passes.products import is_product
from braze.passes.rewrite import chooser_of
from braze.passes.sites import NearMiss, RouterSite, source_line
from braze.passes.twins import subgraph

aten = torch.ops.aten
_PRODUCTS = (aten.mm.default, aten.addmm.default, aten.baddbmm.default, aten.linear.default)
#: Of a sort, which has the largest first, only the first results are the chosen ones.
_SORTS = (aten.sort.default, aten.sort.stable)
_TOP_K = (aten.topk.default, aten.max.dim, aten.argmax.default, *_SORTS)
#: More nodes than this between logits and ids are no router.
MAX_NODES = 256
MAX_WEIGHTS = 8


class NoRouter(Exception):
    """Why an expert block's ids and weights are no router's. weight: of several reasons the heaviest says most."""

    weight = 1


class _Unrelated(NoRouter):
    """Nothing between ids and weights could be tried."""

    weight = 0


class _Unlike(NoRouter):
    """It was run, and is something else."""

    weight = 2


@dataclass(frozen=True)
class Cut:
    """A router's results and where it begins; inner: the nodes between, in order."""

    weights: fx.Node
    ids: fx.Node
    logits: fx.Node
    bias: fx.Node | None
    inner: tuple[fx.Node, ...]


def find(graph: fx.Graph, sizes: Sizes) -> tuple[list[RouterSite], list[NearMiss]]:
    """Every router of the graph's `braze::moe` calls, and for each call without one, the reason."""
    sites: dict[tuple[fx.Node, fx.Node], RouterSite] = {}
    misses: list[NearMiss] = []
    known: dict[Hashable, RouteSpec | NoRouter] = {}
    ops = [getattr(torch.ops.braze, name).default for name in ("moe", "moe_apart", "moe_separate")]
    for call in (n for op in ops for n in graph.find_nodes(op="call_function", target=op)):
        ids, weights = call.args[1:3]
        if "placeholder" in (ids.op, weights.op):
            continue  # routed by the caller
        try:
            if (ids, weights) not in sites:
                sites[ids, weights] = _site(ids, weights, sizes, known)
        except (NoRouter, Unknown, small.CannotShrink) as e:
            misses.append(NearMiss("router", call.name, "find", str(e), source_line([ids, weights, call])))
    return list(sites.values()), misses


def _site(ids: fx.Node, weights: fx.Node, sizes: Sizes, known: dict[Hashable, RouteSpec | NoRouter]) -> RouterSite:
    chosen = _chosen(ids)
    reason: NoRouter = _Unrelated(f"the weights {weights.name} do not come from the scores that chose the experts")
    for result in _weight_nodes(weights, chosen, sizes):
        for logits in _logits(result, chosen, sizes):
            try:
                cut = _cut(result, chosen, logits, sizes)
                key = _signature(cut)
                if key not in known:
                    known[key] = _identified(cut, sizes)
                spec = known[key]
                if isinstance(spec, NoRouter):
                    raise spec
            except (NoRouter, small.CannotShrink) as e:
                reason = max(reason, e if isinstance(e, NoRouter) else NoRouter(str(e)), key=lambda r: r.weight)
                continue
            return RouterSite(result, chosen, logits, cut.bias, spec)
    raise reason


# ---------------------------------------------------------------------------------------------- where it lies


def _chosen(ids: fx.Node) -> fx.Node:
    """The top-k's indices behind the ids, through whatever is done to them since."""
    node = ids
    for _ in range(MAX_NODES):
        if _is_chosen(node):
            return node
        behind = [n for n in node.all_input_nodes if _is_index(n)]
        if node.op != "call_function" or len(behind) != 1 or node.target is aten.index.Tensor:
            break
        node = behind[0]
    raise NoRouter(f"the experts' ids {ids.name} come from {node.name}, no top-k")


def _is_chosen(node: fx.Node) -> bool:
    """Whether a node has the indices of a top-k, or of a row's largest elements by another name."""
    source = node.args[0] if node.args else None
    if node.target is aten.argmax.default:
        return _of_rows(node, source)
    if node.target is aten.slice.Tensor and isinstance(source, fx.Node) and source.target is operator.getitem:
        top = chooser_of(source)
        dim, last = node.args[1], top.meta["val"][0].ndim - 1 if top.target in _SORTS else None
        return last is not None and dim in (-1, last)
    return node.target is operator.getitem and isinstance(source, fx.Node) and source.target in _TOP_K[:2]


def _of_rows(node: fx.Node, scores: Any) -> bool:
    return len(node.args) > 1 and node.args[1] in (-1, scores.meta["val"].ndim - 1)


def _is_index(node: fx.Node) -> bool:
    """Whether a node holds indices that are not the same everywhere."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim > 0 and not value.is_floating_point() and value.dtype != torch.bool


def _weight_nodes(weights: fx.Node, ids: fx.Node, sizes: Sizes) -> Iterator[fx.Node]:
    """What may be a router's weights: the block's own, then those that they are made of (a cast, a scale an expert)."""
    rows = _rows(ids, sizes)
    queue, seen = [weights], {weights}
    while queue and len(seen) <= MAX_WEIGHTS:
        node = queue.pop(0)
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, Tensor):
            continue
        if value.is_floating_point() and value.ndim and sizes.shape(node)[:-1] == rows and not _is_product(node):
            yield node
        new = [n for n in node.all_input_nodes if n not in seen and n is not ids]
        seen.update(new)
        queue += new


def _rows(ids: fx.Node, sizes: Sizes) -> tuple[int, ...]:
    """How many tokens the ids are of, in as many dimensions as they have."""
    shape = sizes.shape(ids)
    return shape if _squeezed(ids) else shape[:-1]


def _squeezed(ids: fx.Node) -> bool:
    """Whether the ids are those of a largest element without a dimension for it."""
    top = chooser_of(ids)
    return top.target in (aten.max.dim, aten.argmax.default) and not (len(top.args) > 2 and top.args[2])


def _is_product(node: fx.Node) -> bool:
    return is_product(node) or node.target in _PRODUCTS


def _logits(weights: fx.Node, ids: fx.Node, sizes: Sizes) -> list[fx.Node]:
    """What may be the logits: matrices of one row a token and a column an expert, the earliest first."""
    top = chooser_of(ids)
    experts = _experts(ids, sizes)
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    queue = [weights, top]
    while queue and len(seen) <= MAX_NODES:
        node = queue.pop()
        if node in seen or not isinstance(node.meta.get("val"), Tensor | tuple | list):
            continue
        seen.add(node)
        value = node.meta["val"]
        floats = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1
        if floats and sizes.shape(node)[:-1] == _rows(ids, sizes) and _width(node, sizes) >= experts:
            found.add(node)
        if not _is_product(node):
            queue += node.all_input_nodes
    return sorted(found)


def _experts(ids: fx.Node, sizes: Sizes) -> int:
    """Among how many experts the top-k chooses."""
    return _width(chooser_of(ids).args[0], sizes)


def _width(node: Any, sizes: Sizes) -> int:
    return sizes.shape(node)[-1]


def _cut(weights: fx.Node, ids: fx.Node, logits: fx.Node, sizes: Sizes) -> Cut:
    """What lies between, where it depends on nothing but the logits and at most one bias an expert."""
    experts = _experts(ids, sizes)
    inner = small.between((weights, ids), (logits,))
    if len(inner) > MAX_NODES:
        raise NoRouter(f"{len(inner)} nodes lie between {logits.name} and the experts' ids")
    bias = _bias(inner, logits, experts)
    if bias is not None:
        inner = small.between((weights, ids), (logits, bias))
    _check_private(tuple(inner), (weights, ids))
    return Cut(weights, ids, logits, bias, tuple(inner))


def _bias(inner: Sequence[fx.Node], logits: fx.Node, experts: int) -> fx.Node | None:
    """The one tensor of an element an expert that the nodes need besides the logits, as near to its use as there is one."""
    needing = {logits}
    for node in inner:
        if any(n in needing for n in node.all_input_nodes):
            needing.add(node)
    stack = [n for node in inner if node in needing for n in node.all_input_nodes if n not in needing]
    found: dict[fx.Node, None] = {}
    while stack:
        node = stack.pop()
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel() == experts and _depends(node):
            found[node] = None
        elif node.op != "call_function" and isinstance(value, Tensor):
            raise NoRouter(f"the choice of experts also depends on {node.name}")
        else:
            stack += node.all_input_nodes
    if len(found) > 1:
        raise NoRouter(f"the choice of experts depends on {', '.join(n.name for n in found)}")
    return next(iter(found), None)


def _depends(node: fx.Node) -> bool:
    """Whether a node is anything but a constant."""
    return node.op != "call_function" or any(map(_depends, node.all_input_nodes))


def _check_private(inner: tuple[fx.Node, ...], results: tuple[fx.Node, fx.Node]) -> None:
    """Scores may have other uses and stay for them; a top-k that has would be computed twice."""
    after: set[fx.Node] = set()
    for node in inner:
        if node.target in _TOP_K or any(n in after for n in node.all_input_nodes):
            after.add(node)
        for user in node.users if node in after and node not in results else ():
            if user not in inner:
                raise NoRouter(f"{node.name}, which the top-k leads to, is also used by {user.name}")


def _signature(cut: Cut) -> Hashable:
    """What two cuts share only if they compute the same."""
    inputs = (cut.logits,) if cut.bias is None else (cut.logits, cut.bias)
    found = subgraph((cut.weights, cut.ids), inputs)
    return found.text if found is not None else cut.ids


# --------------------------------------------------------------------------------------------- what it computes


def _identified(cut: Cut, sizes: Sizes) -> RouteSpec | NoRouter:
    """The attributes with which `braze::route` gives what the cut gives; or why there are none."""
    try:
        runs = [sample(run) for run in probes(cut, sizes, seed=0)]
    except small.CannotShrink as e:
        return NoRouter(str(e))
    top_k = runs[0].ids.shape[-1]
    shared = runs[0].logits.shape[-1] - _experts(cut.ids, sizes)
    if runs[0].weights.shape[-1] != top_k + shared:
        return NoRouter(f"{runs[0].weights.shape[-1]} weights a token for {top_k} experts and {shared} shared ones")
    choosers = [s for s in _choosers(cut, top_k, shared, sizes) if agree(runs, s, ids_only=True)]
    if not choosers:
        return _Unlike(f"no scoring, bias or group limit that is known chooses experts as {cut.ids.name} does")
    for chooser in choosers:
        for spec in _weighings(chooser, cut):
            scale = _scale(runs[-1], spec)
            if scale is not None and agree(runs, spec := replace(spec, scale=scale)):
                return replace(spec, out_dtype=cut.weights.meta["val"].dtype, ids_dtype=cut.ids.meta["val"].dtype)
    return _Unlike(f"no scoring and normalisation that is known gives the weights {cut.weights.name}")


def _choosers(cut: Cut, top_k: int, shared: int, sizes: Sizes) -> Iterator[RouteSpec]:
    """Every way to choose that the graph's shapes leave open, simplest first; for all scorings, which logits do not tell."""
    for groups, top_groups, group_score, closed in _groupings(cut, top_k, sizes):
        for select_on in ("logits", "scores") if cut.bias is not None or groups > 1 else ("logits",):
            for scoring in get_args(Scoring):
                if not (shared and scoring == "softmax"):
                    yield RouteSpec(
                        top_k, scoring, select_on, groups, top_groups, group_score, closed, shared=shared
                    )  # fmt: skip


def _groupings(cut: Cut, top_k: int, sizes: Sizes) -> Iterator[tuple[int, int, Any, Any]]:
    """No groups, or as many as a view in the cut makes of the experts, with as many open as a top-k in it has results."""
    experts = _experts(cut.ids, sizes)
    yield 1, 1, "max", "out"
    tensors = [n for n in cut.inner if isinstance(n.meta.get("val"), Tensor) and n.meta["val"].ndim > 1]
    counts = {s[-2] for s in map(sizes.shape, tensors) if len(s) > 2 and s[-1] > 1 and s[-2] * s[-1] == experts}
    opened = {_width(n, sizes) for n in tensors if n.target is operator.getitem and chooser_of(n).target in _TOP_K}
    for groups in sorted(counts - {1}):
        for top_groups in sorted(o for o in opened | {1} if o < groups):
            for group_score in ("top2", "max"):
                for closed in ("out", "zero"):
                    if closed == "zero" or top_k <= experts // groups * top_groups:
                        yield groups, top_groups, group_score, closed


def _weighings(chooser: RouteSpec, cut: Cut) -> Iterator[RouteSpec]:
    """Every normalisation of the chosen scores, with the small constants of the graph."""
    yield chooser
    for eps in (0.0, *epsilons(cut)):
        for renorm in ("add", "clamp") if eps else ("add",):
            yield replace(chooser, renorm=renorm, eps=eps)


def _scale(run: Probe, spec: RouteSpec) -> float | None:
    """What the probe's weights are multiplied by, read off the largest; None where they are zero or not finite."""
    unscaled, graph = results(run, replace(spec, scale=1.0))
    at = int(unscaled.weights.abs().argmax())
    base, scaled = float(unscaled.weights.reshape(-1)[at]), float(graph.weights.reshape(-1)[at])
    if not base or not scaled or abs(scaled / base) == float("inf"):
        return None
    return float(f"{scaled / base:.12g}")
