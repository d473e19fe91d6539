"""The order of the passes over one graph: experts, their routers, dense MLPs, rotations, norms before them; find, prove,
rewrite; nothing half done.

Experts come first since their subgraphs are the larger ones, and a router is found from the experts it feeds; no two sites
share a node that is rewritten. A site that fails its proof or its rewrite leaves the graph as it was, and a near miss.
"""

import contextlib
import gc
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import fx

from braze.passes import (
    bases,
    batches,
    experts,
    mlp,
    norm,
    padding,
    proof,
    residuals,
    rope,
    routers,
    side_by_side,
    splits,
)
from braze.passes.elements import Sizes
from braze.passes.proofs import Proofs
from braze.passes.rewrite import clean, rewrite, rewrite_norm, share, source_nodes
from braze.passes.settle import settle
from braze.passes.sites import (
    Finding,
    Kind,
    MlpSite,
    MoeSite,
    NearMiss,
    NormSite,
    RopeSite,
    RouterSite,
    Site,
    source_line,
)

log = logging.getLogger("braze")


@dataclass
class Result:
    """What the passes did to a graph: the new calls with their findings, near misses, and errors inside braze. floats: inputs
    that sites need to know; where there are any, nothing else was done."""

    calls: list[tuple[fx.Node, Finding]] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    seconds: float = 0.0
    floats: set[int] = field(default_factory=set)


Recogniser = Callable[[fx.Graph, Sizes], tuple[Sequence[Site], list[NearMiss]]]
_RECOGNISERS: tuple[tuple[Kind, Recogniser], ...] = (
    ("moe", experts.find),
    ("router", routers.find),
    ("mlp", mlp.find),
    ("rope", rope.find),
)


def run(
    graph: fx.Graph,
    disable: Collection[Kind] = (),
    strict: bool = False,
    guards: bool = True,
    floats: Mapping[int, float] | None = None,
) -> Result:
    """Rewrites every proven site of `graph` in place. An exception inside braze is logged, counted and swallowed, and
    leaves its site unfused; with `strict` it is raised. guards: whether symbolic numbers may be fixed (`settle`). floats: the
    program's, by the inputs that hold them."""
    result = Result()
    began = time.perf_counter()
    with _without_collections():
        if guards:
            _settle(graph, disable, strict, floats or {}, result)
        if not result.floats:
            _run(graph, disable, strict, result)
    result.seconds = time.perf_counter() - began
    return result


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Python's cycle collector walks all that the compiler holds, over and over, and finds nothing of the passes'."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _settle(
    graph: fx.Graph, disable: Collection[Kind], strict: bool, floats: Mapping[int, float], result: Result
) -> None:
    def look(copy: fx.Graph, needs: Callable[[Site | NormSite], None]) -> None:
        _run(copy, disable, strict, Result(), needs)

    result.floats = _guarded(partial(settle, graph, look, floats), "symbolic numbers", set(), strict, result)


def _run(
    graph: fx.Graph,
    disable: Collection[Kind],
    strict: bool,
    result: Result,
    proven: Callable[[Site | NormSite], None] = lambda site: None,
) -> None:
    padded: list[padding.Padded] = _guarded(partial(padding.unpad, graph), "padded products", [], strict, result)
    plain = {p.product for p in padded}  # these are padded again
    batched: list[fx.Node] = _guarded(partial(batches.make_batched, graph, plain), "one batch", [], strict, result)
    apart: list[bases.Apart] = []
    started: list[residuals.Apart] = []
    if "moe" not in disable:
        apart = _guarded(partial(bases.take_apart, graph), "sums over a base", [], strict, result)
        started = _guarded(partial(residuals.take_apart, graph), "sums of experts", [], strict, result)
    _find(graph, disable, strict, result, proven)
    _guarded(partial(residuals.put_together, started), "sums of experts", None, strict, result)
    _guarded(partial(bases.put_together, apart), "sums over a base", None, strict, result)
    _guarded(partial(batches.make_plain, batched), "one batch", None, strict, result)
    _guarded(partial(padding.pad_again, padded), "padded products", None, strict, result)
    _clean(graph, result)


