"""The CPU backend: numba kernels that read and write each weight once (docs/noise.md).

One sweep is one call per thread for all tensors together: the work is a table with one row per slot, cut among the
threads at multiples of `QUANTUM` elements, so that hundreds of small tensors cost nothing in Python and the number of
threads cannot change a bit. Threads are plain Python threads around kernels without the interpreter lock: numba's own
thread pools do not survive a fork, or abort when two threads enter them.

All that is compiled stands in this one file: numba keeps machine code by the file of a kernel, and would not notice that
something it inlines from another file has changed.

Nothing here lets the compiler fuse a multiplication with an addition: numba's default has no `contract` flag, and the
tests compare every bit with the NumPy reference.

A fold adds into several tables, its lanes: the elements of a call are cut among them at places that depend on nothing but
their number, each lane belongs to one thread at a time, and the lanes are added up in their order. So there too the number
of threads cannot change a bit.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, assert_never

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from fedkseed.errors import BackendError
from fedkseed.noise import box_muller as bm
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
from fedkseed.noise.philox import MASK32, MULTIPLIERS, ROUNDS, WEYL

LOG = logging.getLogger(__name__)
CHUNK = 128
"""One Philox call of the hadamard family gives the signs of as many elements."""
CHUNK_BITS = 5
CHUNKS = 1 << CHUNK_BITS
STRETCH = CHUNK * CHUNKS
"""Elements per step of the hadamard kernel: enough Philox calls to vectorise, little enough to stay in the first cache."""
LANES = 16
"""Elements per vector operation; LLVM splits or joins them to what the machine has."""
PART_CHUNKS = 16
PART = CHUNK * PART_CHUNKS
"""Entries of a fold's table that are filled at a time: 16 KiB in float64, half of a first cache."""
QUADS = 128
"""Philox calls per step of the gaussian kernel: four elements each."""
ELEMENTS_PER_THREAD = 1 << 19
"""Below this a second thread costs more than it saves."""
FOLD_LANES = 16
"""Tables of a fold, hence the most threads that it can use. Their number, and `ELEMENTS_PER_LANE`, decide its last bits."""
ELEMENTS_PER_LANE = 1 << 19
"""A call with fewer elements for each lane uses fewer lanes."""

FLOAT32, FLOAT16, BFLOAT16, ABSENT = range(4)
FORMATS = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}
OUT, OUT_FORMAT, BASE, BASE_FORMAT, START, SIZE, TENSOR = range(7)
"""Columns of the work table: addresses, formats, first element, number of elements, tensor id; one row per slot."""

M0, M1, W0, W1 = (np.uint64(word) for word in (*MULTIPLIERS, *WEYL))
MASK, HALF_WORD = np.uint64(MASK32), np.uint64(32)
BLOCK_STREAM = np.uint64(0x80000000)
SIGN = np.uint32(0x80000000)

LOG0, LOG1, LOG2, LOG3, LOG4, LOG5, LOG6, LOG7 = bm.LOG
SIN0, SIN1, SIN2, SIN3 = bm.SIN
COS0, COS1, COS2 = bm.COS
TWO_LN2_HI, TWO_LN2_LO, ANGLE_STEP = bm.TWO_LN2_HI, bm.TWO_LN2_LO, bm.ANGLE_STEP
SQRT_HALF_MANTISSA = np.uint32(bm.SQRT_HALF_MANTISSA)
HALF, ONE, TWO = np.float32(0.5), np.float32(1), np.float32(2)


@intrinsic
def _pointer(typingctx: Any, address: Any) -> Any:
    """An address as a void pointer."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.intp), build


@intrinsic
def _as_float(typingctx: Any, bits: Any) -> Any:
    """The float32 with these bits."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), build


