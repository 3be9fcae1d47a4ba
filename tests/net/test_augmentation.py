"""Crops, reflections, colour noise and mean subtraction against loops in numpy."""

import numpy as np
import pytest
import torch
from triton.runtime.errors import OutOfResources

from kernels.gpu import input as input_kernel
from net.data.augmentation import TrainingInput, Variations, VariationTable, centre_crop, ten_crops
from net.data.images import ColourComponents
from net.training.config import RecipeConfig

CPU = torch.device("cpu")
H, SIZE = 13, 9


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, H, H, 3), dtype=np.uint8)


@pytest.fixture
def mean() -> np.ndarray:
    return np.random.default_rng(1).uniform(0, 255, (H, H, 3)).astype(np.float32)


@pytest.fixture
def colour() -> ColourComponents:
    vectors, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))
    return ColourComponents(np.array([9000.0, 400.0, 25.0]), vectors)


def written_out(
    image: np.ndarray, mean: np.ndarray, colour: ColourComponents, recipe: RecipeConfig, varied: Variations, number: int
) -> np.ndarray:
    """Sections 2 and 4.1 for one image, pixel by pixel."""
    top, left = varied.top[number], varied.left[number]
    crop = image[top : top + SIZE, left : left + SIZE].astype(np.float64) - mean[top : top + SIZE, left : left + SIZE]
    if varied.reflect[number]:
        crop = crop[:, ::-1]
    if recipe.colour_scale == "stddev":
        scales = [np.sqrt(value) for value in colour.values]
    else:
        scales = [value / 255**2 * 255 for value in colour.values]
    noise = sum(
        varied.colour[number][component] * scales[component] * colour.vectors[:, component] for component in range(3)
    )
    crop = crop + noise
    if recipe.colour_rescale:
        crop = crop / (1 + recipe.colour_noise)
    return crop.transpose(2, 0, 1)


