"""Finds a vendor's op by its schema: a namespace and a name alone promise nothing, and packages share their names.

An op is the one that is meant where its leading arguments have the names, types and mutability of a known form and every
further one has a default. Nothing is imported here: ops exist once the user has imported the vendor's package.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Op:
    """An op of a vendor's. forms: its known argument lists, as in a schema, without defaults: "Tensor! out, Tensor? bias"."""

    namespace: str
    name: str
    forms: tuple[str, ...]

    @property
    def full_name(self) -> str:
        return f"{self.namespace}::{self.name}"


@dataclass(frozen=True)
class Found:
    """The overload to call, and which of its `Op`'s forms it has."""

    call: Any
    form: int


def find(op: Op) -> Found | str:
    """The registered op, or in words why there is none."""
    packet = getattr(getattr(torch.ops, op.namespace), op.name, None)
    if packet is None:
        return f"no op {op.full_name} is loaded"
    for overload in packet.overloads():
        call = getattr(packet, overload)
        for i, form in enumerate(op.forms):
            if _takes(call._schema.arguments, form):
                return Found(call, i)
    return f"the loaded {op.full_name} has another schema than the one known here"


def runs_on(found: Found, device: torch.device) -> bool:
    """Whether the op has a kernel for tensors of this device."""
    key = getattr(torch._C.DispatchKey, device.type.upper(), None)
    return key is not None and bool(found.call.has_kernel_for_dispatch_key(key))


def _takes(arguments: Sequence[Any], form: str) -> bool:
    wanted = form.split(", ")
    leading, further = arguments[: len(wanted)], arguments[len(wanted) :]
    return [_spelled(a) for a in leading] == wanted and all(a.has_default_value() for a in further)


def _spelled(argument: Any) -> str:
    kind = str(argument.type)
    optional = kind.startswith("Optional[")
    kind = kind.removeprefix("Optional[").removesuffix("]") if optional else kind
    written = argument.alias_info is not None and argument.alias_info.is_write
    return f"{kind}{'?' if optional else ''}{'!' if written else ''} {argument.name}"
