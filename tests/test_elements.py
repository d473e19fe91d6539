"""Element-wise evaluation agrees with torch, element by element; and a tampered site fails its proof."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from braze.passes import experts, proof, rope
from braze.passes.elements import Elements, Expr, Sizes, leaves
from braze.passes.linear import polynomial
from braze.passes.numeric import value
from tests.harness import capture
from tests.test_refusals import gathered, rotate_half, table
from tests.test_refusals import inputs as expert_inputs

X = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([3, 0, 2, 2, 1])
PERMUTED = torch.tensor([2, 0, 1, 2, 0, 3, 1, 3])


def complex_product(x: Tensor) -> Tensor:
    z = torch.view_as_complex(x.reshape(4, 6, 4, 2))
    return torch.view_as_real(z * torch.polar(torch.ones(4), x[0, 0, :4])).flatten(-2)


def write_halves(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[..., :4] = x[..., 4:]
    out[..., 4:] = -x[..., :4]
    return out


def unsorted(x: Tensor) -> Tensor:
    """Rows sorted by an id and put back by the inverse permutation."""
    rows = x.reshape(8, 24)
    _, perm = torch.sort(PERMUTED)
    inverse = torch.empty_like(perm)
    inverse[perm] = torch.arange(8)
    return (rows[perm] * 2)[inverse]


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "views": lambda x: x.transpose(0, 1).reshape(6, 32).unsqueeze(1).squeeze(1).view(3, 2, 32).permute(2, 0, 1) * 1,
    "slices": lambda x: torch.cat((x[:, ::2, 1:5], x[:, 1::2, -4:]), 1),
    "stack and unbind": lambda x: torch.stack(x.unbind(1)[::-1], -1),
    "split and chunk": lambda x: torch.cat(x.split([1, 4, 3], -1)[::-1], -1) + torch.cat(x.chunk(2, -1)[::-1], -1),
    "expand and repeat": lambda x: x[:, :1].expand(4, 6, 8) * x.repeat(1, 1, 1) + x[0].repeat(4, 1, 1),
    "repeat interleave": lambda x: x.repeat_interleave(2, -1) * 3,
    "arithmetic": lambda x: (2 * x - x / 3 + 1).neg() * x.abs().sqrt() + torch.rsqrt(x * x + 1),
    "functions": lambda x: (
        torch.tanh(x) + torch.erf(x) * x.sigmoid() - torch.exp(x) + x.cos() * x.sin() + (x * x + 1).log()
    ),
    "clamps": lambda x: x.clamp(-0.5, 0.7) + x.clamp(min=0.1) * x.clamp(max=0.2) + x.relu() + torch.maximum(x, -x),
    "powers": lambda x: x**2 + x**3 + x.abs() ** 0.5,
    "where": lambda x: torch.where(x > 0.1, x, -x) + torch.where(x.le(0.3), 1.0, 2.0),
    "sums": lambda x: x.sum(1) + x.sum((1,), keepdim=True)[:, 0] + x.sum(-1)[:, :1],
    "constants": lambda x: x + torch.arange(8) * 2 + torch.full((6, 1), 3.0) + torch.ones(8) + torch.zeros(8),
    "gathers": lambda x: x[IDS] + x.index_select(0, IDS) + torch.nn.functional.embedding(IDS, x[:, 0])[:, None],
    "pad": lambda x: torch.nn.functional.pad(x, (1, 2), value=0.5) * 1,
    "casts": lambda x: (x.double().float() + 1).to(torch.float64),
    "complex": complex_product,
    "in-place slices": write_halves,
    "sort and its inverse": unsorted,
}


def values_of(exprs: list[Expr], tensors: dict[fx.Node, Tensor]) -> dict[Expr, float]:
    """The leaves' values from real tensors, indices that are themselves elements included."""
    memo: dict[Expr, float] = {}
    for load in leaves(exprs):
        node, idx = load.args
        where = tuple(int(value(i, values_of([i], tensors))) if isinstance(i, Expr) else i for i in idx)
        memo[load] = float(tensors[node][where])
    return memo


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_elements_are_torchs(name: str, dynamic: bool) -> None:
    function = FUNCTIONS[name]
    x = X.clone()
    (gm,) = capture(function, x, dynamic=dynamic)
    expected = function(x)
    recorder = Recorder(gm)
    (got,) = recorder.run(*(recorder.inputs(x)))
    torch.testing.assert_close(got, expected)
    root = gm.graph.output_node().args[0][0]  # type: ignore[index]
    ev = Elements(Sizes())
    assert ev.shape(root) == tuple(expected.shape)
    exprs = {idx: ev.at(root, idx) for idx in itertools.product(*map(range, expected.shape))}
    memo = values_of(list(exprs.values()), recorder.tensors)
    placeholders = {e.args[0].op == "placeholder" or e.args[0].target is torch.ops.aten.sort.default for e in memo}
    assert placeholders <= {True} or name in ("constants", "gathers", "sort and its inverse"), list(memo)[:3]
    for idx, expr in exprs.items():
        assert value(expr, memo) == pytest.approx(float(expected[idx]), rel=1e-5, abs=1e-5), (idx, expr)


