"""What 2D block loads of Xe GPUs ask of 16-bit matrices, where a vendor's kernel makes them without a check of its own.

Each expert's rows and weights are a matrix that must begin at 64 bytes: with sizes in multiples of 32 elements, all of them do.
"""

from torch import Tensor

ALIGNMENT, ELEMENTS = 64, 32  # bytes; elements of 16 bits


def aligned(*weights: Tensor) -> bool:
    """Whether every expert's matrix, and every block of rows as wide as one of its sides, begins at a multiple of 64 bytes."""
    sizes = all(n % ELEMENTS == 0 for w in weights for n in w.shape[1:])
    return sizes and all(w.storage_offset() * w.element_size() % ALIGNMENT == 0 for w in weights)
