"""What a comparison consists of: a TOML file of settings, seeds and methods, checked before anything runs."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from fedkseed.errors import ConfigError
from fedkseed.files import read_toml
from fedkseed.runs.settings import SimulationConfig, build
from fedkseed.runs.validation import Words, validated

LONGEST_SLUG = 80
"""Bytes of a method's name in the names of its folders."""
OWN = ("seed", "responses", "lr")
"""Settings that the comparison itself varies."""


class Entry(BaseModel):
    """One method: its name in the table, its learning rates to choose from, and the settings that are its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    lr: Annotated[list[Annotated[float, Field(strict=True)]], Field(min_length=1)]
    settings: dict[str, Any]

    @property
    def slug(self) -> str:
        """The name as part of a file's name; of one too long for that its beginning, and a digest of it."""
        slug = re.sub(r"[\W_]+", "-", self.name.lower()).strip("-")
        digest = hashlib.sha256(self.name.encode()).hexdigest()[:8]
        return slug if 0 < len(slug.encode()) <= LONGEST_SLUG else f"{slug[:20]}-{digest}".strip("-")


class Comparison(BaseModel):
    """A whole comparison.

    Attributes:
        settings: of every run.
        seeds: each method runs once with each.
        tuning_seed: the seed of the runs that choose a learning rate; not among the seeds.
        tuning_rounds: rounds of those runs; None for as many as the others.
        answers: held-out records that are answered, for Rouge-L.
        control: whether each run is done on shuffled responses too.
        methods: the rows of the table.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: dict[str, Any] = {}
    seeds: Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(min_length=1)] = [1, 2, 3]
    tuning_seed: Annotated[int, Field(ge=0, strict=True)] = 0
    tuning_rounds: Annotated[int, Field(ge=1, strict=True)] | None = None
    answers: Annotated[int, Field(ge=0, strict=True)] = 0
    control: Annotated[bool, Field(strict=True)] = True
    methods: Annotated[list[Entry], Field(min_length=1)]

    def config(self, entry: Entry, seed: int, lr: float, responses: str = "own") -> SimulationConfig:
        """The settings of one run of a method.

        Raises:
            ConfigError: they are not valid; the message names the method.
        """
        try:
            return build({**self.settings, **entry.settings, "seed": seed, "lr": lr, "responses": responses})
        except ConfigError as error:
            raise ConfigError(f"method {entry.name!r}: {error}") from error


def read_comparison(path: Path) -> Comparison:
    """Read and check a comparison's file.

    Raises:
        ConfigError: it cannot be read; a key or a setting is unknown, missing or out of its range; methods share a name or
            have grids of different sizes; the message names it and the fix.
    """
    try:
        content = read_toml(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read ({error.strerror}); give the TOML file of a comparison") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not TOML ({error}); expected [settings] and [[methods]]") from error
    try:
        comparison = _comparison(content)
        _check(comparison)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return comparison


def _comparison(content: dict[str, Any]) -> Comparison:
    methods = content.get("methods")
    if not isinstance(methods, list) or not all(isinstance(method, dict) for method in methods):
        raise ConfigError("methods are missing; give each as a table [[methods]] with name, algorithm and lr")
    entries = []
    for number, method in enumerate(methods, start=1):
        for name in ("name", "lr"):
            if name not in method:
                raise ConfigError(f"method {method.get('name', f'number {number}')!r}: {name} is missing; give it")
        own = {name: value for name, value in method.items() if name not in ("name", "lr")}
        rates = method["lr"]
        entries.append({"name": method["name"], "lr": rates if isinstance(rates, list) else [rates], "settings": own})

    def called(path: tuple[str, ...]) -> str:
        if path[0] != "methods" or len(path) < 3:
            return path[0]
        number = int(path[1])
        return f"method {entries[number]['name'] or f'number {number + 1}'!r}: {path[2]}"

    words = Words(value=called, missing=lambda name: f"{name} is missing", unknown=lambda name: f"key {name!r}", shown=repr)
    return validated(Comparison, {**content, "methods": entries}, words)


def _check(comparison: Comparison) -> None:
    first = comparison.methods[0]
    for name in OWN:
        for where, settings in [("settings", comparison.settings)] + [(m.name, m.settings) for m in comparison.methods]:
            if name in settings:
                raise ConfigError(f"{where}: {name} is the comparison's to set; give seeds, control, or lr in a method")
    if len(set(comparison.seeds)) < len(comparison.seeds):
        raise ConfigError(f"seeds are {comparison.seeds}; expected distinct ones")
    if comparison.tuning_seed in comparison.seeds:
        raise ConfigError(
            f"tuning_seed {comparison.tuning_seed} is one of the seeds; give another, so that no run judges its own rate"
        )
    for name in ("eval_data", "eval_limit"):
        said = [str({**comparison.settings, **method.settings}.get(name)) for method in comparison.methods]
        if len(set(said)) > 1:
            raise ConfigError(
                f"{name} differs between methods ({', '.join(said):.80}); losses of different records are no comparison, so "
                "give it once, under [settings]"
            )
    for entry in comparison.methods:
        if [method.slug for method in comparison.methods].count(entry.slug) > 1:
            raise ConfigError(f"two methods are called {entry.name!r}, or nearly so; give each a name of its own")
        if len(entry.lr) != len(first.lr):
            raise ConfigError(
                f"method {entry.name!r} has {len(entry.lr)} learning rates and {first.name!r} has {len(first.lr)}; "
                "give each as many, so that none is tuned more than another"
            )
        if len({f"{lr:g}" for lr in entry.lr}) < len(entry.lr):
            raise ConfigError(f"method {entry.name!r} has a learning rate twice in {entry.lr}; give different ones")
        for lr in entry.lr:
            comparison.config(entry, comparison.tuning_seed, lr)
        for seed in comparison.seeds:
            comparison.config(entry, seed, entry.lr[0])
    if comparison.tuning_rounds is not None and len(first.lr) == 1:
        raise ConfigError(
            f"tuning_rounds is {comparison.tuning_rounds} and no method has several learning rates; leave it out, or give grids"
        )
