"""A call's launches, kept: a call of the same signature starts the same kernels on its own addresses.

Choosing tiles, describing tensors and finding compiled kernels takes the host longer than a token's kernels run. All of it
follows from a signature (sizes, strides, dtypes, alignments, attributes), and only addresses differ between its calls.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from braze.kernels.triton import compat
from braze.kernels.triton.compat import Box

ALIGNMENT = 256  # bytes, of each buffer in the workspace; an allocation has 512
MOST = 4096  # plans
KEPT = 16  # descriptors of one argument, each for another address


@dataclass(frozen=True)
class Address:
    """What a descriptor asks of a tensor, without keeping the tensor."""

    pointer: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.pointer


@dataclass
class View:
    """An argument that is a descriptor: `box` of a tensor at some address."""

    shape: list[int]
    strides: list[int]
    block: list[int]
    dtype: torch.dtype
    made: dict[int, Any] = field(default_factory=dict)

    def at(self, pointer: int) -> Any:
        found = self.made.get(pointer)
        if found is None:
            if len(self.made) >= KEPT:
                self.made.clear()
            base = Address(pointer, self.dtype)
            found = self.made[pointer] = compat.tensor_descriptor(base, self.shape, self.strides, self.block)
        return found


@dataclass(frozen=True)
class Launch:
    """run(*arguments), after the addresses are put in: (index of the argument, index of what is there, its View if any)."""

    run: Any
    arguments: tuple[Any, ...]
    places: tuple[tuple[int, int, View | None], ...]


@dataclass(frozen=True)
class Plan:
    """A call's launches and the buffers between them, at `offsets` in one workspace of so many bytes."""

    launches: tuple[Launch, ...]
    offsets: tuple[int, ...]
    workspace: int

    def start(self, pointers: Sequence[int], device: torch.device) -> None:
        """pointers: of the call's tensors, 0 for those it lacks, in the order that the recorder had."""
        work = torch.empty(self.workspace, dtype=torch.uint8, device=device)
        base = work.data_ptr()
        at = [*pointers, *[base + offset for offset in self.offsets]]
        for launch in self.launches:
            arguments = list(launch.arguments)
            for index, source, view in launch.places:
                arguments[index] = at[source] if view is None else view.at(at[source])
            launch.run(*arguments)


class Recorder:
    """A Start (`compat`) that launches at once and remembers. tensors: the call's own; any other is a buffer of the plan."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self.known = {t.data_ptr(): n for n, t in enumerate(tensors) if t is not None}
        self.count = len(tensors)
        self.sizes: dict[int, int] = {}
        self.alive: list[Any] = []  # so that no address is used twice
        self.launches: list[Launch] = []

    def __call__(
        self, kernel: Any, grid: tuple[Any, ...], args: tuple[Any, ...], constants: Mapping[str, Any], writes: Sequence[str],
        *, warps: int, stages: int | None = None, overlap: bool = False, registers: int = 0,
    ) -> list[Tensor]:  # fmt: skip
        compiled, written = compat.launched(kernel, grid, args, constants, writes, warps, stages, overlap, registers)
        self.alive.append(args)
        arguments = list(args)
        places = []
        for n, arg in enumerate(args):
            tensor = arg.tensor if isinstance(arg, Box) else arg
            if isinstance(tensor, Tensor):
                places.append((n, self._source(tensor), _view(arg)))
                arguments[n] = None
        run = compiled[(*grid, 1, 1)[:3]]
        self.launches.append(Launch(run, (*arguments, *constants.values()), tuple(places)))
        return written

    def _source(self, tensor: Tensor) -> int:
        pointer = tensor.data_ptr()
        source = self.known.setdefault(pointer, self.count + len(self.sizes))
        if source >= self.count:
            self.sizes[source] = max(self.sizes.get(source, 0), tensor.numel() * tensor.element_size())
        return source

    def plan(self) -> Plan:
        offsets, end = [], 0
        for source in sorted(self.sizes):
            offsets.append(end)
            end += -(-self.sizes[source] // ALIGNMENT) * ALIGNMENT
        return Plan(tuple(self.launches), tuple(offsets), end)


def _view(arg: Any) -> View | None:
    if not isinstance(arg, Box):
        return None
    x = arg.tensor
    return View(list(x.shape), list(x.stride()), list(arg.block), x.dtype)


_plans: dict[Any, Plan] = {}


def signature(tensors: Sequence[Tensor | None], pointers: Sequence[int], attributes: tuple[Any, ...]) -> Any | None:
    """What a call's launches depend on; None where addresses do too, because two of its tensors begin at one."""
    given = [p for p in pointers if p]
    if len(set(given)) < len(given):
        return None
    described = [
        (t.shape, t.stride(), t.dtype, p % compat.BLOCK_ALIGNMENT) if t is not None else None
        for t, p in zip(tensors, pointers, strict=True)
    ]
    return (*described, tensors[0].device.index, *attributes)  # type: ignore[union-attr]


def find(key: Any) -> Plan | None:
    """The plan kept for a signature."""
    return _plans.get(key)


def keep(key: Any, plan: Plan) -> None:
    """Keeps a plan for all calls of this signature."""
    if len(_plans) >= MOST:
        _plans.clear()
    _plans[key] = plan
