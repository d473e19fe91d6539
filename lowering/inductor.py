"""The one place that touches Inductor's private API: its compile function, pass hooks, cache keys, loops and calls.

braze's passes run as Inductor's custom post-grad pre-pass. The pass's uuid is part of Inductor's cache keys, so it covers all
that decides what the pass makes: the sources of the package, its settings, and the versions of torch and Triton.
"""

import contextlib
import hashlib
import importlib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops import triton_kernel_wrap
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._higher_order_ops.triton_kernel_wrap import (
    create_tma_stable_metadata,
    kernel_side_table,
    triton_kernel_wrapper_functional,
    triton_kernel_wrapper_mutation,
)
from torch._inductor import config, ir
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.lowering import fallback_handler, lowerings, register_lowering, to_dtype
from torch._inductor.virtualized import V, ops
from torch.utils._python_dispatch import _disable_current_modes

from braze.kernels.cpp.source import renamed
from braze.kernels.triton import compat
from braze.kernels.triton.choose_config import user_folder
from braze.kernels.triton.compat import Box
from braze.kernels.vendor import providers

__all__ = ["ops", "to_dtype"]  # of Inductor's loops
HOOK = "post_grad_custom_pre_pass"


class GraphPass(CustomGraphPass):  # type: ignore[misc]
    """A graph transformation with a cache key, after a pass that the user had set."""

    def __init__(self, transform: Callable[[fx.Graph], object], key: str, before: Any) -> None:
        self.transform = transform
        self.key = key
        self.before = list(before) if isinstance(before, list | tuple) else [before] if before else []

    def __call__(self, graph: fx.Graph) -> None:
        for earlier in self.before:
            earlier(graph)
        with no_modes():
            self.transform(graph)

    def uuid(self) -> Any | None:
        """The cache key; None, which turns Inductor's caches off, where an earlier pass has none."""
        keys = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.before]
        if None in keys:
            return None
        return ("braze", source_key(), tuned_key(), self.key, versions(), str(providers.present()), *map(str, keys))


def no_modes() -> contextlib.AbstractContextManager[object]:
    """Suspends fake-tensor and tracing modes: a proof computes with real numbers."""
    return _disable_current_modes()  # type: ignore[no-any-return]


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    transform: Callable[[fx.Graph], object],
    key: str,
    patches: Mapping[str, Any],
) -> Callable[..., Any]:
    """Inductor's compilation of a Dynamo graph with `transform` before its post-grad passes.

    key: what `transform` depends on besides the package's sources. patches: Inductor settings for this graph.
    """
    before = patches.get(HOOK, getattr(config, HOOK))
    hooked = {**patches, HOOK: GraphPass(transform, key, before)}
    compiled: Any = compile_fx(gm, list(example_inputs), config_patches=hooked)
    return compiled  # type: ignore[no-any-return]


def package_program(
    program: Any, file: str, transform: Callable[[fx.Graph], object], key: str, patches: Mapping[str, Any]
) -> str:
    """AOTInductor's package of an exported program, `transform` before its post-grad passes as in `compile_graph`."""
    before = patches.get(HOOK, getattr(config, HOOK))
    hooked = {**patches, HOOK: GraphPass(transform, key, before)}
    path: str = torch._inductor.aoti_compile_and_package(program, package_path=file, inductor_configs=hooked)
    return path


@lru_cache(maxsize=1)
def source_key() -> str:
    """A digest of every source file of the package, wherever it is installed."""
    digest = hashlib.sha256()
    for package in ("braze", "braze.passes", "braze.lowering", "braze.kernels"):
        root = Path(next(iter(importlib.import_module(package).__path__)))
        for file in sorted(f for f in root.rglob("*") if f.suffix in (".py", ".h", ".cpp", ".json", ".cl")):
            digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


