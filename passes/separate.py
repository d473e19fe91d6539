"""Weights that each expert holds by itself: E matrices that the graph gets as inputs, given to the op as a list.

A site names them as stack(W_0, W_1, ...), gate and up first put together by cat(G_e, U_e): a name for the list, which no
kernel computes. `lists` reads it back; nothing is copied, so nothing is held twice and nothing goes stale.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from braze.passes.elements import LIST, Elements, trail
from braze.passes.products import Side
from braze.passes.sites import MoeSite

aten = torch.ops.aten


_CAST = torch.ops.prims.convert_element_type.default
#: Where a name for gate and up of two tensors keeps the two.
_APART = "braze_apart"
#: Where a weight of which a site has a view keeps the tensor itself, and how its value is made of the view's.
_SEEN = "braze_seen"


class NotStored(Exception):
    """Why a product's operand is no expert's weight."""


@dataclass(frozen=True)
class Stored:
    """A product's weight [out, in], or [in, out] where transposed, and its bias [out]; of: (tensor [E, ., .], e) where
    the weight is an expert's part of one tensor, likewise bias_of."""

    weight: fx.Node
    transposed: bool
    bias: fx.Node | None
    of: tuple[fx.Node, int] | None
    bias_of: tuple[fx.Node, int] | None


@dataclass(frozen=True)
class Product:
    """rows [tokens, in] times a view of a weight, and what is added to it."""

    rows: fx.Node
    weight: fx.Node
    bias: fx.Node | None


def product(node: fx.Node) -> Product | None:
    """The product of two matrices that a node is: mm, addmm, or mm plus a bias [columns], perhaps of another dtype."""
    if node.op != "call_function":
        return None
    a: Any = node.args
    if node.target is aten.mm.default:
        return Product(a[0], a[1], None)
    if node.target is aten.addmm.default:
        scaled = any(node.kwargs.get(name, 1) != 1 for name in ("alpha", "beta"))
        return None if scaled else Product(a[1], a[2], a[0])
    if node.target is not aten.add.Tensor or node.kwargs.get("alpha", 1) != 1:
        return None
    for x, bias in ((a[0], a[1]), (a[1], a[0])):
        if isinstance(x, fx.Node) and isinstance(bias, fx.Node) and getattr(bias.meta.get("val"), "ndim", None) == 1:
            mm = x.args[0] if x.target is _CAST and len(x.users) == 1 else x
            if isinstance(mm, fx.Node) and mm.target is aten.mm.default and len(mm.users) == 1:
                return Product(mm.args[0], mm.args[1], bias)  # type: ignore[arg-type]
    return None


def is_plain(node: fx.Node) -> bool:
    """Whether the node is a product of two matrices, with its bias if one is added."""
    found = product(node)
    if found is None or found.bias is not None or len(node.users) != 1:
        return found is not None
    after = next(iter(node.users))
    if after.target is _CAST and len(after.users) == 1:
        after = next(iter(after.users))
    return after.target is not aten.add.Tensor or product(after) is None


def left(node: fx.Node) -> fx.Node:
    """The row operand of a product of two matrices."""
    found = product(node)
    assert found is not None
    return found.rows


