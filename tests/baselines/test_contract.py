"""The baselines: one contract table, and every law over every row of it.

Each row learns, changes what it tunes and nothing else, averages as the formula says, does the local steps that a loop by
hand does, goes on where it was stopped, and refuses what is not an answer.
"""

import json
import math
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.baselines import (
    ROWS,
    Tensors,
    algorithms,
    assert_close,
    coordinates_by_hand,
    logits_by_hand,
    loss_by_hand,
    row_settings,
    train_by_hand,
    two_point_by_hand,
)
from tests.support.command_line import CommandLine, assert_one_line, contents, flags
from tests.support.generators import global_states, seed_globally
from tests.support.runs import Watcher, held_out, read_metrics, simulation
from tests.support.tiny import tiny_settings

import fedkseed as fk
from fedkseed.baselines import Parameters, TensorServer, TunedTensors, attach, fingerprint, require_peft, restore
from fedkseed.baselines.messages import pack_tensors, size_cap
from fedkseed.baselines.projected import shares
from fedkseed.data import EncodedExample, collate
from fedkseed.errors import ConfigError, ModelError, RunError
from fedkseed.evaluation import evaluate_loss, response_loss
from fedkseed.evaluation.generation import generate
from fedkseed.federation.algorithms import ALGORITHMS, SOME_TAKE, that_take
from fedkseed.flower.config import read_config
from fedkseed.models.loading import load_model, load_tokenizer
from fedkseed.randomness import derive
from fedkseed.runs.folder import RunFolder
from fedkseed.runs.records import Records, prepare
from fedkseed.runs.settings import build
from fedkseed.runs.simulation import Simulation

adapters = pytest.mark.parametrize("algorithm", [name for name in ROWS if ALGORITHMS[name].needs_peft])
soft_prompts = pytest.mark.parametrize("algorithm", ["fedprompt", "fedptuning"])


def test_the_table_has_every_baseline() -> None:
    assert set(ROWS) == {name for name, row in ALGORITHMS.items() if not row.has_ledger}


@dataclass(frozen=True)
class Done:
    """A run that is over; tests leave its folder as it is."""

    path: Path
    simulation: Simulation
    checkpoint: TunedTensors
    metrics: list[dict[str, Any]]


@pytest.fixture(scope="module")
def done(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Done]:
    """Three rounds of a row, done when first asked for."""
    found: dict[str, Done] = {}

    def of(algorithm: str) -> Done:
        if algorithm not in found:
            path = tmp_path_factory.mktemp("done") / algorithm
            run, _ = simulation(path, row_settings(tiny, algorithm))
            checkpoint = run.train()
            assert isinstance(checkpoint, TunedTensors)
            found[algorithm] = Done(path, run, checkpoint, read_metrics(path))
        return found[algorithm]

    return of


def base_model(folder: Path) -> Any:
    return load_model(folder / "model", "float32")


def base_name(name: str) -> str:
    """The name in the bare model of a parameter of an attached one."""
    return name.removeprefix("base_model.").replace(".base_layer", "")


# --- It learns, and changes nothing else ---


@algorithms
def test_the_held_out_loss_falls(done: Callable[[str], Done], algorithm: str) -> None:
    losses = held_out(done(algorithm).metrics)
    assert len(losses) == 4
    assert losses[-1] < losses[0] - ROWS[algorithm].falls
    assert done(algorithm).checkpoint.round == 3


