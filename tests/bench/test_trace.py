"""Kernels of a GPU's trace and their layers, on traces as a GPU's profiler writes them."""

from typing import Any

import pytest
import torch

from bench.cells import Scale
from bench.suite import profile
from bench.suite.run import Run
from bench.suite.trace import (
    MARK,
    NAME_LENGTH,
    Launch,
    Line,
    Shapes,
    launches,
    short,
    table,
    updates,
    with_layers,
)
from net.model.config import VARIANTS

SHAPES = Shapes(VARIANTS["paper"], 128)
#: An operator's name, its inputs' shapes, and the kernels it launches: of an update of the paper's network as it is
#: compiled, a tower only.
UPDATE: list[tuple[str, list[Any], list[str]]] = [
    ("triton_poi_fused_pad_0", [[128, 3, 224, 224], [128, 3, 227, 227]], ["triton_poi_fused_pad_0"]),
    ("triton_poi_fused_cast_1", [[96, 3, 11, 11], [96, 3, 11, 11]], ["triton_poi_fused_cast_1"]),
    ("aten::convolution", [[128, 3, 227, 227], [48, 3, 11, 11], []], ["nhwc_pad", "fprop"]),
    ("alexnet_fused::stage", [[128, 48, 55, 55], [48]], ["forward_kernel"]),
    ("triton_poi_fused_cat_2", [[], []], ["triton_poi_fused_cat_2"]),
    ("aten::convolution", [[128, 48, 27, 27], [128, 48, 5, 5], []], ["fprop"]),
    ("alexnet_fused::stage", [[128, 128, 27, 27], [128]], ["forward_kernel"]),
    ("triton_poi_fused_cat_3", [[128, 128, 13, 13], [128, 256, 13, 13]], ["triton_poi_fused_cat_3"]),
    ("aten::convolution", [[128, 256, 13, 13], [192, 256, 3, 3], []], ["fprop"]),
    ("triton_poi_fused_relu_4", [[128, 192, 13, 13]], ["triton_poi_fused_relu_4"]),
    ("aten::convolution", [[128, 192, 13, 13], [192, 192, 3, 3], []], ["fprop"]),
    ("aten::mm", [[128, 9216], [9216, 4096]], ["gemm"]),
    ("triton_poi_fused_dropout_5", [[], []], ["triton_poi_fused_dropout_5"]),
    ("aten::addmm", [[4096], [128, 4096], [4096, 4096]], ["gemm"]),
    ("aten::addmm", [[1000], [128, 4096], [4096, 1000]], ["gemm"]),
    ("aten::_log_softmax", [[128, 1000]], ["softmax"]),
    ("aten::nll_loss_backward", [[], [128, 1000]], ["nll"]),
    ("aten::mm", [[1000, 128], [128, 4096]], ["gemm"]),
    ("aten::convolution_backward", [[128, 192, 13, 13], [128, 192, 13, 13], [192, 192, 3, 3]], ["dgrad", "wgrad"]),
    ("triton_red_fused_sum_6", [[128, 192, 13, 13]], ["triton_red_fused_sum_6"]),
    ("aten::convolution_backward", [[128, 192, 13, 13], [128, 256, 13, 13], [192, 256, 3, 3]], ["dgrad", "wgrad"]),
    ("aten::_fused_sgd_", [[[96, 3, 11, 11], [4096, 9216]], [[96, 3, 11, 11], [4096, 9216]]], ["multi_tensor"]),
]
LAYERS = [
    "input", "conv1", "conv1", "conv1", "stage1", "stage1", "conv2", "stage2", "stage2", "conv3", "stage3", "conv4",
    "fc6", "fc6", "fc7", "fc8", "loss", "loss", "fc8", "conv4", "conv4", "stage3", "conv3", "conv3", "optimizer",
]  # fmt: skip


def events() -> list[dict[str, Any]]:
    """An uncaptured update: operators and calls on the host's thread, kernels later on the device's, out of order."""
    host: list[dict[str, Any]] = []
    device: list[dict[str, Any]] = []
    clock = 0.0
    for name, shapes, kernels in UPDATE:
        # Around it another one that is shaped like everything, as a compiled network's whole backward pass.
        outer = {"cat": "cpu_op", "name": "CompiledFunction", "args": {"Input Dims": [[96, 3, 11, 11], [4096, 9216]]}}
        host.append({"ph": "X", "tid": 7, "ts": clock, "dur": 10.0, **outer})
        operator = {"cat": "cpu_op", "name": name, "args": {"Input Dims": shapes}}
        host.append({"ph": "X", "tid": 7, "ts": clock + 1, "dur": 8.0, **operator})
        # An inner operator without shapes of its own is a part of it.
        host.append({"ph": "X", "tid": 7, "ts": clock + 2, "dur": 6.0, "cat": "cpu_op", "name": "aten::cudnn"})
        for number, kernel in enumerate(kernels):
            correlation = {"args": {"correlation": len(device)}}
            call = {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "tid": 7, "ts": clock + 3 + number, "dur": 0.5}
            host.append({"ph": "X", **call, **correlation})
            began = {"cat": "kernel", "name": kernel, "tid": 20, "ts": 1000 + 4.0 * len(device), "dur": 2.0}
            device.append({"ph": "X", **began, **correlation})
        clock += 20
    # Another thread's operators are none of theirs, and neither are other kinds of events.
    host.append({"ph": "X", "tid": 8, "ts": 0.0, "dur": 1e6, "cat": "cpu_op", "name": "aten::nll_loss"})
    host.append({"ph": "i", "name": "Record Window End", "ts": 0.0})
    return device[::-1] + host


