"""A process that answers one node's messages and stays: torch, the model and the records are loaded once, not for each of them.

Flower starts a process for every message and ends it with the reply. Under our launcher (`fedkseed.flower.launcher`) that
process is a fork which holds no torch, and it hands the question on to this one, over a socket that only this user can open.
The code that a server sends runs in the fork; this process runs ours alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from logging import ERROR, WARNING
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any

import msgpack

from fedkseed.errors import DataError, FedKSeedError, RunError
from fedkseed.flower.log import log
from fedkseed.text import named_line

POLL_SECONDS = 0.05
LONGEST_FOLDER = 60
"""Bytes of the folder for temporary files: a socket's whole path has at most 103 of them on some systems."""
SERVE = f"import sys; from {__name__} import serve; serve(sys.argv[1])"
ANSWERED, REFUSED, WITHHELD, FAILED = "answered", "refused", "withheld", "failed"


class Worker:
    """The process and the way to it; it ends with the one that has started it.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self) -> None:
        self._start()

    def look(self) -> None:
        """Take note if it has ended, so that who is about to ask does not wait for it, and of when it is ready."""
        self._process.poll()
        self._was_ready |= self._address.exists()

    def renew(self) -> None:
        """Start it again if it has ended, or if its socket is gone, as when somebody has cleaned up."""
        self.look()
        if self._process.returncode is not None or (self._was_ready and not self._address.exists()):
            log(WARNING, "the node's worker has ended (exit code %s); another one starts", self._process.returncode)
            self.close()
            self._start()

    def ask(self, kind: str, run_id: int, run_config: Mapping[str, Any], node_config: Mapping[str, Any], data: bytes) -> bytes:
        """What `fedkseed.flower.participant.Participant` answers to a message; waits while the process still starts.

        Args:
            kind: `hello`, `train` or `evaluate`.
            run_id, run_config, node_config: of the message's context.
            data: the message's bytes.

        Raises:
            FedKSeedError: as the participant raised it; a `DataError` for any that is private.
            ConnectionError: the process is not there.
            RunError: it has ended in the middle.
        """
        question = msgpack.packb([kind, run_id, dict(run_config), dict(node_config), data])
        with self._connect() as channel:
            try:
                channel.send_bytes(question)
                outcome, answer = msgpack.unpackb(channel.recv_bytes())
            except (EOFError, OSError) as error:
                raise RunError(
                    "the node's worker ended in the middle of its work; another one starts with the next message"
                ) from error
        if outcome == ANSWERED:
            return bytes(answer)
        if outcome == WITHHELD:
            raise DataError(answer)
        raise FedKSeedError(answer) if outcome == REFUSED else RuntimeError(answer)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        with self._process:  # waits, and closes its input
            self._folder.cleanup()

    @property
    def _address(self) -> Path:
        return Path(self._folder.name) / "socket"

    def _start(self) -> None:
        usual = tempfile.gettempdir()
        place = usual if len(os.fsencode(usual)) <= LONGEST_FOLDER else "/tmp"
        # for this user only
        self._folder = tempfile.TemporaryDirectory(prefix="fedkseed-worker-", dir=place, ignore_cleanup_errors=True)
        self._was_ready = False
        # its standard input closes when this process ends, however it ends
        self._process = subprocess.Popen([sys.executable, "-c", SERVE, self._folder.name], stdin=subprocess.PIPE)

    def _connect(self) -> Connection[Any, Any]:
        while True:
            try:
                return Client(str(self._address), "AF_UNIX")
            except (FileNotFoundError, ConnectionRefusedError):
                if not _is_running(self._process.pid):
                    raise ConnectionError(f"the node's worker (process {self._process.pid}) is not there") from None
            except OSError as error:
                raise ConnectionError(f"the node's worker (process {self._process.pid}) cannot be reached ({error})") from error
            time.sleep(POLL_SECONDS)


current: Worker | None = None
"""The one that messages of this process are handed on to."""


def _is_running(pid: int) -> bool:
    """Whether a process is there that may not be a child of this one."""
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def serve(folder: str) -> None:
    """Answer one question after the other; never returns."""
    threading.Thread(target=_end_with, args=(sys.stdin.fileno(), folder), daemon=True).start()
    from fedkseed.flower.participant import participant_of  # torch, which takes seconds

    with Listener(str(Path(folder) / "socket"), "AF_UNIX") as listener:
        while True:
            with listener.accept() as channel:
                try:
                    kind, run_id, run_config, node_config, data = msgpack.unpackb(channel.recv_bytes())
                except EOFError:  # who asked has gone
                    continue
                done = threading.Event()
                watch = threading.Thread(target=_end_without, args=(channel, done), daemon=True)
                watch.start()
                reply: tuple[str, bytes | str]
                try:
                    participant = participant_of(run_id, run_config, node_config)
                    reply = (ANSWERED, participant.answer(kind, data))
                except FedKSeedError as error:
                    reply = (WITHHELD if error.private else REFUSED, str(error))
                except Exception as error:  # a fault of ours is told, and the next question answered
                    log(ERROR, "fedkseed: %s", named_line(error))
                    reply = (FAILED, named_line(error))
                done.set()
                watch.join()
                with contextlib.suppress(BrokenPipeError):  # who asked has just gone
                    channel.send_bytes(msgpack.packb(reply))


def _end_with(stdin: int, folder: str) -> None:
    """End this process when who has started it is gone, which may have had no time to clean up."""
    os.read(stdin, 1)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def _end_without(channel: Connection[Any, Any], done: threading.Event) -> None:
    """End this process when who asks goes in the middle: a run that was stopped must not train on."""
    while not wait([channel], POLL_SECONDS):
        if done.is_set():
            return
    if not done.is_set():
        os._exit(1)
