"""`fedkseed simulate` and `tune`: from what the command line says to a run, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkseed.cli.console import is_quiet, say, say_command, shell_word
from fedkseed.cli.display import LOADING, Lines, looking_on, waiting, watching
from fedkseed.cli.forecast import cost_of_step, describe
from fedkseed.cli.interrupts import again, interruptible, with_run
from fedkseed.cli.options import CONFIG_OPTION, RESUME_OPTIONS, RUN_OPTION, Options, give_signature, settings_options
from fedkseed.cli.verbosity import Quiet, Verbose
from fedkseed.errors import ConfigError
from fedkseed.runs.settings import (
    AUTO,
    SimulationConfig,
    build,
    flag,
    flags,
    missing,
    read_settings_file,
    started,
)
from fedkseed.runs.trackers import check_trackers

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
    if given.get("lr") == AUTO:
        raise ConfigError("--lr auto can't be given with --resume, which goes on at the run's own rate; leave --lr out")
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


LOUDNESS: Options = {"quiet": (Quiet, False), "verbose": (Verbose, False)}
give_signature(simulate, {**RUN_OPTION, **RESUME_OPTIONS, **CONFIG_OPTION, **settings_options(), **LOUDNESS})
give_signature(tune, {**CONFIG_OPTION, **settings_options(leave_out=("lr", "eps")), **LOUDNESS})
