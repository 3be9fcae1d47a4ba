"""What the benchmarks measure: the right operators, found wrong before they are timed."""

from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from bench.measure.memory import kept_bytes
from bench.measure.timing import seconds
from bench.subjects.cases import CASES, LRN, WrongResultError, check, inputs, prepare
from kernels import cpu
from kernels.arguments import Normalization

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_operator_is_found_right(case: object) -> None:
    for implementation, dtype in (
        ("aten", torch.float32),
        ("reference", torch.float32),
        ("reference", torch.bfloat16),
    ):
        check(prepare(case, implementation), 2, dtype, CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_kernel_is_refused(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """A window that is off by one, an alpha that is not divided, a border that is crossed."""
    right = cpu.forward

    def off_by_one(input: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
        return right(input.roll(1, 1), *more)

    def undivided(input: Tensor, bias: Any, relu: bool, asked: Normalization, *more: Any) -> tuple[Tensor, Tensor]:
        return right(input, bias, relu, asked._replace(alpha=asked.alpha * asked.size), *more)

    def crossing(input: Tensor, bias: Any, relu: bool, asked: Normalization, *more: Any) -> tuple[Tensor, Tensor]:
        return right(input, bias, relu, asked._replace(groups=1), *more)

    prepared = prepare(CASES[3], "reference")
    check(prepared, 2, dtype, CPU)
    for wrong in (off_by_one, undivided, crossing):
        monkeypatch.setattr(cpu, "forward", wrong)
        with pytest.raises(WrongResultError, match=r"output differs by .* of its norm"):
            check(prepared, 2, dtype, CPU)


def test_the_window_counts() -> None:
    """Windows' sums are as large as k, or a wrong window would not show."""
    input, bias = inputs(CASES[0], 2, torch.float32, "channels_last", CPU)
    assert bias is not None
    mean_square = torch.relu(input + bias.reshape(-1, 1, 1)).square().mean()
    assert 0.2 < LRN.alpha * mean_square / LRN.k < 2


def test_kept_bytes() -> None:
    """The input and a byte for each window."""
    input = torch.randn(2, 8, 9, 9, requires_grad=True)
    with kernels.implementation("reference"):
        kept = kept_bytes(lambda: kernels.relu_lrn_max_pool2d(input, 5), ())
    assert kept == input.numel() * 4 + 2 * 8 * 4 * 4
    weight = torch.randn(3, 8, requires_grad=True)
    assert kept_bytes(lambda: input[0, :, 0].T @ weight.T, (weight,)) == input.numel() * 4


def test_rivals_are_sampled_in_turns() -> None:
    order: list[str] = []
    times = seconds([[lambda: order.append("a")] * 2, [lambda: order.append("b")]], CPU, samples=3)
    assert "".join(order) == "aab" * 5
    assert [len(found) for found in times] == [3, 3]
