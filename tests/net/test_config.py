"""Architectures, presets and their errors."""

import dataclasses

import pytest

from net.common.errors import UsageError
from net.model.config import VARIANTS, AlexNetConfig, network
from net.training.config import PRESETS, RECIPES, RecipeConfig, TrainConfig

#: (layer, output shape, parameters) of the paper's network: section 3.5, with Figure 2's grouped kernels.
PAPER = (
    ("conv1", (96, 55, 55), 34_944),
    ("stage1", (96, 27, 27), 0),
    ("conv2", (256, 27, 27), 307_456),
    ("stage2", (256, 13, 13), 0),
    ("conv3", (384, 13, 13), 885_120),
    ("stage3", (384, 13, 13), 0),
    ("conv4", (384, 13, 13), 663_936),
    ("stage4", (384, 13, 13), 0),
    ("conv5", (256, 13, 13), 442_624),
    ("stage5", (256, 6, 6), 0),
    ("fc6", (4096,), 37_752_832),
    ("fc7", (4096,), 16_781_312),
    ("fc8", (1000,), 4_097_000),
)


def test_the_paper_s_shapes_and_parameters() -> None:
    plan = network("paper")
    assert [(layer.name, layer.output_shape, layer.parameters) for layer in plan.layers()] == list(PAPER)
    assert plan.parameters == 60_965_224
    assert plan.multiply_adds == 724_406_816


@pytest.mark.parametrize(
    ("variant", "parameters"),
    [
        ("half", 59_798_312),
        ("original_code", 60_965_224),
        ("one_weird_trick", 61_100_840),  # torchvision's documented number
        ("caffe", 60_965_224),
        ("sixth_conv", 60_965_224 + 256 * 256 * 9 + 256),
        ("cifar10", 155_530),
        ("alexnet32", 696_106),
    ],
)
def test_parameters_of_the_variants(variant: str, parameters: int) -> None:
    assert network(variant).parameters == parameters


@pytest.mark.parametrize(("variant", "most"), [("digits", 500_000), ("alexnet32", 2_000_000)])
def test_small_networks_have_the_paper_s_sequence_of_layers(variant: str, most: int) -> None:
    plan = network(variant)
    assert plan.parameters < most
    assert [layer.name for layer in plan.layers()] == [name for name, _, _ in PAPER]
    assert [layer.groups for layer in plan.layers()] == [layer.groups for layer in network("paper").layers()]
    for name in (variant, "paper"):
        operations = [item for convolution in network(name).convolutions for item in convolution.then]
        assert operations.count("lrn") == 2
        assert operations.count("pool") == 3


def test_half_keeps_conv5_and_the_dense_layers() -> None:
    shapes = {layer.name: layer.output_shape[0] for layer in network("half").layers()}
    assert [shapes[f"conv{number}"] for number in range(1, 6)] == [48, 128, 192, 192, 256]
    assert shapes["fc6"] == shapes["fc7"] == 4096


def test_every_ablation_is_a_field() -> None:
    base = network("paper")
    assert network("paper", lrn=False).parameters == base.parameters
    assert "lrn" not in network("paper", lrn=False).operations(base.convolutions[0])
    assert network("paper", overlapping_pooling=False).pool_size == 2
    sizes = {layer.name: layer.output_shape for layer in network("paper", overlapping_pooling=False).layers()}
    assert sizes["stage5"] == (256, 6, 6)
    one_tower = network("paper", towers=1)
    assert {layer.name: layer.groups for layer in one_tower.layers()}["conv2"] == 1
    assert one_tower.parameters > base.parameters
    assert network("paper", classes=10).parameters == base.parameters - 4097 * 990
    assert network("paper", activation="tanh").activation == "tanh"
    apart = {layer.name: layer.groups for layer in network("paper", exchange=False).layers()}
    assert apart == {**dict.fromkeys(apart, 1), "conv2": 2, "conv3": 2, "conv4": 2, "conv5": 2, "fc6": 2, "fc7": 2}


