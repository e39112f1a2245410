"""The directive `commands`: every command of `fedkseed` with its options, from the help of the program itself."""

import re
from collections.abc import Iterator
from typing import Any

import click
import typer.main
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from fedkseed.cli.app import app as commands

SAME_AS = {"tune": "simulate"}
"""Commands that take another's options."""


def _plain(text: str | None) -> str:
    """A help text without rich's escapes, in one line."""
    return re.sub(r"\\(\[)", r"\1", " ".join((text or "").split()))


def _words(text: str) -> Iterator[nodes.Node]:
    """A text whose flags are code."""
    for part in re.split(r"(--[a-z][\w-]*)", text):
        if part:
            yield nodes.literal(part, part) if part.startswith("--") else nodes.Text(part)


def _table(options: list[click.Parameter]) -> nodes.table:
    body = nodes.tbody()
    for option in options:
        name = ", ".join(option.opts) if isinstance(option, click.Option) else str(option.make_metavar(None))
        cells = [nodes.paragraph("", "", nodes.literal(name, name)), nodes.paragraph("", "", *_words(_plain(option.help)))]
        body += nodes.row("", *(nodes.entry("", cell) for cell in cells))
    columns = [nodes.colspec(colwidth=width) for width in (1, 3)]
    return nodes.table("", nodes.tgroup("", *columns, body, cols=2), classes=["options"])


class Commands(SphinxDirective):
    """All commands, a section each."""

    def run(self) -> list[nodes.Node]:
        """See docutils."""
        group = typer.main.get_command(commands)
        assert isinstance(group, click.Group)
        return [self._section(name, command) for name, command in group.commands.items()]

    def _section(self, name: str, command: click.Command) -> nodes.section:
        section = nodes.section(ids=[f"fedkseed-{name}"], names=[f"fedkseed {name}"])
        section += nodes.title("", f"fedkseed {name}")
        for paragraph in (command.help or "").split("\n\n"):
            section += nodes.paragraph("", "", *_words(_plain(paragraph)))
        if name in SAME_AS:
            return section
        groups: dict[str, list[click.Parameter]] = {}
        for option in command.params:
            groups.setdefault(getattr(option, "rich_help_panel", None) or "", []).append(option)
        for title, options in groups.items():
            if title:
                section += nodes.rubric("", title)
            section += _table(options)
        return section


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("commands", Commands)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
