"""Which families are fused, in which form: `python -m tests.support > docs/support.md`.

Each family runs in a process of its own: its graphs are captured, fused and interpreted (all of braze but code generation), and
the result is compared with the model in float64, its experts as a plain loop. What was measured is kept in build/support and
taken from there while the model and the versions are the same, so that a run that was cut off goes on; `--anew` measures all.
"""

import argparse
import copy
import hashlib
import importlib.metadata
import inspect
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "build" / "support"

#: (experts implementation, dtype, mode) of every case of a class that has the choice, and of one that has its own way.
CASES = (
    ("grouped_mm", "float32", "dynamic"),
    ("grouped_mm", "bfloat16", "decode"),
    ("batched_mm", "float32", "decode"),
    ("batched_mm", "bfloat16", "prefill"),
)
OWN_CASES = (("own", "float32", "dynamic"), ("own", "bfloat16", "decode"), ("own", "bfloat16", "prefill"))


@dataclass(frozen=True)
class Outcome:
    """One case: sites of each kind in the last pass through the model, its expert layers, the errors of braze and of eager
    relative to float64, and what stood in the way. other, eager_other: at how many of `choices` (layer, token) they chose
    other experts than float64 does; error and eager then are those where float64 takes the same experts (`tests.routing`)."""

    form: str
    dtype: str
    mode: str
    graphs: int = 0
    layers: int = 0
    moe: int = 0
    router: int = 0
    rope: int = 0
    error: float = 0.0
    eager: float = 0.0
    other: int = 0
    eager_other: int = 0
    choices: int = 0
    reasons: tuple[str, ...] = ()
    failure: str = ""

    @property
    def whole(self) -> bool:
        """Whether every expert layer was fused and the result is as good as eager's."""
        return not self.failure and 0 < self.layers <= self.moe and self.exact

    @property
    def exact(self) -> bool:
        slack = {"float32": 1e-5, "bfloat16": 2.0**-5}[self.dtype]
        few = self.other <= self.eager_other + max(1, self.choices // 16)
        return few and self.error <= 1.5 * self.eager + slack


# ---------------------------------------------------------------------------------------------------- one family


def measure(name: str) -> list[Outcome]:
    """Every case of a family, in this process."""
    from tests.families import build

    return [_outcome(name, *case) for case in (CASES if has_choice(build(name)) else OWN_CASES)]


def has_choice(model: Any) -> bool:
    """Whether the model's experts take transformers' experts implementations."""
    return any("config" in vars(m) and hasattr(type(m).forward, "__wrapped__") for m in _experts(model))


def _experts(model: Any) -> list[Any]:
    found = {n: m for n, m in model.named_modules() if n.split(".")[-1] == "experts"}
    return [m for n, m in found.items() if not any(n.startswith(f"{o}.") for o in found)]


def _outcome(name: str, form: str, dtype: str, mode: str) -> Outcome:
    import torch

    from tests.families import build

    model = build(name, getattr(torch, dtype), None if form == "own" else form)
    layers = len(_experts(model))
    try:
        return _run(name, model, Outcome(form, dtype, mode, layers=layers))
    except Exception as e:
        return Outcome(
            form, dtype, mode, layers=layers, failure=f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        )


def _run(name: str, model: Any, case: Outcome) -> Outcome:
    import torch

    from braze.loops import without_loops
    from tests.harness import Fused
    from tests.routing import Route, watch, watch_graph
    from tests.tiny import as_float64

    calls = {"prefill": _prefill, "decode": _decode, "dynamic": _dynamic}[case.mode](name)
    plain, twin = copy.deepcopy(model), as_float64(model)
    log: list[Route] = []
    ran: set[int] = set()
    for experts in _experts(plain):
        experts.register_forward_pre_hook(lambda module, args: ran.add(id(module)))
    if _routed(model):
        watch(_experts(plain), log)
    if case.form == "own":
        without_loops(model)
    fused = Fused(model, strict=False, after=lambda graph: watch_graph(graph, log))
    with torch.no_grad():
        for call in calls:
            before = len(fused.results)
            ran.clear()
            log.clear()
            got, ours = call(fused, plain), tuple(log)
            log.clear()
            eager, theirs = call(plain, plain), tuple(log)
        exact = _exactly(call, twin)
        mine, stock = Run(_error(got, exact)), Run(_error(eager, exact))
        # An expert of no parameters is none to the graph, and rows that are added up outside are one token each.
        same = not any(getattr(vars(m).get("forward"), "rest", None) for m in model.modules())
        same = same and [r.ids.numel() // r.ids.shape[-1] for r in ours] == [
            r.ids.numel() // r.ids.shape[-1] for r in theirs
        ]
        if theirs and len(ours) == len(theirs) and same and case.dtype == "bfloat16":
            mine, stock = _forced(call, got, ours, model), _forced(call, eager, theirs, model)
    results = fused.results[before:]
    layers = len(ran) or case.layers  # those that ran: not, for instance, those for images

    def count(kind: str) -> int:
        return sum(f.kind == kind for r in results for _, f in r.calls)

    reasons = tuple(dict.fromkeys(f"{m.kind}: {m.reason}" for r in results for m in r.near_misses))
    errors = tuple(e for r in results for e in r.errors)
    return Outcome(
        case.form, case.dtype, case.mode, len(results), layers, count("moe"), count("router"), count("rope"),
        mine.error, stock.error, mine.other, stock.other, mine.choices, reasons + errors,
    )  # fmt: skip


@dataclass(frozen=True)
class Run:
    """error: relative to float64 with the same experts; other: at how many of `choices` it chose others than float64."""

    error: float
    other: int = 0
    choices: int = 0


def _forced(call: "Call", got: Any, routes: Sequence[Any], model: Any) -> Run:
    """A run's errors, its weights' among them, against float64 that takes its experts."""
    from tests.routing import differing, force, weight_error
    from tests.tiny import as_float64

    twin = as_float64(model)
    own = force(_experts(twin), routes)
    error = _error(got, _exactly(call, twin))
    choices = sum(r.ids.numel() // r.ids.shape[-1] for r in own)
    return Run(max(error, weight_error(routes, own)), differing(routes, own), choices)


def _exactly(call: "Call", twin: Any) -> Any:
    from tests.routing import AllDouble

    with AllDouble():
        return call(twin, twin)


def _routed(model: Any) -> bool:
    """Whether the experts take ids and weights."""
    return all(len(inspect.signature(type(m).forward).parameters) == 4 for m in _experts(model))


Call = Callable[[Any, Any], Any]


def _prefill(name: str) -> list[Call]:
    from tests.families import inputs

    return [lambda m, plain: _first(m(**_as(plain, inputs(name))))]


def _as(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Inputs, images among them in the model's dtype."""
    dtype = next(model.parameters()).dtype
    return {name: v.to(dtype) if v.is_floating_point() else v for name, v in given.items()}


def _dynamic(name: str) -> list[Call]:
    from tests.families import inputs

    return [lambda m, plain, n=n: _first(m(**_as(plain, inputs(name, n)))) for n in (8, 12)]


def _decode(name: str) -> list[Call]:
    """One token: after a prefix that the plain model read; a decoder's after a prompt; alone where the model keeps nothing."""
    from tests.families import inputs

    given = inputs(name)
    if "pixel_values" in given:
        return _prefill(name)
    ids = given.get("decoder_input_ids", given["input_ids"])

    def step(m: Any, plain: Any) -> Any:
        if "decoder_input_ids" in given:
            return _first(m(input_ids=given["input_ids"], decoder_input_ids=ids[:, :1]))
        if "past_key_values" not in inspect.signature(plain.forward).parameters:
            return _first(m(input_ids=ids[:, 8:9]))
        cache = plain(input_ids=ids[:, :8], use_cache=True).past_key_values
        return _first(m(input_ids=ids[:, 8:9], past_key_values=copy.deepcopy(cache), use_cache=True))

    return [step]


def _first(output: Any) -> Any:
    found = output.logits if "logits" in output else output[0]
    return found[0] if isinstance(found, list | tuple) else found


def _error(got: Any, exact: Any) -> float:
    return float((got.double() - exact).abs().max() / exact.abs().max())


# ------------------------------------------------------------------------------------------------- all of them


def digest(name: str, cases: Sequence[Any]) -> str:
    """What a family's outcomes are kept for. Not braze's sources: `--anew` measures again after those changed."""
    from tests.families import FAMILIES, SMALL

    made = hashlib.sha256(repr((FAMILIES[name], SMALL, cases)).encode())
    made.update((ROOT / "tests" / "support.py").read_bytes())
    for package in ("torch", "transformers"):
        made.update(importlib.metadata.version(package).encode())
    return made.hexdigest()


def _cases(outcomes_: Sequence[Outcome]) -> Any:
    return OWN_CASES if any(o.form == "own" for o in outcomes_) else CASES


def kept(name: str) -> list[Outcome] | None:
    """A family's outcomes of an earlier run, if nothing that they depend on has changed."""
    file = KEPT / f"{name}.json"
    if not file.exists():
        return None
    found = json.loads(file.read_text())
    known = _read(found["outcomes"])
    return known if found["digest"] == digest(name, _cases(known)) else None


def keep(name: str) -> None:
    """Measures a family and keeps the outcomes: the work of one process."""
    import torch

    warnings.filterwarnings("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the page goes there, and nothing else
    torch.set_num_threads(1)
    made = measure(name)
    KEPT.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"digest": digest(name, _cases(made)), "outcomes": [asdict(o) for o in made]}, indent=1)
    (KEPT / f"{name}.json").write_text(text)


def complete(names: Sequence[str], jobs: int, timeout: float) -> None:
    """Measures the families that have no kept outcomes, each in a fork of this process that ends after `timeout` seconds."""
    context = multiprocessing.get_context("fork")
    waiting = [n for n in names if kept(n) is None]
    running: dict[Any, float] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            process = context.Process(target=keep, args=(waiting.pop(0),))
            process.start()
            running[process] = time.monotonic() + timeout
        for process, end in list(running.items()):
            if time.monotonic() > end:
                process.kill()
            if not process.is_alive():
                process.join()
                del running[process]
        time.sleep(0.2)


def _read(plain: list[dict[str, Any]]) -> list[Outcome]:
    return [Outcome(**{**p, "reasons": tuple(p["reasons"])}) for p in plain]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="measure these and print nothing")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for a family")
    parser.add_argument("--anew", action="store_true", help="measure what was kept too")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    import tests.harness  # noqa: F401  (what a fork has need not be imported in it)
    from tests.families import FAMILIES
    from tests.support_table import page

    if args.anew:
        for name in args.families or FAMILIES:
            (KEPT / f"{name}.json").unlink(missing_ok=True)
    complete(args.families or list(FAMILIES), args.jobs, args.timeout)
    if not args.families:
        print(page({name: kept(name) for name in FAMILIES}))


if __name__ == "__main__":
    main()
