"""Intel's offline compiler and disassembler of a recent release, unpacked beside the system from Debian's sid.

A stable release's ocloc does not know the 2D block built-ins and reports no spill where there is one, so the machine's
own is never used. apt-get runs on a private state, the packages are unpacked, not installed, and each program starts
through the unpacked ld.so with the unpacked libraries.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from braze.xpu_sim.opencl import cache_folder

PACKAGES = (
    "intel-ocloc", "libigc2", "libigdfcl2", "libigdgmm12", "libigc-tools", "libc6", "libgcc-s1", "libstdc++6", "zlib1g",
)  # fmt: skip
SUITE = "sid"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


class ToolsUnavailable(RuntimeError):
    """The offline compiler is not there and could not be fetched; the message says why."""


@dataclass(frozen=True)
class Tools:
    """Unpacked programs; `run` starts one through the unpacked loader."""

    root: Path

    @functools.cached_property
    def version(self) -> str:
        """ocloc's, in its own words."""
        return self.run("ocloc", "--version").stdout.strip()

    def program(self, name: str) -> Path:
        return next(self.root.glob(f"usr/bin/{name}*"))

    def run(self, name: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Runs a program; does not raise on its exit status."""
        loader = next(self.root.glob("**/ld-linux-x86-64.so.2"))
        libraries = sorted({str(library.parent) for library in self.root.glob("**/lib*.so*")})
        command = [str(loader), "--library-path", ":".join(libraries), str(self.program(name)), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def installed() -> Tools | None:
    """The programs, if they were fetched before."""
    root = cache_folder() / "ocloc"
    return Tools(root) if root.is_dir() else None


def mirror() -> str:
    """The address of the Debian mirror that this machine's apt is set up with."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise ToolsUnavailable("fetching ocloc needs apt-get and dpkg, that is, a Debian machine")
    listing = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"],
        capture_output=True, text=True, check=False,
    ).stdout  # fmt: skip
    for address in listing.splitlines():
        if address.rstrip("/").endswith("/debian"):
            return address
    raise ToolsUnavailable("fetching ocloc needs a Debian mirror among apt's sources")


def fetch() -> Tools:
    """The programs, fetched into the cache folder where they are not there yet (about 270 MB unpacked)."""
    present = installed()
    if present is not None:
        return present
    address = mirror()
    work = cache_folder() / "ocloc.fetch"
    shutil.rmtree(work, ignore_errors=True)
    for folder in ("state/lists/partial", "cache/archives/partial", "packages", "root"):
        (work / folder).mkdir(parents=True)
    (work / "status").touch()
    (work / "sources.list").write_text(f"deb [signed-by={KEYRING}] {address} {SUITE} main\n")
    options = [
        option
        for name, value in {
            "Dir::State": work / "state", "Dir::State::status": work / "status", "Dir::Cache": work / "cache",
            "Dir::Etc::sourcelist": work / "sources.list", "Dir::Etc::sourceparts": "-", "APT::Sandbox::User": "root",
            "APT::Update::Post-Invoke-Success::": "", "APT::Get::List-Cleanup": "false",
        }.items()
        for option in ("-o", f"{name}={value}")
    ]  # fmt: skip
    check("apt-get", *options, "update", cwd=work)
    check("apt-get", *options, "download", *PACKAGES, cwd=work / "packages")
    for package in sorted((work / "packages").glob("*.deb")):
        check("dpkg", "-x", str(package), str(work / "root"), cwd=work)
    (work / "root").rename(cache_folder() / "ocloc")
    shutil.rmtree(work)
    return Tools(cache_folder() / "ocloc")


def check(*command: str, cwd: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    if done.returncode:
        raise ToolsUnavailable(f"{command[0]} failed: {done.stderr.strip()[-500:]}")


if __name__ == "__main__":
    tools = fetch()
    print(f"{tools.version} in {tools.root}")
