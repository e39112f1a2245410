"""`--quiet` and `--verbose`: how much a command says, kept as the level of the package's logger."""

import logging
from typing import Annotated

import typer

from fedkseed.cli.console import LOG

PANEL = "What is shown"


def _quiet(wanted: bool) -> None:
    if wanted:
        LOG.setLevel(logging.WARNING)


def _verbose(wanted: bool) -> None:
    if wanted:
        LOG.setLevel(logging.DEBUG)


Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", callback=_quiet, rich_help_panel=PANEL, help="Show warnings and results only.")
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", callback=_verbose, rich_help_panel=PANEL, help="Show each client, where the time went, and the log."
    ),
]
