"""`fedkseed simulate` and `tune`: their flags are the fields of `SimulationConfig`, so that there is one list of settings."""

from __future__ import annotations

import inspect
import shlex
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from fedkseed.errors import ConfigError
from fedkseed.runs.settings import AUTO, SimulationConfig, build, flag, flags, read_settings_file
from fedkseed.runs.trackers import TRACKERS, check_trackers

if TYPE_CHECKING:
    from fedkseed.runs.folder import RunFolder
    from fedkseed.runs.observer import Observer
    from fedkseed.runs.records import Records
    from fedkseed.runs.simulation import Simulation


def simulate(
    run: Path | None,
    resume: Path | None,
    accept_changes: bool,
    config: Path | None,
    log: list[str] | None,
    **flags: str | None,
) -> None:
    """Federated tuning on this machine: every client simulated in turn, with real messages.

    Settings come from flags, else from the --config file (TOML; the same words with underscores), else from defaults.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    trackers = check_trackers(log or ())
    if resume is not None:
        _resume(resume, run, config, given, trackers, accept_changes)
        return
    if accept_changes:
        raise ConfigError("--accept-changes is of --resume, which is missing; leave it out, or say which run to go on with")
    chosen = {**(read_settings_file(config) if config else {}), **given}
    # checked before the rate is looked for, which takes long
    settings = build({**chosen, "lr": 1.0} if chosen.get("lr") == AUTO else chosen)
    from fedkseed.cli.display import watching
    from fedkseed.runs.folder import RunFolder, new_folder
    from fedkseed.runs.records import prepare

    folder = run or new_folder(Path("runs"))
    RunFolder.check_free(folder)
    if chosen.get("lr") == AUTO:
        settings = build(chosen | _calibrated(settings, keep_eps="eps" in chosen))
    with watching(settings) as observer:
        with _interruptible():
            records = prepare(settings, observer)
        train(RunFolder.create(folder, settings), records, observer, _go_on(folder), log=trackers)


def tune(config: Path | None, **flags: str | None) -> None:
    """Find a workable --lr (and --eps, of two-point algorithms) for a model and data, and say why these.

    The settings are those of simulate, whose `--lr auto` takes what this finds. The batch size matters most.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    settings = build({**(read_settings_file(config) if config else {}), **given, "lr": 1.0})
    found = _calibrated(settings, keep_eps=False)
    print("\ntake: " + " ".join(f"{flag(name)} {value:g}" for name, value in found.items()))


def _calibrated(settings: SimulationConfig, keep_eps: bool) -> dict[str, float]:
    from rich.console import Console

    from fedkseed.cli.display import PlainDisplay
    from fedkseed.cli.tune import show
    from fedkseed.runs.tuning import find

    with _interruptible():
        found = find(settings, PlainDisplay(settings, Console()))
    show(found)
    eps = getattr(found, "eps", None)
    return {"lr": found.lr} if keep_eps or eps is None else {"lr": found.lr, "eps": eps}


def _resume(
    resume: Path, run: Path | None, config: Path | None, given: dict[str, str], log: Sequence[str], accept_changes: bool
) -> None:
    from fedkseed.cli.display import watching
    from fedkseed.runs.folder import RunFolder
    from fedkseed.runs.provenance import check_same
    from fedkseed.runs.records import prepare

    for name, value in (("--run", run), ("--config", config)):
        if value is not None:
            raise ConfigError(f"{name} can't be given with --resume, which goes on in the run's folder with its settings")
    folder = RunFolder.open(resume)
    settings = _moved(folder, given)
    check_same(folder, folder.load_checkpoint(), settings, None, accept_changes)  # what takes no reading of records
    with watching(settings) as observer:
        with _interruptible():
            records = prepare(settings, observer)
        train(folder, records, observer, _go_on(resume), log=log, config=settings, accept_changes=accept_changes)


def _moved(folder: RunFolder, given: dict[str, str]) -> SimulationConfig:
    """A run's settings with what is given beside them; says how to go on where a file that they name has been moved.

    Raises:
        ConfigError: a setting is out of its range, or names a file that is not there.
    """
    stored = folder.simulation.model_dump()
    model = Path(stored["model"])
    if "model" not in given and model.is_absolute() and not model.is_dir():
        raise ConfigError(f"--model is {str(model)!r}: there is no such folder any more; if it was moved, add --model NEW")
    try:
        return build({**stored, **given})
    except ConfigError as error:
        for name in ("data", "eval_data", "template"):
            if name not in given and str(error).startswith(f"{flag(name)} is "):
                raise ConfigError(f"{error}; if it was moved, add {flag(name)} NEW") from error
        raise


