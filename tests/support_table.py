"""docs/support.md, from what tests/support.py measured."""

from collections.abc import Mapping, Sequence

from tests.families import FAMILIES
from tests.support import Outcome

_HEAD = """# Families of transformers

<!-- generated: python -m tests.support (`make support`) -->

Every mixture-of-experts family of transformers {version}, as a tiny random model: captured, fused and interpreted on CPU: all
of braze but code generation. A cell says how many of the model's expert layers were fused: `2/2` is all of them. Graphs are
captured for one token with a cache (decode), for a second length (dynamic) and for a prompt (prefill). Errors are the
largest difference from the model in float64, relative to its largest value. In bfloat16 nearly equal scores change places, in
eager too: the errors are then those against the float64 model with the same experts chosen, and the column before says at how
many of the choices (one a layer and token) braze and eager chose others than float64 does. The experts' weights count among the
errors. `own` is a class without transformers' choice of implementation, through `braze.fuse`. {summary}
"""

_COLUMNS = (
    "family", "grouped f32 dynamic", "grouped bf16 decode", "batched f32 decode", "batched bf16 prefill",
    "own f32 dynamic", "own bf16 decode", "own bf16 prefill", "routers", "rope", "error f32",
    "routes otherwise bf16 (eager)", "error bf16 (eager)",
    "what is missing",
)  # fmt: skip
_CASES = (
    ("grouped_mm", "float32", "dynamic"), ("grouped_mm", "bfloat16", "decode"), ("batched_mm", "float32", "decode"),
    ("batched_mm", "bfloat16", "prefill"), ("own", "float32", "dynamic"), ("own", "bfloat16", "decode"),
    ("own", "bfloat16", "prefill"),
)  # fmt: skip


def page(found: Mapping[str, Sequence[Outcome] | None]) -> str:
    """The page for outcomes by family; None where a family gave none."""
    from importlib.metadata import version

    whole = sum(bool(o) and all(c.whole for c in o) for o in found.values() if o is not None)
    measured = sum(o is not None for o in found.values())
    summary = f"Of {len(found)} families {measured} are measured, and {whole} of those fused in every case."
    lines = [_line(_COLUMNS), _line(["---"] * len(_COLUMNS))]
    lines += [_line(_row(name, outcomes)) for name, outcomes in sorted(found.items())]
    return _HEAD.format(version=version("transformers"), summary=summary) + "\n" + "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _row(name: str, outcomes: Sequence[Outcome] | None) -> list[str]:
    if outcomes is None:
        return [name, *[""] * (len(_COLUMNS) - 2), "not measured yet"]
    by_case = {(o.form, o.dtype, o.mode): o for o in outcomes}
    cells = [_cell(by_case.get(c)) for c in _CASES]
    ran = [o for o in outcomes if not o.failure]
    return [name, *cells, _most(ran, "router"), _most(ran, "rope"), *_errors(ran), _missing(name, outcomes)]


def _cell(outcome: Outcome | None) -> str:
    if outcome is None:
        return ""
    if outcome.failure:
        return "does not run"
    pieces = f" in {outcome.graphs} graphs" if outcome.graphs > 1 else ""
    return f"{outcome.moe}/{outcome.layers}{pieces}{'' if outcome.exact else ', inexact'}"


def _most(ran: Sequence[Outcome], kind: str) -> str:
    counts = sorted({getattr(o, kind) for o in ran})
    return "" if not counts else str(counts[0]) if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"


def _errors(ran: Sequence[Outcome]) -> list[str]:
    exact = [o for o in ran if o.dtype == "float32"]
    half = max((o for o in ran if o.dtype == "bfloat16"), key=lambda o: o.error, default=None)
    routed = [o for o in ran if o.choices]
    other, eager, of = (sum(getattr(o, f) for o in routed) for f in ("other", "eager_other", "choices"))
    return [
        f"{max(o.error for o in exact):.0e}" if exact else "",
        f"{other} ({eager}) of {of}" if routed else "",
        f"{half.error:.0e} ({half.eager:.0e})" if half is not None else "",
    ]


def _missing(name: str, outcomes: Sequence[Outcome]) -> str:
    """Why not everything was fused, shortest words first."""
    if FAMILIES[name].unlike:
        return FAMILIES[name].unlike
    failures = [f"{o.form} {o.mode}: {o.failure}" for o in outcomes if o.failure]
    reasons = [r for o in outcomes if not o.whole for r in o.reasons if r.startswith("moe")]
    if not failures and not reasons and any(o.moe < o.layers for o in outcomes):
        reasons = ["no expert products in one graph"]
    told = list(dict.fromkeys(reasons))[:2] + failures[:1]
    return "; ".join(told).replace("|", "/").replace("<", "&lt;")[:200]
