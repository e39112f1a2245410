"""A run on disk: what is written, what is refused, and what a kill may leave behind."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest

from fedkseed import files
from fedkseed.errors import ConfigError, LedgerError, RunError, RunFolderError
from fedkseed.files import write_atomically
from fedkseed.runs.folder import RunFolder, new_folder
from fedkseed.runs.metrics import best_round
from fedkseed.runs.settings import SimulationConfig, build


@pytest.fixture
def config(tmp_path: Path) -> SimulationConfig:
    (tmp_path / "data.jsonl").write_text("{}\n")
    return build({"model": "a/b", "data": tmp_path / "data.jsonl", "lr": 1e-4})


@pytest.fixture
def run(tmp_path: Path, config: SimulationConfig) -> RunFolder:
    return RunFolder.create(tmp_path / "run", config)


NUMBERS = {"evaluation": {"eval_loss": 2.5}, "round": {"dropped_steps": 0, "bytes_down": 1.0, "bytes_up": 1.0, "seconds": 0.1}}


def event(server_round: int, kind: str = "round") -> dict[str, Any]:
    return {"event": kind, "server_round": server_round, **NUMBERS[kind]}


# --- The folder ---


def test_a_new_run_holds_its_settings_and_nothing_else(run: RunFolder, config: SimulationConfig) -> None:
    assert [path.name for path in run.path.iterdir()] == ["config.toml"]
    assert RunFolder.open(run.path).config == config
    assert run.load_ledger() is None
    assert run.metrics() == []


@pytest.mark.parametrize("left", ["ledgers", "metrics"])
def test_a_run_that_has_lost_its_checkpoint_is_not_begun_anew(run: RunFolder, left: str) -> None:
    """Else what is left of it would be deleted; a round's event alone is what a kill leaves behind."""
    if left == "ledgers":
        (run.path / "ledgers").mkdir()
        run.ledgers.path(0).write_bytes(b"")
        assert run.load_checkpoint() is None
        run.ledgers.path(3).write_bytes(b"")
    else:
        run.append_metrics(event(1))
        assert run.load_checkpoint() is None
        for server_round in (2, 3, 4):
            run.append_metrics(event(server_round))
    lost = lambda: run.tuned_file(9)  # noqa: E731
    for read in (run.load_checkpoint, run.tuned_file, *([lost] if left == "metrics" else [])):
        with pytest.raises(RunFolderError, match=r"has lost its ledger\.safetensors: 3 rounds or more were done; restore it"):
            read()
    if left == "ledgers":
        assert run.tuned_file(3) == run.ledgers.path(3)
        with pytest.raises(RunFolderError, match="keeps no ledger of round 9"):
            run.tuned_file(9)


def test_a_run_older_than_long_prompts_dropped_them(run: RunFolder) -> None:
    file = run.path / "config.toml"
    text = file.read_text()
    assert 'long_prompts = "cut"\n' in text
    file.write_text(text.replace('long_prompts = "cut"\n', ""))
    assert RunFolder.open(run.path).config.long_prompts == "drop"
    file.write_text(text)
    assert RunFolder.open(run.path).config.long_prompts == "cut"


def test_what_a_run_was_started_with_and_did_nothing_is_forgotten(run: RunFolder) -> None:
    """It was taken once; a run that starts with it is refused now, and one that is there opens and goes on."""
    file = run.path / "config.toml"
    text = file.read_text()
    changes = {
        'partition = "dirichlet"': 'partition = "iid"',
        "alpha = 0.5": "alpha = 3.0",
        "min_partition_size = 1": "min_partition_size = 4",
    }
    for old, new in changes.items():
        assert f"\n{old}\n" in text
        text = text.replace(f"\n{old}\n", f"\n{new}\n")
    file.write_text(f"importance_start = 2.0\n{text}")
    found = RunFolder.open(run.path).simulation
    assert (found.partition, found.alpha, found.importance_start, found.min_partition_size) == ("iid", 0.5, 0.0, 1)
    assert build(found.model_dump()) == found
    for void in ({"alpha": 3}, {"min_partition_size": 4}, {"importance_start": 2}):
        with pytest.raises(ConfigError, match=r"^--(alpha|min-partition-size|importance-start) is "):
            build(found.model_dump() | void)


def test_the_folders_above_a_run_are_made(tmp_path: Path, config: SimulationConfig) -> None:
    assert RunFolder.create(tmp_path / "a" / "b" / "run", config).path.is_dir()


