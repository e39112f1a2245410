"""The ledger's format 3, pages that differ: every bit comes back, damage is named in one line, the format by hand."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save
from tests.support.changes import BASE

import fedkseed as fk
from fedkseed.errors import LedgerError
from fedkseed.federation.envelope import MAX_NUMBERS
from fedkseed.kseed.coding import BITS, encode
from fedkseed.kseed.ledger import Ledger
from fedkseed.kseed.pages import Page

SIZES = {"hadamard": (1, 7, 128), "gaussian": (5,)}


@st.composite
def pages(draw: st.DrawFn) -> Page:
    family = draw(st.sampled_from(list(SIZES)))
    size = draw(st.sampled_from(SIZES[family]))
    basis = draw(st.sampled_from(["table", "coefficients"])) if size == 128 else "coefficients"
    movement: Any = draw(st.sampled_from(["absolute", "proportional"]))
    wire, rng = draw(st.sampled_from(list(BITS))), np.random.default_rng(draw(st.integers(0, 99)))
    parts = tuple(encode(0.01 * rng.standard_normal(size), wire) for _ in range(draw(st.integers(0, 3))))
    return Page(fk.SeedPool(draw(st.integers(0, 2**64 - 1)), size, family), basis, movement, parts, draw(scales))  # type: ignore[arg-type]


scales = st.sampled_from([1.0, 0.5, -1.0, 1 / 3, 1e-300, 0.0])


@given(st.lists(pages(), min_size=1, max_size=4))
def test_a_ledger_of_any_pages_comes_back(some: list[Page]) -> None:
    ledger = Ledger.of_pages(BASE, 5, some, some[0].wire, None)
    loaded = Ledger.decode(ledger.encode())
    assert loaded.encode() == ledger.encode()
    assert loaded.digest() == ledger.digest()
    fields = [[(p.pool, p.basis, p.movement, p.parts, p.scale) for p in x.pages] for x in (loaded, ledger)]
    assert fields[0] == fields[1]
    assert loaded.coefficients.tobytes() == ledger.coefficients.tobytes()


def test_format_2_is_written_wherever_it_can_say_it() -> None:
    """So that what adds up to a run's form is read by older versions; one thing that differs makes it format 3."""

    def written(*some: Page, wire: str = "int4") -> int:
        data = Ledger.of_pages(BASE, 5, some, wire, None).encode()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        found: int = json.loads(header["__metadata__"]["fedkseed"])["format"]
        return found

    part = (encode(np.arange(128.0), "int4"),)
    first = Page(fk.SeedPool(1, 128), "table", "absolute", part)
    empty = Page(fk.SeedPool(2, 128), "table", "absolute")
    assert written(first, empty) == written(first) == 2
    others = [
        Page(fk.SeedPool(2, 128), "table", "absolute", part, 0.5),
        Page(fk.SeedPool(2, 128), "coefficients", "absolute", part),
        Page(fk.SeedPool(2, 128), "table", "proportional", part),
        Page(fk.SeedPool(2, 128), "table", "absolute", (encode(np.arange(128.0), "int8"),)),
        Page(fk.SeedPool(2, 256), "table", "absolute"),
        Page(fk.SeedPool(2, 128, "gaussian"), "coefficients", "absolute"),
    ]
    assert [written(first, other) for other in others] == [3] * len(others)


# --- By hand ---


