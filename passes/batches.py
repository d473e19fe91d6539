"""Batched products of one batch, which Inductor makes plain ones on a GPU, as the model had them:

    unsqueeze(mm(squeeze(A), squeeze(B)))  =  bmm(A, B)

One token's products with its experts' gathered weights may be such. What no site took is made plain again.
"""

from collections.abc import Collection, Iterable

import torch
from torch import fx

from braze.passes.padding import call

aten = torch.ops.aten
_SQUEEZES = (aten.squeeze.dim, aten.squeeze.dims)


def make_batched(graph: fx.Graph, but: Collection[fx.Node]) -> list[fx.Node]:
    """The batched products that plain ones of one batch became, all but those of `but`."""
    plain = [
        n for n in graph.find_nodes(op="call_function", target=aten.mm.default) if n not in but and _is_one_batch(n)
    ]
    return [_batched(n) for n in plain]


def make_plain(products: Iterable[fx.Node]) -> None:
    """Makes plain ones again of those that are still used."""
    for product in products:
        if not product._erased and product.users:
            a, b = (call(product, aten.squeeze.dim, (factor, 0), {}) for factor in product.args)
            plain = call(product, aten.mm.default, (a, b), {})
            product.replace_all_uses_with(call(product, aten.unsqueeze.default, (plain, 0), {}))
            product.graph.erase_node(product)


def _is_one_batch(product: fx.Node) -> bool:
    widened = all(u.target is aten.unsqueeze.default and u.args[1] == 0 for u in product.users)
    return widened and all(isinstance(n, fx.Node) and _drops_one_batch(n) for n in product.args)


def _drops_one_batch(node: fx.Node) -> bool:
    if node.target not in _SQUEEZES or node.args[1] not in (0, [0]):
        return False
    of = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    return len(of) == 3 and of[0] == 1


def _batched(product: fx.Node) -> fx.Node:
    squeezed = product.all_input_nodes
    factors = tuple(n.args[0] for n in product.args)  # type: ignore[union-attr]
    batched = call(product, aten.bmm.default, factors, {})
    for user in list(product.users):
        user.replace_all_uses_with(batched)
        product.graph.erase_node(user)
    for dead in (product, *squeezed):
        if not dead.users:
            product.graph.erase_node(dead)
    return batched
