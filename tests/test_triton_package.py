"""Packages for a GPU: launches and their buffers from AOTInductor's C++, tokens fixed or not, against float64."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import braze
from braze.backend import collect
from tests.harness import assert_close
from tests.test_triton_shared import Layer

needs_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
HIDDEN, HEADS, DIM = 256, 4, 64
#: Loads a package and calls it with each list of inputs in a file, in a process that has not seen braze.
RUN = """
import sys, torch
_, package, given, results, *more = sys.argv
for name in more:
    __import__(name)
run = torch._inductor.aoti_load_package(package)
torch.save([run(*inputs) for inputs in torch.load(given)], results)
assert more or not any(name.split(".")[0] == "braze" for name in sys.modules)
"""


class Block(nn.Module):
    """Queries and keys that turn, their products with each other, and a layer of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = (nn.Linear(HIDDEN, HEADS * DIM, bias=False) for _ in range(2))
        self.layer = Layer(128, True, False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k = (p(x).view(1, -1, HEADS, DIM).transpose(1, 2) for p in (self.q, self.k))
        q, k = (t * cos + torch.cat((-t[..., DIM // 2 :], t[..., : DIM // 2]), -1) * sin for t in (q, k))
        return self.layer(x + (q * k).transpose(1, 2).reshape(x.shape))


def inputs(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    frequencies = 100.0 ** -(torch.arange(DIM // 2, device="cuda") / (DIM // 2))
    angles = (torch.arange(tokens, device="cuda")[:, None] * frequencies).repeat(1, 2)
    return torch.randn(1, tokens, HIDDEN, device="cuda").to(dtype), angles.cos().to(dtype), angles.sin().to(dtype)


@needs_device
@pytest.mark.parametrize(
    ("tokens", "dtype", "dynamic"),
    [(1, torch.float32, False), (64, torch.float32, False), (4096, torch.bfloat16, False), (64, torch.float32, True)],
    ids=str,
)
def test_package(tokens: int, dtype: torch.dtype, dynamic: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Block().to("cuda", dtype)
    size = Dim("tokens", min=2, max=8192)
    shapes = ({1: size}, {0: size}, {0: size}) if dynamic else None
    given = [inputs(used, dtype) for used in ((tokens, 19) if dynamic else (tokens, tokens))]
    package, inputs_file, results_file = (str(tmp_path / name) for name in ("block.pt2", "inputs.pt", "results.pt"))
    with torch.no_grad(), collect() as reports:
        braze.package(torch.export.export(model, given[0], dynamic_shapes=shapes), package, {"strict": True})
    kernels = {site.kind: site.kernel for report in reports for site in report.sites}
    assert kernels["moe"] == kernels["rope"] == "triton", kernels
    torch.save(given, inputs_file)
    # an experts' call that chooses its tiles as it runs is an op of braze's
    more = ("braze",) if dynamic else ()
    command = (sys.executable, "-c", RUN, package, inputs_file, results_file, *more)
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    exact = copy.deepcopy(model).double()
    for call, result in zip(given, torch.load(results_file), strict=True):
        check(result, exact(*(t.double() for t in call)), dtype)


def check(got: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """In bfloat16, nine tokens of ten: of the others the rounded logits choose other experts."""
    if dtype == torch.float32:
        assert_close(got, exact, 1e-5)
    else:
        off = (got - exact).norm(dim=-1) / exact.norm(dim=-1)
        assert (off < 2e-2).double().mean() > 0.9, off.flatten().sort().values[::256]
