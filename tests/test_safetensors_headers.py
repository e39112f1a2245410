"""A safetensors file's header may claim anything: sizes are checked before what they are of is read or parsed."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fedkseed as fk
from fedkseed import files
from fedkseed.baselines import TunedTensors
from fedkseed.baselines.messages import unpack_tensors
from fedkseed.errors import FedKSeedError
from fedkseed.files import MAX_HEADER, safetensors_header
from fedkseed.models.base import FileBase
from fedkseed.models.parameters import named_parameters

MODEL = torch.nn.Linear(2, 1)
READERS: dict[str, Callable[[Path], object]] = {
    "a ledger": fk.Ledger.load,
    "a ledger's bytes": lambda path: fk.Ledger.decode(path.read_bytes()),
    "a baseline's tensors": TunedTensors.load,
    "a baseline's message": lambda path: unpack_tensors(path.read_bytes()),
    "a base": lambda path: FileBase(path, named_parameters(MODEL)),
}
readers = pytest.mark.parametrize("reader", READERS)


def write(path: Path, text: bytes, data: bytes = b"", length: int | None = None) -> Path:
    with path.open("wb") as file:
        file.write((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def empty_tensors(count: int) -> bytes:
    return b"{" + b",".join(b'"%x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(count)) + b"}"


def lists(size: int) -> bytes:
    return b'{"a":[' + b"[]," * (size // 3) + b"[]]}"


def about(offsets: object) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": offsets}}).encode()


CLAIMS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "more than the file": (
        lambda path: write(path, b"{}", length=2**40),
        "its header claims 1,099,511,627,776 bytes, the file",
    ),
    "one byte more": (lambda path: write(path, b"{}", length=3), "its header claims 3 bytes, the file has 10"),
    "a long header": (lambda path: write(path, lists(MAX_HEADER + 3)), "at most 16,777,216 are read"),
    "many values": (lambda path: write(path, lists(6 * 2**20)), "values; at most 1,048,576 are read"),
    "empty tensors": (lambda path: write(path, empty_tensors(180_000)), "values; at most 1,048,576 are read"),
    "data beyond the end": (lambda path: write(path, about([0, 4]), bytes(3)), "other data than the 3 bytes"),
    "data that nothing speaks of": (
        lambda path: write(path, about([0, 4]), bytes(2**20)),
        "other data than the 1,048,576 bytes",
    ),
    "offsets that are none": (lambda path: write(path, about([0, "4"]), bytes(4)), "other data"),
    "infinite offsets": (lambda path: write(path, about([0, float("inf")]), bytes(4)), "other data"),
    "one offset": (lambda path: write(path, about([0]), bytes(4)), "does not say where its tensors lie"),
    "no tensor's table": (lambda path: write(path, b'{"a":[]}'), "does not say where its tensors lie"),
    "a list": (lambda path: write(path, b"[1]"), "does not say where its tensors lie"),
    "deep": (lambda path: write(path, b"[" * 100_000), ""),
}


@readers
@pytest.mark.parametrize("claim", CLAIMS)
def test_a_header_that_claims_the_moon_is_refused_before_it_is_parsed(tmp_path: Path, reader: str, claim: str) -> None:
    """In one line, and for no more memory than the file a few times over: parsed, its lists take twenty times their bytes."""
    make, reason = CLAIMS[claim]
    path = make(tmp_path / "file")
    before = path.read_bytes()
    tracemalloc.start()
    try:
        with pytest.raises(FedKSeedError) as caught:
            READERS[reader](path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 400
    assert peak < 3 * len(before) + 2**20
    assert path.read_bytes() == before


@pytest.mark.parametrize("reader", ["a ledger", "a baseline's tensors"])
@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"round": Infinity, "format": 1, "algorithm": "fedavg", "base": ""}', "{}", "[1]"]
)
def test_metadata_that_is_none_is_refused_in_a_line(tmp_path: Path, reader: str, text: str) -> None:
    header = {"__metadata__": dict.fromkeys(("fedkseed", "fedkseed_baseline"), text)}
    with pytest.raises(FedKSeedError, match=r"damaged|format is") as caught:
        READERS[reader](write(tmp_path / "file", json.dumps(header).encode()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reader", ["a ledger", "a baseline's tensors", "a base"])
def test_what_is_too_long_is_not_even_read(tmp_path: Path, reader: str) -> None:
    """A sparse file of 300 GB: reading it would end in an error of another kind."""
    path = write(tmp_path / "file", b"", length=300 * 2**30)
    with path.open("r+b") as file:
        file.truncate(300 * 2**30 + 8)
    with pytest.raises(FedKSeedError, match="at most 16,777,216 are read"):
        READERS[reader](path)
    with path.open("r+b") as file:  # a short header, and a hole that no tensor fills
        file.write((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(FedKSeedError, match="other data than the"):
        READERS[reader](path)


def test_the_guard_is_what_keeps_memory_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: without it the parsed lists take many times the header's bytes."""
    monkeypatch.setattr(files, "MAX_VALUES", 2**30)
    path = write(tmp_path / "file", lists(6 * 2**20))
    tracemalloc.start()
    try:
        with path.open("rb") as file, pytest.raises(ValueError, match="where its tensors lie"):
            safetensors_header(file)
        assert tracemalloc.get_traced_memory()[1] > 10 * path.stat().st_size
    finally:
        tracemalloc.stop()


def test_headers_of_many_tensors_and_names_are_read(tmp_path: Path) -> None:
    """What large models have: a mixture of experts has some 20,000 tensors, all of which a ledger may name as frozen."""
    names = [f"model.layers.{i // 300}.mlp.experts.{i % 300}.down_proj.weight" for i in range(20_000)]
    text = json.dumps(
        {"__metadata__": {"fedkseed": json.dumps(names)}}
        | {name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names}
    ).encode()
    with write(tmp_path / "file", text).open("rb") as file:
        header, begin = safetensors_header(file)
    assert len(header) == 20_001
    assert begin == 8 + len(text)
