"""`braze::rope` as pointwise code inside Inductor's loops, which fuses with what is before and after it.

One element of the result is x[own] cos +- x[partner] sin; what differs between the forms is how a loop reaches partners.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

from braze.kernels.spec import PairLayout, RopeSpec
from braze.lowering import inductor


def lower(x: Any, cos: Any, sin: Any, **attributes: Any) -> Any:
    """`braze.kernels.reference.rope` as pointwise code, in the form that the device's code generator makes most of."""
    spec = RopeSpec(**attributes)
    x.mark_reuse(2)  # each element is read for itself and for its partner
    rotation = _Rotation(x, cos, sin, spec)
    if x.get_device().type != "cpu":
        shifts = spec.layout_in == spec.layout_out == "half" and rotation.wide_tables
        return rotation.by_shift() if shifts else rotation.by_element()
    if spec.layout_in == spec.layout_out == "interleaved" and rotation.wide_tables:
        return rotation.by_shift()
    if spec.layout_in == spec.layout_out == "half" and rotation.whole and spec.rotary_dim // 2 % _CPU_LANES == 0:
        return rotation.by_element()
    if "interleaved" in (spec.layout_in, spec.layout_out):
        # A loop that steps by two is left to the C++ compiler, which vectorises it in float32 but not in 16-bit types.
        x, cos, sin = (_widened(t, rotation.acc) for t in (x, cos, sin))
        result = _Rotation(x, cos, sin, replace(spec, out_dtype=rotation.acc)).by_halves()
        return inductor.to_dtype(result, rotation.dtype)
    return rotation.by_halves()


def _widened(x: Any, dtype: torch.dtype) -> Any:
    """x in `dtype` as a tensor in memory, or x itself where it has that dtype."""
    if x.get_dtype() == dtype:
        return x
    return inductor.in_memory(inductor.to_dtype(x, dtype))


_CPU_LANES = 32  # the most elements in one of Inductor's vectors: 512 bits of a 16-bit type
_Index = Sequence[Any]


