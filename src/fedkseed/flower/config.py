"""The settings of a federation on Flower: the keys under `[tool.flwr.app.config]`, and those of a node's `--node-config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from fedkseed.data import resolve_source
from fedkseed.data.cache import cache_folder
from fedkseed.errors import ConfigError, DataError
from fedkseed.federation.algorithms import ALGORITHMS
from fedkseed.federation.config import Count, Positive
from fedkseed.federation.objectives import CODE
from fedkseed.federation.objectives import OWN as OF_NODES
from fedkseed.privacy import Privacy
from fedkseed.privacy.accountant import require_accountant
from fedkseed.runs.folder import RunFolder, exists, settings_of
from fedkseed.runs.layout import CONFIG
from fedkseed.runs.provenance import check_same, made_with
from fedkseed.runs.records import Records
from fedkseed.runs.settings import DEALING, RunConfig, SimulationConfig
from fedkseed.runs.trackers import TRACKERS
from fedkseed.runs.validation import Words, validated

NODE_KEYS = (
    "name", "model", "data", "eval-data", "columns", "state", "backpropagation", "objective", "secure-sums", "key", "keys",
)  # fmt: skip
PRIVACY_KEYS = {
    "dp": "unit", "clip-norm": "clip_norm", "noise-multiplier": "noise_multiplier", "delta": "delta", "epsilon": "epsilon",
}  # fmt: skip
"""A node's own choice, by the names that `Privacy` has for it."""
CHANGEABLE = ("run", "clients", "num_rounds", "min_clients", "deadline", "eval_every", "eval_limit", "eval_data")
"""What may differ when a run is gone on with: none of it says what a client computes."""
MOVABLE = {"model", "data", "template"}
"""Files whose content is known once a round is done."""
OWN = "go on with the run's own settings, or choose another run folder"


class FlowerConfig(RunConfig):
    """Everything that the server app decides for nodes in the field, which have records of their own."""

    eval_data: str | None = Field(None, description="records on the server to evaluate on; without, clients evaluate theirs")
    run: Path = Field(description="run folder on the server; a run that it holds is gone on with")
    min_clients: Count = Field(1, description="a round waits until so many clients are there")
    deadline: Positive = Field(3600.0, description="seconds that a round waits for replies")
    log: str | None = Field(
        None, description=f"where the numbers go too: {', '.join(TRACKERS)}, or several with commas between"
    )

    @field_validator("algorithm")
    @classmethod
    def _runs_on_flower(cls, value: str) -> str:
        known = [name for name, row in ALGORITHMS.items() if row.on_flower]
        if value not in known:
            raise ValueError(f"on Flower only {', '.join(known)} run; the baselines run in fedkseed simulate")
        return value

    @model_validator(mode="after")
    def _whose_privacy(self) -> Self:
        if self.dp == "record":
            raise ValueError(
                'dp is record, which is for each node to say; leave it out, and give dp = "record" in node-configs'
            )
        if self.dp is not None and self.noise_multiplier is None:
            raise ValueError("dp is client and noise-multiplier is missing; give it (docs/privacy.md has a table)")
        return self

    @model_validator(mode="after")
    def _names_no_code(self) -> Self:
        if CODE.fullmatch(self.objective) and not isinstance(self, EngineConfig):
            raise ValueError(
                f"objective {self.objective!r} names code, which a run may not bring to its nodes; take objective = "
                f'"{OF_NODES}", and name the function in each node\'s --node-config objective'
            )
        return self

    @field_validator("log")
    @classmethod
    def _are_trackers(cls, value: str | None) -> str | None:
        for name in _names(value):
            if name not in TRACKERS:
                raise ValueError(f"expected {', '.join(TRACKERS)}, or several of them with commas between")
        return value

    @property
    def trackers(self) -> tuple[str, ...]:
        """Where the numbers go beside the run's folder: the server's affair, which nodes hear of and pass over."""
        return _names(self.log)

    @property
    def expected_clients(self) -> int:
        """How many clients a round waits for."""
        return self.min_clients

    def driver(self) -> dict[str, Any]:
        """What a run's folder keeps of these settings beside those of any run."""
        return self.model_dump(mode="json", include={"run", "min_clients", "deadline"})


class EngineConfig(FlowerConfig, SimulationConfig):
    """The same for Flower's simulation engine, whose nodes are dealt the records that `data` names."""

    data: str = Field(description="records that are dealt out to the simulated nodes")

    @property
    def expected_clients(self) -> int:
        """All of them."""
        return self.num_clients


def _names(log: str | None) -> tuple[str, ...]:
    return tuple(filter(None, (name.strip() for name in (log or "").split(","))))


def _kebab(name: str) -> str:
    return name.replace("_", "-")


