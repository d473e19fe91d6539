"""The one place that touches Inductor's private API: its compile function, pass hooks, cache keys and decompositions.

braze's passes run as Inductor's custom post-grad pre-pass. The pass's uuid is part of Inductor's cache keys, so it covers all
that decides what the pass makes: the sources of the package, its settings, and the versions of torch and Triton.
"""

import contextlib
import hashlib
import importlib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.triton_kernel_wrap import (
    create_tma_stable_metadata,
    kernel_side_table,
    triton_kernel_wrapper_functional,
)
from torch._inductor import config, ir
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.lowering import lowerings, register_lowering, to_dtype
from torch._inductor.virtualized import V
from torch._inductor.virtualized import ops as inductor_ops
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

from braze.kernels.spec import PairLayout, RopeSpec
from braze.kernels.triton.choose_config import user_folder
from braze.kernels.triton.compat import Box
from braze.lowering import cpp_call

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
        return ("braze", source_key(), tuned_key(), self.key, versions(), *map(str, keys))


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
    register()
    before = patches.get(HOOK, getattr(config, HOOK))
    hooked = {**patches, HOOK: GraphPass(transform, key, before)}
    compiled: Any = compile_fx(gm, list(example_inputs), config_patches=hooked)
    return compiled  # type: ignore[no-any-return]


def package_program(
    program: Any, file: str, transform: Callable[[fx.Graph], object], key: str, patches: Mapping[str, Any]
) -> str:
    """AOTInductor's package of an exported program, `transform` before its post-grad passes as in `compile_graph`."""
    register()
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


def register() -> None:
    """Registers the lowerings of `braze::rope` and `braze::moe`, once; the ops must have been defined."""
    op = torch.ops.braze.rope.default
    if op not in lowerings:
        register_lowering(op, type_promotion_kind=None)(_lower_rope)
    cpp_call.register()


def _lower_rope(x: Any, cos: Any, sin: Any, **attributes: Any) -> Any:
    """`braze.kernels.reference.rope` as pointwise code, in the form that the device's code generator makes most of."""
    spec = RopeSpec(**attributes)
    x.mark_reuse(2)  # each element is read for itself and for its partner
    rotation = _Rotation(x, cos, sin, spec)
    if x.get_device().type != "cpu":
        shifts = spec.layout_in == spec.layout_out == "half" and rotation.wide_tables
        return rotation.by_shift() if shifts else rotation.by_element()
    if spec.layout_in == spec.layout_out == "interleaved" and rotation.wide_tables:
        return rotation.by_shift()
    if spec.layout_in == spec.layout_out == "half" and rotation.whole and spec.rotary_dim // 2 % _CPU_LANES == 0:
        return rotation.by_element()
    if "interleaved" in (spec.layout_in, spec.layout_out):
        # A loop that steps by two is left to the C++ compiler, which vectorises it in float32 but not in 16-bit types.
        x, cos, sin = (_widened(t, rotation.acc) for t in (x, cos, sin))
        result = _Rotation(x, cos, sin, replace(spec, out_dtype=rotation.acc)).by_halves()
        return to_dtype(result, rotation.dtype)
    return rotation.by_halves()


def _widened(x: Any, dtype: torch.dtype) -> Any:
    """x in `dtype` as a tensor in memory, or x itself where it has that dtype."""
    if x.get_dtype() == dtype:
        return x
    wide = to_dtype(x, dtype)
    wide.realize()
    return wide


_CPU_LANES = 32  # the most elements in one of Inductor's vectors: 512 bits of a 16-bit type
_Index = Sequence[Any]


