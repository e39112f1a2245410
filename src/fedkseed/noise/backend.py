"""What a noise backend does, and how one is chosen.

There are two operations. A sweep is one pass over a list of tensors that adds mixtures `sum_k a_k z_k` to base values.
Rebuilding a model, perturbing it along one seed and moving it along several are sweeps that differ in their mixture
and in where the base values lie, so that a backend has one kernel per noise family to get right and to make fast. A fold
is the sweep transposed: it reads gradients where a sweep writes weights, and gives `sum_i g_i z_k[i]` for every k.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from fedkseed.errors import BackendError, InvalidValueError, installing
from fedkseed.text import one_line

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

QUANTUM = 65536
"""Stretches of a tensor start at multiples of this many elements: a multiple of every block size."""


@dataclass(frozen=True)
class HadamardMixture:
    """`sum_k a_k z_k` of the structured family: the pool key and the table A = H a, float32[B]."""

    key: int
    table: NDArray[np.float32]


@dataclass(frozen=True)
class GaussianMixture:
    """`sum_k a_k z_k` of the gaussian family: 64-bit seed keys in ascending k, uint64[m], and amounts, float32[m]."""

    seeds: NDArray[np.uint64]
    amounts: NDArray[np.float32]


Mixture = HadamardMixture | GaussianMixture


@dataclass(frozen=True)
class Slot:
    """A stretch of one tensor, and where its new values go: `out[i] <- cast(widen(base[i]) + s[start + i])`.

    Attributes:
        out: one-dimensional, contiguous; float32, float16 or bfloat16.
        base: like `out`, of any of the three types, or `out` itself; None stores the mixture `s` alone.
        tensor_id: the 64-bit id of the whole tensor.
        start: row-major position in the tensor of the first element, a multiple of `QUANTUM`.
    """

    out: torch.Tensor
    base: torch.Tensor | None
    tensor_id: int
    start: int = 0


class Sweep(Protocol):
    """One pass over the slots that it was made for; it may be done again, with other mixtures."""

    def __call__(self, *mixtures: Mixture) -> None:
        """`out <- cast(((widen(base) + s_1) + s_2) + ...)`, added in this order in binary32 (docs/noise.md, "Pages").

        Args:
            mixtures: at least one, all of one family; each of its own key and size.
        """
        ...


@dataclass(frozen=True)
class HadamardDirections:
    """All seeds of a pool of the structured family: the pool key and B, the number of entries of the table."""

    key: int
    block: int


@dataclass(frozen=True)
class GaussianDirections:
    """Some seeds of the gaussian family: their 64-bit seed keys, uint64[m]."""

    seeds: NDArray[np.uint64]


Directions = HadamardDirections | GaussianDirections


@dataclass(frozen=True)
class Source:
    """A stretch of one tensor's gradient.

    Attributes:
        values: one-dimensional, contiguous; float32, float16 or bfloat16.
        tensor_id: the 64-bit id of the whole tensor.
        start: row-major position in the tensor of the first element, a multiple of `QUANTUM`.
    """

    values: torch.Tensor
    tensor_id: int
    start: int = 0


class Fold(Protocol):
    """`Z'g`, added up in float64 source by source, in the order in which they come (docs/noise.md, "The adjoint")."""

    def add(self, sources: Sequence[Source]) -> None:
        """Add these stretches; their memory may be given back, or written over in stream order, after the call."""
        ...

    def sums(self) -> NDArray[np.float64]:
        """What has been added so far: the table T, float64[B] (hadamard), or `sum_i g_i z_k[i]`, float64[m] (gaussian)."""
        ...


class Backend(Protocol):
    """Computes sweeps and folds; sweeps of all backends give the same bits, folds lie within one bound (docs/noise.md).

    Attributes:
        name: what it is chosen by.
        device: the type of the devices on which a slot's tensors must be, `cpu` or `cuda`.
    """

    name: str
    device: str

    def prepare(self, slots: Sequence[Slot]) -> Sweep:
        """A sweep that stores `cast(base + mixtures)` into every slot. The slots' outputs must not overlap.

        What takes time for each tensor is done here, once: a small model's sweep takes less than that.
        """
        ...

    def fold(self, directions: Directions) -> Fold:
        """A fold of nothing yet. The same calls of `add` give the same bits on one device, whatever the number of threads."""
        ...


MODULES = {"reference": "fedkseed.noise.reference", "cpu": "fedkseed.noise.cpu", "gpu": "fedkseed.noise.gpu"}
REQUIREMENTS = {
    "cpu": "numba: pip install 'numba>=0.60'",
    "gpu": f"a CUDA GPU, a torch built for CUDA, and Triton: {installing('gpu')}",
}


def get_backend(name: str = "auto", device: str = "cpu") -> Backend:
    """The backend of that name; `auto` takes the fastest for a type of device.

    On the CPU `auto` falls back with one line in the log. Nothing but `gpu` works on a CUDA device.

    Args:
        name: `auto`, or the name of a backend.
        device: the type of the devices that `auto` must work on: `cpu` or `cuda`.

    Raises:
        InvalidValueError: there is no backend of that name.
        BackendError: the named backend cannot run here (the message says what to install), or none works on that device.
    """
    if name == "auto":
        return _fastest(device)
    if name not in MODULES:
        raise InvalidValueError(f"backend {name!r} is unknown; choose one of 'auto', {', '.join(map(repr, MODULES))}")
    try:
        module = importlib.import_module(MODULES[name])
    except ImportError as error:
        raise BackendError(f"backend {name!r} cannot run here ({one_line(error)}); it needs {REQUIREMENTS[name]}") from error
    backend: Backend = module.BACKEND
    return backend


def _fastest(device: str) -> Backend:
    if device == "cuda":
        return get_backend("gpu")
    if device != "cpu":
        raise BackendError(f"no noise backend works on {device} devices; move the model to the CPU or to a CUDA GPU")
    try:
        return get_backend("cpu")
    except BackendError as error:
        log.warning("falling back to the slow noise backend 'reference': %s", error)
        return get_backend("reference")
