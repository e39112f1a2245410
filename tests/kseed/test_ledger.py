"""The ledger and its file: every bit comes back, damage is named, and no failure or kill leaves half a file."""

import errno
import io
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from safetensors.numpy import load_file, save, save_file

import fedkseed as fk
from fedkseed.errors import InvalidValueError, LedgerError
from fedkseed.kseed.ledger_format import History
from fedkseed.kseed.rounding import PRECISIONS, Precision, rounded
from fedkseed.models.identity import BaseIdentity

precisions = pytest.mark.parametrize("precision", PRECISIONS)
forms = pytest.mark.parametrize("published", [False, True], ids=["checkpoint", "published"])
POOL = fk.SeedPool(0x0123456789ABCDEF, 8, "gaussian")


def identity(tensors: int = 3, frozen: tuple[str, ...] = ("norm",), seed: int = 0) -> BaseIdentity:
    rng = np.random.default_rng(seed)
    return BaseIdentity.of({f"t{i}": rng.bytes(32) for i in range(tensors)}, frozen)


def history(size: int, seed: int = 0) -> History:
    rng = np.random.default_rng(seed)
    return History(1e-6 * rng.standard_normal(size), np.abs(rng.standard_normal(size)), rng.integers(0, 9, size))


def some_ledger(
    precision: Precision = "float16", seed: int = 0, pool: fk.SeedPool = POOL, published: bool = False
) -> fk.Ledger:
    ledger = fk.Ledger.start(pool, identity(), precision).advance(history(pool.size, seed))
    return ledger.published() if published else ledger


def same(one: fk.Ledger, other: fk.Ledger) -> bool:
    """Whether two ledgers agree in every bit and type, without their digests."""

    def content(ledger: fk.Ledger) -> list[Any]:
        h = ledger.history
        arrays = [ledger.coefficients, ledger.base.digests, *([h.accumulators, h.grad_sums, h.grad_counts] if h else [])]
        raw = [(a.dtype.str, a.shape, a.tobytes()) for a in arrays]
        return [ledger.pool, ledger.base.fingerprint, ledger.base.frozen, ledger.precision, ledger.round, h is None, raw]

    return content(one) == content(other)


# --- Values ---


@precisions
def test_start_is_the_base_model(precision: Precision) -> None:
    ledger = fk.Ledger.start(POOL, identity(), precision)
    assert ledger.round == 0
    assert ledger.coefficients.tobytes() == bytes(4 * 8)
    assert ledger.history is not None
    assert not ledger.history.accumulators.any()
    assert not ledger.history.grad_sums.any()
    assert not ledger.history.grad_counts.any()


@precisions
def test_coefficients_are_the_rounded_accumulators(precision: Precision) -> None:
    ledger = some_ledger(precision)
    assert ledger.round == 1
    assert ledger.history is not None
    assert ledger.coefficients.dtype == np.float32
    assert ledger.coefficients.tobytes() == rounded(ledger.history.accumulators, precision).tobytes()
    assert ledger.coefficients.tolist() != ledger.history.accumulators.tolist()  # the accumulators keep more


def test_advance_leaves_the_old_ledger_alone() -> None:
    ledger = some_ledger()
    before = ledger.digest()
    after = ledger.advance(history(8, 5))
    assert ledger.digest() == before != after.digest()
    assert after.round == 2
    with pytest.raises(FrozenInstanceError):
        ledger.round = 7  # type: ignore[misc]


def test_accumulators_that_no_precision_holds_are_refused() -> None:
    with pytest.raises(InvalidValueError):
        some_ledger().advance(replace(history(8), accumulators=np.full(8, np.nan)))


# --- By hand ---


