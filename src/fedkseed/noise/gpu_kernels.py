"""The GPU backend's Triton kernels: each program reads, changes and writes one tile of a slot once (docs/noise.md).

A fold is the other way round: a program owns a tile of the table, or a seed, and reads those gradients that belong to it. So
nothing is scattered, and no atomic operation makes the order of the additions a matter of chance.

A sweep is one launch however many tensors and pages there are: the work is a table with one row per slot, and a second one
says which row a program's tile belongs to. Base values and results have their types as constants, so a kernel is compiled
for each pair.

Nothing here may be contracted to a fused multiply-add or flush subnormal numbers: compile with `OPTIONS`.
"""

# mypy sees Triton's types as they are for Python; in a kernel they mean something else
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"

from typing import Any

import triton
import triton.language as tl

from fedkseed.noise import box_muller as bm
from fedkseed.noise.philox import MULTIPLIERS, ROUNDS, WEYL

COLUMNS = 6
OUT, BASE, START, SIZE, TENSOR, FIRST_TILE = range(COLUMNS)
"""Columns of the work table, int64: addresses of the first elements, the slot's first position in its tensor, its number
of elements, the tensor's id, and how many tiles come before it."""
PAGE_COLUMNS = 4
TABLE, KEY, BLOCK_BITS = SEEDS, COUNT, _ = range(3)
"""Columns of what a sweep knows of its mixtures, int64. Hadamard: the place of the table, in words of 64 bits from the
beginning and even, so that it lies at a multiple of 16 bytes; the pool key; b, where B = 2^b. Gaussian: the place of the
seeds, which the amounts follow, and their number."""

OPTIONS: dict[str, Any] = {"enable_fp_fusion": False, "num_warps": 4}
"""How every kernel is compiled; without the first the bits are others."""
HADAMARD_TILE, GAUSSIAN_TILE = 4096, 2048
"""Elements per program on a GPU: as many as the registers of 128 threads hold (tests/noise/test_gpu.py)."""
FOLD_TILE = 2048
"""The same of a fold: its sums are of 64 bits."""

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_COLUMNS = tl.constexpr(COLUMNS)
_OUT, _BASE, _START, _SIZE, _TENSOR, _FIRST_TILE = (tl.constexpr(column) for column in range(COLUMNS))
_PAGE_COLUMNS = tl.constexpr(PAGE_COLUMNS)
_TABLE, _KEY, _BLOCK_BITS, _SEEDS, _COUNT = (tl.constexpr(column) for column in (TABLE, KEY, BLOCK_BITS, SEEDS, COUNT))
_ROUNDS = tl.constexpr(ROUNDS)
_M0, _M1, _W0, _W1 = (tl.constexpr(word) for word in (*MULTIPLIERS, *WEYL))
_BLOCK_STREAM = tl.constexpr(0x80000000)
_LOG0, _LOG1, _LOG2, _LOG3, _LOG4, _LOG5, _LOG6, _LOG7 = (tl.constexpr(float(c)) for c in bm.LOG)
_SIN0, _SIN1, _SIN2, _SIN3 = (tl.constexpr(float(c)) for c in bm.SIN)
_COS0, _COS1, _COS2 = (tl.constexpr(float(c)) for c in bm.COS)
_TWO_LN2_HI, _TWO_LN2_LO = tl.constexpr(float(bm.TWO_LN2_HI)), tl.constexpr(float(bm.TWO_LN2_LO))
_ANGLE_STEP = tl.constexpr(float(bm.ANGLE_STEP))
_SQRT_HALF_MANTISSA = tl.constexpr(bm.SQRT_HALF_MANTISSA)


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    for _ in tl.static_range(_ROUNDS):
        h0, l0 = tl.umulhi(c0, _M0), c0 * _M0
        h1, l1 = tl.umulhi(c2, _M1), c2 * _M1
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = k0 + _W0, k1 + _W1
    return c0, c1, c2, c3


@triton.jit
def _find_row(work, rows, tile):
    """The row of the work table that a tile belongs to."""
    low, high = rows * 0, rows
    while high - low > 1:
        middle = (low + high) // 2
        below = tl.load(work + middle * _COLUMNS + _FIRST_TILE) <= tile
        low, high = tl.where(below, middle, low), tl.where(below, high, middle)
    return work + low * _COLUMNS


