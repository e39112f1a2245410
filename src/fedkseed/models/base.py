"""Base weights: where `w0` is read from at each rebuild, a copy in memory or safetensors files through a memory map."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from fedkseed.errors import BindingError
from fedkseed.files import safetensors_header
from fedkseed.models.parameters import NamedParameter
from fedkseed.noise import QUANTUM
from fedkseed.text import one_line

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BATCH_ELEMENTS = 64 * QUANTUM
"""Elements that a file hands out before it gives their pages back: 16 MiB of float32."""


@dataclass(frozen=True)
class Stretch:
    """Base values of elements start .. start + len(values) - 1 of the tensor with that name; values are 1-D."""

    name: str
    start: int
    values: torch.Tensor


class Base(Protocol):
    """Where base weights are read from."""

    def batches(self, names: Sequence[str]) -> Iterator[list[Stretch]]:
        """The tensors of these names, stretch by stretch; a batch is valid until the next is asked for."""
        ...


class MemoryBase:
    """Tensors in memory, by canonical name: such as a copy of the weights as they were when the model was bound."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    @classmethod
    def copy(cls, entries: Sequence[NamedParameter]) -> MemoryBase:
        """Of the parameters as they are."""
        return cls({entry.name: entry.parameter.detach().clone() for entry in entries})

    def batches(self, names: Sequence[str]) -> Iterator[list[Stretch]]:
        """See `Base.batches`."""
        yield [Stretch(name, 0, self._tensors[name].reshape(-1)) for name in names]


@dataclass(frozen=True)
class _Span:
    """Where a tensor lies: the map of its file, the offset of its first byte, its type and shape."""

    file: mmap.mmap
    offset: int
    dtype: torch.dtype
    shape: torch.Size

    def stretch(self, start: int, stop: int) -> torch.Tensor:
        """Elements start .. stop - 1."""
        size = self.dtype.itemsize
        raw = torch.frombuffer(self.file, dtype=torch.uint8, count=(stop - start) * size, offset=self.offset + start * size)
        # a tensor may lie at any byte; a view of another type must not
        return (raw if raw.data_ptr() % size == 0 else raw.clone()).view(self.dtype)


class FileBase:
    """Safetensors files, read through a memory map whose pages are given back as soon as they have been used.

    Args:
        path: a safetensors file, or a folder with `model.safetensors` or `model.safetensors.index.json`.
        entries: the parameters that the file must hold, under any of their names, in their shapes.

    Raises:
        BindingError: the file is missing or malformed, or a tensor is missing or has another shape or an unknown type.
    """

    def __init__(self, path: str | Path, entries: Sequence[NamedParameter]) -> None:
        found = {name: span for file in _files(Path(path)) for name, span in _read_header(file).items()}
        self._spans: dict[str, _Span] = {}
        for entry in entries:
            span = next((found[alias] for alias in entry.aliases if alias in found), None)
            if span is None:
                raise BindingError(
                    f"{path}: no float32, float16 or bfloat16 tensor {entry.name!r}, which the model has; "
                    "pass the model's own base file"
                )
            if span.shape != entry.parameter.shape:
                raise BindingError(
                    f"{path}: {entry.name} has shape {list(span.shape)}, the model's has {list(entry.parameter.shape)}; "
                    "pass the model's own base file"
                )
            self._spans[entry.name] = span

    def tensor(self, name: str) -> torch.Tensor:
        """A copy of a whole tensor, in the file's type."""
        span = self._spans[name]
        return span.stretch(0, span.shape.numel()).clone().reshape(span.shape)

    def batches(self, names: Sequence[str]) -> Iterator[list[Stretch]]:
        """See `Base.batches`."""
        batch: list[Stretch] = []
        room = BATCH_ELEMENTS
        for name in names:
            span = self._spans[name]
            start, n = 0, span.shape.numel()
            while start < n:
                stop = min(n, start + max(QUANTUM, room // QUANTUM * QUANTUM))
                batch.append(Stretch(name, start, span.stretch(start, stop)))
                room -= stop - start
                start = stop
                if room <= 0:
                    yield batch
                    self._give_back(batch)
                    batch, room = [], BATCH_ELEMENTS
        yield batch
        self._give_back(batch)

    def _give_back(self, batch: Sequence[Stretch]) -> None:
        if not hasattr(mmap, "MADV_DONTNEED"):  # Windows
            return
        for stretch in batch:
            span = self._spans[stretch.name]
            first = (span.offset + stretch.start * span.dtype.itemsize) // mmap.PAGESIZE * mmap.PAGESIZE
            end = span.offset + (stretch.start + stretch.values.numel()) * span.dtype.itemsize
            span.file.madvise(mmap.MADV_DONTNEED, first, end - first)


def stored_dtypes(path: str | Path) -> dict[str, torch.dtype]:
    """The types in which safetensors files hold their float32, float16 and bfloat16 tensors, by the names there.

    Args:
        path: see `FileBase`.

    Raises:
        BindingError: a file is missing or malformed.
    """
    return {name: span.dtype for file in _files(Path(path)) for name, span in _read_header(file).items()}


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        index = path / "model.safetensors.index.json"
        if index.is_file():
            try:
                files = sorted({path / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
                raise BindingError(
                    f"{index}: not an index of safetensors files ({one_line(error)}); download it again"
                ) from error
        else:
            files = [path / "model.safetensors"]
    else:
        files = [path]
    for file in files:
        if not file.is_file():
            raise BindingError(f"{file}: no such base file; expected a safetensors file or a folder with model.safetensors")
    return files


def _read_header(path: Path) -> dict[str, _Span]:
    """The tensors of a safetensors file: 8 bytes with the header's length, the header as JSON, the data."""
    try:
        with path.open("rb") as file:
            header, begin = safetensors_header(file)
            # a private map is writable, as torch wants its buffers; nothing is ever written to it
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            spans = {}
            for name, info in header.items():
                if name == "__metadata__" or info["dtype"] not in DTYPES:
                    continue
                span = _Span(mapped, begin + info["data_offsets"][0], DTYPES[info["dtype"]], torch.Size(info["shape"]))
                first, end = info["data_offsets"]
                size = span.shape.numel() * span.dtype.itemsize
                if first < 0 or begin + end > len(mapped) or end - first != size:
                    raise ValueError(f"{name} does not fit the file")
                spans[name] = span
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, OSError) as error:
        raise BindingError(f"{path}: not a whole safetensors file ({one_line(error)}); download it again") from error
    return spans
