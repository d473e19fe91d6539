"""Where a layer's forward chooses experts and weighs them, told from one token's operations.

The choice is the last top-k; where there is none, a sort whose first results are taken, or largest elements found one after
the other. Its weights are the last values of a slot each that follow from the chosen ids or values before a row is multiplied,
or the last scores of an expert each (those not chosen are zero), where only these are normalised.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from braze.one_expert import NoExpert, storage

_PICKS = ("gather", "index", "index_select", "take_along_dim")
_PARTS = ("select", "slice", "unbind", "split", "split_with_sizes", "narrow")
_FIRST = ("max", "argmax")


@dataclass(frozen=True)
class Choice:
    """Where a layer's forward chooses, as numbers of operations in their order: what chooses, what has the k ids, and what
    makes the weights. scores: these are of all experts, not of the chosen ones. kind: topk, sort or max."""

    tops: tuple[int, ...]
    ids: int
    weights: int
    k: int
    experts: int
    scores: bool = False
    kind: str = "topk"


def ids_of(name: str, out: Any) -> Tensor:
    """The ids among the results of what chooses."""
    return out if name == "argmax" else out[1]  # type: ignore[no-any-return]


@dataclass
class _Chooser:
    """An operation that may choose: its number, how many experts it has, and how many of its ids are taken (0: none)."""

    at: int
    name: str
    ids: Tensor
    experts: int
    taken: int


class _Choosers(TorchDispatchMode):  # type: ignore[misc]
    """Runs a layer and notes what may choose."""

    def __init__(self) -> None:
        super().__init__()
        self.count = -1
        self.found: list[_Chooser] = []
        self.alive: list[Any] = []  # as when it is recorded: PyTorch runs other operations where results are not kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += 1
        self.alive += [out, args]
        name = func.overloadpacket.__name__
        given = {id(a) for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
        for chooser in self.found:
            if id(chooser.ids) in given and not chooser.taken:
                part = chooser.name == "sort" and isinstance(out, Tensor) and out.numel() < chooser.experts
                chooser.taken = out.numel() if part else int(chooser.name != "sort")
        if name == "topk":
            self.found.append(_Chooser(self.count, name, out[1], args[0].shape[-1], out[1].numel()))
        elif name in ("sort", *_FIRST) and self._of_one_row(func, args, kwargs or {}):
            self.found.append(_Chooser(self.count, name, ids_of(name, out), args[0].numel(), 0))
        return out

    @staticmethod
    def _of_one_row(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether it has the largest first, or alone, of one row of scores."""
        x = args[0]
        names = [a.name for a in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        if "dim" not in names or not x.is_floating_point() or x.ndim == 0:
            return False
        dim = given.get("dim", -1)
        largest = "descending" not in names or bool(given.get("descending"))
        return largest and dim in (-1, x.ndim - 1) and x.numel() == x.shape[-1] > 1


def _choice(found: list[_Chooser]) -> Choice:
    """Of what may choose, what does; its ids are not known to be together yet."""
    taken = [c for c in found if c.taken]
    firsts = [c for c in taken if c.name in _FIRST]
    ways = {name: [c for c in taken if c.name == name][-1:] for name in ("topk", "sort")}
    ways["max"] = [c for c in firsts if c.experts == firsts[-1].experts]
    for kind, tops in ways.items():
        if tops:
            last, k = tops[-1], sum(c.taken for c in tops)
            return Choice(tuple(c.at for c in tops), last.at, last.at, k, last.experts, kind=kind)
    raise NoExpert("it has no top-k")


class _Scout(TorchDispatchMode):  # type: ignore[misc]
    """Runs a layer and follows what it has chosen to its weights."""

    def __init__(self, choice: Choice) -> None:
        super().__init__()
        self.count = -1
        self.found = choice
        self.begun = False  # whether the weights were used
        self.together = False  # whether the k ids are
        self.wide = choice.kind == "sort"  # whether values are of all experts, of which the first are taken
        self.ids: set[int] = set()
        self.weights: set[int] = set()
        self.scores: set[int] = set()  # of an expert each
        self.alive: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += 1
        self.alive += [out, args]
        name = func.overloadpacket.__name__
        if self.count in self.found.tops:
            self._take_ids(ids_of(name, out))
            self.weights |= {id(out[0])} if name != "argmax" else set()
            return out
        given = {id(a) for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
        sources = tuple(bool(known & given) for known in (self.ids, self.weights, self.scores))
        for part in tree_leaves(out) if any(sources) else ():
            if isinstance(part, Tensor):
                self._follow(name, args, part, *sources)
        return out

    def _take_ids(self, ids: Tensor) -> None:
        self.ids.add(id(ids))
        if not self.together and self.count >= self.found.tops[-1] and ids.numel() == self.found.k:
            self.together = True
            self.found = replace(self.found, ids=self.count)

    def _follow(self, name: str, args: Any, out: Tensor, of_ids: bool, of_weights: bool, of_scores: bool) -> None:
        k, experts = self.found.k, self.found.experts
        if not out.is_floating_point():
            if of_ids:
                self._take_ids(out)
            return
        if self.begun:
            return
        picked, computed = name in _PICKS, name.endswith("_") or not _is_view(out, args)
        if out.numel() == experts != k and not (picked and of_weights):
            self.scores.add(id(out))
            if computed and not name.startswith("scatter"):
                self.found = replace(self.found, weights=self.count, scores=True)
        elif ((picked or of_ids) and of_weights) or out.numel() > max(k, 0 if not of_scores else k * experts):
            self.begun = of_weights or of_scores  # a row's own weight, or a row times it
        elif of_scores and not of_weights and name in _PARTS + _PICKS and not of_ids:
            self.begun = True  # an expert's own
        elif of_weights or (of_ids and picked) or (of_scores and name in ("sum", "max", "amax", "gather")):
            self.weights.add(id(out))
            if out.numel() == k and (computed or self.wide):
                self.wide = False
                self.found = replace(self.found, weights=self.count, scores=False)


def _is_view(out: Tensor, args: Iterable[Any]) -> bool:
    return any(isinstance(a, Tensor) and storage(a) == storage(out) for a in args)


def scout(run: Callable[[], object]) -> Choice:
    """Where the layer that `run` runs chooses; NoExpert where it does not."""
    with torch.no_grad(), _Choosers() as choosers:
        run()
    with torch.no_grad(), _Scout(_choice(choosers.found)) as found:
        run()
    if not found.together:
        raise NoExpert("it has no top-k whose ids are in one tensor")
    choice: Choice = found.found
    return choice