@algorithms
def test_only_what_is_tuned_changes(tiny: Path, done: Callable[[str], Done], algorithm: str) -> None:
    run, tuned = done(algorithm).simulation, done(algorithm).checkpoint.tensors
    run.restore()
    base = dict(base_model(tiny).named_parameters())
    now = {base_name(name): parameter for name, parameter in run.model.named_parameters()}
    assert base.keys() <= now.keys()
    if not ALGORITHMS[algorithm].needs_peft:
        assert tuned.keys() == ({"coordinates"} if ROWS[algorithm].tunes == "coordinates" else base.keys())
        assert not any(torch.equal(now[name], base[name]) for name in base)
        return
    assert all(torch.equal(now[name].view(torch.int32), base[name].view(torch.int32)) for name in base)
    shapes = {name: tuple(x.shape) for name, x in tuned.items()}
    if ROWS[algorithm].tunes == "lora":
        where = "model.layers.0.self_attn"
        expected = {f"{where}.{p}_proj.lora_{m}.default.weight": s for p in "qv" for m, s in (("A", (4, 16)), ("B", (16, 4)))}
        assert shapes == expected
    else:
        encoder = {f"mlp_head.{i}.{w}" for i in (0, 2, 4) for w in ("weight", "bias")}
        parts = {"embedding.weight"} | (encoder if ROWS[algorithm].tunes == "encoder" else set())
        assert shapes.keys() == {f"prompt_encoder.default.{part}" for part in parts}
        assert shapes["prompt_encoder.default.embedding.weight"] == (3, 16)
    begin = attach(base_model(tiny), build(row_settings(tiny, algorithm)))
    assert not any(torch.equal(x, tuned[name]) for name, x in Parameters(begin).read().items())


@algorithms
def test_metrics_count_steps_and_the_bytes_of_the_messages(done: Callable[[str], Done], algorithm: str) -> None:
    run = done(algorithm)
    floats = sum(4 * x.numel() for x in run.checkpoint.tensors.values())
    cap = size_cap({name: x.shape for name, x in run.checkpoint.tensors.items()})
    rounds = [event for event in run.metrics if event["event"] == "round"]
    assert len(rounds) == 3
    for event in rounds:
        assert event["num_replies"] == 3
        assert event["num_steps"] == 3 * run.simulation.config.local_steps
        assert event["dropped_steps"] == 0
        assert floats < event["bytes_down"] <= cap
        assert floats < event["bytes_up"] <= cap
        assert math.isfinite(event["train_loss"])


@algorithms
def test_the_seed_is_all_the_randomness_there_is(tiny: Path, tmp_path: Path, algorithm: str) -> None:
    """And the global generators are neither read nor moved."""

    digests = []
    for name, seed, noise in (("a", 7, 1), ("b", 7, 2), ("c", 8, 1)):
        run, _ = simulation(tmp_path / name, row_settings(tiny, algorithm, seed=seed, num_rounds=1, local_steps=2))
        seed_globally(noise)
        before = global_states()
        digests.append(run.train().digest())
        assert global_states() == before
    assert digests[0] == digests[1] != digests[2]


# --- The local steps, by hand ---


@algorithms
def test_a_round_of_one_client_is_the_loop_by_hand(tiny: Path, tmp_path: Path, algorithm: str) -> None:
    row, steps = ROWS[algorithm], 4
    changes = {"num_clients": 1, "fraction_train": 1.0, "num_rounds": 1, "local_steps": steps, "partition": "iid"}
    run, _ = simulation(tmp_path / "run", row_settings(tiny, algorithm, **changes))
    projected = row.tunes == "coordinates"  # of the weights after these steps
    start = Parameters(base_model(tiny)).read() if projected else dict(run.server.checkpoint.tensors)
    (client,) = run.clients.values()
    task: Any = client.task
    drawn: list[list[EncodedExample]] = []
    told = "loss" if algorithm == "fedzo" else "differentiable_loss"
    original = getattr(task, told)

    def listen(records: Any) -> Any:
        drawn.append([task._examples[i] for i in records])
        return original(records)

    setattr(task, told, listen)
    found = run.train().tensors
    if algorithm == "fedzo":
        assert all(
            a is b for first, second in zip(drawn[::2], drawn[1::2], strict=True) for a, b in zip(first, second, strict=True)
        )
        drawn = drawn[::2]  # both probes of a step are of one batch
    assert [len(batch) for batch in drawn] == [2] * steps
    assert len({id(example) for batch in drawn for example in batch}) == 2 * steps  # within a pass, no record twice
    base = base_model(tiny).requires_grad_(False)
    scale = run.config.lora_alpha / run.config.lora_rank

    def loss(tensors: Tensors, step: int) -> torch.Tensor:
        total, count = loss_by_hand(base, "all" if projected else row.tunes, tensors, drawn[step], scale)
        return total / count

    if algorithm == "fedzo":
        key = derive(int.from_bytes(run.server.run_id, "little"), 1, 0, client.name, "pool")  # type: ignore[attr-defined]
        pool = fk.SeedPool(key, steps, "hadamard")
        expected = two_point_by_hand(start, loss, pool, row.lr, 0.01)
        wrong = two_point_by_hand(start, loss, pool, row.lr, -0.01)  # the probes' signs do not matter, so this is right too
        assert_close(wrong, expected, 1e-4)
        wrong = two_point_by_hand(start, loss, pool, 2 * row.lr, 0.01)
    else:
        expected = train_by_hand(row.optimizer, start, loss, steps, row.lr)
        wrong = train_by_hand("adam" if row.optimizer == "sgd" else "sgd", start, loss, steps, row.lr)
    if projected:
        key, counts = (
            derive(run.config.seed, "pool"),
            shares([start[name].numel() for name in sorted(start)], row.settings["num_seeds"]),
        )
        expected, wrong, start = (coordinates_by_hand(start, end, key, counts) for end in (expected, wrong, start))
    assert_close(found, expected, 1e-4)
    with pytest.raises(AssertionError):
        assert_close(found, wrong, 1e-4)
    with pytest.raises(AssertionError):
        assert_close(found, start, 1e-4)


