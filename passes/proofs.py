"""Proofs of one graph's sites, each computation once: sites of twin layers (braze.passes.twins) share their proof.

A proof depends on the subgraph between a site's inputs and what the op would replace, on the op's attributes and on the
bindings of symbolic sizes; where these are equal, so is its outcome. Refusals are not shared: they name nodes.
"""

from collections.abc import Callable, Sequence

from torch import fx

from braze.passes import proof, separate
from braze.passes.elements import Sizes
from braze.passes.sites import MlpSite, MoeSite, NormSite, RopeSite, RouterSite, Site
from braze.passes.twins import evaluated, subgraph


class Proofs:
    """Proves sites of `graph` under two bindings of its symbolic sizes, where it has any. proven: told of each that holds."""

    def __init__(self, graph: fx.Graph, proven: Callable[[Site | NormSite], None] = lambda site: None) -> None:
        self.sizes = proof.bindings(graph)
        self.proven = proven
        self._known: dict[object, str] = {}

    def __call__(self, site: Site | NormSite) -> str:
        """The outcome in words; `proof.Refused` where the site is not what it was taken for."""
        key = proven_by(site)
        outcome = self._known.get(key) if key is not None else None
        if outcome is None:
            outcome = _prove(site, self.sizes)
        if key is not None:
            self._known[key] = outcome
        self.proven(site)
        return outcome


def _prove(site: Site | NormSite, sizes: Sequence[Sizes]) -> str:
    if isinstance(site, NormSite):
        return proof.norm(site, sizes)
    if isinstance(site, RopeSite):
        return proof.rope(site, sizes)
    if isinstance(site, MlpSite):
        return proof.mlp(site, sizes)
    return proof.moe(site, sizes) if isinstance(site, MoeSite) else proof.router(site, sizes)


def proven_by(site: Site | NormSite) -> object | None:
    """All that a site's proof depends on, to compare by; None where that is too much."""
    if isinstance(site, NormSite):
        fixed = [site.source] if site.weight is None else [site.source, site.weight]
        between = subgraph([site.root, site.normed, site.mean], fixed, evaluated)
        return None if between is None else (site.spec, len(fixed), between.text)
    if isinstance(site, RopeSite):
        between = subgraph([site.root, site.cos, site.sin], [site.x], evaluated)
        return None if between is None else (site.spec, between.text)
    if isinstance(site, RouterSite):
        cut = (site.logits,) if site.bias is None else (site.logits, site.bias)
        between = subgraph([site.weights, site.ids], cut)
        return None if between is None else (site.spec, between.text)
    if isinstance(site, MlpSite):
        between = subgraph([site.root], site.given)
        return None if between is None else (site.spec, len(site.w1), len(site.b1), site.b2 is None, between.text)
    chosen = site.chosen or (site.ids, site.values)
    given = (site.x, site.w1, site.w2, site.b1, site.b2, *chosen, *site.given, *separate.given(site))
    fed = [n if isinstance(n, fx.Node) else None for n in given]
    between = subgraph([site.root, site.ids, site.weights], [n for n in fed if n is not None])
    return None if between is None else (site.spec, site.masked, tuple(n is None for n in fed), between.text)
