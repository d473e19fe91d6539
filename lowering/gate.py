"""A router's product: with few tokens on CPU a part of the router's C++ call, from x to weights and ids; on CUDA a launch of
its own, which Inductor's product, or two with their widened copies, takes longer than, and with many a product of 16 bits.

Widening is exact, so x and the weight are read as they are stored where the graph widens them before the product.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from braze.kernels.cpp import gate
from braze.kernels.spec import RouteSpec
from braze.kernels.triton import compat
from braze.kernels.triton import gate as triton_gate
from braze.lowering import inductor
from braze.lowering.inline import inline_all

aten = torch.ops.aten
_CAST = torch.ops.prims.convert_element_type.default
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Gate:
    """product = x [T, H] @ w [E, H].T (+ b [E]), a router's logits."""

    product: fx.Node
    x: fx.Node
    w: fx.Node
    b: fx.Node | None


def behind(call: fx.Node) -> Gate | None:
    """The product behind a `braze::route` call, if a kernel takes it; on CPU nothing else may read it."""
    logits, bias = _arguments(call)
    kind = compat.platform(logits.meta["val"].device)
    found = _product(call, alone=kind == "cpu")
    if found is None or kind not in ("cpu", "cuda"):
        return None
    x, w = found.x.meta["val"], found.w.meta["val"]
    b, choice = (None if n is None else n.meta["val"] for n in (found.b, bias))
    attributes: Any = call.kwargs
    if kind == "cuda":
        refusal = triton_gate.supports(x, w, b, found.product.meta["val"].dtype)
    else:
        refusal = gate.supports(x, w, b, choice, logits.meta["val"].dtype, RouteSpec(**attributes))
    return found if refusal is None else None


def fuse(call: fx.Node, found: Gate) -> None:
    """Replaces call and product by `braze::gate_into`."""
    logits, bias = _arguments(call)
    dtype = logits.meta["val"].dtype
    attributes: Any = call.kwargs
    spec = RouteSpec(**attributes)
    given = (found.x, found.w, found.b, bias)
    inputs = [n for n in given if n is not None]
    picks = sorted(call.users)

    def body(*tensors: Tensor) -> tuple[Tensor, ...]:
        rest = iter(tensors)
        x, w, b, bias = (None if n is None else next(rest) for n in given)
        assert x is not None
        weights, ids = gate.results(x, dtype, spec)
        arguments = {
            "weights": weights,
            "ids": ids,
            "x": x,
            "w": w,
            "b": b,
            "bias": bias,
            "logits": dtype,
            **attributes,
        }
        written = inductor.updated(torch.ops.braze.gate_into.default, ("weights", "ids"), arguments)
        return tuple(written[pick.args[1]] for pick in picks)  # type: ignore[index]

    inline_all(picks, inputs, body, inductor.decompositions())
    call.graph.erase_node(call)


def launch(found: Gate) -> None:
    """Replaces the product by a launch."""
    value = found.product.meta["val"]
    overlap = inductor.overlaps_launches(value.device)

    def body(*tensors: Tensor) -> tuple[Tensor]:
        x, w, *b = tensors
        return (triton_gate.launch(x, w, b[0] if b else None, value.dtype, inductor.start, overlap),)

    inputs = [n for n in (found.x, found.w, found.b) if n is not None]
    inline_all([found.product], inputs, body, inductor.decompositions())


def as_stored(call: fx.Node) -> bool:
    """Makes the product behind a `braze::route` call on CUDA read what is stored where the graph widens both sides of it from
    16 bits; whether it did. Products of 16-bit numbers are exact in float32, and summed in it by tensor cores."""
    found = _product(call, alone=False)
    if found is None or not compat.multiplies_into_float32(found.product.meta["val"].device):
        return False
    dtypes = [n.meta["val"].dtype for n in (found.x, found.w)]
    if dtypes[0] not in HALF or dtypes[0] is not dtypes[1] or found.product.meta["val"].dtype is not torch.float32:
        return False

    def body(*tensors: Tensor) -> tuple[Tensor]:
        x, w, *b = tensors
        y = torch.mm(x, w.t(), out_dtype=torch.float32)
        return (y + b[0] if b else y,)

    inputs = [n for n in (found.x, found.w, found.b) if n is not None]
    inline_all([found.product], inputs, body, inductor.decompositions())
    return True


def lower(weights: Any, ids: Any, x: Any, w: Any, b: Any, bias: Any, *, logits: torch.dtype, **attributes: Any) -> None:
    """`braze::gate_into` as the call."""
    spec = RouteSpec(**attributes)
    x, w = inductor.with_rows(x), inductor.with_rows(w)
    given = [weights, ids, x, w, b, bias]

    def numbers(lies: Sequence[Any]) -> Sequence[Any]:
        to, chosen, rows, gates, *biases = lies
        first, second = (None if t is None else lie for t, lie in zip((b, bias), biases, strict=True))
        offsets = [lie.offset for lie in (rows, gates, *biases)]  # pointers are those of whole buffers
        return gate.numbers(to, chosen, rows, gates, first, second, logits, spec, offsets)

    tensors = [x if t is None else t for t in given]
    inductor.cpp_update(tensors, 2, gate.source(x.get_dtype(), w.get_dtype()), numbers, gate.ARGUMENTS)


def _arguments(call: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    logits, bias = (*call.args, None)[:2]
    assert isinstance(logits, fx.Node)
    return logits, bias if isinstance(bias, fx.Node) else None


def _product(call: fx.Node, alone: bool) -> Gate | None:
    """alone: where nothing but the call reads it."""
    node, reader = _arguments(call)[0], call
    while node.target is aten.alias.default and (_only_for(node, reader) or not alone):
        node, reader = node.args[0], node  # type: ignore[assignment]
    if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
        return None
    *b, x, transposed = node.args
    w = _rows(transposed)
    if w is None or (alone and not _only_for(node, reader)) or (b and b[0].meta["val"].ndim != 1):  # type: ignore[union-attr]
        return None
    return Gate(node, _stored(x), w, b[0] if b else None)  # type: ignore[arg-type]


def _only_for(node: fx.Node, reader: fx.Node) -> bool:
    return list(node.users) == [reader]


def _rows(node: Any) -> fx.Node | None:
    """w [E, H] where node is its transpose."""
    node = _stored(node)
    if node.target is not aten.permute.default or list(node.args[1]) != [1, 0]:
        return None
    return _stored(node.args[0])


def _stored(node: Any) -> fx.Node:
    """What a node widens to float32."""
    widens = node.target is _CAST and node.args[1] is torch.float32
    if widens and node.args[0].meta["val"].dtype in HALF:
        return node.args[0]  # type: ignore[no-any-return]
    return node  # type: ignore[no-any-return]
