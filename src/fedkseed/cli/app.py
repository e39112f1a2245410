"""`fedkseed`: the commands. Heavy imports wait until a command runs, so that help is quick."""

import sys
from pathlib import Path
from typing import Annotated, get_args

import typer

from fedkseed import __version__
from fedkseed.cli.simulate import simulate, tune
from fedkseed.errors import ConfigError, FedKSeedError

app = typer.Typer(
    name="fedkseed",
    help="Federated fine-tuning of all parameters of a language model, for a few kilobytes a round.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(simulate)
app.command()(tune)

RunOrLedger = Annotated[Path, typer.Argument(help="a run folder or a ledger file", metavar="RUN|LEDGER", show_default=False)]


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    """Federated fine-tuning of all parameters of a language model, for a few kilobytes a round."""
    if show:
        print(f"fedkseed {__version__}")
        raise typer.Exit


@app.command()
def inspect(ledger: RunOrLedger) -> None:
    """Show what a ledger holds: base, pool, rounds, coefficients."""
    from fedkseed.cli.inspect import inspect as show

    show(ledger)


@app.command()
def evaluate(
    run: Annotated[Path | None, typer.Argument(help="a run folder or a ledger file", metavar="RUN|LEDGER")] = None,
    ledger: Annotated[Path | None, typer.Option(help="another ledger than the run's, such as a published one")] = None,
    model: Annotated[str | None, typer.Option(help="the base model (default: the run's own)")] = None,
    data: Annotated[str | None, typer.Option(help="as of simulate (default: the run's held-out records)")] = None,
    columns: Annotated[str | None, typer.Option(help="what the fields of --data are called, as of simulate")] = None,
    template: Annotated[str | None, typer.Option(help="prompt template (default: the run's own, else plain)")] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="in tokens (default: the run's own, else 1024)")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="evaluate on a seeded draw of so many records")] = None,
    answers: Annotated[int, typer.Option(min=0, help="answer so many of them: exact match and Rouge-L")] = 0,
    by_category: Annotated[bool, typer.Option("--by-category", help="show each category or task too")] = False,
    output: Annotated[Path | None, typer.Option(help="write the scores to this JSON file too")] = None,
) -> None:
    """Show the held-out loss of the base model and of the tuned one, and on request how good their answers are."""
    from fedkseed.cli.evaluate import evaluate as show
    from fedkseed.runs.scoring import Choices

    show(run, ledger, Choices(model, data, columns, template, max_length, limit, answers), by_category, output)


@app.command()
def export(
    ledger: RunOrLedger,
    output: Annotated[Path, typer.Argument(help="folder to make; with --ledger-only, file to write", metavar="OUTPUT")],
    model: Annotated[str | None, typer.Option(help="the base model (default: the run's own)")] = None,
    dtype: Annotated[str, typer.Option(help="precision of the exported weights: auto, float32, float16, bfloat16")] = "auto",
    ledger_only: Annotated[bool, typer.Option("--ledger-only", help="write the published ledger, 8 to 16 KB")] = False,
) -> None:
    """Write the tuned model as a Hugging Face folder, or the ledger in its published form."""
    from fedkseed.cli.export import Dtype
    from fedkseed.cli.export import export as write

    if dtype not in get_args(Dtype):
        raise ConfigError(f"--dtype is {dtype!r}; expected one of {', '.join(get_args(Dtype))}")
    write(ledger, output, model, dtype, ledger_only)  # type: ignore[arg-type]


@app.command()
def report(run: Annotated[Path, typer.Argument(help="a run folder", metavar="RUN", show_default=False)]) -> None:
    """Write a run's report: one page and its charts."""
    from fedkseed.cli.report import report_command

    report_command(run)


@app.command()
def compare(
    file: Annotated[Path, typer.Argument(help="TOML file of a comparison", metavar="FILE", show_default=False)],
    output: Annotated[Path | None, typer.Option(help="folder of its runs [default: comparisons/ and the file's name]")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="runs at a time; give each its cores, as with OMP_NUM_THREADS=1")] = 1,
) -> None:
    """Compare methods over seeds: learning rates from equal grids, controls, one table and curves.

    Started again, it goes on with what is not done; finished runs are not repeated.
    """
    from fedkseed.cli.compare import compare as carry_out

    carry_out(file, output, jobs, app)


@app.command()
def demo(
    run: Annotated[Path | None, typer.Option(help="folder of the run (default: runs/, named by the time)")] = None,
    seed: Annotated[int, typer.Option(min=0, help="seed of the tasks and of the run")] = 42,
) -> None:
    """Tune a tiny built-in model over 20 simulated clients, in a few minutes and without a network."""
    from fedkseed.cli.demo import demo as show

    show(run, seed)


@app.command()
def doctor() -> None:
    """Check this machine: versions, memory, noise backends and whether their bits are right."""
    from fedkseed.cli.doctor import doctor as check

    check()


def main() -> None:
    """Run the command line; errors of a user's making are one line on stderr and exit code 2 (usage) or 1 (failure)."""
    try:
        app()
    except FedKSeedError as error:
        print(f"fedkseed: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("fedkseed: interrupted", file=sys.stderr)
        sys.exit(130)
