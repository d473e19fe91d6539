"""The backend as users meet it: real compilation, options, requirements, failures inside a pass, caches over two processes."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import braze
from braze.backend import collect
from braze.passes import pipeline
from tests import smoke
from tests.harness import assert_close
from tests.tiny import as_float64, build, tokens

#: What an error inside braze makes of a requirement, wherever it was.
FUSED_NO_MOE = r"braze fused no moe in a graph of \d+ nodes \(.*internal error: .*a bug of ours.*\)"


def compile_fresh(model: Any, **kwargs: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="braze", **kwargs)


@pytest.fixture(autouse=True)
def no_caches() -> Any:
    with torch._inductor.config.patch(force_disable_caches=True), torch.no_grad():
        yield


@pytest.mark.parametrize("kernel", ["auto", "aten"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_model_is_as_exact_as_eager(dtype: torch.dtype, kernel: str) -> None:
    model, ids = build("mixtral", dtype), tokens()
    options = {"require": ["moe", "rope"], "kernel": {"moe": kernel}}
    with collect() as reports:
        got = compile_fresh(model, options=options)(ids, use_cache=False).logits
    exact = as_float64(model)(ids, use_cache=False).logits
    assert_close(got, exact, 1e-5 if dtype == torch.float32 else 2e-2)
    (report,) = reports
    assert sorted(s.kind for s in report.sites) == ["moe"] * 2 + ["rope"] * 4 + ["router"] * 2
    assert {s.kernel for s in report.sites if s.kind == "moe"} <= ({"aten"} if kernel == "aten" else {"cpp", "aten"})
    assert {s.kernel for s in report.sites if s.kind == "rope"} == {"cpp"}


def test_model_with_no_site_is_inductors_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(4, 8)
    with caplog.at_level(logging.INFO, "braze"):
        got = compile_fresh(lambda v: (v @ v.T).softmax(-1))(x)
    torch.testing.assert_close(got, (x @ x.T).softmax(-1))
    (line,) = [r.message for r in caplog.records if r.name == "braze"]
    assert "found nothing to fuse" in line


def test_required_kind_that_is_missing_is_an_error() -> None:
    with pytest.raises(Exception, match="fused no moe"):
        compile_fresh(lambda v: v.softmax(-1), options={"require": ["moe"]})(torch.randn(4, 8))


def test_disabled_kind_stays_as_spelled() -> None:
    with collect() as reports:
        compile_fresh(smoke.Layer(), options={"disable": ["moe"]})(torch.randn(6, 32))
    assert [s.kind for r in reports for s in r.sites] == ["rope"]


def broken(*_: Any) -> Any:
    raise KeyError("a bug of ours")


def test_error_inside_a_pass_leaves_the_graph_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.proof, "moe", broken)
    layer, x = smoke.Layer(), torch.randn(6, 32)
    with collect() as reports:
        got = compile_fresh(layer)(x)
    torch.testing.assert_close(got, layer(x), rtol=1e-4, atol=1e-4)
    assert [s.kind for r in reports for s in r.sites] == ["rope"]
    assert [("a bug of ours" in e) for r in reports for e in r.errors] == [True]
    assert torch._dynamo.utils.counters["braze"]["error"] >= 1


@pytest.mark.parametrize("place", ["backend.lower", "lowering.cpp_call.fakes"])
def test_error_after_the_passes_leaves_the_captured_graph_to_inductor(
    place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where kernels are chosen, and where Inductor lowers what was chosen: nothing is lost but the fusion."""
    monkeypatch.setattr(f"braze.{place}", broken)
    layer, x = smoke.Layer(), torch.randn(6, 32)
    with collect() as reports:
        got = compile_fresh(layer)(x)
    torch.testing.assert_close(got, layer(x), rtol=1e-4, atol=1e-4)
    (report,) = reports
    assert report.sites == () and "a bug of ours" in report.errors[0]
    assert "the graph is left to Inductor" in caplog.text
    with pytest.raises(Exception, match="a bug of ours"):
        compile_fresh(smoke.Layer(), options={"strict": True})(x)
    with pytest.raises(Exception, match=FUSED_NO_MOE):
        compile_fresh(smoke.Layer(), options={"require": ["moe"]})(x)


def test_strict_raises_an_error_inside_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.proof, "moe", broken)
    with pytest.raises(Exception, match="a bug of ours"):
        compile_fresh(smoke.Layer(), options={"strict": True})(torch.randn(6, 32))
    with pytest.raises(Exception, match=FUSED_NO_MOE):
        compile_fresh(smoke.Layer(), options={"require": ["moe"]})(torch.randn(6, 32))


def test_training_graph_keeps_what_the_backward_needs() -> None:
    """Expert intermediates are saved for the backward pass: left unfused, and gradients are eager's."""
    layer, x = smoke.Layer(), torch.randn(6, 32)
    with torch.enable_grad():
        layer(x).square().sum().backward()
        expected = layer.up.grad.clone()  # type: ignore[union-attr]
        layer.zero_grad()
        compile_fresh(layer)(x).square().sum().backward()
    assert expected.abs().max() > 0
    torch.testing.assert_close(layer.up.grad, expected, rtol=1e-3, atol=1e-4)


CACHE_PROBE = """
import sys, torch
from torch._dynamo.utils import counters
sys.path.insert(0, {tests!r})
import smoke
layer, x = smoke.Layer(), torch.linspace(-1, 1, 192).view(6, 32)
with torch.no_grad():
    torch.compile(layer, backend="braze", options={options})(x)
print("HITS", counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"])
"""


def cache_hits(cache: Path, package: Path, options: dict[str, Any]) -> int:
    """Cache hits of one compilation in a process of its own, with the package found at `package`."""
    probe = CACHE_PROBE.format(tests=str(Path(__file__).parent), options=options)
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": str(package)}
    run = subprocess.run([sys.executable, "-c", probe], env=env, cwd=cache, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return int(run.stdout.split("HITS")[1])


def test_caches_hit_only_where_sources_and_options_are_the_same(tmp_path: Path) -> None:
    root, package, cache = Path(__file__).parent.parent, tmp_path / "package", tmp_path / "cache"
    cache.mkdir()
    shutil.copytree(root / "braze", package / "braze")
    for name in ("passes", "lowering", "kernels"):
        shutil.copytree(root / name, package / "braze" / name)
    (package / "braze-0.dist-info").mkdir()
    (package / "braze-0.dist-info" / "METADATA").write_text("Name: braze\nVersion: 0\n")
    (package / "braze-0.dist-info" / "entry_points.txt").write_text(
        "[torch_dynamo_backends]\nbraze = braze.backend:braze\n"
    )
    assert cache_hits(cache, package, {}) == 0
    assert cache_hits(cache, package, {}) > 0
    assert cache_hits(cache, package, {"disable": ["moe"]}) == 0
    with (package / "braze" / "kernels" / "aten.py").open("a") as source:
        source.write("# changed\n")
    assert cache_hits(cache, package, {}) == 0


def test_explain_works_when_caches_are_warm() -> None:
    layer, x = smoke.Layer().eval(), torch.randn(6, 32)
    with torch._inductor.config.patch(force_disable_caches=False):
        for _ in range(2):
            compile_fresh(layer)(x)
        report = braze.explain(layer, x)
    assert sorted(s.kind for s in report.sites) == ["moe", "rope", "router"]
    assert report.graphs == 1
    assert "smoke.py" in str(report)
