"""SeedPool: K perturbations of a model as a pure function of one 64-bit key (docs/noise.md)."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fedkseed.errors import InvalidValueError
from fedkseed.noise import (
    Directions,
    GaussianDirections,
    GaussianMixture,
    HadamardDirections,
    HadamardMixture,
    Mixture,
    Slot,
    get_backend,
    halves,
    philox,
    tensor_id,
)

Family = Literal["hadamard", "gaussian"]
FAMILIES: tuple[Family, ...] = get_args(Family)
MAX_SIZE = 65536
MIN_BLOCK = 128
MAX_ELEMENTS = 2**34
SEED_STREAM = 0x5EED5EED
MAX_FLOAT32 = float(np.finfo(np.float32).max)


def _integer(name: str, value: object, low: int, high: int) -> int:
    """`value` as an int in [low, high]."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise InvalidValueError(f"{name} is {value!r}; expected an integer") from None
    if not low <= number <= high:
        raise InvalidValueError(f"{name} is {number}; expected an integer from {low} to {high}")
    return number


@dataclass(frozen=True)
class SeedPool:
    """K candidate seeds: what they mean is fixed by the key, the size and the family, on every machine.

    Attributes:
        key: the pool's key, an unsigned 64-bit integer.
        size: K, the number of seeds, from 1 to 65,536.
        family: `hadamard` (structured signs: all K seeds cost what one costs) or `gaussian` (as in the paper).

    Raises:
        InvalidValueError: a field is outside its range.
    """

    key: int
    size: int
    family: Family = "hadamard"

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", _integer("key", self.key, 0, 2**64 - 1))
        object.__setattr__(self, "size", _integer("size (K)", self.size, 1, MAX_SIZE))
        if self.family not in FAMILIES:
            raise InvalidValueError(f"family is {self.family!r}; expected one of {', '.join(map(repr, FAMILIES))}")

    @property
    def block(self) -> int:
        """B: the smallest power of two that is at least K and at least 128."""
        return max(MIN_BLOCK, 1 << (self.size - 1).bit_length())

    def perturbation(self, name: str, n: int, index: int, backend: str = "auto") -> NDArray[np.float32]:
        """z_index on the tensor of that name with n elements (row-major): float32[n].

        Raises:
            InvalidValueError: n outside [0, 2^34], or an index outside [0, K).
            BackendError: the named backend cannot run here.
        """
        return self._sum(name, n, self.mixture([index], [1.0]), backend)

    def combine(self, name: str, n: int, coefficients: NDArray[np.float32], backend: str = "auto") -> NDArray[np.float32]:
        """`sum_k a_k z_k` on the tensor of that name with n elements: float32[n], from coefficients a, float32[K].

        Raises:
            InvalidValueError: n outside [0, 2^34], or coefficients of another dtype or length, or not finite.
            BackendError: the named backend cannot run here.
        """
        return self._sum(name, n, self.mixture_of(coefficients), backend)

    def mixture_of(self, coefficients: NDArray[np.float32]) -> Mixture:
        """What a backend needs to know of `sum_k a_k z_k`, from all K coefficients a, float32[K]."""
        return self._mixture(np.arange(self.size), self.check_coefficients(coefficients))

    def mixture(self, indices: Sequence[int] | NDArray[np.integer], amounts: Sequence[float] | NDArray[np.floating]) -> Mixture:
        """The same from some indices and their amounts; amounts of one index are added in float64, then rounded once."""
        at, delta = self.check_amounts(indices, amounts)
        return self._mixture(at, delta.astype(np.float32))

    def directions(self, indices: NDArray[np.int64] | None = None) -> Directions:
        """What a backend needs to know to fold gradients: along all K seeds, or (gaussian: only) along some."""
        if self.family == "hadamard":
            return HadamardDirections(self.key, self.block)
        return GaussianDirections(self._seed_keys(np.arange(self.size) if indices is None else indices))

    def numbers(self, sums: NDArray[np.float64], indices: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
        """u = Z'g, float64[K] or of some seeds, from what a fold along `directions` of the same indices has added up.

        With the hadamard family that is the table T, float64[B], and u the first K entries of H T.
        """
        if self.family == "gaussian":
            return sums
        with np.errstate(invalid="ignore"):  # infinities of both signs
            numbers = _hadamard(sums)[: self.size]
        return numbers if indices is None else numbers[indices]

    def check_coefficients(self, coefficients: NDArray[np.float32]) -> NDArray[np.float32]:
        """The coefficients, if they are float32[K] and finite."""
        if not isinstance(coefficients, np.ndarray) or coefficients.dtype != np.float32:
            kind = getattr(coefficients, "dtype", type(coefficients).__name__)
            raise InvalidValueError(f"coefficients are {kind}; expected a NumPy array of float32")
        if coefficients.shape != (self.size,):
            raise InvalidValueError(f"coefficients have shape {coefficients.shape}; the pool has K = {self.size} seeds")
        if not np.isfinite(coefficients).all():
            k = int(np.flatnonzero(~np.isfinite(coefficients))[0])
            raise InvalidValueError(f"coefficient {k} is {coefficients[k]}; all must be finite")
        return coefficients

    def check_indices(self, indices: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
        """The indices, int64, if all are in [0, K)."""
        if not isinstance(indices, (Sequence, np.ndarray)) or isinstance(indices, str) or getattr(indices, "shape", None) == ():
            raise InvalidValueError(f"indices are {indices!r:.80}; expected a sequence of numbers")
        return np.array([_integer("index", index, 0, self.size - 1) for index in indices], np.int64)

    def check_amounts(
        self, indices: Sequence[int] | NDArray[np.integer], amounts: Sequence[float] | NDArray[np.floating]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Distinct ascending indices and the sum of each one's amounts, if all are in range."""
        for name, values in (("indices", indices), ("amounts", amounts)):
            if (
                not isinstance(values, (Sequence, np.ndarray))
                or isinstance(values, str)
                or getattr(values, "shape", None) == ()
            ):
                raise InvalidValueError(f"{name} are {values!r:.80}; expected a sequence of numbers")
        if len(indices) != len(amounts):
            raise InvalidValueError(f"{len(indices)} indices came with {len(amounts)} amounts; expected one for each")
        delta: dict[int, float] = {}
        for index, amount in zip(indices, amounts, strict=True):
            k = _integer("index", index, 0, self.size - 1)
            if not isinstance(amount, (int, float, np.integer, np.floating)) or isinstance(amount, bool):
                raise InvalidValueError(f"amount for index {k} is {amount!r:.80}; expected a number")
            try:
                delta[k] = delta.get(k, 0.0) + float(amount)
            except OverflowError:  # an integer beyond float64
                delta[k] = float("inf")
        for k, total in delta.items():
            if not abs(total) <= MAX_FLOAT32:
                raise InvalidValueError(f"amount for index {k} is {total}; it must be finite in float32")
        at = sorted(delta)
        return np.array(at, np.int64), np.array([delta[k] for k in at], np.float64)

    def _mixture(self, indices: NDArray[np.int64], amounts: NDArray[np.float32]) -> Mixture:
        if self.family == "hadamard":
            return HadamardMixture(self.key, _table(indices, amounts, self.block))
        # Leaving out zeros changes no bit: the sum starts from +0, so it is never -0, and adding a zero leaves it.
        indices, amounts = indices[amounts != 0], amounts[amounts != 0]
        return GaussianMixture(self._seed_keys(indices), amounts)

    def _seed_keys(self, indices: NDArray[np.int64]) -> NDArray[np.uint64]:
        r0, r1, _, _ = philox((indices, 0, 0, SEED_STREAM), halves(self.key))
        keys: NDArray[np.uint64] = r0.astype(np.uint64) | r1.astype(np.uint64) << np.uint64(32)
        return keys

    def _sum(self, name: str, n: int, mixture: Mixture, backend: str) -> NDArray[np.float32]:
        import torch

        chosen = get_backend(backend)
        out = torch.empty(_integer("n", n, 0, MAX_ELEMENTS), dtype=torch.float32, device=chosen.device)
        chosen.prepare([Slot(out, None, tensor_id(name))])(mixture)
        array: NDArray[np.float32] = out.cpu().numpy()
        return array


def _table(indices: NDArray[np.int64], amounts: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """A = H a, float32[size]: transformed in float64, rounded once (docs/noise.md)."""
    x = np.zeros(size, np.float64)
    x[indices] = amounts
    with np.errstate(over="ignore"):
        return _hadamard(x).astype(np.float32)


def _hadamard(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """H x: butterflies in float64 on strides 1, 2, 4, ... (docs/noise.md).

    Each pass leaves the sums in the first half and the differences in the second, so that the next stride's pairs are
    neighbours again, NumPy's loops are long, and after the last pass all are in their places (Pease 1968).
    """
    half = len(x) // 2
    x, y = x.copy(), np.empty_like(x)
    for _ in range(len(x).bit_length() - 1):
        np.add(x[::2], x[1::2], out=y[:half])
        np.subtract(x[::2], x[1::2], out=y[half:])
        x, y = y, x
    return x
