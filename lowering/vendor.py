"""Gives a semantic op to a vendor's kernel where that was asked for or is known to be faster; braze's own are the default.

`FASTER` is the declared knowledge: without a measurement on the device, no vendor's kernel is in it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx

from braze.kernels.spec import MoeSpec, RopeSpec, RouteSpec
from braze.kernels.triton import compat
from braze.kernels.vendor import moe, rope, route

#: kind -> option -> module with `supports` and `compose`
_MODULES: Mapping[str, Any] = {"moe": moe, "router": route, "rope": rope}
_SPECS: Mapping[str, Any] = {"moe": MoeSpec, "router": RouteSpec, "rope": RopeSpec}
_INPUTS: Mapping[str, int] = {"moe": 7, "router": 2, "rope": 3}
#: (kind, device name) -> providers measured to be faster there than braze's own kernels, the fastest first
FASTER: Mapping[tuple[str, str], tuple[str, ...]] = {}


def choose(call: fx.Node, kind: str, forced: str, own: Callable[[fx.Node, str], tuple[str, str]]) -> tuple[str, str]:
    """(kernel, why) for a call of the kind's op: a provider's name, or what `own` chooses, with the reason why no vendor's."""
    asked = forced in _MODULES[kind].PROVIDERS
    device = compat.device_name(call_device(call))
    names = (forced,) if asked else FASTER.get((kind, device), ()) if forced == "auto" else ()
    refusal: str | None = None
    for name in names:
        refusal = _refusal(call, kind, name)
        if refusal is None:
            return name, "asked for" if asked else f"measured to be faster on {device}"
    kernel, why = own(call, "auto" if asked else forced)
    return kernel, f"{why}; {forced} was asked for and does not take this ({refusal})" if asked else why


def call_device(call: fx.Node) -> Any:
    """The device of a call's first input."""
    return call.args[0].meta["val"].device  # type: ignore[union-attr]


def _refusal(call: fx.Node, kind: str, provider: str) -> str | None:
    args: Any = fx.node.map_arg(call.args, lambda n: n.meta["val"])
    inputs = (*args, *[None] * _INPUTS[kind])[: _INPUTS[kind]]
    return _MODULES[kind].supports(*inputs, _SPECS[kind](**call.kwargs), provider)  # type: ignore[no-any-return]


def composed(kind: str, provider: str) -> Callable[..., Any] | None:
    """The kind's op by a provider, as a function of the op's arguments; None where the name is no provider's."""
    if provider not in _MODULES[kind].PROVIDERS:
        return None

    def compose(*args: Tensor | None, **attributes: Any) -> Any:
        inputs = (*args, *[None] * _INPUTS[kind])[: _INPUTS[kind]]
        return _MODULES[kind].compose(*inputs, _SPECS[kind](**attributes), provider)

    return compose
