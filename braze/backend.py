"""The torch.compile backend: Inductor with braze's passes before its own post-grad ones.

A captured graph reaches Inductor's post-grad stage functional and decomposed, in one dialect for torch.compile, torch.export
and AOTInductor; there sites are found, proven, rewritten to semantic ops, and each op gets its kernel (braze.lowering).
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from braze import breaks, floats, scalars
from braze import ops as _ops  # noqa: F401  (registers the semantic ops)
from braze.lowering import inductor
from braze.lowering.lower import lower
from braze.options import Options
from braze.passes import pipeline
from braze.passes.sites import GraphReport, NearMiss

log = logging.getLogger("braze")

_listeners: list[list[GraphReport]] = []


class RequirementError(RuntimeError):
    """A kind named in `require` was not fused in a graph."""


@contextlib.contextmanager
def collect() -> Iterator[list[GraphReport]]:
    """The reports of the graphs compiled within, in order. Graphs served from a cache are not compiled and have none."""
    reports: list[GraphReport] = []
    _listeners.append(reports)
    try:
        yield reports
    finally:
        _listeners.remove(reports)


def fuse_graph(
    graph: fx.Graph,
    options: Options,
    guards: bool = True,
    given: Mapping[int, float] | None = None,
    broken: Sequence[NearMiss] = (),
) -> GraphReport:
    """Runs passes and lowering over one post-grad graph in place; RequirementError where a required kind is missing.

    guards: whether what is compiled is guarded, so that symbolic numbers may be fixed. given: the floats among the graph's
    inputs; NeedsFloats where a site needs to know some. StillRead where the graph was captured for its experts to be fused
    with sizes that they read, and reads some still. broken: what is told of the break that the graph ends at.
    """
    nodes = len(graph.nodes)
    result = pipeline.run(graph, options.disable, options.strict, guards, given)
    if result.floats:
        raise floats.NeedsFloats(result.floats)
    scalars.check(graph, result.near_misses)
    choices = lower([call for call, _ in result.calls], options.kernel)
    findings = [
        replace(finding, kernel=kernel, why=why)
        for (_, finding), (kernel, why) in zip(result.calls, choices, strict=True)
    ]
    graph.lint()
    misses = (*(scalars.held_back() or broken), *result.near_misses)
    report = GraphReport(nodes, tuple(findings), misses, tuple(result.errors), result.seconds)
    _tell(report)
    _require(report, options)
    return report


def _leave(graph: fx.Graph, options: Options, message: str) -> None:
    """Reports a graph that nothing is fused in because of an error inside braze."""
    report = GraphReport(len(graph.nodes), (), (), (message,), 0.0)
    _tell(report)
    _require(report, options)


def _require(report: GraphReport, options: Options) -> None:
    """RequirementError where a required kind is missing, with all that is known of why."""
    missing = [kind for kind in options.require if not any(s.kind == kind for s in report.sites)]
    if missing:
        why = [f"{m.kind} at {m.source}: {m.reason}" for m in report.near_misses]
        why += [f"internal error: {e}" for e in report.errors]
        reasons = "; ".join(why) or "nothing came close"
        raise RequirementError(
            f"braze fused no {' and no '.join(missing)} in a graph of {report.nodes} nodes ({reasons})"
        )


def _count(report: GraphReport, by: int) -> None:
    counters = torch._dynamo.utils.counters["braze"]
    for finding in report.sites:
        counters[finding.kind] += by
    counters["near_miss"] += by * len(report.near_misses)
    counters["error"] += by * len(report.errors)


def _tell(report: GraphReport) -> None:
    _count(report, 1)
    for reports in _listeners:
        reports.append(report)
    if report.sites:
        kinds = ", ".join(
            f"{sum(f.kind == k for f in report.sites)} {k}" for k in dict.fromkeys(f.kind for f in report.sites)
        )
        log.info("fused %s in a graph of %d nodes (%.2f s)", kinds, report.nodes, report.seconds)
    else:
        log.warning("found nothing to fuse in a graph of %d nodes: compiled by Inductor as it is", report.nodes)
    for miss in report.near_misses:
        log.info("not fused: %s at %s: %s", miss.kind, miss.source, miss.reason)


def _retract(told: Sequence[GraphReport]) -> None:
    """Takes back reports of graphs that are not compiled as they say."""
    for report in told:
        _count(report, -1)
        for reports in _listeners:
            reports.remove(report)


def braze(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend's entry point, as torch.compile calls it. options: braze's own and Inductor's (`braze.options`).

    ValueError for an unknown option, value or mode; RequirementError where a required kind was not fused.
    """
    parsed = Options.parse(options, mode)
    if scalars.break_at_sizes(gm):
        raise scalars.capture()
    broken = breaks.told(gm)
    told: list[GraphReport] = []
    ours = False  # whether what goes wrong may be braze's
    given, needed, misses = floats.given(gm), set[int](), list[NearMiss]()

    def fuse(graph: fx.Graph) -> None:
        nonlocal ours
        ours = True
        same = len(graph.find_nodes(op="placeholder")) == len(example_inputs)
        try:
            told.append(fuse_graph(graph, parsed, given=floats.values(given) if same else None, broken=broken))
        except (RequirementError, floats.NeedsFloats, scalars.StillRead) as e:
            ours = False
            needed.update(getattr(e, "inputs", ()))
            misses.extend(getattr(e, "misses", ()))
            raise
        ours = bool(told[-1].sites)

    try:
        return inductor.compile_graph(gm, example_inputs, fuse, parsed.key(), parsed.inductor)
    except Exception as e:
        if needed:
            _retract(told)
            raise floats.capture_again(given, needed) from None
        if scalars.captured():
            _retract(told)
            log.info("the graph ends where sizes are read from a tensor, after all", exc_info=e)
            raise scalars.give_up(misses) from None
        if parsed.strict or not ours:
            raise
        error = e
    # A graph that is half lowered is of no use: Inductor compiles the captured one again, as it is.
    log.error("internal error, the graph is left to Inductor", exc_info=error)
    _retract(told)
    message = f"{type(error).__name__}: {error}".partition("\n")[0]
    return inductor.compile_graph(
        gm, example_inputs, lambda graph: _leave(graph, parsed, message), f"{parsed.key()} unfused", parsed.inductor
    )