@triton.jit
def _low(x):
    return x.to(tl.uint32)


@triton.jit
def _high(x):
    return (x >> 32).to(tl.uint32)


@triton.jit
def _pointers(address, at, offsets, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to elements at + offsets from an address; half-precision numbers are seen as words of 16 bits."""
    if KIND == tl.float32:
        first = (address + at * 4).to(tl.pointer_type(tl.float32))
    else:
        first = (address + at * 2).to(tl.pointer_type(tl.uint16))
    if ALIGNED:
        first = tl.multiple_of(first, 16)
    return first + offsets


@triton.jit
def _read(address, at, offsets, left, TILE: tl.constexpr, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """Elements at + offsets at the address, in binary32. They are read once, so they are the first to leave the cache."""
    pointers = _pointers(address, at, offsets, KIND, ALIGNED)
    if left >= TILE:  # a mask would keep the loads from being as wide as they can be
        stored = tl.load(pointers, eviction_policy="evict_first")
    else:
        stored = tl.load(pointers, mask=offsets < left, other=0, eviction_policy="evict_first")
    if KIND == tl.float32:
        values = stored
    elif KIND == tl.bfloat16:
        values = (stored.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        values = stored.to(tl.float16, bitcast=True).to(tl.float32)
    return values


@triton.jit
def _write(values, address, at, offsets, left, TILE: tl.constexpr, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """Elements at + offsets at the address <- values, rounded once, to nearest even; a NaN becomes the canonical one."""
    pointers = _pointers(address, at, offsets, KIND, ALIGNED)
    if KIND == tl.float32:
        stored = values
    elif KIND == tl.bfloat16:
        if _INTERPRETED:  # its own conversion cuts instead of rounding
            bits = values.to(tl.uint32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        else:
            rounded = values.to(tl.bfloat16).to(tl.uint16, bitcast=True)
        stored = tl.where(values == values, rounded, 0x7FC0).to(tl.uint16)
    else:
        rounded = values.to(tl.float16).to(tl.uint16, bitcast=True)
        stored = tl.where(values == values, rounded, 0x7E00).to(tl.uint16)
    if left >= TILE:
        tl.store(pointers, stored)
    else:
        tl.store(pointers, stored, mask=offsets < left)


@triton.jit(do_not_specialize=["pages"])
def hadamard_sweep(
    work,
    rows,
    mixtures,
    pages,
    OUT: tl.constexpr,
    BASE: tl.constexpr,
    ALIGNED: tl.constexpr,
    SEVERAL: tl.constexpr,
    TILE: tl.constexpr,
):
    """`out[i] <- cast(widen(base[i]) + (-1)^s(b, j) A[j xor r(b)])` on one tile; of several pages, added in their order.

    A row of the tile holds eight elements, a byte of signs: the upper bits of the shift move the address of an aligned
    octet of the table, and its low three bits permute the octet, so that the look-up loads are as wide as they can be.

    Args:
        work: int64[number of slots, COLUMNS], see `COLUMNS`.
        rows: the row of each tile, int32[number of tiles].
        mixtures: int64[pages, PAGE_COLUMNS], see `PAGE_COLUMNS`, then the tables A, float32[B], each padded to whole words.
        pages: number of mixtures.
        OUT: type of the results: float32, float16 or bfloat16.
        BASE: type of the base values, or None where there are none.
        ALIGNED: whether all outputs and bases begin at multiples of 16 bytes.
        SEVERAL: whether there is more than one page.
        TILE: elements per program, a power of two from 128 to QUANTUM.
    """
    WIDTH: tl.constexpr = 4 if OUT == tl.float32 or BASE == tl.float32 else 8
    ROWS: tl.constexpr = TILE // WIDTH
    row = work + tl.load(rows + tl.program_id(0)).to(tl.int64) * _COLUMNS
    at = (tl.program_id(0) - tl.load(row + _FIRST_TILE)) * TILE
    left = tl.load(row + _SIZE) - at
    offsets = tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    if BASE is not None:
        values = _read(tl.load(row + _BASE), at, offsets, left, TILE, BASE, ALIGNED)
    position = tl.load(row + _START) + at
    tensor = tl.load(row + _TENSOR)
    noise = _hadamard_noise(mixtures, 0, position, tensor, TILE, WIDTH)
    if BASE is not None:
        values = values + noise
    else:
        values = noise
    if SEVERAL:
        for page in range(1, pages):
            values += _hadamard_noise(mixtures, page, position, tensor, TILE, WIDTH)
    _write(values, tl.load(row + _OUT), at, offsets, left, TILE, OUT, ALIGNED)


@triton.jit
def _hadamard_noise(mixtures, page, position, tensor, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """`(-1)^s(b, j) A[j xor r(b)]` of one page for the elements from a position on, float32[TILE / WIDTH, WIDTH]."""
    ROWS: tl.constexpr = TILE // WIDTH
    facts = mixtures + page * _PAGE_COLUMNS
    table = (mixtures + tl.multiple_of(tl.load(facts + _TABLE), 2)).to(tl.pointer_type(tl.float32))
    key, block_bits = tl.load(facts + _KEY), tl.load(facts + _BLOCK_BITS).to(tl.int32)
    k0, k1, t0, t1 = _low(key), _high(key), _low(tensor), _high(tensor)

    # one Philox call for the signs of each chunk of 128 elements, and one for the shift of its block
    chunk = (position >> 7).to(tl.uint32) + tl.arange(0, TILE // 128).to(tl.uint32)
    chunk_bits = (block_bits - 7).to(tl.uint32)
    block = chunk >> chunk_bits
    r0, r1, r2, r3 = _philox(chunk - (block << chunk_bits), block, t0, t1, k0, k1)
    shift, _, _, _ = _philox(tl.full([TILE // 128], _BLOCK_STREAM, tl.uint32), block, t0, t1, k0, k1)
    words = tl.join(tl.join(r0, r2), tl.join(r1, r3)).reshape(TILE // 32)

    # to rows
    columns = tl.arange(0, WIDTH)
    line = tl.arange(0, ROWS).to(tl.uint32)
    word = _repeat(words, 32 // WIDTH, ROWS) >> (line % (32 // WIDTH) * WIDTH)
    shift = _repeat(shift, 128 // WIDTH, ROWS)
    entry = (((position & 0xFFFFFFFF).to(tl.uint32) + line * WIDTH) ^ shift) & ((1 << block_bits) - 1).to(tl.uint32)
    entries = tl.load(table + (entry.to(tl.int32) // WIDTH * WIDTH)[:, None] + columns[None, :])
    entries = _permute(entries, shift, ROWS, WIDTH)
    signs = (word[:, None] << (31 - columns.to(tl.uint32))[None, :]) & 0x80000000
    return (entries.to(tl.uint32, bitcast=True) ^ signs).to(tl.float32, bitcast=True)


@triton.jit
def _repeat(x, TIMES: tl.constexpr, LENGTH: tl.constexpr):
    """Each element of x so many times in a row: a vector of that length."""
    return tl.broadcast_to(x[:, None], [LENGTH // TIMES, TIMES]).reshape(LENGTH)


@triton.jit
def _exchange(a, b, swap):
    return tl.where(swap, b, a), tl.where(swap, a, b)


@triton.jit
def _permute(entries, shift, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """entries[i, l xor (shift[i] mod WIDTH)], for entries of shape [ROWS, WIDTH]: exchanges within a thread's registers."""
    one, two, four = (shift & 1) != 0, (shift & 2) != 0, (shift & 4) != 0
    if WIDTH == 4:
        even, odd = tl.split(entries.reshape(ROWS, 2, 2))
        a0, a2 = tl.split(even)
        a1, a3 = tl.split(odd)
        a0, a1, a2, a3 = _exchange_four(a0, a1, a2, a3, one, two)
        exchanged = tl.join(tl.join(a0, a2), tl.join(a1, a3))
    else:
        even, odd = tl.split(entries.reshape(ROWS, 2, 2, 2))
        even0, even2 = tl.split(even)
        odd1, odd3 = tl.split(odd)
        a0, a4 = tl.split(even0)
        a2, a6 = tl.split(even2)
        a1, a5 = tl.split(odd1)
        a3, a7 = tl.split(odd3)
        a0, a1, a2, a3 = _exchange_four(a0, a1, a2, a3, one, two)
        a4, a5, a6, a7 = _exchange_four(a4, a5, a6, a7, one, two)
        a0, a4 = _exchange(a0, a4, four)
        a1, a5 = _exchange(a1, a5, four)
        a2, a6 = _exchange(a2, a6, four)
        a3, a7 = _exchange(a3, a7, four)
        even = tl.join(tl.join(a0, a4), tl.join(a2, a6))
        odd = tl.join(tl.join(a1, a5), tl.join(a3, a7))
        exchanged = tl.join(even, odd)
    return exchanged.reshape(ROWS, WIDTH)


@triton.jit
def _exchange_four(a0, a1, a2, a3, one, two):
    a0, a1 = _exchange(a0, a1, one)
    a2, a3 = _exchange(a2, a3, one)
    a0, a2 = _exchange(a0, a2, two)
    a1, a3 = _exchange(a1, a3, two)
    return a0, a1, a2, a3


@triton.jit
def _box_muller(r, r2):
    """Two standard normal values from two words, in binary32 without fused operations (docs/noise.md)."""
    v = ((r >> 9) * 2 + 1).to(tl.int32, bitcast=True).to(tl.float32).to(tl.uint32, bitcast=True)
    mantissa = v & 0x7FFFFF
    halve = (mantissa > _SQRT_HALF_MANTISSA).to(tl.uint32)
    exponent = (v >> 23) - 127 + halve
    x = (mantissa | ((127 - halve) << 23)).to(tl.float32, bitcast=True) - 1.0
    square = x * x
    low = (_LOG3 * x + _LOG2) * square + (_LOG1 * x + _LOG0)
    high = (_LOG7 * x + _LOG6) * square + (_LOG5 * x + _LOG4)
    poly = high * (square * square) + low
    log1p = (square * x * poly - square * 0.5) + x
    n = (24 - exponent).to(tl.int32, bitcast=True).to(tl.float32)
    rad = tl.sqrt_rn(n * _TWO_LN2_HI + (n * _TWO_LN2_LO - 2.0 * log1p))
    quarter = (r2 + (1 << 29)) >> 30
    theta = (r2 - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float32) * _ANGLE_STEP
    s = theta * theta
    sine = theta * s * ((_SIN3 * s + _SIN2) * (s * s) + (_SIN1 * s + _SIN0)) + theta
    cosine = (s * s * ((_COS2 * s + _COS1) * s + _COS0) - s * 0.5) + 1.0
    odd = (quarter & 1) != 0
    cos_sign = ((quarter + 1) & 2) << 30
    sin_sign = (quarter & 2) << 30
    z = tl.where(odd, sine, cosine).to(tl.uint32, bitcast=True) ^ cos_sign
    z2 = tl.where(odd, cosine, sine).to(tl.uint32, bitcast=True) ^ sin_sign
    return rad * z.to(tl.float32, bitcast=True), rad * z2.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["pages"])