def _go_on(folder: Path) -> str:
    return f"fedkseed simulate --resume {folder}"


@contextmanager
def _interruptible() -> Iterator[None]:
    """Before there is a run to go on with, Ctrl-C needs but one word."""
    try:
        yield
    except KeyboardInterrupt:
        print("fedkseed: interrupted", file=sys.stderr)
        raise typer.Exit(130) from None


def train(
    folder: RunFolder,
    records: Records,
    observer: Observer,
    resume: str,
    before: Callable[[Simulation], None] = lambda simulation: None,
    log: Sequence[str] = (),
    config: SimulationConfig | None = None,
    accept_changes: bool = False,
) -> Simulation:
    """Load the model and do the rounds that are left; Ctrl-C says what is safe and how to go on.

    Args:
        folder: the run.
        records: its data.
        observer: who watches.
        resume: the command that goes on with the run.
        before: called with the simulation before its first round.
        log: trackers; see `fedkseed.runs.trackers`.
        config, accept_changes: see `Simulation`.

    Raises:
        FedKSeedError: see `Simulation`.
    """
    from fedkseed.runs.simulation import Simulation

    try:
        with folder.held():  # before the checkpoint is read: nobody moves it on meanwhile
            simulation = Simulation(folder, records, observer, log=log, config=config, accept_changes=accept_changes)
            before(simulation)
            checkpoint = simulation.train()
    except KeyboardInterrupt:
        saved = folder.load_checkpoint()
        where = f"round {saved.round} is safe" if saved else "no round was done yet"
        observer.note(f"interrupted; {where}. Go on with: {resume}")
        raise typer.Exit(130) from None
    file = folder.checkpoint_path
    observer.note(f"done: {file}, {file.stat().st_size:,} bytes, digest {checkpoint.digest()}")
    return simulation


def command_line(config: SimulationConfig) -> str:
    """The `fedkseed simulate` command with these settings; those at their defaults are left out."""
    return shlex.join(["fedkseed", "simulate", *flags(config)])


def _metavar(field: FieldInfo) -> str:
    """What a flag's value looks like: the choices, or the kind of value."""
    kinds = [field.annotation, *get_args(field.annotation)]
    for kind in kinds:
        kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
        if get_origin(kind) is Literal:
            return "|".join(get_args(kind))
        if kind in (int, float, str, Path):
            return {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH"}[kind]
    return "VALUE"


def _settings_options(leave_out: Collection[str] = ()) -> dict[str, tuple[Any, Any]]:
    """One optional text parameter for every setting: pydantic reads and checks the text."""
    options: dict[str, tuple[Any, Any]] = {}
    for name, field in SimulationConfig.model_fields.items():
        default = "" if field.is_required() or field.default is None else f" [default: {field.default}]"
        note = f"{field.description}{default}"
        if name not in leave_out:
            options[name] = (Annotated[str | None, typer.Option(flag(name), help=note, metavar=_metavar(field))], None)
    options["config"] = (Annotated[Path | None, typer.Option(help="TOML file with settings")], None)
    return options


def _give_signature(command: Any, options: dict[str, tuple[Any, Any]]) -> None:
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(name, kind, default=d, annotation=a) for name, (a, d) in options.items()]
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {name: a for name, (a, _) in options.items()}


RUN_OPTIONS: dict[str, tuple[Any, Any]] = {
    "run": (Annotated[Path | None, typer.Option(help="folder of the run [default: runs/, named by the time]")], None),
    "resume": (Annotated[Path | None, typer.Option(help="go on with the run in this folder")], None),
    "accept_changes": (
        Annotated[bool, typer.Option("--accept-changes", help="go on although the run had other settings or records")],
        False,
    ),
    "log": (
        Annotated[
            list[str] | None,
            typer.Option(
                "--log",
                metavar="|".join(TRACKERS),
                help="send all numbers there too; may be given several times. "
                + "; ".join(f"{name}: {row.where}" for name, row in TRACKERS.items()),
            ),
        ],
        None,
    ),
}
_give_signature(simulate, {**_settings_options(), **RUN_OPTIONS})
_give_signature(tune, _settings_options(leave_out=("lr", "eps")))
