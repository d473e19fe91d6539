"""What every kernel needs to know besides its tensors: the attributes of the ops `braze::moe` and `braze::rope`.

    out[t] = scale * sum_j  wo_j * (act(wi_j * x[t] @ W1[e_j] + b1[e_j]) @ W2[e_j] + b2[e_j]),   e_j = ids[t, j]

with (wi_j, wo_j) = (weights[t, j], 1) for weight_on="input" and (1, weights[t, j]) for "output"; and for each
pair i of a rotation, with a = x[p(i)], b = x[q(i)]:  out = (a cos_i - b sin_i, b cos_i + a sin_i).
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

GateUpLayout = Literal["halves", "interleaved", "none"]
WeightOn = Literal["input", "output"]
PairLayout = Literal["half", "interleaved"]


@dataclass(frozen=True)
class MoeSpec:
    """The attributes of one `braze::moe`.

    activation: an expression in g and u (`braze.kernels.expression`); in g alone where layout is "none".
    layout: where g and u lie among the N columns of the first product: "halves" (g = [:N/2], u = [N/2:]),
        "interleaved" (g = [0::2], u = [1::2]) or "none" (g is all of them).
    transposed: weights are stored [E, H, N] and [E, I, H]; otherwise [E, N, H] and [E, H, I].
    weight_on: whether the router's weight multiplies the expert's input or its output.
    scale: multiplies the result.
    out_dtype: dtype of the result; None means that of x.
    """

    activation: str = "g*u*sigmoid(g)"
    layout: GateUpLayout = "halves"
    transposed: bool = False
    weight_on: WeightOn = "output"
    scale: float = 1.0
    out_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.layout not in get_args(GateUpLayout):
            raise ValueError(f"layout must be one of {get_args(GateUpLayout)}, not {self.layout!r}")
        if self.weight_on not in get_args(WeightOn):
            raise ValueError(f"weight_on must be one of {get_args(WeightOn)}, not {self.weight_on!r}")


@dataclass(frozen=True)
class RopeSpec:
    """The attributes of one `braze::rope`.

    rotary_dim: R, how many of the last dimension's elements rotate; even. start: index of the first of them.
    layout_in, layout_out: where pair i lies among those R: "half" (i, i + R/2) or "interleaved" (2i, 2i + 1).
    inverse: rotate by the opposite angle.
    out_dtype: dtype of the result; None means that of x.
    """

    rotary_dim: int
    start: int = 0
    layout_in: PairLayout = "half"
    layout_out: PairLayout = "half"
    inverse: bool = False
    out_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.rotary_dim <= 0 or self.rotary_dim % 2:
            raise ValueError(f"rotary_dim must be even and positive, not {self.rotary_dim}")
        if self.start < 0:
            raise ValueError(f"start must not be negative, not {self.start}")
        for layout in (self.layout_in, self.layout_out):
            if layout not in get_args(PairLayout):
                raise ValueError(f"a pair layout is one of {get_args(PairLayout)}, not {layout!r}")
