"""Files that are either the old ones or the new ones, whatever happens in between."""

import contextlib
import fcntl
import json
import os
import re
import secrets
from pathlib import Path
from typing import Any, ClassVar


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file: write beside it, fsync, rename, fsync the folder. On an error the old file is as it was.

    Every call has a temporary name of its own, so that of two writers one is last and the file is whole. What processes
    that are gone have left is removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    _remove_leftovers(path)
    try:
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


class Lock:
    """A lock that dies with its process: one holder at a time, whatever happens to it. Within a process it may be nested.

    Args:
        path: the file that stands for it; it is made, and left.
    """

    _held: ClassVar[dict[Path, tuple[int, int]]] = {}

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()

    def acquire(self) -> int | None:
        """Take it; None, or the number of the process that has it."""
        if self._path in self._held:
            descriptor, depth = self._held[self._path]
            self._held[self._path] = descriptor, depth + 1
            return None
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 20)
            os.close(descriptor)
            return int(holder) if holder.isdigit() else 0
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


def safetensors_metadata(data: bytes, name: str) -> Any:
    """The JSON that a safetensors file's bytes hold as the metadata entry of that name.

    Raises:
        ValueError, KeyError, TypeError, RecursionError: there is none, or the bytes are damaged.
    """
    size = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + size])["__metadata__"][name])
