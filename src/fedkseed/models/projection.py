"""A model's gradient seen from a pool: `u = Z'g`, folded tensor by tensor as backward makes it (docs/noise.md)."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fedkseed.errors import InvalidValueError
from fedkseed.models.sweeps import Backends, Tensors
from fedkseed.noise import QUANTUM, Source, tensor_id
from fedkseed.noise.pool import SeedPool

LAUNCH_ELEMENTS = 1 << 25
"""On a GPU gradients wait until they have so many elements: 128 MiB of float32, and a few launches a model. A launch takes some
100 microseconds of the CPU, in which an H200 folds as many."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Projection:
    """The adjoint of a sweep: gradients go in, tensor by tensor, and `u_k = sum_i g_i z_k[i]` comes out.

    All of `add` counts, in whatever order and however often a tensor comes; the same calls give the same bits on one
    machine, and lie within docs/noise.md's bound of each other on all. A gradient's memory is free after the call, on a GPU
    after a few more. Autograd has a thread for each device, so calls wait for each other.

    Args:
        pool: the pool of perturbations.
        backends: the noise backend for each type of device that gradients are on.
        indices: of which seeds; None for all K. With the hadamard family all cost what one costs.

    Raises:
        InvalidValueError: an index outside [0, K).
    """

    def __init__(self, pool: SeedPool, backends: Backends, indices: Sequence[int] | NDArray[np.integer] | None = None) -> None:
        self._pool, self._indices = pool, None if indices is None else pool.check_indices(indices)
        directions = pool.directions(self._indices)
        self._folds = {device: backend.fold(directions) for device, backend in backends.items()}
        self._waiting: dict[str, list[Source]] = {device: [] for device in backends}
        self._elements = dict.fromkeys(backends, 0)
        self._lock = threading.Lock()

    def add(self, name: str, gradient: torch.Tensor, start: int = 0) -> None:
        """Add the gradient of the tensor of that canonical name, or of a stretch of it.

        Args:
            name: the tensor's canonical name.
            gradient: float32, float16 or bfloat16, of any shape; its elements count in row-major order.
            start: position in the tensor of the first element, a multiple of `QUANTUM`.

        Raises:
            InvalidValueError: a gradient of another type, sparse, or on a device without a backend, or another start.
        """
        self._fold([(name, gradient, start)])

    def add_all(self, gradients: Tensors) -> None:
        """Add whole tensors' gradients by their canonical names in one pass; see `add`."""
        self._fold([(name, gradient, 0) for name, gradient in gradients.items()])

    def table(self) -> NDArray[np.float64]:
        """T, float64[B]: the gradient hashed into the table that moves are made with; `numbers` is H T.

        Raises:
            InvalidValueError: the pool's family is gaussian, which has no table.
        """
        if not self._pool.facts.has_table:
            raise InvalidValueError(f"family {self._pool.family!r} has no table; call numbers()")
        return self._sums()

    def numbers(self) -> NDArray[np.float64]:
        """u, float64[K], or of the seeds asked for, in their order. A gradient that is not finite makes them so too."""
        return self._pool.numbers(self._sums(), self._indices)

    def _fold(self, gradients: Sequence[tuple[str, torch.Tensor, int]]) -> None:
        sources: list[tuple[str, Source]] = []
        for name, gradient, start in gradients:
            check_gradient(name, gradient)
            if start % QUANTUM:
                raise InvalidValueError(f"gradient of {name} starts at {start}; expected a multiple of {QUANTUM}")
            if gradient.device.type not in self._folds:
                raise InvalidValueError(f"gradient of {name} is on {gradient.device}; expected {' or '.join(self._folds)}")
            sources.append((gradient.device.type, Source(gradient.detach().reshape(-1), tensor_id(name), start)))
        with self._lock:
            for device, source in sources:
                self._waiting[device].append(source)
                self._elements[device] += source.values.numel()
            for device, elements in self._elements.items():
                # a launch takes longer than most tensors' folds
                if device == "cpu" or elements >= LAUNCH_ELEMENTS:
                    self._add_waiting(device)

    def _add_waiting(self, device: str) -> None:
        if self._waiting[device]:
            self._folds[device].add(self._waiting[device])
            self._waiting[device], self._elements[device] = [], 0

    def _sums(self) -> NDArray[np.float64]:
        with self._lock, np.errstate(invalid="ignore"):  # infinities of both signs
            for device in self._folds:
                self._add_waiting(device)
            return np.sum([fold.sums() for fold in self._folds.values()], axis=0)  # type: ignore[no-any-return]


def check_gradient(name: str, gradient: torch.Tensor) -> None:
    """Refuse what no backend folds; see `Projection.add`."""
    if not isinstance(gradient, torch.Tensor):
        raise InvalidValueError(f"gradient of {name} is a {type(gradient).__name__}; expected a tensor")
    if gradient.layout != torch.strided:
        raise InvalidValueError(f"gradient of {name} is sparse ({gradient.layout}); expected a dense one")
    if gradient.dtype not in FLOATS:
        raise InvalidValueError(f"gradient of {name} is {gradient.dtype}; expected float32, float16 or bfloat16")
