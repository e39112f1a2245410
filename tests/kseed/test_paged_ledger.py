"""The ledger's format 2, pages: every bit comes back, damage is named in one line, the format by hand."""

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save
from tests.support.changes import BASE, play, server

import fedkseed as fk
from fedkseed.errors import InvalidValueError, LedgerError
from fedkseed.federation.optimizer import OPTIMIZERS
from fedkseed.kseed.coding import BITS, Coded, coded_bytes, encode
from fedkseed.kseed.ledger import Ledger
from fedkseed.kseed.pages import Page, pages_digest

wires = pytest.mark.parametrize("wire", BITS)
K = 128


def some_ledger(
    wire: str = "int4", pages: tuple[int, ...] = (2, 0, 3), basis: Any = "table", movement: Any = "absolute", **state: Any
) -> Ledger:
    rng = np.random.default_rng(len(wire))
    made = [
        Page(
            fk.SeedPool(2**64 - 1 - i, K), basis, movement, tuple(encode(0.01 * rng.standard_normal(K), wire) for _ in range(n))
        )
        for i, n in enumerate(pages)
    ]
    return Ledger.of_pages(BASE, 5, made, wire, state or {"numbers": rng.standard_normal(K), "mean": rng.standard_normal(K)})


def content(ledger: Ledger) -> list[Any]:
    """Every bit and type, without the digest."""
    state = {name: (x.dtype.str, x.shape, x.tobytes()) for name, x in (ledger.state or {}).items()}
    about = [ledger.pool, ledger.base.fingerprint, ledger.base.frozen, ledger.base.digests.tobytes(), ledger.precision]
    pages = [(page.pool, page.basis, page.movement, page.parts) for page in ledger.pages]
    return [*about, ledger.round, ledger.coefficients.tobytes(), ledger.history, pages, state]


# --- Files ---


@wires
@pytest.mark.parametrize("pages", [(0,), (1,), (1, 1, 0), (4, 2)], ids=str)
@pytest.mark.parametrize("published", [False, True], ids=["checkpoint", "published"])
def test_a_ledger_comes_back_from_its_file(tmp_path: Path, wire: str, pages: tuple[int, ...], published: bool) -> None:
    ledger = some_ledger(wire, pages)
    ledger = ledger.published() if published else ledger
    ledger.save(tmp_path / "ledger.safetensors")
    loaded = Ledger.load(tmp_path / "ledger.safetensors")
    assert content(loaded) == content(ledger)
    assert loaded.digest() == ledger.digest()
    assert loaded.encode() == ledger.encode() == (tmp_path / "ledger.safetensors").read_bytes()
    assert pages_digest(loaded.pages) == pages_digest(ledger.pages)
    assert loaded.is_checkpoint == (not published)


@settings(max_examples=20)
@given(data=st.data())
def test_a_runs_ledger_comes_back(data: st.DataObject) -> None:
    """Of any settings, after any number of rounds."""
    wire, every = data.draw(st.sampled_from(list(BITS))), data.draw(st.integers(0, 3))
    optimizer, basis = data.draw(st.sampled_from(list(OPTIMIZERS))), data.draw(st.sampled_from(["table", "coefficients"]))
    a_server = server(
        wire=wire, rounds_per_page=every, server_optimizer=optimizer, basis=basis,
        num_seeds=K if basis == "table" else data.draw(st.sampled_from([1, 7, 130])), server_lr=0.1,
    )  # fmt: skip
    play(a_server, data.draw(st.integers(0, 5)))
    arrived = Ledger.decode(a_server.ledger.encode())
    assert content(arrived) == content(a_server.ledger)
    published = Ledger.decode(a_server.ledger.published().encode())
    assert content(published) == content(a_server.ledger.published())
    assert published.coefficients.tobytes() == a_server.ledger.coefficients.tobytes()


