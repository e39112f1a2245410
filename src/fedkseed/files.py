"""Files that are either the old ones or the new ones, whatever happens in between."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file: write beside it, fsync, rename, fsync the folder. On an error the old file is as it was."""
    temporary = path.with_name(f".{path.name}.tmp")
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


def safetensors_metadata(data: bytes, name: str) -> Any:
    """The JSON that a safetensors file's bytes hold as the metadata entry of that name.

    Raises:
        ValueError, KeyError, TypeError, RecursionError: there is none, or the bytes are damaged.
    """
    size = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + size])["__metadata__"][name])
