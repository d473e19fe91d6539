"""One token's shared experts on CUDA: more slots of its experts' two launches.

    moe(x) + f mlp(x),   where an mlp n times as wide as an expert is n experts, which every token has with the weight f

Their weights are read beside the experts', and the sum is the one over a token's experts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from braze.kernels.spec import MoeSpec
from braze.kernels.triton import mlp as triton_mlp
from braze.kernels.triton import moe as triton_moe
from braze.kernels.triton.choose_config import choose_config
from braze.kernels.triton.weights import Shared, Weights
from braze.lowering import inductor
from braze.lowering.choose import choose_apart, choose_moe
from braze.lowering.inline import inline_all

aten = torch.ops.aten
_MOE, _APART, _MLP = (op.default for op in (torch.ops.braze.moe, torch.ops.braze.moe_apart, torch.ops.braze.mlp))
_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.alias.default}
MOST = 64  # slots

#: A node's tensor, or what of it is known.
At = Callable[[Any], Any]


@dataclass(frozen=True)
class Join:
    """total = moe + factor * mlp, of one token, whose terms nothing else reads."""

    total: fx.Node
    moe: fx.Node
    mlp: fx.Node
    factor: fx.Node | None


def find(calls: Sequence[fx.Node], forced: Mapping[str, str]) -> dict[fx.Node, Join]:
    """For each call of experts or a dense MLP that are added up and can be one: the two."""
    if {forced.get("moe", "auto"), forced.get("mlp", "auto")} - {"auto", "triton"}:
        return {}
    ones = [c for c in calls if c.target is _MLP and triton_mlp.few(c.meta["val"])]
    joins = [j for c in ones if (j := _sum(c)) is not None and _fits(j, forced.get("moe", "auto"))]
    return {call: j for j in joins for call in (j.moe, j.mlp)}


def fuse(join: Join, overlap: bool) -> None:
    """Replaces the sum by the experts' launches."""
    like = join.total.meta["val"]
    calls = (join.moe, join.mlp)
    inputs = list(dict.fromkeys(n for c in calls for n in c.all_input_nodes))
    inputs += [] if join.factor is None or join.factor in inputs else [join.factor]

    def body(*tensors: Tensor) -> tuple[Tensor]:
        found = dict(zip(inputs, tensors, strict=True))
        x, ids, weights, first, second, spec = _experts(join.moe, found.__getitem__)
        out = triton_moe.launch(
            x, ids, weights, first, second, None, None, spec, None, x.new_empty(x.shape, dtype=like.dtype),
            shared=_shared(join, found.__getitem__), start=inductor.start, overlap=overlap,
        )  # fmt: skip
        return (out.view(like.shape),)

    inline_all([join.total], inputs, body, inductor.decompositions())
    join.moe.graph.eliminate_dead_code()


def _sum(mlp: fx.Node) -> Join | None:
    """The sum of this MLP, times a number or not, and experts."""
    node, factor = mlp, None
    while (user := _only_user(node)) is not None:
        others = [a for a in user.args if a is not node]
        other = others[0] if len(others) == 1 and isinstance(others[0], fx.Node) else None
        if user.target is aten.add.Tensor and other is not None and not user.kwargs:
            moe = _behind_views(other)
            same = moe is not None and moe.target in (_MOE, _APART) and _root(moe.args[0]) is _root(mlp.args[0])
            return Join(user, moe, mlp, factor) if moe is not None and same else None
        if user.target is aten.mul.Tensor and other is not None and factor is None and other.meta["val"].numel() == 1:
            factor = other
        elif user.target not in _VIEWS:
            return None
        node = user
    return None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _behind_views(node: fx.Node) -> fx.Node | None:
    """What a node is a view of, where nothing else reads either."""
    while node.target in _VIEWS and len(node.users) == 1:
        node = node.args[0]  # type: ignore[assignment]
    return node if len(node.users) == 1 else None


def _root(node: Any) -> Any:
    while node.target in _VIEWS:
        node = node.args[0]
    return node


def _fits(join: Join, forced: str) -> bool:
    """Whether the kernels take both at once."""
    kernel, _ = choose_moe(join.moe, forced) if join.moe.target is _MOE else choose_apart(join.moe)
    x, ids, _, first, second, spec = _experts(join.moe, _known)
    mlp: Any = join.mlp.kwargs
    other = MoeSpec(**mlp)
    biases = [*join.moe.args[5 if join.moe.target is _MOE else 6 :], *join.mlp.args[3:]]
    alike = (spec.activation, spec.layout) == (other.activation, other.layout) and spec.layout == "halves"
    if kernel != "triton" or not alike or any(biases):
        return False
    shared = _shared(join, _known)
    if spec.transposed:
        first, second = first.transposed(), second.transposed()
    inner, wide = second.each.shape[2], shared.down.shape[1]
    each = [w for w in (first.each, first.up, second.each) if w is not None]
    tensors = [*each, shared.gate, shared.up, shared.down]
    size = x.element_size()
    sizes = [inner, *(s for t in tensors for s in (t.storage_offset(), *t.stride()[:-1]))]
    return (
        join.total.meta["val"].dtype in triton_moe.DTYPES
        and all(t.dtype == x.dtype and t.stride(-1) == 1 for t in tensors)
        and shared.gate.stride(0) == shared.up.stride(0) == first.each.stride(1)
        and wide % inner == 0
        and ids.shape[1] + wide // inner <= MOST
        and all(isinstance(s, int) and s * size % 16 == 0 for s in sizes)  # pointers that are chosen among are aligned
        and choose_config(triton_moe.problem(x, ids.shape[1], first, second, spec)).rows == 1
    )


def _known(node: Any) -> Any:
    return node.meta["val"]


def _experts(call: fx.Node, at: At) -> tuple[Tensor, Tensor, Tensor, Weights, Weights, MoeSpec]:
    """A call's x, ids, weights, and weights of both products, as `triton_moe.launch` takes them."""
    count = 5 if call.target is _MOE else 6
    x, ids, weights, *given, down = (at(n) for n in call.args[:count])
    attributes: Any = call.kwargs
    return x, ids, weights, Weights(*given), Weights(down), MoeSpec(**attributes)


def _shared(join: Join, at: At) -> Shared:
    attributes: Any = join.mlp.kwargs
    first: Any = join.mlp.args[1]
    parts, down = [at(w) for w in first], at(join.mlp.args[2])
    if attributes.get("transposed", False):
        parts, down = [w.t() for w in parts], down.t()
    gate, up = parts if len(parts) == 2 else parts[0].chunk(2)
    return Shared(gate, up, down, None if join.factor is None else at(join.factor))
