"""What a rotation is, element by element: each of the last dimension is linear in one tensor x, two taps an element, in pairs.

    out[a'] = C[a'] x[a] - S[a'] x[b],   out[b'] = C[b'] x[b] + S[b'] x[a],   out[d] = x[d] elsewhere

with C, S elements of tables that do not depend on x. Half, interleaved, complex, split-subtract, sign-swapped, partial
and interleaved-in/halves-out are values of the index maps (a, b) -> (a', b'), read off a few positions; the
proof (braze.passes.proof) then decides.
"""

from dataclasses import dataclass

import torch
from torch import fx

from braze.kernels.spec import PairLayout, RopeSpec
from braze.passes.element_args import tensor_of
from braze.passes.elements import Elements, Expr, Position, Sizes, trail
from braze.passes.linear import polynomial
from braze.passes.tables import NoTable, Table, is_view, table

aten = torch.ops.aten

#: An element of more terms than this comes close to no rotation: attention's own recurrences have sums like that.
MAX_TERMS_NEAR = 4


class NoRotation(Exception):
    """Why a candidate is no rotation; `near` where it came close enough to be worth telling."""

    def __init__(self, reason: str, near: bool = False) -> None:
        super().__init__(reason)
        self.near = near


@dataclass(frozen=True)
class Row:
    """One position's rotation: for each output element, its taps {input element: (constant, atom or None)}."""

    taps: tuple[dict[int, tuple[float, Expr | None]], ...]


@dataclass(frozen=True)
class Form:
    """A rotation's attributes and the tables that hold its coefficients."""

    spec: RopeSpec
    cos: Table
    sin: Table


def form_of(root: fx.Node, x: fx.Node, ev: Elements, sizes: Sizes) -> Form:
    """root as a rotation of x; NoRotation, or Unknown, where it is none."""
    shape = ev.shape(root)
    head = shape[-1]
    rows = {p: row_of(ev, root, x, p, head) for p in positions(shape[:-1])}
    first = next(iter(rows.values()))
    start, rotary = _rotary_range(first)
    layout_in, layout_out = _layouts(first, start, rotary)
    cosines: dict[tuple[Position, int], tuple[float, Expr]] = {}
    sines: dict[tuple[Position, int], tuple[float, Expr]] = {}
    looked = Elements(sizes, stop=lambda n: not is_view(n) and n.target is not aten.neg.default)
    written = Elements(sizes)
    for p, row in rows.items():
        if any(row.taps[d].keys() != first.taps[d].keys() for d in range(head)):
            raise NoRotation("the pairs differ from one position to another", near=True)
        for d in range(rotary):
            own, other, sign = _own_and_other(d, rotary, layout_in, layout_out)
            tap = row.taps[start + d]
            cosines[p, d] = _coefficient(tap[start + own], 1.0, looked)
            sines[p, d] = _coefficient(tap[start + other], sign, looked)
        _pair_up(p, rotary, layout_out, cosines, sines, written)
    inverse = _signs(cosines, sines)
    try:
        cos = _table(root, cosines, shape, rotary, layout_out, sizes)
        sin = _table(root, sines, shape, rotary, layout_out, sizes)
    except NoTable as e:
        raise NoRotation(str(e), near=True) from None
    cos, sin = _same_width(cos, sin)
    return Form(RopeSpec(rotary, start, layout_in, layout_out, inverse, root.meta["val"].dtype), cos, sin)


