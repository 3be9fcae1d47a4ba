"""The update rule against section 5 in plain code, and the schedules."""

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from net.model.alexnet import alexnet
from net.training.config import RecipeConfig
from net.training.recipe import PaperSGD, Schedule, parameter_groups


def paper_rule(
    start: np.ndarray, gradients: Sequence[np.ndarray], rates: Sequence[float], momentum: float, decay: float
) -> np.ndarray:
    """v <- 0.9 v - 0.0005 * eps * w - eps * g; w <- w + v."""
    w, v = start.copy(), np.zeros_like(start)
    for g, rate in zip(gradients, rates, strict=True):
        v = momentum * v - decay * rate * w - rate * g
        w = w + v
    return w


#: Learning rates: constant, the paper's drops, an increase, and zero, where the velocity coasts.
RATES = {
    "constant": [0.1] * 8,
    "falls": [0.1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.001],
    "rises": [0.001, 0.001, 0.1, 0.1, 0.1],
    "stops": [0.1, 0.1, 0.0, 0.0, 0.1, 0.0, 0.01],
    "starts at zero": [0.0, 0.1, 0.1],
}


@pytest.mark.parametrize("fused", [None, True, False])
@pytest.mark.parametrize("rates", RATES.values(), ids=list(RATES))
def test_is_the_paper_s_rule(rates: list[float], fused: bool | None) -> None:
    generator = np.random.default_rng(0)
    starts = [generator.normal(size=shape) for shape in ((3, 4), (5,), (2, 3, 2, 2))]
    gradients = [[generator.normal(size=start.shape) for _ in rates] for start in starts]
    parameters = [torch.nn.Parameter(torch.from_numpy(start.copy())) for start in starts]
    optimizer = PaperSGD(parameters, lr=rates[0], momentum=0.9, weight_decay=0.05, fused=fused)
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = torch.from_numpy(gradient[step].copy())
        optimizer.step()
    for parameter, start, gradient in zip(parameters, starts, gradients, strict=True):
        expected = paper_rule(start, gradient, rates, 0.9, 0.05)
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-12, atol=1e-14)