class _Rotation:
    """One rotation's loads and its three loop forms; element (j, i) is component j (0 or 1) of pair i."""

    def __init__(self, x: Any, cos: Any, sin: Any, spec: RopeSpec) -> None:
        self.x, self.spec = x, spec
        self.size = list(x.get_size())
        self.half = spec.rotary_dim // 2
        self.acc = torch.float64 if x.get_dtype() == torch.float64 else torch.float32
        self.dtype = spec.out_dtype or x.get_dtype()
        self.whole = inductor.same_size(self.size[-1], spec.rotary_dim)
        self.wide_tables = inductor.same_size(cos.get_size()[-1], spec.rotary_dim)
        self.load_x = x.make_loader()
        self.load_cos, self.load_sin = self._table(cos), self._table(sin)

    def _table(self, table: Any) -> Callable[[_Index, Any], Any]:
        """A loader of a table at (the index of x without the last, column)."""
        load, size = table.make_loader(), table.get_size()
        ahead = len(self.size) - len(size)
        single = [inductor.same_size(s, 1) for s in size[:-1]]

        def at(lead: _Index, column: Any) -> Any:
            return self._wide(load([0 if one else lead[ahead + n] for n, one in enumerate(single)] + [column]))

        return at

    def _wide(self, value: Any) -> Any:
        return inductor.ops.to_dtype(value, self.acc)

    def _place(self, layout: PairLayout, j: Any, i: Any) -> Any:
        return self.half * j + i if layout == "half" else 2 * i + j

    def _products(self, lead: _Index, j: Any, i: Any) -> tuple[Any, Any]:
        """(own element times cos, partner times sin): the result is their difference for j = 0, their sum for j = 1."""
        spec = self.spec
        own = self._wide(self.load_x([*lead, spec.start + self._place(spec.layout_in, j, i)]))
        partner = self._wide(self.load_x([*lead, spec.start + self._place(spec.layout_in, 1 - j, i)]))
        column = self._place(spec.layout_out, j, i) if self.wide_tables else i
        return (
            inductor.ops.mul(own, self.load_cos(lead, column)),
            inductor.ops.mul(partner, self.load_sin(lead, column)),
        )

    def _pointwise(self, size: _Index, value: Callable[[_Index], Any]) -> Any:
        return inductor.pointwise(self.x.get_device(), self.dtype, size, value)

    def by_element(self) -> Any:
        """One loop over the result, pairs by index arithmetic: fuses on both sides."""
        spec = self.spec

        def rotated(lead: _Index, d: Any) -> Any:
            n = d - spec.start
            outer, inner = FloorDiv(n, self.half), ModularIndexing(n, 1, self.half)
            if spec.layout_out == "interleaved":
                outer, inner = ModularIndexing(n, 1, 2), FloorDiv(n, 2)
            own, partner = self._products(lead, outer, inner)
            sign = (1 - 2 * outer) if spec.inverse else (2 * outer - 1)
            sign = self._wide(inductor.ops.index_expr(sign, torch.int32))
            return inductor.ops.add(own, inductor.ops.mul(partner, sign))

        def value(index: _Index) -> Any:
            lead, d = index[:-1], index[-1]
            if self.whole:
                return rotated(lead, d)
            inside = self._inside(d)
            turned = inductor.ops.masked(inside, lambda: rotated(lead, d), 0.0)
            return inductor.ops.where(inside, turned, self._wide(self.load_x(index)))

        return self._pointwise(self.size, value)

    def _inside(self, d: Any) -> Any:
        """Whether d is among the rotated ones."""
        position = inductor.ops.index_expr(d, torch.int32)
        begin, end = self.spec.start, self.spec.start + self.spec.rotary_dim
        inside = inductor.ops.lt(position, inductor.ops.constant(end, torch.int32))
        if begin == 0:
            return inside
        return inductor.ops.and_(inside, inductor.ops.ge(position, inductor.ops.constant(begin, torch.int32)))

    def by_shift(self) -> Any:
        """One loop over the result where both layouts agree: partners are two shifted loads under opposite masks.

        Both generators vectorise a load whose index steps by one, masked or not; index arithmetic hides that from them.
        """
        spec = self.spec

        def rotated(lead: _Index, d: Any) -> Any:
            n = inductor.ops.index_expr(d - spec.start, torch.int32)
            if spec.layout_in == "half":
                step, middle = self.half, inductor.ops.constant(self.half, torch.int32)
                first, second = inductor.ops.lt(n, middle), inductor.ops.ge(n, middle)
            else:
                step, one = 1, inductor.ops.constant(1, torch.int32)
                parity = inductor.ops.bitwise_and(n, one)
                first, second = inductor.ops.ne(parity, one), inductor.ops.eq(parity, one)
            before = inductor.ops.masked(second, lambda: self._wide(self.load_x([*lead, d - step])), 0.0)
            after = inductor.ops.masked(first, lambda: self._wide(self.load_x([*lead, d + step])), 0.0)
            turned = inductor.ops.sub(after, before) if spec.inverse else inductor.ops.sub(before, after)
            own = inductor.ops.mul(self._wide(self.load_x([*lead, d])), self.load_cos(lead, d - spec.start))
            return inductor.ops.add(own, inductor.ops.mul(turned, self.load_sin(lead, d - spec.start)))

        def value(index: _Index) -> Any:
            lead, d = index[:-1], index[-1]
            if self.whole:
                return rotated(lead, d)
            inside = self._inside(d)
            turned = inductor.ops.masked(inside, lambda: rotated(lead, d), 0.0)
            return inductor.ops.where(inside, turned, self._wide(self.load_x(index)))

        return self._pointwise(self.size, value)

    def by_halves(self) -> Any:
        """Two loops over pairs, one for each component, that write into one result; the scheduler makes one loop of them."""
        spec, last = self.spec, len(self.size) - 1

        def component(j: int) -> Any:
            def value(index: _Index) -> Any:
                own, partner = self._products(index[:-1], j, index[-1])
                return inductor.ops.add(own, partner) if (j == 1) != spec.inverse else inductor.ops.sub(own, partner)

            return self._pointwise([*self.size[:-1], self.half], value)

        def passed(begin: Any, end: Any) -> Any:
            return self._pointwise(
                [*self.size[:-1], end - begin], lambda index: self.load_x([*index[:-1], index[-1] + begin])
            )

        parts = [component(0), component(1)]
        if spec.layout_out == "interleaved":
            columns = [inductor.aten(torch.ops.aten.unsqueeze.default)(part, last + 1) for part in parts]
            pairs = inductor.cat(columns, last + 1)
            parts = [inductor.aten(torch.ops.aten.reshape.default)(pairs, [*self.size[:-1], spec.rotary_dim])]
        end = spec.start + spec.rotary_dim
        if spec.start:
            parts.insert(0, passed(0, spec.start))
        if not inductor.same_size(self.size[-1], end):
            parts.append(passed(end, self.size[-1]))
        return parts[0] if len(parts) == 1 else inductor.cat(parts, last)
