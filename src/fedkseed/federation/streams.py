"""A round's messages one at a time, so that memory does not grow with them: requests made when asked for, replies laid by."""

from __future__ import annotations

import tempfile
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Generic, TypeVar, overload

import numpy as np

from fedkseed.errors import RunError

T = TypeVar("T")
KEPT = 1024
"""So many requests are kept once they are made: those of a usual cohort are made once."""
IN_MEMORY = 64 << 20
"""Bytes of replies that are held in memory; more of them go into a temporary file, which nobody else can open."""


class Requests(Mapping[str, T]):
    """A round's requests by client, each made when it is asked for.

    Args:
        cohort: the clients' names, sorted.
        make: the request to one; a pure function, whatever becomes of the server in the meantime.
    """

    def __init__(self, cohort: Sequence[str], make: Callable[[str], T]) -> None:
        self._cohort, self._make = cohort, lru_cache(KEPT)(make)

    def __getitem__(self, client: str) -> T:
        if client not in self:
            raise KeyError(client)
        return self._make(client)

    def __contains__(self, client: object) -> bool:
        return isinstance(client, str) and place_of(client, self._cohort) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._cohort)

    def __len__(self) -> int:
        return len(self._cohort)


class InTurn(Sequence[T]):
    """The values of a mapping in its order, each fetched when it is asked for."""

    def __init__(self, mapping: Mapping[str, T]) -> None:
        self._names, self._mapping = list(mapping), mapping

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[T, ...]: ...
    def __getitem__(self, place: int | slice) -> T | tuple[T, ...]:
        if isinstance(place, slice):
            return tuple(self._mapping[name] for name in self._names[place])
        return self._mapping[self._names[place]]

    def __len__(self) -> int:
        return len(self._names)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # what it holds is made anew


class Taken(Mapping[str, bytes]):
    """Messages by client, in the order of the names, in whatever order they came.

    Args:
        cohort: whose messages may come, sorted.
    """

    def __init__(self, cohort: Sequence[str]) -> None:
        self._cohort = cohort
        self._file: Any = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115  # closed when nobody has this any more
        weakref.finalize(self, self._file.close)
        self._starts = np.full(len(cohort), -1, np.int64)
        self._lengths = np.zeros(len(cohort), np.int64)
        self._end = 0

    def add(self, client: str, data: bytes) -> None:
        """Take a message of one of the cohort that has none yet.

        Raises:
            RunError: it cannot be written.
        """
        place = place_of(client, self._cohort)
        assert place is not None  # the caller's to see to
        try:
            self._file.seek(self._end)
            self._file.write(data)
        except OSError as error:
            raise RunError(
                f"{tempfile.gettempdir()}: cannot keep a round's replies ({error.strerror}); make room, or let TMPDIR name "
                "a larger disk"
            ) from error
        self._starts[place], self._lengths[place] = self._end, len(data)
        self._end += len(data)

    def __getitem__(self, client: str) -> bytes:
        place = place_of(client, self._cohort)
        if place is None or self._starts[place] < 0:
            raise KeyError(client)
        self._file.seek(int(self._starts[place]))
        data: bytes = self._file.read(int(self._lengths[place]))
        return data

    def __iter__(self) -> Iterator[str]:
        return (self._cohort[place] for place in np.flatnonzero(self._starts >= 0).tolist())

    def __len__(self) -> int:
        return int(np.count_nonzero(self._starts >= 0))


class Read(Mapping[str, T], Generic[T]):
    """What messages say, by client: each is read when it is asked for."""

    def __init__(self, messages: Mapping[str, bytes], read: Callable[[bytes], T]) -> None:
        self._messages, self._read = messages, read

    def __getitem__(self, client: str) -> T:
        return self._read(self._messages[client])

    def __contains__(self, client: object) -> bool:
        return client in self._messages

    def __iter__(self) -> Iterator[str]:
        return iter(self._messages)

    def __len__(self) -> int:
        return len(self._messages)


def place_of(name: str, names: Sequence[str]) -> int | None:
    """Where a name is among sorted ones; None if it is not."""
    place = bisect_left(names, name)
    return place if place < len(names) and names[place] == name else None