def gaussian_sweep(
    work,
    rows,
    mixtures,
    pages,
    OUT: tl.constexpr,
    BASE: tl.constexpr,
    ALIGNED: tl.constexpr,
    SEVERAL: tl.constexpr,
    TILE: tl.constexpr,
):
    """`out[i] <- cast(widen(base[i]) + sum_m amount_m z_m[i])` on one tile; the sums stay in registers, in ascending m.

    Args:
        work: see `hadamard_sweep`, as for rows, pages and what follows them.
        rows: the row of each tile.
        mixtures: int64[pages, PAGE_COLUMNS], see `PAGE_COLUMNS`, then each page's 64-bit seed keys and its amounts, float32,
            padded to whole words.
        pages: number of mixtures.
        OUT: type of the results.
        BASE: type of the base values, or None.
        ALIGNED: whether all outputs and bases begin at multiples of 16 bytes.
        SEVERAL: whether there is more than one page.
        TILE: elements per program, a power of two of at least 4, at most QUANTUM.
    """
    row = work + tl.load(rows + tl.program_id(0)).to(tl.int64) * _COLUMNS
    at = (tl.program_id(0) - tl.load(row + _FIRST_TILE)) * TILE
    left = tl.load(row + _SIZE) - at
    position = tl.load(row + _START) + at
    tensor = tl.load(row + _TENSOR)
    values = _gaussian_noise(mixtures, 0, position, tensor, TILE)
    offsets = tl.arange(0, TILE)
    if BASE is not None:
        values = _read(tl.load(row + _BASE), at, offsets, left, TILE, BASE, ALIGNED) + values
    if SEVERAL:
        for page in range(1, pages):
            values += _gaussian_noise(mixtures, page, position, tensor, TILE)
    _write(values, tl.load(row + _OUT), at, offsets, left, TILE, OUT, ALIGNED)


