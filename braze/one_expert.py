"""What one expert of a loop does to one row, as straight-line code over its parameters.

A loop (x, ids, weights) is run on one token whose first slot has weight 1 and whose others have weight 0: all that was
computed from ids and weights is then a constant, picking that row is no operation, nor is adding it to zeros. What is left
are the operations from the row to the result; a part taken of a stacked parameter, or a whole one, is an input.
"""

import operator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten

_VIEWS = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.alias.default, aten.detach.default,
    aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default,
}  # fmt: skip
_FRESH = {"zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full"}
_FILLED = {"new_zeros": 0, "new_ones": 1, "new_full": None}
_ADDED = {
    "index_add": 3, "index_add_": 3, "index_put": 2, "index_put_": 2, "add": 1, "add_": 1,
    "scatter_add": 3, "scatter_add_": 3, "scatter_reduce": 3, "scatter_reduce_": 3,
}  # fmt: skip
_OUT_OF_PLACE = {
    "index_add_", "index_put_", "add_", "mul_", "sub_", "div_", "clamp_", "relu_", "silu_", "copy_", "scatter_", "masked_fill_",
}  # fmt: skip


#: What a method takes between x and weights [T, k]: ids [T, k], ids [T, 1], or a mask [T, 1, experts].
Form = Literal["ids", "one id", "mask"]


@dataclass(frozen=True)
class Part:
    """A parameter or buffer, viewed with `shape` where its own is another, and the expert's index in it; None for all of it."""

    name: str
    shape: tuple[int, ...]
    index: int | None


@dataclass(frozen=True)
class Expert:
    """code: (row [1, hidden], *parts) -> [1, hidden]. Equal texts: the same but for the parts."""

    code: fx.Graph
    parts: tuple[Part, ...]

    @cached_property
    def text(self) -> str:
        number = {n: f"%{i}" for i, n in enumerate(self.code.nodes)}
        lines = [fx.node.map_arg((n.args, n.kwargs), lambda a: _Name(number[a])) for n in self.code.nodes]
        shapes = [p.shape if p.index is None else p.shape[1:] for p in self.parts]
        return f"{shapes}" + "".join(
            f"\n{n.target} {line}" for n, line in zip(self.code.nodes, lines, strict=True) if n.op[0] != "p"
        )


