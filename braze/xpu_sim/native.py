"""What a kernel's SPIR-V becomes on a GPU: registers, spills, calls, and what its loops hold, read off the machine code.

ocloc writes an ELF file: `.ze_info` says what was allocated, `.text.<kernel>` is the code, which iga64 disassembles.
A loop is a label and the last jump back to it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from braze.xpu_sim.ocloc import Tools
from braze.xpu_sim.opencl import cache_folder

PLATFORMS = {"pvc": "XeHPC", "bmg": "Xe2"}  # ocloc's name of a device: the disassembler's
LABEL = re.compile(r"^(L\d+):$")
JUMP = re.compile(r"\b(?:jmpi|while|goto|brd)\b.*\b(L\d+)\b")
OPCODE = re.compile(r"^(?:\([^)]*\)\s*)?([a-z]\w*)")


@dataclass(frozen=True)
class Loop:
    """Counts of one loop's instructions, per hardware thread and iteration.

    `loads` are 2D block loads into registers, `prefetches` those that only fill a cache, `scratch` the traffic of
    spilled registers, `gathers` all other loads from global memory.
    """

    instructions: int
    dpas: int
    loads: int
    prefetches: int
    gathers: int
    slm: int
    scratch: int


@dataclass(frozen=True)
class NativeCode:
    """One kernel on one device: `registers` allocated per thread, `spill` in bytes, `calls` out of the kernel."""

    kernel: str
    device: str
    registers: int
    spill: int
    calls: int
    dpas: int
    loops: tuple[Loop, ...]

    def problems(self) -> list[str]:
        """What forbids to ship it, in words."""
        found = []
        if self.spill:
            found.append(f"{self.kernel} spills {self.spill} bytes on {self.device}")
        if self.calls:
            found.append(f"{self.kernel} makes {self.calls} external calls on {self.device}")
        return found


def compile_native(tools: Tools, module: bytes, flags: str, device: str) -> NativeCode:
    """Machine code of a SPIR-V module for "pvc" or "bmg", summarised; kept on disk under the hash of its making.

    Raises RuntimeError with ocloc's own words where it refuses the module.
    """
    key = hashlib.sha256(b"\0".join((module, flags.encode(), device.encode(), tools.version.encode(), CODE_VERSION)))
    cached = cache_folder() / "native" / f"{key.hexdigest()}.json"
    if not cached.exists():
        cached.parent.mkdir(exist_ok=True)
        partial = cached.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(dataclasses.asdict(build(tools, module, flags, device))))
        partial.replace(cached)
    read = json.loads(cached.read_text())
    return NativeCode(**read | {"loops": tuple(Loop(**loop) for loop in read["loops"])})


CODE_VERSION = hashlib.sha256(Path(__file__).read_bytes()).digest()


def build(tools: Tools, module: bytes, flags: str, device: str) -> NativeCode:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "kernel.spv").write_bytes(module)
        options = ["-options", flags] if flags else []
        done = tools.run(
            "ocloc", "compile", "-file", "kernel.spv", "-spirv_input", "-device", device, *options, cwd=folder
        )
        binary = next(folder.glob("*.bin"), None)
        if done.returncode or binary is None:
            raise RuntimeError(f"ocloc for {device}: {(done.stdout + done.stderr).strip()[-500:]}")
        sections = elf_sections(binary.read_bytes())
        symbol, code = next((n, c) for n, c in sections.items() if n.startswith(".text.") and "Intel_Symbol" not in n)
        (folder / "code").write_bytes(code)
        assembly = tools.run("iga64", "-d", f"-p={PLATFORMS[device]}", "code", cwd=folder).stdout
    return summarise(symbol.removeprefix(".text."), device, sections[".ze_info"].decode(), assembly)


def elf_sections(data: bytes) -> dict[str, bytes]:
    """Name to content of each section of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", data, table + i * size) for i in range(count)]
    names = headers[names_at][4]
    return {
        data[names + header[0] : data.index(b"\0", names + header[0])].decode(): data[header[4] : header[4] + header[5]]
        for header in headers
    }


def summarise(kernel: str, device: str, info: str, assembly: str) -> NativeCode:
    def value(name: str) -> int:
        match = re.search(rf"\b{name}:\s*(\d+)", info)
        return int(match[1]) if match else 0

    lines = assembly.splitlines()
    return NativeCode(
        kernel=kernel,
        device=device,
        registers=value("grf_count"),
        spill=value("spill_size"),
        calls=sum(opcode(line).startswith("call") for line in lines),
        dpas=sum(opcode(line).startswith("dpas") for line in lines),
        loops=tuple(count(body) for body in loop_bodies(lines)),
    )


def opcode(line: str) -> str:
    match = OPCODE.match(line.strip())
    return match[1] if match else ""


def loop_bodies(lines: list[str]) -> Iterator[list[str]]:
    """The innermost loops' lines: a label up to the last jump back to it, none nested in it."""
    labels = {match[1]: at for at, line in enumerate(lines) if (match := LABEL.match(line))}
    ends: dict[int, int] = {}
    for at, line in enumerate(lines):
        match = JUMP.search(line)
        if match and labels.get(match[1], at) < at:
            ends[labels[match[1]]] = at
    for start, end in ends.items():
        if not any(start < other and ends[other] <= end for other in ends):
            yield lines[start : end + 1]


def count(body: list[str]) -> Loop:
    instructions = [line for line in body if opcode(line)]
    messages = [line for line in instructions if opcode(line).startswith(("send", "load", "store", "atomic"))]
    blocks = [line for line in messages if "load_block2d" in line]
    prefetches = [line for line in blocks if re.search(r"\)\s+null[:\s]", line)]
    slm = [line for line in messages if re.search(r"\bslm\b", line)]
    scratch = [line for line in messages if re.search(r"\bscratch\b|\bss\[|\.ugm\.\S*ss\b", line)]
    loads = [line for line in messages if re.search(r"\bload(?!_block2d)", line)]
    return Loop(
        instructions=len(instructions),
        dpas=sum(opcode(line).startswith("dpas") for line in instructions),
        loads=len(blocks) - len(prefetches),
        prefetches=len(prefetches),
        gathers=sum(line not in slm and line not in scratch for line in loads),
        slm=len(slm),
        scratch=len(scratch),
    )
