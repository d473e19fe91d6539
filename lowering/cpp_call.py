"""Experts on CPU as one call of a generated C++ function, written into Inductor's own code.

No Python and no dispatcher stands between the graph and the kernel, and a package made by AOTInductor carries it inside.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import fx

from braze.kernels.cpp import mlp, moe, moe_separate
from braze.kernels.cpp.source import argument_types
from braze.kernels.spec import MoeSpec
from braze.kernels.triton import compat
from braze.lowering import inductor


def lower_moe(
    x: Any, ids: Any, weights: Any, w1: Any, w2: Any, b1: Any = None, b2: Any = None, **attributes: Any
) -> Any:
    """`braze::moe` as the call, or whole where the kernel does not take it (another device, another dtype ...)."""
    spec, known = MoeSpec(**attributes), fakes(inductor.current_call())
    if _refused(moe, known, spec):
        return inductor.whole(torch.ops.braze.moe.default)(x, ids, weights, w1, w2, b1, b2, **attributes)
    given = [x if b is None else b for b in (b1, b2)]

    def numbers(lies: Sequence[Any]) -> Sequence[Any]:
        x, ids, weights, w1, w2, *biases = lies
        first, second = (None if b is None else lie for b, lie in zip((b1, b2), biases, strict=True))
        return moe.numbers(x, ids, weights, w1, w2, first, second, spec)

    return inductor.cpp_call(
        x.get_size(), spec.out_dtype or x.get_dtype(), (x, ids, weights, w1, w2, *given),
        moe.source(known[0], spec), numbers, argument_types(),
    )  # fmt: skip


def lower_separate(
    x: Any, ids: Any, weights: Any, w1: list[Any], w2: list[Any], b1: list[Any], b2: list[Any], **attributes: Any
) -> Any:
    """`braze::moe_separate` likewise."""
    spec, lists, known = MoeSpec(**attributes), (w1, w2, b1, b2), fakes(inductor.current_call())
    if _refused(moe_separate, known, spec):
        return inductor.whole(torch.ops.braze.moe_separate.default)(x, ids, weights, *lists, **attributes)
    tensors = moe_separate.counts(*lists)

    def numbers(lies: Sequence[Any]) -> Sequence[Any]:
        w1, w2, b1, b2 = (lies[begin:end] for begin, end in pairwise(accumulate(tensors, initial=3)))
        return moe_separate.numbers(lies[0], lies[1], lies[2], w1, w2, b1, b2, spec)

    return inductor.cpp_call(
        x.get_size(), spec.out_dtype or x.get_dtype(), (x, ids, weights, *w1, *w2, *b1, *b2),
        moe.source(known[0], spec, tensors), numbers, argument_types(tensors),
    )  # fmt: skip


def _refused(kernel: Any, known: Sequence[Any], spec: MoeSpec) -> bool:
    """Whether a kernel does not take a call's tensors; a GPU may be simulated on the CPU's."""
    return compat.platform(known[0].device) != "cpu" or kernel.supports(*known, spec) is not None


def lower_mlp(x: Any, w1: list[Any], w2: Any, b1: list[Any], b2: Any = None, **attributes: Any) -> Any:
    """`braze::mlp`, which stays in a graph where the kernel takes it, as the call."""
    spec, tensors = MoeSpec(**attributes), mlp.tensors(w1, b1, b2)

    def numbers(lies: Sequence[Any]) -> Sequence[Any]:
        w1, w2, b1, b2 = (lies[begin:end] for begin, end in pairwise(accumulate(tensors, initial=3)))
        return mlp.numbers(lies[0], w1, w2[0], b1, b2[0] if b2 else None, spec)

    return inductor.cpp_call(
        x.get_size(), spec.out_dtype or x.get_dtype(), mlp.pointers(x, w1, w2, b1, b2),
        moe.source(fakes(inductor.current_call())[0], spec, tensors), numbers, argument_types(tensors),
    )  # fmt: skip


def fakes(call: fx.Node) -> tuple[Any, Any, Any, Any, Any, Any, Any]:
    """The seven tensors, or lists of them, of a call as fakes; None for one that is not given."""
    args: Any = fx.node.map_arg(call.args, lambda n: n.meta["val"])
    kwargs: Any = fx.node.map_arg(call.kwargs, lambda n: n.meta["val"])
    names = ("x", "ids", "weights", "w1", "w2", "b1", "b2")
    given: Any = {**dict.fromkeys(names), **dict(zip(names, args, strict=False)), **kwargs}
    return given["x"], given["ids"], given["weights"], given["w1"], given["w2"], given["b1"], given["b2"]