def _find(
    graph: fx.Graph, disable: Collection[Kind], strict: bool, result: Result, proven: Callable[[Site | NormSite], None]
) -> None:
    placed: list[side_by_side.Placed] = []
    if "moe" not in disable:
        result.near_misses += _guarded(partial(splits.group, graph), "products of split rows", [], strict, result)
        place = partial(side_by_side.place, graph)
        placed, misses = _guarded(place, "experts side by side", ([], []), strict, result)
        result.near_misses += misses
    prove = Proofs(graph, proven)
    for kind, find in _RECOGNISERS:
        if kind in disable:
            continue
        sites, misses = _guarded(partial(find, graph, Sizes()), kind, ((), []), strict, result)
        result.near_misses += misses
        done = len(result.calls)
        for site in reversed(sites):  # the last one first: an earlier one's root may be what it takes
            fuse = partial(_fuse, site, kind, prove, result)
            _guarded(fuse, f"{kind} at {site.root.name}", None, strict, result)
        result.calls[done:] = reversed(result.calls[done:])
        if kind == "rope":
            share([call for call, _ in result.calls[done:]])
        _clean(graph, result)  # what fused sites leave behind would look like other uses to the next kind
        if kind == "moe":
            _guarded(partial(side_by_side.put_back, placed), "experts side by side", None, strict, result)
    _guarded(partial(_join_norms, result, prove), "norms before rotations", None, strict, result)


def _clean(graph: fx.Graph, result: Result) -> None:
    """Removes what no site needed, calls among it that another site reads past: in one tensor two rotations can end."""
    clean(graph)
    alive = set(graph.nodes)
    result.calls = [(call, finding) for call, finding in result.calls if call in alive]


def _guarded(work: Callable[[], Any], what: str, otherwise: Any, strict: bool, result: Result) -> Any:
    try:
        return work()
    except Exception as e:
        if strict:
            raise
        message = f"{what}: {type(e).__name__}: {e}"
        log.exception("internal error, left unfused: %s", message)
        result.errors.append(message)
        return otherwise


def _fuse(site: Site, kind: Kind, prove: Proofs, result: Result) -> None:
    source = source_line(source_nodes(site))
    name = site.root.name
    try:
        outcome = prove(site)
    except proof.Refused as e:
        result.near_misses.append(NearMiss(kind, name, "prove", str(e), source))
        return
    try:
        call = rewrite(site)
    except (ValueError, RuntimeError) as e:
        result.near_misses.append(NearMiss(kind, name, "rewrite", str(e), source))
        return
    result.calls.append((call, Finding(kind, form(site), dims(site), proof=outcome, source=source)))


def _join_norms(result: Result, prove: Proofs) -> None:
    """Takes RMSNorms over the head just before rotations into their sites."""
    known: norm.Known = {}
    for n, (call, finding) in enumerate(result.calls):
        if finding.kind != "rope":
            continue
        turned = call.args[0]
        assert isinstance(turned, fx.Node)
        found = norm.find(turned, Sizes(), known)
        if isinstance(found, NearMiss):
            result.near_misses.append(found)
        elif found is not None:
            try:
                outcome = prove(found)
                rewrite_norm(found)
            except (proof.Refused, ValueError, RuntimeError) as e:
                reason = f"the RMSNorm before it stays outside: {e}"
                result.near_misses.append(NearMiss("rope", turned.name, "prove", reason, finding.source))
                continue
            joined = replace(finding, form=f"{finding.form}, {_norm_words(found)}", proof=f"{finding.proof}; {outcome}")
            result.calls[n] = call, joined


def _norm_words(site: NormSite) -> str:
    weight = "" if site.weight is None else ", 1 + weight" if site.spec.add_one else ", weight"
    return f"rms_norm before (eps {site.spec.eps:g}{weight})"


