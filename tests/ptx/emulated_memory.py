"""The memory of a GPU that :mod:`tests.ptx.emulator` emulates, global and shared, with what is known of its bytes."""

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

Array = np.ndarray[Any, Any]

#: Numbers of so many bytes.
BITS: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
#: Bytes of a storage up to which elements are watched for being written twice.
WATCHED = 1 << 26


class EmulationError(Exception):
    """What a GPU would not do, or not do reliably."""


class Memory:
    """The storages of a kernel's arguments, in the memory of this process."""

    def __init__(self, tensors: Mapping[str, Tensor], written: Sequence[str]) -> None:
        self.places: dict[int, tuple[int, bool, Array | None]] = {}
        for name, tensor in tensors.items():
            storage = tensor.untyped_storage()
            start, size = storage.data_ptr(), storage.nbytes()
            writable = name in written or self.places.get(start, (0, False))[1]
            watch = np.zeros(size, np.bool_) if writable and size <= WATCHED else None
            if size:
                self.places[start] = size, writable, watch

    def _find(self, addresses: Array, width: int, writing: bool) -> tuple[int, int, Array | None]:
        """The one storage that these addresses lie in."""
        lowest, highest = int(addresses.min()), int(addresses.max()) + width
        for start, (size, writable, watch) in self.places.items():
            if start <= lowest and highest <= start + size:
                if writing and not writable:
                    raise EmulationError("writes to what it should only read")
                return start, size, watch
        raise EmulationError(f"{'writes' if writing else 'reads'} {width} bytes outside its arguments")

    def _elements(self, addresses: Array, width: int, vector: int, writing: bool) -> tuple[Array, Array, Array | None]:
        if (addresses % (width * vector)).any():
            raise EmulationError(f"an access to {width * vector} bytes that is not aligned to them")
        start, size, watch = self._find(addresses, width * vector, writing)
        shift = start % width
        count = (size - shift) // width
        whole = np.frombuffer((ctypes.c_uint8 * (count * width)).from_address(start + shift), BITS[width])
        places = ((addresses - np.uint64(start + shift)) // np.uint64(width)).astype(np.int64)
        return whole, places[:, None] + np.arange(vector), watch

    def _by_storage(self, addresses: Array) -> list[Array]:
        """Where ``addresses`` are in the same storage or after it: lanes may read a pointer of their own."""
        storage = np.searchsorted(np.array(sorted(self.places), np.uint64), addresses, "right")
        return [storage == each for each in np.unique(storage)]

    def read(self, addresses: Array, width: int, vector: int) -> Array:
        """``[A, vector]`` numbers of ``width`` bytes at ``[A]`` addresses."""
        result = np.empty((len(addresses), vector), BITS[width])
        for there in self._by_storage(addresses):
            whole, places, _ = self._elements(addresses[there], width, vector, False)
            result[there] = whole[places]
        return result

    def write(self, addresses: Array, values: Array, width: int) -> None:
        """Write ``values``, ``[A, vector]``, to ``addresses``, ``[A]``."""
        for there in self._by_storage(addresses):
            whole, places, watch = self._elements(addresses[there], width, values.shape[1], True)
            whole[places] = values[there]
            if watch is not None:
                first = places * width
                if len(np.unique(places)) < places.size or watch[first].any():
                    raise EmulationError("writes an element twice")
                watch[first] = True


class Shared:
    """The shared memory of several programs, and what is known of each of its bytes."""

    NOTHING, COPYING, ARRIVED, VISIBLE = range(4)

    def __init__(self, programs: int, size: int) -> None:
        self.bytes = np.full((programs, size), 0xA5, np.uint8)
        self.state = np.full((programs, size), self.NOTHING, np.uint8)
        self.lane = np.zeros((programs, size), np.uint8)
        #: Copies on their way: programs, lanes, places, data, and their group's number.
        self.copies: list[tuple[Array, ...]] = []
        #: Groups that each program has closed.
        self.groups = np.zeros(programs, np.int64)

    def _places(self, addresses: Array, count: int) -> Array:
        if (addresses % count).any():
            raise EmulationError(f"an access to {count} bytes of shared memory that is not aligned to them")
        if addresses.max() + count > self.bytes.shape[1]:
            raise EmulationError("shared memory is left")
        return addresses.astype(np.int64)[:, None] + np.arange(count)

    def copy(self, rows: Array, lanes: Array, addresses: Array, data: Array) -> None:
        """Begin to copy ``data``, ``[A, bytes]``."""
        places = self._places(addresses, data.shape[1])
        self.state[rows[:, None], places] = self.COPYING
        self.copies.append((rows, lanes, places, data, self.groups[rows]))

    def commit(self, programs: Array) -> None:
        """Close a group of copies of the programs that are marked."""
        self.groups += programs

    def wait(self, left: int, programs: Array) -> None:
        """Until all but the last ``left`` groups of the programs that are marked have arrived."""
        copies, self.copies = self.copies, []
        for copy in copies:
            rows, group = copy[0], copy[4]
            done = programs[rows] & (group < self.groups[rows] - left)
            self._put(*(part[done] for part in copy[:4]))
            if not done.all():
                self.copies.append(tuple(part[~done] for part in copy))

    def _put(self, rows: Array, lanes: Array, places: Array, data: Array) -> None:
        self.bytes[rows[:, None], places] = data
        self.state[rows[:, None], places] = self.ARRIVED
        self.lane[rows[:, None], places] = lanes[:, None]

    def store(self, rows: Array, lanes: Array, addresses: Array, data: Array) -> None:
        places = self._places(addresses, data.shape[1])
        if (self.state[rows[:, None], places] == self.COPYING).any():
            raise EmulationError("writes to shared memory that a copy is on its way to")
        self._put(rows, lanes, places, data)

    def load(self, rows: Array, lanes: Array, addresses: Array, count: int) -> Array:
        places = self._places(addresses, count)
        state, owner = self.state[rows[:, None], places], self.lane[rows[:, None], places]
        if not ((state == self.VISIBLE) | ((state == self.ARRIVED) & (owner == lanes[:, None]))).all():
            raise EmulationError("reads shared memory before what is to be there is there for certain")
        return self.bytes[rows[:, None], places]

    def barrier(self, programs: Array) -> None:
        self.state[programs[:, None] & (self.state == self.ARRIVED)] = self.VISIBLE