@triton.jit
def _gaussian_noise(mixtures, page, position, tensor, TILE: tl.constexpr):
    """`sum_m amount_m z_m[i]` of one page for the elements from a position on, float32[TILE]."""
    facts = mixtures + page * _PAGE_COLUMNS
    seeds, count = mixtures + tl.load(facts + _SEEDS), tl.load(facts + _COUNT).to(tl.int32)
    amounts = (seeds + count).to(tl.pointer_type(tl.float32))
    t0, t1 = _low(tensor), _high(tensor)
    quad = (position >> 2).to(tl.uint32) + tl.arange(0, TILE // 4).to(tl.uint32)
    zero = tl.zeros_like(quad)
    cosines = tl.zeros([TILE // 4, 2], tl.float32)  # of a quad's two pairs
    sines = cosines
    for m in range(count):
        seed, amount = tl.load(seeds + m), tl.load(amounts + m)
        r0, r1, r2, r3 = _philox(quad, zero, t0, t1, _low(seed), _high(seed))
        z, z2 = _box_muller(tl.join(r0, r2), tl.join(r1, r3))
        cosines, sines = cosines + amount * z, sines + amount * z2
    return tl.join(cosines, sines).reshape(TILE)


@triton.jit(do_not_specialize=["rows", "steps", "lanes", "key_low", "key_high", "block_bits"])
def hadamard_fold(
    work,
    rows,
    steps,
    lanes,
    partial,
    key_low,
    key_high,
    block_bits,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    SMALL: tl.constexpr,
    TILE: tl.constexpr,
):
    """`partial[lane, e] += sum of (-1)^s(b, j) g[i] where j xor r(b) = e`, for the entries e of one tile of the table.

    A step is a span of max(B, TILE) elements of a slot's base, from which the program takes those TILE that belong to its
    entries: again the upper bits of the shift move an address, and its lowest permute what has been read. A table smaller
    than TILE lies in it several times, once for each block of a span.

    Args:
        work: int64[rows, COLUMNS], see `COLUMNS`; the bases are read, and steps stand for tiles.
        rows: number of slots.
        steps: number of steps of all slots together.
        lanes: the parts that the steps are cut into, one program each for every tile of the table.
        partial: float64[at least lanes, max(B, TILE)].
        key_low: the pool key's halves, as signed words.
        key_high: see key_low.
        block_bits: B = 2^block_bits, at least 128.
        KIND: type of the gradients: float32, float16 or bfloat16.
        ALIGNED: whether all of them begin at multiples of 16 bytes.
        SMALL: whether B < TILE.
        TILE: entries per program, a power of two from 128 to QUANTUM.
    """
    WIDTH: tl.constexpr = 4 if KIND == tl.float32 else 8
    ROWS: tl.constexpr = TILE // WIDTH
    CHUNKS: tl.constexpr = TILE // 128
    part, lane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    step, stop = lane * steps // lanes, (lane + 1) * steps // lanes
    row = _find_row(work, rows, step)
    k0, k1 = key_low.to(tl.uint32, bitcast=True), key_high.to(tl.uint32, bitcast=True)
    in_block = ((1 << block_bits) - 1).to(tl.uint32)
    chunk_bits = (block_bits - 7).to(tl.uint32)
    columns = tl.arange(0, WIDTH)
    line = tl.arange(0, ROWS).to(tl.uint32) * WIDTH
    chunk = tl.arange(0, CHUNKS).to(tl.uint32)
    span = tl.num_programs(0) * TILE
    total = tl.zeros([ROWS, WIDTH], tl.float64)
    while step < stop:
        first, size = tl.load(row + _FIRST_TILE), tl.load(row + _SIZE)
        start, base, tensor = tl.load(row + _START), tl.load(row + _BASE), tl.load(row + _TENSOR)
        t0, t1 = _low(tensor), _high(tensor)
        end = tl.minimum(stop, first + (size + span - 1) // span)
        for s in range(step, end):
            at = (s - first) * span
            block = ((start + at) >> block_bits).to(tl.uint32)
            if SMALL:
                blocks = block + (chunk >> chunk_bits)
                shift, _, _, _ = _philox(tl.full([CHUNKS], _BLOCK_STREAM, tl.uint32), blocks, t0, t1, k0, k1)
                shift = shift & in_block
                place = chunk & (in_block >> 7)
                line_shift = _repeat(shift, 128 // WIDTH, ROWS)
            else:
                blocks = tl.full([CHUNKS], 0, tl.uint32) + block
                shift, _, _, _ = _philox(tl.full([], _BLOCK_STREAM, tl.uint32), block, t0, t1, k0, k1)
                shift = shift & in_block
                tile = (part * TILE).to(tl.uint32) ^ (shift // TILE * TILE)
                at += tile.to(tl.int64)
                place = chunk + (tile >> 7)
                shift = shift % TILE
                line_shift = shift
            # the signs of each chunk that is read, its words in the order of the entries
            r0, r1, r2, r3 = _philox(place ^ (shift >> 7), blocks, t0, t1, k0, k1)
            r0, r1, r2, r3 = _exchange_four(r0, r1, r2, r3, (shift & 32) != 0, (shift & 64) != 0)
            words = tl.join(tl.join(r0, r2), tl.join(r1, r3)).reshape(TILE // 32)

            source = line ^ line_shift
            word = _repeat(words, 32 // WIDTH, ROWS) >> (source % 32 // WIDTH * WIDTH)
            offsets = (source.to(tl.int32) // WIDTH * WIDTH)[:, None] + columns[None, :]
            values = _read(base, at, offsets, size - at, TILE, KIND, ALIGNED)
            signs = (word[:, None] << (31 - columns.to(tl.uint32))[None, :]) & 0x80000000
            values = (values.to(tl.uint32, bitcast=True) ^ signs).to(tl.float32, bitcast=True)
            total += _permute(values, line_shift, ROWS, WIDTH).to(tl.float64)
        step = end
        row += _COLUMNS
    entries = partial + (lane * span + part * TILE) + (line.to(tl.int32)[:, None] + columns[None, :])
    tl.store(entries, tl.load(entries) + total)


@triton.jit(do_not_specialize=["rows", "steps", "lanes"])
def gaussian_fold(
    work,
    rows,
    steps,
    lanes,
    partial,
    seeds,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    """`partial[lane, m] += sum_i g[i] z_m[i]` over the lane's steps, for one seed m.

    Args:
        work: see `hadamard_fold`, as for rows, steps (of TILE elements), lanes, KIND and ALIGNED.
        rows: number of slots.
        steps: number of steps of all slots together.
        lanes: the parts that the steps are cut into.
        partial: float64[at least lanes, number of seeds].
        seeds: 64-bit seed keys, int64[number of seeds].
        KIND: type of the gradients.
        ALIGNED: whether all of them begin at multiples of 16 bytes.
        TILE: elements per step, a power of two of at least 4, at most QUANTUM.
    """
    m, lane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    step, stop = lane * steps // lanes, (lane + 1) * steps // lanes
    row = _find_row(work, rows, step)
    seed = tl.load(seeds + m)
    offsets = tl.arange(0, TILE)
    total = tl.zeros([TILE // 4, 2], tl.float64)  # of a quad's two pairs
    while step < stop:
        first, size = tl.load(row + _FIRST_TILE), tl.load(row + _SIZE)
        start, base, tensor = tl.load(row + _START), tl.load(row + _BASE), tl.load(row + _TENSOR)
        t0, t1 = _low(tensor), _high(tensor)
        end = tl.minimum(stop, first + (size + TILE - 1) // TILE)
        for s in range(step, end):
            at = (s - first) * TILE
            quad = ((start + at) >> 2).to(tl.uint32) + tl.arange(0, TILE // 4).to(tl.uint32)
            r0, r1, r2, r3 = _philox(quad, tl.zeros_like(quad), t0, t1, _low(seed), _high(seed))
            z, z2 = _box_muller(tl.join(r0, r2), tl.join(r1, r3))
            g, g2 = tl.split(_read(base, at, offsets, size - at, TILE, KIND, ALIGNED).reshape(TILE // 4, 2, 2))
            total += g.to(tl.float64) * z.to(tl.float64) + g2.to(tl.float64) * z2.to(tl.float64)
        step = end
        row += _COLUMNS
    entry = partial + lane * tl.num_programs(0) + m
    tl.store(entry, tl.load(entry) + tl.sum(tl.sum(total, 1), 0))
