"""Batches of images from memory, a mapped file or JPEG, prefetched by threads into reusable buffers."""

import itertools
import queue
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..common import seeds
from ..common.progress import Progress
from ..readers.files import free_host_memory
from .images import Split
from .jpeg import JpegImages

#: Batches prefetched, including the one in use.
BUFFERS = 4
#: Batches sent to a GPU in advance, including the next one.
TRAVELLING = 2
#: Images copied at a time when all of them are read into memory.
_COPIED = 1024

Cache = Literal["device", "host", "none"]


@dataclass(frozen=True)
class Batch:
    """A batch on the device, valid until the next one is requested.

    ``images`` is uint8 ``[count, size, size, 3]``, ``labels`` int64 ``[count]``; ``samples`` are the images' numbers
    in their split, on the host; ``epoch`` counts from 0.
    """

    images: Tensor
    labels: Tensor
    samples: NDArray[np.int64]
    epoch: int


class _Buffer:
    """A host buffer for a batch, and the event after which it may be overwritten."""

    def __init__(self, batch_size: int, image_shape: tuple[int, ...], device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.images = torch.empty((batch_size, *image_shape), dtype=torch.uint8, pin_memory=pinned)
        self.labels = torch.empty(batch_size, dtype=torch.int64, pin_memory=pinned)
        self.samples = np.empty(0, np.int64)
        self.epoch = 0
        self.copied: torch.cuda.Event | None = None


class Loader:
    """Batches of a split, in a new order every epoch or in one pass in order.

    The order is one permutation per (seed, epoch), the same for any number of ranks. The global batch ``b`` is its
    entries ``b * batch_size`` to ``(b + 1) * batch_size``, and every rank reads its own slice of them.

    Args:
        split: the images.
        batch_size: images in a global batch.
        device: of the batches.
        shuffle: a new order every epoch, endlessly, dropping each epoch's incomplete batch. Otherwise one pass in
            order, with a smaller last batch.
        seed: of the order.
        cache: keep the images in the device's or the host's memory.
        threads: threads that read one batch together.
        rank, replicas: this process, and the number of processes that share each batch, which divides ``batch_size``.
        only: int64 numbers of the images to read; all of the split by default.

    Raises:
        ValueError: fewer images than a batch needs, or ``replicas`` does not divide it.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        device: torch.device,
        *,
        shuffle: bool,
        seed: int = 0,
        cache: Cache = "none",
        threads: int = 1,
        rank: int = 0,
        replicas: int = 1,
        only: NDArray[np.int64] | None = None,
    ) -> None:
        self.samples = np.arange(len(split)) if only is None else only
        if batch_size % replicas:
            raise ValueError(f"batch_size {batch_size} cannot be shared by {replicas} ranks")
        if shuffle and len(self) < batch_size:
            raise ValueError(f"batch_size {batch_size} is more than the {len(self)} training images")
        self.split, self.batch_size, self.device = split, batch_size, device
        self.shuffle, self.seed, self.rank, self.replicas = shuffle, seed, rank, replicas
        self.threads = threads
        self.batches = len(self) // batch_size if shuffle else -(-len(self) // batch_size)
        self.epoch = 0
        self.batch = 0
        self.images = split.images
        self.cached: Tensor | None = None
        if cache == "host":
            self.images = np.empty(split.images.shape, np.uint8)
            self._copy(torch.from_numpy(self.images))
        elif cache == "device":
            self.cached = torch.empty(split.images.shape, dtype=torch.uint8, device=device)
            self._copy(self.cached)

    def __len__(self) -> int:
        """Images in a pass over all of them."""
        return len(self.samples)

    def _copy(self, target: Tensor) -> None:
        """Read all images into memory, part by part."""
        count, split = len(self.split), self.split
        with Progress("images read into memory", count) as progress, ThreadPoolExecutor(self.threads) as pool:
            for first in range(0, count, _COPIED):
                samples = np.arange(first, min(first + _COPIED, count))
                part = np.empty((len(samples), *split.images.shape[1:]), np.uint8)
                self._take(split.images, samples, part, pool)
                target[first : first + _COPIED] = torch.from_numpy(part)
                progress.update(len(part))

    def _take(
        self,
        images: NDArray[np.uint8] | JpegImages,
        samples: NDArray[np.int64],
        out: NDArray[np.uint8],
        pool: ThreadPoolExecutor | None,
    ) -> None:
        """Write ``images[samples]`` to ``out``, using all threads."""
        # mode="clip" lets numpy write into `out` directly; the samples are in range.
        if pool is None:
            images.take(samples, 0, out, "clip")
            return
        bounds = np.linspace(0, len(samples), self.threads + 1).astype(int)
        parts = [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
        for job in [pool.submit(images.take, samples[part], 0, out[part], "clip") for part in parts]:
            job.result()

    def state_dict(self) -> dict[str, int]:
        """The position: the batches handed out, not those prefetched."""
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position; takes effect at the next ``iter()``."""
        self.epoch, self.batch = state["epoch"], state["batch"]

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The image numbers in the order of ``epoch``."""
        if not self.shuffle:
            return self.samples
        return seeds.order(self.seed, epoch).permutation(self.samples)

    def _samples(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """(epoch, this rank's samples) of each batch from the position on."""
        epoch, batch = self.epoch, self.batch
        while True:
            order = self.order(epoch)
            while batch < self.batches:
                rows = order[batch * self.batch_size : (batch + 1) * self.batch_size]
                share = -(-len(rows) // self.replicas)
                yield epoch, rows[self.rank * share : (self.rank + 1) * share]
                batch += 1
            if not self.shuffle:
                return
            epoch, batch = epoch + 1, 0

    def __iter__(self) -> Generator[Batch]:
        """Batches from the position on: endless when shuffling, else to the end of the pass.

        Closing the iterator stops the threads behind it.
        """
        batches = self._from_device() if self.cached is not None else self._read_ahead()
        try:
            for batch in batches:
                self.epoch, self.batch = batch.epoch, self.batch + 1
                if self.batch == self.batches:
                    self.epoch, self.batch = batch.epoch + int(self.shuffle), 0
                yield batch
        finally:
            batches.close()

    def _from_device(self) -> Generator[Batch]:
        assert self.cached is not None
        labels = torch.from_numpy(self.split.labels).to(self.device)
        for epoch, samples in self._samples():
            index = torch.from_numpy(samples).to(self.device)
            yield Batch(self.cached.index_select(0, index), labels.index_select(0, index), samples, epoch)

    def _read(self, buffer: _Buffer, pool: ThreadPoolExecutor | None) -> None:
        """Fill a buffer with the images of its samples."""
        count = len(buffer.samples)
        self._take(self.images, buffer.samples, buffer.images.numpy()[:count], pool)
        np.take(self.split.labels, buffer.samples, out=buffer.labels.numpy()[:count], mode="clip")

    def _read_ahead(self) -> Generator[Batch]:
        shape = self.images.shape[1:]
        share = -(-self.batch_size // self.replicas)
        free: queue.SimpleQueue[_Buffer | None] = queue.SimpleQueue()
        full: queue.SimpleQueue[_Buffer | BaseException | None] = queue.SimpleQueue()
        for _ in range(BUFFERS):
            free.put(_Buffer(share, shape, self.device))

        def produce() -> None:
            pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None
            try:
                for epoch, samples in self._samples():
                    buffer = free.get()
                    if buffer is None:
                        return
                    if buffer.copied is not None:
                        buffer.copied.synchronize()
                    buffer.epoch, buffer.samples = epoch, samples
                    self._read(buffer, pool)
                    full.put(buffer)
                full.put(None)
            except BaseException as error:  # re-raised in the thread that requests batches
                full.put(error)
            finally:
                if pool is not None:
                    pool.shutdown()

        thread = threading.Thread(target=produce, name="loader", daemon=True)
        thread.start()
        try:
            sent = _sent(full, self.device)
            for buffer, images, labels in sent:
                yield Batch(images, labels, buffer.samples, buffer.epoch)
                free.put(buffer)
        finally:
            free.put(None)
            thread.join()


def _sent(
    full: "queue.SimpleQueue[_Buffer | BaseException | None]", device: torch.device
) -> Iterator[tuple[_Buffer, Tensor, Tensor]]:
    """The incoming buffers, with their images and labels on the device.

    Copies to a GPU run on a separate stream, and the next batch is copied while one is in use.
    """
    if device.type != "cuda":
        # Copies to an Apple GPU are synchronous: nothing tells when an asynchronous one is done and the buffer is free.
        while (buffer := full.get()) is not None:
            if isinstance(buffer, BaseException):
                raise buffer
            count = len(buffer.samples)
            yield buffer, buffer.images[:count].to(device), buffer.labels[:count].to(device)
        return
    stream = torch.cuda.Stream(device)
    travelling: deque[tuple[_Buffer, Tensor, Tensor]] = deque()
    ended = False
    while not ended or travelling:
        while not ended and len(travelling) < TRAVELLING:
            try:
                # Wait for the first; take others only if they are ready.
                buffer = full.get(block=not travelling)
            except queue.Empty:
                break
            if isinstance(buffer, BaseException):
                raise buffer
            if buffer is None:
                ended = True
                break
            count = len(buffer.samples)
            with torch.cuda.stream(stream):
                images = buffer.images[:count].to(device, non_blocking=True)
                labels = buffer.labels[:count].to(device, non_blocking=True)
                buffer.copied = torch.cuda.Event()
                buffer.copied.record()
            travelling.append((buffer, images, labels))
        if not travelling:
            return
        buffer, images, labels = travelling.popleft()
        assert buffer.copied is not None
        current = torch.cuda.current_stream(device)
        current.wait_event(buffer.copied)
        for tensor in (images, labels):
            tensor.record_stream(current)
        yield buffer, images, labels


def cache_that_fits(split: Split, wanted: Cache, device: torch.device) -> Cache:
    """``wanted``, or ``"none"`` with a message if the images take more than 80 % of the free memory."""
    if wanted == "none":
        return wanted
    if device.type == "cpu":
        wanted = "host"
    # Apple's GPUs share the host's memory.
    cuda = device.type == "cuda" and wanted == "device"
    free = torch.cuda.mem_get_info(device)[0] if cuda else free_host_memory()
    if split.images.nbytes <= 0.8 * free:
        return wanted
    print(
        f"--cache {wanted}: the images take {split.images.nbytes / 2**30:,.1f} GiB and {free / 2**30:,.1f} GiB are "
        "free; reading them from the store instead"
    )
    return "none"
