"""The runs of a comparison, each a process of its own: started, gone on with, or left alone because it is finished."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from fedkseed.comparison.plan import Comparison, Entry
from fedkseed.data.source import source_digest
from fedkseed.errors import ConfigError, FedKSeedError, RunError, TooFewRepliesError
from fedkseed.files import write_atomically
from fedkseed.runs.folder import RunFolder
from fedkseed.runs.held_out import affordable
from fedkseed.runs.layout import CONFIG
from fedkseed.runs.metrics import Metrics
from fedkseed.runs.observer import Nobody
from fedkseed.runs.records import prepare
from fedkseed.runs.settings import SimulationConfig, flags, found_out, source_text
from fedkseed.text import visible

NO_REPLIES = 75
"""The exit code by which a process of ours says that no reply could be used any more."""
FIRST_SECONDS, QUIET_SECONDS = 3, 10
"""After so long a run that is going on says how far it is: for the first time, and after that."""
DATA = "data.json"
"""Digests of the records, in a comparison's folder."""
FAILED, SCORES = "failed.txt", "scores.json"
"""What a run's folder holds if the run ended without an end, and what `fedkseed evaluate` made of it."""
PRELOADED = [
    "fedkseed.runs.simulation",
    "fedkseed.cli.evaluate",
    "fedkseed.comparison",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
]


@dataclass(frozen=True)
class Trial:
    """One run of a comparison."""

    name: str
    folder: Path
    config: SimulationConfig

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def failed(self) -> bool:
        """Whether it ended because no reply was usable any more."""
        return (self.folder / FAILED).exists()

    def recorded(self) -> Metrics:
        """Its events."""
        return RunFolder(self.folder, self.config).recorded()

    def final_loss(self) -> float:
        """The last held-out loss; infinite for a run that failed or whose loss is not a number."""
        if self.failed:
            return math.inf
        losses = list(self.recorded().losses.values())
        return losses[-1] if losses and math.isfinite(losses[-1]) else math.inf


@dataclass(frozen=True)
class Row:
    """What was run of one method: the learning rate that its grid led to, its runs and their controls."""

    entry: Entry
    lr: float
    grid: tuple[Trial, ...]
    runs: tuple[Trial, ...]
    controls: tuple[Trial, ...]


def carry_out(
    comparison: Comparison, output: Path, jobs: int, command: Callable[[], None], note: Callable[[str], None]
) -> list[Row]:
    """Do what is not done yet: the grids, the runs, their controls, their scores.

    Args:
        comparison: what to do.
        output: the folder of all runs.
        jobs: how many processes at a time.
        command: fedkseed's command line, called in these processes; raises fedkseed's errors.
        note: hears of each run that begins or ends.

    Raises:
        ConfigError: a run in the folder has other settings than the comparison, or the records have changed.
        DataError: there are no such records.
        RunError: a run cannot be started or gone on with; the message names its log.
    """
    _check_data(comparison, output)
    comparison = _evaluating_alike(comparison, output, note)
    grids = {entry.slug: _grid(comparison, entry, output) for entry in comparison.methods}
    runner = _Runner(jobs, command, note)
    runner.run([trial for trials in grids.values() for trial in trials])
    rows = []
    for entry in comparison.methods:
        trials = grids[entry.slug]
        best = min(range(len(trials)), key=lambda i: trials[i].final_loss()) if trials else 0
        lr = entry.lr[best]
        if trials:
            note(f"{entry.name}: learning rate {lr:g} of {', '.join(f'{x:g}' for x in entry.lr)}")
        runs = tuple(_trial(comparison, entry, output, seed, lr, "own") for seed in comparison.seeds)
        controls = tuple(_trial(comparison, entry, output, seed, lr, "shuffled") for seed in comparison.seeds)
        rows.append(Row(entry, lr, trials, runs, controls if comparison.control else ()))
    # seed by seed, so that a comparison that is cut short has whole columns
    runner.run([row.runs[i] for i in range(len(comparison.seeds)) for row in rows])
    runner.run([row.controls[i] for i in range(len(comparison.seeds)) for row in rows if row.controls])
    if comparison.answers:
        runner.score([trial for row in rows for trial in row.runs], comparison.answers)
    for trial in [trial for row in rows for trial in (*row.grid, *row.runs, *row.controls)]:
        if damage := trial.recorded().damage:
            note(f"{trial.name}: {damage}; it is left out")
    return rows


