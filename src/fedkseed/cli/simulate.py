"""`fedkseed simulate`: its flags are the fields of `SimulationConfig`, so that there is one list of settings."""

import inspect
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from fedkseed.errors import ConfigError
from fedkseed.simulation_config import SimulationConfig, build, flag


def simulate(run: Path | None, resume: Path | None, config: Path | None, tensorboard: bool, **flags: str | None) -> None:
    """Federated tuning on this machine: every client simulated in turn, with real messages.

    Settings come from flags, else from the --config file (TOML; the same words with underscores), else from defaults.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    if resume is not None:
        _resume(resume, run, config, given, tensorboard)
        return
    settings = build({**(_read(config) if config else {}), **given})
    folder = run or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    from fedkseed.cli.display import watching
    from fedkseed.run_folder import RunFolder
    from fedkseed.simulation import prepare

    RunFolder.check_free(folder)
    with watching(settings, folder, tensorboard) as observer:
        with _interruptible():
            records = prepare(settings, observer)
        _train(RunFolder.create(folder, settings), records, observer)


def _resume(resume: Path, run: Path | None, config: Path | None, given: dict[str, str], tensorboard: bool) -> None:
    from fedkseed.cli.display import watching
    from fedkseed.run_folder import RunFolder
    from fedkseed.simulation import prepare

    others = [flag(name) for name in given if name != "num_rounds"]
    others += [name for name, value in (("--run", run), ("--config", config)) if value is not None]
    if others:
        raise ConfigError(f"{others[0]} can't be given with --resume, which keeps the run's settings; only --num-rounds can")
    folder = RunFolder.open(resume)
    settings = build({**folder.config.model_dump(), **given})
    with watching(settings, resume, tensorboard) as observer:
        with _interruptible():
            records = prepare(settings, observer)
        if given:
            folder.write_config(settings)
        _train(folder, records, observer)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Before there is a run to go on with, Ctrl-C needs but one word."""
    try:
        yield
    except KeyboardInterrupt:
        print("fedkseed: interrupted", file=sys.stderr)
        raise typer.Exit(130) from None


def _train(folder: Any, records: Any, observer: Any) -> None:
    from fedkseed.simulation import Simulation

    try:
        ledger = Simulation(folder, records, observer).train()
    except KeyboardInterrupt:
        saved = folder.load_ledger()
        where = f"the ledger of round {saved.round} is safe" if saved else "no round was done yet"
        observer.note(f"interrupted; {where}. Go on with: fedkseed simulate --resume {folder.path}")
        raise typer.Exit(130) from None
    observer.note(f"done: {folder.ledger_path}, {folder.ledger_path.stat().st_size:,} bytes, digest {ledger.digest()}")


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot read ({error.strerror}); give the path of a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not TOML ({error}); expected lines such as num_rounds = 40") from error


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


def _signature() -> inspect.Signature:
    """One optional text parameter for every setting (pydantic reads and checks the text), then the run's own options."""
    options: dict[str, tuple[Any, Any]] = {}
    for name, field in SimulationConfig.model_fields.items():
        default = "" if field.is_required() or field.default is None else f" [default: {field.default}]"
        note = f"{field.description}{default}"
        options[name] = (Annotated[str | None, typer.Option(flag(name), help=note, metavar=_metavar(field))], None)
    options["run"] = (Annotated[Path | None, typer.Option(help="folder of the run [default: runs/ and the time]")], None)
    options["resume"] = (Annotated[Path | None, typer.Option(help="go on with the run in this folder")], None)
    options["config"] = (Annotated[Path | None, typer.Option(help="TOML file with settings")], None)
    options["tensorboard"] = (Annotated[bool, typer.Option("--tensorboard", help="write RUN/tensorboard too (extra)")], False)
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Signature([inspect.Parameter(n, kind, default=d, annotation=a) for n, (a, d) in options.items()])


simulate.__signature__ = _signature()  # type: ignore[attr-defined]
simulate.__annotations__ = {name: p.annotation for name, p in simulate.__signature__.parameters.items()}  # type: ignore[attr-defined]
