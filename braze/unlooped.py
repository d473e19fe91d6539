"""The forward of a module without its loop over experts: what one expert does to a row, mapped over rows and weighted.

    out[t] = sum_j w[t, j] F_ids[t, j](x[t])            rows that gather their experts' parts of stacked parameters, or
    out[t] = sum_e (sum_j [ids[t, j] = e] w[t, j]) F_e(x[t])        expert by expert, where each has parameters of its own

and with F(w x) for w F(x) where the weight is on the expert's input.

A compiled graph holds either, and the passes make one call of it; neither copies a parameter.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from braze.one_expert import Part

#: What an id past the last expert does: it must not occur, or it adds nothing.
Past = Literal["fails", "nothing"]


def whole(module: nn.Module, part: Part) -> Tensor:
    """The parameter or buffer of a part, as it is now."""
    found: Tensor = attrgetter(part.name)(module)
    return found if found.shape == part.shape else found.view(part.shape)


@dataclass(frozen=True, eq=False)
class Unlooped:
    """A method (x [T, H] or [B, S, H], ids and weights [T, k]) -> as the loop's.

    one: what an expert does, (row [1, H], *parts) -> [1, H]. parts: of each expert; read at each call, so that none goes stale.
    stacked: whether a part of all experts is one parameter [experts, ...]. rest: what experts without parts do, which come
    after those. by_mask: whether a mask [T, k, experts] stands for the ids.
    on_input: whether the weight multiplies x; F(0) is 0 then, and a token's ids differ unless experts are stacked.
    batched_result: whether the result is [x.shape[0], ., H] whatever x was.

    Called outside of a compiled graph, and where gradients are recorded, it is the loop: a graph that keeps intermediates for a
    backward pass is not fused, and rows that gather weights would cost more than the loop.
    """

    module: nn.Module
    method: str
    one: fx.GraphModule
    parts: tuple[tuple[Part, ...], ...]
    stacked: bool
    past: Past = "fails"
    rest: fx.GraphModule | None = None
    by_mask: bool = False
    on_input: bool = False
    batched_result: bool = False
    #: Whether `one` takes one row at a time, since it views it in other shapes; told once, not in a graph.
    row_wise: bool = field(init=False)

    def __post_init__(self) -> None:
        views = self.one.graph.find_nodes(op="call_function", target=torch.ops.aten.reshape.default)
        object.__setattr__(self, "row_wise", bool(views))

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not torch.compiler.is_compiling():
            return getattr(type(self.module), self.method)(self.module, x, ids, weights)  # type: ignore[no-any-return]
        return self.compute(x, ids, weights, self.parameters())

    @property
    def experts(self) -> int:
        return len(self.parts)

    def of(self, module: nn.Module) -> "Unlooped":
        """The same for another module of the class."""
        return replace(self, module=module)

    def parameters(self) -> list[Any]:
        """For each part: [experts, ...] where stacked, else a list of the experts'."""
        if self.stacked:
            return [whole(self.module, p)[: self.experts] for p in self.parts[0]]
        return [list(map(self._part, same)) for same in zip(*self.parts, strict=True)]

    def _part(self, part: Part) -> Tensor:
        found = whole(self.module, part)
        return found if part.index is None else found[part.index]

    def compute(self, x: Tensor, ids: Tensor, weights: Tensor, parameters: Sequence[Any]) -> Tensor:
        """The result, from what `parameters` gives."""
        hidden = x.shape[-1]
        flat = x.reshape(-1, hidden)
        tokens = flat.shape[0]
        if self.by_mask:
            number = torch.arange(ids.shape[-1], device=ids.device)
            weights = weights.reshape(tokens, -1) * ids.any(-1).reshape(tokens, -1)
            ids = (ids * number).sum(-1)
        slots = ids.shape[-1]
        ids, weights = ids.reshape(tokens, slots), weights.reshape(tokens, slots)
        y = (self._rows if self.stacked else self._in_turn)(flat, ids, weights, parameters)
        if self.rest is not None:
            others = torch.where(ids < self.experts, 0.0, weights).sum(1, keepdim=True)
            y = y + torch.vmap(self.rest)(flat.unsqueeze(1)).squeeze(1) * others
        return y.to(x.dtype).reshape((x.shape[0], -1, hidden) if self.batched_result else x.shape)

    def _rows(self, x: Tensor, ids: Tensor, weights: Tensor, stacks: Sequence[Tensor]) -> Tensor:
        tokens, slots = ids.shape
        if self.past != "fails" or self.rest is not None:
            here = ids < self.experts
            ids, weights = torch.where(here, ids, 0), torch.where(here, weights, 0.0)
        which = ids.flatten()
        rows, own = x.repeat_interleave(slots, 0), weights.flatten().unsqueeze(1)
        if self.on_input:
            rows = (rows * own).to(x.dtype)
        rows = rows.unsqueeze(1)
        y: Tensor = torch.vmap(self.one)(rows, *(s[which] for s in stacks)).reshape(-1, x.shape[-1])
        return (y if self.on_input else y * own).view(tokens, slots, -1).sum(1)

    def _in_turn(self, x: Tensor, ids: Tensor, weights: Tensor, lists: Sequence[Sequence[Tensor]]) -> Tensor:
        out = torch.zeros_like(x)
        per_row = torch.vmap(self.one, in_dims=(0, *(None for _ in self.parts[0])))
        for e, parts in enumerate(zip(*lists, strict=True)):
            own = torch.where(ids == e, weights, 0.0).sum(1, keepdim=True)
            rows = (x * own).to(x.dtype) if self.on_input else x
            y = per_row(rows.unsqueeze(1), *parts).squeeze(1) if self.row_wise else self.one(rows, *parts)
            out = out + (y if self.on_input else y * own)
        return out


