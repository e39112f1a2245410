"""Token ids on the disk, by a hash of everything that they depend on, so that large data is tokenised once."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedkseed.files import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenIds = list[list[int]]
MIN_TEXTS = 1024
"""Fewer texts take no time, so their token ids need not lie on a disk."""


def cache_folder() -> Path:
    """Where token ids are kept: $FEDKSEED_CACHE, else fedkseed under $XDG_CACHE_HOME or ~/.cache. Delete it at any time."""
    chosen = os.environ.get("FEDKSEED_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedkseed"


def cache_path(
    texts: Sequence[tuple[Sequence[tuple[str, bool]], str]], tokenizer: PreTrainedTokenizerBase, control: Sequence[str] = ()
) -> Path | None:
    """The file for the token ids of (prompt in parts, response) texts; None where caching does not pay or the tokenizer is a
    slow one, which cannot say what it is.

    Args:
        texts: see `fedkseed.data.special.Parts`.
        tokenizer: a Hugging Face tokenizer.
        control: the names that stay text in a record's own part.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or len(texts) < MIN_TEXTS:
        return None
    digest = hashlib.sha256(backend.to_str().encode())
    digest.update(json.dumps([list(control), list(texts)]).encode())
    return cache_folder() / f"{digest.hexdigest()}.npz"


def load(path: Path, num_texts: int) -> tuple[TokenIds, TokenIds] | None:
    """The token ids of so many prompts and responses; None if there are none, or the file is damaged."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            ids, lengths = file["ids"], file["lengths"]
        parts: TokenIds = [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]
    except Exception:  # whatever a damaged archive raises; it is written anew
        return None
    return (parts[:num_texts], parts[num_texts:]) if len(parts) == 2 * num_texts else None


def save(path: Path, prompts: TokenIds, responses: TokenIds) -> None:
    """Keep token ids, readable for this user only; a folder that cannot be written costs a warning, not the run."""
    parts = [*prompts, *responses]
    file = io.BytesIO()
    ids = np.fromiter((i for part in parts for i in part), np.int32)
    np.savez_compressed(file, ids=ids, lengths=np.array([len(part) for part in parts], np.int64))
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(path, file.getvalue(), private=True)
    except OSError as error:
        logging.getLogger("fedkseed").warning(
            "%s: token ids cannot be kept (%s); set FEDKSEED_CACHE to another folder", path.parent, error.strerror
        )