# --- Going on ---


class Stop(Exception):  # noqa: N818
    """What a watcher raises to stop a run."""


@algorithms
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tiny: Path, tmp_path: Path, algorithm: str) -> None:
    settings = row_settings(tiny, algorithm, num_rounds=3, local_steps=3, schedule="linear")
    whole, _ = simulation(tmp_path / "whole", settings)
    expected = whole.train()
    run, watcher = simulation(tmp_path / "run", settings)

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "round" and event["server_round"] == 2:
            raise Stop

    watcher.event = stop  # type: ignore[method-assign]
    with pytest.raises(Stop):
        run.train()
    assert TunedTensors.load(tmp_path / "run" / "tensors.safetensors").round == 2
    folder = RunFolder.open(tmp_path / "run")
    resumed = Simulation(folder, prepare(folder.config, Watcher()), Watcher())
    assert resumed.server.checkpoint.round == 2
    assert resumed.train().digest() == expected.digest()
    assert plain(tmp_path / "run") == plain(tmp_path / "whole")
    for name in ("tensors.safetensors", "config.toml"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        ".lock",
        "config.toml",
        "metrics.jsonl",
        "tensors.safetensors",
    ]


def plain(run: Path) -> list[dict[str, Any]]:
    """A run's events without what a clock or the machine says."""
    return [{k: v for k, v in e.items() if not k.startswith("seconds") and k != "peak_bytes"} for e in read_metrics(run)]


@algorithms
def test_a_checkpoint_of_another_base_or_algorithm_is_refused(
    tiny: Path, other_model: Path, done: Callable[[str], Done], tmp_path: Path, algorithm: str
) -> None:
    saved = done(algorithm).checkpoint
    another = "fedavg" if algorithm != "fedavg" else "fedit"
    with pytest.raises(RunError, match=rf"the tensors are of {algorithm}, the settings say {another}; go on with"):
        TensorServer(build(row_settings(tiny, another)), saved, ["ada"])
    model = base_model(tiny)
    with pytest.raises(RunError, match=rf"the tensors are of {algorithm} on another base model"):
        restore(model, build(row_settings(tiny, another)), saved)
    settings = build(row_settings(tiny, algorithm, num_rounds=4, model=str(other_model)))
    folder = RunFolder.create(tmp_path / "run", settings)
    saved.save(folder.checkpoint_path)
    with pytest.raises(RunError, match=r"tensors\.safetensors is of another base model than .*other; go on with the run's own"):
        Simulation(folder, prepare(settings, Watcher()), Watcher())
    with pytest.raises(RunError, match=r"on another base model; load the one that the run started from"):
        restore(load_model(other_model, "float32"), build(row_settings(tiny, algorithm)), saved)


