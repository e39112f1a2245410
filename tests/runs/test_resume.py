"""Runs that are killed, interrupted or prolonged: what `simulate --resume` makes of them is the uninterrupted run."""

import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.support.command_line import FEDKSEED, CommandLine, assert_one_line, contents, environment, flags
from tests.support.runs import held_out, read_metrics
from tests.support.tiny import tiny_settings

from fedkseed.kseed.ledger import Ledger
from fedkseed.runs.audit import audit
from fedkseed.runs.metrics import read_metrics as recorded

KILLED = -signal.SIGKILL
FILES = [".lock", "audit.jsonl", "config.toml", "ledger.safetensors", "ledgers", "metrics.jsonl"]


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run: its settings, the bytes of its ledger and of those that it kept, its events without what a clock
    says."""

    settings: dict[str, Any]
    ledger: bytes
    kept: dict[str, bytes]
    events: list[dict[str, Any]]


def events(run: Path) -> list[dict[str, Any]]:
    of_the_machine = ("seconds", "seconds_by", "peak_bytes")
    return [{k: v for k, v in event.items() if k not in of_the_machine} for event in read_metrics(run)]


def whole(fedkseed: CommandLine, folder: Path, settings: dict[str, Any]) -> Whole:
    result = fedkseed("simulate", *flags(settings), "--run", folder)
    assert (result.code, result.stderr) == (0, "")
    return Whole(settings, (folder / "ledger.safetensors").read_bytes(), kept(folder), events(folder))


def kept(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "ledgers").iterdir()}


@pytest.fixture(scope="module")
def uninterrupted(fedkseed: CommandLine, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Three rounds; Pro, so that its history counts too; evaluations after rounds 0, 2 and 3."""
    settings = tiny_settings(tiny, algorithm="fedkseed-pro", eval_every=2, local_steps=3, audit_log="on")
    return whole(fedkseed, tmp_path_factory.mktemp("whole") / "run", settings)


def assert_as_uninterrupted(run: Path, expected: Whole) -> None:
    """The same ledgers, byte for byte, and each event once, in order, with the same numbers; a log that leads to them."""
    assert (run / "ledger.safetensors").read_bytes() == expected.ledger
    assert kept(run) == expected.kept
    assert events(run) == expected.events
    assert sorted(path.name for path in run.iterdir()) == files(expected)
    if (run / "audit.jsonl").exists():
        assert audit(run).notes == ()


def files(expected: Whole) -> list[str]:
    return [name for name in FILES if name != "audit.jsonl" or expected.settings.get("audit_log") == "on"]


def assert_loadable(run: Path, expected: Whole) -> None:
    """After a kill: what is there is whole. No ledger without its events, no loss without its ledger."""
    for server_round in recorded(run / "metrics.jsonl").losses:
        assert (run / "ledgers" / f"round-{server_round:05}.safetensors").exists()
    for path in (run / "ledgers").glob("*.safetensors"):
        assert path.read_bytes() == expected.kept[path.name]
    if (run / "ledger.safetensors").exists():
        rounds = Ledger.load(run / "ledger.safetensors").round
        text = (run / "metrics.jsonl").read_text()
        assert text.count('"event": "round"') >= rounds
        assert 1 <= rounds <= expected.settings["num_rounds"]
    if (run / "audit.jsonl").exists():
        audit_of_a_killed_run(run)


def audit_of_a_killed_run(run: Path) -> None:
    """What is there leads to the ledger, or a round further; else this raises."""
    if (run / "audit.jsonl").read_bytes().count(b"\n"):
        audit(run)


def go_on(fedkseed: CommandLine, run: Path, expected: Whole) -> None:
    """Resume; where the settings were not yet on the disk there is no run yet, and it starts anew in the same folder."""
    if (run / "config.toml").exists():
        result = fedkseed("simulate", "--resume", run)
    else:
        assert_one_line(fedkseed("simulate", "--resume", run), 2, "holds no run")
        result = fedkseed("simulate", *flags(expected.settings), "--run", run)
    assert (result.code, result.stderr) == (0, "")


# --- Killed at every write, fsync and rename ---


