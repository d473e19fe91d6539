"""Where a program's graph ended at what depends on values, in code of experts: what lies behind the break is not fused."""

import ast
import linecache
import logging
from functools import lru_cache
from typing import Any

from torch import fx

from braze.passes.sites import NearMiss

log = logging.getLogger("braze")

_ON_VALUES = ("Dynamic shape operator", "Data dependent operator", "Data-dependent", "data-dependent", "Tensor.item()")


def end(gm: fx.GraphModule) -> Any | None:
    """What Dynamo says of the break that a captured graph ended at, a reason and a stack; None where it ended at no break."""
    ended = getattr(gm, "compile_subgraph_reason", None)
    return ended if ended is not None and ended.graph_break else None


def told(gm: fx.GraphModule) -> tuple[NearMiss, ...]:
    """Says that a graph ended at a break, if it did; the near miss where that was in a loop over experts."""
    ended = end(gm)
    if ended is None:
        return ()
    reason = ended.reason.partition("\n")[0]
    tell(reason)
    if not any(sign in ended.reason for sign in _ON_VALUES) or not ended.user_stack:
        return ()
    at = ended.user_stack[-1]
    if not _of_experts(at.filename, at.lineno or 0):
        return ()
    source = f"{at.filename}:{at.lineno} in {at.name}"
    what = f"the graph ends here, at what depends on values ({reason}); braze.fuse(model) takes loops over experts out of it"
    return (NearMiss("moe", "output", "find", what, source),)


def _of_experts(file: str, line: int) -> bool:
    """Whether the function around a line has a loop, and names experts, itself or by its class."""
    around = sorted((b for b in _blocks(file) if b[1] <= line <= b[2]), key=lambda b: b[1])
    if not around:
        return False
    text = "".join(linecache.getlines(file)[around[-1][1] - 1 : around[-1][2]])
    return "for " in text and "expert" in "".join([text, *(name for name, _, _ in around)]).lower()


@lru_cache(maxsize=64)
def _blocks(file: str) -> tuple[tuple[str, int, int], ...]:
    """The classes and functions of a source file, each with its first and its last line."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return ()
    kinds = (ast.FunctionDef, ast.ClassDef)
    return tuple((n.name, n.lineno, n.end_lineno or n.lineno) for n in ast.walk(tree) if isinstance(n, kinds))


@lru_cache(maxsize=256)
def tell(reason: str) -> None:
    """Says once for each reason that a model was captured in pieces."""
    log.warning(
        "only a piece of the model was captured (%s): what lies across the break is not fused. braze.fuse(model) takes loops "
        "over experts out of it; torch.compile(fullgraph=True) shows other breaks",
        reason,
    )
