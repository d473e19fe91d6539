"""Finds dense MLPs of few tokens, shared experts among them: an expert block of one expert that every token has, unweighted.

    out[t] = act(x[t] W1 + b1) W2 + b2

Looked for only where the experts' kernels take few rows (mlp.py of kernels.cpp and of kernels.triton): elsewhere, and with more
tokens, two plain products and what lies between are what Inductor does as well.
"""

from torch import fx

from braze.kernels.cpp import mlp as cpp_mlp
from braze.kernels.spec import MoeSpec
from braze.kernels.triton import mlp as triton_mlp
from braze.passes import separate
from braze.passes.elements import Elements, Sizes, Unknown
from braze.passes.linear import TooLarge
from braze.passes.products import NoExperts
from braze.passes.separate import is_plain
from braze.passes.sites import MlpSite, NearMiss, source_line
from braze.passes.written import activation_of, check_private, expert_of, firsts, last_row, read_by


def find(graph: fx.Graph, sizes: Sizes) -> tuple[list[MlpSite], list[NearMiss]]:
    """Every MLP of few tokens whose kernel is at hand, and every pair of products that is none, with the reason."""
    sites: list[MlpSite] = []
    misses: list[NearMiss] = []
    ev = Elements(sizes, stop=is_plain)
    for down in graph.nodes:
        if not is_plain(down) or not _few(down) or not firsts(down, 0, ev):
            continue
        try:
            sites.append(_site(down, ev))
        except (NoExperts, Unknown, TooLarge, separate.NotStored) as e:
            misses.append(NearMiss("mlp", down.name, "find", str(e), source_line([down])))
    return sites, misses


def _few(node: fx.Node) -> bool:
    rows = node.meta["val"]
    return cpp_mlp.few(rows) or triton_mlp.few(rows)


def _site(down: fx.Node, ev: Elements) -> MlpSite:
    expert = expert_of(down, ev)
    text, layout = activation_of(down, expert, ev)
    parts = [separate.stored(f, ev) for f in (*expert.firsts, down)]
    if len({s.transposed for s in parts}) != 1:
        raise NoExperts("the weights are stored in different orders")
    *up, low = parts
    columns = sum(ev.shape(f)[1] for f in expert.firsts)
    if columns != len(expert.symbols) * ev.shape(separate.left(down))[1]:
        raise NoExperts("the first product has columns that are not used")
    b1 = [s.bias for s in up if s.bias is not None]
    if len(b1) not in (0, len(up)):
        raise NoExperts("only one of gate and up has a bias")
    operands = [separate.left(f) for f in expert.firsts]
    source = read_by([(rows, last_row(rows, ev)) for rows in operands], ev)
    if ev.shape(source)[-1] != ev.shape(down)[-1]:
        raise NoExperts("its input and its output have different sizes")
    check_private(down, [expert], [down])
    x = separate.rows_of(source, ev.shape(source)[-1], ev, down)
    spec = MoeSpec(text, layout, low.transposed, out_dtype=down.meta["val"].dtype)
    return MlpSite(down, source, x, tuple(s.weight for s in up), low.weight, tuple(b1), low.bias, spec)
