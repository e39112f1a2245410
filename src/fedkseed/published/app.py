"""`python main.py`: the published command line over the same functions as `fedkseed simulate`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from fedkseed.cli.failures import one_line_each
from fedkseed.cli.interrupts import Interrupted
from fedkseed.errors import ConfigError
from fedkseed.published.flags import PUBLISHED, given, parser
from fedkseed.runs.settings import SimulationConfig
from fedkseed.text import visible

if TYPE_CHECKING:
    from fedkseed.evaluation import Scores
    from fedkseed.runs.folder import RunFolder
    from fedkseed.runs.learner import Learner
    from fedkseed.runs.observer import Observer
    from fedkseed.runs.records import Records
    from fedkseed.runs.simulation import Simulation


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the published command line; a user's errors are one line on stderr and exit code 2 (usage) or 1 (failure)."""
    try:
        with one_line_each(_tell):
            run(parser().parse_args(arguments), given(arguments))
    except typer.Exit as done:
        if isinstance(done, Interrupted):
            done.tell()
        sys.exit(done.exit_code)
    except KeyboardInterrupt:
        print("main.py: interrupted", file=sys.stderr)
        sys.exit(130)


def _tell(error: object) -> None:
    """An error's line, with the published flags for ours."""
    text = re.sub(r"--[a-z][a-z-]*", lambda match: PUBLISHED.get(match[0], match[0]), str(error))
    print(f"main.py: {visible(text)}", file=sys.stderr)


def run(args: argparse.Namespace, named: Collection[str]) -> None:
    """Translate, say what it costs, train, and evaluate the tuned model.

    Args:
        args: all flags.
        named: those that the command line names.

    Raises:
        FedKSeedError: see `translate` and `fedkseed.runs.simulation`.
    """
    from fedkseed.cli.display import watching
    from fedkseed.cli.simulate import command_line
    from fedkseed.published.outputs import ResultsWriter, write_flags
    from fedkseed.runs.folder import RunFolder
    from fedkseed.runs.learner import load_learner
    from fedkseed.runs.records import prepare

    config, args, folder = _settings(args, named)
    with watching(config) as display:
        display.note(f"the same with fedkseed: {command_line(config)}")
        if args.resume is None:
            RunFolder.check_free(folder)
        learner = load_learner(config, display)
        records = prepare(config, display, learner=learner)
        run_folder = RunFolder.open(folder) if args.resume else RunFolder.create(folder, records.config)
        write_flags(folder, args)
        observer: Observer = ResultsWriter(display, run_folder) if args.log else display
        _train_and_evaluate(args, run_folder, records, learner, observer)


def _settings(args: argparse.Namespace, named: Collection[str]) -> tuple[SimulationConfig, argparse.Namespace, Path]:
    """What to run, with which flags, and where."""
    from fedkseed.published.outputs import read_flags
    from fedkseed.published.translation import translate
    from fedkseed.runs.folder import RunFolder, new_folder

    if args.resume is not None:
        defaults = vars(parser().parse_args([]))
        if others := sorted(set(named) - {"resume"}):
            flag = f"{'-' if len(others[0]) == 1 else '--'}{others[0]}"
            raise ConfigError(f"{flag} can't be given with --resume, which keeps the run's flags; leave it out")
        flags = argparse.Namespace(**{**defaults, **vars(read_flags(args.resume)), "resume": args.resume})
        return RunFolder.open(args.resume).simulation, flags, args.resume
    return translate(args), args, new_folder(args.log_root if args.log else Path("runs"))


def _train_and_evaluate(
    args: argparse.Namespace, folder: RunFolder, records: Records, learner: Learner, observer: Observer
) -> None:
    from fedkseed.cli.export import export
    from fedkseed.cli.simulate import train
    from fedkseed.published.costs import describe, estimate
    from fedkseed.published.outputs import write_final, write_results

    def say_costs(simulation: Simulation) -> None:
        for line in describe(estimate(simulation, len(records.held_out)), folder.config.noise, folder.config.num_rounds):
            observer.note(line)

    resume = ["python", "main.py", "--resume", str(folder.path)]
    simulation = train(folder, records, observer, resume, learner.model, say_costs)
    simulation.restore()
    scores = _final_scores(simulation, records, learner, answered=args.eval_metric == "rouge", observer=observer)
    if args.eval_metric == "rouge":
        value = scores.rouge_l_published
        observer.note(
            f"final rouge: {value:.4f} as published, {scores.rouge_l:.4f} as rouge-score has it; loss {scores.loss:.4f}"
        )
    else:
        value = scores.loss
        observer.note(f"final loss: {value:.4f}")
    if args.log:
        write_results(folder)  # a kill may have come between the last evaluation and its results
        write_final(folder.path, args.eval_metric, value)
    if args.save and not (folder.path / "model").exists():
        export(folder.path, folder.path / "model", None, folder.config.dtype, ledger_only=False)


def _final_scores(simulation: Simulation, records: Records, learner: Learner, answered: bool, observer: Observer) -> Scores:
    from fedkseed.evaluation import score

    return score(
        simulation.model,
        learner.tokenizer,
        records.held_out,
        records.references,
        records.pad_id,
        range(len(records.held_out)) if answered else (),
        observer.progress,
        records.stop_ids,
        learner.traits.context,
    ).overall
