"""Pages in a ledger's file: formats 2 and 3.

In format 2, a run's, all pages have size, family, basis, movement and wire in common. In format 3, which arithmetic makes, each
page says its own, and a scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from fedkseed.kseed.coding import BITS, Coded, coded_bytes
from fedkseed.kseed.pages import Basis, Page, check_pages, check_total
from fedkseed.models.closed_page import Movement
from fedkseed.noise.pool import SeedPool

PAGED_FORMAT, MIXED_FORMAT = 2, 3
Tensors = dict[str, NDArray[Any]]
STEP, BYTE = np.dtype("<f4"), np.dtype(np.uint8)


def paged_content(
    pages: Sequence[Page], precision: str, state: Mapping[str, NDArray[np.float64]]
) -> tuple[dict[str, Any], Tensors]:
    """What a file says of pages, at least one, and a run's state: metadata and tensors, the format among them.

    Format 2 wherever it can say it, so that older versions read it.
    """
    parts = [part for page in pages for part in page.parts]
    tensors: Tensors = {
        "steps": np.array([part.step for part in parts], STEP),
        "numbers": np.frombuffer(b"".join(part.numbers for part in parts), BYTE),
        **{f"state.{name}": column.astype("<f8") for name, column in state.items()},
    }
    listed: list[dict[str, Any]] = [{"key": f"{page.pool.key:016x}", "parts": len(page.parts)} for page in pages]
    kinds = {(page.pool.size, page.pool.family, page.basis, page.movement, page.scale) for page in pages}
    if len(kinds) == 1 and pages[0].scale == 1 and all(part.wire == precision for part in parts):
        pool = {"size": pages[0].pool.size, "family": pages[0].pool.family}
        common = {"pool": pool, "basis": pages[0].basis, "movement": pages[0].movement, "precision": precision}
        return {"format": PAGED_FORMAT, **common, "pages": listed}, tensors
    for about, page in zip(listed, pages, strict=True):
        about |= {"size": page.pool.size, "family": page.pool.family, "basis": page.basis, "movement": page.movement}
        about |= {"wire": page.wire, "scale": page.scale}
    return {"format": MIXED_FORMAT, "pages": listed}, tensors


def read_pages(metadata: dict[str, Any], tensors: Tensors) -> tuple[list[Page], str]:
    """Pages of a file of either format, and their common wire, "mixed" if there are several.

    Raises:
        KeyError, TypeError, ValueError, FedKSeedError: something is missing, of another kind, or beyond its bounds.
    """
    listed = metadata["pages"]
    if metadata["format"] == PAGED_FORMAT:
        common = {"size": metadata["pool"]["size"], "family": metadata["pool"]["family"], "scale": 1.0}
        common |= {"basis": metadata["basis"], "movement": metadata["movement"], "wire": metadata["precision"]}
        listed = [common | {"key": page["key"], "parts": page["parts"]} for page in listed]
    counts = [page["parts"] for page in listed]
    if not counts or any(type(count) is not int or count < 0 for count in counts):
        raise ValueError(f"numbers of parts {counts!r:.80}")
    each = [_bytes_of(page) for page in listed]
    check_total(page["size"] for page in listed)
    steps = iter(tensor_of(tensors, "steps", STEP, sum(counts)).astype(float).tolist())
    length = sum(count * size for count, size in zip(counts, each, strict=True))
    numbers = tensor_of(tensors, "numbers", BYTE, length).tobytes()
    pages, at = [], 0
    for about, count, size in zip(listed, counts, each, strict=True):
        ends = range(at + size, at + count * size + 1, size)
        parts = tuple(Coded(about["wire"], next(steps), numbers[end - size : end]) for end in ends)
        at += count * size
        for part in parts:
            part.check("a page's part", about["size"])
        pool = SeedPool(int(about["key"], 16), about["size"], about["family"])
        pages.append(Page(pool, about["basis"], about["movement"], parts, about["scale"]))
    if metadata["format"] == MIXED_FORMAT:
        check_pages(pages)
    return pages, common_wire(pages) if metadata["format"] == MIXED_FORMAT else metadata["precision"]


def common_wire(pages: Sequence[Page]) -> str:
    """The wire of all parts; "mixed" if there are several."""
    wires = {page.wire for page in pages}
    return wires.pop() if len(wires) == 1 else "mixed"


def _bytes_of(about: dict[str, Any]) -> int:
    """How many bytes each part of a page takes, if the page is of a kind that there is."""
    basis, movement, wire, scale = (about[name] for name in ("basis", "movement", "wire", "scale"))
    if basis not in get_args(Basis) or movement not in get_args(Movement) or wire not in BITS:
        raise ValueError(f"basis {basis!r:.40}, movement {movement!r:.40}, wire {wire!r:.40}")
    if type(scale) is not float or not math.isfinite(scale):
        raise ValueError(f"scale {scale!r:.40}")
    return coded_bytes(about["size"], wire)


def read_state(tensors: Tensors, size: int) -> dict[str, NDArray[np.float64]] | None:
    """The columns of a run's state, of one number or K; None if there are none.

    Raises:
        ValueError: one is of another kind or length, or not finite.
    """
    state = {name.removeprefix("state."): column for name, column in tensors.items() if name.startswith("state.")}
    for name, column in state.items():
        if not np.isfinite(tensor_of(tensors, f"state.{name}", np.dtype("<f8"), None)).all():
            raise ValueError(f"column {name} of the state is not finite")
        if len(column) not in (1, size):
            raise ValueError(f"column {name} of the state has {len(column)} numbers, expected {size}")
    return state or None


def tensor_of(tensors: Tensors, name: str, dtype: np.dtype[Any], size: int | None) -> NDArray[Any]:
    """The tensor of that name, if it is a row of that type and length; None for any length.

    Raises:
        KeyError, ValueError: it is not.
    """
    array = tensors[name]
    if array.dtype != dtype or array.ndim != 1 or size not in (None, len(array)):
        raise ValueError(f"{name} is {array.dtype}{list(array.shape)}, expected {dtype}[{size or 'n'}]")
    return array
