"""Files of records, compressed or not: what a file holds is known by its first bytes, whatever it is called."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedkseed.errors import DataError, installing
from fedkseed.text import one_line

SUFFIXES = (".gz", ".bz2", ".xz", ".zst")


def _zstandard(content: bytes) -> bytes:
    import pyarrow  # which has it, for parquet's sake

    with pyarrow.CompressedInputStream(pyarrow.BufferReader(content), "zstd") as stream:
        whole: bytes = stream.read()
        return whole


def _of_streams(make: Callable[[], Any]) -> Callable[[bytes], bytes]:
    """All streams of a file, as pbzip2 writes several; the modules' own functions end without a word at a damaged later one."""

    def decompress(content: bytes) -> bytes:
        parts = []
        while content:
            stream = make()
            parts.append(stream.decompress(content))
            if not stream.eof:
                raise EOFError("it ends in the middle of a stream")
            content = stream.unused_data.lstrip(b"\0")  # xz may pad
        return b"".join(parts)

    return decompress


DECOMPRESS: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": gzip.decompress,
    b"BZh": _of_streams(bz2.BZ2Decompressor),
    b"\xfd7zXZ\x00": _of_streams(lzma.LZMADecompressor),
    b"\x28\xb5\x2f\xfd": _zstandard,
}
"""By the bytes that such a file begins with."""


def kind_of(path: Path) -> str:
    """How a file's name ends, in small letters and without what says that it is compressed: .csv of records.CSV.gz."""
    name = path.name.lower()
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return Path(name).suffix


def read_bytes(path: Path) -> bytes:
    """What a file holds, decompressed.

    Raises:
        DataError: no such file, it cannot be read, is damaged, or needs the extra.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path of the data") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected a file of records") from None
    decompress = next((way for start, way in DECOMPRESS.items() if content.startswith(start)), bytes)
    try:
        return decompress(content)
    except ImportError:
        raise DataError(
            f"{path} is compressed by zstd, which needs an extra; install it with: {installing('datasets')}"
        ) from None
    except Exception as error:  # each of these libraries has its own, and zlib's are no OSError
        raise DataError(f"{path}: cannot be decompressed ({one_line(error)}); the file is damaged, so fetch it again") from None
