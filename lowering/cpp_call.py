"""`braze::moe` on CPU as one call of a generated C++ function, written into Inductor's own code.

No Python and no dispatcher stands between the graph and the kernel, and a package made by AOTInductor carries it inside.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from braze.kernels.cpp import moe
from braze.kernels.spec import MoeSpec
from braze.lowering import inductor


def lower_moe(
    x: Any, ids: Any, weights: Any, w1: Any, w2: Any, b1: Any = None, b2: Any = None, **attributes: Any
) -> Any:
    """The call, or the op whole where the kernel does not take it (another device, another dtype ...)."""
    spec = MoeSpec(**attributes)
    fakes = _values(inductor.current_call())
    if moe.supports(*fakes, spec) is not None:
        return inductor.whole(torch.ops.braze.moe.default)(x, ids, weights, w1, w2, b1, b2, **attributes)
    given = [x if b is None else b for b in (b1, b2)]

    def numbers(lie: Sequence[Any]) -> Sequence[Any]:
        x, ids, weights, w1, w2, *biases = lie
        b1_lie, b2_lie = (None if b is None else lies for b, lies in zip((b1, b2), biases, strict=True))
        return moe.numbers(x, ids, weights, w1, w2, b1_lie, b2_lie, spec)

    return inductor.cpp_call(
        x.get_size(), spec.out_dtype or x.get_dtype(), (x, ids, weights, w1, w2, *given),
        moe.source(x.get_dtype(), spec), numbers, moe.ARGUMENTS,
    )  # fmt: skip


def _values(call: fx.Node) -> tuple[Any, Any, Any, Any, Any, Any, Any]:
    """The seven tensors of a call of `braze::moe`, as fakes, None for one that is not given."""
    args: Any = fx.node.map_arg(call.args, lambda n: n.meta["val"])
    kwargs: Any = fx.node.map_arg(call.kwargs, lambda n: n.meta["val"])
    x, ids, weights, w1, w2, *biases = args
    b1, b2 = (*biases, *(kwargs.get(name) for name in ("b1", "b2")[len(biases) :]))
    return x, ids, weights, w1, w2, b1, b2
