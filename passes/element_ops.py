"""How an element of each ATen op is made of its operands' elements: the table behind `Elements`.

Three families: layout ops move an index, pointwise ops combine elements, gathers turn an integer tensor's
element into an index. An op that is not here, or an argument not understood, makes a leaf.
"""

from braze.passes import element_gathers, element_layout, element_pointwise

__all__ = ["element_gathers", "element_layout", "element_pointwise"]
