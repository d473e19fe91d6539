"""The command line and the report it prints."""

import json
from pathlib import Path

import pytest

from braze.cli import main
from braze.doctor import checks

MODEL = """
import sys
sys.path.insert(0, {tests!r})
import smoke, torch
def layer():
    return smoke.Layer().eval(), (torch.linspace(-1, 1, 192).view(6, 32),)
def wrong():
    return 3
"""


@pytest.fixture
def module(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(MODEL.format(tests=str(Path(__file__).parent)))
    return file


def test_explain_tells_every_site(module: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "report.html"
    assert main(["explain", f"{module}:layer", "--json", "--html", str(page)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert sorted(s["kind"] for s in report["sites"]) == ["moe", "rope", "router"]
    assert all(
        s["kernel"] and s["why"] and "agree" in s["proof"] and "smoke.py" in s["source"] for s in report["sites"]
    )
    assert len(report["graphs"]) == 1
    assert "<table" in page.read_text()
    assert "g*u*sigmoid(g)" in page.read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["explain", "nofunction"], "has no function"),
        (["explain", "no_such_module:f"], "cannot load"),
        (["explain", "json:nothing"], "has no 'nothing'"),
        (["explain", "--hf", "/no/such/folder"], "no folder or file"),
        (["bench", "nothing"], "no benchmark 'nothing'"),
    ],
)
def test_a_wrong_call_says_what_is_wrong(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_explain_wants_model_and_inputs(module: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{module}:wrong"]) == 2
    assert "must return (model, inputs)" in capsys.readouterr().err.replace("\n", " ")


def test_doctor_looks_at_what_matters() -> None:
    found = {c.what: c for c in checks()}
    assert {"Python", "torch", "triton", "IPEX", "C++ compiler", "CPU", "CUDA", "XPU"} <= found.keys()
    assert found["torch"].ok


def test_tune_takes_its_own_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["tune", "--help"])
    assert stop.value.code == 0
    assert "--experts" in capsys.readouterr().out


def test_an_unknown_argument_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", "--nonsense"])
    assert "--nonsense" in capsys.readouterr().err
