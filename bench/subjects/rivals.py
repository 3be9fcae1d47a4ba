"""The network in other programs' runtimes: the file that :mod:`net.export` writes, read by ONNX Runtime and OpenVINO.

Each uses as many threads as PyTorch, computes in float32 and has its fastest settings. No call copies images or
logits; OpenVINO gets its own copy of the images beforehand.
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
#: Largest relative difference of logits from float64, by norm.
ALLOWED = 1e-4


def exported(model: AlexNet) -> bytes:
    """The file.

    Raises:
        NotInstalledError: the package ``onnx`` is missing.
    """
    package("onnx")
    return export.onnx_bytes(model, {"network": model.config.to_dict(), "classes": None, "data_path": None})


def onnxruntime(content: bytes, images: Tensor) -> Inference:
    """ONNX Runtime with all graph optimizations. Threads spin within a call (the default), but not between calls, where
    they would occupy the next rival's cores.

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
    """OpenVINO with its latency hint: one batch on all threads. The throughput hint runs two batches, each on half of
    the threads, and a batch takes 1.6 to 1.8 times as long. Without the precision hint it may compute in bfloat16.

    Raises:
        NotInstalledError: it is not installed.
    """
    # Its telemetry would fork a process.
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
    # A copy: OpenVINO would not keep memory that it shares alive.
    request.set_input_tensor(runtime.Tensor(images.contiguous().numpy(), shared_memory=False))

    def infer() -> Tensor:
        request.infer()
        return torch.from_numpy(request.get_output_tensor().data)

    return infer


def in_float64(model: AlexNet, images: Tensor) -> Tensor:
    """Reference logits in float64, by PyTorch's own operators."""
    with torch.inference_mode(), kernels.implementation("aten"):
        logits: Tensor = deepcopy(model).double()(images.double())
    return logits


def agree(logits: Tensor, expected: Tensor) -> None:
    """Raise if a runtime's logits differ.

    Raises:
        WrongResultError: a relative difference of more than :data:`ALLOWED`, or NaN.
    """
    difference = float((logits.double() - expected).norm() / expected.norm())
    if not difference <= ALLOWED:
        raise WrongResultError(f"logits differ by {difference:.1e} of their norm, {ALLOWED:g} is allowed")
