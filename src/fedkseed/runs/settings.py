"""The settings of a run: what the server decides, which model it is of, and, where clients are simulated, their data."""

import datetime
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, ValidationInfo, field_validator, model_validator

from fedkseed.data import (
    TEMPLATES,
    Known,
    LongPrompts,
    arguments_text,
    columns_text,
    get_template,
    parse_arguments,
    parse_columns,
    resolve_source,
)
from fedkseed.errors import ConfigError, DataError, InvalidValueError
from fedkseed.federation.algorithms import ALGORITHMS
from fedkseed.federation.config import Count, FederationConfig, Positive
from fedkseed.federation.objectives import OWN
from fedkseed.files import read_toml
from fedkseed.models.dtypes import Dtype
from fedkseed.runs.validation import Words, validated
from fedkseed.text import joined, visible


class RunConfig(FederationConfig):
    """What every run is told, wherever its clients are."""

    model: str = Field(description="Base model: a Hugging Face model folder or hub id.")
    columns: str | None = Field(
        None,
        description="What the fields are called in the data, such as instruction=question,output=answer,client=site; "
        "output=text alone learns texts as a whole.",
    )
    eval_data: str | None = Field(
        None, description="Held-out records (default: test tasks of Natural Instructions, else a seeded 5 % of --data)."
    )
    max_length: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description="Longest record in tokens; longer ones are cut (default: 1024, or what the model takes if that is less).",
    )
    long_prompts: LongPrompts = Field(
        "cut",
        description="A record whose prompt alone fills --max-length: cut the prompt's middle, to fit a response, or drop.",
    )
    template: str = Field("plain", description=f"Prompt template: {', '.join(TEMPLATES)} (the tokenizer's), or a TOML file.")
    template_arguments: str | None = Field(
        None, description="What the tokenizer's chat template takes beside the messages, such as enable_thinking=false."
    )
    refused_turns: Literal["stop", "fold", "drop"] = Field(
        "stop",
        description="Of conversations that the chat template refuses: stop; fold its system turns into the user's; or drop it.",
    )
    date: datetime.date | None = Field(
        None, description="The day that the chat template sees, such as 2026-11-27 (default: the day on which the run starts)."
    )
    train: str | None = Field(
        None, description="Tune only the tensors whose names match, such as '*.mlp.*'; may be given several times."
    )
    freeze: str | None = Field(
        None, description="Leave the tensors alone whose names match, such as '*embed*'; may be given several times."
    )
    eval_every: Count = Field(1, description="Evaluate every so many rounds, and after the last.")
    eval_limit: Count | Literal["all"] | None = Field(
        None,
        description="Evaluate on a seeded draw of so many held-out records, or on all (default: so many that it costs at most "
        "a tenth of the training).",
    )
    dtype: Dtype = Field(
        "float32", description="Precision of the weights: float32, float16, bfloat16, or auto, the checkpoint's own."
    )
    audit_log: Literal["off", "on"] = Field(
        "off",
        description="Keep what was asked and answered in RUN/audit.jsonl, which fedkseed audit replays: each client's numbers.",
    )
    device: str = Field("cpu", description="Where the model runs: cpu, cuda, or one GPU of several, such as cuda:1.")

    @field_validator("model", "template", mode="before")
    @classmethod
    def _path_as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @field_validator("eval_data", mode="before")
    @classmethod
    def _eval_data_as_text(cls, value: Any) -> Any:
        return source_text(value)

    @field_validator("eval_data")
    @classmethod
    def _eval_data_is_source(cls, value: str | None, info: ValidationInfo) -> str | None:
        return _checked_source(value, info)

    @field_validator("columns", mode="before")
    @classmethod
    def _columns_as_text(cls, value: Any) -> Any:
        return columns_text(value) if isinstance(value, dict) else value

    @field_validator("template_arguments", mode="before")
    @classmethod
    def _arguments_as_text(cls, value: Any) -> Any:
        return arguments_text(value) if isinstance(value, dict) else value

    @field_validator("template_arguments")
    @classmethod
    def _are_arguments(cls, value: str | None) -> str | None:
        if value is not None:
            parse_arguments(value)
        return value

    @field_validator("train", "freeze", mode="before")
    @classmethod
    def _patterns_as_text(cls, value: Any) -> Any:
        return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value

    @field_validator("train", "freeze")
    @classmethod
    def _are_patterns(cls, value: str | None) -> str | None:
        if value is not None and not all(patterns(value)):
            raise ValueError("expected patterns of tensors' names, with commas between, such as '*.mlp.*,*norm*'")
        return value

    @model_validator(mode="after")
    def _can_be_written(self) -> Self:
        """`config.toml` is UTF-8, which names of files need not be."""
        for name, value in self:
            if isinstance(value, str) and value.encode(errors="replace").decode() != value:
                raise ValueError(f"{flag(name)} is {value!r}, which is not UTF-8, as config.toml is; give it another name")
        return self

    @model_validator(mode="after")
    def _logs_no_sums(self) -> Self:
        if self.secure_sums == "on" and self.audit_log == "on":
            raise ValueError(
                "--secure-sums and --audit-log are on; the log keeps each client's numbers, which nobody sees in a sum, so "
                "leave out one of the two"
            )
        return self

    @model_validator(mode="after")
    def _replayable(self) -> Self:
        if self.dp == "client" and self.audit_log == "on":
            raise ValueError(
                "--dp is client and --audit-log on, which keeps every reply as it came and replays rounds whose noise nobody "
                "knows; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _chat_takes_them(self) -> Self:
        if self.template_arguments is not None or self.refused_turns != "stop" or self.date is not None:
            self.prompts()
        return self

    def prompts(self, template: str | None = None) -> Known:
        """The prompt template of these settings, or another one in its place.

        Raises:
            InvalidValueError: see `get_template`.
        """
        chosen = template or self.template
        if template is not None and chosen != "chat":
            return get_template(chosen)
        return get_template(chosen, arguments=self.template_arguments, refused=self.refused_turns, today=self.date)

    @field_validator("columns")
    @classmethod
    def _are_columns(cls, value: str | None) -> str | None:
        if value is not None:
            parse_columns(value)
        return value

    @field_validator("template")
    @classmethod
    def _is_template(cls, value: str, info: ValidationInfo) -> str:
        if value in TEMPLATES or _is_stored(info):
            return value
        try:
            get_template(value)
        except InvalidValueError as error:  # which names it, as the caller will
            raise ValueError(str(error).removeprefix(f"template {value!r} is ")) from None
        return str(Path(value).resolve())

    @field_validator("device")
    @classmethod
    def _is_device(cls, value: str) -> str:
        if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", value):
            raise ValueError("expected cpu, cuda or cuda:N with the number of a GPU")
        return value

    @field_validator("model")
    @classmethod
    def _is_absolute(cls, value: str) -> str:
        if not value:  # as of a variable that is not set: for Python it would be this folder
            raise ValueError("the name is empty; give a model's folder or hub id")
        return str(Path(value).resolve()) if Path(value).is_dir() else value


class SimulationConfig(RunConfig):
    """Everything that the outcome of a run with simulated clients depends on, beside the files that it names."""

    data: str | None = Field(
        None,
        description="Training records: jsonl, JSON, CSV, parquet or Arrow files (several with commas between, a glob, a "
        "folder) with instruction, input/context, output/response, category (or chat messages); a Natural Instructions "
        "folder; a dataset's hub id.",
    )
    subsample: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="Use a seeded fraction of the training records.")
    held_out_category: str | None = Field(None, description="Hold out the records of this category, which no client gets.")
    num_clients: Count = Field(200, description="Number of clients that the records are dealt out to (N).")
    partition: Literal["iid", "dirichlet", "client"] = Field(
        "dirichlet",
        description="How records are dealt out; client: by the records' own client field (the task, in Natural "
        "Instructions), whatever --num-clients.",
    )
    alpha: Positive = Field(
        0.5, description="Of the Dirichlet partition over categories: small makes clients unlike, large alike."
    )
    min_partition_size: Count = Field(1, description="Records that each client of a Dirichlet partition gets at least.")
    responses: Literal["own", "shuffled"] = Field(
        "own",
        description="Whose responses train: shuffled is the control, in which each training record gets another one's "
        "response of its category.",
    )

    edges: Annotated[int, Field(ge=0)] = Field(
        0,
        description="So many edges stand between the server and the clients, and sum what these send (docs/edges.md); the "
        "ledger is that of --summation exact without them.",
    )

    @field_validator("data", mode="before")
    @classmethod
    def _data_as_text(cls, value: Any) -> Any:
        return source_text(value)

    @field_validator("data")
    @classmethod
    def _data_is_source(cls, value: str | None, info: ValidationInfo) -> str | None:
        return _checked_source(value, info)

    @model_validator(mode="before")
    @classmethod
    def _edges_sum_exactly(cls, settings: Any) -> Any:
        """What edges need is the default where there are some."""
        if not isinstance(settings, dict):
            return settings
        try:
            some = float(settings.get("edges") or 0) != 0
        except (TypeError, ValueError, OverflowError):  # no number, as their own check says
            some = False
        return {"summation": "exact", **settings} if some else settings

    @model_validator(mode="after")
    def _edges_can_sum(self) -> Self:
        if not self.edges:
            return self
        if self.summation != "exact":
            raise ValueError(
                f"--edges is {self.edges} and --summation {self.summation}, in which sums of sums differ; start a run with "
                "--summation exact, the default where there are edges"
            )
        for given, name, why in (
            (self.audit_log == "on", "--audit-log on", "keeps each client's reply, which a server behind edges does not see"),
            (self.two_point_clients > 0, f"--two-point-clients {self.two_point_clients:g}", "weighs scalars one by one"),
            (self.local_unit == "epochs" and self.same_seeds, "--shared-seeds on with epochs", "shares seeds with all clients"),
        ):
            if given:
                raise ValueError(f"--edges is {self.edges} and {name}, which {why}; leave out one of the two")
        return self

    @model_validator(mode="after")
    def _dealt_out_as_said(self) -> Self:
        if self.partition == "dirichlet":
            return self
        for name in ("alpha", "min_partition_size"):
            if (value := getattr(self, name)) != type(self).model_fields[name].default:
                raise ValueError(
                    f"--{name.replace('_', '-')} is {value:g} and --partition {self.partition}, which has no use for it; "
                    "leave it out, or take --partition dirichlet"
                )
        return self

    @model_validator(mode="after")
    def _own_is_of_nodes(self) -> Self:
        if self.objective == OWN:
            raise ValueError("--objective own is of runs on Flower, whose nodes name functions; give PACKAGE:FUNCTION")
        return self

    @model_validator(mode="after")
    def _one_held_out_set(self) -> Self:
        if self.eval_data is not None and self.held_out_category is not None:
            raise ValueError("--held-out-category and --eval-data both say what is held out; give one of them")
        return self


