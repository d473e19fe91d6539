"""Where a product's weights lie: in one tensor, gate's and up's in two, or each expert's in a tensor of its own.

A kernel gets one pointer, two, or a table of addresses (`separate`); sizes and strides are the same for all experts.
"""

from dataclasses import dataclass

from torch import Tensor

from braze.kernels.triton import compat


@dataclass(frozen=True)
class Weights:
    """Expert e's [N, K], whatever its strides.

    each: [E, N, K], of gate where gate and up are two tensors: their sizes and how they lie. up: up's then, which lies alike.
    table: the experts' addresses [E] where each has a tensor of its own, of gate and up in turn where they are two; `each`
    is the first one's then, as if all were the same.
    """

    each: Tensor
    up: Tensor | None = None
    table: Tensor | None = None

    @staticmethod
    def of(w: "Tensor | Weights") -> "Weights":
        return w if isinstance(w, Weights) else Weights(w)

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None]:
        """Whose addresses a call's kernels get."""
        return (self.each, self.up) if self.table is None else (self.table, None)

    @property
    def lie(self) -> tuple[object, ...]:
        """What of them a table does not show."""
        return () if self.table is None else (self.each.shape, self.each.stride(), self.each.dtype, self.up is None)

    def layout(self, of_one: str) -> str:
        """Of gate and up: "apart" where they are two tensors, otherwise what it is in one."""
        return of_one if self.up is None else "apart"

    @property
    def columns(self) -> int:
        """Of gate and up together."""
        return self.each.shape[1] * (1 if self.up is None else 2)

    @property
    def pointers(self) -> tuple[Tensor, Tensor]:
        """What a kernel gets as w and up."""
        first = self.each if self.table is None else self.table
        return first, first if self.up is None or self.table is not None else self.up

    def transposed(self) -> "Weights":
        """Of tensors that are stored as [K, N]."""
        return Weights(self.each.transpose(1, 2), None if self.up is None else self.up.transpose(1, 2), self.table)

    def takes_block(self, layout: str) -> bool:
        """Whether an XPU loads blocks of them."""
        return all(_takes_block(w, layout) for w in (self.each, self.up) if w is not None)

    def takes_descriptor(self, layout: str) -> bool:
        """Whether hardware copies tiles of them, gate's and up's in one: as two they would be two products of half the width,
        which read the rows from shared memory twice, to a quarter more time on an H100."""
        one = self.up is None and (layout != "halves" or self.each.stride(2) == 1)
        return self.table is None and one and compat.takes_descriptor(stored(self.each, layout))


@dataclass(frozen=True)
class Shared:
    """An expert that every token has, n times as wide as the others, its results times one number or not.

    gate and up [n * I, H], down [H, n * I], rows contiguous and as far apart as theirs in gate and up; factor [1] or None.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    factor: Tensor | None


def _takes_block(w: Tensor, layout: str) -> bool:
    second_half = w.shape[1] // 2 * w.stride(1) if layout == "halves" else 0
    return compat.takes_block(w if w.stride(2) == 1 else w.transpose(1, 2), second_half)


def stored(w: Tensor, layout: str) -> Tensor:
    """A weight as a descriptor sees it, last stride 1; halves of rows in a dimension of their own."""
    if w.stride(2) != 1:
        return w.transpose(1, 2)
    return w.unflatten(1, (2, -1)) if layout == "halves" else w


def box(w: Tensor, layout: str, columns: int, inner: int) -> compat.Box:
    """One load of a tile of so many columns, gate and up together."""
    shape: tuple[int, ...] = (1, inner, columns)
    if w.stride(2) == 1:
        shape = (1, 2, columns // 2, inner) if layout == "halves" else (1, columns, inner)
    return compat.Box(stored(w, layout), shape)
