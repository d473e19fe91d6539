"""OpenCL C that does what the GPU's own built-ins do, generated for exactly the ones a module imports.

One identity carries both families. A block of R rows of W elements (or a matrix operand of M rows of K) lies in the
registers as a flat row-major run of bytes; slot j of lane l holds bytes [(16 j + l) T, (16 j + l + 1) T) of it, T being
the size of what a lane holds. Transposing swaps rows and columns before that, VNNI packs 4/S rows in one slot.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from braze.xpu_sim.errors import MissingBuiltin
from braze.xpu_sim.spirv import Import

LANES = 16  # the sub-group size of every target that has these built-ins

# What the hardware requires of the surface of a 2D block message, as bits of the fault word.
RULES = {
    1: "the base address is not aligned to 64 bytes",
    2: "the pitch is not a multiple of 16 bytes",
    4: "the pitch is below 64 bytes",
    8: "the width is below 64 bytes",
    16: "the pitch is below the width",
    32: "the width is not a multiple of 4 bytes",
    64: "the width, height or pitch is over 2^24",
    128: "the block's first column is not aligned to 4 bytes",
}
FAULT_KERNEL = "braze_take_fault"

PRELUDE = f"""
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#pragma OPENCL EXTENSION cl_khr_subgroup_shuffle : enable
global volatile uint braze_fault = 0;
kernel void {FAULT_KERNEL}(global uint* out) {{ *out = atomic_xchg(&braze_fault, 0u); }}
static int surface(ulong base, int width, int height, int pitch, int first) {{
  uint fault = (base & 63 ? 1u : 0u) | (pitch & 15 ? 2u : 0u) | (pitch < 64 ? 4u : 0u) | (width < 64 ? 8u : 0u)
    | (pitch < width ? 16u : 0u) | (width & 3 ? 32u : 0u)
    | (width > 1 << 24 || height > 1 << 24 || pitch > 1 << 24 ? 64u : 0u) | (first & 3 ? 128u : 0u);
  if (fault) atomic_or(&braze_fault, fault);
  return fault == 0;
}}
static float from_bf16(ushort s) {{ return as_float((uint)s << 16); }}
static ushort to_bf16(float f) {{
  uint u = as_uint(f);
  return isnan(f) ? (ushort)0x7fc0 : (ushort)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}}
