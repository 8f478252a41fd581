"""The choice of tensors to normalise: the output block of each network, and what is refused."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from torch import nn

from models import NetworkConfig, build_network
from models.networks import Architecture
from znorm import Selection, select

OUTPUT_BLOCKS = {"unet": "model.2", "resunet": "model.2", "segresnet": "conv_final"}
#: Weights of the output block: all that the default leaves out for being there.
OUTPUT_WEIGHTS = {
    "unet": ["model.2.conv.weight"],
    "resunet": ["model.2.0.conv.weight", "model.2.1.conv.unit0.conv.weight"],
    "segresnet": ["conv_final.2.conv.weight"],
}
#: Every weight that the default normalises in a U-Net of three levels.
NORMALISED = {
    "unet": [
        "model.0.conv.weight",
        "model.1.submodule.0.conv.weight",
        "model.1.submodule.1.submodule.conv.weight",
        "model.1.submodule.2.conv.weight",
    ],
    "resunet": [
        "model.0.conv.unit0.conv.weight",
        "model.0.conv.unit1.conv.weight",
        "model.0.residual.weight",
        "model.1.submodule.0.conv.unit0.conv.weight",
        "model.1.submodule.0.conv.unit1.conv.weight",
        "model.1.submodule.0.residual.weight",
        "model.1.submodule.1.submodule.conv.unit0.conv.weight",
        "model.1.submodule.1.submodule.conv.unit1.conv.weight",
        "model.1.submodule.1.submodule.residual.weight",
        "model.1.submodule.2.0.conv.weight",
        "model.1.submodule.2.1.conv.unit0.conv.weight",
    ],
}

architectures = pytest.mark.parametrize("architecture", list(OUTPUT_BLOCKS))


class Wrapper(nn.Module):
    """What torch.compile and DistributedDataParallel make of a model: the same, one name deeper."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def network(architecture: Architecture) -> nn.Module:
    return build_network(NetworkConfig(architecture=architecture, channels=(8, 8, 16)), in_channels=4, out_channels=3)


def small_model() -> nn.Sequential:
    return nn.Sequential(OrderedDict(body=nn.Linear(4, 8), middle=nn.Linear(8, 8), head=nn.Linear(8, 2)))


def left_out(selection: Selection, reason: str) -> list[str]:
    return [choice.name for choice in selection.choices if not choice.normalised and reason in choice.reason]


@architectures
def test_the_output_block_of_each_network_is_left_out(architecture: Architecture) -> None:
    selection = select(network(architecture))
    assert selection.output_block == OUTPUT_BLOCKS[architecture]
    assert left_out(selection, "output block") == OUTPUT_WEIGHTS[architecture]


@pytest.mark.parametrize("architecture", list(NORMALISED))
def test_every_other_convolution_of_a_unet_is_normalised(architecture: Architecture) -> None:
    assert sorted(select(network(architecture)).normalised) == NORMALISED[architecture]


@architectures
def test_no_bias_and_no_norm_is_normalised(architecture: Architecture) -> None:
    model = network(architecture)
    dimensions = {name: parameter.ndim for name, parameter in model.named_parameters()}
    assert all(dimensions[name] >= 2 for name in select(model).normalised)
    assert left_out(select(model), "bias or norm")


@architectures
def test_every_parameter_is_in_the_selection_once(architecture: Architecture) -> None:
    model = network(architecture)
    assert [choice.name for choice in select(model).choices] == [name for name, _ in model.named_parameters()]


@architectures
def test_a_wrapped_model_has_the_same_selection(architecture: Architecture) -> None:
    model = network(architecture)
    wrapped = select(Wrapper(Wrapper(model)))
    assert wrapped.output_block == f"module.module.{OUTPUT_BLOCKS[architecture]}"
    assert wrapped.normalised == {f"module.module.{name}" for name in select(model).normalised}


def test_a_named_block_is_left_out_instead_of_the_last_one() -> None:
    selection = select(small_model(), output_block="middle")
    assert selection.normalised == {"body.weight", "head.weight"}


def test_with_none_no_block_is_left_out() -> None:
    selection = select(small_model(), output_block="none")
    assert selection.output_block is None
    assert selection.normalised == {"body.weight", "middle.weight", "head.weight"}


def test_a_block_whose_name_starts_like_the_output_block_is_normalised() -> None:
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(12)])
    assert "10.weight" in select(model, output_block="1").normalised


def test_a_last_child_without_parameters_is_not_the_output_block() -> None:
    assert select(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2), nn.Sigmoid())).output_block == "1"


def test_a_model_of_one_layer_has_no_output_block() -> None:
    selection = select(nn.Sequential(nn.Linear(4, 2)))
    assert selection.output_block is None
    assert selection.normalised == {"0.weight"}


def test_one_dimensional_tensors_can_be_included() -> None:
    assert "body.bias" in select(small_model(), min_dimensions=1).normalised


def test_a_tensor_of_one_element_is_never_normalised() -> None:
    selection = select(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 2)), min_dimensions=0, output_block="none")
    assert left_out(selection, "one element") == ["0.weight", "0.bias"]


def test_an_unknown_block_is_refused_with_the_valid_names() -> None:
    with pytest.raises(ValueError, match=r"no module named 'tail'.*body, middle, head"):
        select(small_model(), output_block="tail")


@pytest.mark.parametrize("settings", [{"min_dimensions": 6}, {"output_block": "0", "min_dimensions": 2}])
def test_a_choice_that_leaves_nothing_to_normalise_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"no parameter is left to normalise.*lower min_dimensions"):
        select(nn.Sequential(nn.Linear(4, 2)), **settings)  # type: ignore[arg-type]  # one dict for two types


def test_the_report_lists_each_tensor_under_its_reason() -> None:
    lines = select(small_model()).report().splitlines()
    assert lines == [
        "z-scored: 2 tensors, 96 elements - 2 or more dimensions",
        "    body.weight  8x4",
        "    middle.weight  8x8",
        "left as is: 3 tensors, 18 elements - fewer than 2 dimensions (bias or norm)",
        "    body.bias  8",
        "    middle.bias  8",
        "    head.bias  2",
        "left as is: 1 tensors, 16 elements - output block head",
        "    head.weight  2x8",
    ]
