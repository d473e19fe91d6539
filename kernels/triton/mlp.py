"""A dense MLP of one token: the vectors' kernels with one expert that every row has, unweighted.

    out = act(x W1 + b1) W2 + b2

Gate, up and the activation are one launch and the second product another, each weight from memory into registers once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from braze.kernels.spec import MoeSpec
from braze.kernels.triton import compat, moe
from braze.kernels.triton.choose_config import choose_config
from braze.kernels.triton.compat import Start
from braze.kernels.triton.weights import Weights


def few(rows: Tensor) -> bool:
    """Whether rows, a tensor [T, .] that may be fake, are one, on a GPU of CUDA."""
    tokens = rows.shape[0]  # a symbol is not to be asked
    return isinstance(tokens, int) and tokens == 1 and compat.platform(rows.device) == "cuda"


def supports(
    x: Tensor, w1: Sequence[Tensor], w2: Tensor, b1: Sequence[Tensor], b2: Tensor | None, spec: MoeSpec
) -> str | None:
    """Why `run` can't take these tensors (fake ones too), in words; None where it can."""
    if not few(x):
        return f"{x.shape[0]} rows on {x.device} are not one on CUDA"
    if any((b.dtype, b.stride()) != (b1[0].dtype, b1[0].stride()) for b in b1):
        return "the biases of gate and up differ in dtype or strides"
    inner = 0 if spec.transposed else 1
    if any(w.stride(inner) != 1 for w in (*w1, w2)):
        return "weights that are not contiguous along what is summed over"
    up, down = _weights(w1, w2)
    return moe.refusal(x, up, down, b1[0] if b1 else None, b2, spec)


def run(x: Tensor, w1: Sequence[Tensor], w2: Tensor, b1: Sequence[Tensor], b2: Tensor | None, spec: MoeSpec) -> Tensor:
    """As `braze.kernels.reference.mlp`, accumulated in float32, on tensors that `supports` takes."""
    return launch(x, w1, w2, b1, b2, spec, overlap=compat.overlaps_launches(x.device))


def launch(
    x: Tensor, w1: Sequence[Tensor], w2: Tensor, b1: Sequence[Tensor], b2: Tensor | None, spec: MoeSpec,
    start: Start = compat.start, overlap: bool = False,
) -> Tensor:  # fmt: skip
    """`run`, by whatever starts kernels."""
    from braze.kernels.triton import vector

    up, down = _weights(w1, w2)
    if spec.transposed:
        up, down = up.transposed(), down.transposed()
    config = choose_config(moe.problem(x, 1, up, down, spec))
    out = x.new_empty(x.shape, dtype=spec.out_dtype or x.dtype)
    first = torch.cat(tuple(b1))[None] if b1 else None
    return vector.launch(
        x, None, None, up, down, first, None if b2 is None else b2[None], spec, config, out, True, start, overlap
    )


def _weights(w1: Sequence[Tensor], w2: Tensor) -> tuple[Weights, Weights]:
    up = w1[1][None] if len(w1) == 2 else None
    return Weights(w1[0][None], up), Weights(w2[None])