FOUND_OUT = ("max_length", "date", "eval_limit", "noise_multiplier")
"""The settings that are found out when a run starts, where they are left open."""
BEFORE = {"long_prompts": "drop", "aggregator": "mean"}
"""What runs did that are older than a setting, where that is not its default."""
PATTERNS = ("train", "freeze")
"""The settings that are lists of patterns."""
AUTO = "auto"
"""In place of a learning rate: find one."""
IN_MEMORY = "in memory: "
"""How the name of a model or of records begins that were given as objects."""
DRIVER = "driver"
"""The table in a run's `config.toml` of what only the driver of its rounds knows: Flower's deadline, who the clients were."""


def _is_stored(info: ValidationInfo) -> bool:
    """Whether these settings were checked before, maybe on another machine; see `validated`."""
    return bool(info.context and info.context["stored"])


def source_text(value: Any) -> Any:
    """A path, or a list of them, as a text."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value) if isinstance(value, Path) else value


def _checked_source(value: str | None, info: ValidationInfo) -> str | None:
    if value is None or value.startswith(IN_MEMORY) or _is_stored(info):
        return value
    try:
        return resolve_source(value)  # a run is gone on with from any folder
    except DataError as error:
        raise ValueError(visible(str(error).removeprefix(f"{value}: "))) from None


DEALING = SimulationConfig.model_fields.keys() - RunConfig.model_fields.keys() - {"edges"}
"""The settings that say how records are dealt out to simulated clients."""


C = TypeVar("C", bound=RunConfig)


def patterns(text: str | None) -> list[str]:
    """The patterns that a setting lists with commas between."""
    return [] if text is None else [part.strip() for part in text.split(",")]


def without_void(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that were written down, without what older versions took though it did nothing, which is refused now."""
    void = set[str]()
    algorithm = ALGORITHMS.get(str(settings.get("algorithm")))
    if algorithm is not None and not algorithm.takes("importance_start"):
        void.add("importance_start")
    if settings.get("partition", "dirichlet") != "dirichlet":
        void |= {"alpha", "min_partition_size"}
    return {name: value for name, value in settings.items() if name not in void}


