"""`fedkseed`: the commands. Heavy imports wait until a command runs, so that help is quick."""

from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from click import Context
from click import Path as PathType
from typer.core import TyperCommand, TyperGroup

from fedkseed import __version__
from fedkseed.cli.console import complain, log_to_standard_error
from fedkseed.cli.failures import one_line_each
from fedkseed.cli.interrupts import INTERRUPTED, Interrupted, interruptible
from fedkseed.cli.simulate import simulate, tune
from fedkseed.cli.verbosity import Quiet, Verbose
from fedkseed.data import LongPrompts
from fedkseed.errors import ConfigError
from fedkseed.models.dtypes import Dtype

TRAIN, USE, ARITHMETIC, MACHINE = "Train", "Look at a run, use its model", "Several tuned models", "This machine"
"""Groups of commands in the help."""


class Commands(TyperGroup):
    """The commands; what Ctrl-C has to say comes last, and is one word where no command says what is safe."""

    def invoke(self, ctx: Context) -> Any:
        """See click."""
        try:
            return super().invoke(ctx)
        except Interrupted as end:
            end.tell()
            raise
        except KeyboardInterrupt:
            complain("interrupted")
            raise typer.Exit(INTERRUPTED) from None


class Command(TyperCommand):
    """A command that takes no empty path, such as of a variable that is not set: for Python it would be this folder."""

    def invoke(self, ctx: Context) -> Any:
        """See click."""
        for param in self.params:
            given = ctx.params.get(param.name or "")
            if isinstance(param.type, PathType) and "" in (given if isinstance(given, (list, tuple)) else (given,)):
                what = param.get_error_hint(ctx).strip("'")
                raise ConfigError(f"{what} is '': the name is empty; give one, or . for this folder")
        return super().invoke(ctx)


