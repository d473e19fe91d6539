"""Long vectors out of SPIR-V: a load of which only parts are used becomes a load of each part.

A 2D block load leaves all its tiles in one vector of up to 64 elements and each DPAS takes 8 of them. The CPU compiler
widens vectors by the sub-group, and its time grows faster than their length: this halves the time to build a kernel.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from braze.xpu_sim.spirv import (
    DECORATE,
    FUNCTION,
    TYPE_FLOAT,
    TYPE_INT,
    TYPE_POINTER,
    TYPE_VECTOR,
    Instruction,
    instructions,
)

NAME, CONSTANT, LOAD, ACCESS, SHUFFLE, BITCAST = 5, 43, 61, 70, 79, 124
FUNCTION_STORAGE, ALIGNED = 7, 2
SHORT = 8  # elements that a vector may keep


@dataclass
class Definitions:
    """Types and constants to be added before the first function, each made once; `bound` is the next free id."""

    bound: int
    pointers: dict[int, int]
    constants: dict[int, int] = field(default_factory=dict)
    added: list[Instruction] = field(default_factory=list)

    def fresh(self) -> int:
        self.bound += 1
        return self.bound - 1

    def pointer(self, pointee: int) -> int:
        """The type of a pointer to private memory."""
        if pointee not in self.pointers:
            self.pointers[pointee] = self.fresh()
            self.added.append(pack(TYPE_POINTER, self.pointers[pointee], FUNCTION_STORAGE, pointee))
        return self.pointers[pointee]

    def constant(self, integer: int, value: int) -> int:
        if value not in self.constants:
            self.constants[value] = self.fresh()
            self.added.append(pack(CONSTANT, integer, self.constants[value], value))
        return self.constants[value]


def pack(opcode: int, *operands: int) -> Instruction:
    return ((len(operands) + 1) << 16 | opcode, *operands)


def opcode(instruction: Instruction) -> int:
    return instruction[0] & 0xFFFF


def is_part(shuffle: Instruction, width: int) -> bool:
    """Whether a shuffle takes consecutive elements of its first vector, from a multiple of their number."""
    elements = shuffle[5:]
    first, count = elements[0], len(elements)
    return first % count == 0 and elements == tuple(range(first, first + count)) and first + count <= width


def split_loads(module: bytes) -> bytes:
    """The module with every load that is used only in parts loaded part by part, where the load was."""
    code = list(instructions(module))
    parts = used_in_parts(code)
    integer = next((i[1] for i in code if opcode(i) == TYPE_INT and i[2] == 32), None)
    if not parts or integer is None:
        return module
    widths = {i[1]: i[2] // 8 for i in code if opcode(i) in (TYPE_INT, TYPE_FLOAT)}
    alignment = {i[1]: widths.get(i[2], 1) for i in code if opcode(i) == TYPE_VECTOR}
    known = {i[3]: i[1] for i in code if opcode(i) == TYPE_POINTER and i[2] == FUNCTION_STORAGE}
    definitions = Definitions(struct.unpack_from("<I", module, 12)[0], known)
    replaced = {shuffle[2] for shuffles in parts.values() for shuffle in shuffles}
    body: list[Instruction] = []
    for instruction in code:
        kind = opcode(instruction)
        if kind in (NAME, DECORATE) and instruction[1] in parts:
            continue
        if kind == LOAD and instruction[2] in parts:
            for shuffle in parts[instruction[2]]:
                pointer = definitions.pointer(shuffle[1])
                index = definitions.constant(integer, shuffle[5] // (len(shuffle) - 5))
                cast, at = definitions.fresh(), definitions.fresh()
                body.append(pack(BITCAST, pointer, cast, instruction[3]))
                body.append(pack(ACCESS, pointer, at, cast, index))
                body.append(pack(LOAD, shuffle[1], shuffle[2], at, ALIGNED, alignment[shuffle[1]]))
        elif not (kind == SHUFFLE and instruction[2] in replaced):
            body.append(instruction)
    functions = next(at for at, instruction in enumerate(body) if opcode(instruction) == FUNCTION)
    body[functions:functions] = definitions.added
    words = [word for instruction in body for word in instruction]
    header = list(struct.unpack("<5I", module[:20]))
    header[3] = definitions.bound
    return struct.pack(f"<{5 + len(words)}I", *header, *words)


def used_in_parts(code: list[Instruction]) -> dict[int, list[Instruction]]:
    """Each long load by id with the shuffles that are all its uses."""
    widths = {i[1]: i[3] for i in code if opcode(i) == TYPE_VECTOR}
    loads = {i[2]: widths[i[1]] for i in code if opcode(i) == LOAD and widths.get(i[1], 0) > SHORT}
    parts: dict[int, list[Instruction]] = {load: [] for load in loads}
    for instruction in code:
        kind = opcode(instruction)
        if kind in (NAME, DECORATE) or (kind == LOAD and instruction[2] in loads):
            continue
        if kind == SHUFFLE and is_part(instruction, loads.get(instruction[3], 0)):
            parts.get(instruction[3], []).append(instruction)
            continue
        for word in instruction[1:]:  # a literal that looks like an id only keeps a load whole
            parts.pop(word, None)
    return {load: shuffles for load, shuffles in parts.items() if shuffles}