def linear(seed: int = 0) -> torch.nn.Linear:
    model = torch.nn.Linear(6, 5)
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw)
    return model


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_a_loop_of_ones_own_can_save_what_it_found(tmp_path: Path, kind: Callable[[Any], Any]) -> None:
    """Through the file to another copy of the base model, to the bit; also a number that float16 does not hold."""
    bound = fk.bind(linear(), POOL)
    a = [0.5, 0.0, -3.0, float(np.float32(0.1)), 0.0, 2.0**-40, 1e4, -0.25]
    bound.rebuild(a)
    ledger = fk.Ledger.of(bound, kind(a), round=3)
    assert (ledger.round, ledger.history, ledger.precision, ledger.pool) == (3, None, "float32", POOL)
    assert ledger.base == bound.identity()
    ledger.save(tmp_path / "ledger.safetensors")
    assert same(fk.Ledger.load(tmp_path / "ledger.safetensors"), ledger)
    other = linear()
    fk.apply(other, tmp_path / "ledger.safetensors")
    assert fk.bind(other, POOL).digest() == bound.digest() != fk.bind(linear(), POOL).digest()
    with pytest.raises(LedgerError, match="this model is not the ledger's base"):
        fk.apply(linear(seed=1), ledger)


def test_a_ledger_of_a_model_that_has_moved_is_of_its_base() -> None:
    bound = fk.bind(linear(), POOL)
    before = fk.Ledger.of(bound, [0.5] * 8)
    bound.move([1, 2], [0.25, 0.5])
    assert fk.Ledger.of(bound, [0.5] * 8).digest() == before.digest()


@pytest.mark.parametrize(
    ("coefficients", "text"),
    [
        ([0.5] * 7, r"coefficients have shape \(7,\); the pool has K = 8 seeds"),
        ([0.5] * 7 + [0.1], "coefficient 7 is 0.1; float32 cannot hold it: round it first, such as with"),
        ([np.nan] * 8, "coefficient 0 is nan; all must be finite"),
        ("a text", "coefficients are str; expected an array, a list or a tensor of numbers"),
    ],
    ids=str,
)
def test_a_ledger_of_no_coefficients_is_refused(coefficients: Any, text: str) -> None:
    bound = fk.bind(linear(), POOL)
    with pytest.raises(InvalidValueError, match=text):
        fk.Ledger.of(bound, coefficients)
    with pytest.raises(InvalidValueError, match=text):
        replace(fk.Ledger.of(bound, [0.5] * 8), coefficients=coefficients)


@pytest.mark.parametrize("value", [-1, 1.0, True, None])
def test_a_round_that_is_no_count_is_refused(value: Any) -> None:
    """It could be saved and not be read again."""
    with pytest.raises(InvalidValueError, match=rf"round is {value!r}; expected an integer from 0 on"):
        fk.Ledger.of(fk.bind(linear(), POOL), [0.5] * 8, round=value)


def test_other_coefficients_in_a_checkpoint_are_refused_with_what_to_do() -> None:
    """Its file has the accumulators alone, so that the change would be lost without a word."""
    ledger = some_ledger()
    found = (np.arange(8) * 0.1).astype(np.float32)
    with pytest.raises(InvalidValueError) as caught:
        replace(ledger, coefficients=found)
    assert str(caught.value) == (
        "the coefficients are not those of the ledger's accumulators, which a run goes on from; change a published ledger: "
        'dataclasses.replace(ledger.published(), precision="float32", coefficients=...)'
    )
    advised = replace(ledger.published(), precision="float32", coefficients=found)
    assert fk.Ledger.decode(advised.encode()).coefficients.tolist() == found.tolist()
    assert replace(ledger, coefficients=ledger.coefficients.copy()).digest() == ledger.digest()


def test_coefficients_that_the_precision_does_not_hold_are_refused() -> None:
    """Else the ledger and its file would be two models with one digest."""
    ledger = some_ledger("float16", published=True)
    with pytest.raises(
        InvalidValueError, match=r'coefficient 1 is 0\.1.*, which float16 cannot hold .*; give precision="float32"'
    ):
        replace(ledger, coefficients=(np.arange(8) * 0.1).astype(np.float32))
    held = replace(ledger, coefficients=[0.5, -0.25, 3, 0, 0, 0, 0, 1])
    assert held.coefficients.dtype == np.float32
    assert same(fk.Ledger.decode(held.encode()), held)