@algorithms
def test_the_checkpoint_on_the_disk_is_the_tuned_model(tiny: Path, done: Callable[[str], Done], algorithm: str) -> None:
    """A fresh base with it has the held-out loss that the run noted last; without it, another."""
    run = done(algorithm)
    records: Records = prepare(run.simulation.config, Watcher())
    model = restore(base_model(tiny), run.simulation.config, TunedTensors.load(run.path / "tensors.safetensors"))
    loss = evaluate_loss(model, records.held_out, 8, records.pad_id).loss
    assert loss == pytest.approx(held_out(run.metrics)[-1], rel=1e-6)
    fresh = attach(base_model(tiny), run.simulation.config)
    assert evaluate_loss(fresh, records.held_out, 8, records.pad_id).loss == pytest.approx(held_out(run.metrics)[0], rel=1e-6)


# --- What is attached ---


@algorithms
def test_what_is_attached_is_a_function_of_the_seed(tiny: Path, algorithm: str) -> None:
    read = []
    for seed, noise in ((7, 1), (7, 2), (8, 1)):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        model = base_model(tiny)
        before_it = fingerprint(model)
        attached = attach(model, build(row_settings(tiny, algorithm, seed=seed)))
        assert torch.equal(torch.get_rng_state(), before)
        assert not attached.training
        assert not any(module.training for module in attached.modules())
        if not ALGORITHMS[algorithm].needs_peft:
            assert attached is model
            assert fingerprint(attached) == before_it
        read.append(pack_tensors(Parameters(attached).read()))
    assert read[0] == read[1]
    assert (read[0] == read[2]) == (not ALGORITHMS[algorithm].needs_peft)


@pytest.mark.parametrize("algorithm", ["fedit", "fedit-sgd"])
def test_a_fresh_adapter_changes_nothing_and_its_scale_is_alpha_by_rank(tiny: Path, algorithm: str) -> None:
    ids = torch.tensor([[1, 5, 6, 7, 2]])
    base = base_model(tiny)
    attached = attach(base_model(tiny), build(row_settings(tiny, algorithm)))
    assert torch.equal(attached(ids).logits, base(ids).logits)
    parameters = Parameters(attached)
    draw = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in parameters.shapes.items()}
    parameters.write(tensors)
    by_hand = logits_by_hand(base, "lora", tensors, ids[0].tolist(), 12 / 4)
    assert torch.allclose(attached(ids).logits[0], by_hand, atol=1e-4)
    assert not torch.allclose(attached(ids).logits[0], logits_by_hand(base, "lora", tensors, ids[0].tolist(), 1.0), atol=1e-2)


def test_a_fresh_soft_prompt_is_of_tokens(tiny: Path) -> None:
    attached = attach(base_model(tiny), build(row_settings(tiny, "fedprompt")))
    prompt = Parameters(attached).read()["prompt_encoder.default.embedding.weight"]
    embeddings = base_model(tiny).get_input_embeddings().weight
    assert all(any(torch.equal(row, embedding) for embedding in embeddings) for row in prompt)