def test_layers_are_read_off_shapes_and_order() -> None:
    found = launches(events(), SHAPES)
    assert [launch.name for launch in found] == [kernel for _, _, kernels in UPDATE for kernel in kernels]
    assert all(launch.microseconds == 2.0 for launch in found)
    assert SHAPES.placed(found) == LAYERS


def known(*layers: str) -> list[Launch]:
    """Kernels that may belong to what is written as ``stage3|stage4``, or to anything."""
    return [Launch("", 1.0, frozenset(filter(None, each.split("|")))) for each in layers]


def test_layers_between_layers() -> None:
    assert SHAPES.placed(known("", "conv1", "", "conv3", "", "optimizer", "")) == [
        "input", "conv1", "-", "conv3", "-", "optimizer", "-",
    ]  # fmt: skip
    assert SHAPES.placed(known("conv2", "", "", "stage2", "", "fc6")) == [
        "conv2", "conv2", "conv2", "stage2", "-", "fc6",
    ]  # fmt: skip
    assert SHAPES.placed(known("", "")) == ["-", "-"]
    # Forward what comes before a layer is the one before it; backward, the one after.
    assert SHAPES.placed(known("conv4", "stage3|stage4", "conv4")) == ["conv4", "stage3", "conv4"]
    assert SHAPES.placed(known("loss", "conv4", "stage3|stage4", "conv4")) == ["loss", "conv4", "stage4", "conv4"]
    # After all layers come small kernels of any of them.
    assert SHAPES.placed(known("loss", "conv1", "stage3|stage4", "", "conv1", "stage2|stage5", "optimizer")) == [
        "loss", "conv1", "stage3 or stage4", "-", "conv1", "stage2 or stage5", "optimizer",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "shapes", "layers"),
    [
        ("triton_poi_fused_relu", [(128, 192, 13, 13)], "stage3|stage4"),
        ("triton_poi_fused_cat", [(128, 128, 13, 13), (128, 256, 13, 13)], "stage2|stage5"),
        ("alexnet_fused::stage_forward", [(128, 128, 13, 13)], "stage5"),
        ("alexnet_fused::stage_backward", [(128, 128, 13, 13), (128, 128, 27, 27), (128,)], "stage2"),
        ("triton_poi_fused_add_slice_stage_backward_2", [(128, 256, 13, 13)], "stage2|stage5"),
        ("triton_poi_fused_cat", [(4096, 4096), (1000, 4096)], ""),
        ("aten::mm", [(4096, 128), (128, 4096)], "fc7"),
        ("aten::mm", [(128, 77), (77, 4096)], ""),
        ("triton_poi_fused_dropout", [(2,), (128, 4096)], "fc6|fc7"),
        ("triton_red_fused_sum", [(192,)], "stage3|stage4"),
        ("aten::_fused_sgd_", [[(96, 3, 11, 11)], [(96, 3, 11, 11)]], "optimizer"),
        ("aten::add", [], ""),
    ],
)
def test_shapes_of_layers(name: str, shapes: list[Any], layers: str) -> None:
    assert "|".join(sorted(SHAPES.layers(name, shapes))) == layers


def test_an_operator_is_a_part_of_the_one_that_calls_it() -> None:
    """But for products, whose weights say more than what an autograd node is given."""
    gradient, image, weight = (128, 48, 55, 55), (128, 3, 227, 227), (48, 3, 11, 11)
    node = SHAPES.layers("ConvolutionBackward0", [gradient])
    assert node == {"stage1"}
    assert SHAPES.layers("aten::convolution_backward", [gradient, image, weight], node) == {"conv1"}
    assert SHAPES.layers("aten::copy_", [(128, 48, 27, 27)], frozenset({"conv2"})) == {"conv2"}
    assert SHAPES.layers("aten::copy_", [(128, 48, 27, 27)]) == {"stage1"}
    assert SHAPES.layers("aten::cudnn", [], frozenset({"stage3", "stage4"})) == {"stage3", "stage4"}


