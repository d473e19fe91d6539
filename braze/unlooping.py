"""A loop over the experts that were hit becomes one computation that a graph can hold (braze.unlooped).

What one expert does to one row (braze.one_expert), mapped over rows, weighted and added up per token, is the module again,
whatever its loop was. The two are compared before one takes the other's place, and it must be fused.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map

from braze import ops as _ops  # noqa: F401  (registers the semantic ops)
from braze.lowering import inductor
from braze.one_expert import Expert, Form, NoExpert, Part, trace
from braze.passes import pipeline
from braze.unlooped import Past, Unlooped

MAX_EXPERTS = 1024
#: More experts with parameters of their own than this are left in their loop: as many products would make a large graph.
MAX_IN_TURN = 256
#: A module with more parameters than this is compared in its own dtype, without a copy in float64.
MAX_COPY = 2**26


class KeepsLoop(Exception):
    """Why a module's loop stays."""


class ChoosesNone(KeepsLoop):
    """Why a module, whatever it loops over, chooses no experts for a token."""


def small(module: nn.Module) -> bool:
    """Whether a copy in another dtype is made for a comparison."""
    return sum(p.numel() for p in module.parameters()) <= MAX_COPY


def unlooped(module: nn.Module, method: str = "forward") -> Unlooped:
    """The method's computation without its loop, compared with it; KeepsLoop with the reason where there is none."""
    reasons = []
    for form in get_args(Form):
        try:
            return _unlooped(module, method, form)
        except KeepsLoop as e:
            reasons.append(str(e))
    raise KeepsLoop(reasons[0])


def _unlooped(module: nn.Module, method: str, form: Form) -> Unlooped:
    hidden, first = _first(module, method, form)
    experts: list[Expert] = [first]
    past: Past = "fails"
    rest: Expert | None = None
    for e in range(1, MAX_EXPERTS):
        try:
            found = trace(module, method, e, hidden, form)
        except (NoExpert, RuntimeError, IndexError, ValueError, KeyError):
            break
        if found is None:
            past = "nothing"
            break
        if not found.parts:
            if rest is not None and found.text != rest.text:
                raise KeepsLoop(f"expert {e} has no parameters and does not compute what the others without any do")
            rest = found
            continue
        if rest is not None or found.text != first.text:
            raise KeepsLoop(f"expert {e} does not compute what expert 0 does")
        experts.append(found)
    others = None if rest is None else fx.GraphModule(nn.Module(), rest.code)
    made = made_of(module, method, experts, past, others, form == "mask")
    if made.on_input and not made.stacked:
        raise KeepsLoop("weights multiply the input of experts with parameters of their own, which ids may name twice")
    return worthwhile(_compared(made))


def made_of(
    module: nn.Module,
    method: str,
    experts: Sequence[Expert],
    past: Past = "fails",
    rest: Any = None,
    by_mask: bool = False,
) -> Unlooped:
    parts = tuple(e.parts for e in experts)
    one = fx.GraphModule(nn.Module(), experts[0].code)
    return Unlooped(module, method, one, parts, _stacked(parts), past, rest, by_mask, experts[0].on_input)


def worthwhile(made: Unlooped) -> Unlooped:
    """`made`, where it pays; KeepsLoop where not."""
    if not made.stacked and made.experts > MAX_IN_TURN:
        raise KeepsLoop(f"{made.experts} experts with parameters of their own, more than {MAX_IN_TURN}")
    reason = _unfused(made)
    if reason is not None:
        raise KeepsLoop(
            f"its products are not recognised ({reason}): computing them otherwise would cost more than the loop"
        )
    return made


def _unfused(made: Unlooped) -> str | None:
    """Why the passes make no expert site of it, on a graph of a few tokens; None where they do."""
    like = next(made.module.parameters())
    x = torch.ones(6, hidden_of(made), dtype=like.dtype, device=like.device)
    ids = torch.zeros(6, 2, dtype=torch.int64, device=like.device)
    weights = torch.ones_like(ids, dtype=like.dtype)
    given = nn.functional.one_hot(ids, made.experts) if made.by_mask else ids
    parameters = tree_map(Tensor.detach, made.parameters())

    def body(x: Tensor, ids: Tensor, *given: Any) -> Tensor:
        if made.on_input:  # which needs ids that differ
            ids = x[:, : made.experts].topk(min(2, made.experts))[1]
        return made.compute(x, ids, *given)

    trace_ = make_fx(body, decomposition_table=dict(inductor.decompositions()), tracing_mode="fake")
    with torch.no_grad():
        graph = trace_(x, given, weights, parameters).graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default  # as in the graphs that the passes see
    graph.eliminate_dead_code()  # decompositions leave casts behind, which would look like other uses
    with inductor.no_modes():
        result = pipeline.run(graph, disable=("rope", "router", "mlp"))
    if any(finding.kind == "moe" for _, finding in result.calls):
        return None
    return "; ".join(m.reason for m in result.near_misses) or "nothing came close"


