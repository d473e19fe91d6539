"""Rotations by a vendor's kernel: whole rows of heads that turn by one row of the tables a token.

x becomes [T, H, D] and the tables [T, W], in a copy that Inductor fuses with what is before; an angle's sign is the tables'.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from braze.kernels.spec import RopeSpec
from braze.kernels.vendor import ipex, sgl_kernel, vllm_xpu


class Provider(Protocol):
    """A vendor's rotation."""

    def rope_refusal(self, x: Tensor, cos: Tensor, sin: Tensor, spec: RopeSpec) -> str | None:
        """Why it can't turn these, in words; None where it can. One layout, no start, x's dtype for the result."""

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        """x [T, H, D], cos and sin [T, W], contiguous -> a new [T, H, D]."""


#: option -> provider
PROVIDERS: Mapping[str, Provider] = {"sgl_kernel": sgl_kernel, "vllm_xpu": vllm_xpu, "ipex": ipex}


def supports(x: Tensor, cos: Tensor, sin: Tensor, spec: RopeSpec, provider: str) -> str | None:
    """Why `compose` can't take these tensors (fake ones too), in words; None where it can."""
    checks = (
        (spec.start == 0, "a rotation that does not begin with the head's first element"),
        (spec.layout_in == spec.layout_out, "a change of pair layout"),
        (spec.out_dtype in (None, x.dtype), "a change of dtype"),
        (cos.shape == sin.shape and _heads(x, cos) is not None, "tables that vary from head to head"),
    )
    reason = next((reason for fine, reason in checks if not fine), None)
    return reason or PROVIDERS[provider].rope_refusal(x, cos, sin, spec)


def _heads(x: Tensor, table: Tensor) -> int | None:
    """The dimension of x that counts heads: a table has one value for all of them."""
    dims = [d for d in range(1 if x.ndim == 4 else 0, x.ndim - 1) if x.ndim in (3, 4)]
    one = [d for d in dims if table.ndim < x.ndim - d or _is_one(table.shape[d - x.ndim])]
    return next((d for d in one if not _is_one(x.shape[d])), one[0] if one else None)


def _is_one(size: int) -> bool:
    return isinstance(size, int) and size == 1


def compose(x: Tensor, cos: Tensor, sin: Tensor, spec: RopeSpec, provider: str) -> Tensor:
    """As `braze.kernels.reference.rope`."""
    axis = _heads(x, cos)
    assert axis is not None
    tokens = x.movedim(axis, -2)
    lead = tokens.shape[:-2]
    rows = [t.expand(*_one_head(x.shape, axis), t.shape[-1]).movedim(axis, -2) for t in (cos, sin)]
    c, s = (t.reshape(-1, t.shape[-1]) for t in rows)
    flat = tokens.reshape(-1, *tokens.shape[-2:])
    rotated: Tensor = torch.ops.braze.vendor_rope(
        flat.contiguous(), c.contiguous(), (-s if spec.inverse else s).contiguous(), spec.layout_in == "interleaved",
        provider=provider,
    )  # fmt: skip
    return rotated.reshape(*lead, *tokens.shape[-2:]).movedim(-2, axis)


def _one_head(shape: torch.Size, axis: int) -> list[int]:
    """x's shape without its last dimension, of one head."""
    return [1 if d == axis else size for d, size in enumerate(shape[:-1])]
