"""Which kernel runs a semantic op on this device, dtype and shape, and why."""

from typing import Any

import torch
from torch import fx

from braze.kernels import separate
from braze.kernels.cpp import mlp as cpp_mlp
from braze.kernels.cpp import moe as cpp_moe
from braze.kernels.cpp import moe_separate as cpp_separate
from braze.kernels.cpp import route as cpp_route
from braze.kernels.spec import MoeSpec, RouteSpec
from braze.kernels.triton import compat
from braze.kernels.triton import mlp as triton_mlp
from braze.kernels.triton import moe as triton_moe
from braze.kernels.triton import route as triton_route
from braze.kernels.triton import separate as triton_separate
from braze.kernels.triton.weights import Weights
from braze.lowering import gate, inductor, rotations
from braze.lowering.rotations import Turn, turn


def choose_rope(call: fx.Node, forced: str) -> tuple[str, str, Turn | None]:
    """(kernel, why, the call as a kernel takes it) for a `braze::rope` call; None where Inductor's own code does it."""
    device = compat.platform(call.meta["val"].device)
    name = {"cpu": "cpp", "cuda": "triton", "xpu": "triton"}.get(device)
    fused = "fuses with its neighbours"
    if forced == "pointwise":
        return "pointwise", "asked for", None
    if name is None or forced not in ("auto", name):
        return "pointwise", fused, None
    found = turn(call, name)
    reason = found if isinstance(found, str) else rotations.refusal(found)
    if name == "cpp" and forced != name and not isinstance(found, str):
        reason = reason or _loops_win(found)
    if isinstance(found, str) or reason is not None:
        told = f"{fused}; the {'Triton' if name == 'triton' else 'C++'} kernel does not take this ({reason})"
        return "pointwise", told, None
    one = "q and k in one launch" if name == "triton" else "one C++ call for q and k"
    before = ", norms in the same pass" if found.norm is not None else ""
    return name, "asked for" if forced == name else f"{one}{before}, tables read once for all heads", found


def _loops_win(turn: Turn) -> str | None:
    """Why Inductor's loops on CPU are at least as fast as the C++ kernel, as measured (benchmarks/rope.py); None where not:
    compilers vectorise halves, and neither pairs that lie side by side nor norms as well."""
    if turn.norm is not None or not turn.spec.layout_in == turn.spec.layout_out == "half":
        return None
    if any(torch.Tag.pointwise in getattr(user.target, "tags", ()) for user in turn.call.users):
        return "what follows is computed in the same loop"
    x = turn.x.meta["val"]
    if x.dtype == torch.float32 and turn.spec.rotary_dim < x.shape[-1]:
        return "in float32, what does not turn is most of the time"
    return None


def choose_moe(call: fx.Node, forced: str) -> tuple[str, str]:
    """(kernel, why) for a `braze::moe` call: "aten" opens it up, every other kernel keeps it whole."""
    args: Any = fx.node.map_arg(call.args, lambda n: n.meta["val"])
    attributes: Any = call.kwargs
    x, ids, weights, w1, w2, b1, b2 = (*args, None, None)[:7]
    if forced == "aten":
        return "aten", "asked for"
    device = compat.platform(x.device)
    name, kernel, why = _MOE.get(device, (None, None, ""))
    if kernel is None:
        return "aten", f"grouped products on sorted rows: no kernel of braze's for {device}"
    if forced not in ("auto", name):
        return "aten", f"grouped products on sorted rows: the {forced} kernel is not for {device}"
    refusal = kernel.supports(x, ids, weights, w1, w2, b1, b2, MoeSpec(**attributes))
    if refusal is not None:
        return "aten", f"grouped products on sorted rows: the {name} kernel does not take this ({refusal})"
    return name, "asked for" if forced == name else why


def choose_separate(call: fx.Node) -> tuple[str, str]:
    """(kernel, why) for a `braze::moe_separate` call, which is kept whole."""
    args: Any = fx.node.map_arg(call.args, lambda n: n.meta["val"])
    attributes: Any = call.kwargs
    x, ids, weights, w1, w2, b1, b2 = args
    in_turn = "one expert after the other, weights where they lie: nothing is stacked"
    name, kernel, why = _SEPARATE.get(compat.platform(x.device), (None, None, ""))
    if kernel is None:
        return "separate", f"{in_turn}; no kernel of braze's for {x.device.type}"
    refusal = kernel.supports(x, ids, weights, w1, w2, b1, b2, MoeSpec(**attributes))
    if refusal is not None:
        return "separate", f"{in_turn}; the {name} kernel does not take this ({refusal})"
    return name, why


