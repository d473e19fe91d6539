"""The semantic ops: what a find is rewritten to, before any kernel is chosen.

`braze::moe` (`moe_apart`, `moe_separate` where weights are several tensors), `braze::mlp`, `braze::rope`, `braze::rms_norm`,
`braze::route` and `braze::grouped_mm` are functional; each has a fake kernel (shapes), a reference in float32
(braze.kernels.reference) and a decomposition into ATen ops, which is how they run eagerly. `braze::rope_into` and
`braze::gate_into` are calls of kernels, which write q's and k's rotation, and a router's weights and ids.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from braze import schemas as _schemas  # noqa: F401  (defines the ops)
from braze.kernels import aten, separate
from braze.kernels.cpp import gate as cpp_gate
from braze.kernels.cpp import mlp as cpp_mlp
from braze.kernels.cpp import moe as cpp_moe
from braze.kernels.cpp import moe_separate as cpp_separate
from braze.kernels.cpp import rope as cpp_rope
from braze.kernels.cpp import route as cpp_route
from braze.kernels.spec import MoeSpec, NormSpec, RopeSpec, RouteSpec
from braze.kernels.triton import compat
from braze.kernels.triton import mlp as triton_mlp
from braze.kernels.triton import moe as triton_moe
from braze.kernels.triton import route as triton_route
from braze.kernels.triton import separate as triton_separate
from braze.kernels.triton.weights import Weights
from braze.kernels.turning import Norm, Rows
from braze.kernels.vendor import moe as vendor_moe
from braze.kernels.vendor import rope as vendor_rope
from braze.kernels.vendor import route as vendor_route


def check_moe(x: Tensor, ids: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, spec: MoeSpec) -> None:
    """RuntimeError where the tensors do not fit together; shapes as in `braze.kernels.reference.moe`."""
    torch._check(x.ndim == 2, lambda: f"moe: x must be [T, H], not {tuple(x.shape)}")
    torch._check(
        ids.ndim == 2 and not ids.is_floating_point(),
        lambda: f"moe: ids must be integers [T, k], not {ids.dtype} {tuple(ids.shape)}",
    )
    torch._check(
        ids.shape == weights.shape,
        lambda: f"moe: ids {tuple(ids.shape)} and weights {tuple(weights.shape)} differ",
    )
    torch._check(ids.shape[0] == x.shape[0], lambda: f"moe: {ids.shape[0]} rows of ids for {x.shape[0]} tokens")
    torch._check(
        w1.ndim == 3 and w2.ndim == 3 and w1.shape[0] == w2.shape[0],
        lambda: f"moe: weights {tuple(w1.shape)} and {tuple(w2.shape)}",
    )
    hidden, columns = (1, 2) if spec.transposed else (2, 1)
    gates = 1 if spec.layout == "none" else 2
    torch._check(w1.shape[hidden] == x.shape[1], lambda: f"moe: w1 {tuple(w1.shape)} for a hidden size of {x.shape[1]}")
    torch._check(
        w2.shape[columns] == x.shape[1],
        lambda: f"moe: w2 {tuple(w2.shape)} for a hidden size of {x.shape[1]}",
    )
    torch._check(
        w1.shape[columns] == gates * w2.shape[hidden],
        lambda: f"moe: w1 {tuple(w1.shape)} and w2 {tuple(w2.shape)} do not fit layout {spec.layout!r}",
    )


def check_rope(x: Tensor, cos: Tensor, sin: Tensor, spec: RopeSpec) -> None:
    """RuntimeError where the tensors do not fit together; shapes as in `braze.kernels.reference.rope`."""
    r = spec.rotary_dim
    torch._check(
        spec.start + r <= x.shape[-1],
        lambda: f"rope: {spec.start} + rotary size {r} exceeds the head size {x.shape[-1]}",
    )
    torch._check(cos.shape[-1] == sin.shape[-1], lambda: f"rope: tables of {cos.shape[-1]} and {sin.shape[-1]} columns")
    torch._check(
        cos.shape[-1] in (r, r // 2),
        lambda: f"rope: tables of {cos.shape[-1]} columns for a rotary size of {r}",
    )
    for table in (cos, sin):
        torch.broadcast_shapes(table.shape[:-1], x.shape[:-1])


def check_norm(x: Tensor, weight: Tensor | None) -> None:
    """RuntimeError where the tensors do not fit together; shapes as in `braze.kernels.reference.rms_norm`."""
    torch._check(
        weight is None or (weight.ndim == 1 and weight.shape[0] == x.shape[-1]),
        lambda: f"rms_norm: a weight of {tuple(weight.shape)} for a last dimension of {x.shape[-1]}",  # type: ignore[union-attr]
    )


def check_route(logits: Tensor, bias: Tensor | None, spec: RouteSpec) -> None:
    """RuntimeError where the tensors do not fit together; shapes as in `braze.kernels.reference.route`."""
    experts = logits.shape[-1] - spec.shared
    torch._check(logits.is_floating_point(), lambda: f"route: logits must be floating, not {logits.dtype}")
    torch._check(
        bias is None or bias.numel() == experts,
        lambda: f"route: a bias of {bias.shape} for {experts} experts",  # type: ignore[union-attr]
    )
    torch._check(experts % spec.groups == 0, lambda: f"route: {experts} experts in {spec.groups} groups")
    size = experts // spec.groups
    torch._check(spec.group_score == "max" or size > 1, lambda: f"route: the sum of the top 2 of {size}")
    open_ = experts if spec.closed == "zero" else size * spec.top_groups
    torch._check(spec.top_k <= open_, lambda: f"route: {spec.top_k} of {open_} experts")


@torch.library.register_fake("braze::moe")
def _moe_fake(
    x: Tensor, ids: Tensor, weights: Tensor, w1: Tensor, w2: Tensor,
    b1: Tensor | None = None, b2: Tensor | None = None, **attributes: Any,
) -> Tensor:  # fmt: skip
    spec = MoeSpec(**attributes)
    check_moe(x, ids, weights, w1, w2, spec)
    return x.new_empty(x.shape, dtype=spec.out_dtype or x.dtype)


_KERNELS: dict[str, Any] = {"cpu": cpp_moe, "cuda": triton_moe, "xpu": triton_moe}


@torch.library.impl("braze::moe", "CompositeExplicitAutograd")
def _moe(
    x: Tensor, ids: Tensor, weights: Tensor, w1: Tensor, w2: Tensor,
    b1: Tensor | None = None, b2: Tensor | None = None, **attributes: Any,
) -> Tensor:  # fmt: skip
    spec = _moe_spec(**attributes)
    check_moe(x, ids, weights, w1, w2, spec)
    kernel = _KERNELS.get(compat.platform(x.device))
    if kernel is None or kernel.supports(x, ids, weights, w1, w2, b1, b2, spec):
        return aten.moe(x, ids, weights, w1, w2, b1, b2, spec)
    return kernel.run(x, ids, weights, w1, w2, b1, b2, spec)  # type: ignore[no-any-return]


_moe_spec = lru_cache(maxsize=256)(MoeSpec)


@torch.library.register_fake("braze::moe_separate")
def _separate_fake(
    x: Tensor, ids: Tensor, weights: Tensor, w1: list[Tensor], w2: list[Tensor], b1: list[Tensor], b2: list[Tensor],
    **attributes: Any,
) -> Tensor:  # fmt: skip
    torch._check(len(w2) > 0 and len(w1) in (len(w2), 2 * len(w2)), lambda: f"moe: {len(w1)} and {len(w2)} weights")
    torch._check(ids.shape == weights.shape and ids.shape[0] == x.shape[0], lambda: "moe: ids, weights and x differ")
    torch._check(len(b1) in (0, len(w1)) and len(b2) in (0, len(w2)), lambda: "moe: a bias for each weight, or none")
    return x.new_empty(x.shape, dtype=MoeSpec(**attributes).out_dtype or x.dtype)


@torch.library.impl("braze::moe_separate", "CompositeExplicitAutograd")
def _separate(
    x: Tensor, ids: Tensor, weights: Tensor, w1: list[Tensor], w2: list[Tensor], b1: list[Tensor], b2: list[Tensor],
    **attributes: Any,
) -> Tensor:  # fmt: skip
    return _each(x, ids, weights, w1, w2, b1, b2, _moe_spec(**attributes))


_SEPARATE: dict[str, Any] = {"cpu": cpp_separate, "cuda": triton_separate, "xpu": triton_separate}


def _each(
    x: Tensor, ids: Tensor, weights: Tensor, w1: list[Tensor], w2: list[Tensor], b1: list[Tensor], b2: list[Tensor],
    spec: MoeSpec,
) -> Tensor:  # fmt: skip
    kernel = _SEPARATE.get(compat.platform(x.device))
    if kernel is None or kernel.supports(x, ids, weights, w1, w2, b1, b2, spec):
        return separate.moe(x, ids, weights, w1, w2, b1, b2, spec)
    return kernel.run(x, ids, weights, w1, w2, b1, b2, spec)  # type: ignore[no-any-return]


@torch.library.register_fake("braze::moe_apart")
def _apart_fake(
    x: Tensor, ids: Tensor, weights: Tensor, gate: Tensor, up: Tensor, w2: Tensor, b_gate: Tensor | None = None,
    b_up: Tensor | None = None, b2: Tensor | None = None, **attributes: Any,
) -> Tensor:  # fmt: skip
    spec = MoeSpec(**attributes)
    torch._check(gate.shape == up.shape, lambda: f"moe: gate {tuple(gate.shape)} and up {tuple(up.shape)} differ")
    torch._check(spec.layout == "halves", lambda: "moe: gate and up of two tensors are halves")
    check_moe(x, ids, weights, gate, w2, replace(spec, layout="none"))
    return x.new_empty(x.shape, dtype=spec.out_dtype or x.dtype)


@torch.library.impl("braze::moe_apart", "CompositeExplicitAutograd")
def _apart(
    x: Tensor, ids: Tensor, weights: Tensor, gate: Tensor, up: Tensor, w2: Tensor, b_gate: Tensor | None = None,
    b_up: Tensor | None = None, b2: Tensor | None = None, **attributes: Any,
) -> Tensor:  # fmt: skip
    spec = _moe_spec(**attributes)
    platform = compat.platform(x.device)
    if platform == "cpu":
        return _each(x, ids, weights, *separate.lists(gate, up, w2, b_gate, b_up, b2), spec)
    first, b1 = Weights(gate, up), separate.joined(b_gate, b_up)
    if platform in _SEPARATE and triton_moe.supports(x, ids, weights, first, w2, b1, b2, spec) is None:
        return triton_moe.run(x, ids, weights, first, w2, b1, b2, spec)
    return aten.moe_apart(x, ids, weights, gate, up, w2, b_gate, b_up, b2, spec)


@torch.library.register_fake("braze::mlp")
def _mlp_fake(
    x: Tensor, w1: list[Tensor], w2: Tensor, b1: list[Tensor], b2: Tensor | None = None, **attributes: Any
) -> Tensor:
    spec = MoeSpec(**attributes)
    torch._check(len(w1) in (1, 2) and len(b1) in (0, len(w1)), lambda: f"mlp: {len(w1)} weights and {len(b1)} biases")
    hidden, columns = (0, 1) if spec.transposed else (1, 0)
    gates = 1 if spec.layout == "none" else 2
    width = sum(w.shape[columns] for w in w1)
    fits = all(w.shape[hidden] == x.shape[1] for w in w1) and width == gates * w2.shape[hidden]
    torch._check(
        fits and w2.shape[columns] == x.shape[1],
        lambda: f"mlp: {[tuple(w.shape) for w in (*w1, w2)]} for x {tuple(x.shape)} and layout {spec.layout!r}",
    )
    return x.new_empty(x.shape, dtype=spec.out_dtype or x.dtype)


@torch.library.impl("braze::mlp", "CompositeExplicitAutograd")
def _mlp(
    x: Tensor, w1: list[Tensor], w2: Tensor, b1: list[Tensor], b2: Tensor | None = None, **attributes: Any
) -> Tensor:
    spec = _moe_spec(**attributes)
    kernel: Any = cpp_mlp if x.device.type == "cpu" else triton_mlp
    if kernel.supports(x, w1, w2, b1, b2, spec):
        return separate.mlp(x, w1, w2, b1, b2, spec)
    return kernel.run(x, w1, w2, b1, b2, spec)  # type: ignore[no-any-return]


@torch.library.register_fake("braze::rope")
def _rope_fake(x: Tensor, cos: Tensor, sin: Tensor, **attributes: Any) -> Tensor:
    spec = RopeSpec(**attributes)
    check_rope(x, cos, sin, spec)
    return x.new_empty(x.shape, dtype=spec.out_dtype or x.dtype)


@torch.library.impl("braze::rope", "CompositeExplicitAutograd")
def _rope(x: Tensor, cos: Tensor, sin: Tensor, **attributes: Any) -> Tensor:
    spec = RopeSpec(**attributes)
    check_rope(x, cos, sin, spec)
    return aten.rope(x, cos, sin, spec)


@torch.library.register_fake("braze::rms_norm")
def _norm_fake(x: Tensor, weight: Tensor | None = None, **attributes: Any) -> Tensor:
    check_norm(x, weight)
    return x.new_empty(x.shape, dtype=NormSpec(**attributes).out_dtype or x.dtype)


@torch.library.impl("braze::rms_norm", "CompositeExplicitAutograd")
def _norm(x: Tensor, weight: Tensor | None = None, **attributes: Any) -> Tensor:
    check_norm(x, weight)
    return aten.rms_norm(x, weight, NormSpec(**attributes))


@torch.library.register_fake("braze::rope_into")
def _rope_into_fake(*args: Any, **attributes: Any) -> None:
    return None


@torch.library.impl("braze::rope_into", "CPU")
def _rope_into(
    q_out: Tensor, k_out: Tensor | None, q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, q_weight: Tensor | None,
    k_weight: Tensor | None, index: Tensor | None, rows: Sequence[int], *, eps: float | None = None, add_one: bool = False,
    **attributes: Any,
) -> None:  # fmt: skip
    """The C++ kernel on heads that lie anyhow, [B, H, S, D], and tables [B or 1, S, W]; what the graph has of it is written by
    `braze.lowering.cpp_rope`. rows: as in `braze.kernels.cpp.rope.numbers`."""
    norm = None if eps is None else Norm(eps, q_weight, k_weight, add_one)
    to = None
    if rows and k_out is not None:
        to = Rows(k_out, (rows[0], rows[1], rows[2]), rows[3], rows[4], index, (rows[5], rows[6]))
    outs = [q_out] if k_out is None else [q_out, k_out]
    cpp_rope.run(q, k, cos, sin, RopeSpec(**attributes), norm=norm, outs=outs, rows=to)


@torch.library.register_fake("braze::route")
def _route_fake(logits: Tensor, bias: Tensor | None = None, **attributes: Any) -> tuple[Tensor, Tensor]:
    spec = RouteSpec(**attributes)
    check_route(logits, bias, spec)
    lead = logits.shape[:-1]
    weights = logits.new_empty((*lead, spec.top_k + spec.shared), dtype=spec.out_dtype or logits.dtype)
    return weights, logits.new_empty((*lead, spec.top_k), dtype=spec.ids_dtype)


@torch.library.register_fake("braze::gate_into")
def _gate_into_fake(*args: Any, **attributes: Any) -> None:
    return None


@torch.library.impl("braze::gate_into", "CPU")
def _gate_into(
    weights: Tensor, ids: Tensor, x: Tensor, w: Tensor, b: Tensor | None, bias: Tensor | None, *, logits: torch.dtype,
    **attributes: Any,
) -> None:  # fmt: skip
    """The C++ kernel; what the graph has of it is written by `braze.lowering.gate`."""
    cpp_gate.run(x, w, b, bias, logits, _route_spec(**attributes), (weights, ids))


def _few(logits: Tensor) -> bool:
    """Whether a CPU is as fast with ATen ops, whose ties are torch.topk's own."""
    return compat.platform(logits.device) == "cpu" and logits.numel() < cpp_route.WORTH


