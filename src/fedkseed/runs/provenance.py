"""What a checkpoint was made with, so that no run goes on with anything else unless that is asked for.

A checkpoint holds the settings on which its bits depend and a digest of the clients' records. Names of files are not among
them: the base model is known by its fingerprint, the records by their digest, so that both may be moved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedkseed.data import TEMPLATES
from fedkseed.errors import ConfigError
from fedkseed.federation import Checkpoint
from fedkseed.runs.folder import RunFolder, settings_of
from fedkseed.runs.settings import BEFORE, RunConfig, SimulationConfig, flag, without_void

if TYPE_CHECKING:
    from fedkseed.runs.records import Records

FREE = frozenset({"num_rounds", "eval_every", "eval_limit", "eval_data", "model", "data", "template", "epsilon", "edges"})
"""Settings that may change: what is evaluated, how long the run is, its budget, how many edges sum, and names of what is known
by its content."""
REMEDY = (
    "go on with the run's own, or add --accept-changes (in Python accept_changes=True) for a run that no longer is that of one "
    "set of settings"
)


def made_with(config: RunConfig, records: Records | None) -> dict[str, Any]:
    """What a checkpoint holds of the settings and the records; None for those of clients elsewhere."""
    template = template_digest(config)
    return {
        "settings": _without(settings_of(config), FREE),
        "records": None if records is None else records_digest(records),
        **({} if template is None else {"template": template}),
    }


def template_digest(config: RunConfig) -> str | None:
    """SHA-256 (hex) of a template's file; None of a template that needs none, or whose file cannot be read."""
    try:
        return None if config.template in TEMPLATES else hashlib.sha256(Path(config.template).read_bytes()).hexdigest()
    except OSError:
        return None


def records_digest(records: Records) -> str:
    """SHA-256 (hex) of which token ids each client has, in their order; however they were read, cut and dealt out."""
    digest = hashlib.sha256()
    for name in sorted(records.clients):
        examples = records.clients[name]
        digest.update(f"{name}\n{len(examples)}\n".encode())
        for numbers in ([len(e.input_ids) for e in examples], [e.prompt_length for e in examples]):
            digest.update(np.array(numbers, "<i8").tobytes())
        digest.update(b"".join(e.input_ids.astype("<i4").tobytes() for e in examples))
        for record in records.sources.get(name, ()):
            if record.rejected:  # which no example holds
                digest.update(record.rejected.encode(errors="replace") + b"\n")
    return digest.hexdigest()


def check_same(
    run: RunFolder,
    checkpoint: Checkpoint | None,
    config: RunConfig,
    records: Records | None,
    accept_changes: bool = False,
    remedy: str = REMEDY,
) -> list[str]:
    """Refuse to go on with settings or records that the run was not made with, unless that is asked for.

    Args:
        run: the folder, with the settings that lie there.
        checkpoint: where the run is; None before the first round is done.
        config: the settings to go on with.
        records: the clients' records; None for those of clients elsewhere.
        accept_changes: go on with the differences.
        remedy: what the error says to do.

    Returns:
        The differences.

    Raises:
        ConfigError: there are some, and they were not asked for.
    """
    before = checkpoint.made_with if checkpoint is not None else None
    if before is not None:
        found = dict(_differences(before, made_with(config, records)))
    else:  # an old checkpoint, or none yet: the folder's settings are all that is known
        names = FREE - ({"data", "template"} if checkpoint is not None else {"data", "template", "model"})
        stored, now = ({"settings": _without(settings_of(one), names)} for one in (run.config, config))
        found = dict(_differences(stored, now))
    if found and not accept_changes:
        (_, text), *others = found.items()
        where = f"round {checkpoint.round} of {run.path} was made" if checkpoint is not None else f"{run.path} was begun"
        more = f" (and {', '.join(name for name, _ in others)} too)" if others else ""
        raise ConfigError(f"{text} when {where}{more}; {remedy}")
    return list(found.values())


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What differs, and how; what a checkpoint of another version does not know of is as it was then."""
    old = without_void(before["settings"]) if isinstance(before.get("settings"), dict) else {}
    new = now["settings"]
    for name in sorted(old.keys() | new.keys()):
        field = SimulationConfig.model_fields.get(name)
        default = field.get_default() if field is not None and not field.is_required() else None
        was, found = old.get(name, BEFORE.get(name, default)), new.get(name, default)
        if was != found:
            yield flag(name), f"{flag(name)} is {found!s:.60}, it was {was!s:.60}"
    old_records, new_records = before.get("records"), now.get("records")
    if old_records and new_records and old_records != new_records:
        yield "the records", f"the clients' records are others (digest {new_records:.8}, it was {old_records!s:.8})"


def _without(settings: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}
