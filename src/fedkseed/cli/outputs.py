"""What a command writes: nothing that exists is overwritten, and a folder that is missing is made."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from fedkseed.errors import RunError, RunFolderError
from fedkseed.runs.folder import exists


def require_new(output: Path) -> None:
    """Refuse to overwrite.

    Raises:
        RunFolderError: the output exists, or cannot be one.
    """
    if exists(output) or output.is_symlink():
        raise RunFolderError(f"{output} exists; give an output that does not")


def require_place(file: Path) -> None:
    """Refuse a file that could not be written, before what takes long is done for it; nothing is made yet.

    Raises:
        RunError: its folder cannot be made, or not be written into.
        RunFolderError: one cannot look there.
    """
    folder = next(parent for parent in file.absolute().parents if exists(parent))
    if not folder.is_dir():
        raise _not_made(file, os.strerror(errno.ENOTDIR))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _not_made(file, os.strerror(errno.EACCES))


def make_folder_for(file: Path) -> None:
    """Make the folder that a file is to be written into.

    Raises:
        RunError: it cannot be made.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_made(file, error.strerror) from error


def _not_made(file: Path, why: str | None) -> RunError:
    return RunError(f"{file.parent}: cannot be made or written into ({why}); give an output in another folder")
