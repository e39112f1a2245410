"""Atomic files: the old content or the new one, whatever fails. (kseed/test_ledger.py: a fault or kill at each step.)"""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedkseed.files import Lock, write_atomically
from fedkseed.kseed.ledger import Ledger
from fedkseed.models.identity import BaseIdentity
from fedkseed.noise.pool import SeedPool


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("content", [b"", b"x", bytes(range(256)) * 10_000], ids=len)
def test_a_file_is_written_and_replaced_whole(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    write_atomically(path, content)
    assert path.read_bytes() == content
    write_atomically(path, b"other")
    assert path.read_bytes() == b"other"
    assert names(tmp_path) == ["file"]


def test_a_private_file_is_nobody_elses_from_its_first_byte_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []

    def watched(handle: int) -> None:
        modes.append(os.fstat(handle).st_mode & 0o777)

    monkeypatch.setattr("fedkseed.files.os.fsync", watched)
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o644)
    write_atomically(path, b"x", private=True)
    assert modes[0] == 0o600
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_relative_path_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_atomically(Path("file"), b"here")
    assert (tmp_path / "file").read_bytes() == b"here"


def test_readers_of_the_old_file_keep_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with path.open("rb") as file:
        write_atomically(path, b"new!")
        assert file.read() == b"old"
    assert path.read_bytes() == b"new!"


def test_what_a_crash_left_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "file"
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)
    (tmp_path / f".file.{gone.stdout.strip()}-0badcafe.tmp").write_bytes(b"half of something longer than what follows")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["file"]


def test_a_missing_folder_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "none" / "file", b"x")
    assert names(tmp_path) == []


def test_a_folder_in_the_way_is_an_error_and_stays(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError, match=r"[Dd]irectory"):
        write_atomically(tmp_path / "file", b"x")
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").is_dir()


def test_ctrl_c_leaves_the_old_file_and_no_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def interrupt(handle: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def fill_up(path: Path) -> None:
    """Runs in a process of its own: the kernel lets no file grow beyond 1,000 bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        write_atomically(path, bytes(5000))
    except OSError as error:
        sys.stdout.write(os.strerror(error.errno or 0))


def test_a_write_that_the_kernel_refuses_leaves_the_old_file(tmp_path: Path) -> None:
    """No patches here: a real error in the middle of a write."""
    path = tmp_path / "file"
    write_atomically(path, b"old")
    code = "import sys; from pathlib import Path; import test_files; test_files.fill_up(Path(sys.argv[1]))"
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code, path], cwd=here, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "File too large"), done.stderr
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


TWO_WRITERS = """
import sys
from pathlib import Path
from fedkseed.files import Lock, write_atomically
from fedkseed.kseed.ledger import Ledger
from fedkseed.models.identity import BaseIdentity
from fedkseed.noise.pool import SeedPool
path, letter = Path(sys.argv[1]), sys.argv[2].encode()
for _ in range(200):
    write_atomically(path, letter * 100_000)
"""


def test_of_two_writers_one_is_last_and_the_file_is_always_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"a" * 100_000)
    writers = [subprocess.Popen([sys.executable, "-c", TWO_WRITERS, str(path), letter]) for letter in "ab"]
    while any(writer.poll() is None for writer in writers):
        content = path.read_bytes()
        assert len(content) == 100_000
        assert len(set(content)) == 1
    assert [writer.returncode for writer in writers] == [0, 0]
    assert names(tmp_path) == ["file"]


SAVING = """
import sys
from pathlib import Path
from fedkseed.files import write_atomically
path, content = Path(sys.argv[1]), Path(sys.argv[2]).read_bytes()
while True:
    write_atomically(path, content)
"""


def test_a_ledger_is_always_whole_for_two_writers_that_are_killed_and_for_readers_beside_them(tmp_path: Path) -> None:
    """Each time both are killed at some moment, and what they leave half done is gone with the next write."""
    path, draw = tmp_path / "ledger.safetensors", random.Random(3)
    base = BaseIdentity.of({"w": bytes(range(32))})
    ledgers = [Ledger.start(SeedPool(key, 512), base, "float32") for key in (1, 2)]
    for ledger in ledgers:
        (tmp_path / f"{ledger.pool.key}").write_bytes(ledger.encode())
    digests, seen, reads = {ledger.digest() for ledger in ledgers}, set[str](), 0
    ledgers[0].save(path)
    for _ in range(12):
        writers = [subprocess.Popen([sys.executable, "-c", SAVING, path, tmp_path / f"{i}"]) for i in (1, 2)]
        before, end = path.stat().st_ino, time.monotonic() + 60
        while path.stat().st_ino == before and time.monotonic() < end:  # until one of them writes
            time.sleep(0.001)
        moment = time.monotonic() + draw.uniform(0, 0.1)
        while time.monotonic() < moment or not reads:
            seen.add(Ledger.load(path).digest())
            reads += 1
        for writer in writers:
            writer.kill()
        for writer in writers:
            writer.wait()
        seen.add(Ledger.load(path).digest())
    assert seen == digests
    ledgers[0].save(path)
    assert names(tmp_path) == ["1", "2", "ledger.safetensors"]


def test_a_lock_has_one_holder_and_dies_with_it(tmp_path: Path) -> None:
    hold = (
        "import sys, time; from pathlib import Path; from fedkseed.files import Lock;"
        "print(Lock(Path(sys.argv[1])).acquire(), flush=True); time.sleep(600)"
    )
    lock = Lock(tmp_path / ".lock")
    other = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / ".lock")], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "None\n"
    assert lock.acquire() == other.pid
    other.kill()
    other.communicate()
    assert lock.acquire() is None
    assert lock.acquire() is None
    lock.release()
    assert Lock(tmp_path / ".lock").acquire() is None
    lock.release()
    lock.release()
