"""The demo's tasks, corpus and model: the same for everybody, apart where they must be, and small."""

import re
from collections import Counter
from itertools import islice, pairwise

import pytest
from tests.support.generators import global_states, seed_globally

from fedkseed import demo
from fedkseed.data import encode
from fedkseed.demo import corpus, tasks
from fedkseed.demo.lexicon import ADJECTIVES, CATEGORIES, IRREGULAR, NAMES, NOUNS, SEQUENCES, WORDS
from fedkseed.evaluation import evaluate_loss
from fedkseed.models.loading import base_path, load_model, load_tokenizer
from fedkseed.randomness import generator
from fedkseed.runs.records import client_names

SEEDS = (0, 1, 2)
NEEDED = ("README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def test_the_same_seed_gives_the_same_records_and_another_seed_others():
    assert demo.clients(1) == demo.clients(1)
    assert demo.held_out(1) == demo.held_out(1)
    assert demo.clients(1) != demo.clients(2)
    assert demo.held_out(1) != demo.held_out(2)


def test_global_generators_are_neither_read_nor_changed():
    seed_globally(0)
    before = global_states()
    records = demo.clients(3)
    assert global_states() == before
    seed_globally(1)
    assert demo.clients(3) == records


def asked(example):
    """What a record asks, read back from its wording: (kind, argument, what of it)."""
    for instruction, text in tasks.KINDS[example.category].wordings:
        pattern = re.escape(f"{instruction}|{text}")
        for place in ("argument", "about"):
            pattern = pattern.replace(re.escape(f"{{{place}}}"), f"(?P<{place}>.+)")
        if found := re.fullmatch(pattern, f"{example.instruction}|{example.input}"):
            fields = found.groupdict()
            return example.category, fields["argument"], fields.get("about", fields["argument"])
    raise AssertionError(example)


@pytest.mark.parametrize("seed", SEEDS)
def test_held_out_questions_are_new_in_any_wording(seed):
    known = {asked(e) for records in demo.clients(seed).values() for e in records}
    new = {asked(e) for e in demo.held_out(seed)}
    assert len(known) > 300
    assert not known & new


def test_held_out_questions_of_one_seed_are_no_clients_of_another():
    assert not {asked(e) for e in demo.held_out(0)} & {asked(e) for records in demo.clients(1).values() for e in records}


def test_questions_are_apart_by_their_arguments_whatever_the_wording():
    draw = generator(0, "test")
    for kind in tasks.KINDS.values():
        question = kind.draw(draw)
        assert len({tasks.bucket(q) for q in [question] * len(kind.wordings)}) == 1
        assert not tasks.is_held_out(question) or tasks.is_reserved(question)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_client_has_the_held_out_kind(seed):
    kinds = {e.category for records in demo.clients(seed).values() for e in records}
    assert kinds == set(tasks.TRAINED_KINDS)
    assert tasks.HELD_OUT_KIND not in kinds
    counts = Counter(e.category for e in demo.held_out(seed))
    assert counts == dict.fromkeys(tasks.TRAINED_KINDS, tasks.HELD_OUT_PER_KIND) | {
        tasks.HELD_OUT_KIND: tasks.HELD_OUT_OF_NEW_KIND
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_clients_are_unlike(seed):
    clients = demo.clients(seed)
    assert list(clients) == client_names(tasks.NUM_CLIENTS)
    favourites = set()
    for records in clients.values():
        assert len(records) == len(set(records)) == tasks.RECORDS_PER_CLIENT
        most = Counter(e.category for e in records).most_common(2)
        assert sum(count for _, count in most) >= 0.7 * len(records)
        favourites.add(frozenset(kind for kind, _ in most))
    assert len(favourites) >= 8


def test_transcripts_have_no_question_of_the_federation(monkeypatch):
    drawn = []
    respond = corpus._response
    monkeypatch.setattr(corpus, "_response", lambda rng, question: drawn.append(question) or respond(rng, question))
    draw = generator(0, "test")
    texts = [corpus.transcript(draw) for _ in range(300)]
    assert len(drawn) == 300
    assert not any(tasks.is_reserved(question) for question in drawn)
    assert all(text.startswith("Instruction:\n") for text in texts)


def test_the_corpus_is_a_function_of_its_generator():
    first, again, other = (list(islice(corpus.documents(generator(seed, "test")), 50)) for seed in (0, 0, 1))
    assert first == again != other
    for shares in (corpus.SORTS, corpus.RESPONSES):
        assert sum(shares.values()) == pytest.approx(1)


def test_the_world_is_consistent():
    assert len(WORDS) == len(set(WORDS))
    assert len(ADJECTIVES) == len(set(ADJECTIVES))
    assert set(NOUNS) >= IRREGULAR
    assert not set(CATEGORIES) & set(WORDS)


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_answers_follow_from_questions(kind):
    """Two questions with the same arguments have the same answer, and most different arguments have different ones."""
    draw = generator(0, "test", kind)
    answers = {}
    for _ in range(200):
        question = tasks.KINDS[kind].draw(draw)
        assert answers.setdefault(question.key, question.answer) == question.answer
    assert len(set(answers.values())) >= 8
    for sequence in SEQUENCES:
        for before, after in pairwise(sequence):
            assert answers.get(f"after|{before}|{before}", after) == after


class TestModel:
    """The model that is shipped."""

    def test_the_folder_is_whole_and_at_most_3_mb(self):
        folder = demo.model_folder()
        for name in NEEDED:
            assert (folder / name).is_file(), name
        assert sum(path.stat().st_size for path in folder.rglob("*")) <= 3_000_000

    def test_texts_come_back_from_the_tokenizer_and_fit(self):
        tokenizer = load_tokenizer(demo.model_folder())
        examples = [*demo.held_out(0), *(e for records in demo.clients(0).values() for e in records)]
        for text in {text for e in examples for text in (e.instruction, e.input, e.output)}:
            assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
        encoded = encode(examples, tokenizer, demo.SETTINGS["max_length"])
        assert encoded.num_dropped == encoded.num_truncated == 0
        assert tokenizer.unk_token_id not in {int(i) for e in encoded.examples for i in e.input_ids}
        assert all(e.input_ids[0] == tokenizer.bos_token_id for e in encoded.examples)

    def test_every_content_word_is_one_token(self):
        tokenizer = load_tokenizer(demo.model_folder())
        for word in (*WORDS, *NAMES, *CATEGORIES, *(word for sequence in SEQUENCES for word in sequence)):
            assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1, word

    def test_it_loads_can_be_re_read_from_its_file_and_has_learnt(self):
        folder = demo.model_folder()
        model = load_model(folder, "float32")
        assert base_path(folder, model) == folder
        tokenizer = load_tokenizer(folder)
        held_out = encode(demo.held_out(0), tokenizer, 96).examples
        assert 0.3 < evaluate_loss(model, held_out, 34, tokenizer.pad_token_id).loss < 2.5
