"""Global and shared memory with the checks that a GPU leaves out.

Every tensor has addresses of its own, and its own elements are all that may be touched, also where it is a view of a
larger storage. Bytes that one program of the grid wrote belong to it: no other may touch them in the same launch.
Shared memory starts as garbage, and belongs to the warp that touched it until the next barrier.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

REGION_BITS = 40
NOBODY, SEVERAL = -1, -2


class Fault(Exception):
    """Something that compiled code must not do."""


@dataclass
class _Storage:
    tensor: torch.Tensor  # the bytes themselves
    data: np.ndarray  # a copy, padded to whole words
    owner: np.ndarray | None = None  # of each byte, the program that wrote it


@dataclass
class _Region:
    name: str
    storage: _Storage
    allowed: np.ndarray | None  # of each byte of the storage, whether it is one of the tensor; None: all


class Memory:
    """The tensors of one launch."""

    def __init__(self) -> None:
        self._storages: dict[int, _Storage] = {}
        self._regions: list[_Region] = []

    def add(self, name: str, tensor: torch.Tensor) -> int:
        """Address of its first element."""
        storage = tensor.untyped_storage()
        assert storage.data_ptr() % 16 == 0
        if storage.data_ptr() not in self._storages:
            raw = torch.empty(0, dtype=torch.uint8).set_(storage)
            data = np.zeros(-(-storage.nbytes() // 16) * 16, np.uint8)
            data[: storage.nbytes()] = raw.numpy()
            self._storages[storage.data_ptr()] = _Storage(raw, data)
        kept = self._storages[storage.data_ptr()]
        size, start = tensor.element_size(), tensor.storage_offset() * tensor.element_size()
        allowed = torch.zeros(kept.data.size, dtype=torch.bool)
        strides = [stride * size for stride in tensor.stride()]
        torch.as_strided(allowed, (*tensor.shape, size), (*strides, 1), start).fill_(True)
        self._regions.append(_Region(name, kept, allowed.numpy()))
        return (len(self._regions) << REGION_BITS) + start

    def write_back(self) -> None:
        for storage in self._storages.values():
            if storage.owner is not None:
                storage.tensor.numpy()[:] = storage.data[: storage.tensor.numel()]

    def load(self, addresses: np.ndarray, programs: np.ndarray, size: int, count: int) -> np.ndarray:
        """(lanes, count) words of `size` bytes."""
        loaded = np.empty((addresses.size, count), f"u{size}")
        for region, lanes, offsets in self._places(addresses, size * count, "read"):
            storage = region.storage
            if storage.owner is not None:
                owners = storage.owner[offsets[:, None] + np.arange(size * count)]
                if ((owners != NOBODY) & (owners != programs[lanes][:, None])).any():
                    raise Fault(f"read of {region.name} where another program of the grid wrote")
            words = storage.data.view(f"u{size}")
            loaded[lanes] = words[(offsets // size)[:, None] + np.arange(count)]
        return loaded

    def store(self, addresses: np.ndarray, programs: np.ndarray, values: np.ndarray) -> None:
        """values (lanes, count)"""
        size, count = values.itemsize, values.shape[1]
        for region, lanes, offsets in self._places(addresses, size * count, "write"):
            storage = region.storage
            if storage.owner is None:
                storage.owner = np.full(storage.data.size, NOBODY, np.int32)
            at = offsets[:, None] + np.arange(size * count)
            owners = storage.owner[at]
            if ((owners != NOBODY) & (owners != programs[lanes][:, None])).any():
                raise Fault(f"write to {region.name} where another program of the grid wrote")
            storage.owner[at] = programs[lanes][:, None]
            index = (offsets // size)[:, None] + np.arange(count)
            words = storage.data.view(values.dtype)
            words[index] = values[lanes]
            if (words[index] != values[lanes]).any():
                raise Fault(f"two threads wrote different values to one place of {region.name}")

    def _places(self, addresses: np.ndarray, size: int, what: str) -> Iterator[tuple[_Region, np.ndarray, np.ndarray]]:
        """Region by region: which lanes, and their offsets in bytes."""
        numbers = addresses >> np.uint64(REGION_BITS)
        for number in np.unique(numbers).tolist():
            lanes = np.flatnonzero(numbers == number)
            if not 0 < number <= len(self._regions):
                raise Fault(f"{what} at {int(addresses[lanes[0]]):#x}, which is in no tensor")
            region = self._regions[number - 1]
            offsets = (addresses[lanes] - np.uint64(number << REGION_BITS)).astype(np.int64)
            if (offsets % size).any():
                raise Fault(f"misaligned {what} of {region.name}")
            last = region.storage.data.size - size
            if (offsets > last).any() or not region.allowed[offsets[:, None] + np.arange(size)].all():
                bad = offsets > last
                bad |= ~region.allowed[np.minimum(offsets, last)[:, None] + np.arange(size)].all(1)
                raise Fault(f"{what} of {size} bytes outside of {region.name}, at byte {offsets[bad][0]}")
            yield region, lanes, offsets


class Shared:
    """Shared memory of several programs, with who wrote and read each byte since the last barrier."""

    def __init__(self, programs: int, size: int, garbage: int) -> None:
        self.size = max(16, -(-size // 16) * 16)
        self.limit = size
        self.data = np.full(programs * self.size, garbage, np.uint8)
        self.writer = np.full((programs, self.size // 2), NOBODY, np.int16)
        self.reader = np.full((programs, self.size // 2), NOBODY, np.int16)

    def load(self, program: np.ndarray, addresses: np.ndarray, warps: np.ndarray, size: int, count: int) -> np.ndarray:
        """(lanes, count) words of `size` bytes."""
        at = self._place(program, addresses, size * count, "read")
        halves = (at // 2)[:, None] + np.arange(max(1, size * count // 2))
        self._check(self.writer, halves, warps, "read of shared memory that another warp writes")
        reader = self.reader.reshape(-1)
        before = reader[halves]
        reader[halves] = np.where((before == NOBODY) | (before == warps[:, None]), warps[:, None], SEVERAL)
        if (reader[halves] != warps[:, None]).any():  # several warps in this very instruction
            reader[halves[reader[halves] != warps[:, None]]] = SEVERAL
        return self.data.view(f"u{size}")[(at // size)[:, None] + np.arange(count)]

    def store(self, program: np.ndarray, addresses: np.ndarray, warps: np.ndarray, values: np.ndarray) -> None:
        size, count = values.itemsize, values.shape[1]
        at = self._place(program, addresses, size * count, "write")
        halves = (at // 2)[:, None] + np.arange(max(1, size * count // 2))
        self._check(self.writer, halves, warps, "write to shared memory that another warp writes")
        self._check(self.reader, halves, warps, "write to shared memory that another warp reads")
        self.writer.reshape(-1)[halves] = warps[:, None]
        self.data.view(values.dtype)[(at // size)[:, None] + np.arange(count)] = values

    def barrier(self, programs: np.ndarray) -> None:
        """All warps of these have arrived."""
        self.writer[programs] = NOBODY
        self.reader[programs] = NOBODY

    def _place(self, program: np.ndarray, addresses: np.ndarray, size: int, what: str) -> np.ndarray:
        addresses = addresses.astype(np.int64)
        if (addresses + size > self.limit).any():
            raise Fault(f"{what} of shared memory at byte {addresses.max()} of {self.limit}")
        if (addresses % size).any():
            raise Fault(f"misaligned {what} of shared memory")
        return program * self.size + addresses

    @staticmethod
    def _check(who: np.ndarray, halves: np.ndarray, warps: np.ndarray, what: str) -> None:
        seen = who.reshape(-1)[halves]
        if ((seen != NOBODY) & (seen != warps[:, None])).any():
            raise Fault(what)
