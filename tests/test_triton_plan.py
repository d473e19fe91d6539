"""What a plan of launches remembers and what it takes from each call; tests/test_triton_moe.py runs plans on a GPU."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from braze.kernels.triton import compat, plan
from braze.kernels.triton.compat import Box

CPU = torch.device("cpu")


class Compiled:
    """A compiled kernel that notes what it is started with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.calls.append((grid, arguments))


def record(monkeypatch: pytest.MonkeyPatch, x: Tensor, w: Tensor, out: Tensor) -> tuple[Compiled, plan.Plan]:
    """Two launches with a buffer of 12 floats and one of 5 int32 between them."""
    compiled = Compiled()

    def launched(
        kernel: Any, grid: Any, args: Any, constants: Mapping[str, Any], writes: Sequence[str], *options: Any
    ) -> Any:
        return compiled, [args[-1]]

    monkeypatch.setattr(compat, "launched", launched)
    monkeypatch.setattr(
        compat, "tensor_descriptor", lambda base, shape, strides, block: (base.data_ptr(), shape, block)
    )
    recorder = plan.Recorder((x, w, None, out))
    (h,) = recorder(None, (3,), (x, 7, Box(w, (2, 2)), torch.empty(12)), {"BM": 16}, ["h"], warps=4)
    recorder(None, (1, 2), (h.view(3, 4), torch.empty(5, dtype=torch.int32), w, out), {"BM": 8}, ["out"], warps=4)
    return compiled, recorder.plan()


def test_only_addresses_change(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, made = record(monkeypatch, torch.ones(4), torch.ones(4, 4), torch.ones(6))
    assert made.offsets == (0, 256) and made.workspace == 512
    for pointers in ([16, 32, 0, 48], [160, 320, 0, 480]):
        compiled.calls.clear()
        made.start(pointers, CPU)
        (first, (x, seven, box, h, bm)), (second, (again, counts, w, out, other)) = compiled.calls
        assert (first, second) == ((3, 1, 1), (1, 2, 1))
        assert (x, seven, bm, other) == (pointers[0], 7, 16, 8)
        assert box == (pointers[1], [4, 4], [2, 2])
        assert h == again and counts == h + 256
        assert (w, out) == (pointers[1], pointers[3])


def signature(*tensors: Tensor | None, attributes: tuple[Any, ...] = ()) -> Any:
    return plan.signature(tensors, [0 if t is None else t.data_ptr() for t in tensors], attributes)


def test_what_a_signature_tells_apart() -> None:
    x, w = torch.empty(4, 8), torch.empty(3, 8)
    same = signature(x, w, None)
    assert same == signature(torch.empty(4, 8), torch.empty(3, 8), None)
    others = (
        signature(torch.empty(5, 8), w, None),
        signature(x.double(), w, None),
        signature(torch.empty(4, 16)[:, :8], w, None),
        signature(torch.empty(33)[1:].view(4, 8), w, None),
        signature(x, w, torch.empty(3)),
        signature(x, w, None, attributes=(1,)),
    )
    assert len({same, *others}) == 7


def test_tensors_at_one_address_are_not_planned() -> None:
    x = torch.empty(4, 8)
    assert signature(x, x, None) is None
    assert signature(x, x[:2], None) is None


def test_a_plan_does_not_keep_descriptors_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    _, made = record(monkeypatch, torch.ones(4), torch.ones(4, 4), torch.ones(6))
    for n in range(1, 100):
        made.start([16, 64 * n, 0, 48], CPU)
    view = made.launches[0].places[1][2]
    assert view is not None and len(view.made) <= plan.KEPT