app = typer.Typer(
    name="fedkseed",
    cls=Commands,
    help="Federated fine-tuning of all parameters of a language model, for a few kilobytes a round.",
    no_args_is_help=True,
    suggest_commands=False,  # click does, and twice is once too often
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command(rich_help_panel=TRAIN)(simulate)
app.command(rich_help_panel=TRAIN)(tune)

Round = Annotated[
    str | None,
    typer.Option("--round", metavar="N|best", help="Take the ledger that the run kept after this round, or after its best."),
]
RunOrLedger = Annotated[Path, typer.Argument(help="A run's folder or a ledger file.", metavar="RUN|LEDGER", show_default=False)]
NOTHING_LOST = "nothing was written, and the run is as it was"


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Federated fine-tuning of all parameters of a language model, for a few kilobytes a round."""
    if show:
        print(f"fedkseed {__version__}")
        raise typer.Exit


@app.command(rich_help_panel=TRAIN)
def compare(
    file: Annotated[Path, typer.Argument(help="TOML file of a comparison.", metavar="FILE", show_default=False)],
    output: Annotated[Path | None, typer.Option(help="Folder of its runs (default: comparisons/ and the file's name).")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time; give each its cores, as with OMP_NUM_THREADS=1.")] = 1,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compare methods over seeds: learning rates from equal grids, controls, one table and curves.

    Started again, it goes on with what is not done; finished runs are not repeated.
    """
    with interruptible("finished runs are kept, and those that had begun go on from their last round"):
        from fedkseed.cli.display import LOADING, Lines, waiting

        with waiting(Lines().note, LOADING):
            from fedkseed.cli.compare import compare as carry_out

        carry_out(file, output, jobs, app)


@app.command(rich_help_panel=TRAIN)
def demo(
    run: Annotated[Path | None, typer.Option(help="Folder of the run (default: runs/, named by the time).")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the tasks and of the run.")] = 42,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Tune a tiny built-in model over 20 simulated clients, in half a minute and without a network."""
    with interruptible("no run was begun yet"):
        from fedkseed.cli.demo import demo as show

        show(run, seed)


@app.command(rich_help_panel=TRAIN)
def lora(
    model: Annotated[str, typer.Argument(help="The base model: a folder or hub id.", metavar="MODEL", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Folder to make.", metavar="OUTPUT", show_default=False)],
    rank: Annotated[int, typer.Option(min=1, help="Rank of its matrices; alpha is twice that.")] = 8,
    key: Annotated[int, typer.Option(min=0, help="What its random factors are drawn from, the same bits everywhere.")] = 0,
) -> None:
    """Write a LoRA adapter to start from: as --model of a run, its matrices are what K numbers move."""
    with interruptible(f"{output} is whole or not there"):
        from fedkseed.cli.display import LOADING, Lines, waiting

        with waiting(Lines().note, LOADING):
            from fedkseed.cli.lora import lora as write

        write(model, output, rank, key)


@app.command(rich_help_panel=USE)
def evaluate(
    run: Annotated[Path | None, typer.Argument(help="A run's folder or a ledger file.", metavar="RUN|LEDGER")] = None,
    which: Round = None,
    ledger: Annotated[Path | None, typer.Option(help="Another ledger than the run's, such as a published one.")] = None,
    model: Annotated[str | None, typer.Option(help="The base model (default: the run's own).")] = None,
    data: Annotated[
        str | None, typer.Option(help="Records to evaluate on, as of simulate (default: the run's held-out records).")
    ] = None,
    columns: Annotated[str | None, typer.Option(help="What the fields of --data are called, as of simulate.")] = None,
    template: Annotated[str | None, typer.Option(help="Prompt template (default: the run's own, else plain).")] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="Longest record in tokens (default: the run's own, else what the model takes, at most 1024)."),
    ] = None,
    long_prompts: Annotated[
        LongPrompts | None,
        typer.Option(help="A record whose prompt alone fills that: cut or drop (default: the run's own, else cut)."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Evaluate on a seeded draw of so many records.")] = None,
    answers: Annotated[int, typer.Option(min=0, help="Answer so many of them: exact match and Rouge-L.")] = 0,
    by_category: Annotated[bool, typer.Option("--by-category", help="Show each category or task too.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the scores to this JSON file too.")] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show the held-out loss of the base model and of the tuned one, and on request how good their answers are."""
    with interruptible(NOTHING_LOST):
        from fedkseed.cli.display import LOADING, Lines, waiting

        with waiting(Lines().note, LOADING):
            from fedkseed.cli.evaluate import evaluate as show
            from fedkseed.runs.scoring import Choices

        choices = Choices(model, data, columns, template, max_length, limit, answers, which, long_prompts)
        show(run, ledger, choices, by_category, output)


@app.command(rich_help_panel=USE)
def report(
    runs: Annotated[list[Path], typer.Argument(help="A run's folder, or several.", metavar="RUN...", show_default=False)],
    which: Round = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write into (default: RUN/report, of the first run).")] = None,
) -> None:
    """Write a run's report: one page and its charts. Of several runs it is one page with their curves over one another."""
    with interruptible("the run is as it was"):
        from fedkseed.cli.display import Lines, waiting

        with waiting(Lines().note, "drawing the page"):
            from fedkseed.cli.report import report_command

            report_command(runs, which, output)


@app.command(rich_help_panel=USE)
def status(
    run: Annotated[Path, typer.Argument(help="A run's folder.", metavar="RUN", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
    as_prometheus: Annotated[bool, typer.Option("--prometheus", help="As text for Prometheus' textfile collector.")] = False,
) -> None:
    """Show where a run is: its rounds, whether a process is at it, its losses, who did not answer."""
    from fedkseed.cli.status import status_command

    if as_json and as_prometheus:
        raise ConfigError("--json and --prometheus are two forms of one answer; give one of them")
    status_command(run, as_json, as_prometheus)


@app.command(rich_help_panel=USE)
def watch(
    run: Annotated[Path, typer.Argument(help="A run's folder.", metavar="RUN", show_default=False)],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where to listen on 127.0.0.1; 0 takes any that is free.")] = 8765,
) -> None:
    """Show a run's report in a browser while the run goes on: only to this machine, only to read."""
    with interruptible("the run is as it was"):
        from fedkseed.cli.display import Lines, waiting

        with waiting(Lines().note, "loading what draws the page"):
            from fedkseed.cli.watch import watch_command

        watch_command(run, port)


@app.command(rich_help_panel=USE)
def inspect(ledger: RunOrLedger, which: Round = None) -> None:
    """Show what a ledger holds: base, pool, rounds, coefficients."""
    from fedkseed.cli.display import Lines, waiting

    with waiting(Lines().note, f"reading {ledger}"):
        from fedkseed.cli.inspect import inspect as show

        show(ledger, which)


@app.command(rich_help_panel=USE)
def audit(
    run: Annotated[Path, typer.Argument(help="A run's folder.", metavar="RUN", show_default=False)],
    without: Annotated[
        str | None, typer.Option(metavar="CLIENT", help="Reckon what the same replies give without this client's.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option(help="With --without: write that ledger, in its published form, to this file.")
    ] = None,
) -> None:
    """Replay the log of a run (--audit-log on): whether its replies lead to its ledger, or which entry is wrong."""
    from fedkseed.cli.display import Lines, waiting

    with waiting(Lines().note, "replaying the log"):
        from fedkseed.cli.audit import audit as replay

        replay(run, without, to)


@app.command(rich_help_panel=USE)
def export(
    ledger: RunOrLedger,
    output: Annotated[
        Path,
        typer.Argument(help="Folder to make; a file with --ledger-only, if its name has a suffix.", metavar="OUTPUT"),
    ],
    which: Round = None,
    model: Annotated[str | None, typer.Option(help="The base model (default: the run's own).")] = None,
    dtype: Annotated[str, typer.Option(help="Precision of the exported weights: auto, float32, float16 or bfloat16.")] = "auto",
    ledger_only: Annotated[
        bool, typer.Option("--ledger-only", help="Write the published ledger, kilobytes; as a folder with its card.")
    ] = False,
    bits: Annotated[
        int | None, typer.Option(help="With --ledger-only: bits of each number, 8, 4, 2 or 1; what that costs is measured.")
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write the tuned model as a Hugging Face folder (a baseline's adapter as PEFT's), or the ledger in its published form."""
    with interruptible(f"{output} is whole or not there, and the run is as it was"):
        from fedkseed.cli.display import LOADING, Lines, waiting

        with waiting(Lines().note, LOADING):
            from fedkseed.cli.export import export as write

        if dtype not in get_args(Dtype):
            raise ConfigError(f"--dtype is {dtype!r}; expected one of {', '.join(get_args(Dtype))}")
        write(ledger, output, model, dtype, ledger_only, which, bits)  # type: ignore[arg-type]


@app.command(rich_help_panel=ARITHMETIC)
def merge(
    ledgers: Annotated[
        list[Path], typer.Argument(help="Runs' folders or ledger files.", metavar="RUN|LEDGER...", show_default=False)
    ],
    to: Annotated[Path, typer.Option(help="Ledger file to write.", metavar="FILE", show_default=False)],
    weights: Annotated[
        str | None, typer.Option(help="A number for each, with commas between; 1,-1 subtracts (default: their mean).")
    ] = None,
) -> None:
    """Write the weighted sum of tuned models over one base as a ledger."""
    with interruptible(f"{to} is whole or not there"):
        from fedkseed.cli.arithmetic import merge as write

        write(ledgers, weights, to)


@app.command(rich_help_panel=ARITHMETIC)
def diff(
    one: Annotated[Path, typer.Argument(help="A run's folder or a ledger file.", metavar="RUN|LEDGER", show_default=False)],
    other: Annotated[Path, typer.Argument(help="Another over the same base.", metavar="RUN|LEDGER", show_default=False)],
) -> None:
    """Show how far two tuned models lie from their base and from each other, from their numbers alone."""
    from fedkseed.cli.arithmetic import diff as show

    show(one, other)


@app.command(rich_help_panel=MACHINE)
def doctor() -> None:
    """Check this machine: versions, memory, noise backends and whether their bits are right."""
    from fedkseed.cli.doctor import doctor as check

    check()


for registered in app.registered_commands:
    registered.cls = Command


def main() -> None:
    """Run the command line; errors of a user's making are one line on stderr and exit code 2 (usage) or 1 (failure)."""
    log_to_standard_error()
    with one_line_each(complain):
        app()
