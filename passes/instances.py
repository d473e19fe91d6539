"""Small instances of an expert block: values for its inputs that show what a wrong one would do.

Few hidden and inner columns, of different numbers; an expert without a token; ids of absent experts where the block masks them;
values that reach past any clamp that models use. Where rows are dropped, choices that overflow an expert's places.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from braze.passes import separate
from braze.passes.elements import Sizes
from braze.passes.normed import SORTED
from braze.passes.signs import nonnegative
from braze.passes.sites import MlpSite, MoeSite
from braze.passes.small import CannotShrink

#: Hidden and intermediate sizes of the small instance; different, so that mixing them up shows.
SMALL_HIDDEN, SMALL_INNER = 6, 4
#: Masks with more elements than this are not run.
MAX_MASK = 1 << 23


def instances(site: MoeSite, sizes: Sizes) -> Iterator[dict[fx.Node, Tensor]]:
    """Values for a site's inputs, all floating tensors in float64; several where choices decide what is computed."""
    rng = torch.Generator().manual_seed(0)
    weights = _weights(site, sizes, rng)
    experts = sizes.shape(site.w1)[0]
    tokens, slots = sizes.shape(site.ids)
    if not site.chosen:
        used = experts - 1 if experts > slots else experts
        ids = torch.rand((tokens, used), generator=rng).argsort(1)[:, :slots].to(site.ids.meta["val"].dtype)
        if site.masked and tokens > 1:
            ids[0, 0] = experts  # an expert that is elsewhere
        values = {site.ids: ids, site.values: torch.randn(tokens, slots, generator=rng, dtype=torch.float64)}
        yield _seen_from_views(site, sizes, {**weights, **values, site.x: _rows(site, weights, tokens, rng)})
        return
    few = _few(site, tokens, sizes)
    for lean in (0.0, 1.0, 10.0):  # from an even choice to one that is the same for all
        liking = torch.rand((few, experts), generator=rng) - lean * torch.arange(experts) / experts
        ids = liking.argsort(1, descending=True)[:, :slots]
        ids = ids.sort(0).values if site.dispatch == SORTED else ids
        values = {n: _free(n, _shape(n, sizes, tokens, few), rng) for n in site.given}
        yield _seen_from_views(
            site,
            sizes,
            {**weights, **values, **_chosen(site, ids, tokens, sizes), site.x: _rows(site, weights, few, rng)},
        )


def of_mlp(site: MlpSite, sizes: Sizes) -> dict[fx.Node, Tensor]:
    """Values for an MLP's inputs, in float64."""
    rng = torch.Generator().manual_seed(0)
    tokens, width = sizes.shape(site.x)
    inner_dim = 0 if site.spec.transposed else 1
    hidden, inner = min(width, SMALL_HIDDEN), min(sizes.shape(site.w2)[inner_dim], SMALL_INNER)
    columns = inner * (1 if site.spec.layout == "none" else 2) // len(site.w1)

    def weight(rows: int, out: int, std: float) -> Tensor:
        value = torch.randn(rows, out, generator=rng, dtype=torch.float64) * std
        return value if site.spec.transposed else value.T

    x = torch.randn(tokens, hidden, generator=rng, dtype=torch.float64) * 3.0
    values = {site.source: x.reshape(*sizes.shape(site.source)[:-1], hidden), site.x: x}
    values |= {w: weight(hidden, columns, 2.0) for w in site.w1}
    values[site.w2] = weight(inner, hidden, 1.0)
    values |= {b: torch.randn(columns, generator=rng, dtype=torch.float64) for b in site.b1}
    if site.b2 is not None:
        values[site.b2] = torch.randn(hidden, generator=rng, dtype=torch.float64)
    return values


def _weights(site: MoeSite, sizes: Sizes, rng: torch.Generator) -> dict[fx.Node, Tensor]:
    experts, *w1 = sizes.shape(site.w1)
    gates = 1 if site.spec.layout == "none" else 2
    hidden, inner = min(w1[1 - site.spec.transposed], SMALL_HIDDEN), min(w1[site.spec.transposed] // gates, SMALL_INNER)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64) * std

    up, down = (hidden, gates * inner), (inner, hidden)
    if not site.spec.transposed:
        up, down = up[::-1], down[::-1]
    values = {site.w1: normal(experts, *up, std=2.0), site.w2: normal(experts, *down)}
    if site.b1 is not None:
        values[site.b1] = normal(experts, gates * inner)
    if site.b2 is not None:
        values[site.b2] = normal(experts, hidden)
    for node in (site.w1, site.w2, site.b1, site.b2):
        if node is not None:
            values.update(separate.parts_of(node, values[node]))
    return values


def _rows(site: MoeSite, weights: dict[fx.Node, Tensor], tokens: int, rng: torch.Generator) -> Tensor:
    hidden = weights[site.w2].shape[2 if site.spec.transposed else 1]
    return torch.randn(tokens, hidden, generator=rng, dtype=torch.float64) * 3.0


def _seen_from_views(site: MoeSite, sizes: Sizes, values: dict[fx.Node, Tensor]) -> dict[fx.Node, Tensor]:
    """The values, with those of tensors that inputs are plain views of."""
    for source, view in separate.viewed(site).items():
        if view in values:
            shape = sizes.shape(source)
            last = values[view].shape[-1] if view is site.x else shape[-1]
            values[source] = values[view].reshape(*shape[:-1], last)
    return values


def _few(site: MoeSite, tokens: int, sizes: Sizes) -> int:
    """A number of tokens of which some do not fit into an expert's places; all of them where they have several dimensions."""
    capacity = sizes.of(site.capacity)
    whole = not capacity or bool(separate.viewed(site)) or any(sizes.shape(n)[0] != tokens for n in site.chosen)
    few = tokens if whole else min(tokens, 2 * capacity + 3)
    experts = sizes.shape(site.w1)[0]
    if few * experts * capacity > MAX_MASK:
        raise CannotShrink(f"masks of {few} tokens, {experts} experts and {capacity} places are too large to be run")
    return few


def _shape(node: fx.Node, sizes: Sizes, tokens: int, few: int) -> tuple[int, ...]:
    return tuple(few if s == tokens else s for s in sizes.shape(node))


def _free(node: fx.Node, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    value = torch.randn(shape, generator=rng, dtype=torch.float64)
    return value.abs() if nonnegative(node) else value


def _chosen(site: MoeSite, ids: Tensor, tokens: int, sizes: Sizes) -> dict[fx.Node, Tensor]:
    columns = [ids] if len(site.chosen) == 1 else ids.unbind(1)
    return {
        n: column.reshape(_shape(n, sizes, tokens, ids.shape[0])).to(n.meta["val"].dtype)
        for n, column in zip(site.chosen, columns, strict=True)
    }
