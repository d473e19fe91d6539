"""Loops over the experts that were hit become one gathered computation, which a graph can hold.

What one expert does to one row (braze.one_expert), mapped over rows that gather their own parts of the parameters, weighted and
added up per token, is the module again, whatever its loop was. The two are compared before one takes the other's place.
"""

import copy
import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from braze import ops as _ops  # noqa: F401  (registers the semantic ops)
from braze.lowering import inductor
from braze.one_expert import Expert, NoExpert, trace
from braze.passes import pipeline

log = logging.getLogger("braze")

#: What an id past the last expert does: it must not occur, or it adds nothing.
Past = Literal["fails", "nothing"]

MAX_EXPERTS = 1024
#: A module with more parameters than this is compared in its own dtype, without a copy in float64.
MAX_COPY = 2**26

_SIGNS = ("nonzero(", ".tolist(", ".item(", ".any(", "where(", "unique(")


class KeepsLoop(Exception):
    """Why a module's loop stays."""


@dataclass(frozen=True)
class Stack:
    """A parameter of all experts, viewed with `shape`."""

    name: str
    shape: tuple[int, ...]

    def of(self, module: nn.Module, experts: int) -> Tensor:
        """[experts, ...]."""
        return module.get_parameter(self.name).view(self.shape)[:experts]


@dataclass(frozen=True, eq=False)
class Gathered:
    """The forward of `module` without its loop: x [T, H] or [B, S, H], ids and weights [T, k] -> as the loop's.

    one: what an expert does, (row [1, H], *parts) -> [1, H]. The parameters are read at each call, so that none goes stale.
    batched_result: whether the result is [x.shape[0], ., H] whatever x was.
    """

    module: nn.Module
    one: fx.GraphModule
    stacks: tuple[Stack, ...]
    experts: int
    past: Past
    batched_result: bool = False

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self.compute(x, ids, weights, *(s.of(self.module, self.experts) for s in self.stacks))

    def compute(self, x: Tensor, ids: Tensor, weights: Tensor, *stacks: Tensor) -> Tensor:
        """The result from parameters [experts, ...]."""
        hidden = x.shape[-1]
        flat = x.reshape(-1, hidden)
        tokens, slots = flat.shape[0], ids.shape[-1]
        own = weights = weights.reshape(tokens, slots)
        expert = ids = ids.reshape(tokens, slots)
        if self.past != "fails":
            own = torch.where(ids < self.experts, weights, 0.0)
            expert = torch.where(ids < self.experts, ids, 0)
        which = expert.flatten()
        rows = flat.repeat_interleave(slots, 0).unsqueeze(1)
        y: Tensor = torch.vmap(self.one)(rows, *(s[which] for s in stacks)).reshape(-1, hidden)
        y = (y * own.flatten().unsqueeze(1)).view(tokens, slots, hidden).sum(1)
        return y.to(x.dtype).reshape((x.shape[0], -1, hidden) if self.batched_result else x.shape)


def is_loop(module: nn.Module) -> bool:
    """Whether the forward of `module` is its own, takes (x, ids, weights) and looks at values to decide what to run."""
    forward = type(module).forward
    if "forward" in vars(module) or hasattr(forward, "__wrapped__") or next(module.parameters(), None) is None:
        return False
    try:
        source, parameters = inspect.getsource(forward), inspect.signature(forward).parameters
    except (OSError, TypeError, ValueError):
        return False
    return len(parameters) == 4 and any(sign in source for sign in _SIGNS)


def gathered(module: nn.Module) -> Gathered:
    """The module's computation without its loop, compared with it; KeepsLoop with the reason where there is none."""
    hidden, first = _first(module)
    experts, past = [first], "fails"
    for e in range(1, MAX_EXPERTS):
        try:
            found = trace(module, e, hidden)
        except (NoExpert, RuntimeError, IndexError, ValueError, KeyError):
            break
        if found is None:
            past = "nothing"
            break
        if not found.parts:
            raise KeepsLoop(f"expert {e} has no parameters: no site covers experts of two kinds yet")
        if found.text != first.text:
            raise KeepsLoop(f"expert {e} does not compute what expert 0 does")
        experts.append(found)
    one = fx.GraphModule(nn.Module(), first.code)
    made = Gathered(module, one, _stacks(experts), len(experts), past)  # type: ignore[arg-type]
    made = _compared(made)
    if not _fuses(made):
        raise KeepsLoop("its products are not recognised, and rows that gather weights would cost more than the loop")
    return made


def _fuses(made: Gathered) -> bool:
    """Whether the passes make an expert site of it, on a graph of a few tokens."""
    like = next(made.module.parameters())
    x = torch.ones(6, _hidden(made), dtype=like.dtype, device=like.device)
    ids = torch.zeros(6, 2, dtype=torch.int64, device=like.device)
    stacks = [s.of(made.module, made.experts).detach() for s in made.stacks]
    trace_ = make_fx(made.compute, decomposition_table=dict(inductor.decompositions()), tracing_mode="fake")
    with torch.no_grad():
        graph = trace_(x, ids, torch.ones_like(ids, dtype=like.dtype), *stacks).graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default  # as in the graphs that the passes see
    graph.eliminate_dead_code()  # decompositions leave casts behind, which would look like other uses
    with inductor.no_modes():
        result = pipeline.run(graph, disable=("rope", "router"))
    return any(finding.kind == "moe" for _, finding in result.calls)


