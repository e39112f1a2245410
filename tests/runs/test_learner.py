"""What a run finds out of its model before data are tokenised, and what becomes of it, whoever runs."""

import datetime
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.command_line import CommandLine, assert_one_line, flags
from tests.support.runs import Watcher, simulation, trained
from tests.support.tiny import CHAT, tiny_settings

import fedkseed as fk
from fedkseed.errors import ConfigError, ModelError
from fedkseed.evaluation import mean_loss
from fedkseed.federation.algorithms import ALGORITHMS
from fedkseed.models.loading import load_model, load_tokenizer
from fedkseed.runs import learner as module
from fedkseed.runs.folder import RunFolder
from fedkseed.runs.learner import load_learner
from fedkseed.runs.records import prepare
from fedkseed.runs.settings import build, started


def changed(tiny: Path, folder: Path, file: str, **values: Any) -> Path:
    """A copy of the tiny model with other values in one of its files."""
    shutil.copytree(tiny / "model", folder)
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **values}))
    return folder


# --- The longest record ---


def test_left_open_it_is_what_the_model_takes(tiny: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny, num_rounds=1) | {"max_length": None}
    assert prepare(build(settings), Watcher()).config.max_length == 64
    result = fk.simulate({k: v for k, v in settings.items() if v is not None}, tmp_path / "run")
    assert RunFolder.open(tmp_path / "run").config.max_length == 64
    again = fk.simulate({k: v for k, v in settings.items() if v is not None} | {"num_rounds": 2}, tmp_path / "run")
    assert (result.ledger.round, again.ledger.round) == (1, 2)


def test_or_1024_where_the_model_takes_more(tiny: Path, tmp_path: Path) -> None:
    model = changed(tiny, tmp_path / "model", "config.json", max_position_embeddings=4096)
    assert prepare(build(tiny_settings(tiny, model=str(model)) | {"max_length": None}), Watcher()).config.max_length == 1024