@given(st.integers(0, 2**32), st.sampled_from(PRECISIONS))
def test_what_a_run_publishes_is_always_held(seed: int, precision: Precision) -> None:
    ledger = some_ledger(precision, seed, published=True)
    assert same(fk.Ledger.decode(ledger.encode()), ledger)


@pytest.mark.parametrize("changes", [{"coefficients": [1.0] * 8}, {"pool": fk.SeedPool(1, 8, "gaussian")}], ids=list)
def test_other_numbers_beside_a_ledgers_pages_are_refused(changes: dict[str, Any]) -> None:
    """The model is rebuilt from the pages, and the file has nothing else, so that the change would be lost without a word."""
    paged = 2.0 * some_ledger(published=True)
    with pytest.raises(
        InvalidValueError, match=r"^pool and coefficients are not those of the ledger's last page, .*Ledger\.of_pages\(.*\)$"
    ):
        replace(paged, **changes)
    assert replace(paged, coefficients=paged.coefficients.copy(), pool=replace(POOL)).digest() == paged.digest()


@pytest.mark.parametrize("precision", ["int8", None, []])
@forms
def test_a_precision_that_there_is_not_is_refused(precision: Any, published: bool) -> None:
    with pytest.raises(InvalidValueError, match=r"^precision is .*; expected float32 or float16$"):
        replace(some_ledger(published=published), precision=precision)


@pytest.mark.parametrize("bound", [None, linear()], ids=["none", "module"])
def test_a_ledger_of_what_is_not_bound_is_refused(bound: Any) -> None:
    with pytest.raises(InvalidValueError, match=r"^bound is a (NoneType|Linear); expected what fk.bind gives$"):
        fk.Ledger.of(bound, [0.5] * 8)


def test_a_person_can_read_a_ledger_and_a_binding() -> None:
    ledger = some_ledger()
    known = f"8 of K = 8 gaussian seeds in use, base {ledger.base.fingerprint[:16]}>"
    assert repr(ledger) == f"<Ledger, checkpoint: 1 round, {known}"
    assert repr(ledger.published()) == f"<Ledger, published: 1 round, {known}"
    bound = fk.bind(linear(), fk.SeedPool(1, 4096))
    assert repr(bound) == "<Binding of Linear: 35 tunable parameters, K = 4,096 hadamard seeds>"


# --- Files ---


@precisions
@forms
def test_a_ledger_comes_back_from_its_file(tmp_path: Path, precision: Precision, published: bool) -> None:
    ledger = some_ledger(precision, published=published)
    ledger.save(tmp_path / "ledger.safetensors")
    loaded = fk.Ledger.load(tmp_path / "ledger.safetensors")
    assert same(loaded, ledger)
    assert loaded.digest() == ledger.digest()
    assert loaded.encode() == ledger.encode() == (tmp_path / "ledger.safetensors").read_bytes()
    assert same(fk.Ledger.load(str(tmp_path / "ledger.safetensors")), ledger)


FINITE = arrays(np.float64, 8, elements=st.floats(-1e37, 1e37))


@precisions
@forms
@given(accumulators=FINITE, sums=FINITE, counts=arrays(np.int64, 8, elements=st.integers(0, 2**62)))
def test_every_bit_comes_back(
    precision: Precision,
    published: bool,
    accumulators: NDArray[np.float64],
    sums: NDArray[np.float64],
    counts: NDArray[np.int64],
) -> None:
    ledger = fk.Ledger.start(POOL, identity(), precision).advance(History(accumulators, np.abs(sums), counts))
    sent = ledger.published() if published else ledger
    arrived = fk.Ledger.decode(sent.encode())
    assert same(arrived, sent)
    assert arrived.digest() == sent.digest()
    assert arrived.coefficients.tobytes() == ledger.coefficients.tobytes()


def test_published_coefficients_are_those_of_the_run() -> None:
    """The largest rounds up to a power of two here, so that a second rounding would choose another scale."""
    accumulators = np.zeros(8)
    accumulators[:2] = 1 - 2.0**-13, 1.5 * 2.0**-38
    ledger = fk.Ledger.start(POOL, identity(), "float16").advance(replace(history(8), accumulators=accumulators))
    published = fk.Ledger.decode(ledger.published().encode())
    assert published.coefficients.tolist() == ledger.coefficients.tolist()
    assert ledger.published().coefficients.tolist() == ledger.coefficients.tolist()


