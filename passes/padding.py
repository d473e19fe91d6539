"""Products that Inductor padded for alignment on a GPU, as the model had them: [A 0] [B; 0], cut to the size of A B, is A B.

Each operand padded for itself would hide that products read the same tensor. What no site took is padded again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
_PAD = aten.constant_pad_nd.default
#: product -> where its two factors are among its arguments
_FACTORS = {aten.mm.default: (0, 1), aten.bmm.default: (0, 1), aten.addmm.default: (1, 2)}


@dataclass(frozen=True)
class Padded:
    """product: without padding. pads: of its factors, as constant_pad_nd takes them. cuts: arguments of the slices after it.
    zeros: how aten.full made what its bias ended in, where that was padded too."""

    product: fx.Node
    pads: tuple[Sequence[int], Sequence[int]]
    cuts: tuple[tuple[Any, ...], ...]
    zeros: tuple[tuple[Any, ...], dict[str, Any]] | None


def unpad(graph: fx.Graph) -> list[Padded]:
    """Takes padding with zeros, and the cut after it, off each product that has both."""
    found = []
    for target in _FACTORS:
        for product in graph.find_nodes(op="call_function", target=target):
            without = _without(product)
            if without is not None:
                found.append(without)
    if found:
        graph.eliminate_dead_code()  # the padded ones would look like other uses
    return found


def pad_again(padded: Sequence[Padded]) -> None:
    """Puts padding and cut back where the product is still used."""
    for p in padded:
        if not p.product._erased and p.product.users:
            _pad(p)


def _without(product: Any) -> Padded | None:
    places = _FACTORS[product.target]
    (a, a_pad), (b, b_pad) = (_unpadded(product.args[i]) for i in places)
    if not any((*a_pad, *b_pad)) or a_pad[1] != b_pad[3] or any((*a_pad[4:], *b_pad[4:])):
        return None
    size = [a.meta["val"].shape[-2], b.meta["val"].shape[-1]]
    cuts: list[tuple[Any, ...]] = []
    last: Any = product
    while list(last.meta["val"].shape[-2:]) != size:
        user = next(iter(last.users), None)
        if len(last.users) != 1 or user is None or user.target is not aten.slice.Tensor or len(cuts) == 2:
            return None
        cuts.append(user.args[1:])
        last = user
    if any(cut[1:2] not in ((0,), (None,)) or cut[3:] not in ((), (1,)) for cut in cuts):
        return None
    args: list[Any] = list(product.args)
    zeros = None
    for place, factor in zip(places, (a, b), strict=True):
        args[place] = factor
    if product.target is aten.addmm.default and args[0].meta["val"].shape[-1] not in (1, size[1]):
        parts: Any = args[0].args[0] if args[0].target is aten.cat.default and args[0].meta["val"].ndim == 1 else ()
        if len(parts) != 2 or parts[0].meta["val"].shape[0] != size[1] or not _zero(parts[1]):
            return None
        args[0], zeros = parts[0], (parts[1].args, dict(parts[1].kwargs))
    made = call(last, product.target, tuple(args), product.kwargs)
    last.replace_all_uses_with(made)
    return Padded(made, (a_pad, b_pad), tuple(cuts), zeros)


def _zero(node: fx.Node) -> bool:
    return node.target is aten.full.default and bool(node.args[1] == 0)


def _unpadded(factor: Any) -> tuple[fx.Node, Sequence[int]]:
    """A factor without the zeros at its ends, and how many it had: (0, last dimension, 0, the one before ...)."""
    none = [0] * (2 * factor.meta["val"].ndim)
    if factor.target is not _PAD or (factor.args[2:] and factor.args[2] != 0) or factor.kwargs.get("value", 0) != 0:
        return factor, none
    source, pad = factor.args[0], list(factor.args[1])
    pad += none[len(pad) :]
    if any(not isinstance(n, int) or n < 0 for n in pad) or any(pad[::2]):
        return factor, none
    return source, pad


def _pad(p: Padded) -> None:
    product: Any = p.product
    args: list[Any] = list(product.args)
    for place, pad in zip(_FACTORS[product.target], p.pads, strict=True):
        if any(pad):
            args[place] = call(product, _PAD, (args[place], pad), {})
    if p.zeros is not None:
        zeros = call(product, aten.full.default, *p.zeros)
        args[0] = call(product, aten.cat.default, ([args[0], zeros],), {})
    last = call(product, product.target, tuple(args), product.kwargs)
    for cut in p.cuts:
        last = call(product, aten.slice.Tensor, (last, *cut), {})
    product.replace_all_uses_with(last)
    product.graph.erase_node(product)


def call(before: fx.Node, target: Any, args: tuple[Any, ...], kwargs: Any) -> fx.Node:
    """A node ahead of `before`, from the same place of the model."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, kwargs)
    values = fx.node.map_arg(args, lambda n: n.meta["val"])
    with before.meta["val"].fake_mode:
        node.meta = {**before.meta, "val": target(*values, **kwargs)}
    return node