def sizes(module: nn.Module) -> list[int]:
    """What a row's size may be, of the sizes of the parameters; the likeliest first."""
    sizes = [getattr(module, "hidden_size", None), *(s for p in module.parameters() for s in reversed(p.shape))]
    return list(dict.fromkeys(s for s in sizes if isinstance(s, int)))


def _first(module: nn.Module, method: str, form: Form) -> tuple[int, Expert]:
    """The size of a row, tried out, and what the first expert does to one."""
    reason = "its forward does not run on one row"
    for hidden in sizes(module):
        try:
            found = trace(module, method, 0, hidden, form)
        except (RuntimeError, IndexError, ValueError, TypeError, KeyError, AttributeError):
            continue
        except NoExpert as e:
            reason = str(e)
            continue
        if found is not None and found.parts:
            return hidden, found
    raise KeepsLoop(reason)


def _stacked(parts: Sequence[tuple[Part, ...]]) -> bool:
    """Whether each part is one parameter of all experts, in their order; KeepsLoop where it is in another."""
    stacked = set()
    for same in zip(*parts, strict=True):
        names = {p.name for p in same}
        in_order = [p.index for p in same] == list(range(len(same))) and len({p.shape for p in same}) == 1
        own = all(p.index is None for p in same) and len(names) == len(same)
        if not own and not (len(names) == 1 and in_order):
            raise KeepsLoop(f"experts take their parts of {same[0].name} in no order")
        stacked.add(not own)
    return stacked == {True}


def _compared(made: Unlooped) -> Unlooped:
    """`made`, with the shape of result that the loop has; KeepsLoop where the two do not compute the same."""
    module = copy.deepcopy(made.module).double() if small(made.module) else made.module
    like = next(module.parameters())
    rng = torch.Generator().manual_seed(1)
    hidden = hidden_of(made)
    every = made.experts + (made.rest is not None)
    ids = torch.stack([torch.randperm(every, generator=rng)[: min(2, every)] for _ in range(6)]).to(like.device)
    weights = torch.randn(ids.shape, generator=rng).to(like)
    choice = (
        nn.functional.one_hot(ids, every) * (torch.rand(6, 1, 1, generator=rng) < 0.8).to(ids) if made.by_mask else ids
    )
    reason = "its forward takes neither [tokens, hidden] nor [batch, tokens, hidden]"
    shapes: set[bool] = set()
    for shape in ((6, hidden), (2, 3, hidden)):
        x = torch.randn(shape, generator=rng).to(like)
        try:
            with torch.no_grad():
                expected: Any = getattr(type(module), made.method)(module, x, choice, weights)
        except (RuntimeError, IndexError, ValueError):
            continue
        twin = made.of(module)
        with torch.no_grad():
            y = twin.compute(x, choice, weights, twin.parameters())
        scale = float(expected.abs().max())
        error = float((y.reshape(-1) - expected.reshape(-1)).abs().max()) / (scale or 1.0)
        tolerance = 1e-9 if like.dtype == torch.float64 else 16 * torch.finfo(like.dtype).eps
        if not scale or not error <= tolerance:
            raise KeepsLoop(f"without it the result is another (relative difference {error:.1e})")
        middle = expected.shape != x.shape
        if middle and expected.shape != (x.shape[0], *y.reshape(x.shape[0], -1, hidden).shape[1:]):
            raise KeepsLoop(f"its result for {shape} has shape {tuple(expected.shape)}")
        shapes.add(middle or (x.ndim == 3 and True in shapes))
    if len(shapes) != 1:
        raise KeepsLoop(reason if not shapes else "its results have no one shape")
    return replace(made, batched_result=shapes.pop())


def hidden_of(made: Unlooped) -> int:
    """The size of a row."""
    row = next(iter(made.one.graph.nodes))
    return int(row.meta["shape"][-1])
