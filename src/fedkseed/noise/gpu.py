"""The GPU backend: Triton kernels that read and write each weight once (docs/noise.md).

One sweep is one launch per device, pair of types and mixture, for all tensors together; one call of a fold is one per
device and type. Nothing waits for the device: the work table and the mixture go there from pinned memory, and all happens
on the current stream.

In Triton's interpreter (`TRITON_INTERPRET=1`, set before Triton is imported) the same kernels work on tensors in main
memory, slowly: so they are tested where there is no GPU.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, assert_never

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from fedkseed.errors import BackendError
from fedkseed.noise import gpu_kernels as kernels
from fedkseed.noise.backend import (
    QUANTUM,
    Directions,
    Fold,
    GaussianDirections,
    GaussianMixture,
    HadamardDirections,
    HadamardMixture,
    Mixture,
    Slot,
    Source,
    Sweep,
)
from fedkseed.noise.philox import halves

INTERPRETED = not isinstance(kernels.hadamard_sweep, triton.JITFunction)
if not INTERPRETED and not torch.cuda.is_available():
    raise ImportError("torch finds no CUDA device")

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, None: None}
WIDEST_ACCESS = 16
"""Bytes that a thread reads or writes at once, at addresses that are multiples of it."""
FOLD_PROGRAMS = 1024
"""Programs of a fold's launch at most: what a large GPU runs at a time. No device is asked, so all add in one order."""
_Row = tuple[int, int, int, int, int]
"""A row of the work table but for its last column, which comes of those before it."""
STEPS_PER_LANE = 4
"""A launch with fewer steps for each lane uses fewer lanes."""


class GpuBackend:
    """Triton, on the device of each slot."""

    name = "gpu"
    device = "cpu" if INTERPRETED else "cuda"

    def prepare(self, slots: Sequence[Slot]) -> Sweep:
        """See `Backend.prepare`. A sweep returns before the device has done it."""
        return _GpuSweep(slots)

    def fold(self, directions: Directions) -> Fold:
        """See `Backend.fold`. `add` returns before the device has done it; `sums` waits."""
        return _GpuFold(directions)


