"""Experts whose weights are E tensors, by the kernels for stacked ones: a table of addresses takes the stack's place.

Nothing is copied but the table, which a call sends to the device ahead of its launches. It is looked up on the host by the
addresses themselves, so it is never stale, whatever lies there.
"""

from collections.abc import Sequence
from functools import reduce
from operator import or_

import torch
from torch import Tensor

from braze.kernels import separate
from braze.kernels.spec import MoeSpec
from braze.kernels.triton import compat, moe
from braze.kernels.triton.weights import Weights

ALIGNMENT = compat.BLOCK_ALIGNMENT  # bytes, of each address: the most that any way to read weights asks for
MOST = 4096  # tables that are kept


def supports(
    x: Tensor, ids: Tensor, weights: Tensor, w1: Sequence[Tensor], w2: Sequence[Tensor], b1: Sequence[Tensor],
    b2: Sequence[Tensor], spec: MoeSpec,
) -> str | None:  # fmt: skip
    """Why `run` can't take these tensors (fake ones too), in words; None where it can."""
    reason = separate.unlike(w1=w1, w2=w2, b1=b1, b2=b2)
    bias, bias2 = (b[0][None] if b else None for b in (b1, b2))
    return reason or moe.supports(x, ids, weights, _first(w1, len(w2)), _first(w2, len(w2)), bias, bias2, spec)


def run(
    x: Tensor, ids: Tensor, weights: Tensor, w1: Sequence[Tensor], w2: Sequence[Tensor], b1: Sequence[Tensor],
    b2: Sequence[Tensor], spec: MoeSpec,
) -> Tensor:  # fmt: skip
    """As `braze.kernels.separate.moe`, which runs where an address is not aligned, on tensors that `supports` takes."""
    addresses = _addresses(w1, w2)
    if reduce(or_, addresses) % ALIGNMENT:
        return separate.moe(x, ids, weights, w1, w2, b1, b2, spec)
    experts = len(w2)
    bias = torch.stack(tuple(b1)).view(experts, -1) if b1 else None
    bias2 = torch.stack(tuple(b2)) if b2 else None
    return moe.run(x, ids, weights, *stacked(w1, w2, addresses), bias, bias2, spec)


def stacked(w1: Sequence[Tensor], w2: Sequence[Tensor], addresses: tuple[int, ...] = ()) -> tuple[Weights, Weights]:
    """E, or 2E, and E tensors as `moe.launch` takes them, which must outlive it; addresses: theirs."""
    addresses = addresses or _addresses(w1, w2)
    first, second = _table(addresses, w2[0].device).split((len(w1), len(w2)))
    return _first(w1, len(w2), first), _first(w2, len(w2), second)


def _addresses(w1: Sequence[Tensor], w2: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(w.data_ptr() for w in (*w1, *w2))


def _first(tensors: Sequence[Tensor], experts: int, table: Tensor | None = None) -> Weights:
    """The first expert's weights as if they were everyone's."""
    each, *up = (w.expand(experts, -1, -1) for w in tensors[: len(tensors) // experts])
    return Weights(each, up[0] if up else None, table)


_tables: dict[tuple[int, ...], Tensor] = {}
_captured: dict[tuple[int, ...], Tensor] = {}  # a graph copies from these at each replay


def _table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """The addresses in the memory of a device; the host does not wait for the copy.

    A CUDA device reads them from the host's memory itself: a launch takes less of its time than a copy does in a graph.
    """
    host = _captured.get(addresses)
    if host is None:
        host = _tables.get(addresses)
    if host is None:
        if len(_tables) >= MOST and not compat.capturing(device):
            if device.type != "cpu":
                torch.accelerator.synchronize()  # a launch may still read one
            _tables.clear()
        host = _tables[addresses] = torch.tensor(addresses, dtype=torch.int64, pin_memory=device.type != "cpu")
    if compat.capturing(device):
        _captured[addresses] = host
    if device.type != "cuda":
        return host.to(device, non_blocking=True)
    from braze.kernels.triton.rows import send_table

    count, block = len(addresses), 1024
    sent = torch.empty(count, dtype=torch.int64, device=device)
    grid = (-(-count // block),)
    return compat.start(send_table, grid, (sent, host, count), {"BLOCK": block}, ["table"], warps=4)[0]
