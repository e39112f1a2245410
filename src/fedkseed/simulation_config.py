"""The settings of a simulated federation: what the server decides, and which model, data and clients there are."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator

from fedkseed.errors import ConfigError
from fedkseed.federation.config import Count, FederationConfig, Positive


class SimulationConfig(FederationConfig):
    """Everything that a run's outcome depends on, beside the files that it names."""

    model: str = Field(description="base model: a Hugging Face model folder or hub id")
    data: Path = Field(description="training records: a jsonl file with instruction, input/context, output/response, category")
    eval_data: Path | None = Field(None, description="held-out records (default: a seeded 5 % of --data that no client gets)")
    num_clients: Count = Field(200, description="N: number of clients that the records are dealt out to")
    max_length: Annotated[int, Field(ge=2)] = Field(1024, description="longest record in tokens; longer ones are cut")
    partition: Literal["iid", "dirichlet", "client"] = Field(
        "dirichlet", description="how records are dealt out; client: by the records' own client field, whatever --num-clients"
    )
    alpha: Positive = Field(0.5, description="of the Dirichlet partition over categories: small is unlike, large is alike")
    template: Literal["plain", "chat"] = Field(
        "plain", description="prompt template: plain, or the tokenizer's own chat template"
    )
    eval_every: Count = Field(1, description="evaluate every so many rounds, and after the last")
    eval_limit: Count | None = Field(None, description="evaluate on so many of the held-out records only")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "float32", description="precision of the weights; auto is the checkpoint's own"
    )
    device: Literal["cpu"] = Field("cpu", description="where the model runs; so far only the cpu has a noise backend")

    @field_validator("data", "eval_data")
    @classmethod
    def _is_file(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value is not None and not value.is_file():
            raise ValueError(f"no such file; give the path of a jsonl file to {flag(info.field_name or '')}")
        return value.resolve() if value is not None else None  # a run is gone on with from any folder

    @field_validator("model")
    @classmethod
    def _is_absolute(cls, value: str) -> str:
        return str(Path(value).resolve()) if Path(value).is_dir() else value


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def build(settings: dict[str, Any]) -> SimulationConfig:
    """Validate settings.

    Raises:
        ConfigError: a setting is unknown, missing, or out of its range; the message names the flag, the value and the fix.
    """
    try:
        return SimulationConfig(**settings)
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0]) if problem["loc"] else "settings"
        if problem["type"] == "missing":
            raise ConfigError(
                f"{flag(name)} is missing; give it on the command line or as {name} in the --config file"
            ) from error
        if problem["type"] == "extra_forbidden":
            known = ", ".join(sorted(SimulationConfig.model_fields))
            raise ConfigError(f"setting {name!r} is unknown; expected one of: {known}") from error
        message = problem["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{flag(name)} is {str(problem['input'])!r}: {message[0].lower() + message[1:]}") from error
