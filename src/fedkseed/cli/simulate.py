"""`fedkseed simulate` and `tune`: their flags are the fields of `SimulationConfig`, so that there is one list of settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from rich.markup import escape

from fedkseed.cli.console import is_quiet, say, say_command, shell_word
from fedkseed.cli.display import LOADING, Lines, looking_on, waiting, watching
from fedkseed.cli.forecast import cost_of_step, describe
from fedkseed.cli.interrupts import again, interruptible, with_run
from fedkseed.cli.verbosity import Quiet, Verbose
from fedkseed.errors import ConfigError
from fedkseed.federation import FederationConfig
from fedkseed.federation.algorithms import SOME_TAKE
from fedkseed.runs.settings import (
    AUTO,
    PATTERNS,
    RunConfig,
    SimulationConfig,
    build,
    flag,
    flags,
    missing,
    read_settings_file,
    started,
)
from fedkseed.runs.trackers import TRACKERS, check_trackers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fedkseed.federation import Checkpoint
    from fedkseed.runs.folder import RunFolder
    from fedkseed.runs.observer import Observer
    from fedkseed.runs.records import Records
    from fedkseed.runs.simulation import Simulation

Given = str | list[str] | None
"""What a flag's value is; a list of those that may be repeated."""


def simulate(
    run: Path | None,
    resume: Path | None,
    accept_changes: bool,
    config: Path | None,
    log: list[str] | None,
    quiet: bool = False,
    verbose: bool = False,
    **flags: Given,
) -> None:
    """Tune a model by a federation on this machine: every client is simulated in turn, with real messages.

    Settings come from flags, else from the --config file (TOML; the same words with underscores), else from defaults.
    """
    given = _given(flags)
    trackers = check_trackers(log or ())
    if resume is not None:
        _resume(resume, run, config, given, trackers, accept_changes)
        return
    if accept_changes:
        raise ConfigError("--accept-changes is of --resume, which is missing; leave it out, or say which run to go on with")
    chosen = {**(read_settings_file(config) if config else {}), **given}
    _ask_for_all(chosen, "model", "data", "lr")
    # checked before the rate is looked for, which takes long
    settings = build({**chosen, "lr": 1.0} if chosen.get("lr") == AUTO else chosen)
    with interruptible("no run was begun yet"):
        with waiting(Lines().note, LOADING):
            from fedkseed.runs.extras import require_extras
            from fedkseed.runs.folder import RunFolder, new_folder
            from fedkseed.runs.learner import load_learner
            from fedkseed.runs.records import prepare

        require_extras(settings)
        folder = run or new_folder(Path("runs"))
        RunFolder.check_free(folder)
        if chosen.get("lr") == AUTO:
            settings = build(chosen | _calibrated(settings, keep_eps="eps" in chosen))
        with watching(settings) as observer:
            with waiting(observer.note, f"loading {settings.model}"):
                learner = load_learner(settings, observer)
            records = prepare(started(settings), observer, learner=learner)
            kept = RunFolder.create(folder, records.config)
            train(kept, records, observer, _go_on(folder), learner.model, log=trackers)
        _say_next(kept)


def tune(config: Path | None, quiet: bool = False, verbose: bool = False, **flags: Given) -> None:
    """Find a workable --lr (and --eps, of two-point algorithms) for a model and data, and say why these.

    The settings are those of simulate, whose `--lr auto` takes what this finds. The batch size matters most.
    """
    chosen = {**(read_settings_file(config) if config else {}), **_given(flags), "lr": 1.0}
    _ask_for_all(chosen, "model", "data")
    settings = build(chosen)
    with interruptible("tune changes nothing and keeps nothing"):
        found = _calibrated(settings, keep_eps=False)
    say()
    say("take: " + " ".join(f"{flag(name)} {value:g}" for name, value in found.items()))


def _ask_for_all(chosen: Mapping[str, Any], *names: str) -> None:
    """Ask for all that is missing at once.

    Raises:
        ConfigError: something is.
    """
    if without := [name for name in names if chosen.get(name) is None]:
        raise ConfigError(missing(without))


def _calibrated(settings: SimulationConfig, keep_eps: bool) -> dict[str, float]:
    with waiting(Lines().note, LOADING):
        from fedkseed.cli.tune import show
        from fedkseed.runs.tuning import find

    with looking_on() as observer:
        found = find(settings, observer)
    show(found)
    eps = getattr(found, "eps", None)
    return {"lr": found.lr} if keep_eps or eps is None else {"lr": found.lr, "eps": eps}


