"""Which tensors hold no negative numbers, as far as the ops that made them tell: scores of a softmax, their parts and sums."""

import operator

import torch
from torch import fx

aten = torch.ops.aten

_ALWAYS = (
    aten.exp.default,
    aten.sigmoid.default,
    aten.abs.default,
    aten.relu.default,
    aten._softmax.default,
    aten.sqrt.default,
)
#: Not negative where no operand is.
_KEPT = (
    aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.sum.dim_IntList, aten.amax.default, aten.topk.default, aten.max.dim,
    aten.gather.default, aten.select.int, aten.slice.Tensor, aten.maximum.default, aten.reshape.default, aten.view.default,
    aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default, aten.clone.default, aten.log1p.default,
    torch.ops.prims.convert_element_type.default, operator.getitem,
)  # fmt: skip


def nonnegative(node: fx.Node, depth: int = 64) -> bool:
    """Whether no element can be negative; False where that is not known."""
    if node.target in _ALWAYS:
        return True
    if not depth:
        return False
    low = node.args[1] if node.target is aten.clamp_min.default else -1
    if isinstance(low, int | float) and low >= 0:
        return True
    if node.target not in _KEPT and node.target is not aten.clamp_min.default:
        return False
    numbers = [a for a in node.args[:2] if isinstance(a, int | float) and node.target in _KEPT[:3]]
    return all(n >= 0 for n in numbers) and all(
        nonnegative(n, depth - 1) for n in node.all_input_nodes if _is_floating(n)
    )


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or value.is_floating_point()
