"""Every option of the backend, documented once. What is not braze's own goes to Inductor, after the same check.

A misspelt option that is silently ignored costs a user more than an error does: an unknown name or a bad value raises and
names the nearest valid one.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from braze.lowering import inductor
from braze.passes.sites import KINDS, Kind

KERNELS: dict[Kind, tuple[str, ...]] = {
    "rope": ("auto", "pointwise", "cpp", "triton", "sgl_kernel", "vllm_xpu", "ipex"),
    "moe": ("auto", "cpp", "triton", "aten", "sgl_kernel", "vllm_xpu"),
    "router": ("auto", "cpp", "triton", "aten", "sgl_kernel", "vllm_xpu", "ipex"),
    "mlp": ("auto", "cpp", "triton", "aten"),
}

#: name -> (type, default, what it does), in the order of the documentation
DOCUMENTED: dict[str, tuple[str, str, str]] = {
    "require": (
        "list of kinds", "[]",
        'Kinds ("rope", "moe", "router", "mlp") of which every graph must fuse one, or compilation fails.',
    ),
    "disable": ("list of kinds", "[]", "Kinds that are left as the model spells them."),
    "strict": ("bool", "False", "Raise an error inside braze; otherwise it is logged and the site or graph stays unfused."),
    "kernel": (
        "dict of kind to kernel", "{}",
        "Asks for a kernel instead of the best one, where it can run: "
        '{"rope": "auto" | "pointwise" | "cpp" | "triton", "moe": "auto" | "cpp" | "triton" | "aten", "router": "auto" | '
        '"cpp" | "triton" | "aten", "mlp": "auto" | "cpp" | "triton" | "aten"}; "sgl_kernel" and "vllm_xpu" for rope, moe and '
        "router and \"ipex\" for rope and router are other projects' (docs/vendor.md).",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """The backend's parsed options. inductor: settings for Inductor, from `mode` and from options that are its own."""

    require: tuple[Kind, ...] = ()
    disable: tuple[Kind, ...] = ()
    strict: bool = False
    kernel: Mapping[str, str] = field(default_factory=dict)
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def parse(options: Mapping[str, Any] | None, mode: str | None = None) -> "Options":
        """torch.compile's `options` and `mode` -> Options; ValueError for an unknown name or a bad value."""
        own: dict[str, Any] = {}
        patches: dict[str, Any] = dict(_mode(mode))
        for name, value in (options or {}).items():
            if name in _PARSERS:
                own[name] = _PARSERS[name](name, value)
            else:
                key = name.replace("-", "_")
                _check_inductor(name, key, value)
                patches[key] = value
        both = set(own.get("require", ())) & set(own.get("disable", ()))
        if both:
            raise ValueError(f"options 'require' and 'disable' both name {', '.join(sorted(both))}")
        return Options(**own, inductor=patches)

    def key(self) -> str:
        """What of braze's own settings changes the compiled code, as stable text."""
        return json.dumps([self.require, self.disable, self.strict, sorted(self.kernel.items())])


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _kinds(name: str, value: Any) -> tuple[Kind, ...]:
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, list | tuple | set | frozenset):
        raise ValueError(f"option {name!r} takes a list of kinds ({', '.join(KINDS)}), not {value!r}")
    for v in values:
        if v not in KINDS:
            raise ValueError(
                f"option {name!r}: unknown kind {v!r}{_nearest(str(v), KINDS)} (kinds: {', '.join(KINDS)})"
            )
    return tuple(k for k in KINDS if k in values)


def _bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"option {name!r} takes True or False, not {value!r}")
    return value


def _kernels(name: str, value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise ValueError(f"option {name!r} takes a dict of kind to kernel, such as {{'moe': 'aten'}}, not {value!r}")
    for kind, kernel in value.items():
        if kind not in KERNELS:
            raise ValueError(f"option {name!r}: no kernels for kind {kind!r}{_nearest(str(kind), KERNELS)}")
        if kernel not in KERNELS[kind]:
            known = KERNELS[kind]
            raise ValueError(
                f"option {name!r}: unknown kernel {kernel!r} for {kind}{_nearest(str(kernel), known)} (one of {known})"
            )
    return dict(value)


_PARSERS = {"require": _kinds, "disable": _kinds, "strict": _bool, "kernel": _kernels}


def _mode(mode: str | None) -> Mapping[str, Any]:
    if mode is None:
        return {}
    known = inductor.modes()
    if mode not in known:
        raise ValueError(f"unknown mode {mode!r}{_nearest(mode, known)} (modes: {', '.join(known)})")
    return known[mode]


def _check_inductor(name: str, key: str, value: Any) -> None:
    known = inductor.settings()
    if key not in known:
        raise ValueError(f"unknown option {name!r}{_nearest(name, [*_PARSERS, *known])}")
    expected = type(known[key])
    if known[key] is not None and not callable(known[key]) and type(value) is not expected and value is not None:
        raise ValueError(f"option {name!r} takes {expected.__name__}, not {type(value).__name__} ({value!r})")


def table() -> str:
    """The options as a Markdown table: docs/options.md is made of it."""
    bar = "\\|"  # a bar inside a cell
    rows = [
        f"| `{name}` | {kind} | `{default}` | {text.replace('|', bar)} |"
        for name, (kind, default, text) in DOCUMENTED.items()
    ]
    return "\n".join(["| option | type | default | what it does |", "| --- | --- | --- | --- |", *rows])
