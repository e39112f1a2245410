"""Atomic files: the old content or the new one, whatever fails. (kseed/test_ledger.py: a fault or kill at each step.)"""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedkseed.files import write_atomically


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("content", [b"", b"x", bytes(range(256)) * 10_000], ids=len)
def test_writes_and_replaces(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    write_atomically(path, content)
    assert path.read_bytes() == content
    write_atomically(path, b"other")
    assert path.read_bytes() == b"other"
    assert names(tmp_path) == ["file"]


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    (tmp_path / ".file.tmp").write_bytes(b"half of something longer than what follows")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["file"]


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "none" / "file", b"x")
    assert names(tmp_path) == []


def test_a_folder_in_the_way(tmp_path: Path) -> None:
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


def test_a_write_that_the_kernel_refuses(tmp_path: Path) -> None:
    """No patches here: a real error in the middle of a write."""
    path = tmp_path / "file"
    write_atomically(path, b"old")
    code = "import sys; from pathlib import Path; import test_files; test_files.fill_up(Path(sys.argv[1]))"
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code, path], cwd=here, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "File too large"), done.stderr
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]
