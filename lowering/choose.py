"""Which kernel runs a semantic op on this device, dtype and shape, and why."""

from typing import Any

from torch import fx

from braze.kernels.cpp import moe as cpp_moe
from braze.kernels.spec import MoeSpec


def choose_rope(call: fx.Node, forced: str) -> tuple[str, str]:
    """(kernel, why) for a `braze::rope` call."""
    return "pointwise", "fuses with its neighbours"


def choose_moe(call: fx.Node, forced: str) -> tuple[str, str]:
    """(kernel, why) for a `braze::moe` call: "cpp" keeps the call whole, "aten" opens it up."""
    args: Any = fx.node.map_arg(call.args, lambda n: n.meta["val"])
    attributes: Any = call.kwargs
    x, ids, weights, w1, w2, b1, b2 = (*args, None, None)[:7]
    if forced == "aten":
        return "aten", "asked for"
    if x.device.type != "cpu":
        return (
            "aten",
            "grouped products on sorted rows, fused by Inductor around them: no kernel of braze's for this device yet",
        )
    refusal = cpp_moe.supports(x, ids, weights, w1, w2, b1, b2, MoeSpec(**attributes))
    if refusal is None:
        return (
            "cpp",
            "asked for" if forced == "cpp" else "one C++ call, rows gathered in place, each expert's weights read once",
        )
    return "aten", f"grouped products on sorted rows: the C++ kernel does not take this ({refusal})"