@adapters
def test_a_missing_extra_is_told_with_the_command_that_installs_it(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    asked: list[str] = []
    require_peft(ALGORITHMS[algorithm])
    # by its module: the package has a function of that name
    monkeypatch.setattr(sys.modules["fedkseed.baselines.attach"], "find_spec", asked.append)
    model, settings = base_model(tiny), build(row_settings(tiny, algorithm))
    names = set(dict(model.named_parameters()))
    message = rf"--algorithm {algorithm} needs an extra; install it with: pip install -e '\.\[baselines\]' in fedkseed's clone"
    for call in (
        lambda: require_peft(ALGORITHMS[algorithm]),
        lambda: attach(model, settings),
        lambda: prepare(settings, Watcher()),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    assert asked == ["peft"] * 3
    assert set(dict(model.named_parameters())) == names
    for row in ALGORITHMS.values():
        if not row.needs_peft:
            require_peft(row)


def test_an_architecture_without_adapters_is_told(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = base_model(tiny)
    monkeypatch.setattr(type(model.config), "model_type", "unheard-of")
    with pytest.raises(
        ModelError, match=r"fedit cannot be attached to LlamaForCausalLM \(.*\); choose another --algorithm"
    ) as told:
        attach(model, build(row_settings(tiny, "fedit")))
    assert "\n" not in str(told.value)


# --- Soft prompts: the loss and the answers ---


def examples_of(tiny: Path, count: int = 6) -> list[EncodedExample]:
    """Of different lengths."""
    records = prepare(build(tiny_settings(tiny)), Watcher())
    found = [example for part in records.clients.values() for example in part][:count]
    cut = [EncodedExample(e.input_ids[i:], e.prompt_length - i) for i, e in enumerate(found)]
    assert len({len(example.input_ids) for example in cut}) > 2
    return cut


@soft_prompts
def test_the_loss_behind_a_soft_prompt_is_that_of_one_example_at_a_time(
    tiny: Path, done: Callable[[str], Done], algorithm: str
) -> None:
    tuned, base = done(algorithm).checkpoint, base_model(tiny)
    model = restore(base_model(tiny), done(algorithm).simulation.config, tuned)
    examples = examples_of(tiny)
    for batch in (examples, examples[:1], examples[2:4]):
        with torch.inference_mode():
            total, count = response_loss(model, collate(batch, 0))
            expected, expected_count = loss_by_hand(base, "prompt", tuned.tensors, batch)
            without, _ = loss_by_hand(base, "all", {}, batch)
        assert count == expected_count == sum(len(e.input_ids) - e.prompt_length for e in batch)
        assert total.item() == pytest.approx(expected.item(), rel=1e-5)
        assert total.item() != pytest.approx(without.item(), rel=1e-3)  # the negative control: no prompt


@soft_prompts
def test_answers_behind_a_soft_prompt_are_those_of_a_loop_without_a_cache(
    tiny: Path, done: Callable[[str], Done], algorithm: str
) -> None:
    config, base = done(algorithm).simulation.config, base_model(tiny)
    model, tokenizer = attach(base_model(tiny), config), load_tokenizer(str(tiny / "model"))
    draw, parameters = torch.Generator().manual_seed(3), Parameters(model)
    # far from any token, so that the prompt decides
    parameters.write({name: torch.randn(shape, generator=draw) for name, shape in parameters.shapes.items()})
    tensors = parameters.read()
    base.lm_head.weight.data *= 30  # decided answers: no ties of rounding
    model.get_base_model().lm_head.weight.data *= 30
    examples = examples_of(tiny)

    def loop(tunes: str, tensors: Tensors, example: EncodedExample) -> str:
        ids = example.input_ids[: example.prompt_length].tolist()
        for _ in range(8):
            ids.append(int(logits_by_hand(base, tunes, tensors, ids)[-1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        return tokenizer.decode(ids[example.prompt_length :], skip_special_tokens=True)

    with torch.inference_mode():
        expected = [loop("prompt", tensors, example) for example in examples]
        without = [loop("all", {}, example) for example in examples]
    assert generate(model, tokenizer, examples, batch_size=4, max_new_tokens=8) == expected
    assert len(set(expected)) > 1
    assert without != expected  # the negative control: no prompt


@soft_prompts
def test_a_soft_prompt_takes_room_of_the_context(tiny: Path, algorithm: str) -> None:
    prepare(build(row_settings(tiny, algorithm, max_length=48, num_virtual_tokens=16)), Watcher())
    with pytest.raises(
        ConfigError, match=r"^--max-length is 48 and the soft prompt 17; .* takes 64 tokens, so give 47 or less$"
    ):
        prepare(build(row_settings(tiny, algorithm, max_length=48, num_virtual_tokens=17)), Watcher())
    left_open = build(row_settings(tiny, algorithm, num_virtual_tokens=17) | {"max_length": None})
    assert prepare(left_open, Watcher()).config.max_length == 47
    with pytest.raises(ConfigError, match=r"takes 64 tokens and the soft prompt 63: no room for a record; lower --num-virtual"):
        prepare(left_open.model_copy(update={"num_virtual_tokens": 63}), Watcher())


# --- Settings ---

OTHER_VALUES: dict[str, Any] = {
    "eps": 0.25,
    "noise": "gaussian",
    "loss_clip": 3.5,
    "num_seeds": 77,
    "wire": "float32",
    "dtype": "bfloat16",
    "importance_clip": 5.5,
    "importance_start": 1.5,
    "lora_rank": 3,
    "lora_alpha": 2.5,
    "num_virtual_tokens": 7,
    "rounds_per_page": 3,
    "basis": "coefficients",
    "movement": "proportional",
    "local_optimizer": "adam",
    "server_optimizer": "sign",
    "server_lr": 0.5,
    "two_point_clients": 0.25,
    "checkpointing": "on",
    "compile": "on",
    "max_grad": 50.0,
    "max_value": 50.0,
    "train": "model.norm.weight",
    "freeze": "model.norm.weight",
    "directions": 3,
    "secure_sums": "on",
    "secure_clip": 5.5,
    "audit_log": "on",
    "aggregator": "median",
    "summation": "exact",
    "edges": 3,
    "shared_seeds": "on",
    "objective": "dpo",
    "scaling": "ranks",
    "max_moved": 0.5,
    "max_new_tokens": 7,
    "temperature": 0.5,
    "dpo_beta": 0.3,
}


def test_every_setting_that_not_all_take_is_tried() -> None:
    assert OTHER_VALUES.keys() == SOME_TAKE


@pytest.mark.parametrize("setting", OTHER_VALUES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_setting_that_an_algorithm_does_not_take_is_refused(tiny: Path, algorithm: str, setting: str) -> None:
    value = OTHER_VALUES[setting]
    given = {"model": str(tiny / "model"), "data": str(tiny / "records.jsonl"), "lr": 0.1, "algorithm": algorithm}
    if ALGORITHMS[algorithm].takes(setting):
        if ALGORITHMS[algorithm].takes("basis"):  # the table's wants K a power of two and hadamard noise
            given["basis"] = "coefficients"
        objective = {"dpo_beta": "dpo", "scaling": "exact-match", "max_new_tokens": "exact-match", "temperature": "exact-match"}
        if setting in objective:
            given["objective"] = objective[setting]
        if setting == "secure_clip":
            given["secure_sums"] = "on"
        if setting == "server_optimizer":
            given["server_lr"] = 0.5
        if setting == "aggregator" and ALGORITHMS[algorithm].takes("shared_seeds"):  # which the median wants
            given["shared_seeds"] = "on"
        assert getattr(build(given | {setting: value}), setting) == value
        return
    flag, others = setting.replace("_", "-"), ", ".join(that_take(setting))
    message = f"--{flag} is {value!r} and --algorithm {algorithm} does not take it; leave it out, or choose one of {others}"
    with pytest.raises(ConfigError) as told:
        build(given | {setting: value})
    assert str(told.value) == message


@algorithms
def test_the_settings_of_a_run_lack_what_the_algorithm_does_not_take(done: Callable[[str], Done], algorithm: str) -> None:
    written = tomllib.loads((done(algorithm).path / "config.toml").read_text())
    assert written["algorithm"] == algorithm
    for setting in SOME_TAKE:
        if setting not in ("loss_clip", "train", "freeze"):  # None is not written
            assert (setting in written) == ALGORITHMS[algorithm].takes(setting), setting
    assert RunFolder.open(done(algorithm).path).config == done(algorithm).simulation.config


@algorithms
def test_a_baseline_is_refused_on_flower(tiny: Path, tmp_path: Path, algorithm: str) -> None:
    given = {"algorithm": algorithm, "model": str(tiny / "model"), "lr": 0.1, "run": str(tmp_path / "run")}
    assert read_config(given | {"algorithm": "fedkseed-pro"}).algorithm == "fedkseed-pro"
    expected = (
        rf"algorithm is '{algorithm}': on Flower only fedkseed, fedkseed-pro, fedkseed-grad run; "
        "the baselines run in fedkseed simulate"
    )
    with pytest.raises(ConfigError, match=expected):
        read_config(given)


# --- The command line ---


def test_the_commands_on_a_baselines_run(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    run, file = tmp_path / "run", tmp_path / "run" / "tensors.safetensors"
    settings = row_settings(tiny, "fedit", num_rounds=2)
    result = fedkseed("simulate", *flags(settings), "--run", run)
    assert (result.code, result.stderr) == (0, "")
    tuned = TunedTensors.load(file)
    assert f"done: {file}, {file.stat().st_size:,} bytes, digest {tuned.digest()}\n" in result.stdout
    metrics = read_metrics(run)

    scores = tmp_path / "scores.json"
    result = fedkseed("evaluate", run, "--answers", 2, "--output", scores)
    assert (result.code, result.stderr) == (0, "")
    assert "after 2 rounds" in result.stdout
    content = json.loads(scores.read_text())
    assert (content["tensors"], content["rounds"]) == (tuned.digest(), 2)
    assert content["tuned"]["overall"]["loss"] == pytest.approx(held_out(metrics)[-1], rel=1e-5)
    assert content["base"]["overall"]["loss"] != pytest.approx(content["tuned"]["overall"]["loss"], rel=1e-3)
    assert content["tuned"]["overall"]["num_answers"] == 2

    for what in (run, file):
        result = fedkseed("inspect", what)
        assert (result.code, result.stderr) == (0, "")
        told = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
        assert (told["digest"], told["rounds"], told["algorithm"]) == (tuned.digest(), "2", "fedit")
        assert told["base"] == fingerprint(base_model(tiny)) == tuned.base
        assert told["tensors"] == f"{len(tuned.tensors)} with {sum(x.numel() for x in tuned.tensors.values()):,} numbers"

    before = contents(run)
    result = fedkseed("export", run, tmp_path / "exported", "--ledger-only")
    assert_one_line(result, 2, f"--ledger-only: {run} is the run of a baseline, which has no ledger")
    assert not (tmp_path / "exported").exists()
    assert contents(run) == before
    result = fedkseed("report", run)
    assert (result.code, result.stderr) == (0, "")
    assert "fedit" in (run / "report" / "index.html").read_text()

    assert fedkseed("simulate", "--resume", run, "--num-rounds", 3).code == 0
    assert TunedTensors.load(file).round == 3
    whole, _ = simulation(tmp_path / "whole", settings | {"num_rounds": 3})
    assert whole.train().digest() == TunedTensors.load(file).digest()


def test_evaluate_refuses_records_that_do_not_fit_behind_the_soft_prompt(
    fedkseed: CommandLine, tiny: Path, tmp_path: Path
) -> None:
    """As `simulate` does: of the 64 tokens that the model takes, the run's soft prompt needs 40."""
    run = tmp_path / "run"
    settings = row_settings(tiny, "fedprompt", num_virtual_tokens=40, num_rounds=1, local_steps=1, max_length=24)
    result = fedkseed("simulate", *flags(settings), "--run", run)
    assert (result.code, result.stderr) == (0, "")
    assert fedkseed("evaluate", run, "--answers", 1).code == 0
    refused = fedkseed("evaluate", run, "--max-length", 25)
    assert_one_line(refused, 2, "--max-length is 25 and the soft prompt 40;", "takes 64 tokens, so give 24 or less")


def test_a_wrong_setting_of_a_baseline_is_one_line(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    result = fedkseed("simulate", *flags(row_settings(tiny, "fedit", num_seeds=64)), "--run", tmp_path / "run")
    assert_one_line(result, 2, "--num-seeds is 64 and --algorithm fedit does not take it; leave it out, or choose one of")
    assert not (tmp_path / "run").exists()