def _check_data(comparison: Comparison, output: Path) -> None:
    """Refuse to go on over other records than those that the folder's runs were made with, which would share a row."""
    tables = [comparison.settings, *(entry.settings for entry in comparison.methods)]
    named = [table[name] for table in tables for name in ("data", "eval_data") if table.get(name)]
    sources = {source_text(source) for source in named}
    now = {source: source_digest(source) for source in sorted(sources)}
    try:
        before = dict(json.loads((output / DATA).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):  # a new folder, or one from before this was kept
        before = {}
    for source, digest in now.items():
        if before.get(source, digest) != digest:
            raise ConfigError(
                f"{source} holds other records than when {output} was begun; choose another --output, or put the records back"
            )
    if now.items() <= before.items():
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / DATA, (json.dumps({**before, **now}, indent=1) + "\n").encode())
    except OSError as error:
        raise RunError(f"{output}: cannot be written ({error.strerror}); choose another --output") from error


def _evaluating_alike(comparison: Comparison, output: Path, note: Callable[[str], None]) -> Comparison:
    """The comparison with a number of held-out records that all its runs evaluate on, where its file does not say."""
    entries = comparison.methods
    if any("eval_limit" in settings for settings in [comparison.settings, *(entry.settings for entry in entries)]):
        return comparison
    begun = sorted(output.glob(f"*/*/{CONFIG}"))
    if begun:
        limit = RunFolder.open(begun[0].parent).config.eval_limit
    else:
        configs = [comparison.config(entry, comparison.seeds[0], entry.lr[0]) for entry in entries]
        records = prepare(configs[0].model_copy(update={"eval_limit": "all"}), Nobody())
        limit = min(len(records.held_out), *(affordable(config, records.sizes) for config in configs))
        note(
            f"all runs evaluate on {limit:,} of {len(records.held_out):,} held-out records that fit; eval_limit says otherwise"
        )
    return comparison.model_copy(update={"settings": {**comparison.settings, "eval_limit": limit or "all"}})


def _grid(comparison: Comparison, entry: Entry, output: Path) -> tuple[Trial, ...]:
    if len(entry.lr) == 1:
        return ()
    trials = []
    for lr in entry.lr:
        config = comparison.config(entry, comparison.tuning_seed, lr)
        if comparison.tuning_rounds is not None:
            config = config.model_copy(update={"num_rounds": comparison.tuning_rounds})
        trials.append(Trial(f"{entry.name}, lr {lr:g}", output / "grid" / f"{entry.slug}-lr{lr:g}", config))
    return tuple(trials)


def _trial(comparison: Comparison, entry: Entry, output: Path, seed: int, lr: float, responses: str) -> Trial:
    control = responses == "shuffled"
    folder = output / ("controls" if control else "runs") / f"{entry.slug}-seed{seed}"
    name = f"{entry.name}{', control' if control else ''}, seed {seed}"
    return Trial(name, folder, comparison.config(entry, seed, lr, responses))