def positions(shape: tuple[int, ...]) -> list[Position]:
    """A few positions: an inner one, and for each dimension one that differs from it there alone."""
    base = tuple(min(s - 1, (s * 2 + i) // 3) for i, s in enumerate(shape))
    out = [base]
    for i, s in enumerate(shape):
        if s > 1:
            out.append(base[:i] + ((base[i] + 1) % s,) + base[i + 1 :])
    return out


def row_of(ev: Elements, root: fx.Node, x: fx.Node, p: Position, head: int) -> Row:
    """The taps of the elements root[p, :head]."""
    memo: dict[Expr, dict[tuple[Expr, ...], float]] = {}
    return Row(tuple(_taps(ev.at(root, (*p, d)), x, p, d, memo) for d in range(head)))


def _taps(
    expr: Expr, x: fx.Node, p: Position, d: int, memo: dict[Expr, dict[tuple[Expr, ...], float]]
) -> dict[int, tuple[float, Expr | None]]:
    taps: dict[int, tuple[float, Expr | None]] = {}
    products = False
    terms = polynomial(expr, memo)
    for atoms, constant in terms.items():
        own = [a for a in atoms if a.op == "load" and a.args[0] is x]
        rest = [a for a in atoms if a not in own]
        if len(own) != 1:
            raise NoRotation("not linear in the rotated tensor")
        idx = own[0].args[1]
        if idx[:-1] != p or not isinstance(idx[-1], int):
            raise NoRotation("an element of another token or head is mixed in")
        products = products or len(rest) > 1
        if idx[-1] in taps:
            raise NoRotation("a coefficient is a sum of several terms", near=len(terms) <= MAX_TERMS_NEAR)
        taps[idx[-1]] = (constant, rest[0] if rest else None)
    if products:
        raise NoRotation("a coefficient is a product of several tensors", near=len(taps) == 2)
    if not (len(taps) == 2 or taps == {d: (1.0, None)}):
        raise NoRotation(f"{len(taps)} taps of an element")
    if len(taps) == 2 and any(atom is None for _, atom in taps.values()):
        raise NoRotation("a coefficient is a constant")
    return taps


def _rotary_range(row: Row) -> tuple[int, int]:
    rotated = [d for d, taps in enumerate(row.taps) if len(taps) == 2]
    if not rotated:
        raise NoRotation("no element is rotated")
    start, size = rotated[0], len(rotated)
    if rotated != list(range(start, start + size)):
        raise NoRotation("the rotated elements are not contiguous", near=True)
    if size % 2:
        raise NoRotation(f"the rotary size {size} is odd", near=True)
    return start, size


def _pair(i: int, rotary: int, layout: PairLayout) -> tuple[int, int]:
    return (2 * i, 2 * i + 1) if layout == "interleaved" else (i, i + rotary // 2)


def _layouts(row: Row, start: int, rotary: int) -> tuple[PairLayout, PairLayout]:
    """The pair layouts (in, out) that explain every element's taps."""
    choices: tuple[PairLayout, PairLayout] = ("half", "interleaved")
    for layout_in in choices:
        for layout_out in choices:
            for i in range(rotary // 2):
                taps = {start + k for k in _pair(i, rotary, layout_in)}
                if any(row.taps[start + d].keys() != taps for d in _pair(i, rotary, layout_out)):
                    break
            else:
                return layout_in, layout_out
    raise NoRotation("its pairs are neither halves nor neighbours", near=True)


def _own_and_other(d: int, rotary: int, layout_in: PairLayout, layout_out: PairLayout) -> tuple[int, int, float]:
    """For output d: the tap that cos multiplies, the tap that sin multiplies, and the sign before sin."""
    first = d % 2 == 0 if layout_out == "interleaved" else d < rotary // 2
    i = d // 2 if layout_out == "interleaved" else d % (rotary // 2)
    a, b = _pair(i, rotary, layout_in)
    return (a, b, -1.0) if first else (b, a, 1.0)


def _coefficient(tap: tuple[float, Expr | None], sign: float, looked: Elements) -> tuple[float, Expr]:
    """A tap's sign and the element that is its table's; a table of mixed signs (a matrix of 2 x 2) has them taken out."""
    constant, atom = tap
    assert atom is not None
    inner = looked.at(*atom.args) if atom.op == "load" else atom
    if inner.op != "neg":
        return constant * sign, atom
    for node, idx in trail(atom.args[0], atom.args[1], looked) if atom.op == "load" else ():
        if node.target is aten.neg.default:
            # Its operand as it is: views of it are looked through with those of the others.
            return -constant * sign, looked.load(tensor_of(node.args[0]), idx)
    return -constant * sign, inner.args[0]


def _pair_up(
    p: Position,
    rotary: int,
    layout_out: PairLayout,
    cosines: dict[tuple[Position, int], tuple[float, Expr]],
    sines: dict[tuple[Position, int], tuple[float, Expr]],
    written: Elements,
) -> None:
    """Where a pair's coefficients of opposite signs are entries of one tensor that the graph fills (matrices of 2 x 2), both
    rows of the pair take those of its second: cos where both are computed alike, sin where one is computed as the other's
    negative."""
    for i in range(rotary // 2):
        first, second = ((p, d) for d in _pair(i, rotary, layout_out))
        (a, one), (b, other) = sines[first], sines[second]
        if a == b or one is other:
            continue
        values = [written.at(*e.args) if e.op == "load" else e for e in (one, other)]
        if written.make("neg", values[0]) is not values[1]:
            continue
        sines[first] = (-a, other)
        (a, one), (b, other) = cosines[first], cosines[second]
        if a == b and one.op == other.op == "load" and written.at(*one.args) is written.at(*other.args):
            cosines[first] = (a, other)


def _signs(
    cosines: dict[tuple[Position, int], tuple[float, Expr]], sines: dict[tuple[Position, int], tuple[float, Expr]]
) -> bool:
    """Whether the rotation is by the opposite angle; NoRotation where the signs are no rotation's at all."""
    if {c for c, _ in cosines.values()} != {1.0}:
        raise NoRotation("the first coefficient has a constant factor or a sign", near=True)
    signs = {c for c, _ in sines.values()}
    if signs not in ({1.0}, {-1.0}):
        raise NoRotation("the signs of the two halves are not opposite, as far as they show", near=signs <= {1.0, -1.0})
    return signs == {-1.0}


def _table(
    root: fx.Node,
    coefficients: dict[tuple[Position, int], tuple[float, Expr]],
    shape: tuple[int, ...],
    rotary: int,
    layout_out: PairLayout,
    sizes: Sizes,
) -> Table:
    return table({key: atom for key, (_, atom) in coefficients.items()}, shape, rotary, layout_out, sizes)


def _same_width(cos: Table, sin: Table) -> tuple[Table, Table]:
    if cos.width != sin.width:
        raise NoRotation("cos and sin tables have different widths", near=True)
    return cos, sin


def words(spec: RopeSpec, head: int) -> str:
    """The normal form in words."""
    name: str = spec.layout_in if spec.layout_in == spec.layout_out else f"{spec.layout_in} to {spec.layout_out}"
    if spec.rotary_dim < head:
        end = spec.start + spec.rotary_dim
        name += f", partial [{spec.start}:{end}] of {head}" if spec.start else f", partial {spec.rotary_dim} of {head}"
    return name + (", opposite angle" if spec.inverse else "")
