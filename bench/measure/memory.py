"""Memory that autograd saves for the backward pass, counted on any device."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def kept_bytes(forward: Callable[[], object], apart_from: Iterable[Tensor]) -> int:
    """Bytes that ``forward`` saves for its backward pass, each storage once.

    Args:
        forward: computes something that requires a gradient.
        apart_from: tensors whose storages are not counted, such as parameters.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in apart_from}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # Saved tensors must live until all are counted, because a freed address may be reused.
        result = forward()
    del result
    return sum(storages.values())