@pytest.mark.parametrize(
    "recipe",
    [
        RecipeConfig(),
        RecipeConfig(colour_scale="eigenvalue"),
        RecipeConfig(colour_rescale=True),
        RecipeConfig(colour_noise=0.0),
        RecipeConfig(reflect=False),
        RecipeConfig(crop=False),
    ],
    ids=["paper", "as printed", "original code", "no colour", "no reflection", "no crop"],
)
@pytest.mark.parametrize("kernel", [False, True], ids=["operators", "one pass"])
def test_is_the_paper_written_out(
    recipe: RecipeConfig, images: np.ndarray, mean: np.ndarray, colour: ColourComponents, kernel: bool
) -> None:
    make = TrainingInput(mean, colour, SIZE, recipe, CPU)
    varied = VariationTable(100, make.margin, recipe, seed=0).rows(0, np.arange(40, 46))
    if not recipe.crop:
        assert (varied.top == (H - SIZE) // 2).all()
        assert (varied.left == (H - SIZE) // 2).all()
    if kernel:
        pytest.importorskip("triton")
        operators = make(torch.from_numpy(images), varied)
        make.kernel = True
        assert torch.equal(make(torch.from_numpy(images), varied), operators)
    result = make(torch.from_numpy(images), varied)
    assert result.shape == (6, 3, SIZE, SIZE)
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)
    for number in range(6):
        expected = written_out(images[number], mean, colour, recipe, varied, number)
        np.testing.assert_allclose(result[number].numpy(), expected, rtol=1e-5, atol=1e-4)


def test_without_its_kernel_the_operators_do_it(
    images: np.ndarray,
    mean: np.ndarray,
    colour: ColourComponents,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """If it fails, however: the same images, and one line."""

    def failing(*arguments: object, **named: object) -> None:
        raise OutOfResources(300_000, 232_448, "shared memory")

    make = TrainingInput(mean, colour, SIZE, RecipeConfig(), CPU)
    varied = VariationTable(6, make.margin, RecipeConfig(), seed=0).rows(0, np.arange(6))
    expected = make(torch.from_numpy(images), varied)
    make.kernel = True
    monkeypatch.setattr(input_kernel, "training_input", failing)
    for _ in range(2):
        assert torch.equal(make(torch.from_numpy(images), varied), expected)
    (note,) = capsys.readouterr().out.splitlines()
    assert note.startswith("note: images are cropped and varied by PyTorch's operators: out of resource")


def test_images_of_the_network_s_size_are_only_shifted(images: np.ndarray, mean: np.ndarray) -> None:
    recipe = RecipeConfig(reflect=False, colour_noise=0.0)
    make = TrainingInput(mean, ColourComponents(np.zeros(3), np.eye(3)), H, recipe, CPU)
    result = make(torch.from_numpy(images), VariationTable(6, make.margin, recipe, 0).rows(0, np.arange(6)))
    np.testing.assert_allclose(result.numpy(), (images - mean).transpose(0, 3, 1, 2), rtol=1e-6)


def test_draws_belong_to_seed_epoch_and_sample() -> None:
    """The augmentation of an image does not depend on its batch."""

    def rows(seed: int, epoch: int, samples: list[int]) -> Variations:
        return VariationTable(1000, 32, RecipeConfig(), seed).rows(epoch, np.array(samples))

    whole = rows(0, 3, list(range(1000)))
    part = rows(0, 3, [7, 500, 3])
    for name in ("top", "left", "reflect", "colour"):
        assert (getattr(part, name) == getattr(whole, name)[[7, 500, 3]]).all()
        for other in (rows(0, 4, list(range(1000))), rows(1, 3, list(range(1000)))):
            assert not (getattr(other, name) == getattr(whole, name)).all()


def test_draws_change_with_the_epoch_in_one_table() -> None:
    table = VariationTable(1000, 32, RecipeConfig(), 0)
    first = table.rows(0, np.arange(1000)).top
    assert not (table.rows(1, np.arange(1000)).top == first).all()
    assert (table.rows(0, np.arange(1000)).top == first).all()


def test_draws_have_the_paper_s_distributions() -> None:
    varied = VariationTable(20_000, 32, RecipeConfig(), 0).rows(0, np.arange(20_000))
    for place in (varied.top, varied.left):
        counts = np.bincount(place, minlength=33)
        assert len(counts) == 33
        assert counts.min() > 450
        assert counts.max() < 770
    assert abs(varied.reflect.mean() - 0.5) < 0.02
    assert abs(varied.colour.mean()) < 0.003
    assert abs(varied.colour.std() - 0.1) < 0.003
    assert abs(np.corrcoef(varied.colour.T) - np.eye(3)).max() < 0.03
    assert abs(np.corrcoef(varied.top, varied.left)[0, 1]) < 0.03


def test_order_and_variations_are_drawn_apart() -> None:
    """Order and augmentation of an epoch come from different streams."""
    shared = np.random.default_rng([5, 2]).integers(0, 32, (2, 1000), endpoint=True)
    drawn = VariationTable(1000, 32, RecipeConfig(), 5).rows(2, np.arange(1000))
    assert (drawn.top == shared[0]).mean() < 0.1
    assert (drawn.left == shared[1]).mean() < 0.1


def test_ten_crops_are_corners_centre_and_reflections(images: np.ndarray, mean: np.ndarray) -> None:
    result = ten_crops(torch.from_numpy(images), torch.from_numpy(mean), SIZE).numpy()
    assert result.shape == (6, 10, 3, SIZE, SIZE)
    places = [(0, 0), (0, H - SIZE), (H - SIZE, 0), (H - SIZE, H - SIZE), ((H - SIZE) // 2, (H - SIZE) // 2)]
    for number, (top, left) in enumerate(places):
        place = (slice(top, top + SIZE), slice(left, left + SIZE))
        expected = (images[:, *place].astype(np.float64) - mean[place]).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(result[:, number], expected, rtol=1e-6, atol=1e-4)
        np.testing.assert_allclose(result[:, number + 5], expected[..., ::-1], rtol=1e-6, atol=1e-4)
    centre = centre_crop(torch.from_numpy(images), torch.from_numpy(mean), SIZE)
    assert centre.shape == (6, 1, 3, SIZE, SIZE)
    assert np.array_equal(centre[:, 0].numpy(), result[:, 4])
