"""The operators as modules: the functions' results, and arguments refused when they are given."""

import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import kernels

WINDOW = {"size": 5, "alpha": 0.5, "beta": 0.6, "k": 2.0, "groups": 2}
POOL = {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": 1, "ceil_mode": True}
FORMS: tuple[tuple[type[nn.Module], Callable[..., Tensor], dict[str, object], bool], ...] = (
    (kernels.LocalResponseNorm, kernels.local_response_norm, WINDOW, False),
    (kernels.ReLULocalResponseNorm, kernels.relu_local_response_norm, WINDOW, True),
    (kernels.MaxPool2d, kernels.max_pool2d, POOL, False),
    (kernels.ReLUMaxPool2d, kernels.relu_max_pool2d, POOL, True),
    (kernels.ReLULRNMaxPool2d, kernels.relu_lrn_max_pool2d, {**WINDOW, **POOL}, True),
)


@pytest.mark.parametrize(
    ("form", "function", "arguments", "takes_bias"), FORMS, ids=[form.__name__ for form, *_ in FORMS]
)
def test_is_its_function(
    form: type[nn.Module], function: Callable[..., Tensor], arguments: dict[str, object], takes_bias: bool
) -> None:
    input, bias = torch.randn(2, 6, 9, 8), torch.randn(6)
    module = form(**arguments)
    assert torch.equal(module(input), function(input, **arguments))
    if takes_bias:
        assert torch.equal(module(input, bias), function(input, **arguments, bias=bias))
    assert list(module.state_dict()) == []
    assert torch.equal(pickle.loads(pickle.dumps(module))(input), module(input))
    for name, value in arguments.items():
        assert f"{name}={value}" in repr(module) or repr(module).startswith(f"{form.__name__}({value}, ")


@pytest.mark.parametrize(
    ("form", "function", "arguments", "takes_bias"), FORMS, ids=[form.__name__ for form, *_ in FORMS]
)
def test_defaults_are_the_function_s(
    form: type[nn.Module], function: Callable[..., Tensor], arguments: dict[str, object], takes_bias: bool
) -> None:
    required = {name: arguments[name] for name in ("size",) if name in arguments} or {"kernel_size": 3}
    input = torch.randn(2, 6, 9, 8)
    assert torch.equal(form(**required)(input), function(input, **required))


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: kernels.LocalResponseNorm(0), ValueError, "LocalResponseNorm: size must be a positive integer; got 0"),
        (lambda: kernels.ReLULocalResponseNorm(5, groups=1.5), ValueError, "groups must be a positive integer"),  # type: ignore[arg-type]
        (lambda: kernels.ReLULRNMaxPool2d(5, alpha="1"), TypeError, "alpha must be a number; got '1'"),  # type: ignore[arg-type]
        (lambda: kernels.ReLULRNMaxPool2d(5, stride=0), ValueError, "ReLULRNMaxPool2d: stride must be an integer"),
        (lambda: kernels.MaxPool2d(3, padding=2), ValueError, "MaxPool2d: padding must be at most half the window"),
        (lambda: kernels.ReLUMaxPool2d((3, 3, 3)), ValueError, "kernel_size must be an integer"),  # type: ignore[arg-type]
    ],
)
def test_arguments_are_refused_at_once(make: Callable[[], nn.Module], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()
