"""What a command writes: nothing that exists is overwritten, and a folder that is missing is made."""

from __future__ import annotations

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


def make_folder_for(file: Path) -> None:
    """Make the folder that a file is to be written into.

    Raises:
        RunError: it cannot be made.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{file.parent}: cannot be made ({error.strerror}); give an output in another folder") from error
