"""Which kernel runs a semantic op on this device, dtype and shape, and why."""

from torch import fx


def choose_rope(call: fx.Node, forced: str) -> tuple[str, str]:
    """(kernel, why) for a `braze::rope` call."""
    return "pointwise", "fuses with its neighbours"


def choose_moe(call: fx.Node, forced: str) -> tuple[str, str]:
    """(kernel, why) for a `braze::moe` call."""
    return "aten", "grouped products on sorted rows, fused by Inductor around them"