class _Runner:
    """Does trials in processes forked from one that has imported what takes long: a small run takes less than that."""

    def __init__(self, jobs: int, command: Callable[[], None], note: Callable[[str], None]) -> None:
        self._jobs, self._command, self._note = jobs, command, note
        self._running: list[BaseProcess] = []
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)

    def run(self, trials: Iterable[Trial]) -> None:
        """Bring those that are not over to their end."""
        waiting = []
        for trial in trials:
            _check_same(trial)
            if not _is_over(trial):
                waiting.append(trial)
        if waiting:
            self._note(f"{len(waiting)} runs to do, the first is {waiting[0].name}")
        self._each(self._run, waiting)

    def score(self, trials: Iterable[Trial], answers: int) -> None:
        """Evaluate those that have not been, by `fedkseed evaluate`."""

        def one(trial: Trial) -> None:
            (trial.folder / SCORES).unlink(missing_ok=True)  # of fewer answers, or damaged, which `evaluate` would not replace
            what = ["evaluate", str(trial.folder), "--answers", str(answers), "--output", str(trial.folder / SCORES)]
            code, last = self._process(trial, what)
            if code:
                raise RunError(f"{trial.name} could not be scored: {last}; see {trial.log}")
            self._note(f"{trial.name}: scored")

        self._each(one, [trial for trial in trials if not trial.failed and not _is_scored(trial, answers)])

    def _run(self, trial: Trial) -> None:
        begun = (trial.folder / CONFIG).exists()
        chosen = ["--resume", str(trial.folder)] if begun else [*flags(trial.config), "--run", str(trial.folder)]
        code, last = self._process(trial, ["simulate", *chosen])
        if code == NO_REPLIES:  # no reply was usable any more: a result, and a bad one
            write_atomically(trial.folder / FAILED, f"{last}\n".encode())
            self._note(f"{trial.name}: failed: {last}")
        elif code:
            raise RunError(f"{trial.name} ended with exit code {code}: {last}; see {trial.log}")
        else:
            self._note(f"{trial.name}: held-out loss {trial.final_loss():.4f}")

    def _each(self, work: Callable[[Trial], None], trials: Iterable[Trial]) -> None:
        pool = ThreadPoolExecutor(self._jobs)
        try:
            for _ in pool.map(work, trials):
                pass
        except KeyboardInterrupt:
            for process in self._running:  # their last checkpoints are whole, whenever they end
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _process(self, trial: Trial, arguments: list[str]) -> tuple[int, str]:
        """Run a command of ours; its exit code and the last line that it wrote to its log."""
        trial.log.parent.mkdir(parents=True, exist_ok=True)
        process = self._context.Process(target=_call, args=(self._command, arguments, trial.log))
        process.start()
        self._running.append(process)
        process.join(FIRST_SECONDS)
        while process.is_alive():
            self._note(f"{trial.name}: {_last_line(trial.log)}")
            process.join(QUIET_SECONDS)
        self._running.remove(process)
        return process.exitcode or 0, _last_line(trial.log)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return lines[-1] if lines else "begins"


def _call(command: Callable[[], None], arguments: list[str], log: Path) -> None:
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["fedkseed", *arguments]
    try:
        command()
    except FedKSeedError as error:
        print(f"fedkseed: {visible(error)}", file=sys.stderr, flush=True)
        sys.exit(NO_REPLIES if isinstance(error, TooFewRepliesError) else error.exit_code)


def _is_over(trial: Trial) -> bool:
    if trial.failed:
        return True
    if not (trial.folder / CONFIG).exists():
        return False
    return max(trial.recorded().losses, default=0) >= trial.config.num_rounds


def _is_scored(trial: Trial, answers: int) -> bool:
    """Whether it was scored by so many answers, or by all the records that there are."""
    scores = trial.folder / SCORES
    if not scores.exists():
        return False
    try:
        overall = json.loads(scores.read_text(encoding="utf-8"))["tuned"]["overall"]
        return bool(overall["num_answers"] >= min(answers, overall["num_examples"]))
    except (ValueError, KeyError, TypeError, RecursionError):  # damaged: it is written anew
        return False


def _check_same(trial: Trial) -> None:
    """Refuse to go on with a run that was begun with other settings."""
    if not (trial.folder / CONFIG).exists():
        return
    begun = RunFolder.open(trial.folder).config
    before, now = begun.model_dump(), found_out(trial.config, begun).model_dump()
    for name in now:
        if before[name] != now[name] and trial.config.facts.takes(name):
            raise ConfigError(
                f"{trial.folder} was begun with {name} = {before[name]!r}, the comparison says {now[name]!r}; "
                "choose another --output, or move that folder away"
            )
