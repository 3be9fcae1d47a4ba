"""Checks of the operators' arguments. Every refusal names the argument, its value and what is allowed."""

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_input(input: Tensor, operator: str, *, at_least: int, at_most: int | None = None) -> None:
    """``input`` is a floating-point tensor whose number of dimensions is allowed."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{operator}: input must be a torch.Tensor; got {type(input).__name__}")
    if input.dtype not in DTYPES:
        raise TypeError(f"{operator}: input must be float64, float32, float16 or bfloat16; got {input.dtype}")
    if input.dim() < at_least or (at_most is not None and input.dim() > at_most):
        allowed = f"{at_least} or more" if at_most is None else " or ".join(map(str, range(at_least, at_most + 1)))
        raise ValueError(f"{operator}: input must have {allowed} dimensions; got shape {tuple(input.shape)}")


def check_positive_integer(value: int, name: str, operator: str) -> None:
    """``value`` is an integer of at least one."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{operator}: {name} must be a positive integer; got {value!r}")


def check_groups(input: Tensor, groups: int, operator: str) -> None:
    """``groups`` divides the channels of ``input``, which are dimension 1."""
    check_positive_integer(groups, "groups", operator)
    if input.shape[1] % groups:
        raise ValueError(f"{operator}: groups={groups} does not divide the {input.shape[1]} channels of input")


def check_bias(input: Tensor, bias: Tensor | None, channel_dimension: int, operator: str) -> None:
    """``bias`` has one element for each channel of ``input``."""
    if bias is None:
        return
    channels = input.shape[channel_dimension]
    if tuple(bias.shape) != (channels,):
        raise ValueError(f"{operator}: bias must have shape ({channels},), one a channel; got {tuple(bias.shape)}")
    if bias.dtype not in DTYPES:
        raise TypeError(f"{operator}: bias must be float64, float32, float16 or bfloat16; got {bias.dtype}")
    if bias.device != input.device:
        raise ValueError(f"{operator}: bias must be on input's device, {input.device}; got {bias.device}")


def add_bias(input: Tensor, bias: Tensor | None, channel_dimension: int) -> Tensor:
    """``input + bias`` along the channels, in input's dtype; ``input`` itself when there is no bias."""
    if bias is None:
        return input
    shape = [1] * input.dim()
    shape[channel_dimension] = -1
    return (input + bias.reshape(shape)).to(input.dtype)
