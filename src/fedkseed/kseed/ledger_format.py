"""A ledger's file: what it says, and what is believed of one that somebody else wrote.

It is a safetensors file with one metadata entry of canonical JSON. Format 1 holds coefficients, of a run of scalars or of
anything; 2 and 3 hold pages (`paged_format`); 4 is one of these with the names of frozen tensors folded (`folded_names`).
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from fedkseed.errors import FedKSeedError, LedgerError
from fedkseed.files import safetensors_entry, safetensors_header
from fedkseed.kseed.folded_names import folded, unfolded
from fedkseed.kseed.paged_format import MIXED_FORMAT, PAGED_FORMAT, Tensors, paged_content, read_pages, read_state, tensor_of
from fedkseed.kseed.rounding import DTYPES, MAX_EXPONENT, PRECISIONS, Packed, pack, rounded
from fedkseed.models.identity import BaseIdentity
from fedkseed.noise.pool import SeedPool
from fedkseed.text import one_line

if TYPE_CHECKING:
    from fedkseed.kseed.ledger import Ledger

FORMAT = 1
FOLDED_FORMAT = 4
FORMATS = (FORMAT, PAGED_FORMAT, MIXED_FORMAT, FOLDED_FORMAT)
WORTH_FOLDING = 256
"""Bytes that folded names must save: else the file is one that older versions read."""
METADATA = "fedkseed"
MAX_COLUMNS = 64
"""Most tensors in a ledger's file, many times what any has: each one more costs time before it is refused."""
MAX_SCALES = 65536
SHORT_DIGEST: np.dtype[Any] = np.dtype("<u4")


@dataclass(frozen=True, eq=False)
class History:
    """What a run needs beside the coefficients.

    Attributes:
        accumulators: the coefficients before rounding, float64[K].
        grad_sums: sums of |clipped projected gradient| for each seed, float64[K].
        grad_counts: how many went into each sum, int64[K].
        grad_scales: what the running scale of the scalars remembers (`fedkseed.kseed.scale`), float64, at most 65,536; empty
            where none is kept.
    """

    accumulators: NDArray[np.float64]
    grad_sums: NDArray[np.float64]
    grad_counts: NDArray[np.int64]
    grad_scales: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))


def digest_of(ledger: Ledger) -> str:
    """See `Ledger.digest`."""
    metadata, tensors = _content(ledger)
    digest = hashlib.sha256(_canonical(metadata).encode())
    for name in sorted(tensors):
        digest.update(f"\n{name} {tensors[name].dtype.str} {tensors[name].shape}\n".encode())
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()


def encoded(ledger: Ledger) -> bytes:
    """See `Ledger.encode`."""
    metadata, tensors = _content(ledger)
    metadata = _folded(metadata)
    if ledger.made_with is not None:
        metadata["made_with"] = dict(ledger.made_with)
    data: bytes = save_tensors(tensors, metadata={METADATA: _canonical(metadata)})
    return data


def _content(ledger: Ledger) -> tuple[dict[str, Any], Tensors]:
    metadata: dict[str, Any] = {
        "format": FORMAT,
        "pool": {"key": f"{ledger.pool.key:016x}", "size": ledger.pool.size, "family": ledger.pool.family},
        "base": {"fingerprint": ledger.base.fingerprint, "frozen": list(ledger.base.frozen)},
        "precision": ledger.precision,
        "round": ledger.round,
    }
    tensors: dict[str, NDArray[Any]] = {"base_digests": ledger.base.digests.astype(SHORT_DIGEST)}
    if ledger.pages:
        changes, more = paged_content(ledger.pages, ledger.precision, ledger.state or {})
        del metadata["pool"], metadata["precision"]
        metadata |= changes
        tensors |= more
    elif ledger.history is not None:
        tensors["accumulators"] = ledger.history.accumulators.astype("<f8")
        tensors["grad_sums"] = ledger.history.grad_sums.astype("<f8")
        tensors["grad_counts"] = ledger.history.grad_counts.astype("<i8")
        if ledger.history.grad_scales.size:
            tensors["grad_scales"] = ledger.history.grad_scales.astype("<f8")
    else:
        packed = pack(ledger.coefficients, ledger.precision)
        metadata["exponent"] = packed.exponent
        tensors["coefficients"] = np.frombuffer(packed.numbers, DTYPES[ledger.precision])
    return metadata, tensors