@pytest.mark.parametrize("name", ["conv1", "conv2", "conv3", "conv4", "conv5"])
def test_any_convolution_can_be_left_out(name: str) -> None:
    layers = network("paper", without=(name,), image_size=64).layers()
    assert name not in [layer.name for layer in layers]
    assert ("stage" + name[-1] in [layer.name for layer in layers]) == (name in ("conv1", "conv2", "conv5"))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"image_size": 40}, "pool5: its 3x3 window does not fit its 1x1 input"),
        ({"image_size": 10}, "conv1: its 11x11 kernel does not fit its 10x10 input"),
        ({"image_size": 0}, "image_size must be at least 1"),
        ({"towers": 3}, "towers must be 1 or 2"),
        ({"activation": "gelu"}, "activation must be one of relu, tanh; got 'gelu'"),
        ({"dropout": 1.0}, "dropout must be at least 0"),
        ({"without": ("conv9",)}, "'conv9' is not a convolution of paper"),
        ({"without": ("conv1", "conv2", "conv3", "conv4", "conv5")}, "at least one convolution"),
        ({"lrn": "yes"}, "lrn must be of type bool; got 'yes'"),
        ({"image_size": 64.0}, "image_size must be of type int"),
        ({"lnr": False}, "unknown field 'lnr'"),
        ({"lrn_size": 0}, "lrn_size must be at least 1"),
        ({"lrn_k": 0.0}, "lrn_k must be more than 0"),
        ({"lrn_alpha": float("inf")}, "lrn_alpha must be at least 0; got inf"),
        ({"convolutions": 3}, "network: convolutions must be a list; got 3"),
        ({"convolutions": [3]}, r"convolutions\[0\] must be a table of ConvolutionConfig's fields; got 3"),
        ({"convolutions": [{"name": "conv1"}]}, r"convolutions\[0\]: channels is missing"),
        (
            {"convolutions": [{"name": "conv1", "channels": 8, "kernel_size": 3, "stride": 0}]},
            "conv1: stride must be at least 1; got 0",
        ),
        (
            {"convolutions": [{"name": "conv1", "channels": 8, "kernel_size": 3, "then": ["gelu"]}]},
            r"then\[0\] must be one of activation, lrn, map_norm, pool; got 'gelu'",
        ),
        ({"hidden": [{"name": "fc6", "featurez": 3}]}, "unknown field 'featurez'; did you mean features"),
        ({"hidden": [{"name": "conv2", "features": 3}]}, "layer names must be unique"),
        ({"output_weight_std": "abc"}, "output_weight_std must be of type float; got 'abc'"),
    ],
)
def test_impossible_architectures_are_refused_by_name(fields: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        network("paper", **fields)


def test_odd_layers_cannot_be_shared_by_two_towers() -> None:
    plan = network("paper").to_dict()
    plan["convolutions"][1]["channels"] = 255
    with pytest.raises(UsageError, match="conv2: 255 outputs cannot be split into 2 towers"):
        AlexNetConfig.from_dict(plan)


def test_unknown_variant_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"network must be one of paper, half, .*; got 'vgg'"):
        network("vgg")


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_architectures_survive_plain_data(variant: str) -> None:
    assert AlexNetConfig.from_dict(VARIANTS[variant].to_dict()) == VARIANTS[variant]


def test_presets_and_recipes_name_fields() -> None:
    fields = {item.name for item in dataclasses.fields(TrainConfig)}
    for values in (*PRESETS.values(), *RECIPES.values()):
        assert set(values) <= fields


def test_the_paper_s_recipe_is_the_default() -> None:
    recipe = RecipeConfig()
    assert (recipe.lr, recipe.momentum, recipe.weight_decay) == (0.01, 0.9, 0.0005)
    assert (recipe.lr_scheduler, recipe.gamma, recipe.reductions) == ("plateau", 0.1, 3)
    assert (recipe.crop, recipe.reflect, recipe.colour_noise, recipe.colour_scale) == (True, True, 0.1, "stddev")
    assert TrainConfig().batch_size == 128


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"lr": -1.0}, "--lr must be at least 0"),
        ({"lr": float("nan")}, "--lr must be at least 0"),
        ({"lr": float("inf")}, "--lr must be at least 0; got inf"),
        ({"momentum": 1.0}, "--momentum must be less than 1"),
        ({"seed": 2**63}, "--seed must be less than"),
        ({"gamma": 1.0}, "--gamma must be between 0 and 1"),
        ({"patience": 0}, "--patience must be at least 1"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"checkpoint_every": -1}, "--checkpoint-every must be at least 0"),
        ({"max_steps": 0}, "--max-steps must be at least 1"),
        ({"freeze": ("conv1",)}, "--freeze needs --init-from"),
        ({"new_head": True}, "--new-head needs --init-from"),
        ({"lr_scheduler": "multistep", "lr_milestones": (5, 3)}, "--lr-milestones must be increasing"),
    ],
)
def test_impossible_flags_are_refused_by_name(values: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        TrainConfig(**values)  # type: ignore[arg-type]


def test_multistep_without_milestones_follows_the_epochs() -> None:
    assert TrainConfig(lr_scheduler="multistep", epochs=20).lr_milestones == (12, 17)
    assert TrainConfig(lr_scheduler="multistep", epochs=1).lr_milestones == (1,)


@pytest.mark.parametrize("name", ["fc.8", "forward", "config", "conv9", "fc", "", "fc8\n", "fc" + "9" * 5000])
def test_names_that_a_network_cannot_have(name: str) -> None:
    """A layer becomes an attribute of the module; its name in a file must not overwrite another attribute."""
    with pytest.raises(UsageError):
        network("digits", output_name=name)


def test_windows_that_would_only_be_padded() -> None:
    assert network("digits", lrn_size=1025).lrn_size == 1025
    with pytest.raises(UsageError, match="lrn_size must be at most 1,025; got 1048577"):
        network("digits", lrn_size=2**20 + 1)
