"""Gives each semantic op its kernel: left whole for a registered lowering or kernel, or opened up into ATen ops."""

from collections.abc import Mapping

from torch import fx

from braze.kernels import aten
from braze.kernels.spec import MoeSpec
from braze.lowering import inductor
from braze.lowering.choose import choose_moe, choose_rope
from braze.lowering.inline import inline


def lower(call: fx.Node, forced: Mapping[str, str]) -> tuple[str, str]:
    """(kernel, why) for one `braze::rope` or `braze::moe` call, after making the graph use it."""
    if call.target.name() == "braze::rope":  # type: ignore[union-attr]
        return choose_rope(call, forced.get("rope", "auto"))
    kernel, why = choose_moe(call, forced.get("moe", "auto"))
    if kernel == "aten":
        inline(call, _compose_moe, inductor.decompositions())
    return kernel, why


def _compose_moe(x, ids, weights, w1, w2, b1=None, b2=None, **attributes):  # type: ignore[no-untyped-def]
    return aten.moe(x, ids, weights, w1, w2, b1, b2, MoeSpec(**attributes))
