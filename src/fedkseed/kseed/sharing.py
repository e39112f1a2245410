"""A ledger as a folder with its card: written, put on a hub, found again in a folder or on a hub, loaded over its base."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkseed.errors import InvalidValueError, LedgerError
from fedkseed.files import placed, write_atomically
from fedkseed.kseed.card import CARD, LIBRARY, Prompt, fields_in, ledger_card, licence_of
from fedkseed.kseed.ledger import LEDGER, Ledger
from fedkseed.text import one_line

if TYPE_CHECKING:
    import torch

    from fedkseed.models.dtypes import Dtype

HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")
"""`owner/name`, perhaps with `@revision`."""


def save_folder(
    ledger: Ledger,
    folder: str | Path,
    base_model: str | None = None,
    prompt: Prompt | str | None = None,
    about: Mapping[str, str] | None = None,
) -> Path:
    """Write a folder with the published ledger and its card, as hubs want it; what it held of a ledger is replaced.

    Args:
        ledger: any; its published form is written.
        folder: made where it is missing.
        base_model: hub id or folder of the base model, which the card names (of a folder only its last part); None for the
            ledger's own `base_model`, which `fedkseed.ledger_of` and cards know.
        prompt: the prompt template for the card, such as the text of `tokenizer.chat_template`.
        about: further rows of the card's table, such as `{"training data": "..."}`.

    Returns:
        The folder.

    Raises:
        InvalidValueError: no base model is known.
        LedgerError: it cannot be written, or the folder is a run's, or has somebody's own README.md.
    """
    folder, published = placed(folder), ledger.published()
    card = _card(published, base_model or ledger.base_model, prompt, about)
    try:
        if (folder / LEDGER).exists() and Ledger.load(folder / LEDGER).is_checkpoint:
            raise LedgerError(f"{folder} holds the checkpoint of a run, which this would replace; give another folder")
        if (folder / CARD).exists() and not (folder / LEDGER).exists():
            raise LedgerError(f"{folder} holds a {CARD} of something else, which this would replace; give another folder")
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            published.save(folder / LEDGER)
            write_atomically(folder / CARD, card.encode())
        except BaseException:
            if is_new:
                shutil.rmtree(folder, ignore_errors=True)
            raise
    except OSError as error:
        raise LedgerError(f"{folder}: cannot write there ({error.strerror}); make room or choose another place") from error
    return folder


def _card(ledger: Ledger, base: str | None, prompt: Prompt | str | None, about: Mapping[str, str] | None) -> str:
    if base is not None and not isinstance(base, (str, Path)):
        raise InvalidValueError(f"base_model is {base!r:.80}; expected a hub id or a folder")
    if prompt is not None and not isinstance(prompt, (Prompt, str)):
        raise InvalidValueError(f"prompt is {prompt!r:.80}; expected the text of the template")
    if about is not None and not isinstance(about, Mapping):
        raise InvalidValueError(f"about is {about!r:.80}; expected a dict of rows, such as {{'training data': '...'}}")
    if not base:
        raise InvalidValueError("base_model is not known; give the hub id or the folder of the model that was tuned")
    if isinstance(prompt, str):
        prompt = Prompt("of its training", prompt, "jinja" if "{%" in prompt or "{{" in prompt else "text")
    about = None if about is None else {str(name): str(value) for name, value in about.items()}
    folder = placed(base)
    is_hub_id = isinstance(base, str) and HUB_NAME.fullmatch(base) and not folder.is_dir()
    return ledger_card(base if is_hub_id else folder.resolve().name, ledger, licence_of(base), prompt, about)


def push(
    ledger: Ledger,
    repo_id: str,
    base_model: str | None = None,
    prompt: Prompt | str | None = None,
    about: Mapping[str, str] | None = None,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Put what `save_folder` writes on the Hugging Face hub, into a repository that is made where it is missing.

    Args:
        ledger, base_model, prompt, about: see `save_folder`.
        repo_id: `owner/name`.
        private: of a repository that is made; None for the owner's default.
        token: None for that of `hf auth login`.

    Returns:
        The repository's address.

    Raises:
        InvalidValueError: another repo_id, or no base model is known.
        LedgerError: the hub did not take it.
    """
    from huggingface_hub import HfApi

    found = HUB_NAME.fullmatch(str(repo_id))
    if found is None or found[2]:
        raise InvalidValueError(f"repo_id is {repo_id!r:.80}; expected owner/name")
    with tempfile.TemporaryDirectory() as folder, _without_bars():
        save_folder(ledger, folder, base_model, prompt, about)
        try:
            api = HfApi(token=token)
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f"Ledger of round {ledger.round}")
        except Exception as error:  # of whichever HTTP library, or the hub's own
            raise LedgerError(
                f"{repo_id}: cannot push ({one_line(error)}); check the name, the token and the network"
            ) from error
    return str(url)


