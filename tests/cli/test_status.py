"""`fedkseed status`: where a run is, in three forms that say the same, while it goes on and after."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.command_line import CommandLine, assert_one_line

from fedkseed.files import Lock
from fedkseed.runs.metrics import read_metrics
from fedkseed.runs.status import GAUGES, prometheus, status_of


def test_three_forms_say_what_the_run_says(fedkseed: CommandLine, finished: Path) -> None:
    losses = read_metrics(finished / "metrics.jsonl").losses
    found = json.loads(fedkseed("status", finished, "--json").stdout)
    assert (found["state"], found["round"], found["num_rounds"], found["process"]) == ("done", 3, 3, None)
    assert found["eval_loss"] == losses[3]
    assert found["best_loss"] == min(losses.values())
    words = " ".join(fedkseed("status", finished, env={"COLUMNS": "80"}).stdout.split())
    assert f"held-out loss {losses[3]:.4f}; smallest {min(losses.values()):.4f}" in words
    assert "rounds 3 of 3, fedkseed" in words
    text = fedkseed("status", finished, "--prometheus").stdout
    assert f'fedkseed_eval_loss{{run="{finished}"}} {losses[3]!r}\n' in text
    assert f'fedkseed_running{{run="{finished}"}} 0.0\n' in text
    line = re.compile(r'# (HELP|TYPE) fedkseed_\w+ [^\n]+|fedkseed_\w+\{run="[^"\n]*"\} -?[\d.e+-]+')
    assert all(line.fullmatch(one) for one in text.splitlines())
    assert_one_line(fedkseed("status", finished, "--json", "--prometheus"), 2, "give one of them")


def test_the_checkpoint_says_how_far_a_run_is_whatever_became_of_its_metrics(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    found = status_of(tmp_path / "run")
    assert (found.state, found.round, found.eval_loss) == ("done", 3, None)
    (tmp_path / "run" / "ledger.safetensors").unlink()
    assert status_of(tmp_path / "run").state == "stopped"


def test_who_is_at_a_run_is_seen_and_not_disturbed(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "config.toml").write_text((run / "config.toml").read_text().replace("num_rounds = 3", "num_rounds = 9"))
    assert status_of(run).state == "stopped"
    hold = (
        "from pathlib import Path; from fedkseed.files import Lock\n"
        f"Lock(Path({str(run / '.lock')!r})).acquire(); print(1, flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, stdin=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        found = status_of(run)
        assert (found.state, found.process) == ("running", holder.pid)
        assert Lock(run / ".lock").acquire() == holder.pid  # who only looked has taken nothing away
        holder.communicate(b"\n")
    assert status_of(run).state == "stopped"


def test_a_run_that_has_not_begun_or_is_damaged(fedkseed: CommandLine, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / 'a "quoted"\nrun'
    run.mkdir()
    shutil.copy(finished / "config.toml", run)
    status = status_of(run)
    assert (status.round, status.last_event, status.eval_loss, status.num_replies) == (0, None, None, None)
    text = prometheus(status)
    assert '{run="' + str(tmp_path) + '/a \\"quoted\\"\\\\nrun"} 0.0\n' in text
    assert "eval_loss" not in text
    (run / "metrics.jsonl").write_text('{"event": "round"\n{"event": "evaluation", "server_round": 0, "eval_loss": NaN}\n')
    assert status_of(run).eval_loss is None
    shown = fedkseed("status", run)
    assert (shown.code, "1 line of" in shown.stderr) == (0, True)
    (run / "config.toml").write_text("num_rounds = 3\n")
    assert_one_line(fedkseed("status", run), 1, "is damaged ('algorithm'); restore it from a copy")


def test_a_run_whose_name_is_not_utf_8_has_a_label(fedkseed: CommandLine, copied: Path) -> None:
    run = copied.rename(copied.parent / os.fsdecode(b"bad\xff"))
    shown = fedkseed("status", run, "--prometheus", env={"PYTHONIOENCODING": "utf-8:strict"})
    assert shown.code == 0, shown.stderr
    assert f'fedkseed_round{{run="{copied.parent}/bad\\\\udcff"}} 3.0\n' in shown.stdout


def test_a_folder_in_place_of_the_lock_is_held_by_nobody(copied: Path) -> None:
    (copied / ".lock").unlink()
    (copied / ".lock").mkdir()
    assert (status_of(copied).state, status_of(copied).process) == ("done", None)


HUGE = "1" + "0" * 400


@pytest.mark.parametrize(
    "line",
    [
        f'{{"event": "evaluation", "server_round": 9, "eval_loss": {HUGE}}}',
        '{"event": "round", "server_round": 9, "dropped_steps": 0, "bytes_down": 1e308, "bytes_up": 1, "seconds": 1}',
        '{"event": "round", "server_round": 9, "dropped_steps": 0, "bytes_down": 1, "bytes_up": 1, "seconds": NaN}',
        *(
            f'{{"event": "round", "server_round": 9, "dropped_steps": 0, "bytes_down": 1, "bytes_up": 1, "seconds": 1, {odd}}}'
            for odd in (
                *('"refused": 5', '"missing": {}', '"missing": [1]', '"seconds_by": [1]', '"num_replies": "x"'),
                *(f'"num_replies": {HUGE}', f'"eval_loss": {HUGE}'),
            )
        ),
        f'{{"event": "round", "server_round": {HUGE}, "dropped_steps": 0, "bytes_down": 1, "bytes_up": 1, "seconds": 1}}',
    ],
    ids=lambda line: line[-30:],
)
def test_an_event_that_cannot_be_costs_a_warning(fedkseed: CommandLine, copied: Path, line: str) -> None:
    before = status_of(copied)
    with (copied / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    for form in ((), ("--json",), ("--prometheus",)):
        shown = fedkseed("status", copied, *form)
        assert shown.code == 0, shown.stderr
    assert status_of(copied).round == before.round
    assert "1 line of" in (status_of(copied).damage or "")
    assert fedkseed("inspect", copied).code == 0


@pytest.mark.parametrize(
    "line",
    [
        '{"event": "note", "server_round": 1, "eval_loss": "x"}',
        '{"event": "evaluation", "server_round": 2, "eval_loss": Infinity}',  # as they were written once
        '{"event": "evaluation", "server_round": 2, "eval_loss": 1e300}',
    ],
)
def test_an_event_that_can_be_costs_none(copied: Path, line: str) -> None:
    with (copied / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    assert status_of(copied).damage is None


def test_a_round_whose_ledger_could_not_be_saved_is_not_done(copied: Path) -> None:
    """As on a full disk, where the event was written and the ledger was not."""
    done = status_of(copied)
    assert (done.state, done.round) == ("done", 3)
    (copied / "ledger.safetensors").write_bytes((copied / "ledgers" / "round-00002.safetensors").read_bytes())
    assert (status_of(copied).state, status_of(copied).round) == ("stopped", 2)
    (copied / "ledger.safetensors").unlink()
    assert status_of(copied).round == 0
    (copied / "ledger.safetensors").write_bytes(b"damaged")
    assert status_of(copied).round == 3


def test_an_endless_run_is_damage(fedkseed: CommandLine, copied: Path) -> None:
    (copied / "config.toml").write_text('algorithm = "fedkseed"\nnum_rounds = inf\n')
    assert_one_line(fedkseed("status", copied), 1, "is damaged (cannot convert float infinity to integer)")


@pytest.mark.parametrize("attribute", GAUGES)
def test_each_gauge_is_an_attribute(finished: Path, attribute: str) -> None:
    assert hasattr(status_of(finished), attribute)


def test_status_needs_no_torch(finished: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from fedkseed.cli.status import status_command\n"
        f"status_command(Path({str(finished)!r}), True, False); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)