def started(config: C) -> C:
    """The settings of a run that starts now: with the day, if its template sees one."""
    if config.template != "chat" or config.date is not None:
        return config
    return config.model_copy(update={"date": datetime.date.today()})


def found_out(config: C, before: RunConfig) -> C:
    """The same settings, with what a run has found out where they leave it open."""
    return config.model_copy(update={name: getattr(before, name) for name in FOUND_OUT if getattr(config, name) is None})


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def flags(config: RunConfig) -> list[str]:
    """The command line's words for settings; those at their defaults are left out, where nobody gave them."""
    given = config.model_dump(mode="json", exclude_unset=True)
    chosen = given | config.model_dump(mode="json", exclude_defaults=True)
    return [word for name, value in chosen.items() if value is not None for word in (flag(name), str(value))]


def missing(names: Sequence[str]) -> str:
    """What to do about settings that have no default and were not given."""
    called, are, them = joined(map(flag, names)), *(("are", "them") if len(names) > 1 else ("is", "it"))
    auto = ", or take --lr auto, which finds one as fedkseed tune does" if "lr" in names else ""
    return f"{called} {are} missing; give {them} on the command line or as {joined(names)} in the --config file{auto}"


WORDS = Words(
    value=lambda path: flag(path[0]),
    missing=lambda name: missing([name]),
    unknown=lambda name: f"setting {name!r}",
    advice={
        "lr": "; give a number, or --lr auto, which finds one as fedkseed tune does",
        "eval_limit": "; give a number of records, or all",
    },
)


