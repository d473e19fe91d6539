"""A router as one C++ call on CPU: each token's logits are read once, and nothing between is stored.

Where torch.topk sorts pairs of number and index, a list of the k best so far is kept, which few logits enter.
"""

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from braze.kernels.cpp.source import NAMESPACE
from braze.kernels.cpp.toolchain import compile_cpp
from braze.kernels.spec import RouteSpec

log = logging.getLogger(__name__)

DTYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # as the enums of route.h
_SCORINGS = {"softmax": 0, "sigmoid": 1, "sqrtsoftplus": 2}
_RENORMS = {"no": 0, "add": 1, "clamp": 2}
_ARGUMENTS = ("void*", "void*", "const void*", "const void*", *("int64_t",) * 17, "float", "float", "int64_t")
#: Logits of all tokens from which the kernel saves more than its call costs (some 25 microseconds, benchmarks/router.py).
WORTH = 16384
MAX_EXPERTS, MAX_CHOSEN, MAX_GROUPS = 4096, 64, 64


def text(entry: str, *declarations: str) -> str:
    """The source of a kernel: what all routers share, and the file whose function is called."""
    folder = Path(__file__).parent
    return "\n".join((
        "#include <torch/csrc/inductor/cpp_prefix.h>", "#include <vector>", "#include <ATen/cpu/vec/functional.h>",
        f"namespace {NAMESPACE} {{", *declarations,
        *((folder / name).read_text() for name in ("load.h", "route.h", entry)),
    ))  # fmt: skip


@cache
def _build() -> tuple[Callable[..., None] | None, str]:
    """The compiled kernel, or None and why there is none."""
    try:
        return compile_cpp(_ARGUMENTS, text("router.h")), ""
    except RuntimeError as e:
        log.warning("routers run as ATen ops on this CPU: the C++ kernel does not build (%s)", e)
        return None, f"the C++ kernel does not build ({e})"


def supports(logits: Tensor, bias: Tensor | None, spec: RouteSpec) -> str | None:
    """None where `run` takes these tensors (real or fake), otherwise the reason why not, in words.

    Builds the kernel at its first use.
    """
    reason = refusal(logits, bias, spec)
    if reason is not None:
        return reason
    kernel, reason = _build()
    return None if kernel else reason


def refusal(logits: Tensor, bias: Tensor | None, spec: RouteSpec) -> str | None:
    """As `supports`, but nothing is built."""
    experts = logits.shape[-1]
    checks = (
        (logits.device.type == "cpu", f"device {logits.device}, not cpu"),
        (logits.dtype in DTYPES, f"logits are {logits.dtype}, not float32, bfloat16 or float16"),
        (spec.out_dtype is None or spec.out_dtype in DTYPES, f"the weights would be {spec.out_dtype}"),
        (bias is None or bias.dtype in DTYPES, f"the bias is {None if bias is None else bias.dtype}"),
        (spec.ids_dtype in (torch.int32, torch.int64), f"ids would be {spec.ids_dtype}"),
        (experts <= MAX_EXPERTS, f"{experts} logits a token exceed {MAX_EXPERTS}"),
        (spec.top_k + spec.shared <= MAX_CHOSEN, f"{spec.top_k + spec.shared} weights a token exceed {MAX_CHOSEN}"),
        (spec.groups <= MAX_GROUPS, f"{spec.groups} groups exceed {MAX_GROUPS}"),
    )
    return next((reason for fine, reason in checks if not fine), None)


def run(logits: Tensor, bias: Tensor | None, spec: RouteSpec) -> tuple[Tensor, Tensor]:
    """As `braze.kernels.reference.route`, on tensors that `supports` takes; of equal choices the lower index comes first.

    Uses torch.get_num_threads() threads where there are enough logits.
    """
    kernel, reason = _build()
    if kernel is None:
        raise RuntimeError(reason)
    x = logits if logits.ndim == 2 else logits.reshape(-1, logits.shape[-1])
    rows, experts = x.shape[0], x.shape[1] - spec.shared
    weights = torch.empty((rows, spec.top_k + spec.shared), dtype=spec.out_dtype or x.dtype)
    ids = torch.empty((rows, spec.top_k), dtype=spec.ids_dtype)
    flat = None if bias is None else bias.reshape(-1)
    kernel(
        weights, ids, x, x if flat is None else flat.contiguous(), DTYPES[weights.dtype], ids.dtype == torch.int64,
        DTYPES[x.dtype], 0 if flat is None else DTYPES[flat.dtype], rows, x.stride(0), x.stride(1), experts,
        *attributes(spec, bias is not None), torch.get_num_threads(),
    )  # fmt: skip
    if logits.ndim == 2:
        return weights, ids
    return weights.reshape(*logits.shape[:-1], -1), ids.reshape(*logits.shape[:-1], -1)


def attributes(spec: RouteSpec, biased: bool) -> tuple[int | float, ...]:
    """What `Problem` of route.h has from `shared` on."""
    return (
        spec.shared, spec.top_k, _SCORINGS[spec.scoring],
        int(spec.select_on == "scores" and (biased or spec.groups > 1)), spec.groups, spec.top_groups,
        int(spec.group_score == "top2"), int(spec.closed == "zero"), _RENORMS[spec.renorm], spec.eps, spec.scale,
    )  # fmt: skip