@pytest.fixture(scope="module")
def kill_points(fedkseed: CommandLine, uninterrupted: Whole, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What a whole run passes: names of writes (before, in the midst), fsyncs and renames, in order."""
    folder = tmp_path_factory.mktemp("points")
    result = fedkseed(
        "simulate", *flags(uninterrupted.settings), "--run", folder / "run", kill=(-1, str(folder / "run"), str(folder / "log"))
    )
    assert (result.code, result.stderr) == (0, "")
    assert_as_uninterrupted(folder / "run", uninterrupted)
    return (folder / "log").read_text().splitlines()


def test_every_file_is_written_whole_or_by_lines(kill_points: list[str]) -> None:
    """The kill points are where they should be: else the tests below would kill nowhere."""
    count = Counter(kill_points)
    assert count["rename ledger.safetensors"] == 3
    assert count["rename config.toml"] == 1
    assert count["write metrics.jsonl"] == 3 + 3  # three rounds, three evaluations
    assert count["write audit.jsonl"] == 3
    assert kill_points.index("write audit.jsonl") < kill_points.index("rename ledger.safetensors")
    assert [count[f"rename round-{i:05}.safetensors"] for i in range(4)] == [1, 0, 1, 1]  # the ledgers of the evaluations
    assert count["fsync"] >= 2 * count["rename ledger.safetensors"] + 6
    assert "write ledger.safetensors" not in count  # only ever beside it
    assert "write config.toml" not in count
    for i, name in enumerate(kill_points):
        if name.startswith("rename"):  # written, synced, renamed, the folder synced
            assert [point.split()[0] for point in kill_points[i - 3 : i + 2]] == ["write", "half", "fsync", "rename", "fsync"]


def plain(point: str) -> str:
    """A kill point without what makes a temporary name its process's own."""
    return re.sub(r"\.[0-9]+-[0-9a-f]+\.tmp$", ".tmp", point)


PARTS = 4  # a quarter of the points every day, of all kinds; the slow part has the others


@pytest.mark.parametrize("part", [0, *[pytest.param(part, marks=pytest.mark.slow) for part in range(1, PARTS)]])
def test_a_kill_at_any_write_fsync_or_rename_loses_nothing(
    fedkseed: CommandLine, uninterrupted: Whole, kill_points: list[str], tmp_path: Path, part: int
) -> None:
    for point in range(1 + part, len(kill_points) + 1, PARTS):
        run, log = tmp_path / f"run-{point}", tmp_path / f"log-{point}"
        result = fedkseed("simulate", *flags(uninterrupted.settings), "--run", run, kill=(point, str(run), str(log)))
        assert result.code == KILLED, (kill_points[point - 1], result)
        assert [plain(name) for name in log.read_text().splitlines()] == [plain(name) for name in kill_points[:point]]
        assert_loadable(run, uninterrupted)
        go_on(fedkseed, run, uninterrupted)
        assert_as_uninterrupted(run, uninterrupted)


@pytest.fixture(scope="module")
def of_pages(fedkseed: CommandLine, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Three rounds of changes: two pages, the remainder of one bit a number, an optimiser's state; a client of scalars."""
    settings = tiny_settings(
        tiny, algorithm="fedkseed-grad", num_seeds=128, lr=0.003, wire="sign", rounds_per_page=2, num_rounds=3,
        server_optimizer="momentum", server_lr=0.5, two_point_clients=0.25, eval_every=3, local_steps=2, audit_log="on",
    )  # fmt: skip
    return whole(fedkseed, tmp_path_factory.mktemp("pages") / "run", settings)


def assert_as_pages(run: Path, expected: Whole) -> None:
    """As above, but for bytes down: a server that goes on knows of no client's pages, and sends them all once more."""

    def without(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in event.items() if k != "bytes_down"} for event in found]

    assert (run / "ledger.safetensors").read_bytes() == expected.ledger
    assert kept(run) == expected.kept
    assert without(events(run)) == without(expected.events)
    assert sorted(path.name for path in run.iterdir()) == FILES
    assert audit(run).notes == ()


@pytest.mark.parametrize("part", [0, *[pytest.param(part, marks=pytest.mark.slow) for part in range(1, 6)]])
def test_a_kill_at_any_write_loses_no_page_and_no_state(
    fedkseed: CommandLine, of_pages: Whole, tmp_path: Path, part: int
) -> None:
    log = tmp_path / "log"
    result = fedkseed(
        "simulate", *flags(of_pages.settings), "--run", tmp_path / "run", kill=(-1, str(tmp_path / "run"), str(log))
    )
    assert result.code == 0
    points = log.read_text().splitlines()
    assert Counter(points)["rename ledger.safetensors"] == 3
    assert len(Ledger.load(tmp_path / "run" / "ledger.safetensors").pages) == 2
    for point in range(1 + part, len(points) + 1, 6):
        run, log = tmp_path / f"run-{point}", tmp_path / f"log-{point}"
        result = fedkseed("simulate", *flags(of_pages.settings), "--run", run, kill=(point, str(run), str(log)))
        assert result.code == KILLED, (points[point - 1], result)
        assert_loadable(run, of_pages)
        go_on(fedkseed, run, of_pages)
        assert_as_pages(run, of_pages)


@pytest.mark.parametrize("stop", [1, 2])
def test_more_rounds_turn_the_pages_of_a_longer_run(fedkseed: CommandLine, of_pages: Whole, tmp_path: Path, stop: int) -> None:
    """A run that ended where a page was over has not turned it; the one that goes on has."""
    run = tmp_path / "run"
    whole(fedkseed, run, of_pages.settings | {"num_rounds": stop})
    assert len(Ledger.load(run / "ledger.safetensors").pages) == -(-stop // 2)
    assert fedkseed("simulate", "--resume", run, "--num-rounds", 3).code == 0
    assert (run / "ledger.safetensors").read_bytes() == of_pages.ledger


@pytest.mark.slow
def test_a_resumed_run_may_be_killed_too(
    fedkseed: CommandLine, uninterrupted: Whole, kill_points: list[str], tmp_path: Path
) -> None:
    """Kill at some points, then every resume again, each a little later than the last, until one gets through."""
    for point in range(1, len(kill_points) + 1, 5):
        run = tmp_path / f"run-{point}"
        assert fedkseed("simulate", *flags(uninterrupted.settings), "--run", run, kill=(point, str(run), f"{run}.log")).code
        for again in range(5, 200, 6):
            if not (run / "config.toml").exists():
                break
            result = fedkseed("simulate", "--resume", run, kill=(again, str(run), f"{run}.log"))
            assert_loadable(run, uninterrupted)
            if result.code != KILLED:
                break
        go_on(fedkseed, run, uninterrupted)
        assert_as_uninterrupted(run, uninterrupted)


def test_a_comparison_that_must_fail(uninterrupted: Whole, fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    """The negative control: another seed's run is told apart, and so is one with an event twice."""
    run = tmp_path / "run"
    whole(fedkseed, run, uninterrupted.settings | {"seed": 8})
    with pytest.raises(AssertionError):
        assert_as_uninterrupted(run, uninterrupted)
    (run / "ledger.safetensors").write_bytes(uninterrupted.ledger)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines, lines[-1]]) + "\n")
    with pytest.raises(AssertionError):
        assert_as_uninterrupted(run, uninterrupted)


