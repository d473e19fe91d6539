"""What braze did to a model, and what it did not do and why: `explain` compiles anew, past all caches, and reports.

Passes do not run for graphs that come from a cache, so the model is compiled by a backend of its own with caches off for
that one call; what the caller has compiled stays as it is.
"""

import dataclasses
import html
import inspect
import io
import itertools
import json
import types
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import fx, nn

from braze.backend import braze, collect
from braze.passes.sites import Finding, GraphReport, NearMiss


@dataclass(frozen=True)
class Report:
    """The outcome for every graph of one call."""

    graph_reports: tuple[GraphReport, ...]

    @property
    def sites(self) -> list[Finding]:
        """Every fused site: .kind, .form, .dims, .kernel, .why, .proof, .source."""
        return [s for g in self.graph_reports for s in g.sites]

    @property
    def near_misses(self) -> list[NearMiss]:
        """What looked like a site and was left as it was: .kind, .reason, .source, .stage, .root."""
        return [m for g in self.graph_reports for m in g.near_misses]

    @property
    def errors(self) -> list[str]:
        """Errors inside braze; each left its site unfused."""
        return [e for g in self.graph_reports for e in g.errors]

    @property
    def graphs(self) -> int:
        """How many graphs the call was captured in: 1 where nothing broke it up."""
        return len(self.graph_reports)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, ready for JSON."""
        return {
            "graphs": [{"nodes": g.nodes, "seconds": g.seconds} for g in self.graph_reports],
            "sites": [dataclasses.asdict(s) for s in self.sites],
            "near_misses": [dataclasses.asdict(m) for m in self.near_misses],
            "errors": self.errors,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, default=str)

    def to_html(self) -> str:
        """A page of its own with both tables."""
        parts = [f"<h1>braze</h1><p>{html.escape(self._summary())}</p>"]
        for title, columns, rows in (
            ("Fused", _SITE_COLUMNS, self._site_rows()),
            ("Not fused", _MISS_COLUMNS, self._miss_rows()),
        ):
            head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
            body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
            parts.append(f"<h2>{title}</h2><table border=1><tr>{head}</tr>{body}</table>")
        return "<!doctype html><meta charset=utf-8><title>braze</title>" + "".join(parts)

    def _summary(self) -> str:
        nodes = ", ".join(str(g.nodes) for g in self.graph_reports) or "no"
        seconds = sum(g.seconds for g in self.graph_reports)
        return f"{self.graphs} graph(s) of {nodes} nodes; {len(self.sites)} site(s) fused in {seconds:.2f} s of passes"

    def _site_rows(self) -> list[list[str]]:
        rows = []
        key = lambda s: (s.kind, s.form, s.kernel, s.why, s.proof, s.source, tuple(sorted(map(str, s.dims.items()))))  # noqa: E731
        for _, twins in groupby(sorted(self.sites, key=key), key=key):
            group = list(twins)
            s = group[0]
            dims = ", ".join(f"{k} {v}" for k, v in s.dims.items())
            rows.append([f"{len(group)} x", s.kind, s.form, dims, f"{s.kernel}: {s.why}", s.proof, _short(s.source)])
        return rows

    def _miss_rows(self) -> list[list[str]]:
        return [[m.kind, m.reason, m.stage, _short(m.source)] for m in self.near_misses]

    def __rich__(self) -> Table:
        table = Table(title=self._summary(), show_lines=True, title_justify="left")
        table.add_column("sites", no_wrap=True)
        for column in ("normal form", "kernel, why, proof", "source"):
            table.add_column(column, overflow="fold")
        for count, kind, form, dims, kernel, proof, source in self._site_rows():
            table.add_row(f"{count} {kind}", f"{form}\n{dims}", f"{kernel}\n{proof}", source)
        for kind, reason, stage, source in self._miss_rows():
            table.add_row(f"0 x {kind}", f"not fused ({stage}): {reason}", "", source, style="yellow")
        for error in self.errors:
            table.add_row("0 x", f"internal error: {error}", "", "", style="red")
        return table

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=160).print(self)
        return out.getvalue()


def _short(source: str) -> str:
    """A source line without the path to where packages are installed."""
    return source.rsplit("site-packages/", 1)[-1]


_SITE_COLUMNS = ("", "kind", "normal form", "sizes", "kernel, and why", "proof", "source")
_MISS_COLUMNS = ("kind", "reason", "stage", "source")


def explain(model: Callable[..., Any], /, *inputs: Any, **kwargs: Any) -> Report:
    """Compiles `model` for these inputs, runs it once, and tells what was fused, by which kernel and why, and what was not.

    A module in eval mode runs without gradients, as it would be served; one in training mode with them. Nothing that was
    compiled before is lost, and nothing of torch's settings changes after the call.
    """
    model = getattr(model, "_orig_mod", model)
    grad = torch.is_grad_enabled() and (not isinstance(model, nn.Module) or model.training)

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        return braze(gm, example_inputs)

    with (
        torch.set_grad_enabled(grad),
        torch._inductor.config.patch(force_disable_caches=True),
        collect() as reports,
    ):
        torch.compile(_apart(model), backend=backend, **_ISOLATED)(*inputs, **kwargs)
    return Report(tuple(reports))


_calls = itertools.count()
#: Where torch has it (2.13), code behind a graph break is counted apart as well.
_ISOLATED: dict[str, Any] = (
    {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
)


def _apart(model: Callable[..., Any]) -> Callable[..., Any]:
    """`model` behind a function with a code object of its own.

    Dynamo counts recompilations by code object, and past its limit runs eagerly without an error: explaining a model often
    must not use up the limit of the caller's own torch.compile. A module compiled in place is traced through, too.
    """

    def run(*inputs: Any, **kwargs: Any) -> Any:
        return model(*inputs, **kwargs)

    code = run.__code__.replace(co_name=f"explain_{next(_calls)}")
    return types.FunctionType(code, run.__globals__, code.co_name, None, run.__closure__)
