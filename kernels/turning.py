"""What the kernels of a rotation take besides its tensors: the norm before it, and where k's rows go."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Norm:
    """An RMSNorm over the whole head before the rotation: x / sqrt(mean(x^2) + eps), times weight or 1 + weight.

    Weights are [D], both or neither; add_one says that they are stored less one.
    """

    eps: float
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    add_one: bool = False


@dataclass(frozen=True)
class Rows:
    """Where k's tokens go instead of a tensor of their own: rows of a cache, whose other elements stay.

    strides are the cache's for (batch, row, head); a token's row is first + its place in S, or index[place], an int32 or
    int64 tensor, counted from the end of `count` rows where negative, at index_strides for (batch, token).
    """

    cache: Tensor
    strides: tuple[Any, Any, Any]
    count: Any
    first: Any = 0
    index: Tensor | None = None
    index_strides: tuple[Any, Any] = (0, 0)
