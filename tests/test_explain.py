"""explain: a true report whatever was compiled before, and nothing of the caller's used up by asking."""

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import braze
from braze.backend import collect
from braze.explain import Report
from braze.passes.sites import Finding, GraphReport, NearMiss
from tests.smoke import Layer

OFTEN = 10  # more than Dynamo's limit of recompilations for one code object


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def inputs() -> Tensor:
    return torch.linspace(-1, 1, 192).view(6, 32)


def kinds(report: Report) -> list[str]:
    return sorted(s.kind for s in report.sites)


class Shifted(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Broken(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        torch._dynamo.graph_break()
        return y * 2


def _called(model: Callable[..., Any]) -> Callable[..., Any]:
    with torch.no_grad():
        model(inputs())
    return model


@pytest.mark.parametrize(
    "made",
    [
        lambda: torch.compile(Layer().eval(), backend="braze"),
        lambda: braze.fuse(Layer().eval()),
        lambda: braze.fuse(type("Fused", (Shifted,), {}))().eval(),
    ],
    ids=["torch.compile", "fused instance", "fused class"],
)
def test_what_is_compiled_already_is_explained(made: Callable[[], Any]) -> None:
    report = braze.explain(_called(made()), inputs())
    assert kinds(report) == ["moe", "rope", "router"]
    assert report.graphs == 1


def test_asking_often_uses_up_no_limit_of_the_callers() -> None:
    model = Shifted().eval()
    for _ in range(OFTEN):
        assert kinds(braze.explain(model, inputs())) == ["moe", "rope", "router"]
    compiled = torch.compile(model, backend="braze")
    with torch._inductor.config.patch(force_disable_caches=True), torch.no_grad(), collect() as graphs:
        compiled(inputs())
    assert len(graphs) == 1


def test_graph_breaks_show_as_graphs() -> None:
    report = braze.explain(Broken().eval(), inputs())
    assert kinds(report) == ["moe", "rope", "router"]
    assert report.graphs == 2


@pytest.mark.skipif(torch.__version__ < "2.13", reason="code behind a graph break is counted apart from torch 2.13 on")
def test_a_broken_graph_is_explained_often() -> None:
    for _ in range(OFTEN):
        assert kinds(braze.explain(Broken().eval(), inputs())) == ["moe", "rope", "router"]


def test_a_model_without_a_site_has_an_empty_report() -> None:
    report = braze.explain(nn.Linear(4, 4).eval(), torch.ones(2, 4))
    assert (report.graphs, report.sites, report.near_misses, report.errors) == (1, [], [], [])
    assert "0 site(s)" in str(report)


def _written() -> Report:
    twin = Finding("moe", "grouped, act(g, u) = g*u", {"top_k": 2}, "cpp", "one call", "agrees", "/a/model.py:3 in f")
    miss = NearMiss("rope", "mul_7", "prove", "element 3 differs", "/a/model.py:9 in g")
    return Report((GraphReport(7, (twin,), (miss,)), GraphReport(5, (twin,), (), ("KeyError: 'val'",))))


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_holds_everything_once(width: int) -> None:
    out = io.StringIO()
    Console(file=out, width=width).print(_written())
    text = "".join(out.getvalue().split()).replace("│", "")
    assert "2xmoe" in text
    assert text.count("g*u") == 1
    for part in ("top_k2", "cpp", "agrees", "0xrope", "KeyError", "/a/model.py:9"):
        assert part in text
    assert max(map(len, out.getvalue().splitlines())) <= width


def test_exports_keep_twins_apart_and_escape() -> None:
    report = _written()
    data = json.loads(report.to_json())
    assert [s["kind"] for s in data["sites"]] == ["moe", "moe"]
    assert data["near_misses"][0]["reason"] == "element 3 differs"
    assert data["errors"] == ["KeyError: 'val'"]
    assert [g["nodes"] for g in data["graphs"]] == [7, 5]
    lesser = Report((GraphReport(1, (Finding("moe", "g < u"),)),))
    assert "g &lt; u" in lesser.to_html()
