"""Files that are either the old ones or the new ones, whatever happens in between."""

import contextlib
import fcntl
import json
import os
import re
import secrets
import time
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from fedkseed.errors import InvalidValueError


def placed(path: str | os.PathLike[str]) -> Path:
    """Where a path leads that somebody gave: `~` is the home folder, of a user that is not known itself.

    Raises:
        InvalidValueError: it is no path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise InvalidValueError(f"{path!r:.80} is no path; expected a text or a pathlib.Path")
    return Path(os.path.expanduser(path))  # noqa: PTH111 (Path's own raises where there is no such user)


def write_atomically(path: Path, content: bytes, private: bool = False) -> None:
    """Replace a file: write beside it, fsync, rename, fsync the folder. On an error the old file is as it was.

    A private one is readable for this user only, from its first byte on.

    Every call has a temporary name of its own, so that of two writers one is last and the file is whole. What processes
    that are gone have left is removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    _remove_leftovers(path)
    try:
        if private:
            temporary.touch(0o600)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _remove_leftovers(path: Path) -> None:
    """Temporary files of that name whose processes are gone."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d+)-[0-9a-f]+\.tmp")
    for beside in path.parent.iterdir():
        match = pattern.fullmatch(beside.name)
        if match and not _is_alive(int(match[1])):
            with contextlib.suppress(OSError):
                beside.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's, or no such call here
        return True
    return True


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process is in such a block; the system lets go of it when the process ends, however it ends.

    Args:
        path: the file that stands for it; it is made, and left.
    """
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Lock:
    """A lock that dies with its process: one holder at a time, whatever happens to it. Within a process it may be nested.

    Args:
        path: the file that stands for it; it is made, and left.
    """

    _held: ClassVar[dict[Path, tuple[int, int]]] = {}

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()

    def holder(self) -> int | None:
        """The number of the process that has it, 0 if that cannot be read; None if nobody has."""
        try:
            with self._path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (FileNotFoundError, IsADirectoryError):  # nobody can hold a folder, as whoever tries is told
            return None
        except BlockingIOError:
            return _number(self._path.read_bytes())
        return None

    def acquire(self) -> int | None:
        """Take it; None, or the number of the process that has it."""
        if self._path in self._held:
            descriptor, depth = self._held[self._path]
            self._held[self._path] = descriptor, depth + 1
            return None
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # maybe by who only looked whether it is held
                time.sleep(0.05)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 20)
            os.close(descriptor)
            return _number(holder)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        self._held[self._path] = descriptor, 1
        return None

    def release(self) -> None:
        """Give it back, once for each `acquire`."""
        descriptor, depth = self._held.pop(self._path)
        if depth > 1:
            self._held[self._path] = descriptor, depth - 1
        else:
            os.close(descriptor)


def _number(text: bytes) -> int:
    return int(text) if text.isdigit() else 0


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file says, with a byte order mark or without.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not TOML, or not UTF-8, or nested too deeply.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


MAX_HEADER = 16 * 2**20
"""Bytes of the longest header of a safetensors file that is read: as of 100,000 tensors."""
MAX_VALUES = 2**20
"""Most values in it: a value of three bytes, such as an empty list, takes twenty times that when it is parsed."""


def safetensors_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """What a safetensors file's header says, and where the data begin; the file is left there.

    Lengths are compared with the file's before what they are of is read: a header may claim anything.

    Raises:
        ValueError, RecursionError: it is none, too long, or does not describe the bytes that follow it.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise ValueError(f"its header claims {length:,} bytes, the file has {size:,}")
    if length > MAX_HEADER:
        raise ValueError(f"its header is of {length:,} bytes; at most {MAX_HEADER:,} are read")
    text = file.read(length)
    if (values := sum(map(text.count, (b",", b"[", b"{")))) > MAX_VALUES:
        raise ValueError(f"its header has {values:,} values; at most {MAX_VALUES:,} are read")
    header = json.loads(text)
    try:
        ends = [about["data_offsets"][1] for name, about in header.items() if name != "__metadata__"]
    except (AttributeError, KeyError, TypeError, IndexError):
        raise ValueError("its header does not say where its tensors lie") from None
    if not all(type(end) is int for end in ends) or max(ends, default=0) != size - 8 - length:
        raise ValueError(f"its header speaks of other data than the {size - 8 - length:,} bytes that follow it")
    return header, 8 + length


def safetensors_entry(header: Mapping[str, Any], name: str) -> Any:
    """The JSON that a header's metadata entry of that name holds.

    Raises:
        ValueError, KeyError, TypeError, RecursionError: there is none.
    """
    return json.loads(header["__metadata__"][name])