def test_published_holds_no_history() -> None:
    ledger = some_ledger().published()
    assert ledger.history is None
    assert some_ledger(seed=1).published().digest() != ledger.digest()
    other = replace(history(8), grad_sums=np.ones(8))  # same accumulators, another history
    assert fk.Ledger.start(POOL, identity(), "float16").advance(other).published().encode() == ledger.encode()


@precisions
@pytest.mark.parametrize("published", [False, True], ids=["checkpoint", "published"])
def test_one_metadata_entry_of_canonical_json(tmp_path: Path, precision: Precision, published: bool) -> None:
    path = tmp_path / "l.safetensors"
    some_ledger(precision, published=published).save(path)
    with safetensors.safe_open(path, "np") as file:
        metadata = file.metadata()
    assert list(metadata) == ["fedkseed"]
    content = json.loads(metadata["fedkseed"])
    assert json.dumps(content, sort_keys=True, separators=(",", ":")) == metadata["fedkseed"]
    keys = {"format", "pool", "base", "precision", "round"} | ({"exponent"} if published else set())
    assert content.keys() == keys  # no time stamp, no host, no version of a library
    assert content["pool"] == {"key": "0123456789abcdef", "size": 8, "family": "gaussian"}
    assert content["base"] == {"fingerprint": identity().fingerprint, "frozen": ["norm"]}
    names = {"coefficients"} if published else {"accumulators", "grad_sums", "grad_counts"}
    assert load_file(path).keys() == names | {"base_digests"}


