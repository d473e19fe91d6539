"""A router's product for few tokens: a program for each logit, since its row of the weight is short.

    logits[t, e] = sum_h x[t, h] w[e, h] (+ b[e])

Summed in float32 and rounded once; x and w are read as they are stored.
"""

import torch
from torch import Tensor

from braze.kernels.triton import compat
from braze.kernels.triton.compat import HAVE_TRITON, Start

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FEW = 8  # tokens at most
BLOCK = 1024  # elements of a row at a time
MANY = 1024  # programs from which on more of them are better side by side than fast alone

if HAVE_TRITON:
    import triton
    import triton.language as tl

    from braze.kernels.triton.intrinsics import launch_dependents

    @triton.jit
    def gate_kernel(
        x, w, b, logits, experts, hidden, x_row, w_row, BK: tl.constexpr, BIAS: tl.constexpr, OVERLAP: tl.constexpr
    ):
        """One expert's logit of one token. OVERLAP: the next launch may begin before this one ends."""
        if OVERLAP:
            launch_dependents()
        e = tl.program_id(0)
        t = tl.program_id(1)
        k = tl.arange(0, BK)
        row = w + e.to(tl.int64) * w_row + k
        x += t.to(tl.int64) * x_row + k
        total = tl.zeros((BK,), tl.float32)
        for k0 in range(0, hidden, BK):
            inside = k0 + k < hidden
            part = tl.load(row + k0, mask=inside, other=0.0).to(tl.float32)
            total += part * tl.load(x + k0, mask=inside, other=0.0).to(tl.float32)
        y = tl.sum(total, 0)
        if BIAS:
            y += tl.load(b + e).to(tl.float32)
        tl.store(logits + t * experts + e, y.to(logits.dtype.element_ty))


def supports(x: Tensor, w: Tensor, b: Tensor | None, dtype: torch.dtype) -> str | None:
    """Why `launch` can't take these tensors (fake ones too), in words; None where it can."""
    tokens = x.shape[0]
    given = [t for t in (x, w, b) if t is not None]
    checks = (
        (HAVE_TRITON, "Triton is not installed"),
        (compat.platform(x.device) == "cuda", f"{x.device.type} is not CUDA"),
        (isinstance(tokens, int) and 0 < tokens <= FEW, f"{tokens} tokens are not 1 to {FEW}"),
        (all(t.dtype in DTYPES for t in given) and dtype in DTYPES, "only float16, bfloat16 and float32"),
        (all(t.stride(-1) == 1 for t in given), "rows of x or of the router's weight are not contiguous"),
    )
    return next((reason for fine, reason in checks if not fine), None)


def launch(
    x: Tensor, w: Tensor, b: Tensor | None, dtype: torch.dtype, start: Start = compat.start, overlap: bool = False
) -> Tensor:
    """x [T, H], w [E, H], b [E] -> logits [T, E] of `dtype`; overlap: the next launch may begin before this one ends."""
    (tokens, hidden), experts = x.shape, w.shape[0]
    logits = x.new_empty((tokens, experts), dtype=dtype)
    constants = {"BK": BLOCK, "BIAS": b is not None, "OVERLAP": overlap}
    arguments = (x, w, x if b is None else b, logits, experts, hidden, x.stride(0), w.stride(0))
    warps = 8 if experts * tokens <= MANY else 4
    return start(gate_kernel, (experts, tokens), arguments, constants, ["logits"], warps=warps)[0]