class _GpuSweep:
    """The launches for some slots, whose memory it keeps: one for each device, pair of types and alignment."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = slots
        groups: dict[tuple[Any, ...], list[Slot]] = defaultdict(list)
        for slot in slots:
            if slot.out.numel():
                base = None if slot.base is None else slot.base.dtype
                groups[slot.out.device, slot.out.dtype, base, _is_aligned(slot)].append(slot)
        self._groups = dict(groups)
        self._launches: dict[bool, list[_Launch]] = {}

    def __call__(self, *mixtures: Mixture) -> None:
        if len({type(mixture) for mixture in mixtures}) > 1:
            raise BackendError("mixtures of several families came for one sweep; expected one family")
        hadamard = isinstance(mixtures[0], HadamardMixture)
        if hadamard not in self._launches:  # the families' tiles differ
            self._launches[hadamard] = [_launch(hadamard, kind, group) for kind, group in self._groups.items()]
        kernel: Any = kernels.hadamard_sweep if hadamard else kernels.gaussian_sweep
        packed, there = _pack(mixtures), {}
        for launch in self._launches[hadamard]:
            device = launch.work.device
            if device not in there:
                there[device] = _upload(packed, device)
            with torch.cuda.device(device) if device.type == "cuda" else np.errstate(over="ignore", invalid="ignore"):
                kernel[(launch.tiles,)](
                    launch.work, launch.rows, there[device], len(mixtures),
                    SEVERAL=len(mixtures) > 1, **launch.constants, **kernels.OPTIONS,
                )  # fmt: skip


@dataclass(frozen=True)
class _Launch:
    """One launch: the work table and each tile's row on their device, the number of programs, and the kernel's constants."""

    work: torch.Tensor
    rows: torch.Tensor
    tiles: int
    constants: dict[str, Any]


class _GpuFold:
    """Partial sums on each device, float64[lanes, width]: the steps of a launch are cut among the lanes."""

    def __init__(self, directions: Directions) -> None:
        self._directions = directions
        self._hadamard = isinstance(directions, HadamardDirections)
        if isinstance(directions, HadamardDirections):
            self._kernel: Any = kernels.hadamard_fold
            self._entries, self._width = directions.block, max(directions.block, kernels.FOLD_TILE)
            self._columns = self._width // kernels.FOLD_TILE
        elif isinstance(directions, GaussianDirections):
            self._kernel = kernels.gaussian_fold
            self._columns = self._width = self._entries = len(directions.seeds)
        else:
            assert_never(directions)
        self._lanes = max(1, FOLD_PROGRAMS // max(1, self._columns))
        self._partial: dict[torch.device, torch.Tensor] = {}
        self._arguments: dict[torch.device, tuple[Any, ...]] = {}

    def add(self, sources: Sequence[Source]) -> None:
        """See `Fold.add`."""
        groups: dict[tuple[Any, ...], list[_Row]] = defaultdict(list)
        for source in sources:
            x, size = source.values, source.values.numel()
            if size and self._columns:
                address = x.data_ptr()
                row = 0, address, source.start, size, _signed(source.tensor_id)
                groups[x.device, x.dtype, address % WIDEST_ACCESS == 0].append(row)
        for (device, dtype, aligned), rows in groups.items():
            if device not in self._partial:
                self._partial[device] = torch.zeros(self._lanes, self._width, dtype=torch.float64, device=device)
                self._arguments[device] = self._constants_of(device)
            constants = {"KIND": TYPES[dtype], "ALIGNED": aligned}
            if self._hadamard:
                constants |= {"TILE": kernels.FOLD_TILE, "SMALL": self._entries < kernels.FOLD_TILE}
                work, steps = _work(rows, self._width)
            else:
                constants["TILE"] = _tile(False, max(size for _, _, _, size, _ in rows))
                work, steps = _work(rows, constants["TILE"])
            lanes = max(1, min(self._lanes, steps // STEPS_PER_LANE))
            with torch.cuda.device(device) if device.type == "cuda" else np.errstate(over="ignore", invalid="ignore"):
                self._kernel[(self._columns, lanes)](
                    _upload(work, device), len(work), steps, lanes, self._partial[device], *self._arguments[device],
                    **constants, **kernels.OPTIONS,
                )  # fmt: skip

    def sums(self) -> NDArray[np.float64]:
        """See `Fold.sums`."""
        total = np.zeros(self._entries, np.float64)
        for partial in self._partial.values():
            with np.errstate(invalid="ignore"):  # infinities of both signs
                total += partial.reshape(-1, self._entries).sum(0).cpu().numpy()
        return total

    def _constants_of(self, device: torch.device) -> tuple[Any, ...]:
        """What a kernel needs to know of the directions."""
        if isinstance(self._directions, HadamardDirections):
            return *_signed_halves(self._directions.key), self._directions.block.bit_length() - 1
        return (_upload(self._directions.seeds.view(np.int64), device),)


def _launch(hadamard: bool, kind: tuple[Any, ...], slots: Sequence[Slot]) -> _Launch:
    device, out, base, aligned = kind
    tile = _tile(hadamard, max(slot.out.numel() for slot in slots))
    work, tiles = _work([_row(slot) for slot in slots], tile)
    rows = np.repeat(np.arange(len(work), dtype=np.int32), np.diff(work[:, kernels.FIRST_TILE], append=tiles))
    constants = {"OUT": TYPES[out], "BASE": TYPES[base], "ALIGNED": aligned, "TILE": tile}
    return _Launch(_upload(work, device), _upload(rows, device), tiles, constants)


def _tile(hadamard: bool, largest: int) -> int:
    """Elements per program. The interpreter takes its time for each program, so there a tile holds the largest slot."""
    if INTERPRETED:
        return min(QUANTUM, max(1024, 1 << (largest - 1).bit_length()))
    return kernels.HADAMARD_TILE if hadamard else kernels.GAUSSIAN_TILE


def _is_aligned(slot: Slot) -> bool:
    addresses = slot.out.data_ptr() | (0 if slot.base is None else slot.base.data_ptr())
    return addresses % WIDEST_ACCESS == 0


def _pack(mixtures: Sequence[Mixture]) -> NDArray[np.int64]:
    """What a kernel needs to know of the mixtures, in one array, since each copy to a device takes its time."""
    facts = np.zeros((len(mixtures), kernels.PAGE_COLUMNS), np.int64)
    parts: list[NDArray[np.int64]] = [facts.reshape(-1)]
    place = facts.size
    for row, mixture in zip(facts, mixtures, strict=True):
        if isinstance(mixture, HadamardMixture):
            row[:3] = place, _signed(mixture.key), len(mixture.table).bit_length() - 1
            data = [mixture.table.view(np.int64)]
        elif isinstance(mixture, GaussianMixture):
            row[:2] = place, len(mixture.seeds)
            amounts = np.append(mixture.amounts, np.zeros(len(mixture.amounts) % 2, np.float32))
            data = [mixture.seeds.view(np.int64), amounts.view(np.int64)]
        else:
            assert_never(mixture)
        parts += data
        place += sum(part.size for part in data)
    return np.concatenate(parts)


def _signed_halves(key: int) -> tuple[int, ...]:
    """A key's halves as signed words, so that no key has a type, and so a compilation, of its own."""
    return tuple(word - (word >> 31 << 32) for word in halves(key))


def _row(slot: Slot) -> _Row:
    base = 0 if slot.base is None else slot.base.data_ptr()
    return slot.out.data_ptr(), base, slot.start, slot.out.numel(), _signed(slot.tensor_id)


def _signed(word: int) -> int:
    """The signed integer of the same 64 bits."""
    return word - (word >> 63 << 64)


def _work(rows: Sequence[_Row], tile: int) -> tuple[NDArray[np.int64], int]:
    """The work table, int64[slots, COLUMNS], and the number of tiles. It is made for every call of a fold."""
    work = np.empty((len(rows), kernels.COLUMNS), np.int64)
    work[:, : kernels.FIRST_TILE] = rows
    tiles = -(-work[:, kernels.SIZE] // tile)
    work[:, kernels.FIRST_TILE] = np.cumsum(tiles) - tiles
    return work, int(tiles.sum())


def _upload(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """The array on the device. The copy is made before anything that follows it on the stream; nobody waits for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


BACKEND = GpuBackend()