class _Name(str):
    """A number that is printed without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def storage(x: Tensor) -> int:
    """Where the memory that a tensor views begins."""
    return x.untyped_storage().data_ptr()


class NoExpert(Exception):
    """Why there is no such code."""


class Recorder(TorchDispatchMode):  # type: ignore[misc]
    """Records the operations that a row's value passes through; all others run and are constants."""

    def __init__(self, module: nn.Module, row: Tensor) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.known: dict[int, fx.Node] = {}
        self.row = self.graph.placeholder("row")
        self._give(row, self.row)
        tensors = (*module.named_parameters(), *module.named_buffers())
        self.parameters: dict[int, str] = {id(p): n for n, p in tensors}
        self.taken: dict[Part, fx.Node] = {}
        self.fresh: dict[int, Any] = {}  # what made and filled a new tensor's memory, until something changes it
        self.alive: list[Any] = [row]  # so that no id is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.alive += [out, args]
        name = func.overloadpacket.__name__
        if func in _VIEWS and id(args[0]) in self.parameters:
            self.parameters[id(out)] = self.parameters[id(args[0])]
        elif name in _FRESH:
            self.fresh[storage(out)] = None if "empty" in name else (func, args, kwargs)
        else:
            self._record(func, name, args, kwargs, out)
            if name.endswith("_") and isinstance(out, Tensor):
                self.fresh.pop(storage(out), None)
        return out

    def _record(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        if isinstance(out, Tensor) and out.numel() == 0:
            return  # the rows of an expert that has none
        part = self._part(func, args, out)
        if part is not None:
            self.known[id(out)] = part
            return
        given = (id(a) for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor))
        if out is None or not any(a in self.known or a in self.parameters for a in given):
            return
        if name in ("mul", "mul_") and any(self._is_constant(a, 0.0) for a in args[:2]):
            self.known.pop(id(out), None)
            return  # the slot of another expert
        same = self._same(name, args, out)
        if same is not None:
            self.known[id(out)] = self.reshaped(same, out)
            return
        if func in _VIEWS:
            self.known[id(out)] = self.reshaped(self.known[id(args[0])], out)
            return
        if name in _OUT_OF_PLACE:
            func = getattr(getattr(aten, name[:-1]), func._overloadname)
        elif func._schema.is_mutable:
            raise NoExpert(f"{name} changes a tensor in place")
        if not isinstance(out, Tensor | tuple | list):
            raise NoExpert("it reads a number that follows from the row")
        node = self.graph.call_function(func, *tree_map(self._operand, (args, kwargs)))
        if isinstance(out, Tensor):
            for same_tensor in self._aliases(out) if name in _OUT_OF_PLACE else (out,):
                self._give(same_tensor, node)
        else:
            for i, o in enumerate(out):
                self._give(o, self.graph.call_function(operator.getitem, (node, i)))

    def _aliases(self, out: Tensor) -> list[Tensor]:
        """The tensors that are in the same memory in the same shape."""
        tensors = [t for t in tree_leaves(self.alive) if isinstance(t, Tensor) and t.shape == out.shape]
        return [out, *(t for t in tensors if storage(t) == storage(out))]

    def _give(self, out: Tensor, node: fx.Node) -> None:
        node.meta["shape"] = tuple(out.shape)
        self.known[id(out)] = node

    def reshaped(self, node: fx.Node, out: Tensor) -> fx.Node:
        """`node` in the shape of `out`: reshapes of reshapes are one, or none. A first dimension of 1 is that of rows."""
        if node.target is aten.reshape.default:
            node = node.args[0]  # type: ignore[assignment]
        if node.meta["shape"] == tuple(out.shape):
            return node
        lead = 1 if out.ndim and node.meta["shape"] and out.shape[0] == node.meta["shape"][0] == 1 else 0
        made = self.graph.call_function(aten.reshape.default, (node, [-1] * lead + list(out.shape[lead:])))
        made.meta["shape"] = tuple(out.shape)
        return made

    def _operand(self, a: Any) -> Any:
        if not isinstance(a, Tensor):
            return a
        if id(a) in self.known:
            return self.known[id(a)]
        if id(a) in self.parameters:
            return self._taken(Part(self.parameters[id(a)], tuple(a.shape), None))
        if a.numel() == 1:
            return a.item()
        made = self.fresh.get(storage(a))
        if made is not None:
            func, args, kwargs = made
            rows = self._of_rows(a, func, args)
            return rows or self.graph.call_function(func, *tree_map(self._operand, (args, kwargs)))
        raise NoExpert(f"it needs a constant of shape {tuple(a.shape)}")

    def _of_rows(self, a: Tensor, func: Any, args: Any) -> fx.Node | None:
        """A new tensor [1, ...] of one value, as one of as many rows as there are: its size was read from the row's."""
        name = func.overloadpacket.__name__
        if name not in _FILLED or a.ndim < 2 or a.shape[0] != 1 or tuple(args[1]) != tuple(a.shape):
            return None
        value = args[2] if name == "new_full" else _FILLED[name]
        column = self.graph.call_function(aten.slice.Tensor, (self.row, 1, 0, 1))
        column = self.graph.call_function(aten.reshape.default, (column, [-1] + [1] * (a.ndim - 1)))
        wide = self.graph.call_function(aten.expand.default, (column, [-1, *a.shape[1:]]))
        return self.graph.call_function(aten.full_like.default, (wide, value), {"dtype": a.dtype})

    def _part(self, func: Any, args: Any, out: Any) -> fx.Node | None:
        """An expert's part of a stacked parameter."""
        source = args[0] if args else None
        if source is None or id(source) not in self.parameters:
            return None
        name, shape = self.parameters[id(source)], tuple(source.shape)
        if func is aten.select.int and args[1] == 0:
            return self._taken(Part(name, shape, int(args[2])))
        if func is aten.index.Tensor and len(args[1]) == 1 and args[1][0].ndim == 0:
            return self._taken(Part(name, shape, int(args[1][0])))
        return None

    def _taken(self, part: Part) -> fx.Node:
        if part not in self.taken:
            with self.graph.inserting_after(self.graph.find_nodes(op="placeholder")[-1]):
                node = self.taken[part] = self.graph.placeholder(f"part{len(self.taken)}")
                node.meta["shape"] = part.shape if part.index is None else part.shape[1:]
        return self.taken[part]

    def _same(self, name: str, args: Any, out: Any) -> fx.Node | None:
        """The operand that an operation on one row leaves as it is, but for its shape."""
        source = self.known.get(id(args[0]))
        picked = name in ("index", "index_select", "slice", "sum")
        if picked and source is not None and out.numel() == args[0].numel() and out.dtype == args[0].dtype:
            return source
        if name == "cat" and [a.numel() for a in args[0] if a.numel()] == [out.numel()]:
            return next((self.known.get(id(a)) for a in args[0] if a.numel()), None)
        if name in ("mul", "mul_"):
            for a, b in (args[:2], args[1::-1]):
                if id(a) in self.known and self._is_constant(b, 1.0) and out.numel() == a.numel():
                    return self.known[id(a)]
        if (
            name.startswith("index_put")
            and id(args[2]) in self.known
            and out.numel() == args[2].numel()
            and args[3:] != (True,)
        ):
            return self.known[id(args[2])]
        place = _ADDED.get(name)
        if place is not None and source is None and isinstance(args[0], Tensor) and id(args[place]) in self.known:
            # args[0] was changed in place already where the operation ends in "_": `out` then is what it added.
            value = args[place]
            if out.numel() == value.numel() and torch.equal(out.reshape(-1), value.reshape(-1)):
                return self.known[id(value)]
        if place is not None and source is not None and self._is_constant(args[place], 0.0):
            return source
        return None

    def _is_constant(self, a: Any, value: float) -> bool:
        if isinstance(a, Tensor):
            return id(a) not in self.known and id(a) not in self.parameters and bool((a == value).all())
        return bool(a == value)