def without_loops(model: nn.Module) -> None:
    """Replaces the loops over experts in `model`, each by what computes the same and can be captured in one graph.

    A class of transformers that can switch its experts' implementation does so; another loop's forward is set on its instance,
    and `del module.forward` brings it back. What stays as it was is told in the log.
    """
    for name, module in model.named_modules():
        if _is_eager(module):
            module.config._experts_implementation = "grouped_mm"
            log.info("%s: experts implementation grouped_mm instead of eager", name)
        elif is_loop(module):
            try:
                module.forward = gathered(module)  # type: ignore[method-assign]
            except KeepsLoop as e:
                log.warning("%s keeps its loop over experts: %s", name, e)
            else:
                log.info("%s: its loop over experts became gathered products", name)


def _is_eager(module: nn.Module) -> Any:
    """Whether the module is of a class of transformers with a choice, and its choice is the loop."""
    decorated = hasattr(type(module).forward, "__wrapped__") and hasattr(module, "is_transposed")
    return decorated and getattr(getattr(module, "config", None), "_experts_implementation", None) == "eager"


def _first(module: nn.Module) -> tuple[int, Expert]:
    """The size of a row, tried out among the sizes of the parameters, and what the first expert does to one."""
    sizes = [getattr(module, "hidden_size", None), *(s for p in module.parameters() for s in reversed(p.shape))]
    reason = "its forward does not run on one row"
    for hidden in dict.fromkeys(s for s in sizes if isinstance(s, int)):
        try:
            found = trace(module, 0, hidden)
        except (RuntimeError, IndexError, ValueError, TypeError, KeyError, AttributeError):
            continue
        except NoExpert as e:
            reason = str(e)
            continue
        if found is not None and found.parts:
            return hidden, found
    raise KeepsLoop(reason)


def _stacks(experts: Sequence[Expert]) -> tuple[Stack, ...]:
    stacks = []
    for parts in zip(*(e.parts for e in experts), strict=True):
        names = tuple(p.name for p in parts)
        if all(p.index == e for e, p in enumerate(parts)) and len({(p.name, p.shape) for p in parts}) == 1:
            stacks.append(Stack(names[0], parts[0].shape))
        elif all(p.index is None for p in parts) and len(set(names)) == len(names):
            raise KeepsLoop(
                f"each expert has a parameter of its own ({names[0]}): stacking them would copy them at each call"
            )
        else:
            raise KeepsLoop(f"experts take their parts of {names[0]} in no order")
    return tuple(stacks)


def _compared(made: Gathered) -> Gathered:
    """`made`, with the shape of result that the loop has; KeepsLoop where the two do not compute the same."""
    module = made.module
    small = sum(p.numel() for p in module.parameters()) <= MAX_COPY
    module = copy.deepcopy(module).double() if small else module
    like = next(module.parameters())
    rng = torch.Generator().manual_seed(1)
    hidden = _hidden(made)
    ids = torch.stack([torch.randperm(made.experts, generator=rng)[:2] for _ in range(6)])
    weights = torch.randn(ids.shape, generator=rng).to(like)
    reason = "its forward takes neither [tokens, hidden] nor [batch, tokens, hidden]"
    shapes: set[bool] = set()
    for shape in ((6, hidden), (2, 3, hidden)):
        x = torch.randn(shape, generator=rng).to(like)
        try:
            with torch.no_grad():
                expected: Any = type(module).forward(module, x, ids.to(like.device), weights)
        except (RuntimeError, IndexError, ValueError):
            continue
        got = Gathered(module, made.one, made.stacks, made.experts, made.past)
        with torch.no_grad():
            y = got(x, ids.to(like.device), weights)
        scale = float(expected.abs().max())
        error = float((y.reshape(-1) - expected.reshape(-1)).abs().max()) / (scale or 1.0)
        tolerance = 1e-9 if like.dtype == torch.float64 else 16 * torch.finfo(like.dtype).eps
        if not scale or not error <= tolerance:
            raise KeepsLoop(f"rows gathered give another result (relative difference {error:.1e})")
        middle = expected.shape != x.shape
        if middle and expected.shape != (x.shape[0], *y.reshape(x.shape[0], -1, hidden).shape[1:]):
            raise KeepsLoop(f"its result for {shape} has shape {tuple(expected.shape)}")
        shapes.add(middle or (x.ndim == 3 and True in shapes))
    if len(shapes) != 1:
        raise KeepsLoop(reason if not shapes else "its results have no one shape")
    return Gathered(made.module, made.one, made.stacks, made.experts, made.past, shapes.pop())


def _hidden(made: Gathered) -> int:
    row = next(iter(made.one.graph.nodes))
    return int(row.meta["shape"][-1])
