"""What a document tells a reader to type: its blocks of code, its commands, and which of them do not exist."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHELLS = ("sh", "bash", "shell", "console")
PROGRAMS = ("make", "fedkseed")
"""What the documents' commands call. In a block without a language, the first word tells a command from what one printed."""


REPOSITORY = re.compile(
    r"https://(?:github\.com/fedkseed/fedkseed/(?:blob|tree)/main|raw\.githubusercontent\.com/fedkseed/fedkseed/main)/"
)


def links(text: str) -> list[str]:
    """Where a text leads within the repository: relative paths with their anchors, and absolute links to it as paths here."""
    found = [REPOSITORY.sub(f"{ROOT}/", link) for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    return [link for link in found if "://" not in link]


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, content) of each block of code, fenced or indented."""
    for language, fenced, indented in re.findall(r"^```(\w*)\n(.*?)^```$|((?:^ {4}[^\n]*\n)+)", text, re.MULTILINE | re.DOTALL):
        yield language, fenced or re.sub("^ {4}", "", indented, flags=re.MULTILINE)


def commands_in(language: str, content: str) -> list[list[str]]:
    """The words of each command line in one block, the program by its bare name."""
    found = []
    for line in content.replace("\\\n", " ").splitlines():
        first = Path(line.split(" ")[0]).name
        if language in SHELLS or (not language and first in PROGRAMS):
            found.append([first, *shlex.split(line, comments=True)[1:]])
    return found


def commands(text: str) -> list[list[str]]:
    """The words of each command line in any block."""
    return [words for language, content in blocks(text) for words in commands_in(language, content)]


def spans(text: str) -> list[str]:
    """Each piece of code within a sentence."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


def unknown(text: str) -> list[str]:
    """Each program, command, flag and make target, in blocks and in sentences, that does not exist."""
    import typer.main

    from fedkseed.cli.app import app

    group = typer.main.get_command(app)
    flags = {name: {flag for p in command.params for flag in p.opts} for name, command in group.commands.items()}
    flags[""] = {flag for p in group.params for flag in p.opts}
    targets = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    found = []
    for program, *args in commands(text) + [span.split() for span in spans(text) if span.startswith((*PROGRAMS, "--"))]:
        given = [word.split("=")[0] for word in (program, *args) if word.startswith("--") and word != "--help"]
        command = args[0] if args and not args[0].startswith("-") else ""
        if program == "make":
            found += [target for target in args if target not in targets]
        elif program.startswith("--"):
            found += [flag for flag in given if not any(flag in those for those in flags.values())]
        elif program != "fedkseed":
            found.append(program)
        elif command not in flags:
            found.append(command)
        else:
            found += [flag for flag in given if flag not in flags[command]]
    return found
