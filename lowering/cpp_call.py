"""`braze::moe` on CPU as one call of a generated C++ function, written into Inductor's own code.

No Python and no dispatcher stands between the graph and the kernel, and a package made by AOTInductor carries it inside.
Uses Inductor's private API: an extern kernel that defines its function once a graph and passes sizes at run time.
"""

import hashlib
from typing import Any

import torch
from torch import fx
from torch._inductor import ir
from torch._inductor.lowering import fallback_handler, lowerings, register_lowering
from torch._inductor.virtualized import V

from braze.kernels.cpp import moe
from braze.kernels.cpp.source import renamed
from braze.kernels.spec import MoeSpec


def register() -> None:
    """Registers the lowering of `braze::moe` on CPU, once; elsewhere the op stays a call of its own."""
    op = torch.ops.braze.moe.default
    if op in lowerings:
        return
    whole = fallback_handler(op, add_to_fallback_set=False)

    def lower(
        x: Any, ids: Any, weights: Any, w1: Any, w2: Any, b1: Any = None, b2: Any = None, **attributes: Any
    ) -> Any:
        spec = MoeSpec(**attributes)
        if _refusal(V.graph.current_node, spec) is not None:
            return whole(x, ids, weights, w1, w2, b1, b2, **attributes)
        return ir.TensorBox.create(_Call(x, ids, weights, w1, w2, b1, b2, spec))

    register_lowering(op, type_promotion_kind=None)(lower)


def _refusal(call: fx.Node, spec: MoeSpec) -> str | None:
    """Why the kernel does not take this call (another device, another dtype ...), or None."""
    args: Any = fx.node.map_arg(call.args, lambda n: n.meta["val"])
    x, ids, weights, w1, w2, b1, b2 = (*args, call.kwargs.get("b1"), call.kwargs.get("b2"))[:7]
    return moe.supports(x, ids, weights, w1, w2, b1, b2, spec)


class _Call(ir.ExternKernelOut):  # type: ignore[misc]
    """The buffer that one call writes."""

    def __init__(self, x: Any, ids: Any, weights: Any, w1: Any, w2: Any, b1: Any, b2: Any, spec: MoeSpec) -> None:
        inputs = [None if t is None else _rows(t) for t in (x, ids, weights, w1, w2, b1, b2)]
        layout = ir.FixedLayout(x.get_device(), spec.out_dtype or x.get_dtype(), list(x.get_size()))
        self.function = moe.source(x.get_dtype(), spec)
        self.places = [None if t is None else sum(u is not None for u in inputs[:i]) for i, t in enumerate(inputs)]
        self.spec = spec
        super().__init__(layout, [t for t in inputs if t is not None])

    def codegen(self, wrapper: Any) -> None:
        tensors: list[Any] = [None if place is None else self.inputs[place] for place in self.places]
        x, ids, weights, w1, w2, b1, b2 = (None if t is None else _Shape(t) for t in tensors)
        pointers: list[Any] = [self, *(tensors[0] if t is None else t for t in tensors)]
        arguments: list[Any] = [t.codegen_reference() for t in pointers]
        arguments += [_number(n, wrapper) for n in moe.numbers(x, ids, weights, w1, w2, b1, b2, self.spec)]
        name = _define(wrapper, self.function)
        wrapper.generate_kernel_call(
            name, arguments, device=self.get_device(), triton=False, arg_types=list(moe.ARGUMENTS)
        )


class _Shape:
    """The part of a tensor's interface that the kernel's numbers are made of; sizes may be symbols."""

    def __init__(self, node: Any) -> None:
        self.dtype = node.get_dtype()
        self.shape = node.get_size()
        self.strides = node.get_stride()

    def stride(self, dim: int | None = None) -> Any:
        return tuple(self.strides) if dim is None else self.strides[dim]


def _rows(t: Any) -> Any:
    """t in memory as it lies, or row-major where its layout is still open."""
    t = ir.ExternKernel.realize_input(t)
    if ir.is_storage_and_layout(t) and isinstance(t.get_layout(), ir.FlexibleLayout):
        ir.as_storage_and_layout(t, freeze=True, want_contiguous=True)
    return t


def _number(n: Any, wrapper: Any) -> str:
    return str(n) if isinstance(n, int | float) else wrapper.codegen_sizevar(n)  # type: ignore[no-any-return]


def _define(wrapper: Any, source: str) -> str:
    """The name of the graph's function with this source, which it defines at its first use."""
    known: dict[str, str] = wrapper.src_to_kernel
    if source not in known:
        name = known[source] = f"cpp_braze_moe_{hashlib.sha256(source.encode()).hexdigest()[:12]}"
        if V.graph.cpp_wrapper:
            body = renamed(source, name)
            start = body.index('extern "C"')
            declaration = body[start : body.index(")", start) + 1] + ";\n"
            wrapper.define_kernel(name, body, gpu=False, cpp_definition=declaration)
        else:
            body = f"async_compile.cpp_pybinding({list(moe.ARGUMENTS)!r}, r'''{source}''')"
            wrapper.define_kernel(name, body, gpu=False)
    return known[source]
