"""What every kernel needs to know besides its tensors: the attributes of `braze::moe`, `braze::rope`, `braze::rms_norm` and
`braze::route`.

    out[t] = scale * sum_j  wo_j * (act(wi_j * x[t] @ W1[e_j] + b1[e_j]) @ W2[e_j] + b2[e_j]),   e_j = ids[t, j]

with (wi_j, wo_j) = (weights[t, j], 1) for weight_on="input" and (1, weights[t, j]) for "output"; and for each
pair i of a rotation, with a = x[p(i)], b = x[q(i)]:  out = (a cos_i - b sin_i, b cos_i + a sin_i). A router's k ids are
those of the largest f(logits) + bias, its weights f(logits) there without the bias, normalised and scaled.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

GateUpLayout = Literal["halves", "interleaved", "none"]
WeightOn = Literal["input", "output"]
PairLayout = Literal["half", "interleaved"]
Scoring = Literal["softmax", "sigmoid", "sqrtsoftplus"]
SelectOn = Literal["scores", "logits"]
GroupScore = Literal["max", "top2"]
Closed = Literal["out", "zero"]
Renorm = Literal["no", "add", "clamp"]


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


@dataclass(frozen=True)
class NormSpec:
    """The attributes of one `braze::rms_norm`, x / sqrt(mean(x^2) + eps) over the last dimension.

    eps: see above. add_one: the result is multiplied by 1 + weight and not by weight.
    out_dtype: dtype of the result; None means that of x.
    """

    eps: float
    add_one: bool = False
    out_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if not self.eps >= 0:
            raise ValueError(f"eps must not be negative, not {self.eps}")


@dataclass(frozen=True)
class RouteSpec:
    """The attributes of one `braze::route`.

    top_k: how many experts a token gets, the k of the result.
    scoring: f, from logits to scores: softmax over the routed experts, sigmoid, or sqrt(softplus).
    select_on: whether bias and groups act on scores or on logits. Without either the two choose the same experts.
    groups, top_groups: experts lie in `groups` equal, adjacent groups, of which the `top_groups` best are open; 1: no groups.
    group_score: a group's "max", or the sum of its "top2".
    closed: whether an expert of a closed group is "out", or counts as one of score "zero".
    renorm: a token's weights are divided by their sum: "add" adds eps to it, "clamp" makes it eps at least; "no" leaves them.
    eps: see renorm. scale: multiplies the weights.
    shared: the last so many logits are of experts that every token gets; their scores, in the sum too, follow the k weights.
    out_dtype: dtype of the weights; None means that of the logits. ids_dtype: of the ids.
    """

    top_k: int
    scoring: Scoring = "softmax"
    select_on: SelectOn = "logits"
    groups: int = 1
    top_groups: int = 1
    group_score: GroupScore = "max"
    closed: Closed = "out"
    renorm: Renorm = "no"
    eps: float = 0.0
    scale: float = 1.0
    shared: int = 0
    out_dtype: torch.dtype | None = None
    ids_dtype: torch.dtype = torch.int64

    def __post_init__(self) -> None:
        choices = (
            ("scoring", self.scoring, Scoring), ("select_on", self.select_on, SelectOn),
            ("group_score", self.group_score, GroupScore), ("closed", self.closed, Closed), ("renorm", self.renorm, Renorm),
        )  # fmt: skip
        for name, value, known in choices:
            if value not in get_args(known):
                raise ValueError(f"{name} must be one of {get_args(known)}, not {value!r}")
        if self.top_k < 1 or self.shared < 0 or self.eps < 0:
            raise ValueError(f"top_k {self.top_k}, shared {self.shared}, eps {self.eps}: too small")
        if not 1 <= self.top_groups <= self.groups:
            raise ValueError(f"{self.top_groups} open groups of {self.groups}")
        if self.shared and self.scoring == "softmax":
            raise ValueError("shared experts have no place in a softmax over the routed ones")
