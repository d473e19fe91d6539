"""Numbers that a find's structure needs, where the graph has symbols for them: they become what they are at this call.

Under dynamic=True, Dynamo makes symbols of integers that a function is given or closes over (a head's size, the k of a top-k),
and of all sizes of tensors that it is given, weights among them. The passes look at a copy of the graph in which every symbol
is its value. What the sites found there need to know, the graph then fixes by guards of its shape environment, as Inductor does
where it needs a number: a call with another one compiles anew. Numbers of tokens, which no site needs, stay symbols.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._dynamo.source import TensorPropertySource
from torch._guards import CompileContext

from braze.passes import small
from braze.passes.sites import MlpSite, MoeSite, NormSite, RopeSite, RouterSite, Site

aten = torch.ops.aten
#: Where the copy keeps what a node gives in the graph itself.
_SYMBOLIC = "braze_symbolic"

#: Finds and fuses all that a graph holds, and tells of each site before it is gone.
Look = Callable[[fx.Graph, Callable[[Site | NormSite], None]], None]


def settle(graph: fx.Graph, look: Look, floats: Mapping[int, float]) -> set[int]:
    """Fixes what the sites that `look` finds in a copy of the graph need; returns which of the given floats they need.

    floats: by the numbers of the inputs that hold them. They cannot be fixed in this graph: it has to be captured again.
    """
    inputs = graph.find_nodes(op="placeholder")
    if not floats and not any(isinstance(s, torch.SymInt) for n in inputs for s in _sizes(n)):
        return set()
    _with_numbers(graph, _known)  # what the program's own guards have fixed
    symbols, doubtful = _symbols(graph)
    if not (doubtful or floats) or _compiled_often():
        return set()
    needed: set[sympy.Symbol] = set()
    constants: set[fx.Node] = set()

    def needs(site: Site | NormSite) -> None:
        needed.update(*map(free, _structure(site)))
        constants.update(small.between(*_ends(site)))

    copy = _copied(graph)
    places = _with_floats(copy, floats)
    look(copy, needs)
    if not constants.isdisjoint(places):
        return {n for node, n in places.items() if node in constants}
    needed &= symbols.keys()
    for symbol in sorted(needed, key=str):
        int(symbols[symbol])  # guards
    if needed:
        _with_numbers(graph, _known)
    return set()


def _with_floats(graph: fx.Graph, floats: Mapping[int, float]) -> dict[fx.Node, int]:
    """Puts floats in the place of inputs; returns what holds which."""
    places = {}
    inputs = graph.find_nodes(op="placeholder")
    for n, value in floats.items():
        val = inputs[n].meta.get("val") if n < len(inputs) else None
        if isinstance(val, Tensor) and val.dtype == torch.float64 and not val.ndim:
            with graph.inserting_after(inputs[-1]):
                number = graph.call_function(aten.full.default, ([], value), {"dtype": val.dtype, "device": val.device})
            number.meta = dict(inputs[n].meta)
            inputs[n].replace_all_uses_with(number)
            places[number] = n
    return places


def symbolic(node: fx.Node) -> Any:
    """What a node gives, by symbols in a copy with numbers too."""
    return node.meta.get(_SYMBOLIC, node.meta["val"])


def _ends(site: Site | NormSite) -> tuple[list[fx.Node], list[fx.Node]]:
    """What a site gives, and what it is given."""
    if isinstance(site, RopeSite):
        return [site.root], [site.x, site.cos, site.sin]
    if isinstance(site, NormSite):
        return [site.normed], [n for n in (site.source, site.weight) if n is not None]
    if isinstance(site, RouterSite):
        return [site.weights, site.ids], [n for n in (site.logits, site.bias) if n is not None]
    if isinstance(site, MlpSite):
        return [site.root], list(site.given)
    ids = [] if site.chosen else [site.ids]
    given = (site.x, site.w1, site.w2, site.b1, site.b2, site.values, *site.chosen, *site.given)
    return [site.root, *ids], [*ids, *(n for n in given if n is not None)]


def _known(size: torch.SymInt) -> int | None:
    """The number that a symbolic size has become, if it has."""
    return int(size.node.expr) if size.node.expr.is_Integer else None


def _sizes(node: fx.Node) -> tuple[Any, ...]:
    """A tensor's sizes, or what else a node gives."""
    val = node.meta.get("val")
    return tuple(val.shape) if isinstance(val, Tensor) else (val,)


def free(size: Any) -> set[sympy.Symbol]:
    """The symbols in a size."""
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()


