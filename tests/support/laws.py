"""docs/noise.md once more, as literally as Python allows: the oracle that the tests hold the package to.

It shares no code with src/: nothing here imports fedkseed. Slow is fine; clever is not.
"""

import functools
import hashlib
import importlib.util
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "noise_vectors.json").read_text())
HAS_TRITON = importlib.util.find_spec("triton") is not None
BACKENDS = ("reference", "cpu", *(["gpu"] if HAS_TRITON else []))  # the contract table: every law runs over every row
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"  # then the gpu backend works on tensors in main memory
# for tests of hundreds of sweeps: an interpreted one takes half a second
QUICK_BACKENDS = BACKENDS[:2] if INTERPRETED else BACKENDS
FAMILIES = ("hadamard", "gaussian")
HALF_TYPES = (torch.float16, torch.bfloat16)
FLOAT_TYPES = (torch.float32, *HALF_TYPES)
T = TypeVar("T")
F32, U32, I64 = np.float32, np.uint32, np.int64
MASK = 2**32 - 1


def device_of(backend: str) -> str:
    """Where the tensors of a sweep of that backend must be."""
    return "cuda" if backend == "gpu" and not INTERPRETED else "cpu"


def few(backend: str, cases: Sequence[T]) -> Sequence[T]:
    """All cases; of an interpreted backend, whose every launch takes long, each third and the last."""
    return [*cases[:-1:3], cases[-1]] if backend == "gpu" and INTERPRETED else cases


# --- Terms ---


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Philox4x32-10 in Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def philox_rows(c0: NDArray[I64], c1: NDArray[I64], tensor: int, key: int) -> NDArray[I64]:
    """The same for arrays of the first two counter words: int64[n, 4]. (noise/test_philox.py holds the two together.)"""
    c = [np.asarray(c0).astype(np.uint64), np.asarray(c1).astype(np.uint64)]
    c = [*np.broadcast_arrays(*c), np.uint64(tensor & MASK), np.uint64(tensor >> 32)]
    k = [key & MASK, key >> 32]
    low, high = np.uint64(MASK), np.uint64(32)
    for _ in range(10):
        left, right = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [
            (right >> high) ^ c[1] ^ np.uint64(k[0]),
            right & low,
            (left >> high) ^ c[3] ^ np.uint64(k[1]),
            left & low,
        ]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return np.stack(np.broadcast_arrays(*c), axis=-1).astype(I64)