@pytest.mark.parametrize(
    "name", ["config.toml", "metrics.jsonl", "ledger.safetensors", "tensors.safetensors", "audit.jsonl", "ledgers"]
)
def test_any_file_of_a_run_makes_it_one(tmp_path: Path, config: SimulationConfig, name: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("x")
    remedy = "go on with --resume .*run" if name == "config.toml" else "give it its config.toml back"
    with pytest.raises(RunFolderError, match=rf"holds a run already \({name}\); {remedy}, or choose another"):
        RunFolder.create(tmp_path / "run", config)
    assert [(path.name, path.read_text()) for path in (tmp_path / "run").iterdir()] == [(name, "x")]


def test_a_folder_with_other_things_may_be_used(tmp_path: Path, config: SimulationConfig) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("x")
    (tmp_path / "run" / f".config.toml.{2**30}-0badcafe.tmp").write_text("a kill left this")
    RunFolder.create(tmp_path / "run", config)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.toml", "notes.txt"]


def test_opening_what_is_no_run_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"holds no run \(no config\.toml\); start one with fedkseed simulate --run"):
        RunFolder.open(tmp_path / "none")


def test_opening_damaged_settings_is_refused(run: RunFolder) -> None:
    (run.path / "config.toml").write_text("lr = ")
    with pytest.raises(RunError, match=r"config\.toml is not TOML \(.*\); restore it from a copy"):
        RunFolder.open(run.path)
    (run.path / "config.toml").write_text("lr = 1e-4\n")
    with pytest.raises(ConfigError, match="--model is missing"):
        RunFolder.open(run.path)


def test_a_damaged_ledger_is_no_missing_ledger(run: RunFolder) -> None:
    run.ledger_path.write_bytes(b"")
    with pytest.raises(LedgerError, match="not a ledger, or damaged"):
        run.load_ledger()


# --- Metrics ---


