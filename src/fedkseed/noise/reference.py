"""The slow backend: docs/noise.md in NumPy, line by line. Every other backend must match its bits."""

from collections.abc import Sequence
from typing import assert_never

import numpy as np
import torch
from numpy.typing import NDArray

from fedkseed.noise import box_muller as bm
from fedkseed.noise.backend import (
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
from fedkseed.noise.philox import halves, philox

F32 = NDArray[np.float32]
BLOCK_STREAM = 0x80000000
"""First counter word of the Philox call that gives a block's shift; the calls for its signs count from 0."""


def signs_and_entries(key: int, size: int, tensor_id: int, start: int, n: int) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """s(b, j) and `j xor r(b)` of elements start .. start + n - 1 of a tensor, for a table of that size."""
    block, j = np.divmod(np.arange(start, start + n, dtype=np.int64), size)
    tensor, words_of_key = halves(tensor_id), halves(key)
    words = philox((j // 128, block, *tensor), words_of_key)
    word = np.take_along_axis(words, (j % 128 // 32)[None], axis=0)[0]
    signs: NDArray[np.uint32] = (word >> (j % 32).astype(np.uint32)) & np.uint32(1)
    shift = philox((BLOCK_STREAM, block, *tensor), words_of_key)[0].astype(np.int64) % size
    return signs, j ^ shift


def hadamard_sum(mixture: HadamardMixture, tensor_id: int, start: int, n: int) -> F32:
    """float32[n]: the mixture on elements start .. start + n - 1 of a tensor."""
    signs, entries = signs_and_entries(mixture.key, len(mixture.table), tensor_id, start, n)
    bits = mixture.table[entries].view(np.uint32) ^ (signs << np.uint32(31))
    values: F32 = bits.view(np.float32)
    return values


def box_muller(r: NDArray[np.uint32], r2: NDArray[np.uint32]) -> tuple[F32, F32]:
    """Two standard normal values from two words, in binary32 without fused operations (docs/noise.md)."""
    f32, u32 = np.float32, np.uint32
    # rad = sqrt(-2 ln(v 2^-24)) with v = 2 (r >> 9) + 1, an odd integer below 2^24, exact in binary32
    v = ((r >> u32(9)) * u32(2) + u32(1)).astype(f32).view(u32)
    mantissa = v & u32(0x7FFFFF)
    halve = (mantissa > u32(bm.SQRT_HALF_MANTISSA)).astype(u32)
    exponent = (v >> u32(23)) - u32(127) + halve
    x = (mantissa | ((u32(127) - halve) << u32(23))).view(f32) - f32(1)
    square = x * x
    low = (bm.LOG[3] * x + bm.LOG[2]) * square + (bm.LOG[1] * x + bm.LOG[0])
    high = (bm.LOG[7] * x + bm.LOG[6]) * square + (bm.LOG[5] * x + bm.LOG[4])
    poly = high * (square * square) + low
    log1p = (square * x * poly - square * f32(0.5)) + x
    n = (u32(24) - exponent).astype(f32)
    rad = np.sqrt(n * bm.TWO_LN2_HI + (n * bm.TWO_LN2_LO - f32(2) * log1p))
    # ang = r2 2 pi 2^-32 = quarter pi/2 + theta, |theta| <= pi/4
    quarter = (r2 + u32(1 << 29)) >> u32(30)
    theta = (r2 - (quarter << u32(30))).view(np.int32).astype(f32) * bm.ANGLE_STEP
    s = theta * theta
    sine = theta * s * ((bm.SIN[3] * s + bm.SIN[2]) * (s * s) + (bm.SIN[1] * s + bm.SIN[0])) + theta
    cosine = (s * s * ((bm.COS[2] * s + bm.COS[1]) * s + bm.COS[0]) - s * f32(0.5)) + f32(1)
    odd = (quarter & u32(1)).astype(bool)
    cos_sign = ((quarter + u32(1)) & u32(2)) << u32(30)
    sin_sign = (quarter & u32(2)) << u32(30)
    z = rad * (np.where(odd, sine, cosine).view(u32) ^ cos_sign).view(f32)
    z2 = rad * (np.where(odd, cosine, sine).view(u32) ^ sin_sign).view(f32)
    return z, z2


def gaussian(seed: int, tensor_id: int, start: int, n: int) -> F32:
    """float32[n]: the perturbation of one 64-bit seed key on elements start .. start + n - 1; start a multiple of 4."""
    q = np.arange(start // 4, (start + n + 3) // 4, dtype=np.int64)
    r0, r1, r2, r3 = philox((q, 0, *halves(tensor_id)), halves(seed))
    return np.stack([*box_muller(r0, r1), *box_muller(r2, r3)], axis=1).reshape(-1)[:n]


def mixture_sum(mixture: Mixture, tensor_id: int, start: int, n: int) -> F32:
    """float32[n]: `sum_k a_k z_k` on elements start .. start + n - 1 of a tensor."""
    if isinstance(mixture, HadamardMixture):
        return hadamard_sum(mixture, tensor_id, start, n)
    if not isinstance(mixture, GaussianMixture):
        assert_never(mixture)
    total = np.zeros(n, np.float32)
    for seed, amount in zip(mixture.seeds, mixture.amounts, strict=True):
        total = total + amount * gaussian(int(seed), tensor_id, start, n)
    return total


def widen(x: torch.Tensor) -> F32:
    """The values of a float32, float16 or bfloat16 tensor in binary32, exactly."""
    if x.dtype == torch.bfloat16:
        return (x.view(torch.uint16).numpy().astype(np.uint32) << np.uint32(16)).view(np.float32)
    array: F32 = x.numpy().astype(np.float32)
    return array


def store(x: F32, out: torch.Tensor) -> None:
    """Round to the type of `out`, to nearest even, once; an overflow gives infinity, a NaN the canonical quiet one."""
    if out.dtype == torch.bfloat16:
        bits = x.view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        out.view(torch.uint16).numpy()[:] = np.where(np.isnan(x), np.uint32(0x7FC0), rounded)
    elif out.dtype == torch.float16:
        with np.errstate(over="ignore"):
            half = x.astype(np.float16)
        half[np.isnan(x)] = np.uint16(0x7E00).view(np.float16)
        out.numpy()[:] = half
    else:
        out.numpy()[:] = x


class ReferenceBackend:
    """NumPy, single-threaded, with temporaries: for tests and for reading."""

    name = "reference"
    device = "cpu"

    def prepare(self, slots: Sequence[Slot]) -> Sweep:
        """See `Backend.prepare`."""

        def sweep(*mixtures: Mixture) -> None:
            for slot in slots:
                values = None if slot.base is None else widen(slot.base)
                for mixture in mixtures:
                    with np.errstate(over="ignore", invalid="ignore"):  # infinities are part of the definition
                        noise = mixture_sum(mixture, slot.tensor_id, slot.start, slot.out.numel())
                        values = noise if values is None else values + noise
                if values is not None:
                    store(values, slot.out)

        return sweep

    def fold(self, directions: Directions) -> Fold:
        """See `Backend.fold`."""
        if isinstance(directions, HadamardDirections):
            return _HadamardFold(directions)
        if isinstance(directions, GaussianDirections):
            return _GaussianFold(directions)
        assert_never(directions)


class _HadamardFold:
    """T[j xor r(b)] += (-1)^s(b, j) g[i], one element after the other."""

    def __init__(self, directions: HadamardDirections) -> None:
        self._key, self._table = directions.key, np.zeros(directions.block, np.float64)

    def add(self, sources: Sequence[Source]) -> None:
        """See `Fold.add`."""
        for source in sources:
            g = widen(source.values).astype(np.float64)
            signs, entries = signs_and_entries(self._key, len(self._table), source.tensor_id, source.start, len(g))
            with np.errstate(invalid="ignore"):  # infinities of both signs
                np.add.at(self._table, entries, np.where(signs == 1, -g, g))

    def sums(self) -> NDArray[np.float64]:
        """See `Fold.sums`."""
        return self._table.copy()


class _GaussianFold:
    """u[m] += sum_i g[i] z_m[i], one seed after the other; products are exact in float64."""

    def __init__(self, directions: GaussianDirections) -> None:
        self._seeds, self._sums = directions.seeds, np.zeros(len(directions.seeds), np.float64)

    def add(self, sources: Sequence[Source]) -> None:
        """See `Fold.add`."""
        for source in sources:
            g = widen(source.values).astype(np.float64)
            for m, seed in enumerate(self._seeds):
                with np.errstate(invalid="ignore"):
                    self._sums[m] += np.sum(g * gaussian(int(seed), source.tensor_id, source.start, len(g)))

    def sums(self) -> NDArray[np.float64]:
        """See `Fold.sums`."""
        return self._sums.copy()


BACKEND = ReferenceBackend()