def read_fields(file: BinaryIO) -> dict[str, Any]:
    """What a ledger is made of, by the names of its attributes, from its file.

    Raises:
        LedgerError: it is not a ledger, damaged, or of another format version.
    """
    try:
        header, _ = safetensors_header(file)
        metadata = safetensors_entry(header, METADATA)
        if len(header) > MAX_COLUMNS:
            raise ValueError(f"it has {len(header):,} tensors; at most {MAX_COLUMNS} are a ledger's")
        file.seek(0)
        tensors = load_tensors(file.read())
    except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        why = f" ({one_line(error, 100)})" if isinstance(error, ValueError) else ""
        raise LedgerError(f"not a ledger, or damaged{why}; expected a file that fedkseed wrote") from error
    found = metadata.get("format") if isinstance(metadata, dict) else None
    if type(found) is not int or found not in FORMATS:
        raise LedgerError(
            f"ledger format is {found!s:.40}; this version reads {FORMAT} to {FORMATS[-1]}: use the fedkseed that wrote it"
        )
    try:
        metadata, found = _unfolded(metadata, len(tensors["base_digests"]))
        fields = _of_coefficients(metadata, tensors) if found == FORMAT else _of_pages(metadata, tensors)
        if not isinstance(made_with := metadata.get("made_with"), dict | None):
            raise ValueError("made_with is no table")
        common = {"base": _base(metadata, tensors), "round": _round(metadata), "made_with": made_with}
        return common | fields
    except (KeyError, TypeError, ValueError, FedKSeedError) as error:
        raise damaged(error) from error


def damaged(error: Exception) -> LedgerError:
    """What to say of a file whose content is not a ledger's."""
    return LedgerError(f"ledger is damaged ({one_line(error, 200)}); restore it from a copy")


def _of_pages(metadata: dict[str, Any], tensors: Tensors) -> dict[str, Any]:
    pages, wire = read_pages(metadata, tensors)
    page = pages[-1]
    own = {"pool": page.pool, "precision": wire, "coefficients": page.coefficients(), "history": None}
    return own | {"pages": tuple(pages), "state": read_state(tensors, page.pool.size)}


def _of_coefficients(metadata: dict[str, Any], tensors: Tensors) -> dict[str, Any]:
    pool = SeedPool(int(metadata["pool"]["key"], 16), metadata["pool"]["size"], metadata["pool"]["family"])
    precision = metadata["precision"]
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}")
    if "accumulators" not in tensors:
        numbers = tensor_of(tensors, "coefficients", DTYPES[precision], pool.size)
        exponent = metadata["exponent"]
        if type(exponent) is not int or abs(exponent) > MAX_EXPONENT:
            raise ValueError(f"exponent {exponent!r:.40}")
        coefficients = Packed(precision, exponent, numbers.tobytes()).unpack()
        return {"pool": pool, "precision": precision, "coefficients": pool.check_coefficients(coefficients), "history": None}
    columns: dict[str, str] = {"accumulators": "<f8", "grad_sums": "<f8", "grad_counts": "<i8"}
    history = History(**{name: tensor_of(tensors, name, np.dtype(kind), pool.size) for name, kind in columns.items()})
    if "grad_scales" in tensors:
        history = replace(history, grad_scales=tensor_of(tensors, "grad_scales", np.dtype("<f8"), None))
    sums, scales = history.grad_sums, history.grad_scales
    if len(scales) > MAX_SCALES or not (np.isfinite(scales) & (scales > 0)).all():
        raise ValueError("the scales of the scalars are not positive numbers, or too many")
    if not np.isfinite(sums).all() or sums.min() < 0 or history.grad_counts.min() < 0:
        raise ValueError("a seed's sum or number of gradients is negative or not finite")
    coefficients = rounded(history.accumulators, precision)
    return {"pool": pool, "precision": precision, "coefficients": coefficients, "history": history}


def _canonical(metadata: dict[str, Any]) -> str:
    return json.dumps(metadata, sort_keys=True, separators=(",", ":"))


def _folded(metadata: dict[str, Any]) -> dict[str, Any]:
    """What a file says of a ledger, with the names of frozen tensors folded where that is worth it."""
    frozen = metadata["base"]["frozen"]
    patterns = folded(frozen)
    if patterns is None or len(_canonical({"": frozen})) - len(_canonical({"": patterns})) < WORTH_FOLDING:
        return metadata
    return {**metadata, "format": FOLDED_FORMAT, "of": metadata["format"], "base": {**metadata["base"], "frozen": patterns}}


def _unfolded(metadata: dict[str, Any], num_tensors: int) -> tuple[dict[str, Any], int]:
    """The same as it is in an older format, and which."""
    found = metadata["format"]
    if found != FOLDED_FORMAT:
        return metadata, found
    of = metadata["of"]
    if type(of) is not int or of not in FORMATS or of == FOLDED_FORMAT:
        raise ValueError(f"it is of format {of!r:.40}")
    frozen = unfolded(metadata["base"]["frozen"], num_tensors)
    return {**metadata, "format": of, "base": {**metadata["base"], "frozen": frozen}}, of


def _base(metadata: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> BaseIdentity:
    frozen, fingerprint = metadata["base"]["frozen"], metadata["base"]["fingerprint"]
    if not (isinstance(frozen, list) and all(isinstance(name, str) for name in frozen)):
        raise ValueError("frozen is not a list of names")
    if not (isinstance(fingerprint, str) and re.fullmatch("[0-9a-f]{64}", fingerprint)):
        raise ValueError("the base's fingerprint is not 64 hexadecimal digits")
    return BaseIdentity(fingerprint, tensor_of(tensors, "base_digests", SHORT_DIGEST, None), tuple(frozen))


def _round(metadata: dict[str, Any]) -> int:
    number = metadata["round"]
    if not isinstance(number, int) or number < 0:
        raise ValueError(f"round {number!r}")
    return number