class Recorder(fx.Interpreter):
    """Runs a graph and keeps every tensor."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.tensors: dict[fx.Node, Tensor] = {}

    def inputs(self, x: Tensor) -> list[Any]:
        found: list[Any] = []
        for node in self.module.graph.find_nodes(op="placeholder"):  # type: ignore[union-attr]
            val = node.meta["val"]
            if isinstance(val, torch.SymInt | int):
                found.append(int(val.node.hint) if isinstance(val, torch.SymInt) else val)
            else:
                choices = [
                    t for t in (x, IDS, PERMUTED) if t.shape == tuple(map(int, val.shape)) and t.dtype == val.dtype
                ]
                found.append(choices[0])
        return found

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.tensors[n] = result[1] if n.target is torch.ops.aten.sort.default else result
        return result


def test_sizes_take_another_binding() -> None:
    (gm,) = capture(lambda x: x.reshape(-1, 2, 8).transpose(0, 1) * 1, X.clone(), dynamic=True)
    root = gm.graph.output_node().args[0][0]  # type: ignore[index]
    hints, other = proof.bindings(gm.graph)
    assert hints.shape(root) == (2, 12, 8)
    assert other.shape(root)[1] > 12


def test_polynomials_expand_products_and_merge_terms() -> None:
    (gm,) = capture(lambda x: (x[0] + 2 * x[1]) * x[2] - x[0] * x[2], X.clone())
    root = gm.graph.output_node().args[0][0]  # type: ignore[index]
    (constant,) = polynomial(Elements().at(root, (0, 0))).values()
    assert constant == 2.0


# ---------------------------------------------------------------------------------------------------- proofs


def rope_site() -> Any:
    (gm,) = capture(lambda x, c, s: x * c + rotate_half(x) * s, torch.randn(2, 3, 7, 16), *table())
    ((site,), _) = rope.find(gm.graph, Sizes())
    return site


@pytest.mark.parametrize(
    "change", [{"inverse": True}, {"layout_in": "interleaved"}, {"layout_out": "interleaved"}, {"rotary_dim": 8}]
)
def test_a_tampered_rotation_is_refused(change: dict[str, Any]) -> None:
    site = rope_site()
    assert "agree" in proof.rope(site, [Sizes()])
    with pytest.raises((proof.Refused, RuntimeError)):
        proof.rope(replace(site, spec=replace(site.spec, **change)), [Sizes()])
    with pytest.raises(proof.Refused):
        proof.rope(replace(site, cos=site.sin, sin=site.cos), [Sizes()])


@pytest.mark.parametrize(
    "change",
    [
        {"activation": "g*u"},
        {"activation": "u*sigmoid(u)*g"},
        {"layout": "interleaved"},
        {"weight_on": "input"},
        {"scale": 2.0},
    ],
)
def test_a_tampered_expert_block_is_refused(change: dict[str, Any]) -> None:
    (gm,) = capture(gathered, *expert_inputs())
    ((site,), _) = experts.find(gm.graph, Sizes())
    assert "agrees" in proof.moe(site, [Sizes()])
    with pytest.raises(proof.Refused):
        proof.moe(replace(site, spec=replace(site.spec, **change)), [Sizes()])
