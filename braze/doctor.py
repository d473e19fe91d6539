"""What this machine offers braze: versions, devices, compilers, and which kernels can run."""

import importlib.metadata
import shutil
import subprocess
import sys
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from braze.kernels.vendor import providers


@dataclass(frozen=True)
class Check:
    """One line of the doctor's table. ok: True good, False a lack that matters, None neutral."""

    what: str
    found: str
    ok: bool | None = None


def version(package: str) -> str | None:
    """An installed package's version, by its metadata alone: importing some packages can end the process."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def checks() -> list[Check]:
    """Everything the doctor looks at, in order."""
    return [
        Check("Python", sys.version.split()[0], True),
        Check("torch", torch.__version__, tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) >= (2, 11)),
        *(Check(p, version(p) or "not installed") for p in ("transformers", "triton", "triton-xpu", "pyopencl")),
        _ipex(),
        _compiler(),
        *(Check(f"op {name}", found) for name, found in providers.present()),
        *_devices(),
    ]


def _ipex() -> Check:
    found = version("intel-extension-for-pytorch")
    if found is None:
        return Check("IPEX", "not installed")
    same = found.split(".")[:2] == torch.__version__.split(".")[:2]
    return Check(
        "IPEX",
        f"{found}" + ("" if same else f": must match torch's minor version, {torch.__version__}; not used"),
        same,
    )


def _compiler() -> Check:
    path = shutil.which("g++") or shutil.which("clang++")
    if path is None:
        return Check("C++ compiler", "none: Inductor needs one on CPU, and experts would run as ATen ops", False)
    lines = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()
    return Check("C++ compiler", lines[0] if lines else path, True)


def _devices() -> list[Check]:
    found = [Check("CPU", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads", True)]
    for name, module in (("CUDA", torch.cuda), ("XPU", torch.xpu)):
        count = module.device_count() if module.is_available() else 0
        names = ", ".join(module.get_device_name(i) for i in range(count))
        found.append(Check(name, names or "no device", True if count else None))
    return found


def table() -> Table:
    """The checks as a rich table."""
    out = Table(title="braze doctor", title_justify="left")
    for column in ("", "what", "found"):
        out.add_column(column)
    for check in checks():
        mark = {True: "[green]ok[/green]", False: "[red]lacks[/red]", None: ""}[check.ok]
        out.add_row(mark, check.what, check.found)
    return out


class XpuUnavailable(Exception):
    """What the check of machine code needs and this machine lacks; the message says how to get it."""


def check_xpu(console: Console, jobs: int = 2) -> int:
    """Compiles every kernel for Intel GPUs, prints its machine code's table and what is wrong; 1 where something is.

    Raises XpuUnavailable, saying what to install, where a package or the offline compiler is absent.
    """
    from braze import xpu_sim
    from braze.xpu_sim.ocloc import ToolsUnavailable, fetch

    lack = xpu_sim.missing()
    if lack is not None:
        raise XpuUnavailable(lack)
    from braze.xpu_sim import machine_code
    from braze.xpu_sim.workloads import workloads

    try:
        tools = fetch()
    except ToolsUnavailable as e:
        raise XpuUnavailable(f"no recent ocloc here, and it could not be fetched: {e}") from None
    calls = list(workloads())
    found = []
    with Progress(console=console) as progress:
        task = progress.add_task("machine code", total=None)
        for cell in machine_code.cells(tools, calls, jobs=jobs):
            found.append(cell)
            progress.update(task, advance=1, description=f"{cell.code.device}: {cell.workloads[0].name}")
    out = Table(*machine_code.COLUMNS, title=f"XPU machine code by ocloc {tools.version}", title_justify="left")
    for cell in found:
        out.add_row(*machine_code.row(cell))
    console.print(out)
    console.print(machine_code.summary(found), soft_wrap=True)
    problems = [problem for cell in found for problem in cell.problems()]
    for problem in problems:
        console.print(f"[red]{escape(problem)}[/red]", soft_wrap=True)
    return 1 if problems else 0