def _resume(
    resume: Path, run: Path | None, config: Path | None, given: dict[str, str], log: Sequence[str], accept_changes: bool
) -> None:
    from fedkseed.runs.folder import RunFolder
    from fedkseed.runs.provenance import check_same

    for name, value in (("--run", run), ("--config", config)):
        if value is not None:
            raise ConfigError(f"{name} can't be given with --resume, which goes on in the run's folder with its settings")
    folder = RunFolder.open(resume)
    settings = _moved(folder, given)
    with interruptible(with_run(resume, again())), folder.held(), ExitStack() as stack:  # before anything is loaded
        checkpoint = folder.load_checkpoint()
        if checkpoint and settings.num_rounds < checkpoint.round:
            raise ConfigError(
                f"--num-rounds is {settings.num_rounds} and {resume} has {checkpoint.round} rounds already; give as many or "
                "more (evaluate and export take an earlier round's ledger with --round)"
            )
        check_same(folder, checkpoint, settings, None, accept_changes)  # what takes no reading of records
        if checkpoint and settings == folder.simulation and not log and settings.audit_log == "off" and folder.is_complete():
            say(_all_done(settings))
            _say_done(folder, checkpoint)
            _say_next(folder)
            return
        with waiting(Lines().note, LOADING):
            from fedkseed.runs.extras import require_extras
            from fedkseed.runs.learner import load_learner
            from fedkseed.runs.records import prepare

        require_extras(settings)
        observer = stack.enter_context(watching(settings))
        with waiting(observer.note, f"loading {settings.model}"):
            learner = load_learner(settings, observer)
        records = prepare(settings, observer, learner=learner)
        train(folder, records, observer, _go_on(resume), learner.model, None, log, records.config, accept_changes)
    _say_next(folder)


def _given(flags: dict[str, Given]) -> dict[str, str]:
    """What the command line says; the values of a flag that was repeated have commas between them."""
    return {
        name: ",".join(value) if isinstance(value, list) else value for name, value in flags.items() if value not in (None, [])
    }


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


def _go_on(folder: Path) -> list[str]:
    return ["fedkseed", "simulate", "--resume", str(folder)]


def train(
    folder: RunFolder,
    records: Records,
    observer: Observer,
    resume: Sequence[str],
    model: PreTrainedModel | None = None,
    before: Callable[[Simulation], None] | None = None,
    log: Sequence[str] = (),
    config: SimulationConfig | None = None,
    accept_changes: bool = False,
) -> Simulation:
    """Load the model and do the rounds that are left; Ctrl-C says what is safe and how to go on.

    Args:
        folder: the run.
        records: its data.
        observer: who watches.
        resume: the command that goes on with the run, in words.
        model: the base model, if it is loaded already.
        before: called with the simulation before its first round, if anything is.
        log: trackers; see `fedkseed.runs.trackers`.
        config, accept_changes: see `Simulation`.

    Raises:
        FedKSeedError: see `Simulation`.
    """
    with interruptible(with_run(folder.path, resume)), folder.held():  # before the checkpoint is read: nobody moves it on
        with waiting(
            observer.note, f"loading {folder.config.model}" if model is None else "preparing the clients and the base"
        ):
            from fedkseed.runs.simulation import Simulation

            simulation = Simulation(folder, records, observer, model, log, config, accept_changes)
        with waiting(observer.note, "measuring a step, to say how long the run will take"):
            forecast = simulation.forecast()
        if forecast is None:
            observer.note(_all_done(simulation.config))
        lines = [*cost_of_step(simulation.config), *describe(forecast, simulation.config.facts)] if forecast else []
        for line in lines:
            observer.note(line)
        if before is not None:
            before(simulation)
        checkpoint = simulation.train()
    _say_done(folder, checkpoint)
    return simulation


def _all_done(config: SimulationConfig) -> str:
    total = config.num_rounds
    return f"all {total} rounds were done already" if total > 1 else "the only round was done already"


def _say_done(folder: RunFolder, checkpoint: Checkpoint) -> None:
    file = folder.checkpoint_path
    say(f"done: {file}, {file.stat().st_size:,} bytes, digest {checkpoint.digest()}")


def _say_next(folder: RunFolder) -> None:
    """What can be done with a tuned model."""
    if not is_quiet():
        say("Look at it, ask it, use it:")
        for words in (("report", folder.path), ("evaluate", folder.path, "--answers", 5), ("export", folder.path, "tuned")):
            say_command(("fedkseed", *words))


def command_line(config: SimulationConfig) -> str:
    """The `fedkseed simulate` command with these settings; those at their defaults are left out."""
    return " ".join(map(shell_word, ["fedkseed", "simulate", *flags(config)]))


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


def _settings_options(leave_out: Collection[str] = ()) -> dict[str, tuple[Any, Any]]:
    """One optional text parameter for every setting, the first ones first: pydantic reads and checks the text."""
    fields = SimulationConfig.model_fields
    return {name: _option(name, fields[name]) for name in dict.fromkeys([*FIRST, *fields]) if name not in leave_out}


def _give_signature(command: Any, options: dict[str, tuple[Any, Any]]) -> None:
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(name, kind, default=d, annotation=a) for name, (a, d) in options.items()]
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {name: a for name, (a, _) in options.items()}


RUN_OPTION: dict[str, tuple[Any, Any]] = {
    "run": (
        Annotated[Path | None, typer.Option(help="Folder of the run; without one it is under runs/, named by the time.")],
        None,
    ),
}
CONFIG_OPTION: dict[str, tuple[Any, Any]] = {
    "config": (Annotated[Path | None, typer.Option(help="TOML file with settings.", rich_help_panel=RUN)], None),
}
RESUME_OPTIONS: dict[str, tuple[Any, Any]] = {
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
LOUDNESS: dict[str, tuple[Any, Any]] = {"quiet": (Quiet, False), "verbose": (Verbose, False)}
_give_signature(simulate, {**RUN_OPTION, **RESUME_OPTIONS, **CONFIG_OPTION, **_settings_options(), **LOUDNESS})
_give_signature(tune, {**CONFIG_OPTION, **_settings_options(leave_out=("lr", "eps")), **LOUDNESS})