@intrinsic
def _as_bits(typingctx: Any, value: Any) -> Any:
    """The bits of a float32."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), build


@intrinsic
def _add_signed(
    typingctx: Any, out: Any, base: Any, table: Any, at: Any, shift: Any, w0: Any, w1: Any, w2: Any, w3: Any
) -> Any:
    """128 elements at once: `out[l] <- base[l] + (-1)^(bit l of w0..w3) table[(at + l) xor shift]`; three addresses.

    Written as LLVM vectors because compilers turn neither the permuted look-up nor the sign bits into vector code. The
    low four bits of the shift permute the lanes, by four conditional exchanges with fixed strides, so that the table
    stays as it is in the fastest cache; the other bits only move the address.
    """

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        out, base, table, at, shift, *bits = args
        word, size = ir.IntType(32), ir.IntType(64)
        words, floats = ir.VectorType(word, LANES), ir.VectorType(ir.FloatType(), LANES)
        undefined = ir.Constant(words, ir.Undefined)

        def constant(values: Sequence[int]) -> Any:
            return ir.Constant(words, [ir.Constant(word, value) for value in values])

        def vector(address: Any, element: Any, kind: Any) -> Any:
            address = builder.add(address, builder.mul(element, ir.Constant(size, 4)))
            return builder.inttoptr(address, kind.as_pointer())

        swap, jump = (builder.and_(shift, ir.Constant(size, mask)) for mask in (LANES - 1, ~(LANES - 1)))
        strides = [1 << bit for bit in range(LANES.bit_length() - 1)]
        exchanges = [
            builder.icmp_unsigned("!=", builder.and_(swap, ir.Constant(size, s)), ir.Constant(size, 0)) for s in strides
        ]
        for group in range(CHUNK // LANES):
            lane = ir.Constant(size, group * LANES)
            entries = builder.load(vector(table, builder.xor(builder.add(at, lane), jump), words), align=4)
            for stride, exchange in zip(strides, exchanges, strict=True):
                exchanged = builder.shuffle_vector(entries, undefined, constant([i ^ stride for i in range(LANES)]))
                entries = builder.select(exchange, exchanged, entries)
            signs = builder.insert_element(undefined, bits[group * LANES // 32], ir.Constant(word, 0))
            signs = builder.shuffle_vector(signs, undefined, constant([0] * LANES))
            signs = builder.shl(signs, constant([31 - group * LANES % 32 - i for i in range(LANES)]))
            signs = builder.and_(signs, constant([0x80000000] * LANES))
            noise = builder.bitcast(builder.xor(entries, signs), floats)
            value = builder.load(vector(base, lane, floats), align=4)
            builder.store(builder.fadd(value, noise), vector(out, lane, floats), align=4)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5, *[types.uint32] * 4), build


@intrinsic
def _prefetch(typingctx: Any, address: Any) -> Any:
    """Ask for the cache line at an address, into the second cache; nothing happens where there is no memory."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        read, second, data = (ir.Constant(word, value) for value in (0, 2, 1))
        builder.call(function, [builder.inttoptr(args[0], byte), read, second, data])
        return context.get_dummy_value()

    return types.void(types.intp), build


