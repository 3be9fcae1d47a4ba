"""Bytes and FLOPs of the paper's layers, against sums done by hand."""

import pytest
import torch

from bench.measure.ceilings import Ceilings
from bench.predict.roofline import InOrder, Work, layers
from bench.subjects.cases import CASES
from bench.subjects.network import whole_work
from net.model.config import VARIANTS

PAPER = VARIANTS["paper"]


def test_multiply_additions_of_the_paper() -> None:
    assert round(PAPER.multiply_adds / 1e6, 1) == 724.4
    assert round(PAPER.training_flop / 1e9, 3) == 4.136
    products = [name for name in layers(PAPER, 1, 4) if not name.startswith("stage")]
    works = layers(PAPER, 1, 4)
    assert sum(works[name]["training"].flop for name in products) == PAPER.training_flop
    assert sum(works[name]["inference"].flop for name in products) == 2 * PAPER.multiply_adds


def test_bytes_of_the_paper_s_stages() -> None:
    """Batch 128 in bfloat16: forward reads the convolution's output and writes the pooled one."""
    stage1, stage2 = (case.work(128, torch.bfloat16) for case in CASES[:2])
    whole, windows = 128 * 96 * 55 * 55, 128 * 96 * 27 * 27
    assert stage1["inference"].bytes == 2 * (whole + windows) == 92_258_304
    assert stage1["forward"].bytes == 92_258_304 + windows
    assert stage1["backward"].bytes == 2 * (2 * whole + windows) + windows
    assert round(stage2["inference"].bytes / 1e6, 1) == 58.9
    # Bias, ReLU, 5 for the squares' sum, 2 for alpha and k, 3 for the power, a product; 8 comparisons a window.
    assert stage1["forward"].flop == whole * 13 + windows * 8
    assert stage1["forward_backward"] == stage1["forward"] + stage1["backward"]


def test_bytes_of_other_layers() -> None:
    works = layers(PAPER, 2, 4)
    inputs, weights, outputs = 2 * 3 * 224 * 224, 96 * 3 * 11 * 11 + 96, 2 * 96 * 55 * 55
    assert works["conv1"]["inference"].bytes == 4 * (inputs + weights + outputs)
    # Without a gradient of the image: output gradient and image in, the weights' gradient out.
    assert works["conv1"]["training"].bytes == 4 * 2 * (inputs + weights + outputs)
    assert works["fc7"]["training"].flop == 3 * works["fc7"]["inference"].flop == 3 * 2 * 2 * 4096 * 4096
    maps = 2 * 384 * 13 * 13
    assert works["stage3"]["inference"] == Work(2 * maps, 4 * 2 * maps)
    assert whole_work("paper", 2, "float32", "training").bytes > 20 * PAPER.parameters


def test_the_limit_is_the_slower_of_computing_and_moving() -> None:
    limits = Ceilings(1e9, {"float32": 1e12})
    moving = Work(1_000_000, 1_000_000).columns(2000.0, "float32", limits)
    assert moving["limit_us"] == 1000
    assert moving["percent_of_limit"] == 50
    assert moving["gb_per_s"] == 0.5
    computing = Work(10**10, 1).columns(20_000.0, "float32", limits)
    assert computing["limit_us"] == 10_000
    assert computing["gflop_per_s"] == 500
    assert "percent_of_limit" not in Work(1, 1).columns(None, "float32", limits)
    assert "limit_us" not in Work(1, 1).columns(1.0, "float32", None)


def test_the_limit_of_calls_in_order_is_the_sum_of_theirs() -> None:
    limits = Ceilings(1e9, {"float32": 1e12})
    both = InOrder.of([Work(0, 2_000_000), Work(3 * 10**9, 0)])
    assert (both.flop, both.bytes) == (3 * 10**9, 2_000_000)
    assert both.columns(10_000.0, "float32", limits)["limit_us"] == 2000 + 3000
    assert "limit_us" not in both.columns(10_000.0, "bfloat16", limits), "a dtype without a ceiling"
    # An update of the paper's network at 4.3 TB/s and 790 TFLOP/s, by hand: 1.13 ms, of which the update of float32
    # weights takes 0.28 and the dense layers' bytes 0.09.
    fast = Ceilings(4.3e12, {"bfloat16": 790e12})
    assert whole_work("paper", 128, "bfloat16", "training").columns(None, "bfloat16", fast)["limit_us"] == (
        pytest.approx(1130, rel=0.05)
    )


def test_a_layer_s_modes_add_up() -> None:
    works = layers(PAPER, 2, 4)
    assert "input_gradient" not in works["conv1"]
    for name, work in works.items():
        if name.startswith("stage"):
            assert work["training"] == work["forward"] + work["backward"]
        else:
            modes = [work[mode] for mode in ("forward", "input_gradient", "weight_gradient") if mode in work]
            assert work["training"].flop == sum(mode.flop for mode in modes)
            # The gradient of the output is read by both of its modes.
            assert work["training"].bytes <= sum(mode.bytes for mode in modes)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_variant_has_counts(variant: str) -> None:
    for work in layers(VARIANTS[variant], 1, 2).values():
        assert work["training"].flop > work["inference"].flop > 0
        assert work["training"].bytes > work["inference"].bytes > 0