# --- Killed at random moments ---


def lines_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def killed_at_random(
    fedkseed: CommandLine, folder: Path, settings: dict[str, Any], kills: int, compare: Callable[[Path, Whole], None]
) -> None:
    """Kill a run so often, at once or in one of its next rounds, and go on; where it got to its end, start another."""
    expected, draw, run, left = whole(fedkseed, folder / "whole", settings), random.Random(kills), folder / "run-0", kills
    while left:
        begun = (run / "config.toml").exists()
        start = ["--resume", run] if begun else [*flags(settings), "--run", run]
        lines, delay = (lines_of(run) + draw.randrange(1, 4), 0.1) if draw.random() < 0.8 else (0, 1.0)
        watched = run / "metrics.jsonl" if lines else Path(__file__)  # which is there from the start
        result = fedkseed("simulate", *start, send=(str(watched), lines, draw.uniform(0, delay), signal.SIGKILL))
        if result.code == KILLED:
            left -= 1
            assert_loadable(run, expected)
        else:
            assert (result.code, result.stderr) == (0, "")
            compare(run, expected)
            run = folder / f"run-{left}"
    go_on(fedkseed, run, expected)
    compare(run, expected)


def test_three_kills_at_random_moments_lose_nothing(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny, num_rounds=12, local_steps=20, audit_log="on")
    killed_at_random(fedkseed, tmp_path, settings, 3, assert_as_uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("pages", [False, True])
def test_a_hundred_kills_at_random_moments_lose_nothing(
    fedkseed: CommandLine, tiny: Path, of_pages: Whole, tmp_path: Path, pages: bool
) -> None:
    """Fifty of a run of scalars with a history, fifty of one of pages, signs, a client of scalars and an optimiser's state."""
    if pages:
        settings = of_pages.settings | {"num_rounds": 20, "rounds_per_page": 4, "eval_every": 1, "lr": 1e-3, "server_lr": 0.1}
        killed_at_random(fedkseed, tmp_path, settings, 50, assert_as_pages)
    else:
        settings = tiny_settings(tiny, algorithm="fedkseed-pro", num_rounds=20, lr=1e-3, audit_log="on")
        killed_at_random(fedkseed, tmp_path, settings, 50, assert_as_uninterrupted)


def launch(*args: object) -> subprocess.Popen[str]:
    """The console script, as a user runs it."""
    command = [str(FEDKSEED), *[str(arg) for arg in args]]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())