@dataclass(frozen=True, eq=False)
class Routed:
    """(x [B, S, H] or [T, H]) -> as a layer with its router and its loop over experts in one forward.

    router: (row, *parts) -> (ids, weights). experts: its loop. after: (row, y, *parts) -> what the layer returns, where it
    `returns` a tuple with None for what is none, otherwise a tensor. kind: x's number of dimensions and dtype. batched: for
    each result, whether x's first dimensions are its own, otherwise all tokens are one.

    Outside of a compiled graph, where gradients are recorded, in training, under autocast, and with other arguments, it is the
    loop.
    """

    module: nn.Module
    router: fx.GraphModule
    router_parts: tuple[Part, ...]
    experts: Unlooped
    after: fx.GraphModule
    after_parts: tuple[Part, ...]
    returns: tuple[bool, ...] | None
    kind: tuple[int, torch.dtype]
    batched: tuple[bool, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() or not torch.compiler.is_compiling() or not self._takes(args, kwargs):
            return type(self.module).forward(self.module, *args, **kwargs)
        return self.compute(args[0])

    def _takes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if len(args) != 1 or kwargs or self.module.training:
            return False
        x: Tensor = args[0]
        return (x.ndim, x.dtype) == self.kind and not torch.is_autocast_enabled(x.device.type)

    def of(self, module: nn.Module) -> "Routed":
        """The same for another module of the class."""
        return replace(self, module=module, experts=self.experts.of(module))

    def compute(self, x: Tensor) -> Any:
        """What the layer returns for x."""
        flat = x.reshape(-1, x.shape[-1])
        ids, weights = self._apply(self.router, self.router_parts, flat)
        rows = flat.shape[0]
        ids, weights = ids.reshape(rows, -1), weights.reshape(rows, -1)
        y = self.experts.compute(flat, ids, weights, self.experts.parameters())
        results = iter(self._apply(self.after, self.after_parts, flat, y))
        shapes = iter(self.batched)
        if self.returns is None:
            return self._shaped(next(results), x, next(shapes))
        return tuple(self._shaped(next(results), x, next(shapes)) if there else None for there in self.returns)

    def _shaped(self, result: Tensor, x: Tensor, batched: bool) -> Tensor:
        return result.reshape(*x.shape[:-1], -1) if batched else result.reshape(x.numel() // x.shape[-1], -1)

    def _apply(self, code: fx.GraphModule, parts: Sequence[Part], *rows: Tensor) -> Sequence[Tensor]:
        return code(*rows, *(whole(self.module, p) for p in parts))  # type: ignore[no-any-return]