def plain() -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Metadata and tensors of two pages that have nothing in common, as their file has them."""
    metadata: dict[str, Any] = {
        "format": 3,
        "base": {"fingerprint": "ab" * 32, "frozen": ["norm"]},
        "round": 3,
        "pages": [
            {"key": "00000000000000ff", "size": 3, "family": "gaussian", "basis": "coefficients", "movement": "proportional",
             "wire": "int2", "parts": 2, "scale": -0.5},
            {"key": "0000000000000001", "size": 2, "family": "hadamard", "basis": "coefficients", "movement": "absolute",
             "wire": "float32", "parts": 1, "scale": 2.0},
        ],
    }  # fmt: skip
    tensors: dict[str, NDArray[Any]] = {
        "base_digests": np.array([1, 2], "<u4"),
        "steps": np.array([1.0, 0.5, 1.0], "<f4"),
        "numbers": np.frombuffer(bytes([0b00011000, 0b11111100]) + np.array([1.5, -3], "<f4").tobytes(), np.uint8),
    }
    return metadata, tensors


def write_by_hand(metadata: Any, tensors: dict[str, NDArray[Any]]) -> bytes:
    return save(tensors, metadata={"fedkseed": json.dumps(metadata)})


def test_a_ledger_written_by_hand() -> None:
    """What was published once must stay readable: the format is these names, types and units."""
    ledger = Ledger.decode(write_by_hand(*plain()))
    assert (ledger.round, ledger.precision, ledger.history, ledger.state) == (3, "mixed", None, None)
    first, second = ledger.pages
    assert (first.pool, first.basis, first.movement) == (fk.SeedPool(255, 3, "gaussian"), "coefficients", "proportional")
    assert (second.pool, second.basis, second.movement) == (fk.SeedPool(1, 2), "coefficients", "absolute")
    assert first.numbers().tolist() == [-0.5 * x for x in (-0.75, 0.25, 1.25)]
    assert second.numbers().tolist() == [3, -6]
    metadata = json.loads(json.dumps(plain()[0]))
    data = ledger.encode()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert json.loads(header["__metadata__"]["fedkseed"]) == metadata


def damaged(at: str, value: Any) -> bytes:
    metadata, tensors = plain()
    if at in tensors:
        tensors[at] = value
    elif at.startswith("pages."):
        _, index, name = at.split(".")
        page = metadata["pages"][int(index)]
        page.pop(name)
        page |= {} if value is None else {name: value}
    else:
        metadata[at] = value
    return write_by_hand(metadata, tensors)


FIELDS = ("key", "size", "family", "basis", "movement", "wire", "parts", "scale")
DAMAGE: list[tuple[str, Any]] = [
    *[(f"pages.1.{name}", None) for name in FIELDS],
    *[(f"pages.0.{name}", value) for name in FIELDS for value in ([], {}, "x", -1, True, 10**40)],
    *[("pages.0.scale", value) for value in (math.nan, math.inf, -math.inf, 1, "1.0")],
    *[("pages.1.scale", value) for value in (1e300, -2e38)],
    *[("pages.0.size", value) for value in (9, 5, 3.0, 65537)],
    *[("pages.0.basis", "table"), ("pages.1.basis", "table"), ("pages.0.wire", "int4"), ("pages.1.wire", "float16")],
    *[("pages.0.parts", value) for value in (1, 3, 2.0, 10**9)],
    *[("pages", value) for value in ([], {}, "pages", 1, [1], [[]], [{}])],
    *[("steps", np.array([1.0, value, 1.0], "<f4")) for value in (np.nan, np.inf, -1.0)],
    ("steps", np.ones(2, "<f4")),
    ("numbers", np.zeros(9, np.uint8)),
    ("numbers", np.frombuffer(bytes(2) + np.array([np.nan, 1], "<f4").tobytes(), np.uint8)),
    ("round", -1),
    ("base", 1),
]


@pytest.mark.parametrize(("at", "value"), DAMAGE, ids=[f"{i}-{at}" for i, (at, _) in enumerate(DAMAGE)])
def test_damaged_content_is_refused(tmp_path: Path, at: str, value: Any) -> None:
    (tmp_path / "l").write_bytes(damaged(at, value))
    with pytest.raises(LedgerError, match="damaged") as caught:
        Ledger.load(tmp_path / "l")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_pages_without_parts_that_would_fill_the_memory_are_refused() -> None:
    """Sixty bytes of a file must not become a quarter of a megabyte each."""
    metadata, tensors = plain()
    empty = metadata["pages"][0] | {"size": 65536, "parts": 0}
    count = MAX_NUMBERS // 65536
    metadata["pages"] += [empty] * (count + 1)
    with pytest.raises(LedgerError, match=f"{count + 3} pages hold 16,842,757 numbers; a ledger has at most 16,777,216"):
        Ledger.decode(write_by_hand(metadata, tensors))


@given(st.integers(0, 10**6), st.integers(1, 255))
def test_no_flipped_bits_do_worse_than_an_error(at: int, flip: int) -> None:
    data = bytearray(write_by_hand(*plain()))
    data[at % len(data)] ^= flip
    with contextlib.suppress(LedgerError):
        loaded = Ledger.decode(bytes(data))
        assert all(np.isfinite(page.coefficients()).all() for page in loaded.pages)
