"""Templates and encoding: exact boundaries, labels on response and EOS only, exact counts of what is lost."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.tiny import CHAT
from tokenizers.processors import ByteLevel
from transformers import PreTrainedTokenizerBase

from fedkseed.data import (
    TEMPLATES,
    Dropped,
    EncodedExample,
    Example,
    Rendered,
    encode,
    get_template,
    read_examples,
    why_dropped,
)
from fedkseed.errors import DataError, InvalidValueError, ModelError

BOS, EOS = 1, 2
EXAMPLES = [
    Example("Name a fruit.", "", "An apple.", "a"),
    Example("Say nothing.", "", "", "b"),
    Example("Shorten this.", "A long, long tale of a bear.", "A tale of a bear, and of all that he did.", "a"),
    Example("Only space.", "", " \n ", "b"),
    Example("A very long request. " * 30, "", "Yes.", "b"),
]


def alone(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def texts(rendered: Rendered) -> tuple[str, str]:
    return rendered.prompt, rendered.response


def test_plain_has_an_input_section_only_for_an_input(tokenizer: PreTrainedTokenizerBase) -> None:
    plain = get_template("plain")
    assert texts(plain(Example("Do.", "", "Done.", ""), tokenizer)) == ("Instruction:\nDo.\n\nResponse:\n", "Done.")
    assert plain(Example("Do.", " \n", "Done.", ""), tokenizer).prompt == "Instruction:\nDo.\n\nResponse:\n"
    assert plain(Example("Do.", "It.", "Done.", ""), tokenizer).prompt == "Instruction:\nDo.\n\nInput:\nIt.\n\nResponse:\n"


def test_chat_is_the_tokenizers_own_template(own_tokenizer: PreTrainedTokenizerBase) -> None:
    own_tokenizer.chat_template = CHAT
    chat = get_template("chat")
    assert texts(chat(Example("Do.", "It.", "Done.", ""), own_tokenizer)) == ("[user]Do.\n\nIt.\n[assistant]", "Done.")
    assert texts(chat(Example("Do.", "", "Done.", ""), own_tokenizer)) == ("[user]Do.\n[assistant]", "Done.")


def test_chat_without_a_template_or_with_one_that_refuses(own_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ModelError, match=r"stories260k has no chat template; use the template 'plain'"):
        encode(EXAMPLES, own_tokenizer, 64, get_template("chat"))
    own_tokenizer.chat_template = "{{ raise_exception('I want\n a system turn') }}"
    with pytest.raises(ModelError, match=r"a record: the chat template of .* refuses it \(I want a system turn\); give --refu"):
        encode(EXAMPLES, own_tokenizer, 64, get_template("chat"))


def test_an_unknown_template_is_named() -> None:
    with pytest.raises(
        InvalidValueError,
        match=r"template 'alpaka' is unknown; expected one of plain, alpaca, dolly, bare, chat, or a TOML file",
    ):
        get_template("alpaka")


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_prompt_response_and_eos_are_tokenised_apart(own_tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    own_tokenizer.chat_template = CHAT
    for example in (EXAMPLES[0], EXAMPLES[2]):
        prompt, response = texts(TEMPLATES[name](example, own_tokenizer))
        (encoded,) = encode([example], own_tokenizer, 512, TEMPLATES[name]).examples
        ids = encoded.input_ids.tolist()
        assert ids[: encoded.prompt_length] == [BOS, *alone(own_tokenizer, prompt)]
        assert ids[encoded.prompt_length :] == [*alone(own_tokenizer, response), EOS]
        assert encoded.input_ids.dtype == np.int32


def test_bos_comes_once_when_the_template_writes_it(own_tokenizer: PreTrainedTokenizerBase) -> None:
    own_tokenizer.chat_template = "{{ bos_token }}" + CHAT
    (encoded,) = encode(EXAMPLES[:1], own_tokenizer, 512, get_template("chat")).examples
    assert encoded.input_ids.tolist().count(BOS) == 1


def test_no_bos_where_the_tokenizer_adds_none(own_tokenizer: PreTrainedTokenizerBase) -> None:
    own_tokenizer.backend_tokenizer.post_processor = ByteLevel()  # type: ignore[attr-defined]
    (encoded,) = encode(EXAMPLES[:1], own_tokenizer, 512).examples
    assert BOS not in encoded.input_ids


def test_kept_dropped_and_cut_are_counted_as_by_hand(tokenizer: PreTrainedTokenizerBase) -> None:
    whole = encode(EXAMPLES, tokenizer, 100_000)
    assert (whole.kept.tolist(), whole.num_dropped, whole.num_truncated, whole.num_tokens_cut) == ([0, 2, 4], 2, 0, 0)
    lengths = [len(example.input_ids) for example in whole.examples]
    assert lengths[0] < lengths[1] < whole.examples[2].prompt_length
    limit = lengths[1] - 3  # the second loses EOS and two more, the third has no room for its response
    cut = encode(EXAMPLES, tokenizer, limit)
    assert (cut.kept.tolist(), cut.num_dropped, cut.num_truncated, cut.num_tokens_cut) == ([0, 2], 3, 1, 3)
    np.testing.assert_array_equal(cut.examples[1].input_ids, whole.examples[1].input_ids[:limit])
    assert EOS not in cut.examples[1].input_ids


def test_the_last_response_token_decides(tokenizer: PreTrainedTokenizerBase) -> None:
    (whole,) = encode(EXAMPLES[:1], tokenizer, 512).examples
    (least,) = encode(EXAMPLES[:1], tokenizer, whole.prompt_length + 1).examples
    assert least.num_targets == 1
    with pytest.raises(DataError, match=rf"none of 1 records has a response token within max_length {whole.prompt_length};"):
        encode(EXAMPLES[:1], tokenizer, whole.prompt_length)


@given(
    texts=st.lists(st.tuples(st.text(max_size=30), st.text(max_size=30), st.text(max_size=30)), min_size=1, max_size=6),
    max_length=st.integers(2, 80),
)
def test_every_record_is_kept_or_counted(
    tokenizer: PreTrainedTokenizerBase, texts: list[tuple[str, str, str]], max_length: int
) -> None:
    anchor = Example("", "", "x", "")  # keeps `encode` from refusing the lot
    examples = [Example(*text, "") for text in texts]
    try:
        data = encode([*examples, anchor], tokenizer, max_length)
    except DataError:
        assert max_length < len(encode([anchor], tokenizer, 512).examples[0].input_ids)
        return
    whole = encode([*examples, anchor], tokenizer, 1_000_000)
    full = dict(zip(whole.kept.tolist(), whole.examples, strict=True))
    assert len(data.examples) == len(data.kept) == len(examples) + 1 - data.num_dropped
    lost = {i: len(full[i].input_ids) - len(e.input_ids) for i, e in zip(data.kept.tolist(), data.examples, strict=True)}
    assert (sum(n > 0 for n in lost.values()), sum(lost.values())) == (data.num_truncated, data.num_tokens_cut)
    for i, example in zip(data.kept.tolist(), data.examples, strict=True):
        assert example.prompt_length < len(example.input_ids) <= max_length
        np.testing.assert_array_equal(example.input_ids, full[i].input_ids[:max_length])
    assert all(full[i].prompt_length >= max_length for i in set(full) - set(data.kept.tolist()))


# --- Prompts that fill the length ---


@given(
    texts=st.lists(st.tuples(st.text(max_size=60), st.text(max_size=30), st.text(max_size=40)), min_size=1, max_size=6),
    max_length=st.integers(2, 60),
)
def test_cut_changes_no_record_that_drop_keeps(
    tokenizer: PreTrainedTokenizerBase, texts: list[tuple[str, str, str]], max_length: int
) -> None:
    anchor = Example("", "", "x", "", alone=True)  # keeps `encode` from refusing the lot
    examples = [*(Example(*text, "") for text in texts), anchor]
    try:
        drop = encode(examples, tokenizer, max_length)
    except DataError:
        return
    cut = encode(examples, tokenizer, max_length, long_prompts="cut")
    whole = encode(examples, tokenizer, 1_000_000)
    before = dict(zip(drop.kept.tolist(), drop.examples, strict=True))
    full = dict(zip(whole.kept.tolist(), whole.examples, strict=True))
    assert set(before) <= set(cut.kept.tolist())
    for i, example in zip(cut.kept.tolist(), cut.examples, strict=True):
        if i in before:
            assert example.prompt_length == before[i].prompt_length
            np.testing.assert_array_equal(example.input_ids, before[i].input_ids)
        else:
            assert_prompt_cut(full[i], example, max_length)
    rescued = len(cut.examples) - len(drop.examples)
    assert cut.num_prompts_cut == rescued == drop.num_dropped - cut.num_dropped
    assert set(full) == set(cut.kept.tolist()) or max_length < 4
    lost = [len(full[i].input_ids) - len(e.input_ids) for i, e in zip(cut.kept.tolist(), cut.examples, strict=True)]
    assert (cut.num_truncated, cut.num_tokens_cut) == (sum(n > 0 for n in lost), sum(lost))
    assert cut.needed == drop.needed


def assert_prompt_cut(whole: EncodedExample, cut: EncodedExample, max_length: int) -> None:
    """The beginning and the end of the prompt in equal parts, BOS aside, then the response, up to a quarter."""
    prompt, response = np.split(whole.input_ids, [whole.prompt_length])
    left, answer = np.split(cut.input_ids, [cut.prompt_length])
    assert len(cut.input_ids) == max_length
    assert len(answer) == min(len(response), max_length // 4)
    np.testing.assert_array_equal(answer, response[: len(answer)])
    tail = (len(left) - 1) // 2
    assert tail >= 1
    np.testing.assert_array_equal(left, [*prompt[: len(left) - tail], *prompt[-tail:]])
    assert left[0] == BOS


@pytest.mark.parametrize(("response", "whole"), [("Yes.", True), ("A tale of a bear, and of all that he did. " * 9, False)])
def test_a_response_survives_a_prompt_that_fills_the_length(
    tokenizer: PreTrainedTokenizerBase, response: str, whole: bool
) -> None:
    example = Example("Say what it is.", "A very long tale. " * 40, response, "")
    with pytest.raises(DataError, match="none of 1 records has a response token within max_length 64"):
        encode([example], tokenizer, 64, long_prompts="drop")
    data = encode([example], tokenizer, 64, long_prompts="cut")
    (cut,) = data.examples
    assert_prompt_cut(encode([example], tokenizer, 10_000).examples[0], cut, 64)
    assert (cut.input_ids[-1] == EOS) == whole
    prompt = str(tokenizer.decode(cut.input_ids[: cut.prompt_length], skip_special_tokens=True)).strip()
    assert prompt.startswith("Instruction:\nSay what")
    assert prompt.endswith("Response:")
    assert (data.num_prompts_cut, data.num_truncated, data.num_dropped) == (1, 1, 0)


def test_a_length_without_room_for_both_drops_as_before(tokenizer: PreTrainedTokenizerBase) -> None:
    for max_length in (2, 3):
        with pytest.raises(DataError, match=rf"1 no response token within {max_length}\)"):
            encode(EXAMPLES[:1], tokenizer, max_length, long_prompts="cut")
    (least,) = encode(EXAMPLES[:1], tokenizer, 4, long_prompts="cut").examples
    assert (least.prompt_length, least.num_targets) == (3, 1)  # BOS, one of each end


def test_what_has_no_response_is_dropped_however_long(tokenizer: PreTrainedTokenizerBase) -> None:
    blank = Example("A very long request. " * 30, "", " ", "")
    data = encode([blank, EXAMPLES[0]], tokenizer, 64, long_prompts="cut")
    assert (data.num_dropped, data.num_prompts_cut) == (1, 0)


def test_chunks_do_not_show(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    once = encode(EXAMPLES, tokenizer, 64)
    # by its full name, since in the package `encode` is the function
    monkeypatch.setattr(sys.modules["fedkseed.data.encode"], "CHUNK", 2)
    again = encode(EXAMPLES, tokenizer, 64)
    assert again.kept.tolist() == once.kept.tolist()
    for a, b in zip(once.examples, again.examples, strict=True):
        np.testing.assert_array_equal(a.input_ids, b.input_ids)


def test_nothing_in_gives_nothing_out(tokenizer: PreTrainedTokenizerBase) -> None:
    assert encode([], tokenizer, 64).examples == ()


def test_too_short_a_length_and_a_tokenizer_without_eos_are_refused(own_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InvalidValueError, match=r"max_length is 1; expected at least 2 tokens"):
        encode(EXAMPLES, own_tokenizer, 1)
    own_tokenizer.eos_token = None
    with pytest.raises(ModelError, match=r"has no EOS token, so a response would have no end; set eos_token in its"):
        encode(EXAMPLES, own_tokenizer, 64)


def test_dollys_records_are_counted_and_their_responses_come_back(shared: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    examples = read_examples(shared / "data" / "databricks-dolly-15k.jsonl")[:1500]
    data = encode(examples, tokenizer, 256)
    assert len(data.examples) + data.num_dropped == 1500
    for i, encoded in zip(data.kept[:20], data.examples, strict=False):
        response = tokenizer.decode(encoded.input_ids[encoded.prompt_length :], skip_special_tokens=True)
        assert examples[i].output.strip().startswith(str(response).strip())


def test_a_text_alone_has_no_prompt(own_tokenizer: PreTrainedTokenizerBase) -> None:
    own_tokenizer.chat_template = CHAT
    example = Example("", "", "Once upon a time.", "", alone=True)
    for name in TEMPLATES:
        (encoded,) = encode([example], own_tokenizer, 512, get_template(name)).examples
        assert encoded.input_ids.tolist() == [BOS, *alone(own_tokenizer, "Once upon a time."), EOS]
        assert encoded.prompt_length == 1
    own_tokenizer.backend_tokenizer.post_processor = ByteLevel()  # type: ignore[attr-defined]
    (encoded,) = encode([example], own_tokenizer, 512).examples
    assert (encoded.prompt_length, encoded.num_targets) == (0, len(encoded.input_ids) - 1)


def test_what_is_dropped_is_counted_by_reason_and_named(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = [replace(example, where=f"d.jsonl:{n}") for n, example in enumerate(EXAMPLES, start=1)]
    examples += [Example("", "", "", "", fault="it has only a response", where="e.json, record 3")]
    data = encode(examples, tokenizer, 128)
    assert why_dropped(data.dropped) == (
        "2 no response, first d.jsonl:2; 1 no response token within 128, first d.jsonl:5; "
        "1 it has only a response, first e.json, record 3"
    )
    many = [Dropped("", f"reason {n}") for n in range(6)]
    assert why_dropped(many) == "1 reason 0; 1 reason 1; 1 reason 2; 1 reason 3; 2 for other reasons"