def test_one_metadata_entry_of_canonical_json(tmp_path: Path) -> None:
    import safetensors

    some_ledger().save(tmp_path / "l")
    with safetensors.safe_open(tmp_path / "l", "np") as file:
        metadata = file.metadata()
    assert list(metadata) == ["fedkseed"]
    found = json.loads(metadata["fedkseed"])
    assert json.dumps(found, sort_keys=True, separators=(",", ":")) == metadata["fedkseed"]
    assert found == {
        "format": 2,
        "pool": {"size": K, "family": "hadamard"},
        "base": {"fingerprint": BASE.fingerprint, "frozen": []},
        "precision": "int4",
        "round": 5,
        "basis": "table",
        "movement": "absolute",
        "pages": [
            {"key": "ffffffffffffffff", "parts": 2},
            {"key": "fffffffffffffffe", "parts": 0},
            {"key": "fffffffffffffffd", "parts": 3},
        ],
    }
    tensors = load_file(tmp_path / "l")
    assert {name: (x.dtype.str, x.shape) for name, x in tensors.items()} == {
        "base_digests": ("<u4", (2,)),
        "steps": ("<f4", (5,)),
        "numbers": ("|u1", (5 * K // 2,)),
        "state.numbers": ("<f8", (K,)),
        "state.mean": ("<f8", (K,)),
    }


@pytest.mark.parametrize(
    ("size", "wire", "pages", "most"),
    [
        (65536, "sign", (1,) * 10, 85_000),
        (4096, "float16", (1,), 11_500),
        (4096, "sign", (10,) * 4, 24_500),
        (4096, "int8", (1,) * 10, 44_500),
    ],
)
def test_a_published_ledger_keeps_to_its_size(size: int, wire: str, pages: tuple[int, ...], most: int) -> None:
    """The numbers, at most 60 bytes for each page and 4 for each part, 4 for each of 272 tensors, and 600."""
    base = fk.Ledger.start(fk.SeedPool(0, 1), BASE, "float32").base
    base = replace(base, digests=np.arange(272, dtype=np.uint32))
    made = [Page(fk.SeedPool(i, size), "table", "absolute", (encode(np.ones(size), wire),) * n) for i, n in enumerate(pages)]
    found = len(Ledger.of_pages(base, 40, made, wire, {"numbers": np.zeros(size)}).published().encode())
    assert found <= most
    assert found <= sum(pages) * (coded_bytes(size, wire) + 4) + 60 * len(pages) + 4 * 272 + 600


def test_a_page_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    (page,) = some_ledger(pages=(3,)).pages
    first = page.coefficients()
    monkeypatch.setattr(Coded, "decode", None)
    assert page.closed().coefficients is first is page.coefficients()
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1


def test_published_holds_no_state() -> None:
    ledger = some_ledger()
    assert ledger.published().state is None
    other = replace(ledger, state={"numbers": np.ones(K), "mean": np.zeros(K)})
    assert other.published().encode() == ledger.published().encode()
    assert other.digest() != ledger.digest()


# --- Digests ---

CHANGES: dict[str, Callable[[Ledger], Ledger]] = {
    "round": lambda x: replace(x, round=6),
    "fingerprint": lambda x: replace(x, base=replace(x.base, fingerprint="0" * 64)),
    "frozen": lambda x: replace(x, base=replace(x.base, frozen=("w",))),
    "key": lambda x: paged(x, lambda page: replace(page, pool=replace(page.pool, key=1))),
    "movement": lambda x: replace(x, pages=tuple(replace(page, movement="proportional") for page in x.pages)),
    "basis": lambda x: of_other_pages(x, [replace(page, basis="coefficients") for page in x.pages]),
    "a part less": lambda x: paged(x, lambda page: replace(page, parts=page.parts[:-1])),
    "a part's step": lambda x: paged(x, lambda page: replace(page, parts=(stepped(page.parts[0]), *page.parts[1:]))),
    "a part's bit": lambda x: paged(x, lambda page: replace(page, parts=(flipped(page.parts[0]), *page.parts[1:]))),
    "a page less": lambda x: replace(x, pages=x.pages[1:]),
    "pages in another order": lambda x: of_other_pages(x, x.pages[::-1]),
    "a number of the state": lambda x: replace(x, state={**(x.state or {}), "mean": np.nextafter((x.state or {})["mean"], 9)}),
    "a column less": lambda x: replace(x, state={"numbers": (x.state or {})["numbers"]}),
}


def of_other_pages(ledger: Ledger, pages: Sequence[Page]) -> Ledger:
    return Ledger.of_pages(ledger.base, ledger.round, pages, ledger.precision, ledger.state)


def paged(ledger: Ledger, change: Callable[[Page], Page]) -> Ledger:
    return replace(ledger, pages=(change(ledger.pages[0]), *ledger.pages[1:]))


def stepped(part: Coded) -> Coded:
    return replace(part, step=float(np.nextafter(np.float32(part.step), np.float32(9))))


def flipped(part: Coded) -> Coded:
    return replace(part, numbers=part.numbers[:-1] + bytes([part.numbers[-1] ^ 1]))


@pytest.mark.parametrize("name", CHANGES)
def test_the_digest_sees_every_field(name: str) -> None:
    ledger = some_ledger()
    other = CHANGES[name](ledger)
    assert some_ledger().digest() == ledger.digest()
    assert other.digest() != ledger.digest()
    assert other.encode() != ledger.encode()
    pages_alike = name in ("round", "fingerprint", "frozen", "a number of the state", "a column less")
    assert (pages_digest(other.pages) == pages_digest(ledger.pages)) == pages_alike


# --- The format, by hand ---


def write_by_hand(metadata: Any, tensors: dict[str, NDArray[Any]]) -> bytes:
    return save(tensors, metadata={"fedkseed": json.dumps(metadata)})


def plain() -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Metadata and tensors of a checkpoint of 2 bits with K = 3, as its file has them."""
    metadata: dict[str, Any] = {
        "format": 2,
        "pool": {"size": 3, "family": "gaussian"},
        "base": {"fingerprint": "ab" * 32, "frozen": ["norm"]},
        "precision": "int2",
        "round": 3,
        "basis": "coefficients",
        "movement": "proportional",
        "pages": [{"key": "00000000000000ff", "parts": 2}, {"key": "0000000000000001", "parts": 1}],
    }
    tensors: dict[str, NDArray[Any]] = {
        "base_digests": np.array([1, 2], "<u4"),
        "steps": np.array([1.0, 0.5, 2.0], "<f4"),
        "numbers": np.array([0b00011000, 0b11111100, 0b10010100], np.uint8),
        "state.numbers": np.array([1.0, 2, 3]),
        "state.count": np.array([4.0]),
    }
    return metadata, tensors


def test_a_ledger_written_by_hand() -> None:
    """What was published once must stay readable: the format is these names, types and units."""
    ledger = Ledger.decode(write_by_hand(*plain()))
    assert ledger.pool == fk.SeedPool(1, 3, "gaussian")
    assert (ledger.round, ledger.precision, ledger.history) == (3, "int2", None)
    first, second = ledger.pages
    assert (first.pool, first.basis, first.movement) == (fk.SeedPool(255, 3, "gaussian"), "coefficients", "proportional")
    assert [part.decode(3).tolist() for part in first.parts] == [[-1.5, -0.5, 0.5], [0.75, 0.75, 0.75]]
    assert second.numbers().tolist() == [1, -1, -1]  # 2 (i - 3 / 2) of i = 2, 1, 1
    assert first.coefficients().tolist() == [-0.75, 0.25, 1.25]
    assert ledger.coefficients.tolist() == second.coefficients().tolist()
    assert {name: column.tolist() for name, column in (ledger.state or {}).items()} == {"numbers": [1, 2, 3], "count": [4]}
    for name in ("state.numbers", "state.count"):
        metadata, tensors = plain()
        del tensors[name]
        assert Ledger.decode(write_by_hand(metadata, tensors)).state is not None
    metadata, tensors = plain()
    published = {name: x for name, x in tensors.items() if not name.startswith("state.")}
    assert Ledger.decode(write_by_hand(metadata, published)).state is None


def damaged(at: str, value: Any) -> bytes:
    """One value of the metadata ("pages.0.parts") or one tensor replaced; None removes it."""
    metadata, tensors = plain()
    *parents, last = [at] if at in tensors else at.split(".")
    inner: Any = tensors if at in tensors else metadata
    for parent in parents:
        inner = inner[int(parent) if parent.isdigit() else parent]
    if value is None:
        del inner[last]
    else:
        inner[int(last) if last.isdigit() else last] = value
    return write_by_hand(metadata, tensors)


STEPS = np.array([1.0, 0.5, 2.0], "<f4")
DAMAGE: list[tuple[str, Any]] = [
    *[(key, None) for key in ("pool", "base", "precision", "round", "basis", "movement", "pages", "steps", "numbers")],
    *[(key, None) for key in ("base_digests", "pool.size", "pool.family", "base.fingerprint", "base.frozen")],
    *[(key, None) for key in ("pages.0.key", "pages.1.parts")],
    *[("pool.size", value) for value in (0, 2, 4, 5, 65537, "3", 3.0, True, [], 10**40)],
    *[("pool.family", value) for value in ("fourier", "", 1, ["gaussian"])],
    *[("pool", value) for value in ([], "pool", 1)],
    *[("base.fingerprint", value) for value in ("", "zz" * 32, 5)],
    *[("base.frozen", value) for value in ("abc", 5, [1, 2])],
    *[("precision", value) for value in ("int4", "float32", "int3", "", 2, ["int2"])],
    *[("round", value) for value in (-1, 1.5, "3", [])],
    *[("basis", value) for value in ("table", "", 1, ["table"], "rows")],
    *[("movement", value) for value in ("", 1, [], "sideways")],
    *[("pages", value) for value in ([], {}, "pages", 1, [1], ["a"], [[]], [{}], {"key": "00", "parts": 3})],
    *[("pages.0", value) for value in (1, "page", [], {})],
    *[("pages.0.key", value) for value in ("", "xyz", "-1", "1" + 16 * "0", 255, [])],
    *[("pages.0.parts", value) for value in (-1, 0, 1, 3, 2.0, 1e999, "2", [2], True, 10**30)],
    ("steps", STEPS[:2]),
    ("steps", STEPS.astype("<f8")),
    ("steps", STEPS[:, None]),
    *[("steps", np.array([1.0, value, 2.0], "<f4")) for value in (np.nan, np.inf, -1.0, 1e31)],
    ("numbers", np.zeros(2, np.uint8)),
    ("numbers", np.zeros(4, np.uint8)),
    ("numbers", np.zeros((3, 1), np.uint8)),
    ("numbers", np.zeros(3, np.int8)),
    ("base_digests", np.zeros(2, "<i4")),
    *[("state.numbers", np.array([1.0, value, 3])) for value in (np.nan, np.inf)],
    ("state.numbers", np.zeros(3, "<f4")),
    ("state.numbers", np.zeros(2)),
    ("state.numbers", np.zeros(0)),
    ("state.numbers", np.zeros((3, 1))),
    ("state.count", np.zeros(2)),
    ("state.count", np.array(4.0)),
]


def refusal(path: Path) -> str:
    """The reason why a file is refused: one short line that begins with its path."""
    with pytest.raises(LedgerError) as caught:
        Ledger.load(path)
    reason = str(caught.value)
    assert reason.startswith(f"{path}: ")
    assert "\n" not in reason
    assert len(reason) < len(str(path)) + 400
    return reason


@pytest.mark.parametrize(("at", "value"), DAMAGE, ids=[f"{i}-{at}-{value!r:.20}" for i, (at, value) in enumerate(DAMAGE)])
def test_damaged_content_is_refused(tmp_path: Path, at: str, value: Any) -> None:
    path = tmp_path / "ledger.safetensors"
    path.write_bytes(damaged(at, value))
    assert "damaged" in refusal(path)


def test_pages_without_parts_that_would_fill_the_memory_are_refused(tmp_path: Path) -> None:
    """Of a run's format too: sixty bytes of a file must not become a quarter of a megabyte each."""
    metadata, tensors = plain()
    metadata["pool"]["size"] = 65536
    metadata["pages"] += [{"key": f"{i:016x}", "parts": 0} for i in range(256)]
    (tmp_path / "l").write_bytes(write_by_hand(metadata, tensors))
    assert "numbers; a ledger has at most 16,777,216" in refusal(tmp_path / "l")


def test_counts_that_add_up_to_the_right_sum_are_damage_all_the_same(tmp_path: Path) -> None:
    metadata, tensors = plain()
    metadata["pages"][0]["parts"], metadata["pages"][1]["parts"] = -1, 4
    (tmp_path / "l").write_bytes(write_by_hand(metadata, tensors))
    assert "numbers of parts [-1, 4]" in refusal(tmp_path / "l")


def test_another_version_is_refused(tmp_path: Path) -> None:
    metadata, tensors = plain()
    (tmp_path / "l").write_bytes(write_by_hand(metadata | {"format": 5}, tensors))
    assert "ledger format is 5; this version reads 1 to 4" in refusal(tmp_path / "l")


def test_every_truncation_and_flipped_bit_of_the_header(tmp_path: Path) -> None:
    """Refused, or another ledger (its values are anyone's guess); never another exception."""
    ledger = Ledger.decode(write_by_hand(*plain()))
    data, path = ledger.encode(), tmp_path / "l"
    for size in [*range(0, len(data), 7), len(data) - 1]:
        path.write_bytes(data[:size])
        refusal(path)
    header = 8 + int.from_bytes(data[:8], "little")
    for position in range(8 * header):
        flipped_data = bytearray(data)
        flipped_data[position // 8] ^= 1 << position % 8
        with contextlib.suppress(LedgerError):
            found = Ledger.decode(bytes(flipped_data))
            assert found.digest() != ledger.digest() or found.encode() == ledger.encode()


def test_a_table_needs_a_pool_that_has_one() -> None:
    for pool in (fk.SeedPool(1, 100), fk.SeedPool(1, 64), fk.SeedPool(1, 128, "gaussian")):
        with pytest.raises(InvalidValueError, match=f"{pool.size} {pool.family} seeds have no table of as many numbers"):
            Page(pool, "table", "absolute")
        Page(pool, "coefficients", "absolute")