def form(site: Site) -> str:
    """A site's normal form in words."""
    if isinstance(site, RopeSite):
        return site.form
    if isinstance(site, RouterSite):
        return _router_form(site)
    if isinstance(site, MlpSite):
        return _mlp_form(site)
    spec = site.spec
    parts = [
        f"{site.dispatch}, act(g, u) = {spec.activation}"
        if spec.layout != "none"
        else f"{site.dispatch}, act(g) = {spec.activation}"
    ]
    parts.append("no gate" if spec.layout == "none" else f"gate/up {spec.layout}")
    parts.append(f"weight on {spec.weight_on}")
    biases = [n for n, b in (("b1", site.b1), ("b2", site.b2)) if b is not None]
    if biases:
        parts.append("biases " + "+".join(biases))
    if spec.transposed:
        parts.append("weights [E, in, out]")
    if spec.scale != 1.0:
        parts.append(f"scale {spec.scale:g}")
    return ", ".join(parts)


def _mlp_form(site: MlpSite) -> str:
    gates = "no gate" if site.spec.layout == "none" else "gate and up apart" if len(site.w1) == 2 else site.spec.layout
    biases = [n for n, b in (("b1", site.b1), ("b2", site.b2)) if b]
    parts = [f"dense, act({'g' if gates == 'no gate' else 'g, u'}) = {site.spec.activation}"]
    parts.append(f"gate/up {gates}" if gates == site.spec.layout else gates)
    parts += [f"biases {'+'.join(biases)}"] if biases else []
    return ", ".join([*parts, *(["weights [in, out]"] if site.spec.transposed else [])])


def _router_form(site: RouterSite) -> str:
    spec = site.spec
    parts = [f"{spec.scoring}, top {spec.top_k}"]
    if site.bias is not None or spec.groups > 1:
        parts[0] += f" of the {spec.select_on}{' + bias' if site.bias is not None else ''}"
    if spec.groups > 1:
        score = "largest" if spec.group_score == "max" else "sum of the top 2"
        closed = " (else 0)" if spec.closed == "zero" else ""
        parts.append(f"in {spec.top_groups} of {spec.groups} groups by their {score}{closed}")
    if spec.renorm != "no":
        eps = f" {'+' if spec.renorm == 'add' else 'at least'} {spec.eps:g}" if spec.eps else ""
        parts.append(f"divided by their sum{eps}")
    if spec.shared:
        parts.append(f"with {spec.shared} shared")
    if spec.scale != 1.0:
        parts.append(f"scale {spec.scale:g}")
    return ", ".join(parts)


def dims(site: Site) -> dict[str, Any]:
    """A site's sizes: ints, or text for symbolic ones."""

    def size(node: fx.Node, d: int) -> Any:
        s = node.meta["val"].shape[d]
        return s if isinstance(s, int) else str(s)

    x = site.logits if isinstance(site, RouterSite) else site.x
    dtype = str(x.meta["val"].dtype).removeprefix("torch.")
    if isinstance(site, RouterSite):
        experts = site.logits.meta["val"].shape[-1] - site.spec.shared
        tokens: Any = 1
        for s in site.logits.meta["val"].shape[:-1]:
            tokens = tokens * s
        tokens = tokens if isinstance(tokens, int) else str(tokens)
        return {"tokens": tokens, "top_k": site.spec.top_k, "experts": experts, "dtype": dtype}
    if isinstance(site, MlpSite):
        inner = size(site.w2, 0 if site.spec.transposed else 1)
        return {"tokens": size(x, 0), "hidden": size(x, 1), "inner": inner, "dtype": dtype}
    if isinstance(site, MoeSite):
        w1 = site.w1.meta["val"].shape
        hidden, columns = (1, 2) if site.spec.transposed else (2, 1)
        inner = w1[columns] // (1 if site.spec.layout == "none" else 2)
        return {
            "tokens": size(site.ids, 0), "top_k": size(site.ids, 1), "experts": w1[0], "hidden": w1[hidden],
            "inner": inner, "dtype": dtype,
        }  # fmt: skip
    shape = [size(site.x, d) for d in range(site.x.meta["val"].ndim)]
    return {"shape": shape, "rotary_dim": site.spec.rotary_dim, "head": shape[-1], "dtype": dtype}
