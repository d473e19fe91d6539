"""The text of one C++ kernel: headers of this folder, constants that the compiler should know, a generated activation.

One text serves every shape; it differs by the weights' dtype, how they are stored, and the activation.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from braze.kernels.expression import emit, parse
from braze.kernels.spec import GateUpLayout

NAMESPACE = "braze_kernel"  # closed at the end of moe.h
_FOLDER = Path(__file__).parent
TYPES = {torch.float32: "float", torch.bfloat16: "at::BFloat16", torch.float16: "at::Half"}

VECTOR: Mapping[str, Callable[..., Any]] = {
    "add": lambda a, b: f"({a} + {b})",
    "mul": lambda a, b: f"({a} * {b})",
    "div": lambda a, b: f"({a} / {b})",
    "neg": lambda a: f"{a}.neg()",
    "pow": lambda a, n: f"power<{n}>({a})",
    "const": lambda v: f"V(static_cast<float>({v!r}))",
    "sigmoid": lambda a: f"fast_sigmoid({a})",
    "exp": lambda a: f"fast_exp({a})",
    "log": lambda a: f"{a}.log()",
    "tanh": lambda a: f"{a}.tanh()",
    "erf": lambda a: f"{a}.erf()",
    "sqrt": lambda a: f"{a}.sqrt()",
    "Abs": lambda a: f"{a}.abs()",
    "Min": lambda a, b: f"at::vec::minimum({a}, {b})",
    "Max": lambda a, b: f"at::vec::maximum({a}, {b})",
    "log1p": lambda a: f"{a}.log1p()",
    "expm1": lambda a: f"{a}.expm1()",
    "where_gt": lambda x, y, a, b: f"V::blendv({b}, {a}, {x} > {y})",
    "where_ge": lambda x, y, a, b: f"V::blendv({b}, {a}, {x} >= {y})",
}


def moe_source(
    dtype: torch.dtype,
    layout: GateUpLayout,
    transposed: bool,
    activation: str,
    bf16_dot: bool,
    tensors: Sequence[int] | None = None,
    amx: int = 0,
) -> str:
    """The source of the kernel in moe.h for weights of `dtype`; bf16_dot: use the CPU's dot product of bfloat16; amx: also its
    matrix unit, as in amx.h.

    tensors: how many hold w1, w2, b1 and b2, where an expert has tensors of its own; None: one holds all experts'.

    NotImplementedError where the activation has no spelling in C++; ValueError where it is no activation.
    """
    expression = emit(parse(activation), VECTOR, {"g": "g", "u": "u"})
    constants = {
        "BRAZE_BF16_WEIGHT": dtype == torch.bfloat16,
        "BRAZE_TRANSPOSED": transposed,
        "BRAZE_LAYOUT_HALVES": layout == "halves",
        "BRAZE_LAYOUT_INTERLEAVED": layout == "interleaved",
        "BRAZE_LAYOUT_NONE": layout == "none",
        "BRAZE_BF16_DOT": bf16_dot,
        "BRAZE_AMX": amx,
        "BRAZE_SEPARATE": tensors is not None,
        "BRAZE_APART": tensors is not None and tensors[0] > tensors[1],
    }
    return "\n".join(
        (
            "#include <torch/csrc/inductor/cpp_prefix.h>",
            "#include <atomic>",
            "#include <cstring>",
            "#include <numeric>",
            "#include <tuple>",
            "#include <vector>",
            "#include <ATen/cpu/vec/functional.h>",
            *(("#include <sys/syscall.h>", "#include <unistd.h>") if amx else ()),
            *(f"#undef {name}\n#define {name} {int(value)}" for name, value in constants.items()),
            f"namespace {NAMESPACE} {{",
            f"using Weight = {TYPES[dtype]};",
            *(_header(name) for name in ("load.h", "vector.h", "dot.h", "panel.h", "amx.h", "strip.h", "product.h")),
            _header("activation.h"),
            f"inline V activation(V g, V u) {{ return {expression}; }}",
            *(_header(name) for name in ("problem.h", "tasks.h", "moe.h")),
            _entry(tensors or (1, 1, 1, 1)),
        )
    )


#: What follows the pointers, as in `run` of moe.h.
NUMBERS = (
    "out_dtype", "ids_wide", "router_dtype", "b1_dtype", "b2_dtype", "tokens", "hidden", "inner", "experts", "top_k",
    "x_stride", "ids_stride0", "ids_stride1", "router_stride0", "router_stride1", "w1_expert", "w1_stride", "w2_expert",
    "w2_stride", "b1_stride0", "b1_stride1", "b2_stride0", "b2_stride1", "weight_on_input",
)  # fmt: skip


def argument_types(tensors: Sequence[int] = (1, 1, 1, 1)) -> tuple[str, ...]:
    """The types of `kernel`'s arguments: the result, x, ids, router weights, `tensors` pointers, numbers, the scale."""
    return ("void*", *("const void*",) * (3 + sum(tensors)), *("int64_t",) * len(NUMBERS), "float")


def _entry(tensors: Sequence[int]) -> str:
    """The function `kernel`, which lists the pointers of each kind of tensor for `run`."""
    names = [[f"{kind}_{i}" for i in range(n)] for kind, n in zip(("w1", "w2", "b1", "b2"), tensors, strict=True)]
    parameters = ["void* out", *(f"const void* {name}" for name in ("x", "ids", "router", *chain(*names)))]
    parameters += [*(f"int64_t {name}" for name in NUMBERS), "float scale"]
    lists = "".join(
        f"  const void* const {kind}[] = {{{', '.join(each) or 'nullptr'}}};\n"
        for kind, each in zip(("w1", "w2", "b1", "b2"), names, strict=True)
    )
    call = ", ".join(("out", "x", "ids", "router", "w1", "w2", "b1", "b2", *NUMBERS, "scale"))
    return f'extern "C" void kernel({", ".join(parameters)}) {{\n{lists}  {NAMESPACE}::run({call});\n}}\n'


#: Builds where the compiler knows the instructions in amx.h.
AMX_PROBE = """#include <immintrin.h>
extern "C" __attribute__((target("amx-tile,amx-bf16"))) void kernel(void* out) {
  _tile_loadconfig(out);
  _tile_zero(0);
  _tile_loadd(1, out, 64);
  _tile_zero(2);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, out, 64);
  _tile_release();
}
"""


def renamed(source: str, name: str) -> str:
    """The source with its function and namespace named after `name`, to stand beside others in one file."""
    return source.replace("void kernel(", f"void {name}(").replace(NAMESPACE, f"{name}_parts")


@cache
def _header(name: str) -> str:
    return (_FOLDER / name).read_text()