def test_events_are_lines_in_order(run: RunFolder) -> None:
    events = [event(0, "evaluation"), event(1) | {"text": "zwei\nZeilen \u2028 é"}, event(1, "evaluation")]
    for one in events:
        run.append_metrics(one)
    assert run.metrics() == events
    lines = (run.path / "metrics.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line) for line in lines[:-1]] == events
    assert lines[-1] == b""


@pytest.mark.parametrize("rest", ["{", '{"event": "round", "server_round": 2', "\u00e9"])
def test_an_unfinished_line_is_no_event(run: RunFolder, rest: str) -> None:
    run.append_metrics(event(1))
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write(rest)
    assert run.metrics() == [event(1)]
    run.cut_metrics(1)
    run.append_metrics(event(2))
    assert run.metrics() == [event(1), event(2)]


DAMAGED_LINES = {
    "half a line": b'{"event": "round", "server_ro',
    "half a line and the next": b'{"event": "rou{"event": "round", "server_round": 1}',
    "a number": b"17",
    "a text": b'"round"',
    "nothing": b"",
    "null": b"null",
    "no event": b'{"server_round": 1}',
    "an event that is no text": b'{"event": ["round"], "server_round": 1}',
    "no round": b'{"event": "evaluation", "eval_loss": 2.5}',
    "a round below 0": b'{"event": "evaluation", "server_round": -1, "eval_loss": 2.5}',
    "a round and a half": b'{"event": "evaluation", "server_round": 1.5, "eval_loss": 2.5}',
    "a true round": b'{"event": "evaluation", "server_round": true, "eval_loss": 2.5}',
    "an endless round": b'{"event": "evaluation", "server_round": Infinity, "eval_loss": 2.5}',
    "no loss": b'{"event": "evaluation", "server_round": 1}',
    "a loss that is a text": b'{"event": "evaluation", "server_round": 1, "eval_loss": "2.5"}',
    "no bytes": b'{"event": "round", "server_round": 1, "dropped_steps": 0, "bytes_down": 1.0, "seconds": 0.1}',
    "not UTF-8": b'{"event": "round \xff", "server_round": 1}',
    "deep": b"[" * 100_000,
    "zeros": bytes(100),
}


@pytest.mark.parametrize("name", DAMAGED_LINES)
def test_a_damaged_line_is_left_out_and_told(run: RunFolder, name: str) -> None:
    """The others are read; a resume sets the damaged file aside, whole, and goes on with them."""
    path = run.path / "metrics.jsonl"
    good = [event(0, "evaluation"), event(1), event(1, "evaluation"), event(2)]
    lines = [json.dumps(one).encode() for one in good]
    content = b"\n".join([*lines[:2], DAMAGED_LINES[name], *lines[2:], b""])
    path.write_bytes(content)
    assert run.metrics() == good
    damage = run.recorded().damage
    assert damage is not None
    assert re.fullmatch(rf"1 line of {re.escape(str(path))} cannot be read \(line 3: .{{3,90}}\)", damage)
    note = run.cut_metrics(1)
    assert note == f"{damage}; all of it is kept as metrics.jsonl.damaged-1, and the run goes on from its checkpoint"
    assert (run.metrics(), run.recorded().damage) == (good[:3], None)
    assert path.with_name("metrics.jsonl.damaged-1").read_bytes() == content
    assert run.cut_metrics(1) is None


def test_losses_are_by_round_and_the_best_is_the_first_of_the_smallest(run: RunFolder) -> None:
    for server_round, loss in enumerate([3.0, math.nan, 2.5, 2.5, math.inf]):
        run.append_metrics(event(server_round, "evaluation") | {"eval_loss": loss})
    losses = run.recorded().losses
    assert list(losses) == [0, 1, 2, 3, 4]
    assert best_round(losses) == 2
    assert best_round({0: math.nan}) is best_round({}) is None


def test_a_folder_in_the_place_of_metrics_is_set_aside(run: RunFolder) -> None:
    path = run.path / "metrics.jsonl"
    (path / "inside").mkdir(parents=True)
    path.with_name("metrics.jsonl.damaged-1").write_text("from an earlier time")
    assert run.metrics() == []
    assert run.recorded().damage == f"{path} cannot be read (Is a directory)"
    assert "kept as metrics.jsonl.damaged-2" in str(run.cut_metrics(0))
    assert (path.with_name("metrics.jsonl.damaged-2") / "inside").is_dir()
    run.append_metrics(event(1))
    assert run.metrics() == [event(1)]


def test_metrics_that_may_not_be_read_are_set_aside(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of another user; root, who may run this, may read all."""
    run.append_metrics(event(1))
    read = Path.read_bytes

    def forbidden(path: Path) -> bytes:
        if path.name == "metrics.jsonl":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    assert str(run.cut_metrics(1)).startswith(f"{run.path / 'metrics.jsonl'} cannot be read (Permission denied); all of it is")
    monkeypatch.undo()
    assert run.metrics() == []
    assert (run.path / "metrics.jsonl.damaged-1").read_text() == json.dumps(event(1)) + "\n"


def test_metrics_are_cut_back_to_a_round(run: RunFolder) -> None:
    events = [event(0, "evaluation"), event(1), event(1, "evaluation"), event(2), event(2, "evaluation"), event(3)]
    for one in events:
        run.append_metrics(one)
    run.cut_metrics(3)
    assert run.metrics() == events
    run.cut_metrics(1)
    assert run.metrics() == events[:3]
    run.cut_metrics(0)
    assert run.metrics() == events[:1]


def test_cutting_no_metrics_is_fine(run: RunFolder) -> None:
    run.cut_metrics(0)
    assert run.metrics() == []


def test_metrics_that_cannot_be_written_say_so(run: RunFolder) -> None:
    (run.path / "metrics.jsonl").mkdir()
    with pytest.raises(RunError, match=r"metrics\.jsonl: cannot write \(.*\); make room, then --resume"):
        run.append_metrics(event(1))


def test_metrics_that_cannot_be_cut_say_so(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a run is resumed on a full disk."""
    run.append_metrics(event(1))
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(RunError, match=r"metrics\.jsonl: cannot write \(No space left on device\)"):
        run.cut_metrics(0)


# --- Atomic writes ---


def full_disk(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("failure", [full_disk, interrupt])
@pytest.mark.parametrize("place", ["fsync", "rename"])
def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Any, place: str
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    if place == "fsync":
        monkeypatch.setattr(os, "fsync", failure)
    else:
        monkeypatch.setattr(Path, "replace", failure)
        monkeypatch.setattr(os, "replace", failure)
    with pytest.raises((OSError, KeyboardInterrupt)):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_replaces_and_syncs_file_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Synced before it is renamed (else a power cut leaves an empty file under the right name), and the folder after."""
    path = tmp_path / "file"
    seen: list[tuple[str, bool]] = []
    synced = os.fsync

    def fsync(descriptor: int) -> None:
        seen.append((str(Path(f"/proc/self/fd/{descriptor}").readlink()), path.exists()))
        synced(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)
    write_atomically(path, b"x" * 100_000)
    assert path.read_bytes() == b"x" * 100_000
    (first, before), (second, after) = seen
    assert Path(first).parent == tmp_path
    assert Path(first) != path
    assert (second, before, after) == (str(tmp_path), False, True)


def test_a_write_into_no_folder_fails(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "none" / "file", b"x")


def test_runs_that_start_in_one_second_have_folders_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.strftime", lambda form: "20261122-120000")
    names = {new_folder(Path("runs"), "demo-").name for _ in range(8)}
    assert len(names) > 1  # four random digits: all eight alike is one in 2^112
    assert all(re.fullmatch("demo-20261122-120000-[0-9a-f]{4}", name) for name in names)