@forms
def test_two_saves_give_the_same_bytes(tmp_path: Path, published: bool) -> None:
    for name in ("a", "b"):
        some_ledger(published=published).save(tmp_path / name)
    some_ledger(published=published).save(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    code = (
        "import sys; from pathlib import Path; import fedkseed as fk;"
        "sys.stdout.buffer.write(fk.Ledger.load(sys.argv[1]).encode())"
    )
    again = subprocess.run([sys.executable, "-c", code, tmp_path / "a"], capture_output=True, check=True).stdout
    assert again == (tmp_path / "b").read_bytes()  # another process, another hash seed


@pytest.mark.parametrize(("precision", "low", "high"), [("float16", 8 * 1024, 16 * 1024), ("float32", 16 * 1024, 18_500)])
def test_a_published_ledger_keeps_to_its_size(precision: Precision, low: int, high: int) -> None:
    """K = 4096 and SmolLM2-135M's 272 tensors: 8 to 16 KB in float16, the default."""
    pool = fk.SeedPool(2**64 - 1, 4096)
    ledger = fk.Ledger.start(pool, identity(272, ()), precision).advance(history(4096))
    assert low <= len(ledger.published().encode()) <= high
    assert len(ledger.encode()) <= 101_000  # the checkpoint: tens of kilobytes


# --- Digests ---

CHANGES: dict[str, Callable[[fk.Ledger], fk.Ledger]] = {
    "round": lambda x: replace(x, round=2),
    "key": lambda x: replace(x, pool=replace(x.pool, key=1)),
    "family": lambda x: replace(x, pool=replace(x.pool, family="hadamard")),
    "precision": lambda x: replace(x, precision="float32", coefficients=rounded(accumulators(x), "float32")),
    "fingerprint": lambda x: replace(x, base=replace(x.base, fingerprint="0" * 64)),
    "digests": lambda x: replace(x, base=replace(x.base, digests=x.base.digests + np.uint32(1))),
    "frozen": lambda x: replace(x, base=replace(x.base, frozen=())),
    "accumulators": lambda x: x.advance(changed(x, "accumulators")) if x.history else x,
    "grad_sums": lambda x: replace(x, history=changed(x, "grad_sums")),
    "grad_counts": lambda x: replace(x, history=changed(x, "grad_counts")),
}


def accumulators(ledger: fk.Ledger) -> NDArray[np.float64]:
    assert ledger.history is not None
    return ledger.history.accumulators


def changed(ledger: fk.Ledger, name: str) -> History:
    """The history with the smallest possible change of one array."""
    assert ledger.history is not None
    values = getattr(ledger.history, name).copy()
    values[3] = np.nextafter(values[3], 1) if values.dtype == np.float64 else values[3] + 1
    return replace(ledger.history, **{name: values})


@pytest.mark.parametrize("name", CHANGES)
def test_the_digest_sees_every_field(name: str) -> None:
    ledger = some_ledger()
    other = replace(CHANGES[name](ledger), round=CHANGES[name](ledger).round if name == "round" else 1)
    assert other.digest() != ledger.digest()
    assert other.encode() != ledger.encode()


def test_digest_of_the_published_form_sees_the_coefficients() -> None:
    ledger = some_ledger(published=True)
    coefficients = ledger.coefficients.copy()
    coefficients[0] *= -1
    digests = {
        ledger.digest(),
        replace(ledger, coefficients=coefficients).digest(),
        some_ledger().digest(),
        some_ledger("float32", published=True).digest(),
    }
    assert len(digests) == 4


def test_equal_ledgers_have_equal_digests() -> None:
    assert some_ledger().digest() == some_ledger().digest()
    assert len(some_ledger().digest()) == 64
    assert int(some_ledger().digest(), 16)


# --- The format, by hand ---


def write_by_hand(metadata: Any, tensors: dict[str, NDArray[Any]]) -> bytes:
    """A safetensors file with that metadata entry, without the package."""
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    return save(tensors, metadata={"fedkseed": text})


def plain(published: bool = True) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Metadata and tensors of a ledger with K = 2."""
    metadata: dict[str, Any] = {
        "format": 1,
        "pool": {"key": "00000000000000ff", "size": 2, "family": "hadamard"},
        "base": {"fingerprint": "ab" * 32, "frozen": []},
        "precision": "float16",
        "round": 3,
    }
    tensors: dict[str, NDArray[Any]] = {"base_digests": np.array([1, 2], "<u4")}
    if published:
        metadata["exponent"] = -30
        tensors["coefficients"] = np.array([16384, -1], "<f2")
    else:
        tensors |= {"accumulators": np.array([0.5, 0]), "grad_sums": np.array([3.0, 0]), "grad_counts": np.array([2, 0])}
    return metadata, tensors


def test_a_ledger_written_by_hand() -> None:
    """What was published once must stay readable: the format is these names, types and units."""
    ledger = fk.Ledger.decode(write_by_hand(*plain()))
    assert ledger.pool == fk.SeedPool(255, 2)
    assert (ledger.round, ledger.precision, ledger.history) == (3, "float16", None)
    assert ledger.base == BaseIdentity("ab" * 32, np.array([1, 2], np.uint32))
    assert ledger.base.digests.tolist() == [1, 2]
    assert ledger.coefficients.tolist() == [2.0**-16, -(2.0**-30)]
    checkpoint = fk.Ledger.decode(write_by_hand(*plain(published=False)))
    assert checkpoint.coefficients.tolist() == [0.5, 0]
    assert checkpoint.history is not None
    assert checkpoint.history.grad_counts.tolist() == [2, 0]


def damaged(published: bool, at: str, value: Any) -> bytes:
    """A ledger file with one value of its metadata ("pool.key") or one tensor replaced; None removes it."""
    metadata, tensors = plain(published)
    *parents, last = at.split(".")
    inner: dict[str, Any] = tensors if at in tensors else metadata
    for parent in parents:
        inner = inner[parent]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return write_by_hand(metadata, tensors)


U4, F8 = np.dtype("<u4"), np.dtype("<f8")
DAMAGE: list[tuple[bool, str, Any]] = [
    *[
        (True, key, None)
        for key in ("format", "pool", "base", "precision", "round", "exponent", "coefficients", "base_digests")
    ],
    *[(True, key, None) for key in ("pool.key", "pool.size", "pool.family", "base.fingerprint", "base.frozen")],
    *[(False, key, None) for key in ("accumulators", "grad_sums", "grad_counts", "base_digests")],
    *[(True, "format", value) for value in (0, 5, "1", 1.0, [1])],
    *[(True, "pool.key", value) for value in ("", "xyz", "-1", "1" + 16 * "0", 255, [])],
    *[(True, "pool.size", value) for value in (0, 3, 65537, "2", 2.0, True)],
    *[(True, "pool.family", value) for value in ("fourier", "", 1, ["hadamard"])],
    *[(True, "pool", value) for value in ([], "pool", 1)],
    *[(True, "base.fingerprint", value) for value in ("", "zz" * 32, "ab" * 31, 5)],
    *[(True, "base.frozen", value) for value in ("abc", 5, [1, 2])],
    *[(True, "precision", value) for value in ("float64", "", 16, ["float16"], "float32")],
    *[(True, "round", value) for value in (-1, 1.5, "3", [])],
    *[(True, "exponent", value) for value in ("x", [], 1e999, -1e999, 10**30, -(10**30), 5000, -5000, 2.5)],
    *[(True, "coefficients", value) for value in (np.zeros(3, "<f2"), np.zeros((2, 1), "<f2"), np.zeros(2, "<f4"))],
    (True, "coefficients", np.array([np.nan, 0], "<f2")),
    (True, "coefficients", np.array([np.inf, 0], "<f2")),
    (True, "base_digests", np.zeros(2, "<i4")),
    (True, "base_digests", np.zeros((1, 2), U4)),
    (False, "accumulators", np.array([np.nan, 0])),
    (False, "accumulators", np.array([np.inf, 0])),
    (False, "accumulators", np.zeros(2, "<f4")),
    (False, "accumulators", np.zeros(3)),
    (False, "grad_sums", np.array([np.nan, 0])),
    (False, "grad_sums", np.array([-1.0, 0])),
    (False, "grad_counts", np.array([-1, 0])),
    (False, "grad_counts", np.zeros(2, "<i4")),
]


def refusal(path: Path) -> str:
    """The reason why a file is refused: one short line that begins with its path."""
    with pytest.raises(LedgerError) as caught:
        fk.Ledger.load(path)
    reason = str(caught.value)
    assert reason.startswith(f"{path}: ")
    assert "\n" not in reason
    assert len(reason) < len(str(path)) + 400
    return reason


@pytest.mark.parametrize(("published", "at", "value"), DAMAGE, ids=[f"{at}-{value!r:.30}" for _, at, value in DAMAGE])
def test_damaged_content_is_refused(tmp_path: Path, published: bool, at: str, value: Any) -> None:
    path = tmp_path / "ledger.safetensors"
    path.write_bytes(write_by_hand(*plain(published)))
    assert fk.Ledger.load(path).pool.size == 2  # the control
    path.write_bytes(damaged(published, at, value))
    reason = refusal(path)
    assert at != "format" or "ledger format is" in reason


def test_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "l").write_bytes(damaged(True, "format", 5))
    reason = refusal(tmp_path / "l")
    assert "format is 5" in reason
    assert "reads 1 to 4" in reason


DEEP = b'{"__metadata__":' + b"[" * 100_000
OTHER_FILES: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"1234567",
    "text": b"hello, this is a readme of more than eight bytes\n",
    "zeros": bytes(1000),
    "huge header": b"\xff" * 8 + b"{}",
    "not JSON": (4).to_bytes(8, "little") + b"abcd",
    "not UTF-8": (4).to_bytes(8, "little") + b"\xff\xfe\xfd\xfc",
    "JSON list": (4).to_bytes(8, "little") + b"[1] ",
    "deep JSON": len(DEEP).to_bytes(8, "little") + DEEP,
    "no metadata": save({"weight": np.zeros(3)}),
    "other metadata": save({"weight": np.zeros(3)}, metadata={"format": "pt"}),
    "metadata is text": save({"weight": np.zeros(3)}, metadata={"fedkseed": "hello"}),
    "metadata is a list": save({"weight": np.zeros(3)}, metadata={"fedkseed": "[1]"}),
    "metadata is null": save({"weight": np.zeros(3)}, metadata={"fedkseed": "null"}),
    "metadata is deep": save({"weight": np.zeros(3)}, metadata={"fedkseed": "[" * 100_000}),
    "metadata is long": save({"weight": np.zeros(3)}, metadata={"fedkseed": json.dumps({"format": "v" * 10_000})}),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_other_files_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "ledger.safetensors"
    path.write_bytes(OTHER_FILES[name])
    refusal(path)


def test_a_model_file_is_not_a_ledger(tmp_path: Path) -> None:
    save_file({"model.norm.weight": np.zeros(5, np.float32)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "not a ledger" in refusal(tmp_path / "model.safetensors")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "none" / "ledger.safetensors")
    assert "directory" in refusal(tmp_path)


@precisions
@forms
def test_every_truncation_is_refused(tmp_path: Path, precision: Precision, published: bool) -> None:
    path = tmp_path / "ledger.safetensors"
    data = some_ledger(precision, published=published).encode()
    for size in [*range(0, len(data), 7), len(data) - 1]:
        path.write_bytes(data[:size])
        refusal(path)
    path.write_bytes(data + b"\0")
    refusal(path)


@forms
def test_every_flipped_bit_of_the_header(published: bool) -> None:
    """Refused, or another ledger (its values are anyone's guess); never another exception."""
    ledger = some_ledger(published=published)
    data = ledger.encode()
    header = 8 + int.from_bytes(data[:8], "little")
    refused = 0
    for position in range(8 * header):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        try:
            found = fk.Ledger.decode(bytes(flipped))
        except LedgerError:
            refused += 1
        else:
            assert found.digest() != ledger.digest() or same(found, ledger)  # the same number, spelt differently
    assert refused > 4 * header  # most of them


# --- Faults while saving ---

STEPS = ("open", "write", "fsync the file", "rename", "fsync the folder")
Patch = Callable[[Any, str, Any], None]


class FaultyFile:
    """A file whose write comes half way before something happens."""

    def __init__(self, file: Any, before: Callable[[str], None]) -> None:
        self.file, self.before = file, before

    def __enter__(self) -> "FaultyFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: bytes) -> int:
        half = self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.before("write")
        return int(half + self.file.write(data[len(data) // 2 :]))


def watch(folder: Path, patch: Patch, before: Callable[[str], None], after: Callable[[str], None] = lambda step: None) -> None:
    """Call `before` and `after` at each step on files of a folder that could fail or be the last one."""
    real_open, real_fsync = io.open, os.fsync

    def watched_open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "r" in mode or not isinstance(file, (str, Path)) or Path(file).parent != folder:
            return real_open(file, mode, *args, **kwargs)
        before("open")
        opened = FaultyFile(real_open(file, mode, *args, **kwargs), before)
        after("open")
        return opened

    def watched_fsync(handle: int) -> None:
        step = "fsync the folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "fsync the file"
        before(step)
        real_fsync(handle)
        after(step)

    def watched(real: Callable[..., None]) -> Callable[..., None]:
        def rename(*args: Any, **kwargs: Any) -> None:
            before("rename")
            real(*args, **kwargs)
            after("rename")

        return rename

    patch(io, "open", watched_open)
    patch(os, "fsync", watched_fsync)
    patch(os, "replace", watched(os.replace))
    patch(os, "rename", watched(os.rename))


def test_the_content_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write, fsync, rename, fsync the folder: without the first fsync a rename could outlive a crash, the content not."""
    seen: list[str] = []
    watch(tmp_path, monkeypatch.setattr, seen.append)
    some_ledger().save(tmp_path / "ledger.safetensors")
    assert tuple(seen) == STEPS
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.safetensors"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES], ids=errno.errorcode.get)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("exists", [True, False], ids=["over an old file", "a first file"])
def test_a_failed_step_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int, exists: bool
) -> None:
    path = tmp_path / "ledger.safetensors"
    old, new = some_ledger(seed=1), some_ledger(seed=2)
    if exists:
        old.save(path)

    def fail(at: str) -> None:
        if at == step:
            raise OSError(code, os.strerror(code))

    with monkeypatch.context() as context:
        watch(tmp_path, context.setattr, fail)
        with pytest.raises(LedgerError) as caught:
            new.save(path)
    assert str(caught.value).startswith(f"{path}: cannot save")
    assert os.strerror(code) in str(caught.value)
    assert "\n" not in str(caught.value)
    if step == "fsync the folder":  # renamed already: the new file, whole
        assert fk.Ledger.load(path).digest() == new.digest()
    else:
        assert not exists or fk.Ledger.load(path).digest() == old.digest()
    done = exists or step == "fsync the folder"
    assert [found.name for found in tmp_path.iterdir()] == ["ledger.safetensors"] * done  # no temporary is left
    new.save(path)
    assert fk.Ledger.load(path).digest() == new.digest()


def test_saving_where_nothing_can_be_saved(tmp_path: Path) -> None:
    for path, text in (
        (tmp_path / "none" / "l", "none is no folder; make it first"),
        (tmp_path, "cannot save a ledger there: it is a folder; give a file in it, such as .*ledger.safetensors"),
    ):
        with pytest.raises(LedgerError, match=text):
            some_ledger().save(path)
    assert list(tmp_path.iterdir()) == []


def test_the_home_folder_is_meant_by_its_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    some_ledger().save("~/l")
    assert [path.name for path in tmp_path.iterdir()] == ["l"]
    assert same(fk.Ledger.load("~/l"), some_ledger())
    with pytest.raises(LedgerError, match=r"^~nobody-of-that-name/l: cannot save a ledger there"):
        some_ledger().save("~nobody-of-that-name/l")


@pytest.mark.parametrize("path", [None, "", " ", 3, "a\0b", b"l"])
def test_what_is_no_path_is_one_line(path: Any) -> None:
    for call in (some_ledger().save, fk.Ledger.load):
        with pytest.raises(LedgerError, match=r"^a ledger's file is .*; expected a path, such as 'ledger.safetensors'$"):
            call(path)
    with pytest.raises(LedgerError, match=r"^a ledger's name is .*; give its file"):
        fk.Ledger.from_pretrained(path)


# --- Kills ---

KILLS = [(when, step) for step in STEPS for when in ("before", "after") if (when, step) != ("after", "write")]


def be_killed(folder: Path) -> None:
    """Runs in a process of its own: for each place a child that saves over an old ledger and gets SIGKILL there."""
    old, new = some_ledger(seed=1), some_ledger(seed=2)
    for number, place in enumerate(KILLS):
        path = folder / str(number) / "ledger.safetensors"
        path.parent.mkdir()
        old.save(path)
        child = os.fork()
        if not child:
            watch(path.parent, setattr, *[killer(when, place) for when in ("before", "after")])
            new.save(path)
            os._exit(0)  # not reached, if the step was
        print(os.waitpid(child, 0)[1])


def killer(when: str, place: tuple[str, str]) -> Callable[[str], None]:
    def at(step: str) -> None:
        if (when, step) == place:
            os.kill(os.getpid(), signal.SIGKILL)

    return at


def test_a_kill_at_every_step(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; import test_ledger; test_ledger.be_killed(Path(sys.argv[1]))"
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=here, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(signal.SIGKILL.value)] * len(KILLS)
    old, new = some_ledger(seed=1), some_ledger(seed=2)
    for number, (when, step) in enumerate(KILLS):
        path = tmp_path / str(number) / "ledger.safetensors"
        renamed = STEPS.index(step) + (when == "after") > STEPS.index("rename")
        assert path.read_bytes() == (new if renamed else old).encode(), (when, step)
        assert fk.Ledger.load(path).digest() == (new if renamed else old).digest()
        new.save(path)  # whatever the kill has left does not stand in the way, and is gone afterwards
        assert fk.Ledger.load(path).digest() == new.digest()
        assert [found.name for found in path.parent.iterdir()] == ["ledger.safetensors"]