def test_a_graph_s_kernels_take_the_layers_of_the_same_ones_launched_by_the_host() -> None:
    found = launches(events(), SHAPES)
    uncaptured = [launch._replace(layers=frozenset({layer})) for launch, layer in zip(found, LAYERS, strict=True)]
    replay = [Launch(launch.name, 3.0) for launch in found]
    # The graph copies its inputs first, and one kernel is another one when it is captured.
    replay = [Launch("Memcpy DtoD", 1.0), *replay[:10], Launch("other", 1.0), *replay[11:]]
    taken = with_layers(replay, uncaptured)
    assert [set(launch.layers) for launch in taken] == [
        set(), *({layer} for layer in LAYERS[:10]), set(), *({layer} for layer in LAYERS[11:]),
    ]  # fmt: skip
    assert SHAPES.placed(taken) == ["input", *LAYERS]
    # Where the order does not fit at all, a name that has one layer still keeps it.
    (softmax,) = (launch for launch in with_layers(replay[::-1], uncaptured) if launch.name == "softmax")
    assert softmax.layers == {"loss"}


def test_updates_between_marks() -> None:
    mark, kernel = Launch(f"at::cuda::{MARK}(long)", 0.1), Launch("kernel", 1.0)
    whole = [mark, kernel, kernel, kernel]
    # The profiler has lost the first mark, and some kernels of the second update.
    trace = [kernel, kernel, mark, kernel, *whole * 4, mark]
    assert updates(trace, 10) == [[kernel] * 3] * 4
    assert updates(trace, 2) == [[kernel] * 3] * 2
    assert updates([kernel], 2) == []


def test_a_table_adds_up() -> None:
    times = (("a", 1.0, "conv1"), ("b", 5.0, "conv1"), ("a", 2.0, "conv1"), ("a", 4.0, "-"))
    found = [Launch(name, microseconds, frozenset({layer})) for name, microseconds, layer in times]
    assert table(found, 2) == [Line("b", "conv1", 0.5, 2.5), Line("a", "-", 0.5, 2.0), Line("a", "conv1", 1.0, 1.5)]


def test_names_are_kept_short() -> None:
    name = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>(int, char*)"
    assert short(name) == name.removeprefix("void ")
    assert len(short(name * 3)) == NAME_LENGTH


@pytest.mark.parametrize("captured", [True, False])
def test_a_gpu_s_updates(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, captured: bool) -> None:
    """Uncaptured, then replayed; where the profiler sees nothing of graphs, the uncaptured update is what there is."""
    run = Run(torch.device("cuda"), Scale("cuda", 128, "paper"), tmp_path, tmp_path, limit=100.0)
    whole = events()
    length = 1e4

    def shifted(number: int, launched: bool) -> list[dict[str, Any]]:
        chosen = whole if launched else [event for event in whole if event.get("cat") == "kernel"]
        spin = {"ph": "X", "cat": "kernel", "name": MARK, "ts": 900.0, "dur": 0.1, "tid": 20}
        moved = [{**event, "ts": event["ts"] + number * length} for event in [*chosen, spin]]
        for event in moved:
            if "correlation" in event.get("args", {}):
                event["args"] = {"correlation": (number, event["args"]["correlation"])}
        return moved

    traced: list[str] = []

    def events_of(run: Run, call: Any, count: int, name: str) -> list[dict[str, Any]]:
        traced.append(name)
        launched = name.endswith("uncaptured")
        if not launched and not captured:
            return []
        return [event for number in range(count + 1) for event in shifted(number, launched)]

    calls: list[str] = []
    monkeypatch.setattr(profile, "prepared", lambda cell, device: (lambda: calls.append(cell.how), None))
    monkeypatch.setattr(profile, "traced", events_of)
    monkeypatch.setattr(profile, "chained_seconds", lambda call, samples, warmup: [1e-4] * samples)
    rows = [row for row in profile.rows(run) if row["case"] == "update of paper" and "triton" in row["implementation"]]
    # The profiler has seen kernels before the first capture.
    assert traced[:2] == ["paper-triton-uncaptured", "paper-triton"]
    assert calls[:3] == ["unrecorded"] * 3
    total = rows.pop()
    assert (total["kernel"], total["captured"], total["updates"]) == ("sum", captured, 10 if captured else 1)
    assert total["us_per_step"] == pytest.approx(2.0 * len(LAYERS))
    assert total["wall_us"] == pytest.approx(100.0)
    assert total["gaps_us"] == pytest.approx(50.0)
    fprop = {row["layer"]: row["launches_per_step"] for row in rows if row["kernel"] == "fprop"}
    assert fprop == {"conv1": 1, "conv2": 1, "conv3": 1, "conv4": 1}
