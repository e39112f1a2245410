"""`--quiet` and `--verbose`: how much a command says, kept as the level of the package's logger."""

import logging
from typing import Annotated

import typer

from fedkseed.cli.console import LOG
from fedkseed.errors import ConfigError

PANEL = "What is shown"


def _quiet(context: typer.Context, wanted: bool) -> bool:
    return _set(context, wanted, logging.WARNING)


def _verbose(context: typer.Context, wanted: bool) -> bool:
    return _set(context, wanted, logging.DEBUG)


def _set(context: typer.Context, wanted: bool, level: int) -> bool:
    if wanted and (context.params.get("quiet") or context.params.get("verbose")):
        raise ConfigError("--quiet and --verbose say less and more; give one of them")
    if wanted:
        LOG.setLevel(level)
    return wanted


Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", callback=_quiet, rich_help_panel=PANEL, help="Show warnings and results only.")
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", callback=_verbose, rich_help_panel=PANEL, help="Show each client, where the time went, and the log."
    ),
]