_ROUTE_KERNELS: dict[str, Any] = {"cpu": cpp_route, "cuda": triton_route, "xpu": triton_route}


@torch.library.impl("braze::route", "CompositeExplicitAutograd")
def _route(logits: Tensor, bias: Tensor | None = None, **attributes: Any) -> tuple[Tensor, Tensor]:
    spec = _route_spec(**attributes)
    check_route(logits, bias, spec)
    kernel = _ROUTE_KERNELS.get(compat.platform(logits.device))
    if kernel is None or _few(logits) or kernel.supports(logits, bias, spec):
        return aten.route(logits, bias, spec)
    return kernel.run(logits, bias, spec)  # type: ignore[no-any-return]


_route_spec = lru_cache(maxsize=256)(RouteSpec)


@torch.library.register_fake("braze::grouped_mm")
def _grouped_mm_fake(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[2])


@torch.library.impl("braze::grouped_mm", "CompositeExplicitAutograd")
def _grouped_mm(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    return aten.grouped_mm_eager(x, w, offs)


@torch.library.register_fake("braze::vendor_grouped_mm")
def _vendor_grouped_mm_fake(
    x: Tensor, w: Tensor, counts: Tensor, bias: Tensor | None = None, *, provider: str, activation: str = ""
) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[1] // 2 if activation else w.shape[1])


@torch.library.impl("braze::vendor_grouped_mm", "CompositeExplicitAutograd")
def _vendor_grouped_mm(
    x: Tensor, w: Tensor, counts: Tensor, bias: Tensor | None = None, *, provider: str, activation: str = ""
) -> Tensor:
    return vendor_moe.PROVIDERS[provider].grouped_mm(x, w, counts, bias, activation)


@torch.library.register_fake("braze::vendor_topk")
def _vendor_topk_fake(
    logits: Tensor, bias: Tensor | None, top_k: int, renorm: bool, *, provider: str, **attributes: Any
) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


@torch.library.impl("braze::vendor_topk", "CompositeExplicitAutograd")
def _vendor_topk(
    logits: Tensor, bias: Tensor | None, top_k: int, renorm: bool, *, provider: str, **attributes: Any
) -> tuple[Tensor, Tensor]:
    choice = vendor_route.Choice(top_k, renorm, **attributes)
    return vendor_route.PROVIDERS[provider].topk(logits, bias, choice)


@torch.library.register_fake("braze::vendor_rope")
def _vendor_rope_fake(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, *, provider: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.impl("braze::vendor_rope", "CompositeExplicitAutograd")
def _vendor_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, *, provider: str) -> Tensor:
    return vendor_rope.PROVIDERS[provider].rotate(x, cos, sin, interleaved)
