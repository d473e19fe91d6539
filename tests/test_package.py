"""How the package is built: imports go one way, private API stays in its file, generated docs are current."""

import ast
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: Folder -> the parts of braze that it must not import.
FORBIDDEN = {
    "kernels": ("braze.passes", "braze.lowering", "braze.ops", "braze.backend", "braze.options", "braze.fuse", "braze.explain"),
    "passes": ("braze.lowering", "braze.backend", "braze.options", "braze.fuse", "braze.explain"),
    "lowering": ("braze.passes", "braze.backend", "braze.options", "braze.fuse", "braze.explain"),
}  # fmt: skip
#: The files that may reach into Inductor: the lowering, the C++ tool chain, and the simulator's stand-in for a device.
PRIVATE = {"lowering/inductor.py", "kernels/cpp/toolchain.py", "braze/xpu_sim/inductor.py"}


def imports(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_go_one_way(folder: str) -> None:
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for file in files:
        wrong = {i for i in imports(file) if i.startswith(FORBIDDEN[folder])}
        assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}"


def test_inductors_private_api_stays_in_its_file() -> None:
    for folder in ("braze", "passes", "lowering", "kernels"):
        for file in (ROOT / folder).rglob("*.py"):
            private = {i for i in imports(file) if i.startswith(("torch._inductor", "torch._higher_order_ops"))}
            assert not private or str(file.relative_to(ROOT)) in PRIVATE, f"{file.relative_to(ROOT)} imports {private}"


def test_backend_is_an_entry_point() -> None:
    (found,) = [e for e in entry_points(group="torch_dynamo_backends") if e.name == "braze"]
    assert callable(found.load())


def test_generated_docs_are_current() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "braze.cli", "options"], capture_output=True, text=True, check=True, cwd="/"
    )
    assert (ROOT / "docs" / "options.md").read_text() == run.stdout


def test_the_performance_page_is_current() -> None:
    run = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "report.py"], capture_output=True, text=True, check=True, cwd="/"
    )
    assert (ROOT / "docs" / "performance.md").read_text() == run.stdout
