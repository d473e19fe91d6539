"""The decorator: on a class, a function and an instance, with and without arguments."""

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import braze
from braze.backend import collect
from tests.smoke import Layer


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True), torch.no_grad():
        yield


def inputs() -> Tensor:
    return torch.randn(6, 32, generator=torch.Generator().manual_seed(3))


class Plain(Layer):
    pass


@braze.fuse(require=["moe", "rope"])
class Fused(Layer):
    pass


def kinds(reports: list[Any]) -> list[str]:
    return sorted(s.kind for r in reports for s in r.sites)


def test_a_class_keeps_its_type_parameters_and_pickles() -> None:
    model = Fused()
    with collect() as reports:
        got = model(inputs())
    torch.testing.assert_close(got, Plain()(inputs()), rtol=1e-4, atol=1e-4)
    assert kinds(reports) == ["moe", "rope", "router"]
    assert isinstance(model, Fused)
    assert model.state_dict().keys() == Plain().state_dict().keys()
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(inputs()), got)


def test_an_instance_is_compiled_in_place() -> None:
    model = Plain()
    with collect() as reports:
        assert braze.fuse(model) is model
        got = model(inputs())
    torch.testing.assert_close(got, Plain()(inputs()), rtol=1e-4, atol=1e-4)
    assert kinds(reports) == ["moe", "rope", "router"]


def test_a_function_with_and_without_arguments() -> None:
    layer = Plain()

    def block(x: Tensor) -> Tensor:
        return 2 * layer(x)

    for fused in (braze.fuse(block), braze.fuse(fullgraph=True)(block)):
        torch._dynamo.reset()
        with collect() as reports:
            got = fused(inputs())
        torch.testing.assert_close(got, block(inputs()), rtol=1e-4, atol=1e-4)
        assert kinds(reports) == ["moe", "rope", "router"]


def test_settings_of_torch_stay_as_they_were() -> None:
    before = torch._inductor.config.get_config_copy()
    braze.fuse(Plain(), mode="max-autotune-no-cudagraphs")
    assert torch._inductor.config.get_config_copy() == before


def test_bad_targets_and_options_raise_at_once() -> None:
    with pytest.raises(TypeError, match=r"takes an nn\.Module class"):
        braze.fuse(3)
    with pytest.raises(TypeError):
        braze.fuse(int)
    with pytest.raises(ValueError, match="did you mean 'require'"):
        braze.fuse(requires=["moe"])(nn.Linear(2, 2))
