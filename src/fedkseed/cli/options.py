"""The flags of `fedkseed simulate` and `tune`: the fields of `SimulationConfig`, so that there is one list of settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from rich.markup import escape

from fedkseed.federation import FederationConfig
from fedkseed.federation.algorithms import SOME_TAKE
from fedkseed.runs.settings import PATTERNS, RunConfig, SimulationConfig, flag
from fedkseed.runs.trackers import TRACKERS

Options = dict[str, tuple[Any, Any]]
"""Parameters by name: what typer is told of each, and its default."""
FIRST = (
    "model", "data", "algorithm", "lr", "num_rounds", "num_clients", "fraction_train", "local_steps", "batch_size",
)  # fmt: skip
"""The settings that matter first, which the help shows first, with --run."""
RUN, ROUNDS, EVALUATION, RECORDS, SOME = (
    "The run",
    "Rounds and steps",
    "Model, prompts and evaluation",
    "Records and clients",
    "What only some algorithms take",
)
"""Groups of settings in the help."""
WIDEST_CHOICES = 23
"""Characters of choices that stand beside a flag; longer ones are in its description."""


def _panel(name: str) -> str | None:
    """The group of a setting in the help: by where it is defined, and by who takes it; None is the first one."""
    if name in FIRST:
        return None
    if name in SOME_TAKE:
        return SOME
    return ROUNDS if name in FederationConfig.model_fields else EVALUATION if name in RunConfig.model_fields else RECORDS


def _choices(field: FieldInfo) -> list[str]:
    """What a setting that is one of several names may be."""
    for kind in [field.annotation, *get_args(field.annotation)]:
        if get_origin(kind) is Literal:
            return [str(choice) for choice in get_args(kind)]
    return []


def _metavar(field: FieldInfo) -> str:
    """What a flag's value looks like: the choices, or the kind of value."""
    if field.annotation == RunConfig.model_fields["eval_limit"].annotation:
        return "INTEGER|all"
    if choices := _choices(field):
        beside = "|".join(choices)
        return beside if len(beside) <= WIDEST_CHOICES else "NAME"
    kinds = [field.annotation, *get_args(field.annotation)]
    for kind in kinds:
        kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
        if kind in (int, float, str, Path, date):
            return {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH", date: "DATE"}[kind]
    return "VALUE"


def _complete(choices: list[str]) -> Callable[[str], list[str]]:
    """What a shell offers for the beginning of a choice."""
    return lambda incomplete: [choice for choice in choices if choice.startswith(incomplete)]


def _option(name: str, field: FieldInfo) -> tuple[Any, Any]:
    default = "" if field.is_required() or field.default is None else f" [default: {field.default}]"
    option = typer.Option(
        flag(name),
        help=escape(f"{field.description}{default}"),
        metavar="PATTERN" if name in PATTERNS else _metavar(field),
        rich_help_panel=_panel(name),
        autocompletion=_complete(_choices(field)),
    )
    kind: Any = list[str] if name in PATTERNS else str
    return Annotated[kind | None, option], None


def settings_options(leave_out: Collection[str] = ()) -> Options:
    """One optional text parameter for every setting, the first ones first: pydantic reads and checks the text."""
    fields = SimulationConfig.model_fields
    return {name: _option(name, fields[name]) for name in dict.fromkeys([*FIRST, *fields]) if name not in leave_out}


def give_signature(command: Any, options: Options) -> None:
    """Let typer see a function with these keyword arguments in place of its own."""
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(name, kind, default=d, annotation=a) for name, (a, d) in options.items()]
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {name: a for name, (a, _) in options.items()}


RUN_OPTION: Options = {
    "run": (
        Annotated[Path | None, typer.Option(help="Folder of the run; without one it is under runs/, named by the time.")],
        None,
    ),
}
CONFIG_OPTION: Options = {
    "config": (Annotated[Path | None, typer.Option(help="TOML file with settings.", rich_help_panel=RUN)], None),
}
RESUME_OPTIONS: Options = {
    "resume": (Annotated[Path | None, typer.Option(help="Go on with the run in this folder.", rich_help_panel=RUN)], None),
    "accept_changes": (
        Annotated[
            bool,
            typer.Option("--accept-changes", help="Go on although the run had other settings or records.", rich_help_panel=RUN),
        ],
        False,
    ),
    "log": (
        Annotated[
            list[str] | None,
            typer.Option(
                "--log",
                metavar="|".join(TRACKERS),
                help=escape(
                    "Send all numbers there too; may be given several times. "
                    + "; ".join(f"{name}: {row.where}" for name, row in TRACKERS.items())
                    + "."
                ),
                autocompletion=_complete(list(TRACKERS)),
                rich_help_panel=RUN,
            ),
        ],
        None,
    ),
}
