"""The GPU backend: Triton kernels that read and write each weight once (docs/noise.md).

One sweep is one launch per device and pair of types, for all tensors together. Nothing waits for the device: the work
table and the mixture go there from pinned memory, and all happens on the current stream.

In Triton's interpreter (`TRITON_INTERPRET=1`, set before Triton is imported) the same kernels work on tensors in main
memory, slowly: so they are tested where there is no GPU.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from fedkseed.noise import gpu_kernels as kernels
from fedkseed.noise.backend import QUANTUM, HadamardMixture, Mixture, Slot, Sweep
from fedkseed.noise.philox import halves

INTERPRETED = not isinstance(kernels.hadamard_sweep, triton.JITFunction)
if not INTERPRETED and not torch.cuda.is_available():
    raise ImportError("torch finds no CUDA device")

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, None: None}
WIDEST_ACCESS = 16
"""Bytes that a thread reads or writes at once, at addresses that are multiples of it."""


class GpuBackend:
    """Triton, on the device of each slot."""

    name = "gpu"
    device = "cpu" if INTERPRETED else "cuda"

    def prepare(self, slots: Sequence[Slot]) -> Sweep:
        """See `Backend.prepare`. A sweep returns before the device has done it."""
        return _GpuSweep(slots)


class _GpuSweep:
    """The launches for some slots, whose memory it keeps: one for each device, pair of types and alignment."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        groups: dict[tuple[Any, ...], list[Slot]] = defaultdict(list)
        for slot in slots:
            if slot.out.numel():
                base = None if slot.base is None else slot.base.dtype
                groups[slot.out.device, slot.out.dtype, base, _is_aligned(slot)].append(slot)
        self._groups = dict(groups)
        self._launches: dict[bool, list[_Launch]] = {}

    def __call__(self, mixture: Mixture) -> None:
        hadamard = isinstance(mixture, HadamardMixture)
        if hadamard not in self._launches:  # the families' tiles differ
            self._launches[hadamard] = [_launch(hadamard, kind, group) for kind, group in self._groups.items()]
        kernel: Any = kernels.hadamard_sweep if hadamard else kernels.gaussian_sweep
        arguments: dict[torch.device, tuple[Any, ...]] = {}
        for launch in self._launches[hadamard]:
            device = launch.work.device
            if device not in arguments:
                arguments[device] = _arguments(mixture, device)
            with torch.cuda.device(device) if device.type == "cuda" else np.errstate(over="ignore", invalid="ignore"):
                kernel[(launch.tiles,)](
                    launch.work, len(launch.work), *arguments[device], **launch.constants, **kernels.OPTIONS
                )


@dataclass(frozen=True)
class _Launch:
    """One launch: the work table on its device, the number of programs, and what the kernel is compiled for."""

    work: torch.Tensor
    tiles: int
    constants: dict[str, Any]


def _launch(hadamard: bool, kind: tuple[Any, ...], slots: Sequence[Slot]) -> _Launch:
    device, out, base, aligned = kind
    tile = _tile(hadamard, slots)
    work, tiles = _work(slots, tile)
    return _Launch(_upload(work, device), tiles, {"OUT": TYPES[out], "BASE": TYPES[base], "ALIGNED": aligned, "TILE": tile})


def _tile(hadamard: bool, slots: Sequence[Slot]) -> int:
    """Elements per program. The interpreter takes its time for each program, so there a tile holds the largest slot."""
    if INTERPRETED:
        largest = max(slot.out.numel() for slot in slots)
        return min(QUANTUM, max(1024, 1 << (largest - 1).bit_length()))
    return kernels.HADAMARD_TILE if hadamard else kernels.GAUSSIAN_TILE


def _is_aligned(slot: Slot) -> bool:
    addresses = slot.out.data_ptr() | (0 if slot.base is None else slot.base.data_ptr())
    return addresses % WIDEST_ACCESS == 0


def _arguments(mixture: Mixture, device: torch.device) -> tuple[Any, ...]:
    """What a kernel needs to know of the mixture."""
    if isinstance(mixture, HadamardMixture):
        # as signed words, so that no key has a type, and so a compilation, of its own
        low, high = (word - (word >> 31 << 32) for word in halves(mixture.key))
        return _upload(mixture.table, device), low, high, len(mixture.table).bit_length() - 1
    return _upload(mixture.seeds.view(np.int64), device), _upload(mixture.amounts, device), len(mixture.seeds)


def _work(slots: Sequence[Slot], tile: int) -> tuple[NDArray[np.int64], int]:
    """The work table, int64[slots, COLUMNS], and the number of tiles."""
    work = np.empty((len(slots), kernels.COLUMNS), np.int64)
    tiles = 0
    for row, slot in zip(work, slots, strict=True):
        base = 0 if slot.base is None else slot.base.data_ptr()
        signed_id = slot.tensor_id - (slot.tensor_id >> 63 << 64)
        row[:] = slot.out.data_ptr(), base, slot.start, slot.out.numel(), signed_id, tiles
        tiles += -(-slot.out.numel() // tile)
    return work, tiles


def _upload(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """The array on the device. The copy is made before anything that follows it on the stream; nobody waits for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


BACKEND = GpuBackend()
