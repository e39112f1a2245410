"""What runs leave behind, as one archive whose bytes depend on nothing but what is in it.

    python dev/experiments/archive.py FOLDER ARCHIVE.tar.xz

packs every file below FOLDER.
"""

import hashlib
import io
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

RAW = "raw.tar.xz"
"""What such an archive is called in a folder of results/runs."""


def pack(files: Mapping[str, bytes], archive: Path) -> str:
    """Write files, by their names within the archive, in the order of these names and without owners or times; its SHA-256."""
    with tarfile.open(archive, "w:xz", format=tarfile.USTAR_FORMAT, preset=9) as tar:
        for name in sorted(files):
            info = tarfile.TarInfo(name)  # mode 0644, owner 0, time 0
            info.size = len(files[name])
            tar.addfile(info, io.BytesIO(files[name]))
    return digest(archive)


def unpack(archive: Path, folder: Path) -> None:
    """Write an archive's files below a folder."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")


def digest(archive: Path) -> str:
    """SHA-256 of a file, hex."""
    return hashlib.sha256(archive.read_bytes()).hexdigest()


def said(archive: Path) -> str:
    """The line that a table has about its archive."""
    return f"Settings, metrics and scores of every run: `{archive.name}`, SHA-256 `{digest(archive)}`.\n"


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    files = {path.relative_to(source).as_posix(): path.read_bytes() for path in source.rglob("*") if path.is_file()}
    print(pack(files, target))
