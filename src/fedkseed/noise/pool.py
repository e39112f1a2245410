"""SeedPool: K perturbations of a model as a pure function of one 64-bit key (docs/noise.md)."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedkseed.errors import InvalidValueError
from fedkseed.noise.backend import Directions, Mixture, Slot, get_backend
from fedkseed.noise.families import FAMILIES, Family, block_size
from fedkseed.noise.philox import tensor_id

MAX_SIZE = 65536
MAX_ELEMENTS = 2**34
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


def _from_torch(tensor: Any) -> Any:
    """A tensor as one that NumPy takes; of bfloat16 it knows nothing."""
    tensor = tensor.detach().cpu()
    return tensor.double() if tensor.is_floating_point() else tensor


def _differ(values: NDArray[np.float32], given: NDArray[Any]) -> NDArray[np.bool_]:
    """Where finite float32 values are not the numbers that they were made of."""
    if given.dtype.kind == "f":
        changed: NDArray[np.bool_] = values.astype(given.dtype) != given
        return changed
    # no type of NumPy has all integers of 64 bits and all numbers of float32
    return np.array([int(value) != int(number) for value, number in zip(values, given, strict=True)], bool)


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
    family: str = "hadamard"

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", _integer("key", self.key, 0, 2**64 - 1))
        object.__setattr__(self, "size", _integer("size (K)", self.size, 1, MAX_SIZE))
        if not isinstance(self.family, str) or self.family not in FAMILIES:
            raise InvalidValueError(f"family is {self.family!r}; expected one of {', '.join(map(repr, FAMILIES))}")

    @property
    def block(self) -> int:
        """B: the smallest power of two that is at least K and at least 128."""
        return block_size(self.size)

    @property
    def facts(self) -> Family:
        """What is to be known of the family."""
        return FAMILIES[self.family]

    def perturbation(self, name: str, n: int, index: int, backend: str = "auto") -> NDArray[np.float32]:
        """z_index on the tensor of that name with n elements (row-major): float32[n].

        Raises:
            InvalidValueError: n outside [0, 2^34], or an index outside [0, K).
            BackendError: the named backend cannot run here.
        """
        return self._sum(name, n, self.mixture([index], [1.0]), backend)

    def combine(self, name: str, n: int, coefficients: ArrayLike, backend: str = "auto") -> NDArray[np.float32]:
        """`sum_k a_k z_k` on the tensor of that name with n elements: float32[n], from coefficients a, K numbers.

        Raises:
            InvalidValueError: n outside [0, 2^34], or coefficients of another length, not finite, or beyond float32.
            BackendError: the named backend cannot run here.
        """
        return self._sum(name, n, self.mixture_of(coefficients), backend)

    def mixture_of(self, coefficients: ArrayLike) -> Mixture:
        """What a backend needs to know of `sum_k a_k z_k`, from all K coefficients a, float32[K]."""
        return self._mixture(np.arange(self.size), self.check_coefficients(coefficients))

    def mixture(self, indices: Sequence[int] | NDArray[np.integer], amounts: Sequence[float] | NDArray[np.floating]) -> Mixture:
        """The same from some indices and their amounts; amounts of one index are added in float64, then rounded once."""
        at, delta = self.check_amounts(indices, amounts)
        return self._mixture(at, delta.astype(np.float32))

    def directions(self, indices: NDArray[np.int64] | None = None) -> Directions:
        """What a backend needs to know to fold gradients: along all K seeds, or (gaussian: only) along some."""
        return self.facts.aim(self.key, self.size, indices)

    def numbers(self, sums: NDArray[np.float64], indices: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
        """u = Z'g, float64[K] or of some seeds, from what a fold along `directions` of the same indices has added up.

        With the hadamard family that is the table T, float64[B], and u the first K entries of H T.
        """
        return self.facts.numbers(sums, self.size, indices)

    def check_coefficients(self, coefficients: ArrayLike) -> NDArray[np.float32]:
        """The coefficients as float32[K]: of any numbers, in an array, a list or a tensor, that float32 holds exactly.

        Raises:
            InvalidValueError: they are no numbers, not K, not finite, or float32 would change one.
        """
        try:
            given = np.asarray(_from_torch(coefficients) if hasattr(coefficients, "detach") else coefficients)
        except (TypeError, ValueError, RuntimeError):
            given = np.asarray(None)
        if given.dtype.kind not in "fiu":
            kind = getattr(coefficients, "dtype", type(coefficients).__name__)
            wide = next((x for x in given.flat if type(x) is int), None)  # NumPy has no type for it
            one, most = ("", "") if wide is None else (f" with {wide!r:.40}", ", integers of 64 bits at most")
            raise InvalidValueError(f"coefficients are {kind}{one}; expected an array, a list or a tensor of numbers{most}")
        if given.shape != (self.size,):
            raise InvalidValueError(f"coefficients have shape {given.shape}; the pool has K = {self.size} seeds")
        with np.errstate(over="ignore"):
            values = given.astype(np.float32)
        for wrong, expected in (
            (~np.isfinite(given), "all must be finite"),
            (~np.isfinite(values), "it must be finite in float32"),
            (_differ(values, given), "float32 cannot hold it: round it first, such as with .astype(np.float32)"),
        ):
            if wrong.any():
                k = int(np.flatnonzero(wrong)[0])
                raise InvalidValueError(f"coefficient {k} is {given[k]}; {expected}")
        return values

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
        return self.facts.mix(self.key, self.size, indices, amounts)

    def _sum(self, name: str, n: int, mixture: Mixture, backend: str) -> NDArray[np.float32]:
        import torch

        chosen = get_backend(backend)
        out = torch.empty(_integer("n", n, 0, MAX_ELEMENTS), dtype=torch.float32, device=chosen.device)
        chosen.prepare([Slot(out, None, tensor_id(name))])(mixture)
        array: NDArray[np.float32] = out.cpu().numpy()
        return array