@intrinsic
def _fold_signed(typingctx: Any, table: Any, source: Any, at: Any, shift: Any, w0: Any, w1: Any, w2: Any, w3: Any) -> Any:
    """128 elements at once: `table[(at + l) xor shift] += (-1)^(bit l of w0..w3) source[l]`, in float64; two addresses.

    `_add_signed` transposed: the source's lanes are permuted, and the other bits of the shift move the table's address.
    """

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        table, source, at, shift, *bits = args
        word, size = ir.IntType(32), ir.IntType(64)
        words, floats, doubles = (ir.VectorType(kind, LANES) for kind in (word, ir.FloatType(), ir.DoubleType()))
        undefined = ir.Constant(words, ir.Undefined)

        def constant(values: Sequence[int]) -> Any:
            return ir.Constant(words, [ir.Constant(word, value) for value in values])

        def vector(address: Any, element: Any, width: int, kind: Any) -> Any:
            address = builder.add(address, builder.mul(element, ir.Constant(size, width)))
            return builder.inttoptr(address, kind.as_pointer())

        swap, jump = (builder.and_(shift, ir.Constant(size, mask)) for mask in (LANES - 1, ~(LANES - 1)))
        strides = [1 << bit for bit in range(LANES.bit_length() - 1)]
        exchanges = [
            builder.icmp_unsigned("!=", builder.and_(swap, ir.Constant(size, s)), ir.Constant(size, 0)) for s in strides
        ]
        for group in range(CHUNK // LANES):
            lane = ir.Constant(size, group * LANES)
            values = builder.load(vector(source, lane, 4, words), align=4)
            signs = builder.insert_element(undefined, bits[group * LANES // 32], ir.Constant(word, 0))
            signs = builder.shuffle_vector(signs, undefined, constant([0] * LANES))
            signs = builder.shl(signs, constant([31 - group * LANES % 32 - i for i in range(LANES)]))
            signs = builder.and_(signs, constant([0x80000000] * LANES))
            values = builder.xor(values, signs)
            for stride, exchange in zip(strides, exchanges, strict=True):
                exchanged = builder.shuffle_vector(values, undefined, constant([i ^ stride for i in range(LANES)]))
                values = builder.select(exchange, exchanged, values)
            wide = builder.fpext(builder.bitcast(values, floats), doubles)
            entries = vector(table, builder.xor(builder.add(at, lane), jump), 8, doubles)
            builder.store(builder.fadd(builder.load(entries, align=8), wide), entries, align=8)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4, *[types.uint32] * 4), build


def kernel(function: Callable[..., Any]) -> Any:
    """Compile what runs without the interpreter's lock, and keep the machine code if numba finds a folder to write to."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError as error:  # neither beside the package nor in the home folder
        _tell_once(str(error))
        return njit(nogil=True)(function)


@functools.cache
def _tell_once(reason: str) -> None:
    LOG.warning(
        "compiled kernels cannot be kept (%.60s), so that each process compiles them anew for some seconds; "
        "set NUMBA_CACHE_DIR to a folder that may be written",
        reason,
    )


@njit(inline="always")
def _philox(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    for _ in range(ROUNDS):
        p0, p1 = M0 * c0, M1 * c2
        c0, c1, c2, c3 = (p1 >> HALF_WORD) ^ c1 ^ k0, p1 & MASK, (p0 >> HALF_WORD) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + W0) & MASK, (k1 + W1) & MASK
    return c0, c1, c2, c3


@njit(inline="always")
def _widen(address, kind, first, values):  # type: ignore[no-untyped-def]
    """values[i] <- element first + i at the address, in binary32; -0 if absent, since -0 + x is x for every x."""
    n = values.size
    if kind == FLOAT32:
        floats = carray(_pointer(address + 4 * first), (n,), np.float32)
        for i in range(n):
            values[i] = floats[i]
    elif kind == BFLOAT16:
        halves = carray(_pointer(address + 2 * first), (n,), np.uint16)
        for i in range(n):
            values[i] = _as_float(np.uint32(np.uint32(halves[i]) << np.uint32(16)))
    elif kind == FLOAT16:
        halves = carray(_pointer(address + 2 * first), (n,), np.uint16)
        for i in range(n):
            half = np.uint32(halves[i])
            bits = np.uint32((half & np.uint32(0x7FFF)) << np.uint32(13))
            exponent = bits & np.uint32(0x0F800000)
            normal = np.uint32(bits + np.uint32(112 << 23))
            special = np.uint32(bits + np.uint32(224 << 23))  # infinity and NaN
            tiny = _as_bits(_as_float(np.uint32(bits + np.uint32(113 << 23))) - _as_float(np.uint32(113 << 23)))
            magnitude = tiny if exponent == 0 else (special if exponent == np.uint32(0x0F800000) else normal)
            values[i] = _as_float(np.uint32(magnitude | np.uint32((half & np.uint32(0x8000)) << np.uint32(16))))
    else:
        for i in range(n):
            values[i] = np.float32(-0.0)


@njit(inline="always")
def _store(values, address, kind, first):  # type: ignore[no-untyped-def]
    """Element first + i at the address <- values[i], rounded once, to nearest even; a NaN becomes the canonical one."""
    n = values.size
    if kind == FLOAT32:
        floats = carray(_pointer(address + 4 * first), (n,), np.float32)
        for i in range(n):
            floats[i] = values[i]
    elif kind == BFLOAT16:
        halves = carray(_pointer(address + 2 * first), (n,), np.uint16)
        for i in range(n):
            bits = _as_bits(values[i])
            odd = (bits >> np.uint32(16)) & np.uint32(1)
            rounded = np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
            halves[i] = np.uint16(0x7FC0) if values[i] != values[i] else np.uint16(rounded)
    else:
        halves = carray(_pointer(address + 2 * first), (n,), np.uint16)
        for i in range(n):
            bits = _as_bits(values[i])
            sign = np.uint32(bits & SIGN) >> np.uint32(16)
            size = np.uint32(bits & ~SIGN)
            odd = (size >> np.uint32(13)) & np.uint32(1)
            normal = np.uint32(size - np.uint32(112 << 23) + np.uint32(0xFFF) + odd) >> np.uint32(13)
            # below 2^-14 the addition of 1/2 lines the bits up and rounds them
            tiny = np.uint32(_as_bits(_as_float(size) + HALF) - np.uint32(126 << 23))
            rounded = tiny if size < np.uint32(113 << 23) else normal
            if size >= np.uint32(0x477FF000):  # 65,520 and above
                rounded = np.uint32(0x7C00)
            if size > np.uint32(0x7F800000):
                rounded, sign = np.uint32(0x7E00), np.uint32(0)
            halves[i] = np.uint16(rounded | sign)


@njit(inline="always")
def _share(begin, size, thread, threads, total):  # type: ignore[no-untyped-def]
    """The part [lo, hi) of a tensor, which begins at element `begin` of all, that falls to a thread."""
    lo = (total * thread // threads - begin + QUANTUM - 1) // QUANTUM * QUANTUM
    hi = (total * (thread + 1) // threads - begin + QUANTUM - 1) // QUANTUM * QUANTUM
    return min(max(lo, 0), size), min(max(hi, 0), size)


@kernel
def _hadamard_sweep(work, tables, starts, sizes, keys, thread, threads, total):  # type: ignore[no-untyped-def]
    # Page after page on a stretch that stays in the first cache, so that the memory is read and written once.
    # blocks and chunks are powers of two: shifts and masks in place of divisions, which cost more than all the rest
    words = np.empty((4, CHUNKS), np.uint32)
    shifts = np.empty(CHUNKS, np.intp)
    values = np.empty(STRETCH, np.float32)
    begin = 0
    for row in range(work.shape[0]):
        out, base = work[row, OUT], work[row, BASE]
        direct = work[row, OUT_FORMAT] == FLOAT32 and work[row, BASE_FORMAT] == FLOAT32
        tensor = np.uint64(work[row, TENSOR])
        t0, t1 = tensor & MASK, tensor >> HALF_WORD
        lo, hi = _share(begin, work[row, SIZE], thread, threads, total)
        begin += work[row, SIZE]
        for at in range(lo, hi, STRETCH):
            n = min(STRETCH, hi - at)
            first = (work[row, START] + at) >> 7
            whole = n // CHUNK if direct else 0
            if whole * CHUNK < n:
                _widen(base, work[row, BASE_FORMAT], at + whole * CHUNK, values[whole * CHUNK : n])
            reads = base
            for page in range(keys.size):
                k0, k1 = keys[page] & MASK, keys[page] >> HALF_WORD
                entries, in_block = tables.ctypes.data + 4 * starts[page], sizes[page] // CHUNK - 1
                block_bits = 0
                while 1 << block_bits <= in_block:
                    block_bits += 1
                for i in range(CHUNKS):  # vectorised: one Philox call for each chunk's signs
                    chunk = first + i
                    r0, r1, r2, r3 = _philox(np.uint64(chunk & in_block), np.uint64(chunk >> block_bits), t0, t1, k0, k1)
                    words[0, i], words[1, i] = np.uint32(r0), np.uint32(r1)
                    words[2, i], words[3, i] = np.uint32(r2), np.uint32(r3)
                for i in range(CHUNKS >> min(block_bits, CHUNK_BITS)):
                    block = np.uint64((first >> block_bits) + i)
                    shifts[i] = np.intp(_philox(BLOCK_STREAM, block, t0, t1, k0, k1)[0] & np.uint64(sizes[page] - 1))
                for i in range((n + CHUNK - 1) // CHUNK):
                    if i < whole:
                        source, target = reads + 4 * (at + i * CHUNK), out + 4 * (at + i * CHUNK)
                    else:
                        source = target = values.ctypes.data + 4 * i * CHUNK
                    position = ((first + i) & in_block) * CHUNK
                    shift = shifts[i >> block_bits]
                    _add_signed(target, source, entries, position, shift, words[0, i], words[1, i], words[2, i], words[3, i])
                reads = out
            if whole * CHUNK < n:
                _store(values[whole * CHUNK : n], out, work[row, OUT_FORMAT], at + whole * CHUNK)


@njit(inline="always")
def _box_muller(r, r2):  # type: ignore[no-untyped-def]
    v = _as_bits(np.float32(np.int32(((r >> np.uint32(9)) << np.uint32(1)) | np.uint32(1))))
    mantissa = np.uint32(v & np.uint32(0x7FFFFF))
    halve = np.uint32(1) if mantissa > SQRT_HALF_MANTISSA else np.uint32(0)
    exponent = np.uint32(np.uint32(v >> np.uint32(23)) - np.uint32(127) + halve)
    x = _as_float(np.uint32(mantissa | np.uint32(np.uint32(np.uint32(127) - halve) << np.uint32(23)))) - ONE
    square = x * x
    low = (LOG3 * x + LOG2) * square + (LOG1 * x + LOG0)
    high = (LOG7 * x + LOG6) * square + (LOG5 * x + LOG4)
    poly = high * (square * square) + low
    log1p = (square * x * poly - square * HALF) + x
    n = np.float32(np.int32(np.uint32(24) - exponent))
    rad = np.sqrt(n * TWO_LN2_HI + (n * TWO_LN2_LO - TWO * log1p))
    quarter = np.uint32(np.uint32(r2 + np.uint32(1 << 29)) >> np.uint32(30))
    theta = np.float32(np.int32(np.uint32(r2 - np.uint32(quarter << np.uint32(30))))) * ANGLE_STEP
    s = theta * theta
    sine = theta * s * ((SIN3 * s + SIN2) * (s * s) + (SIN1 * s + SIN0)) + theta
    cosine = (s * s * ((COS2 * s + COS1) * s + COS0) - s * HALF) + ONE
    odd = (quarter & np.uint32(1)) != 0
    cos_sign = np.uint32(np.uint32(np.uint32(quarter + np.uint32(1)) & np.uint32(2)) << np.uint32(30))
    sin_sign = np.uint32(np.uint32(quarter & np.uint32(2)) << np.uint32(30))
    z = rad * _as_float(np.uint32(_as_bits(sine if odd else cosine) ^ cos_sign))
    z2 = rad * _as_float(np.uint32(_as_bits(cosine if odd else sine) ^ sin_sign))
    return z, z2


@kernel
def _gaussian_sweep(work, seeds, amounts, ends, thread, threads, total):  # type: ignore[no-untyped-def]
    words = np.empty((4, QUADS), np.uint32)
    sums = np.empty((4, QUADS), np.float32)
    values = np.empty(4 * QUADS, np.float32)
    begin = 0
    for row in range(work.shape[0]):
        start = work[row, START]
        tensor = np.uint64(work[row, TENSOR])
        t0, t1 = tensor & MASK, tensor >> HALF_WORD
        lo, hi = _share(begin, work[row, SIZE], thread, threads, total)
        begin += work[row, SIZE]
        for at in range(lo, hi, 4 * QUADS):
            first = np.uint64((start + at) // 4)
            n = min(4 * QUADS, hi - at)
            _widen(work[row, BASE], work[row, BASE_FORMAT], at, values[:n])
            begin_page = 0
            for end_page in ends:
                sums[:] = np.float32(0)
                for m in range(begin_page, end_page):
                    k0, k1, amount = seeds[m] & MASK, seeds[m] >> HALF_WORD, amounts[m]
                    for i in range(QUADS):
                        r0, r1, r2, r3 = _philox(first + np.uint64(i), np.uint64(0), t0, t1, k0, k1)
                        words[0, i], words[1, i] = np.uint32(r0), np.uint32(r1)
                        words[2, i], words[3, i] = np.uint32(r2), np.uint32(r3)
                    for half in range(0, 4, 2):
                        for i in range(QUADS):
                            z, z2 = _box_muller(words[half, i], words[half + 1, i])
                            sums[half, i] += amount * z
                            sums[half + 1, i] += amount * z2
                begin_page = end_page
                for i in range(QUADS):
                    for j in range(4):
                        values[4 * i + j] += sums[j, i]
            _store(values[:n], work[row, OUT], work[row, OUT_FORMAT], at)


@njit(inline="always")
def _shift(block, t0, t1, k0, k1, block_bits):  # type: ignore[no-untyped-def]
    return np.intp(_philox(BLOCK_STREAM, block, t0, t1, k0, k1)[0] & np.uint64((1 << block_bits) - 1))


@njit(inline="always")
def _inside(part, position, t0, t1, k0, k1, block_bits):  # type: ignore[no-untyped-def]
    """Where in the block that begins at a position its elements of a part of the table lie."""
    if 1 << block_bits <= PART:
        return 0
    return (part * PART) ^ (_shift(np.uint64(position >> block_bits), t0, t1, k0, k1, block_bits) & ~(PART - 1))


@kernel
def _hadamard_fold(work, tables, key, lanes, thread, threads, total):  # type: ignore[no-untyped-def]
    # The table is filled part by part, PART entries that stay in the first cache beside the gradient that streams through: the
    # upper bits of a block's shift say which PART elements of the block belong to them. The processor cannot guess where the
    # next block's are, so they are asked for while these are added; into the second cache, since in the first they would push
    # out the table (measured: 0.28 ns an element; into the first 0.45, unasked 0.6).
    size = tables.shape[1]
    block_bits = 0
    while 1 << block_bits < size:
        block_bits += 1
    parts = max(1, size // PART)
    step = max(1, PART // size)  # blocks at a time
    k0, k1 = key & MASK, key >> HALF_WORD
    words = np.empty((4, PART_CHUNKS), np.uint32)
    shifts = np.empty(PART_CHUNKS, np.intp)
    values = np.empty(PART, np.float32)
    for lane in range(thread, lanes, threads):
        entries = tables[lane].ctypes.data
        begin = 0
        for row in range(work.shape[0]):
            source = work[row, BASE]
            direct = work[row, BASE_FORMAT] == FLOAT32
            width = 4 if direct else 2
            lines = width * CHUNK // 64 if parts > 1 else 0
            tensor = np.uint64(work[row, TENSOR])
            t0, t1 = tensor & MASK, tensor >> HALF_WORD
            lo, hi = _share(begin, work[row, SIZE], lane, lanes, total)
            begin += work[row, SIZE]
            for part in range(parts):
                at = lo + _inside(part, work[row, START] + lo, t0, t1, k0, k1, block_bits)
                for at_block in range(lo, hi, step * size):
                    block = (work[row, START] + at_block) >> block_bits
                    following = at_block + step * size
                    following += _inside(part, work[row, START] + following, t0, t1, k0, k1, block_bits)
                    n = min(PART, hi - at)
                    if n <= 0:  # the tensor ends before
                        at = following
                        continue
                    first = (work[row, START] + at) >> 7
                    for i in range(PART_CHUNKS):  # vectorised, as in the sweep
                        chunk = first + i
                        j, b = np.uint64(chunk & (size // CHUNK - 1)), np.uint64(chunk >> (block_bits - 7))
                        r0, r1, r2, r3 = _philox(j, b, t0, t1, k0, k1)
                        words[0, i], words[1, i] = np.uint32(r0), np.uint32(r1)
                        words[2, i], words[3, i] = np.uint32(r2), np.uint32(r3)
                    for i in range(step):
                        shifts[i] = _shift(np.uint64(block + i), t0, t1, k0, k1, block_bits)
                    whole = n // CHUNK if direct else 0
                    chunks = (n + CHUNK - 1) // CHUNK
                    if whole < chunks:
                        _widen(source, work[row, BASE_FORMAT], at + whole * CHUNK, values[whole * CHUNK : n])
                        values[n : chunks * CHUNK] = np.float32(0)  # adding zeros changes no entry
                    for i in range(chunks):
                        for line in range(lines):
                            _prefetch(source + width * (following + i * CHUNK) + 64 * line)
                        address = source + 4 * (at + i * CHUNK) if i < whole else values.ctypes.data + 4 * i * CHUNK
                        position = ((first + i) & (size // CHUNK - 1)) * CHUNK
                        shift = shifts[i >> (block_bits - 7)]
                        _fold_signed(entries, address, position, shift, words[0, i], words[1, i], words[2, i], words[3, i])
                    at = following


@kernel
def _gaussian_fold(work, sums, seeds, lanes, thread, threads, total):  # type: ignore[no-untyped-def]
    words = np.empty((4, QUADS), np.uint32)
    gradient = np.empty((4, QUADS), np.float32)
    values = np.empty(4 * QUADS, np.float32)
    products = np.empty(QUADS, np.float64)
    for lane in range(thread, lanes, threads):
        begin = 0
        for row in range(work.shape[0]):
            start = work[row, START]
            tensor = np.uint64(work[row, TENSOR])
            t0, t1 = tensor & MASK, tensor >> HALF_WORD
            lo, hi = _share(begin, work[row, SIZE], lane, lanes, total)
            begin += work[row, SIZE]
            for at in range(lo, hi, 4 * QUADS):
                first = np.uint64((start + at) // 4)
                n = min(4 * QUADS, hi - at)
                _widen(work[row, BASE], work[row, BASE_FORMAT], at, values[:n])
                values[n:] = np.float32(0)
                for i in range(QUADS):
                    gradient[0, i], gradient[1, i] = values[4 * i], values[4 * i + 1]
                    gradient[2, i], gradient[3, i] = values[4 * i + 2], values[4 * i + 3]
                for m in range(seeds.size):
                    k0, k1 = seeds[m] & MASK, seeds[m] >> HALF_WORD
                    for i in range(QUADS):
                        r0, r1, r2, r3 = _philox(first + np.uint64(i), np.uint64(0), t0, t1, k0, k1)
                        words[0, i], words[1, i] = np.uint32(r0), np.uint32(r1)
                        words[2, i], words[3, i] = np.uint32(r2), np.uint32(r3)
                    products[:] = 0.0
                    for half in range(0, 4, 2):
                        for i in range(QUADS):
                            z, z2 = _box_muller(words[half, i], words[half + 1, i])
                            one = np.float64(gradient[half, i]) * np.float64(z)
                            products[i] += one + np.float64(gradient[half + 1, i]) * np.float64(z2)
                    width = QUADS // 2
                    while width:  # halves on halves: vectorised, in an order of its own
                        for i in range(width):
                            products[i] += products[i + width]
                        width //= 2
                    sums[lane, m] += products[0]


class CpuBackend:
    """numba, on as many threads as torch uses."""

    name = "cpu"
    device = "cpu"

    def prepare(self, slots: Sequence[Slot]) -> Sweep:
        """See `Backend.prepare`."""
        return _CpuSweep(slots)

    def fold(self, directions: Directions) -> Fold:
        """See `Backend.fold`."""
        return _CpuFold(directions)


class _CpuSweep:
    """The work table of some slots, whose memory it keeps."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = [slot for slot in slots if slot.out.numel()]
        self._work = np.array([_row(slot) for slot in self._slots], np.int64).reshape(-1, TENSOR + 1)
        self._total = int(self._work[:, SIZE].sum())

    def __call__(self, *mixtures: Mixture) -> None:
        threads = max(1, min(torch.get_num_threads(), self._total // ELEMENTS_PER_THREAD))
        kernel, pages = _pages(mixtures)
        if threads == 1:
            kernel(self._work, *pages, 0, 1, self._total)
            return
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda thread: kernel(self._work, *pages, thread, threads, self._total), range(threads)))


class _CpuFold:
    """The lanes of a fold, float64[FOLD_LANES, B or number of seeds]."""

    def __init__(self, directions: Directions) -> None:
        self._kernel: Any
        self._directions: Any
        if isinstance(directions, HadamardDirections):
            self._kernel, self._directions, entries = _hadamard_fold, np.uint64(directions.key), directions.block
        elif isinstance(directions, GaussianDirections):
            self._kernel, self._directions, entries = _gaussian_fold, directions.seeds, len(directions.seeds)
        else:
            assert_never(directions)
        self._lanes = np.zeros((FOLD_LANES, entries), np.float64)

    def add(self, sources: Sequence[Source]) -> None:
        """See `Fold.add`."""
        rows = [_source_row(source) for source in sources if source.values.numel()]
        work = np.array(rows, np.int64).reshape(-1, TENSOR + 1)
        total = int(work[:, SIZE].sum())
        lanes = max(1, min(FOLD_LANES, total // ELEMENTS_PER_LANE))
        threads = max(1, min(torch.get_num_threads(), lanes))
        arguments = (work, self._lanes, self._directions, lanes)
        if threads == 1:
            self._kernel(*arguments, 0, 1, total)
            return
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda thread: self._kernel(*arguments, thread, threads, total), range(threads)))

    def sums(self) -> NDArray[np.float64]:
        """See `Fold.sums`."""
        total = np.zeros(self._lanes.shape[1], np.float64)
        with np.errstate(invalid="ignore"):  # infinities of both signs
            for lane in self._lanes:
                total += lane
        return total


def _pages(mixtures: Sequence[Mixture]) -> tuple[Any, tuple[NDArray[Any], ...]]:
    """The kernel for mixtures of one family, and what it needs of them: their arrays end to end, and where each lies."""
    structured = [one for one in mixtures if isinstance(one, HadamardMixture)]
    drawn = [one for one in mixtures if isinstance(one, GaussianMixture)]
    if len(structured) == len(mixtures):
        sizes = np.array([len(one.table) for one in structured], np.int64)
        keys = np.array([one.key for one in structured], np.uint64)
        return _hadamard_sweep, (_joined([one.table for one in structured]), np.cumsum(sizes) - sizes, sizes, keys)
    if len(drawn) == len(mixtures):
        ends = np.cumsum([len(one.seeds) for one in drawn], dtype=np.int64)
        return _gaussian_sweep, (_joined([one.seeds for one in drawn]), _joined([one.amounts for one in drawn]), ends)
    raise BackendError("mixtures of several families came for one sweep; expected one family")


def _joined(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _row(slot: Slot) -> tuple[int, ...]:
    base = (0, ABSENT) if slot.base is None else (slot.base.data_ptr(), FORMATS[slot.base.dtype])
    return (slot.out.data_ptr(), FORMATS[slot.out.dtype], *base, slot.start, slot.out.numel(), _signed(slot.tensor_id))


def _source_row(source: Source) -> tuple[int, ...]:
    x = source.values
    return (0, ABSENT, x.data_ptr(), FORMATS[x.dtype], source.start, x.numel(), _signed(source.tensor_id))


def _signed(tensor_id: int) -> int:
    return tensor_id - (tensor_id >> 63 << 64)


BACKEND = CpuBackend()