@pytest.mark.parametrize("by", ["simulate", "tune"])
def test_more_than_the_model_takes_is_refused_before_anything_is_read(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    monkeypatch.setattr("fedkseed.runs.records.read_source", None)
    with pytest.raises(ConfigError, match=r"^--max-length is 65; .*model takes 64 tokens, so give 64 or less$"):
        getattr(fk, by)(tiny_settings(tiny, max_length=65))


# --- Ids ---


def test_a_token_that_the_embedding_does_not_have_is_named(tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny / "model", model)
    tokenizer = load_tokenizer(model)
    tokenizer.add_tokens(["elephant"])
    tokenizer.save_pretrained(model)
    rows = load_model(model).get_input_embeddings().num_embeddings
    prepare(build(tiny_settings(tiny, model=str(model))), Watcher())  # nobody uses it
    (tmp_path / "data.jsonl").write_text('{"instruction": "name the animal", "response": "elephant"}\n' * 4)
    settings = tiny_settings(tiny, model=str(model), data=str(tmp_path / "data.jsonl"), num_clients=2)
    with pytest.raises(ModelError, match=rf"gives the id {rows} \('elephant'\), its embedding has {rows} rows; take the token"):
        prepare(build(settings), Watcher())


def test_padding_that_does_not_exist_changes_nothing(tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny / "model", model)
    tokenizer = load_tokenizer(model)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(model)
    plain = trained(tmp_path / "plain", tiny_settings(tiny))[0]
    padded = trained(tmp_path / "padded", tiny_settings(tiny, model=str(model)))[0]
    assert prepare(build(tiny_settings(tiny, model=str(model))), Watcher()).pad_id == 0
    assert (padded.coefficients == plain.coefficients).all()


# --- Padding that the model sees ---


def test_records_of_one_length_share_a_pass_where_padding_counts(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.probe
    monkeypatch.setattr(module, "probe", lambda *args: replace(real(*args), pads=False))
    watcher = Watcher()
    (tmp_path / "d.jsonl").write_text(
        "".join(f'{{"instruction": "name {"a " * (i % 3)}", "response": "dog"}}\n' for i in range(40))
    )
    config = build(tiny_settings(tiny, num_rounds=1, batch_size=4, data=str(tmp_path / "d.jsonl"), partition="iid"))
    loaded = load_learner(config, watcher)
    assert watcher.notes == ["padding would change this model's losses: records of one length share a pass"]
    records = prepare(config, watcher, learner=loaded)
    assert records.pad_id is None
    masks = []
    loaded.model.register_forward_pre_hook(lambda *call: masks.append(call[2].get("attention_mask")), with_kwargs=True)
    from fedkseed.runs.simulation import Simulation

    Simulation(RunFolder.create(tmp_path / "run", config), records, watcher, loaded.model).train()
    assert masks
    assert all(mask is None for mask in masks)
    assert len({len(e.input_ids) for own in records.clients.values() for e in own}) > 1


def test_the_mean_over_passes_is_that_over_tokens(tiny: Path) -> None:
    from fedkseed.data import collate

    records = prepare(build(tiny_settings(tiny)), Watcher())
    model = load_model(tiny / "model", "float32")
    whole = records.clients["client-0"][:7]
    examples = [replace(e, prompt_length=5 - i % 3, input_ids=e.input_ids[: 12 - i % 4]) for i, e in enumerate(whole)]
    apart, together = (mean_loss(model, collate(examples, pad)) for pad in (None, 0))
    torch.testing.assert_close(apart, together)
    apart.backward()
    assert model.lm_head.weight.grad is not None


# --- What is tuned ---


TUNED = ("model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize("algorithm", ["fedkseed", "fedkseed-grad", "fedavg", "fedzo", "ferret"])
def test_only_what_the_patterns_say_is_tuned(tiny: Path, tmp_path: Path, algorithm: str) -> None:
    more = {"eps": 0.01} if ALGORITHMS[algorithm].takes("eps") else {}
    seeds = {"num_seeds": 128} if ALGORITHMS[algorithm].takes("num_seeds") else {}
    base = {key: value for key, value in tiny_settings(tiny, num_rounds=1).items() if key not in ("eps", "num_seeds")}
    settings = base | more | seeds | {"algorithm": algorithm, "train": ["*.mlp.*", "*norm*"], "freeze": "*norm*"}
    run, _ = simulation(tmp_path / "run", settings)
    before = {name: x.detach().clone() for name, x in run.model.named_parameters()}
    checkpoint = run.train()
    run.restore()
    moved = {name for name, x in run.model.named_parameters() if not torch.equal(x, before[name])}
    assert moved == set(TUNED)
    if isinstance(checkpoint, fk.Ledger):
        assert checkpoint.base.frozen == tuple(sorted(before.keys() - set(TUNED)))
    scores = fk.evaluate(tmp_path / "run")
    assert scores.tuned.overall.loss != scores.base.overall.loss


def test_patterns_from_the_command_line_and_a_file(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    settings = flags(tiny_settings(tiny, num_rounds=1))
    told = ["--train", "*.mlp.*", "--train", "*norm*", "--freeze", "*norm*"]
    assert fedkseed("simulate", *settings, *told, "--run", tmp_path / "run").code == 0
    ledger = fk.Ledger.load(tmp_path / "run" / "ledger.safetensors")
    (tmp_path / "c.toml").write_text('train = ["*.mlp.*", "*norm*"]\nfreeze = "*norm*"\n')
    assert fedkseed("simulate", *settings, "--config", tmp_path / "c.toml", "--run", tmp_path / "other").code == 0
    assert fk.Ledger.load(tmp_path / "other" / "ledger.safetensors").digest() == ledger.digest()
    assert len(ledger.base.frozen) == 9
    assert fedkseed("simulate", "--resume", tmp_path / "run", "--num-rounds", 2).code == 0
    near = fedkseed("simulate", *settings, "--freeze", "mlp", "--run", tmp_path / "near")
    assert_one_line(near, 2, "--freeze 'mlp' matches no tensor", "model.layers.0.mlp.down_proj.weight", "try '*mlp*'")
    assert_one_line(fedkseed("simulate", *settings, "--freeze", "a,,b"), 2, "--freeze is 'a,,b': expected patterns")
    lora = {key: value for key, value in tiny_settings(tiny).items() if key not in ("eps", "num_seeds")}
    refused = fedkseed("simulate", *flags(lora | {"algorithm": "fedit"}), "--train", "*")
    assert_one_line(refused, 2, "--train is '*' and --algorithm fedit does not take it")


def test_what_no_loss_depends_on_is_left_alone_and_said(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.load_model

    def with_more(*args: Any) -> Any:
        model = real(*args)
        model.vision = torch.nn.Linear(3, 2)
        return model

    monkeypatch.setattr(module, "load_model", with_more)
    monkeypatch.setattr("fedkseed.runs.simulation.load_model", with_more)
    run, watcher = simulation(tmp_path / "run", tiny_settings(tiny, num_rounds=1))
    assert watcher.notes[0] == "left alone: 2 tensors on which no loss on text depends, such as vision.bias"
    assert run.train().base.frozen == ("vision.bias", "vision.weight")


# --- The end of a text ---


def test_a_tokenizer_that_ends_a_text_otherwise_than_the_model_is_warned_of(tiny: Path, tmp_path: Path) -> None:
    """As of a folder that was converted by a library that took the wrong special token."""
    tokenizer = load_tokenizer(str(tiny / "model"))
    own, other = tokenizer.eos_token_id, next(i for i in tokenizer.all_special_ids if i != tokenizer.eos_token_id)
    folder = changed(tiny, tmp_path / "model", "config.json", eos_token_id=other)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": other}))
    watcher = Watcher()
    load_learner(build(tiny_settings(tiny, model=str(folder))), watcher)
    (note,) = watcher.notes
    assert note.startswith(f"warning: {folder}: its tokenizer ends a text with {tokenizer.eos_token!r} ({own}), its config")
    assert f"({other})" in note
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [other, own]}))  # as chat models have it
    load_learner(build(tiny_settings(tiny, model=str(folder))), watcher)
    assert watcher.notes == [note]


# --- The run's day ---


def chatty(tiny: Path, folder: Path) -> Path:
    shutil.copytree(tiny / "model", folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = "{% if strftime_now('%d') == '03' %}red {% else %}blue {% endif %}" + CHAT
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def on_day(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets the day on which runs start."""

    def choose(day: str) -> None:
        class Today(datetime.date):
            @classmethod
            def today(cls) -> datetime.date:
                return datetime.date.fromisoformat(day)

        monkeypatch.setattr("fedkseed.runs.settings.datetime.date", Today)

    return choose


def test_a_run_keeps_the_day_on_which_it_started(tiny: Path, tmp_path: Path, on_day: Callable[[str], None]) -> None:
    settings = tiny_settings(tiny, model=str(chatty(tiny, tmp_path / "model")), template="chat", num_rounds=2)
    on_day("2026-01-03")
    whole = fk.simulate(settings, tmp_path / "whole")
    fk.simulate(settings | {"num_rounds": 1}, tmp_path / "run")
    on_day("2026-01-04")
    again = fk.simulate(settings, tmp_path / "run")
    assert again.ledger.digest() == whole.ledger.digest()
    assert RunFolder.open(tmp_path / "run").config.date == datetime.date(2026, 1, 3)
    assert fk.evaluate(tmp_path / "run").tuned.overall.loss == pytest.approx(again.history[2], rel=1e-5)
    other = fk.simulate(settings, tmp_path / "other")  # the control: the day matters
    assert other.history[0] != whole.history[0]
    told = fk.simulate(settings | {"date": "2026-01-03"}, tmp_path / "told")
    assert told.ledger.digest() == whole.ledger.digest()


def test_only_a_chat_template_has_a_day(tiny: Path) -> None:
    config = build(tiny_settings(tiny))
    assert started(config) is config
    with pytest.raises(
        ConfigError, match=r"--date is '2026-01-03' and the template is 'plain'; only the template 'chat' takes it"
    ):
        build(tiny_settings(tiny, date="2026-01-03"))
    with pytest.raises(ConfigError, match=r"--date is 'tomorrow'"):
        build(tiny_settings(tiny, template="chat", date="tomorrow"))


# --- What is refused, by whoever runs ---


def test_a_base_that_holds_no_numbers_is_refused_before_the_run_exists(
    fedkseed: CommandLine, tiny: Path, tmp_path: Path
) -> None:
    model = load_model(tiny / "model", "float32")
    model.model.norm.weight.data[3] = torch.nan
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(tiny / "model").save_pretrained(tmp_path / "model")
    settings = flags(tiny_settings(tiny, model=str(tmp_path / "model")))
    for more in (("--run", tmp_path / "run"), ("--lr", "auto")):
        result = fedkseed("simulate", *settings, *more)
        assert_one_line(result, 2, "the base model holds numbers that are not finite, in model.norm.weight")
    assert not (tmp_path / "run").exists()