def build(settings: dict[str, Any]) -> SimulationConfig:
    """Validate the settings of a simulation.

    Raises:
        ConfigError: a setting is unknown, missing, or out of its range; the message names the flag, the value and the fix.
    """
    return validated(SimulationConfig, settings, WORDS)


def settings_given(settings: Mapping[str, Any] | str | Path | SimulationConfig) -> dict[str, Any]:
    """Settings by name, however a caller from Python gives them."""
    if isinstance(settings, SimulationConfig):
        return settings.model_dump()
    if isinstance(settings, (str, Path)):
        return read_settings_file(Path(settings))
    if not isinstance(settings, Mapping):
        raise ConfigError(
            f"settings are a {type(settings).__name__}; expected a dict, the path of a TOML file or SimulationConfig"
        )
    return dict(settings)


def read_settings_file(path: Path) -> dict[str, Any]:
    """The settings of a TOML file, such as another run's `config.toml`, not yet validated.

    Raises:
        ConfigError: it cannot be read, or is not TOML.
    """
    try:
        settings = read_toml(path)
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot read ({error.strerror}); give the path of a TOML file") from error
    except ValueError as error:
        raise ConfigError(f"--config {path}: not TOML ({error}); expected lines such as num_rounds = 40") from error
    settings.pop(DRIVER, None)  # of another run's config.toml: not a setting
    return settings