@lru_cache(maxsize=1)
def tuned_key() -> str:
    """A digest of the tiles that the user measured (`braze tune`), which compiled graphs contain."""
    digest = hashlib.sha256()
    for file in sorted(user_folder().glob("*.json")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


@lru_cache(maxsize=1)
def versions() -> str:
    """torch's and Triton's versions, and those of the providers of kernels."""
    found = [f"torch {torch.__version__}"]
    for name in ("triton", "triton-xpu", "pytorch-triton-xpu"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def decompositions() -> Mapping[Any, Callable[..., Any]]:
    """The table that puts ATen ops into the dialect of Inductor's post-grad graphs."""
    return select_decomp_table()


def register(op: Any, lower: Callable[..., Any]) -> None:
    """Makes `lower` what Inductor lowers `op` by, unless something does already."""
    if op not in lowerings:
        register_lowering(op, type_promotion_kind=None)(lower)


def aten(op: Any) -> Callable[..., Any]:
    """Inductor's own lowering of an ATen op."""
    return lowerings[op]  # type: ignore[no-any-return]


@cache
def whole(op: Any) -> Callable[..., Any]:
    """The lowering that leaves `op` a call of its own."""
    return fallback_handler(op, add_to_fallback_set=False)  # type: ignore[no-any-return]


def current_call() -> fx.Node:
    """The node of the graph that is being lowered."""
    return V.graph.current_node  # type: ignore[no-any-return]


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes, numbers or symbols, are known to be equal."""
    return V.graph.sizevars.statically_known_equals(a, b)  # type: ignore[no-any-return]


def pointwise(
    device: torch.device, dtype: torch.dtype, size: Sequence[Any], value: Callable[[Sequence[Any]], Any]
) -> Any:
    """A tensor of `size` whose element at an index is value(index), computed with `ops` in a loop that fuses."""
    return ir.Pointwise.create(
        device=device, dtype=dtype, inner_fn=lambda index: ops.to_dtype(value(index), dtype), ranges=list(size)
    )


def cat(parts: Sequence[Any], dim: int) -> Any:
    """The parts, each computed to where it belongs in one tensor. Inductor of torch 2.11 looks for them among the inputs of the
    call that is being lowered, as if that were a cat."""
    call = fx.Graph().call_function(torch.ops.aten.cat.default, ([], dim))
    call.meta = V.graph.current_node.meta
    with V.graph.set_current_node(call):
        return lowerings[torch.ops.aten.cat.default](list(parts), dim)


def in_memory(x: Any) -> Any:
    """x, computed before what reads it rather than in the same loop."""
    x.realize()
    return x


def with_rows(x: Any) -> Any:
    """x in memory, its last dimension contiguous; as it lies where it is."""
    node = _as_it_lies(x)
    return x if same_size(node.get_stride()[-1], 1) else ir.ExternKernel.copy_input(x)


class CppCall(ir.ExternKernelOut):  # type: ignore[misc]
    """A tensor that one call of a generated C++ function fills; the function is a part of Inductor's code.

    function: C++ text of `kernel(result, *tensors, *numbers)`. numbers: from the tensors' `Lie` to what follows the pointers.
    argument_types: C++ types of all arguments. strides: the result's, row-major where there are none.
    """

    def __init__(
        self, size: Sequence[Any], dtype: torch.dtype, tensors: Sequence[Any], function: str,
        numbers: Callable[[list["Lie"]], Sequence[Any]], argument_types: Sequence[str],
        strides: Sequence[Any] | None = None,
    ) -> None:  # fmt: skip
        inputs = [_as_it_lies(t) for t in tensors]
        self.function, self.numbers, self.argument_types = function, numbers, list(argument_types)
        super().__init__(ir.FixedLayout(inputs[0].get_device(), dtype, list(size), strides), inputs)

    def codegen(self, wrapper: Any) -> None:
        tensors: list[Any] = list(self.inputs)
        pointers = [t.codegen_reference() for t in (self, *tensors)]
        _generate_call(wrapper, self, pointers, self.numbers([Lie(t) for t in tensors]))


class CppUpdate(ir.ExternKernel):  # type: ignore[misc]
    """One call of a generated C++ function that writes into tensors which the graph has.

    tensors: what the function's pointers point to, the first `written` of them for writing; where it has none, another takes
    its place. numbers: from their `Lie` to what follows the pointers, which are those of whole buffers.
    """

    def __init__(
        self, tensors: Sequence[Any], written: int, function: str, numbers: Callable[[list["Lie"]], Sequence[Any]],
        argument_types: Sequence[str],
    ) -> None:  # fmt: skip
        inputs = [_as_it_lies(t) for t in tensors]
        device = inputs[0].get_device()
        self.function, self.numbers, self.argument_types = function, numbers, list(argument_types)
        super().__init__(None, ir.NoneLayout(device=device), self.unwrap_storage(inputs))
        self.device = device
        self.mutation_outputs = [ir.MutationOutput(ir.NoneLayout(device=device), t, self) for t in inputs[:written]]
        V.graph.register_operation(self)

    def get_outputs(self) -> list[Any]:
        return list(self.mutation_outputs)

    def get_device(self) -> torch.device:
        return self.device  # type: ignore[no-any-return]

    def get_unbacked_symbol_defs(self) -> Any:
        return type(self.get_free_symbol_uses())()  # none

    def codegen(self, wrapper: Any) -> None:
        tensors: list[Any] = list(self.inputs)
        _generate_call(wrapper, self, [t.get_name() for t in tensors], self.numbers([Lie(t) for t in tensors]))


class Lie:
    """How a tensor lies in memory, by the part of its interface that tells; sizes may be symbols."""

    def __init__(self, node: Any) -> None:
        self.dtype: torch.dtype = node.get_dtype()
        self.shape: Sequence[Any] = node.get_size()
        self.strides: Sequence[Any] = node.get_stride()
        self.offset: Any = node.get_layout().offset

    def stride(self, dim: int | None = None) -> Any:
        return tuple(self.strides) if dim is None else self.strides[dim]


def cpp_call(*args: Any) -> Any:
    """`CppCall` as what a lowering returns."""
    return ir.TensorBox.create(CppCall(*args))


def cpp_update(*args: Any) -> None:
    """`CppUpdate` as a part of the graph."""
    CppUpdate(*args)


def _generate_call(wrapper: Any, node: Any, pointers: list[str], numbers: Sequence[Any]) -> None:
    arguments = [*pointers, *(str(n) if isinstance(n, int | float) else wrapper.codegen_sizevar(n) for n in numbers)]
    wrapper.generate_kernel_call(
        _defined(wrapper, node.function, node.argument_types), arguments,
        device=node.get_device(), triton=False, arg_types=node.argument_types,
    )  # fmt: skip


def _as_it_lies(t: Any) -> Any:
    """t in memory as it lies, or row-major where its layout is still open."""
    t = ir.ExternKernel.realize_input(t)
    if ir.is_storage_and_layout(t) and isinstance(t.get_layout(), ir.FlexibleLayout):
        ir.as_storage_and_layout(t, freeze=True, want_contiguous=True)
    return t


def _defined(wrapper: Any, source: str, argument_types: list[str]) -> str:
    """The name of the graph's function with this source, which it defines at its first use."""
    known: dict[str, str] = wrapper.src_to_kernel
    if source not in known:
        name = known[source] = f"cpp_braze_{hashlib.sha256(source.encode()).hexdigest()[:12]}"
        if V.graph.cpp_wrapper:
            body = renamed(source, name)
            start = body.index('extern "C"')
            declaration = body[start : body.index(")", start) + 1] + ";\n"
            wrapper.define_kernel(name, body, gpu=False, cpp_definition=declaration)
        else:
            body = f"async_compile.cpp_pybinding({argument_types!r}, r'''{source}''')"
            wrapper.define_kernel(name, body, gpu=False)
    return known[source]


def start(
    kernel: Any,
    grid: tuple[Any, ...],
    args: tuple[Any, ...],
    constants: Mapping[str, Any],
    writes: Sequence[str],
    *,
    warps: int,
    stages: int | None = None,
    overlap: bool = False,
    registers: int = 0,
) -> list[torch.Tensor]:
    """A launch (`braze.kernels.triton.compat.Start`) that becomes a node of the graph being traced.

    Inductor then compiles the kernel ahead of time, plans its buffers, and starts it as it does its own, or before its
    predecessor has ended (`launches_that_overlap`). It passes no number of registers on: Intel's Triton doubles them where a
    kernel spills more than 1000 bytes with 128.
    """
    given = dict(zip(kernel.arg_names, args, strict=False))
    boxes = {name: arg for name, arg in given.items() if isinstance(arg, Box)}
    text = {name: value for name, value in constants.items() if isinstance(value, str)}
    results: Any = triton_kernel_wrapper_functional(
        kernel_idx=kernel_side_table.add_kernel(_configured(kernel, warps, stages, overlap)),
        constant_args_idx=kernel_side_table.add_constant_args(text),
        grid=[(*grid, 1, 1)[:3]],
        tma_descriptor_metadata={name: create_tma_stable_metadata(list(box.block)) for name, box in boxes.items()},
        kwargs={
            **{name: boxes[name].tensor if name in boxes else arg for name, arg in given.items()},
            **{name: value for name, value in constants.items() if name not in text},
        },
        tensors_to_clone=list(writes),
    )
    return [results[name] for name in writes]


def overlaps_launches(device: torch.device) -> bool:
    """Whether launches inside a graph may overlap on a device. Where Inductor's own do (`enable_pdl`), it leaves out waits that
    only kernels which start in order can do without."""
    return compat.overlaps_launches(device) and not getattr(config.triton, "enable_pdl", False)


def updated(op: Any, writes: Sequence[str], arguments: Mapping[str, Any]) -> list[torch.Tensor]:
    """A call of an op that writes into some of its arguments, as a node of the graph being traced: these with what it wrote.

    Inductor clones those of them that something reads later.
    """
    results: Any = auto_functionalized(op, **arguments)
    return list(results[-len(writes) :])


@lru_cache(maxsize=1024)
def _configured(kernel: Any, warps: int, stages: int | None, overlap: bool) -> Any:
    """The kernel with its launch options, in the only way that Inductor takes them, and with what `_Overlapping` looks for."""
    import triton

    options = {"num_warps": warps} | ({"num_stages": stages} if stages else {})
    configured = triton.autotune([triton.Config({}, **options)], key=[])(kernel)
    configured.braze_overlap = overlap
    kernel.braze = configured.braze = True
    return configured


class _Overlapping(ir.UserDefinedTritonKernel):  # type: ignore[misc]
    """A launch that may begin before its predecessor has ended: Triton's option for that, which Inductor does not pass on, is
    put into what it writes as the kernel's definition. C++ wrappers launch without it, and the instructions do nothing then."""

    def codegen(self, wrapper: Any) -> None:
        if V.graph.cpp_wrapper:
            super().codegen(wrapper)
            return
        define = wrapper.define_kernel

        def defined(name: str, body: str, *rest: Any, **named: Any) -> Any:
            return define(name, body.replace("triton_meta={", "triton_meta={'launch_pdl': True, ", 1), *rest, **named)

        wrapper.define_kernel = defined
        try:
            super().codegen(wrapper)
        finally:
            del wrapper.define_kernel


@cache
def launches_that_overlap() -> None:
    """Makes Inductor lower launches that `start` was told may overlap as `_Overlapping`, and all others as before.

    What a kernel writes to is found from its code without the instructions for an overlap: Inductor does not know them, and
    would take all its tensors for written.
    """
    own = lowerings[triton_kernel_wrapper_mutation]

    def lower(*args: Any, **given: Any) -> Any:
        before = len(V.graph.operations)
        results = own(*args, **given)
        if getattr(kernel_side_table.get_kernel(given["kernel_idx"]), "braze_overlap", False):
            for operation in V.graph.operations[before:]:
                if type(operation) is ir.UserDefinedTritonKernel:
                    operation.__class__ = _Overlapping
        return results

    lowerings[triton_kernel_wrapper_mutation] = lower
    names = ("identify_accessed_tensors", "identify_mutated_tensors")  # from torch 2.13 on, before
    name = next(n for n in names if hasattr(triton_kernel_wrap, n))
    find = getattr(triton_kernel_wrap, name)

    def analysed(kernel: Any, given: Mapping[str, Any], *rest: Any) -> Any:
        alone = {"OVERLAP": False} if "OVERLAP" in given and hasattr(kernel, "braze") else {}
        return find(kernel, {**given, **alone}, *rest)

    setattr(triton_kernel_wrap, name, analysed)


@cache
def descriptors_of_views() -> None:
    """Lets Inductor try kernels out for a C++ wrapper that read views through descriptors: it does so in Python, but spells the
    view as C++ does. The example tensor that it makes under the base's name has the view's sizes already."""
    own = PythonWrapperCodegen._generate_tma_descriptor_call_stable

    def call(wrapper: Any, desc: Any, apply_size_hints: bool = False) -> str:
        if not (apply_size_hints and V.graph.cpp_wrapper):
            return own(wrapper, desc, apply_size_hints)  # type: ignore[no-any-return]
        shape = V.graph.sizevars.optimization_hints(desc.block_shape)
        return f"triton.tools.tensor_descriptor.TensorDescriptor.from_tensor({desc.get_tensor().get_name()}, {shape})"

    PythonWrapperCodegen._generate_tma_descriptor_call_stable = call  # type: ignore[method-assign]


def modes() -> Mapping[str, Mapping[str, Any]]:
    """Inductor's modes of torch.compile, each with its settings."""
    return {str(k): v for k, v in torch._inductor.list_mode_options().items()}


def tunes_products() -> bool:
    """Whether Inductor measures kernels of its own for each product and takes the fastest."""
    return bool(config.max_autotune or config.max_autotune_gemm)


def settings() -> Mapping[str, Any]:
    """Inductor's settings with their present values."""
    return config.get_config_copy()  # type: ignore[no-any-return]