def stored(node: fx.Node, ev: Elements) -> Stored:
    """The weight and the bias of a product of two matrices, in the dtypes that it takes them in; NotStored where they are no
    plain tensors."""
    found = product(node)
    if found is None:
        raise NotStored(f"{node.name} is no product of two matrices")
    operand = found.weight
    paths = [dict(trail(operand, at, ev)) for at in ((0, 0), (1, 0), (0, 1))]
    weight = of = None
    transposed = False
    for source, idx in paths[0].items():
        inner, outer = (p.get(source) for p in paths[1:])
        if inner is None or outer is None or inner[:-2] != idx[:-2] or outer[:-2] != idx[:-2]:
            continue
        if source.meta["val"].dtype != operand.meta["val"].dtype:  # before a cast, autocast's say
            continue
        if idx[-2:] != (0, 0) or sorted((inner[-2:], outer[-2:])) != [(0, 1), (1, 0)]:
            continue
        if len(idx) == 2 and _product(ev.shape(source)) == _product(ev.shape(operand)):
            weight, transposed = source, inner == (1, 0)
        elif len(idx) == 3 and isinstance(idx[0], int):
            of = source, idx[0], inner[1:] == (1, 0)
    if weight is None:
        raise NotStored(f"{operand.name} is no expert's weight, indexed plainly")
    if of is not None and of[2] != transposed:
        of = None
    bias = bias_of = None
    if found.bias is not None:
        bias, bias_of = _bias(found.bias, ev.shape(node)[1], ev)
    return Stored(weight, transposed, bias, of and of[:2], bias_of)


def _bias(operand: fx.Node, columns: int, ev: Elements) -> tuple[fx.Node, tuple[fx.Node, int] | None]:
    at = (columns - 1,) if len(ev.shape(operand)) == 1 else (ev.shape(operand)[0] - 1, columns - 1)
    bias = of = None
    for node, idx in trail(operand, at, ev):
        if node.meta["val"].dtype != operand.meta["val"].dtype:
            continue
        if idx == (columns - 1,) and ev.shape(node) == (columns,):
            bias = node
        elif len(idx) == 2 and isinstance(idx[0], int) and ev.shape(node)[1] == columns and bias is not None:
            of = node, idx[0]
    if bias is None:
        raise NotStored(f"{operand.name} is no expert's bias [columns]")
    return bias, of


def _product(shape: Sequence[int]) -> int:
    out = 1
    for s in shape:
        out *= s
    return out


# ------------------------------------------------------------------------------------------------- naming lists


def weights(
    ups: Sequence[Sequence[Stored]], lows: Sequence[Sequence[Stored]], before: fx.Node, ev: Elements
) -> tuple[fx.Node, fx.Node, bool]:
    """(w1, w2, transposed): the tensors that hold all experts' weights, or names for their lists."""
    if len({s.transposed for row in (*ups, *lows) for s in row}) != 1:
        raise NotStored("the experts' weights are stored in different orders")
    transposed = ups[0][0].transposed
    for rows in (ups, lows):
        if len({tuple(ev.shape(s.weight) for s in row) for row in rows}) != 1:
            raise NotStored("the experts' weights have different shapes")
    whole = _whole([[s.of for s in row] for row in ups], ev), _whole([[s.of for s in row] for row in lows], ev)
    if whole[0] is not None and whole[1] is not None:
        return whole[0], whole[1], transposed
    w1 = name([[s.weight for s in row] for row in ups], 1 if transposed else 0, before)
    return w1, name([[s.weight for s in row] for row in lows], 0, before), transposed


def biases(rows: Sequence[Sequence[Stored]], listed: bool, before: fx.Node, ev: Elements) -> fx.Node | None:
    """The biases as one tensor or, where `listed`, as a name for their list; None where no product has one."""
    given = [[s.bias for s in row if s.bias is not None] for row in rows]
    if not any(given):
        return None
    if any(len(g) != len(row) for g, row in zip(given, rows, strict=True)):
        raise NotStored("only some of the experts' products have a bias")
    whole = _whole([[s.bias_of for s in row] for row in rows], ev)
    return whole if whole is not None and not listed else name(given, 0, before)


def _whole(rows: Sequence[Sequence[tuple[fx.Node, int] | None]], ev: Elements) -> fx.Node | None:
    """The tensor whose parts 0, 1, ... are the experts', if it is one."""
    parts = [row[0] for row in rows if len(row) == 1]
    found = [p for p in parts if p is not None]
    if len(found) != len(rows) or len({p[0] for p in found}) != 1 or [p[1] for p in found] != list(range(len(rows))):
        return None
    return found[0][0] if ev.shape(found[0][0])[0] == len(rows) else None


