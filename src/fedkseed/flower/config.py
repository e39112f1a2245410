"""The settings of a federation on Flower: the keys under `[tool.flwr.app.config]`, and those of a node's `--node-config`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from fedkseed.errors import ConfigError
from fedkseed.federation.algorithms import SEEDS, takes
from fedkseed.federation.config import Count, Positive
from fedkseed.runs.folder import CONFIG, DRIVER, RunFolder
from fedkseed.runs.settings import SimulationConfig
from fedkseed.runs.validation import first_problem

NODE_KEYS = ("name", "model", "data", "eval-data", "columns")
SIMULATED_KEYS = ("partition-id", "num-partitions")
CHANGEABLE = ("run", "num_rounds", "min_clients", "deadline", "eval_every", "eval_limit", "eval_data")
"""What may differ when a run is gone on with: none of it says what a client computes."""


class FlowerConfig(SimulationConfig):
    """Everything that the server app decides; `data` and what belongs to it are for Flower's simulation engine alone."""

    data: str | None = Field(
        None, description="simulation engine only: records dealt out to the clients; in the field each node names its own"
    )
    eval_data: str | None = Field(None, description="records on the server to evaluate on; without, clients evaluate theirs")
    run: Path = Field(description="run folder on the server; a run that it holds is gone on with")
    min_clients: Count = Field(1, description="a round waits until so many clients are there")
    deadline: Positive = Field(3600.0, description="seconds that a round waits for replies")

    @field_validator("algorithm")
    @classmethod
    def _runs_on_flower(cls, value: str) -> str:
        if value not in SEEDS:
            raise ValueError(f"on Flower only {' and '.join(SEEDS)} run; the baselines run in fedkseed simulate")
        return value

    @property
    def expected_clients(self) -> int:
        """How many clients a round waits for: in a simulation all of them."""
        return self.num_clients if self.data is not None else self.min_clients


def read_config(run_config: Mapping[str, Any]) -> FlowerConfig:
    """The settings of a run's kebab-case configuration; an empty text stands for a key that is not set.

    Raises:
        ConfigError: a key is unknown, missing, or its value out of range.
    """
    settings = {key.replace("-", "_"): value for key, value in run_config.items() if value != ""}
    try:
        return FlowerConfig(**settings)
    except ValidationError as error:
        problem = first_problem(error)
        if not problem.path:
            raise ConfigError(f"run-config: {problem.text}") from error
        key = problem.path[0].replace("_", "-")
        if problem.kind == "missing":
            raise ConfigError(f"run-config has no {key}; set it in pyproject.toml or with flwr run --run-config") from error
        if problem.kind == "unknown":
            known = ", ".join(sorted(name.replace("_", "-") for name in FlowerConfig.model_fields))
            raise ConfigError(f"run-config key {key!r} is unknown; expected one of: {known}") from error
        raise ConfigError(f"run-config {key} is {str(problem.value)!r}: {problem.text}") from error


def node_settings(run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> tuple[str | int, FlowerConfig]:
    """Who this node is, and the run's settings with the node's own model and data.

    Returns:
        The client's name from `--node-config`, or its number in Flower's simulation engine; the settings.

    Raises:
        ConfigError: the node's configuration has an unknown key or lacks one, or see `read_config`.
    """
    if "partition-id" in node_config:
        config = read_config(run_config)
        if config.data is None:
            raise ConfigError("run-config has no data; the simulation engine deals out the records of one jsonl file")
        num_nodes = node_config["num-partitions"]
        if config.partition != "client" and config.num_clients != num_nodes:
            raise ConfigError(
                f"run-config num-clients is {config.num_clients}, the federation has {num_nodes} SuperNodes; "
                f"start it with flwr run --federation-config 'num-supernodes={config.num_clients}'"
            )
        return int(node_config["partition-id"]), config
    unknown = sorted(set(node_config) - set(NODE_KEYS))
    if unknown:
        raise ConfigError(f"node-config key {unknown[0]!r} is unknown; expected one of: {', '.join(NODE_KEYS)}")
    for key in ("name", "data"):
        if not node_config.get(key):
            raise ConfigError(f'node-config has no {key}; start the SuperNode with --node-config \'name="..." data="..."\'')
    for key in ("data", "eval-data"):
        if node_config.get(key) and not Path(str(node_config[key])).is_file():
            raise ConfigError(
                f"node-config {key} is {node_config[key]!r}: no such file; give the path of a jsonl, CSV or parquet file"
            )
    # the server's files are not the node's
    own = {key: value for key, value in run_config.items() if key not in ("data", "eval-data")}
    own |= {key: value for key, value in node_config.items() if key != "name"}
    return str(node_config["name"]), read_config(own)


def open_run(config: FlowerConfig) -> RunFolder:
    """The run's folder: made if there is none, else the one to go on with.

    Raises:
        ConfigError: the folder holds a run with other settings.
        RunError: it cannot be read or written.
    """
    run = RunFolder(config.run, config)
    file = config.run / CONFIG
    if file.exists():
        try:
            before = tomllib.loads(file.read_text(encoding="utf-8"))
            before |= before.pop(DRIVER, {})
        except ValueError as error:
            raise ConfigError(f"{file} is not TOML ({error}); restore it from a copy") from error
        now = {name: value for name, value in config.model_dump(mode="json").items() if value is not None}
        for name in sorted((before.keys() | now.keys()) - set(CHANGEABLE)):
            if takes(config.algorithm, name) and before.get(name) != now.get(name):
                raise ConfigError(
                    f"run-config {name.replace('_', '-')} is {now.get(name)!r}, the run in {config.run} was started with "
                    f"{before.get(name)!r}; go on with the run's own settings, or choose another run folder"
                )
    run.write_config(config)
    return run
