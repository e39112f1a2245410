"""Token ids kept on the disk: the same ids as without, under the right name, and never a reason to fail."""

import logging
import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from fedkseed.data import EncodedData, Example, encode, get_template

WORDS = ("bear", "dog", "tale", "of", "a", "long", "ball", "Ünïcode")
EXAMPLES = [
    Example(f"Say {WORDS[i % 8]} {i}.", WORDS[i % 3] * (i % 2), f"{WORDS[i % 7]} {i}" * (i % 11 > 0), "") for i in range(1030)
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDKSEED_CACHE", str(tmp_path / "a" / "cache"))
    return tmp_path / "a" / "cache"


def kept(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


def ids(data: EncodedData) -> list[list[int]]:
    return [example.input_ids.tolist() for example in data.examples]


def assert_same(one: EncodedData, other: EncodedData) -> None:
    assert ids(one) == ids(other)
    assert one.kept.tolist() == other.kept.tolist()
    assert [e.prompt_length for e in one.examples] == [e.prompt_length for e in other.examples]
    assert (one.num_dropped, one.num_truncated, one.num_tokens_cut) == (
        other.num_dropped,
        other.num_truncated,
        other.num_tokens_cut,
    )
    assert {e.input_ids.dtype for e in (*one.examples, *other.examples)} == {np.dtype(np.int32)}


def without_cache(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase) -> EncodedData:
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["fedkseed.data.encode"], "cache_path", lambda *_: None)
        return encode(EXAMPLES, tokenizer, 64)


def tokenised(tokenizer: PreTrainedTokenizerBase, examples: list[Example] = EXAMPLES) -> tuple[EncodedData, int]:
    """The data, and how often the tokenizer's progress was told: 0 where they came from the disk."""
    heard: list[int] = []
    data = encode(examples, tokenizer, 64, on_progress=lambda done, _: heard.append(done))
    return data, len(heard)


def test_what_the_disk_holds_is_cut_or_dropped_as_asked(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    examples = [*EXAMPLES, Example("A very long request. " * 30, "", "Yes.", "")]
    cut = encode(examples, tokenizer, 64, long_prompts="cut")
    assert len(kept(folder)) == 1
    drop = encode(examples, tokenizer, 64)
    assert len(kept(folder)) == 1
    assert (cut.num_prompts_cut, drop.num_prompts_cut) == (1, 0)
    assert ids(cut)[:-1] == ids(drop)
    assert_same(cut, encode(examples, tokenizer, 64, long_prompts="cut"))


def test_the_same_ids_from_the_disk_as_without(
    folder: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = without_cache(monkeypatch, tokenizer)
    assert kept(folder) == []
    for times in (2, 0):  # chunks that were tokenised
        data, heard = tokenised(tokenizer)
        assert heard == times
        assert_same(data, expected)
    assert len(kept(folder)) == 1


def test_the_disk_is_what_is_read(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """The control: with other ids in the file, other ids come out."""
    first, _ = tokenised(tokenizer)
    (path,) = kept(folder)
    with np.load(path) as file:
        np.savez(path, ids=file["ids"][::-1], lengths=file["lengths"])
    assert ids(tokenised(tokenizer)[0]) != ids(first)


def test_another_text_order_template_or_tokenizer_is_another_file(
    folder: Path, tokenizer: PreTrainedTokenizerBase, own_tokenizer: PreTrainedTokenizerBase
) -> None:
    encode(EXAMPLES, tokenizer, 64)
    moved = Example(EXAMPLES[0].instruction + " ", *[getattr(EXAMPLES[0], name) for name in ("input", "output", "category")])
    other = own_tokenizer
    other.add_tokens(["bear"])
    runs = [
        ([moved, *EXAMPLES[1:]], tokenizer, "plain"),
        (EXAMPLES[::-1], tokenizer, "plain"),
        (EXAMPLES[1:], tokenizer, "plain"),
        (EXAMPLES, tokenizer, "bare"),
        (EXAMPLES, other, "plain"),
    ]
    for i, (examples, its_tokenizer, template) in enumerate(runs, start=2):
        encode(examples, its_tokenizer, 64, get_template(template))
        assert len(kept(folder)) == i
    encode(EXAMPLES, tokenizer, 32)  # what is cut later is the same text
    assert len(kept(folder)) == len(runs) + 1


def test_the_tokenizer_that_added_a_token_gets_its_own_ids(
    folder: Path, tokenizer: PreTrainedTokenizerBase, own_tokenizer: PreTrainedTokenizerBase
) -> None:
    other = own_tokenizer
    other.add_tokens(["bear"])
    assert ids(encode(EXAMPLES, tokenizer, 64)) != ids(encode(EXAMPLES, other, 64))


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "junk", "other arrays", "another number of texts"])
def test_a_damaged_file_is_written_anew(folder: Path, tokenizer: PreTrainedTokenizerBase, damage: str) -> None:
    expected, _ = tokenised(tokenizer)
    (path,) = kept(folder)
    whole = path.read_bytes()
    with np.load(path) as file:
        arrays = dict(file)
    if damage == "other arrays":
        np.savez(path, a=np.zeros(3))
    elif damage == "another number of texts":
        np.savez(path, ids=arrays["ids"], lengths=arrays["lengths"][:-2])
    else:
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
        path.write_bytes({"empty": b"", "cut": whole[:middle], "flipped": flipped, "junk": b"junk"}[damage])
    data, heard = tokenised(tokenizer)
    assert heard
    assert_same(data, expected)
    with np.load(path) as file:
        assert {name: file[name].tolist() for name in file} == {name: array.tolist() for name, array in arrays.items()}


def test_only_the_user_can_read_the_file(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    encode(EXAMPLES, tokenizer, 64)
    (path,) = kept(folder)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FEDKSEED_CACHE", str(tmp_path / "file" / "cache"))
    expected = without_cache(monkeypatch, tokenizer)
    with caplog.at_level(logging.WARNING, logger="fedkseed"):
        assert_same(encode(EXAMPLES, tokenizer, 64), expected)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message == (
        f"{tmp_path / 'file' / 'cache'}: token ids cannot be kept (Not a directory); set FEDKSEED_CACHE to another folder"
    )


def test_few_texts_leave_nothing(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    encode(EXAMPLES[:1023], tokenizer, 64)
    assert kept(folder) == []
    encode(EXAMPLES[:1024], tokenizer, 64)
    assert len(kept(folder)) == 1


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"FEDKSEED_CACHE": "/c", "XDG_CACHE_HOME": "/x"}, "/c"),
        ({"FEDKSEED_CACHE": "", "XDG_CACHE_HOME": "/x"}, "/x/fedkseed"),
        ({"HOME": "/h"}, "/h/.cache/fedkseed"),
    ],
)
def test_the_cache_is_where_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    from fedkseed.data.cache import cache_folder

    for name in ("FEDKSEED_CACHE", "XDG_CACHE_HOME"):
        if name in os.environ:
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)