static float from_tf32(uint u) {{ return as_float(u & 0xffffe000u); }}
static float from_f16(ushort s) {{ return (float)as_half(s); }}
static int from_i8(uchar c) {{ return (int)as_char(c); }}
static int from_u8(uchar c) {{ return (int)c; }}
"""

BLOCK = re.compile(
    r"intel_sub_group_2d_block_(?P<what>read|write|prefetch)(?P<how>_transform|_transpose)?"
    r"_(?P<bits>\d+)b_(?P<rows>\d+)r(?P<columns>\d+)x(?P<blocks>\d+)c"
)
DPAS = re.compile(r"intel_sub_group_(?P<a>bf16|f16|tf32|i8|u8)_(?P<b>bf16|f16|tf32|i8|u8)_matrix_mad_k(?P<k>\d+)")
INTEGERS = {1: "uchar", 2: "ushort", 4: "uint", 8: "ulong"}
MANGLED_SIZE = {"a": 1, "c": 1, "h": 1, "s": 2, "t": 2, "i": 4, "j": 4, "l": 8, "m": 8}

# What keeps the code small, since the CPU runtime's time to compile grows faster than a kernel does.
ROLLED = "\n#pragma clang loop unroll(disable)"
APART = "__attribute__((noinline))"

# Imports that Intel's CPU runtime has by itself.
PROVIDED = re.compile(
    r"(?!intel_sub_group_2d_)(__spirv_|__devicelib_assert|intel_sub_group_(block|shuffle)|sub_group_|work_group_"
    r"|get_|atom|printf|barrier|intel_convert_|__assert)"
)


def symbol(name: str) -> str:
    """What an emulated built-in is called between the module and the library: plain C, free of C++ mangling."""
    return "emulated_" + re.sub(r"\W", "_", name)


def slot_size(match: re.Match[str], mangled: str) -> int:
    """Bytes that one slot of a lane holds: the type that the last parameter points to."""
    pointee = re.search(r"P(?:U3AS\d)?([achstijlm])$", mangled)
    if pointee is None:
        raise MissingBuiltin(f"cannot read the operand type of {match[0]} from {mangled!r}")
    return MANGLED_SIZE[pointee[1]]


def block_io(match: re.Match[str], found: Import) -> str:
    """The body of a 2D block read or write; a prefetch has none, as it changes nothing."""
    if match["what"] == "prefetch":
        return ""
    size, rows, columns, blocks = (int(match[key]) for key in ("bits", "rows", "columns", "blocks"))
    size //= 8
    lane_size = slot_size(match, found.mangled)
    element, slot = INTEGERS[size], INTEGERS[lane_size]
    per_slot = lane_size // size
    if match["how"] == "_transform":
        slots = rows * size // 4
        place = f"int row = slot * {per_slot} + part, column = lane;"
    else:
        flat = f"int at = (slot * {LANES} + lane) * {per_slot} + part;"
        slots = -(-rows * columns * size // (LANES * lane_size))
        if match["how"] == "_transpose":
            place = f"{flat} int column = at / {rows}, row = at % {rows};"
        else:
            place = f"{flat} int row = at / {columns}, column = at % {columns};"
    address = f"((global {element}*)(p0 + (long)y * pitch) + x)"
    move = (
        f"((private {element}*)(data + block * {slots} + slot))[part] = inside ? *{address} : ({element})0;"
        if match["what"] == "read"
        else f"if (inside) *{address} = ((private {element}*)(data + block * {slots} + slot))[part];"
    )
    return f"""
  int width = a1, height = a2, pitch = a3, x0 = a4.x, y0 = a4.y;
  global char* p0 = (global char*)a0;
  private {slot}* data = (private {slot}*)a5;
  int lane = get_sub_group_local_id();
  int valid = surface((ulong)p0, width, height, pitch, x0 * {size});
  {ROLLED}
  for (int block = 0; block < {blocks}; block++)
    {ROLLED}
    for (int slot = 0; slot < {slots}; slot++)
      for (int part = 0; part < {per_slot}; part++) {{
        {place}
        int x = x0 + block * {columns} + column, y = y0 + row;
        int inside = valid && row < {rows} && column < {columns} && x >= 0 && y >= 0
          && (x + 1) * {size} <= width && y < height;
        {move}
      }}"""


def width_of(vector: str) -> tuple[str, int]:
    match = re.fullmatch(r"([a-z]+)(\d*)", vector)
    assert match is not None
    return match[1], int(match[2] or 1)


def dpas(match: re.Match[str], found: Import) -> str:
    """D = C + A B on M x K x 16, each product and sum in fp32 (or int32), C and D in the accumulator's type.

    All that one lane holds of A goes to every lane at once, since shuffles are what the CPU compiler is slow at.
    """
    depth = int(match["k"])
    size = {"bf16": 2, "f16": 2, "tf32": 4, "i8": 1, "u8": 1}[match["a"]]
    element = INTEGERS[size]
    a_type, a_slots = width_of(found.parameters[0])
    accumulator, rows = width_of(found.parameters[2])
    a_bytes = {"uchar": 1, "ushort": 2, "uint": 4, "float": 4, "half": 2}[a_type] * a_slots
    word = next(INTEGERS[n] for n in (8, 4, 2, 1) if a_bytes % n == 0)
    words = a_bytes // int(next(n for n, name in INTEGERS.items() if name == word))
    per_slot = depth * rows // (LANES * a_slots)
    number = "int" if size == 1 else "float"
    load, store = {
        "float": ("acc[i]", "sum[i]"),
        "half": ("(float)acc[i]", "(half)sum[i]"),
        "ushort": ("from_bf16(acc[i])", "to_bf16(sum[i])"),
        "uint": ("(int)acc[i]", "(uint)sum[i]"),
    }[accumulator]
    return f"""
  {found.parameters[0]} a_value = a0;
  {found.parameters[1]} b_value = a1;
  {found.result} result = a2;
  private {word}* a = (private {word}*)&a_value;
  private {element}* b = (private {element}*)&b_value;
  private {accumulator}* acc = (private {accumulator}*)&result;
  {number} sum[{rows}];
  for (int i = 0; i < {rows}; i++) sum[i] = {load};
  for (int lane = 0; lane < {LANES}; lane++) {{
    {word} shared[{words}];
    for (int i = 0; i < {words}; i++) shared[i] = sub_group_shuffle(a[i], lane);
    for (int i = 0; i < {rows * depth // LANES}; i++) {{
      int at = (i / {per_slot} * {LANES} + lane) * {per_slot} + i % {per_slot};
      sum[at / {depth}] += from_{match["a"]}(((private {element}*)shared)[i]) * from_{match["b"]}(b[at % {depth}]);
    }}
  }}
  for (int i = 0; i < {rows}; i++) acc[i] = {store};
  return result;"""


SATURATING = re.compile(r"llvm\.usub\.sat\.i(8|16|32|64)")


def saturating(match: re.Match[str], found: Import) -> str:
    """a0 - a1, not below zero."""
    return " return a0 > a1 ? a0 - a1 : 0; "


BODIES: Sequence[tuple[re.Pattern[str], Callable[[re.Match[str], Import], str]]] = (
    (BLOCK, block_io),
    (DPAS, dpas),
    (SATURATING, saturating),
)


def emulated(found: Import) -> str | None:
    """The OpenCL C function that stands for one import; None where the CPU runtime has it already.

    Raises MissingBuiltin, naming it, for a built-in that neither has.
    """
    for pattern, body in BODIES:
        match = pattern.fullmatch(found.name)
        if match is not None:
            declared = ", ".join(f"{kind} a{i}" for i, kind in enumerate(found.parameters))
            return f"{found.result} {APART} {symbol(found.symbol)}({declared}) {{{body(match, found)}\n}}\n"
    if PROVIDED.match(found.name):
        return None
    raise MissingBuiltin(
        f"the simulator does not emulate {found.name} ({found.symbol}): "
        f"{found.result} ({', '.join(found.parameters)}); add a template to braze/xpu_sim/builtins.py"
    )


def library(found: Sequence[Import]) -> tuple[str, frozenset[str]]:
    """(OpenCL C source, the symbols it emulates) for a module's imports; the source is "" where none is needed."""
    functions = {one.symbol: code for one in found if (code := emulated(one)) is not None}
    return (PRELUDE + "".join(functions.values()) if functions else ""), frozenset(functions)


def explain_fault(word: int) -> str:
    return "2D block message: " + "; ".join(rule for bit, rule in RULES.items() if word & bit)
