"""What a layer with its router and its loop over experts in one forward computes, as straight-line code for one token.

The layer runs on one token. Its last top-k is made to choose given experts, and the weights that follow from it are made 1 and
0, so that what is multiplied by the 1 is an expert's result. The code is cut there: from the row to ids and weights, from the
row to an expert's result, and from the row and the weighted sum of those to what the layer returns.
"""

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from braze.one_expert import Expert, NoExpert, Part, Recorder
from braze.scouting import Choice, ids_of, scout
from braze.unlooped import Routed
from braze.unlooping import ChoosesNone, KeepsLoop, hidden_of, made_of, sizes, small, worthwhile

aten = torch.ops.aten


@dataclass(frozen=True)
class Code:
    """(row [1, H], *others, *parts) -> tensors of one token."""

    graph: fx.Graph
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Layer:
    """router: row -> (ids, weights), k numbers each. expert: of one expert. after: (row, y [1, H]) -> the tensors that are
    returned, [1, n] each; returns: which parts of the returned tuple they are, None for a tensor alone."""

    router: Code
    expert: Expert
    after: Code
    returns: tuple[bool, ...] | None


class _Chosen(Recorder):
    """Records a layer whose router chooses an expert with weight 1, and those after it with weight 0."""

    def __init__(self, module: nn.Module, x: Tensor, choice: Choice, expert: int) -> None:
        super().__init__(module, x)
        self.row.meta["shape"] = (1, x.shape[-1])
        self.known[id(x)] = self.reshaped(self.row, x)
        self.choice, self.expert_number = choice, expert
        self.count = -1
        self.y, self.fed = self.graph.placeholder("y"), self.graph.placeholder("fed")  # a result; a row with its weight
        self.y.meta["shape"] = self.fed.meta["shape"] = self.row.meta["shape"]
        self.ids: fx.Node | None = None
        self.weights: fx.Node | None = None
        self.expert: fx.Node | None = None
        self.chosen: Tensor | None = None  # the k ids
        self.of_ids: set[int] = set()
        self.constants: set[int] = set()  # what was made from the weights
        self.forced: dict[int, fx.Node] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        out = super().__torch_dispatch__(func, types, args, kwargs)
        given = [id(a) for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        made = [o for o in tree_leaves(out) if isinstance(o, Tensor)]
        if self.of_ids.intersection(given):
            alone = not any(a in self.known and a not in self.of_ids for a in given)
            self.of_ids.update(id(o) for o in made if alone or not o.is_floating_point())
        if self.constants.intersection(given) and not any(a in self.known or a in self.held for a in given):
            self.constants.update(map(id, made))
        if self.count in self.choice.tops:
            self._choose(ids_of(func.overloadpacket.__name__, out), self.choice.tops.index(self.count))
        if self.count == self.choice.ids:
            self.chosen = next(o for o in made if not o.is_floating_point())
            self.ids = self.known[id(self.chosen)]
        if self.count == self.choice.weights:
            self._weigh(made[0])
        if self.count == max(self.choice.weights, self.choice.ids):
            self._settle()
        return out

    def _choose(self, ids: Tensor, first: int) -> None:
        experts = [(self.expert_number + first + j) % self.choice.experts for j in range(ids.numel())]
        ids.copy_(torch.tensor(experts, device=ids.device).reshape(ids.shape))
        self.of_ids.add(id(ids))

    def _weigh(self, weights: Tensor) -> None:
        size = self.choice.experts if self.choice.scores else self.choice.k
        if not weights.is_floating_point() or weights.numel() != size:
            raise NoExpert("the chosen experts' weights are in no one tensor")
        self.weights = self.known[id(weights)]
        one = self.expert_number if self.choice.scores else 0
        weights.copy_((torch.arange(size, device=weights.device) == one).reshape(weights.shape))
        self.constants = {id(weights)}
        self.forced[id(weights)] = self.known.pop(id(weights))

    def _settle(self) -> None:
        """From here on ids and weights are constants."""
        if self.ids is not None:
            self.forced[id(self.chosen)] = self.ids
        for key in self.of_ids:
            self.known.pop(key, None)

    def _weighted(self, node: fx.Node, b: Any) -> fx.Node:
        if id(b) not in self.constants:
            return node
        if not self.is_row(node):
            return self._result(node)
        self.on_input = True
        return self.fed

    def _result(self, node: fx.Node) -> fx.Node:
        if self.expert is not None or self.on_input or math.prod(node.meta["shape"]) != self.width:
            raise NoExpert("a weight is multiplied by more than one expert's result")
        self.expert = node
        return self.y

    def returned(self, value: Any) -> fx.Node:
        """What the layer returned, as a node [1, n]."""
        node = self.known.get(id(value)) or self.forced.get(id(value))
        if node is None:
            raise NoExpert("it returns what does not follow from the token")
        return self.reshaped(node, value.reshape(1, -1))


def scouted(module: nn.Module, hidden: int) -> tuple[Choice, Tensor] | None:
    """Where the layer chooses, and the token [1, H] or [1, 1, H] that its forward takes; None where it does not run so."""
    like = next(module.parameters())
    row = torch.randn(1, hidden, generator=torch.Generator().manual_seed(0)).to(like)
    for x in (row[None], row):
        try:
            return scout(lambda x=x: type(module).forward(module, x)), x  # type: ignore[misc]
        except (RuntimeError, IndexError, ValueError, TypeError, KeyError, AttributeError):
            continue
    return None


def trace(module: nn.Module, x: Tensor, choice: Choice, expert: int) -> Layer:
    """The layer's code, its expert the given one. NoExpert, or the module's own error, where there is none."""
    x = x.clone()
    with torch.no_grad(), _Chosen(module, x, choice, expert) as found:
        out = type(module).forward(module, x)
    if (found.expert is None and not found.on_input) or found.ids is None or found.weights is None:
        raise NoExpert("no weight is multiplied by an expert's result")
    if not isinstance(out, Tensor) and not (
        isinstance(out, tuple) and all(o is None or isinstance(o, Tensor) for o in out)
    ):
        raise NoExpert(f"it returns a {type(out).__name__}, not a tensor or a tuple of tensors")
    results = tuple(map(found.returned, _tensors(out)))
    if found.on_input:
        found.expert = _of_fed(found)
    parts = {node: part for part, node in found.taken.items()}
    router = _cut([found.row], (found.ids, _weights(found)), parts)
    assert found.expert is not None
    result = found.reshaped(found.expert, torch.empty(found.row.meta["shape"]))
    one = _cut([found.fed if found.on_input else found.row], result, parts)
    if found.on_input:
        found.expert.replace_all_uses_with(found.y)
        results = tuple(found.y if r is found.expert else r for r in results)
    after = _cut([found.row, found.y], results, parts)
    returns = None if isinstance(out, Tensor) else tuple(o is not None for o in out)
    return Layer(router, Expert(one.graph, one.parts, found.on_input), after, returns)


def _of_fed(found: _Chosen) -> fx.Node:
    """The last that follows from the row with its weight and from the row in no other way."""
    fed, other = {found.fed}, {found.row}
    last: fx.Node | None = None
    for node in found.graph.nodes:
        for known in (fed, other):
            if known.intersection(node.all_input_nodes):
                known.add(node)
        if node in fed and node not in other and node.meta.get("shape") == found.row.meta["shape"]:
            last = node
    if last is None or last is found.fed:
        raise NoExpert("no expert takes what a weight was multiplied by")
    return last


def _weights(found: _Chosen) -> fx.Node:
    """The weights of the chosen experts."""
    assert found.weights is not None and found.ids is not None
    if not found.choice.scores:
        return found.weights
    like = torch.empty(1, found.choice.experts)
    scores, ids = found.reshaped(found.weights, like), found.reshaped(found.ids, like[:, : found.choice.k])
    made = found.graph.call_function(aten.gather.default, (scores, 1, ids))
    made.meta["shape"] = ids.meta["shape"]
    return made


def _tensors(out: Any) -> list[Tensor]:
    """What a layer returned but for what is none."""
    return [out] if isinstance(out, Tensor) else [o for o in out if o is not None]


def _cut(inputs: list[fx.Node], output: fx.Node | tuple[fx.Node, ...], parts: dict[fx.Node, Part]) -> Code:
    """The part of a graph between inputs and output, with the parts of parameters that it needs."""
    work = list(output) if isinstance(output, tuple) else [output]
    needed = set(work)
    while work:
        for node in work.pop().all_input_nodes:
            if node not in needed:
                needed.add(node)
                work.append(node)
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    placed = inputs + [n for n in parts if n in needed]
    for node in placed:
        new[node] = graph.placeholder(node.name)
        new[node].meta["shape"] = node.meta["shape"]
    for node in inputs[0].graph.nodes:
        if node in needed and node not in new:
            if node.op == "placeholder":
                raise NoExpert("an expert takes the sum of the others' results")
            new[node] = graph.node_copy(node, lambda n: new[n])
    graph.output(fx.node.map_arg(output, lambda n: new[n]))
    return Code(graph, tuple(parts[n] for n in placed if n in parts))


def routed(module: nn.Module) -> Routed:
    """The layer's computation without its loop, compared with it; KeepsLoop with the reason where there is none."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        return _routed(module)
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        raise KeepsLoop(f"what it does to one token does not do for more: {str(error).splitlines()[0]}") from error
    finally:
        for m in training:
            m.training = True


def _routed(module: nn.Module) -> Routed:
    if any(m._forward_hooks or m._forward_pre_hooks for m in module.modules() if m is not module):
        raise KeepsLoop("its experts have hooks")
    made, choice = _built(module)
    if made.kind[1].itemsize < 4 and small(module):
        # What 16 bits tell apart is little: the same in float32 is what is compared, and that the two are the same.
        wide, _ = _built(copy.deepcopy(module).float())
        if _text(wide) != _text(made):
            raise KeepsLoop(f"in {made.kind[1]} it computes something else than in float32")
        _compared(wide, choice)
        made = _compared_as(module, made, choice)
    else:
        made = _compared(made, choice)
    worthwhile(made.experts)
    return made


def _text(made: Routed) -> list[str]:
    """A layer's code without its casts."""
    return [line for code in (made.router, made.experts.one, made.after) for line in _lines(code.graph)]


def _lines(graph: fx.Graph) -> list[str]:
    lines: list[str] = []
    name: dict[fx.Node, Any] = {}
    for n in graph.nodes:
        args = fx.node.map_arg([a for a in n.args if not isinstance(a, bool)], lambda a: name[a])
        if n.target is aten._to_copy.default:
            name[n] = args[0]
            continue
        name[n] = f"%{len(lines)}"
        lines.append(f"{n.op} {n.target} {args}")
    return lines


def _built(module: nn.Module) -> tuple[Routed, Choice]:
    """The layer's computation without its loop, not yet compared."""
    choice, x = _scouted(module)
    layers = []
    for e in range(choice.experts):
        try:
            layers.append(trace(module, x, choice, e))
        except (NoExpert, RuntimeError, IndexError, ValueError, TypeError, KeyError) as error:
            raise KeepsLoop(f"expert {e}: {str(error).splitlines()[0]}") from error
        if layers[e].expert.text != layers[0].expert.text:
            raise KeepsLoop(f"expert {e} does not compute what expert 0 does")
    first = layers[0]
    router, after = (fx.GraphModule(nn.Module(), code.graph) for code in (first.router, first.after))
    experts = made_of(module, "forward", [layer.expert for layer in layers])
    if experts.on_input and not experts.stacked and choice.kind != "topk":
        raise KeepsLoop("weights multiply the input of experts that no top-k chose, which may be chosen twice")
    kind = x.ndim, x.dtype
    return Routed(module, router, first.router.parts, experts, after, first.after.parts, first.returns, kind), choice


def _scouted(module: nn.Module) -> tuple[Choice, Tensor]:
    for hidden in sizes(module):
        try:
            found = scouted(module, hidden)
        except NoExpert as error:
            raise ChoosesNone(str(error)) from error
        if found is not None:
            return found
    raise ChoosesNone("its forward does not run on one token alone")


def _compared(made: Routed, choice: Choice) -> Routed:
    """`made`, which knows how its results lie; KeepsLoop where it does not compute what the layer does."""
    if small(made.module):
        try:
            return _compared_as(copy.deepcopy(made.module).double(), made, choice)
        except RuntimeError:  # what it computes in float32 and the rest do not go together
            pass
    return _compared_as(made.module, made, choice)


def _compared_as(module: nn.Module, made: Routed, choice: Choice) -> Routed:
    """`made`, compared by a module of the same weights in some dtype."""
    like = next(module.parameters())
    tokens = max(3, 2 * choice.experts // choice.k)
    hidden = hidden_of(made.experts)
    shape = (2, tokens, hidden) if made.kind[0] == 3 else (2 * tokens, hidden)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(like)
    before = _attributes(module)
    with torch.no_grad(), _Narrow() as narrow:
        expected = type(module).forward(module, x)
    if _attributes(module) != before:
        raise KeepsLoop("its forward sets attributes")
    wanted = _tensors(expected)
    made = replace(made, batched=tuple(_batched(t, x) for t in wanted))
    try:
        with torch.no_grad():
            got = _tensors(made.of(module).compute(x))
    except (RuntimeError, IndexError) as e:
        if module is not made.module and isinstance(e, RuntimeError):
            raise
        raise KeepsLoop(f"its code for one token does not run on many: {str(e).splitlines()[0]}") from e
    for a, b in zip(got, wanted, strict=True):
        error = _difference(a, b)
        if (a.shape, a.dtype) != (b.shape, b.dtype) or not error <= _tolerance(like.dtype, narrow.seen):
            raise KeepsLoop(f"without it the result is another (relative difference {error:.1e})")
    return made


def _difference(got: Tensor, expected: Tensor) -> float:
    """Relative to all of it, not a number where it is zero: 16 bits round single elements by more than all together."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def _batched(result: Tensor, x: Tensor) -> bool:
    if result.shape[:-1] in (x.shape[:-1], (x.numel() // x.shape[-1],)):
        return result.shape[:-1] == x.shape[:-1]
    raise KeepsLoop(f"its result for {tuple(x.shape)} has shape {tuple(result.shape)}")


def _tolerance(dtype: torch.dtype, narrow: bool) -> float:
    """Of the relative difference. narrow: parts of the layer are computed in float32 whatever it is given."""
    if dtype == torch.float64:
        return 1e-6 if narrow else 1e-9
    return (2 if dtype.itemsize < 4 else 16) * torch.finfo(dtype).eps


class _Narrow(TorchDispatchMode):  # type: ignore[misc]
    """Notes whether anything is computed in less than float64."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        dtypes = {o.dtype for o in tree_leaves(out) if isinstance(o, Tensor) and o.is_floating_point()}
        self.seen = self.seen or bool(dtypes - {torch.float64})
        return out


def _attributes(module: nn.Module) -> list[tuple[str, int]]:
    own = ("_parameters", "_buffers", "_modules")
    return [(n, id(v)) for m in module.modules() for n, v in vars(m).items() if n not in own]