def find(source: str | Path) -> Ledger:
    """See `Ledger.from_pretrained`."""
    name = str(source)
    if not isinstance(source, (str, os.PathLike)) or not name.strip() or "\0" in name:
        raise LedgerError(f"a ledger's name is {source!r:.80}; give its file, its folder, or owner/name on a hub")
    path = placed(source)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:
        raise LedgerError(f"{name}: cannot look there ({error.strerror}); give a folder that this user may read") from error
    hub = None if exists or isinstance(source, Path) or path.suffix in {".safetensors", ".ledger"} else HUB_NAME.fullmatch(name)
    if hub is not None:
        path = _fetch(name, hub[1], hub[2])
    elif is_folder and not (path / LEDGER).is_file():
        raise LedgerError(f"{path}: no {LEDGER} in this folder; give one that save_pretrained wrote, or a run's")
    elif is_folder:
        path = path / LEDGER
    ledger = Ledger.load(path)
    card = fields_in(path.parent)  # of a bare ledger none, or that of something else in its folder
    base = card.get("base_model") if card.get("library_name") == LIBRARY else None
    return replace(ledger, base_model=base) if isinstance(base, str) else ledger


def _fetch(name: str, repo_id: str, revision: str | None) -> Path:
    """A hub's ledger in the local cache; what is there already is taken where the hub is out of reach."""
    from huggingface_hub import snapshot_download

    try:
        with _without_bars():
            folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=[LEDGER, CARD]))
    except Exception as error:  # of whichever HTTP library, or the hub's own
        raise LedgerError(
            f"{name}: no such file or folder here, and no hub gives it ({one_line(error)}); check the name, the revision and "
            "the network"
        ) from error
    if not (folder / LEDGER).is_file():
        raise LedgerError(f"{name}: it has no {LEDGER}; expected what Ledger.push_to_hub put there")
    return folder / LEDGER


def load(
    source: str | Path, base: str | Path | None = None, dtype: Dtype = "auto", device: str | torch.device = "cpu"
) -> torch.nn.Module:
    """The tuned causal LM of a ledger, in eval mode: its base model is loaded, checked, and tuned.

    Args:
        source: `owner/name` on a hub, perhaps with `@revision`; a folder of `Ledger.save_pretrained`'s; or a ledger's file.
        base: a folder or a hub id of the base model; None for the one that the card names.
        dtype: of the weights; "auto" is the base's own. Base values that the type cannot hold are read from the files and
            rounded last.
        device: where torch shall put it.

    Raises:
        LedgerError: there is no such ledger, no base is named, or the base is another one.
        ModelError: the base model cannot be loaded.
        InvalidValueError: an unknown dtype or device.
    """
    from fedkseed.kseed.apply import apply
    from fedkseed.models.loading import load_model

    if not isinstance(source, (str, Path)):
        raise InvalidValueError(f"source is a {type(source).__name__}; expected a ledger's file, folder or name (see fk.apply)")
    ledger = find(source)
    if base is None and ledger.base_model is None:
        raise LedgerError(f"{source}: no card says which base model it is over; give base=, a folder or a hub id")
    named = str(ledger.base_model)
    if base is None and "/" not in named and not Path(named).is_dir():
        raise LedgerError(f"{source}: its card names the base model {named!r:.80}, which is no hub id; give base=, where it is")
    model = load_model(base or named, dtype, device)
    apply(model, ledger)
    return model


@contextmanager
def _without_bars() -> Iterator[None]:
    from huggingface_hub import utils as untyped

    utils: Any = untyped
    were = utils.are_progress_bars_disabled()
    utils.disable_progress_bars()
    try:
        yield
    finally:
        if not were:
            utils.enable_progress_bars()