def choose_apart(call: fx.Node) -> tuple[str, str]:
    """(kernel, why) for a `braze::moe_apart` call: "aten" opens it up, "cpp" makes it `braze::moe_separate`."""
    args: Any = fx.node.map_arg(call.args, lambda n: n.meta["val"])
    attributes: Any = call.kwargs
    x, ids, weights, gate, up, w2, b_gate, b_up, b2 = args
    composed = "grouped products on sorted rows, one for gate and one for up: they are two tensors"
    spec = MoeSpec(**attributes)
    name, kernel, why = _SEPARATE.get(compat.platform(x.device), (None, None, ""))
    if kernel is None:
        return "aten", f"{composed}; no kernel of braze's for {x.device.type}"
    if kernel is triton_separate:
        why = _TRITON[2]
        refusal = triton_moe.supports(x, ids, weights, Weights(gate, up), w2, b_gate, b2, spec)
    else:
        refusal = kernel.supports(x, ids, weights, *separate.lists(gate, up, w2, b_gate, b_up, b2), spec)
    if refusal is not None:
        return "aten", f"{composed}; the {name} kernel does not take this ({refusal})"
    return name, why


def choose_mlp(call: fx.Node, forced: str) -> tuple[str, str]:
    """(kernel, why) for a `braze::mlp` call: "aten" opens it up, "triton" makes it launches, "cpp" keeps it whole."""
    args: Any = fx.node.map_arg(call.args, lambda n: n.meta["val"])
    attributes: Any = call.kwargs
    composed = "two products and what lies between"
    if forced == "aten":
        return "aten", "asked for"
    x, w1, w2, b1, b2 = args
    name, kernel, why = _MLP.get(compat.platform(x.device), (None, None, ""))
    if kernel is None or forced not in ("auto", name):
        return "aten", composed
    if kernel is triton_mlp and forced != name and inductor.tunes_products():
        return "aten", f"{composed}, which Inductor tunes (max-autotune): measured as fast as the {name} kernel"
    refusal = kernel.supports(x, w1, w2, b1, b2, MoeSpec(**attributes))
    if refusal is not None:
        return "aten", f"{composed}; the {name} kernel does not take this ({refusal})"
    return name, "asked for" if forced == name else why


def choose_route(call: fx.Node, forced: str) -> tuple[str, str]:
    """(kernel, why) for a `braze::route` call: "aten" opens it up, "triton" makes it a launch, "cpp" keeps it whole."""
    args: Any = fx.node.map_arg(call.args, lambda n: n.meta["val"])
    attributes: Any = call.kwargs
    logits, bias = (*args, None)[:2]
    composed = "a top-k, and scores only where they are needed, fused by Inductor"
    name, kernel, why = _ROUTE.get(compat.platform(logits.device), (None, None, ""))
    if forced == "aten":
        return "aten", "asked for"
    if kernel is None or forced not in ("auto", name):
        return "aten", composed
    if kernel is cpp_route and gate.behind(call) is not None:
        return (
            name,
            "asked for" if forced == name else "one C++ call from the tokens to weights and ids, the product included",
        )
    size = logits.numel()
    if kernel is cpp_route and not (isinstance(size, int) and size >= cpp_route.WORTH):
        return "aten", f"{composed}; a call of the C++ kernel costs more than it saves for so few tokens"
    refusal = kernel.supports(logits, bias, RouteSpec(**attributes))
    if refusal is not None:
        return "aten", f"{composed}; the {name} kernel does not take this ({refusal})"
    if kernel is triton_route and gate.behind(call) is not None:
        why = "a launch for the product of few tokens, and one from logits to weights and ids"
    return name, "asked for" if forced == name else why


_ROUTE_TRITON = ("triton", triton_route, "one launch from logits to weights and ids")
#: device -> (name, module, why) of a router's kernel
_ROUTE: dict[str, Any] = {
    "cpu": ("cpp", cpp_route, "one C++ call that reads the logits once"),
    "cuda": _ROUTE_TRITON,
    "xpu": _ROUTE_TRITON,
}
_TRITON = ("triton", triton_moe, "two products whose rows, bias, activation and weights are handled inside them")
_TRITON_SEPARATE = (
    "triton",
    triton_separate,
    "the kernels of stacked experts, which find each by a table of addresses",
)
#: device -> (name, module, why) of its kernel for experts whose weights are several tensors
_SEPARATE: dict[str, Any] = {
    "cpu": (
        "cpp",
        cpp_separate,
        "one C++ call with a pointer an expert, rows gathered in place, weights where they lie",
    ),
    "cuda": _TRITON_SEPARATE,
    "xpu": _TRITON_SEPARATE,
}
#: device -> (name, module, why) of its kernel
_MOE: dict[str, Any] = {
    "cpu": ("cpp", cpp_moe, "one C++ call, rows gathered in place, each expert's weights read once"),
    "cuda": _TRITON,
    "xpu": _TRITON,
}
#: device -> (name, module, why) of its kernel for a dense MLP
_MLP: dict[str, Any] = {
    "cpu": ("cpp", cpp_mlp, "one C++ call of the experts' kernel, each weight read once"),
    "cuda": ("triton", triton_mlp, "two launches of the experts' kernels, each weight read once"),
}