WORDS = Words(
    value=lambda path: f"run-config {_kebab(path[0])}",
    missing=lambda name: f"run-config has no {_kebab(name)}; set it in pyproject.toml or with flwr run --run-config",
    unknown=lambda name: f"run-config key {_kebab(name)!r}",
    key=_kebab,
    contradiction="run-config: ",
)


PRIVACY_WORDS = Words(
    value=lambda path: f"node-config {_privacy_key(path[0])}",
    missing=lambda name: f"node-config has no {_privacy_key(name)}; dp, clip-norm and noise-multiplier belong together",
    unknown=lambda name: f"node-config key {_privacy_key(name)!r}",
    contradiction="node-config: ",
)


def _privacy_key(name: str) -> str:
    """What a field of `Privacy` is called in a node-config."""
    return next(key for key, field in PRIVACY_KEYS.items() if field == name)


def read_config(run_config: Mapping[str, Any]) -> FlowerConfig:
    """The settings of a run's kebab-case configuration; an empty text stands for a key that is not set.

    Raises:
        ConfigError: a key is unknown, missing, or its value out of range; or it deals out records, and there are none.
    """
    settings = {key.replace("-", "_"): value for key, value in run_config.items() if value != ""}
    if "edges" in settings:
        raise ConfigError(
            f"run-config edges is {settings['edges']!r}, but Flower has one tier of nodes, and edges are of fedkseed simulate; "
            "leave it out"
        )
    if "data" in settings:
        return validated(EngineConfig, settings, WORDS)
    for name in sorted(settings.keys() & DEALING):
        raise ConfigError(
            f"run-config {_kebab(name)} is {settings[name]!r}, but nodes have records of their own; leave it empty, "
            "or give data, which Flower's simulation engine deals out"
        )
    if "two_point_clients" in settings:
        raise ConfigError(
            f"run-config two-point-clients is {settings['two_point_clients']!r}, but each node says whether it can "
            'backpropagate; leave it empty, and give backpropagation = "no" in the node-config of those that cannot'
        )
    return validated(FlowerConfig, settings, WORDS)


@dataclass(frozen=True)
class Node:
    """Who a node is.

    Attributes:
        client: its name from `--node-config`, or its number in Flower's simulation engine.
        config: the run's settings, with the node's own model and columns.
        data: its own records; None in the simulation engine.
        eval_data: its own records to evaluate on, if it has any.
        state: the folder of what it keeps between messages.
        backpropagation: whether it can backpropagate.
        sums_only: whether it answers nothing that shows its own numbers, whatever the server says.
        key, keys: its private key and the folder of all nodes' public ones, where secure sums are bound to them.
        privacy: what it hides of its records by itself; None: nothing.
    """

    client: str | int
    config: FlowerConfig
    data: str | None = None
    eval_data: str | None = None
    state: Path = field(default_factory=lambda: cache_folder() / "pages")
    backpropagation: bool = True
    sums_only: bool = False
    key: Path | None = None
    keys: Path | None = None
    privacy: Privacy | None = None