def test_differs_from_torch_s_sgd_after_a_fall() -> None:
    """The reason for rescaling the buffer: plain SGD rescales the old velocity by the new rate."""
    results = []
    for kind in (PaperSGD, torch.optim.SGD):
        parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = kind([parameter], lr=0.1, momentum=0.9, weight_decay=0.0)
        for rate in (0.1, 0.1, 0.01, 0.01):
            optimizer.param_groups[0]["lr"] = rate
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        results.append(parameter.detach()[0].item())
    assert results[0] < results[1] - 0.1


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_in_another_memory_format(fused: bool) -> None:
    """The fused kernel traverses memory: parameter, gradient and buffer must have the same order."""
    start = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        parameter = torch.nn.Parameter(start.clone().to(memory_format=torch.channels_last))
        optimizer = PaperSGD([parameter], lr=0.1, fused=fused)
        for seed in range(3):
            gradient = torch.randn(4, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            parameter.grad = gradient.to(memory_format=memory_format)
            optimizer.step()
        results.append(parameter.detach())
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("fused", [True, False])
def test_state_goes_on_where_it_was(fused: bool) -> None:
    """Resuming from a saved state is bit-exact, and works with the other implementation too."""
    rates = [0.1, 0.1, 0.01, 0.01, 0.001]
    gradients = torch.randn(len(rates), 6, dtype=torch.float64)

    def run(parameter: torch.nn.Parameter, optimizer: PaperSGD, steps: range) -> None:
        for step in steps:
            optimizer.param_groups[0]["lr"] = rates[step]
            parameter.grad = gradients[step].clone()
            optimizer.step()

    straight = torch.nn.Parameter(torch.ones(6, dtype=torch.float64))
    optimizer = PaperSGD([straight], lr=0.1, fused=fused)
    run(straight, optimizer, range(5))
    half = torch.nn.Parameter(torch.ones(6, dtype=torch.float64))
    optimizer = PaperSGD([half], lr=0.1, fused=fused)
    run(half, optimizer, range(3))
    for other_form in (fused, not fused):
        again = torch.nn.Parameter(half.detach().clone())
        resumed = PaperSGD([again], lr=0.1)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        resumed.param_groups[0]["fused"] = other_form
        run(again, resumed, range(3, 5))
        if other_form == fused:
            assert torch.equal(again, straight)
        torch.testing.assert_close(again, straight, rtol=1e-13, atol=1e-13)


def test_parameters_without_gradient_stay() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = PaperSGD(parameters, lr=0.1)
    parameters[0].grad = torch.ones(2)
    assert optimizer.step(lambda: 3.0) == 3.0
    assert (parameters[0] != 1).all()
    assert (parameters[1] == 1).all()


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay"])
def test_negative_values_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 0; got -1"):
        PaperSGD([torch.nn.Parameter(torch.ones(1))], **{name: -1})


def test_weight_decay_is_the_weights_and_biases_can_learn_faster() -> None:
    model = alexnet("digits")
    weights, biases = parameter_groups(model, RecipeConfig(bias_lr_multiplier=2.0))
    assert weights["weight_decay"] == 0.0005
    assert biases["weight_decay"] == 0
    assert {parameter.dim() for parameter in biases["params"]} == {1}
    assert len(weights["params"]) == len(biases["params"]) == 8
    optimizer = PaperSGD([weights, biases])
    schedule = Schedule(RecipeConfig(bias_lr_multiplier=2.0))
    schedule.apply(optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.02]


def test_convolutions_can_have_a_rate_of_their_own() -> None:
    """The parameters keep their order, which checkpoints use to match the optimizer's state."""
    model = alexnet("digits")
    groups = parameter_groups(model, RecipeConfig(bias_lr_multiplier=2.0, conv_lr_multiplier=0.5))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    convolutions, dense = ["conv1", "conv2", "conv3", "conv4", "conv5"], ["fc6", "fc7", "fc8"]
    for group, layers, kind, rate in zip(
        groups,
        (convolutions, dense, convolutions, dense),
        ("weight", "weight", "bias", "bias"),
        (0.5, 1, 1, 2),
        strict=True,
    ):
        assert [names[id(parameter)] for parameter in group["params"]] == [f"{layer}.{kind}" for layer in layers]
        assert group["multiplier"] == rate
        assert group["weight_decay"] == (0.0005 if kind == "weight" else 0)
    flat = [parameter for group in groups for parameter in group["params"]]
    plain = [parameter for group in parameter_groups(model, RecipeConfig()) for parameter in group["params"]]
    assert all(a is b for a, b in zip(flat, plain, strict=True))


def test_plateau_falls_three_times_and_then_ends() -> None:
    schedule = Schedule(RecipeConfig(patience=2))
    errors = [50.0, 40.0, 40.0, 40.0, 39.0, 39.5, 39.5, 39.5, 39.5, 39.5, 39.5]
    rates = []
    for epoch, error in enumerate(errors, 1):
        assert not schedule.finished
        schedule.observe(epoch, error)
        rates.append(round(schedule.lr, 10))
    assert rates == [0.01, 0.01, 0.01, 0.001, 0.001, 0.001, 0.0001, 0.0001, 0.00001, 0.00001, 0.00001]
    assert schedule.finished


def test_plateau_counts_evaluations_and_not_epochs() -> None:
    schedule = Schedule(RecipeConfig(patience=2))
    for epoch in range(1, 20):
        schedule.observe(epoch, None)
    assert schedule.lr == 0.01


def test_not_a_number_is_no_improvement() -> None:
    schedule = Schedule(RecipeConfig(patience=1))
    schedule.observe(1, 50.0)
    schedule.observe(2, float("nan"))
    assert schedule.reductions == 1


def test_multistep_falls_at_its_epochs() -> None:
    schedule = Schedule(RecipeConfig(lr_scheduler="multistep", lr_milestones=(25, 51, 79)))
    rates = []
    for epoch in range(1, 92):
        schedule.observe(epoch, 50.0)
        rates.append(schedule.lr)
    assert [rates.index(pytest.approx(rate)) + 1 for rate in (0.001, 0.0001, 0.00001)] == [25, 51, 79]
    assert not schedule.finished


def test_schedule_state_goes_on_where_it_was() -> None:
    schedule = Schedule(RecipeConfig(patience=2))
    for epoch, error in enumerate([50.0, 50.0], 1):
        schedule.observe(epoch, error)
    again = Schedule(RecipeConfig(patience=2))
    again.load_state_dict(schedule.state_dict())
    again.observe(3, 50.0)
    assert again.reductions == 1
    for epoch in range(4, 12):
        schedule.observe(epoch, 50.0)
    assert schedule.finished
    again.load_state_dict(schedule.state_dict())
    assert again.finished


def test_gamma_is_the_factor() -> None:
    schedule = Schedule(RecipeConfig(gamma=0.5, patience=1))
    for epoch in range(1, 4):
        schedule.observe(epoch, 50.0)
    assert schedule.lr == 0.01 * 0.25