def wait_for(run: Path, ready: Callable[[Path], bool], process: subprocess.Popen[str]) -> None:
    """Until the run's folder is as wanted, or its process has ended."""
    deadline = time.monotonic() + 240
    while not ready(run) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.slow
def test_twenty_kills_at_random_moments_lose_nothing(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    """Of the console script. Moments from the first sign of the run on; a resume that gets far enough is killed again."""
    draw = random.Random(2)
    settings = tiny_settings(tiny, num_rounds=80, local_steps=20)
    expected = whole(fedkseed, tmp_path / "whole", settings)
    run = tmp_path / "run"
    for _ in range(20):
        start = ["--resume", run] if (run / "config.toml").exists() else [*flags(settings), "--run", run]
        process = launch("simulate", *start)
        before = lines_of(run)
        wait_for(run, lambda run, before=before: lines_of(run) > before, process)  # type: ignore[misc]
        time.sleep(draw.uniform(0, 0.3))
        process.kill()
        process.communicate()
        assert process.returncode == KILLED  # else the run was over before
        assert_loadable(run, expected)
    go_on(fedkseed, run, expected)
    assert_as_uninterrupted(run, expected)


# --- Damaged metrics ---


def test_a_run_goes_on_from_its_ledger_whatever_became_of_its_metrics(
    fedkseed: CommandLine, uninterrupted: Whole, tmp_path: Path
) -> None:
    """A bare number, half a line inside, a folder: one line says so, and the ledger is the uninterrupted run's."""
    begun = tmp_path / "begun"
    whole(fedkseed, begun, uninterrupted.settings | {"num_rounds": 2})
    lines = (begun / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    contents = {"number": [lines[0], b"17\n", *lines[1:]], "half": [lines[0], lines[1][:40], *lines[2:]], "folder": []}
    for name, content in contents.items():
        run = Path(shutil.copytree(begun, tmp_path / name))
        (run / "metrics.jsonl").unlink()
        if name == "folder":
            (run / "metrics.jsonl").mkdir()
        else:
            (run / "metrics.jsonl").write_bytes(b"".join(content))
        result = fedkseed("simulate", "--resume", run, "--num-rounds", 3)
        assert (result.code, result.stderr) == (0, "")
        assert result.stdout.count("cannot be read") == 1
        assert "all of it is kept as metrics.jsonl.damaged-1, and the run goes on from its checkpoint" in result.stdout
        assert (run / "ledger.safetensors").read_bytes() == uninterrupted.ledger
        kept = [event for event in uninterrupted.events if event in events(run)]
        assert events(run) == kept
        assert {(event["event"], event["server_round"]) for event in kept} >= {
            ("evaluation", 2),
            ("round", 3),
            ("evaluation", 3),
        }
        assert fedkseed("report", run).stderr == ""


# --- Ctrl-C ---


def test_an_interrupt_exits_130_with_the_hint_and_a_whole_ledger(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    """At several moments of a round, so that losses, sweeps, messages and files are all interrupted some time."""
    settings = tiny_settings(tiny, num_rounds=500)
    for moment in range(6):
        run = tmp_path / f"run-{moment}"
        when = (str(run / "metrics.jsonl"), 4, 0.013 * moment, signal.SIGINT)
        result = fedkseed("simulate", *flags(settings), "--run", run, send=when)
        rounds = Ledger.load(run / "ledger.safetensors").round
        hint = f"interrupted; round {rounds} is safe in {run}. Go on with:\n  fedkseed simulate --resume {run}\n"
        assert hint in result.stdout + result.stderr
        assert "Traceback" not in result.stdout + result.stderr
        assert result.code == 130
        assert 1 <= rounds < 500
        assert [path.name for path in run.glob(".*")] == [".lock"]
    assert fedkseed("simulate", "--resume", run, "--num-rounds", rounds + 1).code == 0
    expected = whole(fedkseed, tmp_path / "whole", settings | {"num_rounds": rounds + 1})
    assert_as_uninterrupted(run, expected)


def test_an_interrupt_before_the_first_round_is_done_says_so(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    when = (str(run / "metrics.jsonl"), 1, 0.1, signal.SIGINT)  # the evaluation of the base model is done
    result = fedkseed("simulate", *flags(tiny_settings(tiny, local_steps=60000)), "--run", run, send=when)
    assert result.code == 130
    assert f"no round was done yet in {run}. Go on with:\n  fedkseed simulate --resume {run}\n" in result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert not (run / "ledger.safetensors").exists()


@pytest.mark.slow
def test_an_interrupt_of_the_console_script_exits_130(tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = launch("simulate", *flags(tiny_settings(tiny, num_rounds=5000)), "--run", run)
    wait_for(run, lambda run: (run / "ledger.safetensors").exists(), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"--resume {run}" in out + err
    assert "Traceback" not in out + err
    assert Ledger.load(run / "ledger.safetensors").round >= 1


# --- Going on ---


def test_a_folder_without_a_ledger_starts_at_round_0_if_no_round_was_done(
    fedkseed: CommandLine, uninterrupted: Whole, tmp_path: Path
) -> None:
    """Else its kept ledgers would be deleted, and what its privacy has cost forgotten."""
    run = tmp_path / "run"
    whole(fedkseed, run, uninterrupted.settings)
    (run / "ledger.safetensors").unlink()
    for left in ("ledgers", "metrics.jsonl"):
        before = contents(run)
        assert_one_line(fedkseed("simulate", "--resume", run), 2, "has lost its ledger.safetensors", "restore it from a copy")
        assert {name: x for name, x in contents(run).items() if name != ".lock"} == before
        shutil.rmtree(run / left) if left == "ledgers" else (run / left).unlink()
    go_on(fedkseed, run, uninterrupted)
    assert_as_uninterrupted(run, uninterrupted)


def test_resuming_a_finished_run_changes_nothing(fedkseed: CommandLine, uninterrupted: Whole, tmp_path: Path) -> None:
    run = tmp_path / "run"
    whole(fedkseed, run, uninterrupted.settings)
    before = {name: (run / name).read_bytes() for name in FILES[1:] if name != "ledgers"}
    for extra in ([], ["--num-rounds", 3]):
        result = fedkseed("simulate", "--resume", run, *extra)
        assert result.code == 0
        assert "all 3 rounds were done already" in result.stdout
        found = {path.name: path.read_bytes() for path in run.iterdir() if path.name not in (FILES[0], "ledgers")}
        assert (found, kept(run)) == (before, uninterrupted.kept)


def test_an_unfinished_line_of_metrics_is_cut(fedkseed: CommandLine, uninterrupted: Whole, tmp_path: Path) -> None:
    run = tmp_path / "run"
    whole(fedkseed, run, uninterrupted.settings)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "round", "server_round": 4, "lr')
    go_on(fedkseed, run, uninterrupted)
    assert_as_uninterrupted(run, uninterrupted)


@pytest.mark.parametrize("algorithm", ["fedkseed", "fedkseed-pro"])
@pytest.mark.parametrize("noise", ["hadamard", "gaussian"])
def test_more_rounds_are_the_rounds_of_a_longer_run(
    fedkseed: CommandLine, tiny: Path, tmp_path: Path, noise: str, algorithm: str
) -> None:
    settings = tiny_settings(tiny, noise=noise, algorithm=algorithm, local_steps=3)
    run = tmp_path / "run"
    whole(fedkseed, run, settings | {"num_rounds": 2})
    assert fedkseed("simulate", "--resume", run, "--num-rounds", 4).code == 0
    expected = whole(fedkseed, tmp_path / "whole", settings | {"num_rounds": 4})
    assert_as_uninterrupted(run, expected)
    assert (run / "config.toml").read_bytes() == (tmp_path / "whole" / "config.toml").read_bytes()
    assert len(held_out(expected.events)) == 5


@pytest.mark.parametrize("value", [0, -1, "many"])
def test_more_rounds_are_checked_as_ever(fedkseed: CommandLine, uninterrupted: Whole, tmp_path: Path, value: object) -> None:
    run = tmp_path / "run"
    whole(fedkseed, run, uninterrupted.settings)
    assert_one_line(fedkseed("simulate", "--resume", run, "--num-rounds", value), 2, f"--num-rounds is '{value}'")
    assert_as_uninterrupted(run, uninterrupted)