def name(rows: Sequence[Sequence[fx.Node]], dim: int, before: fx.Node) -> fx.Node:
    """A name for a list of tensors, each row put together along `dim`."""
    with before.graph.inserting_before(before):
        parts = [row[0] if len(row) == 1 else called(aten.cat.default, list(row), dim) for row in rows]
        found = called(aten.stack.default, parts)
    found.meta[LIST] = [n for row in rows for n in row]
    return found


def called(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A new call, inserted where the graph's insertion point is."""
    nodes = [a for arg in args for a in (arg if isinstance(arg, list) else [arg]) if isinstance(a, fx.Node)]
    node = nodes[0].graph.call_function(target, args, kwargs)
    node.meta["val"] = target(*fx.node.map_arg(args, lambda n: n.meta["val"]), **kwargs)
    return node


def turned(node: fx.Node) -> fx.Node:
    """Its last two dimensions exchanged, in the one op that Inductor knows for it after decomposition."""
    *outer, a, b = range(node.meta["val"].ndim)
    return called(aten.permute.default, node, [*outer, b, a])


def lists(node: fx.Node | None) -> list[fx.Node]:
    """The tensors that a name for a list stands for, gate before up where they are apart; none for other nodes."""
    return list(node.meta.get(LIST, ())) if node is not None else []


def is_given(node: fx.Node) -> bool:
    """Whether a node is a tensor that the graph is given, or a name for a list."""
    return node.op in ("placeholder", "get_attr") or LIST in node.meta


def apart(node: fx.Node | None) -> list[fx.Node]:
    """The two tensors, of all experts' gates and ups, that `named` put together by name; none for other nodes."""
    return list(node.meta.get(_APART, ())) if node is not None else []


def named(
    sides: Sequence[Side], biases: Sequence[fx.Node], down: Side, before: fx.Node
) -> tuple[fx.Node, fx.Node | None, fx.Node]:
    """(w1, b1, w2) as a site has them: gate and up of two tensors by a name that no kernel computes, w2 stored as w1 is by a
    view where that needs one."""
    with before.graph.inserting_before(before):
        w1, b1 = (
            _together(nodes, dim, before)
            for nodes, dim in (([s.weight for s in sides], 2 if sides[0].transposed else 1), (biases, 1))
        )
        w2 = down.weight
        if lists(w2) and sides[0].transposed != down.transposed:
            raise NotStored("the experts' weights are stored in different orders")
        if sides[0].transposed != down.transposed:
            w2 = turned(down.weight)
            w2.meta[_SEEN] = down.weight, lambda value: value.transpose(1, 2)
        assert w1 is not None
        return (_first(w1, w2), b1, _first(w2, w1))


def _first(weight: fx.Node, other: fx.Node) -> fx.Node:
    """As many experts of a weight as the other one has: those after them are none that the rows are given."""
    number, kept = weight.meta["val"].shape[0], other.meta["val"].shape[0]
    if number <= kept or apart(weight):
        return weight
    node = called(aten.slice.Tensor, weight, 0, 0, kept)
    node.meta[_SEEN] = weight, lambda value: torch.cat((value, value.new_zeros(number - kept, *value.shape[1:])))
    return node


def sources(node: fx.Node | None) -> list[fx.Node]:
    """The graph's own tensors that a site's weight or bias is a name for or a view of; none where it is one itself."""
    seen = [node.meta[_SEEN][0]] if node is not None and _SEEN in node.meta else []
    return [*lists(node), *apart(node), *seen]


def _together(nodes: Sequence[fx.Node], dim: int, before: fx.Node) -> fx.Node | None:
    if len(nodes) < 2:
        return nodes[0] if nodes else None
    if all(map(lists, nodes)):
        rows = [list(row) for row in zip(*map(lists, nodes), strict=True)]
        return name(rows, dim - 1, before)
    together = called(aten.cat.default, list(nodes), dim)
    together.meta[_APART] = list(nodes)
    return together


def parts_of(node: fx.Node, value: Tensor) -> dict[fx.Node, Tensor]:
    """The values of a node's `sources`, where it has `value`."""
    if _SEEN in node.meta:
        source, back = node.meta[_SEEN]
        return {source: back(value)}
    together = apart(node)
    if together:
        return dict(zip(together, value.chunk(2, node.args[1]), strict=True))  # type: ignore[arg-type]
    parts = lists(node)
    if not parts:
        return {}
    each = len(parts) // value.shape[0]
    first: Any = node.args[0][0]  # type: ignore[index]
    pieces = [v.unbind(0) for v in value.chunk(each, 1 + first.args[1] if each > 1 else 0)]
    return {n: pieces[i % each][i // each] for i, n in enumerate(parts)}


def viewed(site: MoeSite) -> dict[fx.Node, fx.Node]:
    """What a site's x, ids and weights are plain views of, each with the view; x may be cast as well."""
    views = [v for v in (site.ids, site.values) if v.target is aten.reshape.default]
    found = {v.args[0]: v for v in views if isinstance(v.args[0], fx.Node)}
    node, width = site.x, site.x.meta["val"].shape[-1]
    while node.target in (aten.reshape.default, _CAST) and node.args[0].meta["val"].shape[-1] == width:  # type: ignore[union-attr]
        node = node.args[0]  # type: ignore[assignment]
        found[node] = site.x
    return found


def given(site: MoeSite) -> list[fx.Node]:
    """What a site's inputs are views or lists of: the subgraph may start there."""
    return [*viewed(site), *(n for w in (site.w1, site.w2, site.b1, site.b2) for n in sources(w))]


# ------------------------------------------------------------------------------------------------- rows of tokens


def size_of(node: fx.Node, dim: int) -> Any:
    """A size as an argument: an int, or the graph's input that gives it."""
    size = node.meta["val"].shape[dim]
    if isinstance(size, int):
        return size
    for given in node.graph.find_nodes(op="placeholder"):
        value = given.meta.get("val")
        if isinstance(value, torch.SymInt) and value.node.expr == size.node.expr:
            return given
    raise NotStored(f"tokens in several dimensions, of which one has the symbolic size {size}")


def reshaped(node: fx.Node, shape: list[Any]) -> fx.Node:
    """A view of a node, inserted where the graph's insertion point is."""
    return called(aten.reshape.default, node, shape)


def cast(node: fx.Node, dtype: torch.dtype, before: fx.Node) -> fx.Node:
    """A tensor in the dtype that the experts' products read it in."""
    if node.meta["val"].dtype == dtype:
        return node
    with before.graph.inserting_before(before):
        return called(_CAST, node, dtype)


def rows_of(node: fx.Node, width: int, ev: Elements, before: fx.Node) -> fx.Node:
    """A tensor [.., width] as [tokens, width]."""
    if len(ev.shape(node)) == 2:
        return node
    with before.graph.inserting_before(before):
        return reshaped(node, [-1, width])


def flat(root: fx.Node, ev: Elements) -> fx.Node:
    """A block's output as [tokens, hidden]: where it has more dimensions, its users get it back by a view of that."""
    shape = ev.shape(root)
    if len(shape) == 2:
        return root
    unknown = next((d for d, s in enumerate(root.meta["val"].shape) if not isinstance(s, int)), None)
    back = [-1 if d == unknown else size_of(root, d) for d in range(len(shape))]
    users = list(root.users)
    with root.graph.inserting_after(root):
        rows = reshaped(root, [-1, shape[-1]])
    with root.graph.inserting_after(rows):
        whole = reshaped(rows, back)
    for user in users:
        user.replace_input_with(root, whole)
    return rows
