"""The normal form of a find, whatever way the model spelled it, and of a near miss.

A site names graph nodes (its inputs and its root, the node whose value the semantic op gives) and the op's attributes;
`Finding` and `NearMiss` are what is left of it for a report: plain data with the model's source line.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import fx

from braze.kernels.spec import MoeSpec, NormSpec, RopeSpec, RouteSpec

Kind = Literal["rope", "moe", "router", "mlp"]
KINDS: tuple[Kind, ...] = ("rope", "moe", "router", "mlp")


@dataclass(frozen=True)
class RopeSite:
    """root = braze::rope(x, cos, sin, spec). x and root have one shape [..., D]; tables broadcast against it."""

    root: fx.Node
    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    spec: RopeSpec
    form: str


@dataclass(frozen=True)
class NormSite:
    """normed [..., D] = braze::rms_norm(source [..., D], weight [1, ..., D] or none, spec); root, which a rotation turns, is
    normed after `layout`: the ops from root back to normed, which move whole rows of D. mean: of the squares of each row.
    """

    root: fx.Node
    normed: fx.Node
    source: fx.Node
    weight: fx.Node | None
    mean: fx.Node
    layout: tuple[fx.Node, ...]
    spec: NormSpec


@dataclass(frozen=True)
class MoeSite:
    """root [T, H] = braze::moe(x [T, H], ids [T, k], weights [T, k], w1, w2, b1, b2, spec).

    values: what weights are computed from by new nodes, where the graph has no such node itself; else weights.
    masked: whether the graph masks rows whose expert id is past the last expert (expert parallelism).
    chosen: the integers that ids and weights are computed from by new nodes, with `given`, tensors of any values; where it is
    empty, ids are in the graph. capacity: how many rows an expert takes, 0 where it takes all; it may be symbolic.
    """

    root: fx.Node
    x: fx.Node
    ids: fx.Node
    weights: fx.Node
    w1: fx.Node
    w2: fx.Node
    b1: fx.Node | None
    b2: fx.Node | None
    values: fx.Node
    spec: MoeSpec
    dispatch: str
    masked: bool = False
    chosen: tuple[fx.Node, ...] = ()
    given: tuple[fx.Node, ...] = ()
    capacity: int | torch.SymInt = 0


@dataclass(frozen=True)
class RouterSite:
    """(weights [..., k], ids [..., k]) = braze::route(logits [..., E], bias [E] or none, spec)."""

    weights: fx.Node
    ids: fx.Node
    logits: fx.Node
    bias: fx.Node | None
    spec: RouteSpec

    @property
    def root(self) -> fx.Node:
        return self.ids


@dataclass(frozen=True)
class MlpSite:
    """root [T, H] = braze::mlp(x [T, H], w1, w2, b1, b2, spec); w1 and b1 are those of gate and up, or of both in one.

    source: [.., H], what x is a view of, or x itself.
    """

    root: fx.Node
    source: fx.Node
    x: fx.Node
    w1: tuple[fx.Node, ...]
    w2: fx.Node
    b1: tuple[fx.Node, ...]
    b2: fx.Node | None
    spec: MoeSpec

    @property
    def given(self) -> tuple[fx.Node, ...]:
        """What its subgraph starts from."""
        return (self.source, *self.w1, self.w2, *self.b1, *(() if self.b2 is None else (self.b2,)))


Site = RopeSite | MoeSite | RouterSite | MlpSite


@dataclass(frozen=True)
class NearMiss:
    """Something that looked like a site and was left as it was. stage: which step refused it."""

    kind: Kind
    root: str
    stage: Literal["find", "prove", "rewrite"]
    reason: str
    source: str


@dataclass(frozen=True)
class Finding:
    """One fused site, as data: normal form, the kernel chosen and why, the proof's outcome, the model's source line."""

    kind: Kind
    form: str
    dims: dict[str, Any] = field(default_factory=dict)
    kernel: str = ""
    why: str = ""
    proof: str = ""
    source: str = ""


@dataclass(frozen=True)
class GraphReport:
    """What the passes did to one captured graph."""

    nodes: int
    sites: tuple[Finding, ...] = ()
    near_misses: tuple[NearMiss, ...] = ()
    errors: tuple[str, ...] = ()
    seconds: float = 0.0


_UNLOOPED = ("braze", "unlooped.py")
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')


def source_line(nodes: Sequence[fx.Node]) -> str:
    """ "file:line in function" of the innermost model frame that the first of `nodes` with a stack trace carries.

    Of what took a loop's place in the model (`braze.unlooped`), the frame that calls it.
    """
    for node in nodes:
        frames = _FRAME.findall(node.meta.get("stack_trace") or "")
        own = [f for f in frames if not f[0].startswith("<") and Path(f[0]).parts[-2:] != _UNLOOPED]
        if frames:
            file, line, function = (own or frames)[-1]
            return f"{file}:{line} in {function}"
    return "unknown"