def _compiled_often() -> bool:
    """Whether this code was compiled so often that its numbers are not to be guarded any more: past a limit it runs eagerly."""
    now = CompileContext.current_compile_id()
    times = getattr(now, "frame_compile_id", None) or 0
    return bool(times >= torch._dynamo.config.recompile_limit // 2)


def _symbols(graph: fx.Graph) -> tuple[dict[sympy.Symbol, torch.SymInt], bool]:
    """The graph's symbols that may become numbers, and whether any may be more than a number of tokens: an integer of the
    program, or how long the rows of a tensor are."""
    found: dict[sympy.Symbol, torch.SymInt] = {}
    doubtful = False
    for node in graph.find_nodes(op="placeholder"):
        val = node.meta.get("val")
        for size in _sizes(node):
            if (
                isinstance(size, torch.SymInt)
                and size.node.expr.is_Symbol
                and size.node.hint is not None
                and _open(size)
            ):
                found.setdefault(size.node.expr, size)
                doubtful |= _is_integer(size)
        rows = isinstance(val, Tensor) and val.ndim > 1 and val.is_floating_point()
        doubtful |= rows and not found.keys().isdisjoint(free(val.shape[-1]))
    return found, doubtful


def _is_integer(size: torch.SymInt) -> bool:
    """Whether a symbol is an integer of the program, no tensor's size."""
    sources = size.node.shape_env.var_to_sources.get(size.node.expr, ())
    return bool(sources) and not any(isinstance(s, TensorPropertySource) for s in sources)


def _open(size: torch.SymInt) -> bool:
    """Whether a symbol may be guarded: neither too late, for a backward graph, nor where someone asked for it to be dynamic.
    Sizes of tensors that nobody asked for share a symbol where they are equal, and are listed for that."""
    env = size.node.shape_env
    return not env.frozen and (_is_integer(size) or size.node.expr in env.val_to_var.values())


def _copied(graph: fx.Graph) -> fx.Graph:
    """The graph with every symbol's value in its place; what the nodes give by symbols is kept beside."""
    copy = fx.Graph()
    places: dict[fx.Node, fx.Node] = {}
    result = copy.graph_copy(graph, places)
    copy.output(result).meta = dict(graph.output_node().meta)
    for node in copy.nodes:
        node.meta[_SYMBOLIC] = node.meta.get("val")
    _with_numbers(copy, lambda size: size.node.hint)
    return copy


def _with_numbers(graph: fx.Graph, number: Callable[[torch.SymInt], int | None]) -> None:
    """Puts numbers where `number` gives them for symbolic sizes: in what nodes give, and in arguments."""

    def put(value: Any) -> Any:
        if isinstance(value, torch.SymInt):
            known = number(value)
            return value if known is None else known
        if isinstance(value, Tensor):
            lie = (tuple(value.shape), tuple(value.stride()), value.storage_offset())
            if not any(isinstance(n, torch.SymInt) and number(n) is not None for n in (*lie[0], *lie[1], lie[2])):
                return value
            with value.fake_mode:  # type: ignore[attr-defined]
                return value.as_strided(tuple(map(put, lie[0])), tuple(map(put, lie[1])), put(lie[2]))
        return type(value)(map(put, value)) if type(value) in (list, tuple) else value

    constants: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = put(node.meta["val"])
        if isinstance(node.meta.get("val"), int) and node.op != "output":
            constants[node] = node.meta["val"]
        args, kwargs = fx.node.map_aggregate((node.args, dict(node.kwargs)), put)
        known = fx.node.map_arg((args, kwargs), lambda n: constants.get(n, n))
        node.args, node.kwargs = known if node.op != "output" else (node.args, node.kwargs)


def _structure(site: Site | NormSite) -> Iterator[Any]:
    """The sizes that are what a site is, not how much of it there is."""
    if isinstance(site, RopeSite):
        turned = {site.x}
        for node in small.between([site.root], [site.x]):
            if turned.intersection(node.all_input_nodes):
                turned.add(node)
        for node in turned:
            yield from _shape(node)[-1:]
    elif isinstance(site, MoeSite | MlpSite):
        weights = (site.w1, site.w2) if isinstance(site, MoeSite) else (*site.w1, site.w2)
        yield from (size for w in weights for size in _shape(w))
        for rows in (site.x, *((site.ids, site.weights) if isinstance(site, MoeSite) else ())):
            yield from _columns(rows)
    elif isinstance(site, RouterSite):
        rows = set().union(*map(free, _shape(site.logits)[:-1]))
        for node in (site.logits, *small.between([site.ids, site.weights], [site.logits])):
            yield from (size for size in _shape(node) if not rows & free(size))


def _shape(node: fx.Node) -> tuple[Any, ...]:
    """A node's sizes by symbols; those of what it is made of where a pass made it."""
    if _SYMBOLIC in node.meta:
        val = node.meta[_SYMBOLIC]
        return tuple(val.shape) if isinstance(val, Tensor) else ()
    return tuple(size for n in node.all_input_nodes for size in _shape(n))


def _columns(node: fx.Node) -> tuple[Any, ...]:
    """How long a matrix's rows are, or those of what it is made of where a pass made it."""
    if _SYMBOLIC in node.meta:
        return _shape(node)[1:][-1:]
    return tuple(size for n in node.all_input_nodes for size in _columns(n))
