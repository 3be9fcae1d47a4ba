"""The network in other programs' runtimes: the file that :mod:`net.export` writes, read by ONNX Runtime and OpenVINO.

Each has as many threads as PyTorch, computes in float32 and has the settings that serve it best. Images are given and
logits taken without a copy.
"""

import sys
from collections.abc import Callable
from copy import deepcopy

import numpy as np
import torch
from torch import Tensor

import kernels
from net.model import export
from net.model.alexnet import AlexNet

from .cases import WrongResultError
from .installed import package

#: Gives the logits, ``[N, classes]``; the next call may overwrite them.
Inference = Callable[[], Tensor]
#: What logits may differ by from those in float64, relative, by norm.
ALLOWED = 1e-4


def exported(model: AlexNet) -> bytes:
    """The file.

    Raises:
        NotInstalledError: the package ``onnx`` is missing.
    """
    package("onnx")
    return export.onnx_bytes(model, {"network": model.config.to_dict(), "classes": None, "data_path": None})


def onnxruntime(content: bytes, images: Tensor) -> Inference:
    """All of its graph optimizations, and its own way of waiting for work within a call.

    Between calls its threads do not spin, which would take the cores from whoever has its turn then.

    Raises:
        NotInstalledError: it is not installed.
    """
    runtime = package("onnxruntime")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.add_free_dimension_override_by_name("N", len(images))
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    (output,) = session.get_outputs()
    logits = np.empty((len(images), output.shape[1]), np.float32)
    binding = session.io_binding()
    binding.bind_ortvalue_input(export.INPUT, runtime.OrtValue.ortvalue_from_numpy(images.contiguous().numpy()))
    binding.bind_output(export.OUTPUT, "cpu", 0, np.float32, logits.shape, logits.ctypes.data)

    def infer() -> Tensor:
        session.run_with_iobinding(binding)
        return torch.from_numpy(logits)

    return infer


def openvino(content: bytes, images: Tensor) -> Inference:
    """Its hint for latency, one batch on all threads; that for throughput gives each half of the threads a batch of
    its own, and a batch takes 1.6 to 1.8 times as long. Without the other hint it may compute in bfloat16.

    Raises:
        NotInstalledError: it is not installed.
    """
    # It would tell its makers of its use, from a process that it forks.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    runtime = package("openvino")
    core = runtime.Core()
    model = core.read_model(content, b"")
    model.reshape(list(images.shape))
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    request.set_input_tensor(runtime.Tensor(images.contiguous().numpy(), shared_memory=True))

    def infer() -> Tensor:
        request.infer()
        return torch.from_numpy(request.get_output_tensor().data)

    return infer


def in_float64(model: AlexNet, images: Tensor) -> Tensor:
    """The logits that all are held against, by PyTorch's own operators."""
    with torch.inference_mode(), kernels.implementation("aten"):
        logits: Tensor = deepcopy(model).double()(images.double())
    return logits


def agree(logits: Tensor, expected: Tensor) -> None:
    """Raise where a runtime computes something else.

    Raises:
        WrongResultError: a relative difference of more than :data:`ALLOWED`, or one that is no number.
    """
    difference = float((logits.double() - expected).norm() / expected.norm())
    if not difference <= ALLOWED:
        raise WrongResultError(f"logits differ by {difference:.1e} of their norm, {ALLOWED:g} is allowed")