class _Rotation:
    """One rotation's loads and its three loop forms; element (j, i) is component j (0 or 1) of pair i."""

    def __init__(self, x: Any, cos: Any, sin: Any, spec: RopeSpec) -> None:
        self.x, self.spec = x, spec
        self.size = list(x.get_size())
        self.half = spec.rotary_dim // 2
        self.acc = torch.float64 if x.get_dtype() == torch.float64 else torch.float32
        self.dtype = spec.out_dtype or x.get_dtype()
        self.whole = V.graph.sizevars.statically_known_equals(self.size[-1], spec.rotary_dim)
        self.wide_tables = V.graph.sizevars.statically_known_equals(cos.get_size()[-1], spec.rotary_dim)
        self.load_x = x.make_loader()
        self.load_cos, self.load_sin = self._table(cos), self._table(sin)

    def _table(self, table: Any) -> Callable[[_Index, Any], Any]:
        """A loader of a table at (the index of x without the last, column)."""
        load, size = table.make_loader(), table.get_size()
        ahead = len(self.size) - len(size)
        single = [V.graph.sizevars.statically_known_equals(s, 1) for s in size[:-1]]

        def at(lead: _Index, column: Any) -> Any:
            return self._wide(load([0 if one else lead[ahead + n] for n, one in enumerate(single)] + [column]))

        return at

    def _wide(self, value: Any) -> Any:
        return inductor_ops.to_dtype(value, self.acc)

    def _place(self, layout: PairLayout, j: Any, i: Any) -> Any:
        return self.half * j + i if layout == "half" else 2 * i + j

    def _products(self, lead: _Index, j: Any, i: Any) -> tuple[Any, Any]:
        """(own element times cos, partner times sin): the result is their difference for j = 0, their sum for j = 1."""
        spec = self.spec
        own = self._wide(self.load_x([*lead, spec.start + self._place(spec.layout_in, j, i)]))
        partner = self._wide(self.load_x([*lead, spec.start + self._place(spec.layout_in, 1 - j, i)]))
        column = self._place(spec.layout_out, j, i) if self.wide_tables else i
        return (
            inductor_ops.mul(own, self.load_cos(lead, column)),
            inductor_ops.mul(partner, self.load_sin(lead, column)),
        )

    def _pointwise(self, size: _Index, value: Callable[[_Index], Any]) -> Any:
        return ir.Pointwise.create(
            device=self.x.get_device(),
            dtype=self.dtype,
            inner_fn=lambda index: inductor_ops.to_dtype(value(index), self.dtype),
            ranges=list(size),
        )

    def by_element(self) -> Any:
        """One loop over the result, pairs by index arithmetic: fuses on both sides."""
        spec = self.spec

        def rotated(lead: _Index, d: Any) -> Any:
            n = d - spec.start
            outer, inner = FloorDiv(n, self.half), ModularIndexing(n, 1, self.half)
            if spec.layout_out == "interleaved":
                outer, inner = ModularIndexing(n, 1, 2), FloorDiv(n, 2)
            own, partner = self._products(lead, outer, inner)
            sign = (1 - 2 * outer) if spec.inverse else (2 * outer - 1)
            sign = self._wide(inductor_ops.index_expr(sign, torch.int32))
            return inductor_ops.add(own, inductor_ops.mul(partner, sign))

        def value(index: _Index) -> Any:
            lead, d = index[:-1], index[-1]
            if self.whole:
                return rotated(lead, d)
            inside = self._inside(d)
            turned = inductor_ops.masked(inside, lambda: rotated(lead, d), 0.0)
            return inductor_ops.where(inside, turned, self._wide(self.load_x(index)))

        return self._pointwise(self.size, value)

    def _inside(self, d: Any) -> Any:
        """Whether d is among the rotated ones."""
        position = inductor_ops.index_expr(d, torch.int32)
        begin, end = self.spec.start, self.spec.start + self.spec.rotary_dim
        inside = inductor_ops.lt(position, inductor_ops.constant(end, torch.int32))
        if begin == 0:
            return inside
        return inductor_ops.and_(inside, inductor_ops.ge(position, inductor_ops.constant(begin, torch.int32)))

    def by_shift(self) -> Any:
        """One loop over the result where both layouts agree: partners are two shifted loads under opposite masks.

        Both generators vectorise a load whose index steps by one, masked or not; index arithmetic hides that from them.
        """
        spec = self.spec

        def rotated(lead: _Index, d: Any) -> Any:
            n = inductor_ops.index_expr(d - spec.start, torch.int32)
            if spec.layout_in == "half":
                step, middle = self.half, inductor_ops.constant(self.half, torch.int32)
                first, second = inductor_ops.lt(n, middle), inductor_ops.ge(n, middle)
            else:
                step, one = 1, inductor_ops.constant(1, torch.int32)
                parity = inductor_ops.bitwise_and(n, one)
                first, second = inductor_ops.ne(parity, one), inductor_ops.eq(parity, one)
            before = inductor_ops.masked(second, lambda: self._wide(self.load_x([*lead, d - step])), 0.0)
            after = inductor_ops.masked(first, lambda: self._wide(self.load_x([*lead, d + step])), 0.0)
            turned = inductor_ops.sub(after, before) if spec.inverse else inductor_ops.sub(before, after)
            own = inductor_ops.mul(self._wide(self.load_x([*lead, d])), self.load_cos(lead, d - spec.start))
            return inductor_ops.add(own, inductor_ops.mul(turned, self.load_sin(lead, d - spec.start)))

        def value(index: _Index) -> Any:
            lead, d = index[:-1], index[-1]
            if self.whole:
                return rotated(lead, d)
            inside = self._inside(d)
            turned = inductor_ops.masked(inside, lambda: rotated(lead, d), 0.0)
            return inductor_ops.where(inside, turned, self._wide(self.load_x(index)))

        return self._pointwise(self.size, value)

    def by_halves(self) -> Any:
        """Two loops over pairs, one for each component, that write into one result; the scheduler makes one loop of them."""
        spec, last = self.spec, len(self.size) - 1

        def component(j: int) -> Any:
            def value(index: _Index) -> Any:
                own, partner = self._products(index[:-1], j, index[-1])
                return inductor_ops.add(own, partner) if (j == 1) != spec.inverse else inductor_ops.sub(own, partner)

            return self._pointwise([*self.size[:-1], self.half], value)

        def passed(begin: Any, end: Any) -> Any:
            return self._pointwise(
                [*self.size[:-1], end - begin], lambda index: self.load_x([*index[:-1], index[-1] + begin])
            )

        cat = lowerings[torch.ops.aten.cat.default]
        parts = [component(0), component(1)]
        if spec.layout_out == "interleaved":
            columns = [lowerings[torch.ops.aten.unsqueeze.default](part, last + 1) for part in parts]
            pairs = cat(columns, last + 1)
            parts = [lowerings[torch.ops.aten.reshape.default](pairs, [*self.size[:-1], spec.rotary_dim])]
        end = spec.start + spec.rotary_dim
        if spec.start:
            parts.insert(0, passed(0, spec.start))
        if not V.graph.sizevars.statically_known_equals(self.size[-1], end):
            parts.append(passed(end, self.size[-1]))
        return parts[0] if len(parts) == 1 else cat(parts, last)


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
) -> list[torch.Tensor]:
    """A launch (`braze.kernels.triton.compat.Start`) that becomes a node of the graph being traced.

    Inductor then compiles the kernel ahead of time, plans its buffers, and starts it as it does its own.
    """
    given = dict(zip(kernel.arg_names, args, strict=False))
    boxes = {name: arg for name, arg in given.items() if isinstance(arg, Box)}
    text = {name: value for name, value in constants.items() if isinstance(value, str)}
    results: Any = triton_kernel_wrapper_functional(
        kernel_idx=kernel_side_table.add_kernel(_configured(kernel, warps, stages)),
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


@lru_cache(maxsize=1024)
def _configured(kernel: Any, warps: int, stages: int | None) -> Any:
    """The kernel with its launch options, in the only way that Inductor takes them."""
    import triton

    options = {"num_warps": warps} | ({"num_stages": stages} if stages else {})
    return triton.autotune([triton.Config({}, **options)], key=[])(kernel)


def modes() -> Mapping[str, Mapping[str, Any]]:
    """Inductor's modes of torch.compile, each with its settings."""
    return {str(k): v for k, v in torch._inductor.list_mode_options().items()}


def settings() -> Mapping[str, Any]:
    """Inductor's settings with their present values."""
    return config.get_config_copy()  # type: ignore[no-any-return]
