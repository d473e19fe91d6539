"""SPIR-V modules as lists of instructions: what a module imports, and the module the CPU runtime can take.

A module is a header of five words and then instructions, each led by (length << 16 | opcode). Everything here is a map
over that list, so nothing needs a SPIR-V library.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

Instruction = tuple[int, ...]

EXTENSION, EXECUTION_MODE, CAPABILITY, DECORATE, FUNCTION = 10, 16, 17, 71, 54
TYPE_VOID, TYPE_BOOL, TYPE_INT, TYPE_FLOAT, TYPE_VECTOR, TYPE_POINTER, TYPE_FUNCTION = 19, 20, 21, 22, 23, 32, 33
LINKAGE_ATTRIBUTES, IMPORT = 41, 1

# Intel's CPU runtime refuses these and a kernel does not depend on them: a hint on the work group's size, the
# attributes of a kernel, and vectors longer than 16 (which it does take when the capability is not announced).
REFUSED_CAPABILITIES = {5892, 5619}
REFUSED_EXTENSIONS = {"SPV_INTEL_kernel_attributes", "SPV_INTEL_vector_compute"}
REFUSED_MODES = {5893}

SCALARS = {8: "uchar", 16: "ushort", 32: "uint", 64: "ulong"}
FLOATS = {16: "half", 32: "float", 64: "double"}
SPACES = {0: "global", 4: "local", 5: "global", 7: "private", 8: "generic"}


@dataclass(frozen=True)
class Import:
    """A function that a module calls and does not define, with its types in OpenCL C.

    `symbol` is the name in the module, `name` the same without C++ mangling, `mangled` the mangled parameter types.
    """

    symbol: str
    name: str
    mangled: str
    result: str
    parameters: tuple[str, ...]


def instructions(module: bytes) -> Iterator[Instruction]:
    """The instructions after the header, each with its leading word."""
    words = struct.unpack(f"<{len(module) // 4}I", module)
    at = 5
    while at < len(words):
        length = words[at] >> 16
        yield words[at : at + length]
        at += length


def text(words: Instruction) -> str:
    """A literal string, which ends at its first zero byte."""
    return struct.pack(f"<{len(words)}I", *words).split(b"\0")[0].decode()


def literal(value: str) -> Instruction:
    data = value.encode() + b"\0"
    data += b"\0" * (-len(data) % 4)
    return struct.unpack(f"<{len(data) // 4}I", data)


def is_import(instruction: Instruction) -> bool:
    return instruction[0] & 0xFFFF == DECORATE and instruction[2] == LINKAGE_ATTRIBUTES and instruction[-1] == IMPORT


def refused(instruction: Instruction) -> bool:
    opcode = instruction[0] & 0xFFFF
    return (
        (opcode == CAPABILITY and instruction[1] in REFUSED_CAPABILITIES)
        or (opcode == EXECUTION_MODE and instruction[2] in REFUSED_MODES)
        or (opcode == EXTENSION and text(instruction[1:]) in REFUSED_EXTENSIONS)
    )


def type_names(module: bytes) -> dict[int, str]:
    """OpenCL C's name of each type of the module by id (integers unsigned: SPIR-V's kernels have no sign)."""
    names: dict[int, str] = {}
    for word, *rest in instructions(module):
        opcode = word & 0xFFFF
        if opcode == TYPE_VOID:
            names[rest[0]] = "void"
        elif opcode == TYPE_BOOL:
            names[rest[0]] = "bool"
        elif opcode == TYPE_INT:
            names[rest[0]] = SCALARS[rest[1]]
        elif opcode == TYPE_FLOAT:
            names[rest[0]] = FLOATS[rest[1]]
        elif opcode == TYPE_VECTOR:
            names[rest[0]] = f"{names[rest[1]]}{rest[2]}"
        elif opcode == TYPE_POINTER:
            names[rest[0]] = f"{SPACES.get(rest[1], 'generic')} {names.get(rest[2], 'void')}*"
    return names


def imports(module: bytes) -> list[Import]:
    """Every function the module imports."""
    types = type_names(module)
    symbols: dict[int, str] = {}
    signatures: dict[int, Instruction] = {}
    found: list[Import] = []
    for instruction in instructions(module):
        opcode = instruction[0] & 0xFFFF
        if is_import(instruction):
            symbols[instruction[1]] = text(instruction[3:-1])
        elif opcode == TYPE_FUNCTION:
            signatures[instruction[1]] = instruction[2:]
        elif opcode == FUNCTION and instruction[2] in symbols:
            result, *parameters = (types[t] for t in signatures[instruction[4]])
            symbol = symbols[instruction[2]]
            name, mangled = demangle(symbol)
            found.append(Import(symbol, name, mangled, result, tuple(parameters)))
    return found


def demangle(symbol: str) -> tuple[str, str]:
    """(`name`, mangled parameter types) of an Itanium-mangled free function; (symbol, "") of any other name."""
    match = re.match(r"_Z(\d+)", symbol)
    if match is None:
        return symbol, ""
    start, length = match.end(), int(match[1])
    return symbol[start : start + length], symbol[start + length :]


def adapt(module: bytes, rename: Callable[[str], str]) -> bytes:
    """The module without what the CPU runtime refuses, its imports called by `rename(symbol)`."""
    kept: list[int] = list(struct.unpack("<5I", module[:20]))
    for instruction in instructions(module):
        if refused(instruction):
            continue
        if is_import(instruction):
            name = literal(rename(text(instruction[3:-1])))
            kept += [(4 + len(name)) << 16 | DECORATE, instruction[1], LINKAGE_ATTRIBUTES, *name, IMPORT]
        else:
            kept += instruction
    return struct.pack(f"<{len(kept)}I", *kept)
