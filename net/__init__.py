"""The 2012 AlexNet: network, training recipe, data, evaluation. Each command is ``python -m net.NAME``.

:func:`load` opens a trained network in a program of your own::

    classifier = net.load("runs/digits-001")
    for name, probability in classifier.predict(["cat.jpg"])[0]:
        print(name, probability)
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .analysis.classifier import Classifier

__all__ = ["load"]


def load(path: str | os.PathLike[str], device: str | None = None) -> "Classifier":
    """Load a trained network for inference.

    Args:
        path: a run folder (its newest intact checkpoint is loaded), a checkpoint (``.pt``), weights
            (``.safetensors``) with the architecture in their metadata, or the name of pretrained weights
            (:func:`net.pretrained.names`).
        device: ``cpu``, ``cuda`` or ``cuda:N``; by default a GPU if there is one, else the CPU.

    Returns:
        The :class:`net.analysis.classifier.Classifier`, with ``.model``, ``.classes``, ``.preprocess(images)`` and
        ``.predict(images)``.

    Raises:
        net.common.errors.DataError: ``path`` holds no usable network. net.common.errors.UsageError: no such device, or
            a path that is also the name of pretrained weights.
    """
    from .analysis.classifier import Classifier

    return Classifier(os.fspath(path), device)
