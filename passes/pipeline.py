"""The order of the passes over one graph: experts, then rotations; find, prove, rewrite; nothing half done.

Experts come first since their subgraphs are the larger ones; the two kinds never share a node that is rewritten. A site
that fails its proof or its rewrite leaves the graph as it was, and a near miss.
"""

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import fx

from braze.passes import experts, proof, rope
from braze.passes.elements import Sizes
from braze.passes.rewrite import clean, rewrite, source_nodes
from braze.passes.sites import Finding, Kind, MoeSite, NearMiss, RopeSite, Site, source_line

log = logging.getLogger("braze")


@dataclass
class Result:
    """What the passes did to a graph: the new calls with their findings, near misses, and errors inside braze."""

    calls: list[tuple[fx.Node, Finding]] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    seconds: float = 0.0


Recogniser = Callable[[fx.Graph, Sizes], tuple[Sequence[Site], list[NearMiss]]]
_RECOGNISERS: tuple[tuple[Kind, Recogniser], ...] = (("moe", experts.find), ("rope", rope.find))


def run(graph: fx.Graph, disable: Collection[Kind] = (), strict: bool = False) -> Result:
    """Rewrites every proven site of `graph` in place. An exception inside braze is logged, counted and swallowed, and
    leaves its site unfused; with `strict` it is raised."""
    result = Result()
    began = time.perf_counter()
    sizes = proof.bindings(graph)
    for kind, find in _RECOGNISERS:
        if kind in disable:
            continue
        sites, misses = _guarded(partial(find, graph, Sizes()), kind, ((), []), strict, result)
        result.near_misses += misses
        for site in sites:
            fuse = partial(_fuse, site, kind, sizes, result)
            _guarded(fuse, f"{kind} at {site.root.name}", None, strict, result)
    clean(graph)
    result.seconds = time.perf_counter() - began
    return result


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


def _fuse(site: Site, kind: Kind, sizes: Sequence[Sizes], result: Result) -> None:
    source = source_line(source_nodes(site))
    name = site.root.name
    try:
        outcome = proof.rope(site, sizes) if isinstance(site, RopeSite) else proof.moe(site, sizes)
    except proof.Refused as e:
        result.near_misses.append(NearMiss(kind, name, "prove", str(e), source))
        return
    try:
        call = rewrite(site)
    except (ValueError, RuntimeError) as e:
        result.near_misses.append(NearMiss(kind, name, "rewrite", str(e), source))
        return
    result.calls.append((call, Finding(kind, form(site), dims(site), proof=outcome, source=source)))


def form(site: Site) -> str:
    """A site's normal form in words."""
    if isinstance(site, RopeSite):
        return site.form
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


def dims(site: Site) -> dict[str, Any]:
    """A site's sizes: ints, or text for symbolic ones."""

    def size(node: fx.Node, d: int) -> Any:
        s = node.meta["val"].shape[d]
        return s if isinstance(s, int) else str(s)

    dtype = str(site.x.meta["val"].dtype).removeprefix("torch.")
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