def tensor_id(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8"), digest_size=8).digest(), "little")


# --- Family hadamard ---


def block_size(size: int) -> int:
    """B: the smallest power of two with B >= K and B >= 128."""
    block = 128
    while block < size:
        block *= 2
    return block


def parity(x: NDArray[I64]) -> NDArray[I64]:
    """popcount(x) mod 2, of integers below 2^32."""
    for shift in (16, 8, 4, 2, 1):
        x = x ^ (x >> shift)
    return x & 1


def signs_and_buckets(
    key: int, size: int, name: str, n: int, start: int = 0, *, per_block: bool = True, shifted: bool = True
) -> tuple[NDArray[I64], NDArray[I64]]:
    """s(b, j) and `j xor r(b)` of elements start .. start + n - 1.

    The two switches are the wrong variants of the negative controls: one sign vector repeated in all blocks; no shift.
    """
    block_len, t = block_size(size), tensor_id(name)
    element = np.arange(start, start + n, dtype=I64)
    block, j = element // block_len, element % block_len
    words = philox_rows(j // 128, block if per_block else 0 * block, t, key)
    sign = words[np.arange(n), (j % 128) // 32] >> (j % 32) & 1
    blocks, where = np.unique(block, return_inverse=True)
    shift = (philox_rows(np.full(len(blocks), 0x80000000), blocks, t, key)[:, 0] % block_len)[where]
    return sign, j ^ (shift if shifted else 0 * shift)


def hadamard_z(key: int, size: int, name: str, n: int, k: int, **variant: bool) -> NDArray[I64]:
    """z_k by its definition: (-1) ^ (s(b, j) + popcount((j xor r(b)) & k)), as integers."""
    sign, bucket = signs_and_buckets(key, size, name, n, **variant)
    return 1 - 2 * ((sign + parity(bucket & k)) & 1)


def hadamard_table(coefficients: NDArray[F32], size: int) -> NDArray[F32]:
    """A = H a: butterflies in float64 on strides 1, 2, 4, ..., B/2 in this order; each result rounded once."""
    x = np.zeros(block_size(size), np.float64)
    x[:size] = coefficients
    h = 1
    while h < len(x):
        j = np.flatnonzero(np.arange(len(x)) & h == 0)
        x[j], x[j + h] = x[j] + x[j + h], x[j] - x[j + h]
        h *= 2
    with np.errstate(over="ignore"):
        return x.astype(F32)


def hadamard_sum(key: int, size: int, name: str, n: int, coefficients: NDArray[F32], start: int = 0) -> NDArray[F32]:
    sign, bucket = signs_and_buckets(key, size, name, n, start)
    entry = hadamard_table(coefficients, size)[bucket]
    return np.where(sign == 1, -entry, entry)


# --- Family gaussian ---


def seed_key(key: int, k: int) -> int:
    r0, r1, _, _ = philox((k, 0, 0, 0x5EED5EED), (key & MASK, key >> 32))
    return r0 + 2**32 * r1


def gaussian_z64(key: int, name: str, n: int, k: int) -> list[float]:
    """z_k in float64, one element after the other."""
    t, s = tensor_id(name), seed_key(key, k)
    values: list[float] = []
    for q in range((n + 3) // 4):
        r0, r1, r2, r3 = philox((q, 0, t & MASK, t >> 32), (s & MASK, s >> 32))
        for r, angle in ((r0, r1), (r2, r3)):
            rad = math.sqrt(-2 * math.log(((r >> 9) + 0.5) * 2.0**-23))
            ang = 2 * math.pi * angle * 2.0**-32
            values += [rad * math.cos(ang), rad * math.sin(ang)]
    return values[:n]


def box_muller64(r: NDArray[U32], r2: NDArray[U32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rad = np.sqrt(-2 * np.log(((r >> 9) + 0.5) * 2.0**-23))
    ang = 2 * np.pi * (r2 * 2.0**-32)
    return rad * np.cos(ang), rad * np.sin(ang)


def frozen(*bits: int) -> tuple[F32, ...]:
    return tuple(np.array(bits, U32).view(F32))


# The project's frozen polynomials, as bits: a model published with them can be rebuilt only with them.
LOG = frozen(0x3EAAAAA5, 0xBE800110, 0x3E4CD2D7, 0xBE2A3C4A, 0x3E113650, 0xBE066F4F, 0x3E03ED05, 0xBDA105F0)
SIN = frozen(0xBE2AAAAB, 0x3C0888BB, 0xB9502DDE, 0x363E6C9D)
COS = frozen(0x3D2AAAA5, 0xBAB6060D, 0x37CCF076)
TWO_LN2_HI, TWO_LN2_LO, ANGLE_STEP = frozen(0x3FB17000, 0x3885FDF4, 0x30C90FDB)

MulAdd = Callable[[NDArray[F32], NDArray[F32], NDArray[F32]], NDArray[F32]]


def separate(a: NDArray[F32], b: NDArray[F32], c: NDArray[F32]) -> NDArray[F32]:
    """a b + c with two roundings, as docs/noise.md wants it."""
    return F32(a) * F32(b) + F32(c)


def fused(a: NDArray[F32], b: NDArray[F32], c: NDArray[F32]) -> NDArray[F32]:
    """a b + c as a fused instruction gives it (the product is exact in float64; the rare double rounding is no matter)."""
    return F32(np.float64(a) * np.float64(b) + np.float64(c))


def log_argument(r: NDArray[U32], mul_add: MulAdd = separate) -> NDArray[F32]:
    """-2 ln(((r >> 9) + 0.5) 2^-23) in binary32: what the square root is taken of."""
    mantissa, exponent = np.frexp((2 * (r >> U32(9)) + U32(1)).astype(F32))
    low = mantissa <= F32(math.sqrt(0.5))
    x = np.where(low, 2 * mantissa, mantissa) - F32(1)
    n = (24 - (exponent - low)).astype(F32)
    square = x * x
    low_part = mul_add(mul_add(LOG[3], x, LOG[2]), square, mul_add(LOG[1], x, LOG[0]))
    high_part = mul_add(mul_add(LOG[7], x, LOG[6]), square, mul_add(LOG[5], x, LOG[4]))
    series = mul_add(high_part, square * square, low_part)
    log1p = mul_add(square * x, series, -square * F32(0.5)) + x
    return mul_add(n, TWO_LN2_HI, mul_add(n, TWO_LN2_LO, F32(-2) * log1p))


def box_muller(r: NDArray[U32], r2: NDArray[U32], mul_add: MulAdd = separate) -> tuple[NDArray[F32], NDArray[F32]]:
    """The project's Box-Muller in binary32; `mul_add=fused` is the wrong variant of a negative control."""
    rad = np.sqrt(log_argument(r, mul_add))
    quarter = ((r2.astype(I64) + 2**29) >> 30) & 3
    theta = r2.astype(I64) - (quarter << 30)
    theta = np.where(theta >= 2**31, theta - 2**32, theta).astype(F32) * ANGLE_STEP
    s = theta * theta
    sine = mul_add(theta * s, mul_add(mul_add(SIN[3], s, SIN[2]), s * s, mul_add(SIN[1], s, SIN[0])), theta)
    cosine = mul_add(s * s, mul_add(mul_add(COS[2], s, COS[1]), s, COS[0]), -s * F32(0.5)) + F32(1)
    cos_of = np.choose(quarter, [cosine, -sine, -cosine, sine])
    sin_of = np.choose(quarter, [sine, cosine, -sine, -cosine])
    return rad * cos_of, rad * sin_of


def gaussian_z(key: int, name: str, n: int, k: int, start: int = 0) -> NDArray[F32]:
    q = np.arange(start // 4, (start + n + 3) // 4, dtype=I64)
    words = philox_rows(q, 0 * q, tensor_id(name), seed_key(key, k)).astype(U32)
    pairs = [*box_muller(words[:, 0], words[:, 1]), *box_muller(words[:, 2], words[:, 3])]
    return np.stack(pairs, axis=1).reshape(-1)[:n]


def gaussian_sum(key: int, name: str, n: int, coefficients: NDArray[F32], start: int = 0) -> NDArray[F32]:
    """Accumulated in binary32 in ascending k, multiply then add, starting from 0; zeros are not skipped."""
    total = np.zeros(n, F32)
    for k, a in enumerate(coefficients):
        total = total + a * gaussian_z(key, name, n, k, start)
    return total


# --- The adjoint ---


def seed_noise(
    family: str, key: int, size: int, name: str, n: int, k: int, start: int = 0, **variant: bool
) -> NDArray[np.float64]:
    """z_k on elements start .. start + n - 1; every value is a binary32 number."""
    if family == "gaussian":
        return gaussian_z(key, name, n, k, start).astype(np.float64)
    sign, bucket = signs_and_buckets(key, size, name, n, start, **variant)
    return 1.0 - 2 * ((sign + parity(bucket & k)) & 1)


@functools.lru_cache(maxsize=32)
def _longer_noise(
    family: str, key: int, size: int, name: str, n: int, k: int, start: int, **variant: bool
) -> NDArray[np.float64]:
    return seed_noise(family, key, size, name, n, k, start, **variant)


def number(
    family: str, key: int, size: int, name: str, g: NDArray[np.float64], k: int, start: int = 0, **variant: bool
) -> tuple[float, float]:
    """u_k = sum_i g_i z_k[i], rounded once, and the sum of the terms' magnitudes; products of binary32 numbers are exact."""
    longer = 1 << max(0, len(g) - 1).bit_length()  # kept from call to call: a shorter tensor has its beginning
    terms = g * _longer_noise(family, key, size, name, longer, k, start, **variant)[: len(g)]
    return math.fsum(terms), math.fsum(np.abs(terms))


def adjoint_error(family: str, size: int, elements: Sequence[int]) -> float:
    """The largest error of u_k as a part of the terms' magnitudes, for stretches of so many elements: (N + 64) 2^-53."""
    block = block_size(size) if family == "hadamard" else 128
    return (sum(-(-n // block) for n in elements) + 64) * 2.0**-53


# --- From coefficients to weights ---


def noise_sum(family: str, key: int, name: str, n: int, coefficients: NDArray[F32], start: int = 0) -> NDArray[F32]:
    """sum_k a_k z_k of either family."""
    if family == "hadamard":
        return hadamard_sum(key, len(coefficients), name, n, coefficients, start)
    return gaussian_sum(key, name, n, coefficients, start)


FRACTION_BITS = {torch.float16: 10, torch.bfloat16: 7}
EXPONENT_BITS = {torch.float16: 5, torch.bfloat16: 8}


def decode(patterns: NDArray[np.uint16], kind: torch.dtype) -> NDArray[np.float64]:
    """The value of each half-precision pattern by the definition of the format."""
    p, f, e = patterns.astype(I64), FRACTION_BITS[kind], EXPONENT_BITS[kind]
    fraction, exponent = p & ((1 << f) - 1), p >> f & ((1 << e) - 1)
    bias = (1 << (e - 1)) - 1
    value = np.where(exponent == 0, np.ldexp(fraction, 1 - bias - f), np.ldexp(fraction + (1 << f), exponent - bias - f))
    special = np.where(fraction == 0, np.inf, np.nan)
    value = np.where(exponent == (1 << e) - 1, special, value)
    return np.where(p >> 15, -value, value)


def encode(x: NDArray[F32], kind: torch.dtype) -> NDArray[np.uint16]:
    """Round to nearest, ties to the even pattern, by looking for the two neighbours among all patterns; NaN canonical."""
    infinity = ((1 << EXPONENT_BITS[kind]) - 1) << FRACTION_BITS[kind]
    values = decode(np.arange(infinity, dtype=np.uint16), kind)
    values = np.append(values, 2 * values[-1] - values[-2])  # where infinity would lie if the format went on
    size = np.abs(x.astype(np.float64))
    finite = np.where(np.isfinite(size), np.minimum(size, values[-1]), 0)
    below = np.minimum(np.searchsorted(values, finite, side="right") - 1, infinity - 1)
    middle = (values[below] + values[below + 1]) / 2  # exact in float64
    up = (finite > middle) | ((finite == middle) & (below % 2 == 1))
    pattern = np.where(np.isinf(size), infinity, below + up) | np.where(np.signbit(x), 0x8000, 0)
    quiet = infinity | 1 << (FRACTION_BITS[kind] - 1)
    return np.where(np.isnan(x), quiet, pattern).astype(np.uint16)


def bits(x: torch.Tensor | NDArray[F32]) -> NDArray[np.unsignedinteger]:
    """The bits of a tensor or array of floats, flat, as unsigned integers."""
    if isinstance(x, torch.Tensor):
        x = x.detach().reshape(-1).view(torch.int32 if x.dtype == torch.float32 else torch.int16).cpu().numpy()
    x = np.ascontiguousarray(x).reshape(-1)
    return x.view(U32 if x.dtype.itemsize == 4 else np.uint16)


def widen(x: torch.Tensor) -> NDArray[F32]:
    if x.dtype == torch.float32:
        return bits(x).view(F32).copy()
    return decode(bits(x), x.dtype).astype(F32)


def cast(x: NDArray[F32], kind: torch.dtype) -> NDArray[np.unsignedinteger]:
    """The bits of x in the storage type."""
    return bits(x) if kind == torch.float32 else encode(x, kind)


def add(x: NDArray[F32], y: NDArray[F32]) -> NDArray[F32]:
    with np.errstate(over="ignore"):
        return x + y


class Weight:
    """One tunable tensor that follows the rules of docs/noise.md literally; `now` holds the bits it must have."""

    def __init__(self, name: str, w0: torch.Tensor, kind: torch.dtype, family: str, key: int, size: int) -> None:
        self.name, self.n, self.kind, self.family, self.key = name, w0.numel(), kind, family, key
        self.w0 = widen(w0)
        self.a = np.zeros(size, np.float64)
        self.centre: NDArray[F32] | None = None
        self.now = cast(self.w0, kind)  # binding leaves the weights as they are

    def noise(self, a: NDArray[np.float64]) -> NDArray[F32]:
        return noise_sum(self.family, self.key, self.name, self.n, a.astype(F32))

    def rebuild(self, coefficients: NDArray[F32]) -> None:
        self.a, self.centre = coefficients.astype(np.float64), None
        self.now = cast(add(self.w0, self.noise(self.a)), self.kind)

    def move(self, indices: list[int], amounts: list[float]) -> None:
        delta = np.zeros_like(self.a)
        for k, amount in zip(indices, amounts, strict=True):
            delta[k] += amount
        if self.kind == torch.float32:
            self.now = bits(add(self.now.view(F32), self.noise(delta)))
        elif self.family == "hadamard":
            self.now = cast(add(self.w0, self.noise(self.a + delta)), self.kind)
        else:
            if self.centre is None:
                self.centre = add(self.w0, self.noise(self.a))
            self.centre = add(self.centre, self.noise(delta))
            self.now = cast(self.centre, self.kind)
        self.a = self.a + delta


def times(x: NDArray[F32], y: NDArray[F32]) -> NDArray[F32]:
    with np.errstate(over="ignore", invalid="ignore"):
        return x * y


def paged(
    name: str,
    w0: torch.Tensor,
    kind: torch.dtype,
    pages: Sequence[tuple[str, int, NDArray[F32], str]],
    *,
    cast_each: bool = False,
    together: bool = False,
) -> NDArray[np.unsignedinteger]:
    """The bits of a weight after pages, each (family, key, a, movement): page after page in binary32, and one cast.

    absolute: fl(w + sum); proportional: fl(w fl(1 + sum)), w as the page found it. The two switches are the wrong variants of
    the negative controls: a cast after every page; the pages' sums added before they are added to w0.
    """
    w, sums = widen(w0), np.zeros(w0.numel(), F32)
    for family, key, a, movement in pages:
        noise = noise_sum(family, key, name, w0.numel(), a)
        if together:
            sums = add(sums, noise)
            continue
        w = add(w, noise) if movement == "absolute" else times(w, add(F32(1), noise))
        if cast_each:
            w = decode(encode(w, kind), kind).astype(F32) if kind != torch.float32 else w
    return cast(add(w, sums) if together else w, kind)


# --- Digests ---


def tensor_digest(name: str, x: torch.Tensor) -> bytes:
    header = json.dumps([name, list(x.shape), str(x.dtype).removeprefix("torch.")])
    data = x.detach().cpu().contiguous().reshape(-1)
    raw = bits(data).tobytes() if x.is_floating_point() and x.dtype != torch.float64 else data.numpy().tobytes()
    return hashlib.sha256(header.encode("ascii") + b"\n" + raw).digest()


def model_digest(tensors: dict[str, torch.Tensor]) -> str:
    """The digest of a model with these parameters, by canonical name."""
    return hashlib.sha256(b"".join(tensor_digest(name, tensors[name]) for name in sorted(tensors))).hexdigest()


# --- Models ---


def module_of(tensors: dict[str, torch.Tensor], frozen: tuple[str, ...] = (), backend: str = "reference") -> torch.nn.Module:
    """A module with these parameters under these dotted names; a Parameter may come under several names (tied).

    It lies where that backend works.
    """
    root = torch.nn.Module()
    for name, x in tensors.items():
        at = root
        *parents, last = name.split(".")
        for parent in parents:
            if parent not in dict(at.named_children()):
                at.add_module(parent, torch.nn.Module())
            at = at.get_submodule(parent)
        parameter = x if isinstance(x, torch.nn.Parameter) else torch.nn.Parameter(x.clone(), requires_grad=False)
        parameter.requires_grad_(name not in frozen and parameter.is_floating_point())
        at.register_parameter(last, parameter)
    return root.to(device_of(backend))


def all_bits(model: torch.nn.Module) -> dict[str, bytes]:
    """The bytes of every parameter, by each of its names."""
    named = model.named_parameters(remove_duplicate=False)
    flat = {name: x.detach().cpu().contiguous().reshape(-1) for name, x in named if x.numel()}
    return {name: x.view(torch.uint8).numpy().tobytes() for name, x in flat.items()}


def some_weights(shape: tuple[int, ...], kind: torch.dtype, seed: int) -> torch.Tensor:
    """Weights as models have them, zeros of both signs, subnormals and large numbers among them."""
    x = 0.1 * torch.randn(math.prod(shape), generator=torch.Generator().manual_seed(seed))
    tiny, largest = torch.finfo(kind).smallest_normal, torch.finfo(kind).max
    edges = torch.tensor([0.0, -0.0, tiny, -tiny, tiny / 4, -tiny / 8, 1.0, largest, -largest])
    x[: min(9, x.numel())] = edges[: min(9, x.numel())]
    return x.to(kind).reshape(shape)


# --- Checks that more than one file makes ---


def sha256(x: NDArray[F32]) -> str:
    return hashlib.sha256(x.astype("<f4").tobytes()).hexdigest()


def some_coefficients(size: int, seed: int, nonzero: int | None = None, largest: float = 1e30) -> NDArray[F32]:
    """float32[K] of all magnitudes, subnormals, zeros of both signs and repeats among them."""
    rng = np.random.default_rng(seed)
    a = np.zeros(size, F32)
    at = rng.choice(size, min(size, size if nonzero is None else nonzero), replace=False)
    kinds = rng.integers(0, 4, len(at))
    plain = rng.standard_normal(len(at))
    wild = plain * 10.0 ** rng.uniform(-44, math.log10(largest) - 1, len(at))
    a[at] = np.choose(kinds, [plain, wild, np.round(plain), -0.0 * plain]).astype(F32)
    return a


def is_isotropic(samples: NDArray[np.floating]) -> bool:
    """Whether E z z' = I is consistent with samples float[T, n], each a draw of z in n elements.

    Under the law an entry of the mean of z z' has standard deviation 1/sqrt(T) off the diagonal and at most sqrt(2/T)
    on it. Six of them leave a chance of 2e-9 an entry, and the draws are fixed by their keys.
    """
    draws, n = samples.shape
    error = np.abs(samples.T @ samples / draws - np.eye(n))
    diagonal = np.diag(error).copy()
    np.fill_diagonal(error, 0)
    return bool(error.max() <= 6 / math.sqrt(draws) and diagonal.max() <= 6 * math.sqrt(2 / draws))