def _mask(module: nn.Module, expert: int, device: torch.device) -> Tensor:
    """[1, 1, experts], true for one of them."""
    experts = getattr(module, "num_experts", None)
    if not isinstance(experts, int) or expert >= experts:
        raise NoExpert(f"it has no expert {expert}")
    return torch.nn.functional.one_hot(torch.tensor([[expert]], device=device), experts)


def trace(module: nn.Module, name: str, expert: int, hidden: int, form: Form = "ids") -> Expert | None:
    """What the expert does, by the module's method `name`; None where nothing is done for its id. NoExpert, or the module's own
    error, where it fails."""
    like = next(module.parameters())
    row = torch.randn(1, hidden, generator=torch.Generator().manual_seed(0)).to(like)
    ids = torch.tensor([[expert, int(expert == 0)]], device=like.device)
    weights = torch.tensor([[1.0, 0.0]], dtype=like.dtype, device=like.device)
    if form != "ids":
        weights = weights[:, :1]
        ids = _mask(module, expert, like.device) if form == "mask" else ids[:, :1]
    with torch.no_grad(), Recorder(module, row) as recorder:
        out = getattr(type(module), name)(module, row, ids, weights)
    if not isinstance(out, Tensor) or out.numel() != hidden:
        raise NoExpert("its result for one row is no row")
    if id(out) not in recorder.known:
        return None
    graph = recorder.graph
    graph.output(recorder.reshaped(recorder.known[id(out)], row))
    graph.eliminate_dead_code()
    parts = {node: part for part, node in recorder.taken.items()}
    for node in [n for n in parts if not n.users]:
        graph.erase_node(node)
        del parts[node]
    return Expert(graph, tuple(parts[n] for n in graph.find_nodes(op="placeholder") if n in parts))
