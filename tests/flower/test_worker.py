"""The process that stays: what it answers, what ends it, and that who hands messages on to it needs no torch."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.app import Context, Message, RecordDict
from tests.support.flower_sites import RUN

from fedkseed.errors import FedKSeedError, RunError
from fedkseed.flower import client_app, worker
from fedkseed.flower.envelope import Hello, unwrap, wrap
from fedkseed.flower.participant import participant_of
from fedkseed.flower.worker import Worker


def about(sites: Path, **node: Any) -> tuple[int, dict[str, Any], dict[str, Any]]:
    config = {**RUN, "run": str(sites / "run"), "model": str(sites / "model"), "algorithm": "fedkseed"}
    return 1, config, {"name": "site-a", "data": str(sites / "site-a.jsonl"), **node}


@pytest.fixture(scope="module")
def made() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


def process_of(made: Worker) -> psutil.Process:
    return psutil.Process(made._process.pid)


def test_it_answers_as_this_process_would_and_goes_on_after_what_it_refuses(made: Worker, sites: Path) -> None:
    expected = participant_of(*about(sites)).answer("hello", b"")
    assert made.ask("hello", *about(sites), b"") == expected
    with pytest.raises(FedKSeedError, match=r"nowhere\.jsonl"):
        made.ask("hello", *about(sites, data=str(sites / "nowhere.jsonl")), b"")
    with pytest.raises(FedKSeedError, match="not msgpack"):
        made.ask("train", *about(sites), b"junk")
    with pytest.raises(RuntimeError, match="KeyError: 'sing'"):
        made.ask("sing", *about(sites), b"")
    assert made.ask("hello", *about(sites), b"") == expected


def test_it_keeps_the_records_of_a_run_and_reads_those_of_the_next(made: Worker, sites: Path, tmp_path: Path) -> None:
    data, (_, *rest) = tmp_path / "own.jsonl", about(sites)
    lines = (sites / "site-a.jsonl").read_text().splitlines(keepends=True)
    rest[1]["data"] = str(data)

    def records(run_id: int) -> int:
        return Hello.decode(made.ask("hello", run_id, *rest, b"")).num_examples

    data.write_text("".join(lines[:5]))
    assert records(2) == 5
    data.write_text("".join(lines[:7]))
    assert records(2) == 5
    assert records(3) == 7


@pytest.mark.slow
def test_a_worker_that_is_killed_in_the_middle_is_one_error_and_the_next_message_finds_another(
    made: Worker, sites: Path
) -> None:
    made.ask("hello", *about(sites), b"")  # it has started
    before = process_of(made)
    before.suspend()
    threading.Timer(0.3, before.kill).start()
    with pytest.raises(RunError, match="ended in the middle"):
        made.ask("hello", *about(sites), b"")
    made._process.wait()
    made.renew()
    assert process_of(made).pid != before.pid
    assert made.ask("hello", *about(sites), b"")


def test_it_ends_with_who_started_it() -> None:
    script = (
        "import time; from fedkseed.flower.worker import Worker\n"
        "made = Worker(); print(made._process.pid, made._folder.name, flush=True); time.sleep(99)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        pid, folder = starter.stdout.readline().split()
        child = psutil.Process(int(pid))
        assert Path(folder).is_dir()
        starter.kill()
        child.wait(timeout=30)
    assert not Path(folder).exists()


def test_an_app_hands_on_and_loads_by_itself_where_no_worker_is(
    made: Worker, sites: Path, in_a_task: None, monkeypatch: pytest.MonkeyPatch, heard: pytest.LogCaptureFixture
) -> None:
    run_id, run_config, node_config = about(sites)
    context = Context(run_id=run_id, node_id=3, node_config=node_config, state=RecordDict(), run_config=run_config)

    def answer() -> bytes:
        return unwrap(client_app()(Message(wrap(b""), 3, "query.hello"), context))

    expected = answer()
    asked: list[str] = []
    monkeypatch.setattr(worker, "current", made)
    monkeypatch.setattr(Worker, "ask", lambda self, kind, *about: asked.append(kind) or expected)
    assert (answer(), asked) == (expected, ["hello"])

    monkeypatch.undo()
    process_of(made).kill()
    made._process.wait()
    monkeypatch.setattr(worker, "current", made)
    assert answer() == expected
    assert "is not there; this process loads everything itself" in heard.text
    made.renew()


def test_what_forks_for_each_message_holds_no_torch() -> None:
    script = "import sys, fedkseed.flower.launcher; sys.exit(not {'torch', 'transformers', 'numba'}.isdisjoint(sys.modules))"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.slow
def test_a_worker_whose_socket_somebody_has_removed_is_replaced(made: Worker, sites: Path) -> None:
    made.renew()
    made.ask("hello", *about(sites), b"")
    made.look()
    before = process_of(made)
    made._address.unlink()
    made.renew()
    assert not before.is_running()
    assert made.ask("hello", *about(sites), b"")


@pytest.mark.slow
def test_work_that_nobody_waits_for_any_more_ends(made: Worker, sites: Path) -> None:
    """As when `flwr stop` ends the process that asked."""
    made.renew()
    made.ask("hello", *about(sites), b"")
    before, data = process_of(made), sites / "pipe.jsonl"
    os.mkfifo(data)  # who reads it waits
    script = (
        "from fedkseed.flower.worker import Client, msgpack\n"
        f"channel = Client({str(made._address)!r}, 'AF_UNIX')\n"
        f"channel.send_bytes(msgpack.packb(['hello', *{about(sites, data=str(data))!r}, b'']))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    before.wait(timeout=30)
    made.renew()
    assert made.ask("hello", *about(sites), b"")


def test_a_long_folder_for_temporary_files_is_no_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A socket's path has some 100 bytes at most."""
    long = tmp_path / ("n" * 90)
    long.mkdir()
    monkeypatch.setattr(worker.tempfile, "tempdir", str(long))
    with_it = Worker()
    try:
        assert len(os.fsencode(with_it._address)) <= 103
    finally:
        with_it.close()


def test_what_cannot_be_reached_is_left_to_this_process(monkeypatch: pytest.MonkeyPatch, made: Worker) -> None:
    def fails(*_: object) -> None:
        raise OSError("AF_UNIX path too long")

    monkeypatch.setattr(worker, "Client", fails)
    with pytest.raises(ConnectionError, match=r"cannot be reached \(AF_UNIX path too long\)"):
        made.ask("hello", 1, {}, {}, b"")