def node_settings(run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> Node:
    """Who this node is, from the run's configuration and its own.

    Raises:
        ConfigError: the node's configuration has an unknown key or lacks one, or see `read_config`.
    """
    if "partition-id" in node_config:
        config = read_config(run_config)
        if not isinstance(config, EngineConfig):
            raise ConfigError("run-config has no data; the simulation engine deals out the records of one jsonl file")
        num_nodes = node_config["num-partitions"]
        if config.partition != "client" and config.num_clients != num_nodes:
            raise ConfigError(
                f"run-config num-clients is {config.num_clients}, the federation has {num_nodes} SuperNodes; "
                f"start it with flwr run --federation-config 'num-supernodes={config.num_clients}'"
            )
        return Node(int(node_config["partition-id"]), config)
    unknown = sorted(set(node_config) - {*NODE_KEYS, *PRIVACY_KEYS})
    if unknown:
        raise ConfigError(
            f"node-config key {unknown[0]!r} is unknown; expected one of: {', '.join((*NODE_KEYS, *PRIVACY_KEYS))}"
        )
    for key in ("name", "data"):
        if not node_config.get(key):
            raise ConfigError(f'node-config has no {key}; start the SuperNode with --node-config \'name="..." data="..."\'')
    for key in ("data", "eval-data"):
        if node_config.get(key):
            try:
                resolve_source(str(node_config[key]))
            except DataError as error:
                reason = str(error).removeprefix(f"{node_config[key]}: ")
                raise ConfigError(f"node-config {key} is {node_config[key]!r}: {reason}") from None
    able = node_config.get("backpropagation") or "yes"
    if able not in ("yes", "no"):
        raise ConfigError(f'node-config backpropagation is {able!r}; expected "yes" or "no"')
    sums = node_config.get("secure-sums") or "allowed"
    if sums not in ("allowed", "required"):
        raise ConfigError(f'node-config secure-sums is {sums!r}; expected "allowed" or "required"')
    paths = {key: Path(str(node_config[key])) for key in ("key", "keys") if node_config.get(key)}
    if len(paths) == 1:
        raise ConfigError(
            f"node-config has {next(iter(paths))} alone; give key, this node's, and keys, the folder of all nodes'"
        )
    state = {"state": Path(str(node_config["state"]))} if node_config.get("state") else {}
    if state and state["state"].exists() and not state["state"].is_dir():
        raise ConfigError(f"node-config state is {node_config['state']!r}: no folder; give one that the node may write")
    # the server's records are not the node's, and its settings of them say nothing about the node's
    dealt = set(map(_kebab, DEALING))
    own = {key: value for key, value in run_config.items() if key != "eval-data" and key not in dealt}
    own |= {key: node_config[key] for key in ("model", "columns") if key in node_config}
    config = _with_function(read_config(own), node_config.get("objective"))
    privacy = _privacy(node_config)
    if privacy is not None and config.weighting != "equal":
        raise ConfigError(
            f"node-config dp is {privacy.unit}, which hides how many records there are, and run-config weighting is "
            f"{config.weighting}, which weighs by them; a private node takes part in runs with weighting equal"
        )
    if privacy is not None and config.local_unit == "epochs":
        raise ConfigError(
            f"node-config dp is {privacy.unit}, which hides how many records there are, and run-config local-unit is epochs, "
            "which are counted by them; a private node takes part in runs with local-unit steps"
        )
    eval_data = str(node_config["eval-data"]) if node_config.get("eval-data") else None
    return Node(
        str(node_config["name"]),
        config,
        str(node_config["data"]),
        eval_data,
        backpropagation=able == "yes",
        sums_only=sums == "required",
        **paths,
        privacy=privacy,
        **state,
    )


def _privacy(node_config: Mapping[str, Any]) -> Privacy | None:
    given = {name: node_config[key] for key, name in PRIVACY_KEYS.items() if node_config.get(key) not in (None, "")}
    if not given:
        return None
    privacy = validated(Privacy, given, PRIVACY_WORDS)
    require_accountant()
    if node_config.get("eval-data"):
        raise ConfigError(
            f"node-config eval-data is {node_config['eval-data']!r} and dp is {privacy.unit}: an evaluation tells the loss of "
            "its records as it is; leave one of them out"
        )
    return privacy


def _with_function(config: FlowerConfig, named: Any) -> FlowerConfig:
    """The settings with the node's own function, where the run leaves it to the nodes; a run never names code.

    Raises:
        ConfigError: the node names none.
    """
    if config.objective != OF_NODES:
        return config
    if not CODE.fullmatch(str(named or "")):
        raise ConfigError(
            f"node-config objective is {named!r} and the run leaves its objective to the nodes; give the function of this "
            "machine that scores answers, as PACKAGE:FUNCTION"
        )
    return config.model_copy(update={"objective": str(named)})


def open_run(config: FlowerConfig, records: Records | None = None) -> RunFolder:
    """The run's folder, with these settings: the one to go on with if there is one; nothing is written yet.

    Files may have been moved: once a round is done, the base model is known by its fingerprint and the records that are dealt
    out by their digest.

    Args:
        config: the settings.
        records: those that the simulation engine deals out.

    Raises:
        ConfigError: the folder holds a run with other settings or records.
        FedKSeedError: it cannot be read.
    """
    driver = config.driver()
    if exists(config.run / CONFIG):
        stored = RunFolder.open(config.run)
        checkpoint, noted = stored.load_checkpoint(), stored.driver
        known = set() if checkpoint is None else {"model"} if records is None or checkpoint.made_with is None else MOVABLE
        now, before = settings_of(config) | driver, settings_of(stored.config) | noted
        for name in sorted((before.keys() | now.keys()) - {*CHANGEABLE, *known}):
            if config.facts.takes(name) and before.get(name) != now.get(name):
                raise ConfigError(
                    f"run-config {_kebab(name)} is {now.get(name)!r}, the run in {config.run} was started with "
                    f"{before.get(name)!r}; {OWN}"
                )
        if checkpoint is not None and checkpoint.made_with is not None:
            check_same(stored, checkpoint, config, records, remedy=OWN)
        driver |= {"clients": noted["clients"]} if "clients" in noted else {}
    run = RunFolder(config.run, config, driver)
    run.made_with = made_with(config, records)
    return run
