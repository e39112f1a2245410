"""A whole federation in one process: the clients share one model in memory, every message passes through its bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedkseed.errors import ConfigError, RunError
from fedkseed.evaluation import evaluate_loss
from fedkseed.federation import Checkpoint
from fedkseed.federation.edge import Edge
from fedkseed.federation.envelope import Request
from fedkseed.files import placed
from fedkseed.kseed.calibration import Calibration
from fedkseed.kseed.ledger import Ledger
from fedkseed.models.loading import load_model
from fedkseed.runs.algorithms import kind_of, roles_of
from fedkseed.runs.checkpoints import file_of
from fedkseed.runs.driver import Driver
from fedkseed.runs.extras import require_extras
from fedkseed.runs.folder import RunFolder, exists, new_folder
from fedkseed.runs.forecast import Forecast, forecast
from fedkseed.runs.inputs import separate
from fedkseed.runs.layout import CONFIG
from fedkseed.runs.learner import load_learner
from fedkseed.runs.memory import peak_memory
from fedkseed.runs.observer import Nobody, Observer, Probe
from fedkseed.runs.privacy import Account, warnings
from fedkseed.runs.provenance import check_same, made_with
from fedkseed.runs.records import Records, prepare
from fedkseed.runs.resolution import eps_warning
from fedkseed.runs.settings import AUTO, SimulationConfig, build, found_out, settings_given, started
from fedkseed.runs.task import EVAL_BATCH, Stopwatch
from fedkseed.runs.trackers import check_trackers
from fedkseed.runs.tuning import find

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fedkseed.secure.client import SumClient


class Simulation:
    """A federation that is ready to run: model loaded, server where the run's checkpoint is.

    Args:
        run: the run's folder; its checkpoint, if there is one, is gone on from.
        records: the data.
        observer: who watches.
        model: the loaded base model, in place of the one that the settings name; it is tuned in place.
        log: trackers that get all numbers too; see `fedkseed.runs.trackers`.
        config: settings to go on with in place of the folder's, which they replace once it is known that they can be used.
        accept_changes: go on although the run was made with other settings or records.

    Raises:
        ConfigError: the run was made with other settings or records; see `check_same`.
        FedKSeedError: the model or the checkpoint cannot be used.
    """

    def __init__(
        self,
        run: RunFolder,
        records: Records,
        observer: Observer,
        model: PreTrainedModel | None = None,
        log: Sequence[str] = (),
        config: SimulationConfig | None = None,
        accept_changes: bool = False,
    ) -> None:
        config = config or run.simulation
        require_extras(config)
        checkpoint = run.load_checkpoint()
        if checkpoint is not None and file_of(config.facts) != run.checkpoint_path.name:
            raise ConfigError(
                f"--algorithm is {config.algorithm} and the run's {run.config.algorithm}, whose checkpoint is of another kind; "
                "start a run of its own"
            )
        changes = check_same(run, checkpoint, config, records, accept_changes)
        self.run, self.config, self.observer = run, config, observer
        self._records, self._watch = records, Stopwatch()
        if model is None:
            model = load_model(config.model, config.dtype, config.device)
        model.train(False)
        d, dtype = sum(p.numel() for p in model.parameters()), str(model.dtype).removeprefix("torch.")
        observer.note(f"model: {config.model}, {d:,} parameters in {dtype}")
        if config.facts.measures == "two-point" and (warning := eps_warning(model, config.eps)):
            observer.note(warning)
        account = None
        if config.privacy is not None:
            account = Account(config, records.sizes, checkpoint)
            for warning in warnings(config.privacy, records.sizes):
                observer.note(warning)
        federation = kind_of(config.facts).federate(config, model, checkpoint, records, self._watch)
        self._federation = federation
        self.model, self.server, self.clients = federation.model, federation.server, federation.clients
        self.restore, self.to_base = federation.restore, federation.to_base
        if config != run.config:
            run.write_config(config)
        run.made_with = made_with(config, records) | ({"privacy": account.noted()} if account else {})
        for change in changes:
            observer.note(f"from here on {change}")
        if changes and checkpoint is not None:  # else the next resume would refuse what was accepted now
            run.save_checkpoint(checkpoint)
        self._driver = Driver(run, self.server, observer, log=log, account=account)
        self._adding: dict[str, SumClient] = {}
        self._behind = {f"edge-{i + 1}": self.server.clients[i :: config.edges] for i in range(config.edges)}
        self._edges = {name: self._edge(name, clients) for name, clients in self._behind.items() if clients}
        self._heard: dict[str, Callable[[int, float], None]] = {}

    def _edge(self, name: str, clients: Sequence[str]) -> Edge:
        checkpoint, known = self.server.checkpoint, self.server.roster()["num_examples"]
        assert isinstance(checkpoint, Ledger)  # only algorithms that have one take the setting
        rounds = roles_of(self.config.facts).server(self.config, checkpoint.base, None, self.server.guess_loss, None)
        return Edge(name, rounds, clients, {client: known[client] for client in clients if client in known})

    def forecast(self) -> Forecast | None:
        """What the rounds that are left will take, from a step that leaves no trace; None if none are left."""
        if self.server.finished:
            return None
        return forecast(self.config, self._federation, self._records, self._watch)

    def train(self) -> Checkpoint:
        """Do all rounds that are left; see `Driver.drive`."""
        return self._driver.drive(self._attempt, self._evaluate)

    def _attempt(self) -> bool:
        if self.config.edges:
            return self._attempt_edges()
        requests = self._driver.plan()
        if self.config.secure_sums == "on":
            return self._attempt_sum(list(requests))
        cohort = len(self._driver.asked)
        replies = (  # one client after the other, as the server takes their replies
            (request.client, self.clients[request.client].answer(data, self._hear(request, place, cohort)))
            for place, (request, data) in enumerate(requests, start=1)
        )
        return self._driver.close(replies, measured=self._measured) is not None

    def _attempt_edges(self) -> bool:
        """The same where edges stand between the server and the clients."""
        attempt = self._driver.plan_edges(self._behind)
        cohort, opened = sum(map(len, attempt.asked.values())), set[str]()
        place = down = up = 0

        def replies(requests: Sequence[Request]) -> Iterator[tuple[str, bytes]]:
            nonlocal place, down, up
            for request in requests:
                data = request.encode()
                heard = self._hear(request, (place := place + 1), cohort)
                reply = self.clients[request.client].answer(data, heard)
                down, up = down + len(data), up + len(reply)
                yield request.client, reply

        def deliver(messages: Mapping[str, bytes]) -> list[tuple[str, bytes]]:
            answers = []
            for name, data in messages.items():
                edge = self._edges[name]
                if name in opened:
                    answers.append((name, edge.answer(data)))
                else:
                    opened.add(name)
                    answers.append((name, edge.close(replies(edge.open(data)))))
            return answers

        return self._driver.close_edges(attempt, deliver, lambda: (down, up), self._measured) is not None

    def _attempt_sum(self, requests: Sequence[tuple[Request, bytes]]) -> bool:
        """The same where the server sees the sum of the replies only."""
        from fedkseed.runs.sums import conversation, sum_client

        roles = roles_of(self.config.facts)
        for place, (request, _) in enumerate(requests, start=1):
            name = request.client
            self._heard[name] = self._hear(request, place, len(requests))
            if name not in self._adding:  # who was asked before remembers which sums it was part of
                self._adding[name] = sum_client(name, roles, partial(self._train, name))

        def deliver(messages: Mapping[str, bytes]) -> tuple[list[tuple[str, bytes]], dict[str, str]]:
            return [(name, self._adding[name].answer(data)) for name, data in messages.items()], {}

        conversed = conversation(self.config, self.server, requests)
        return self._driver.close_sum(conversed, deliver, self._measured) is not None

    def _train(self, name: str, data: bytes) -> bytes:
        return self.clients[name].answer(data, self._heard[name])

    def _measured(self) -> dict[str, Any]:
        return {"seconds_by": self._watch.read(), "peak_bytes": peak_memory(self.config.device)}

    def _hear(self, request: Request, place: int, cohort: int) -> Callable[[int, float], None]:
        """Tells the observer of each loss that this client measures in this round."""

        def heard(step: int, loss: float) -> None:
            self.observer.probe(Probe(request.server_round, request.client, place, cohort, step, request.num_steps, loss))

        return heard

    def _evaluate(self) -> None:
        begin = time.perf_counter()
        self.restore()
        heard = partial(self.observer.progress, f"evaluating after round {self._driver.round}")
        result = evaluate_loss(self.model, self._records.held_out, EVAL_BATCH, self._records.pad_id, heard)
        if (watched := self._federation.watched) is not None:
            answering = partial(self.observer.progress, f"scoring after round {self._driver.round}")
            result = replace(result, reward=watched.reward(answering))
        self._watch.read()  # the rebuild here is part of the evaluation's own seconds
        self._driver.evaluated(result, sum(p.nbytes for p in self.model.parameters()), time.perf_counter() - begin)


@dataclass(frozen=True)
class Result:
    """What a simulation led to.

    Attributes:
        folder: the run's folder, which the commands take too.
        checkpoint: the tuned model: a `Ledger`, of a baseline its tensors.
        history: the held-out loss by round; round 0 is the base model.
        rewards: the held-out reward by round, of a run that is tuned on scores.
    """

    folder: Path
    checkpoint: Checkpoint
    history: Mapping[int, float]
    rewards: Mapping[int, float]

    @property
    def ledger(self) -> Ledger:
        """The tuned model as K numbers.

        Raises:
            RunError: a baseline's is none.
        """
        if not isinstance(self.checkpoint, Ledger):
            raise RunError(f"the run in {self.folder} is of a baseline, which has no ledger; its tensors are `checkpoint`")
        return self.checkpoint


def simulate(
    settings: Mapping[str, Any] | str | Path | SimulationConfig,
    run: str | Path | None = None,
    observer: Observer | None = None,
    log: Sequence[str] = (),
    accept_changes: bool = False,
) -> Result:
    """Tune a model by a federation of simulated clients; what `fedkseed simulate` does (docs/python.md).

    Args:
        settings: those of `fedkseed simulate` with underscores: a dict, a TOML file or `SimulationConfig`. In a dict, `lr` may
            be "auto"; `model` may be a pair (loaded model, tokenizer), which is tuned in place; `data` and `eval_data` may be
            records: a list of dicts, a DataFrame, a dataset; `objective` may be a function of (record, answer).
        run: the run's folder; one that holds a run with these settings is gone on with. None makes one under `runs/`.
        observer: who watches: None for nobody, `fedkseed.Progress()` for a bar.
        log: where the numbers go beside the folder: `tensorboard`, `trackio`, `wandb`.
        accept_changes: go on with a run although it was made with other settings or records.

    Returns:
        The checkpoint, the losses by round, and the folder, which has all else.

    Raises:
        ConfigError: a setting is unknown, missing or out of its range; or the folder's run has others, or other records; or a
            tracker is not installed.
        FedKSeedError: the data, the model or the folder cannot be used.
    """
    named, inputs = separate(settings_given(settings))
    trackers = check_trackers(log, "log")
    watch = observer or Nobody()
    if named.get("lr") == AUTO:
        found = find(build({**named, "lr": 1.0}), watch, inputs)
        named["lr"] = found.lr
        if isinstance(found, Calibration):
            named.setdefault("eps", found.eps)
    path = new_folder(Path("runs")) if run is None else placed(run)
    config = build(named)
    if config.facts.measures == "gradient" and torch.is_inference_mode_enabled():
        raise ConfigError(f"--algorithm {config.algorithm} needs gradients; call this outside torch.inference_mode()")
    require_extras(config)
    folder = RunFolder.open(path) if exists(path / CONFIG) else None
    with ExitStack() as stack:
        if folder is None:
            config = started(config)
        else:
            stack.enter_context(folder.held())  # before anything is loaded
            before = folder.config
            checkpoint = folder.load_checkpoint()
            said = settings.model_fields_set if isinstance(settings, SimulationConfig) else named
            rounds = config.num_rounds if "num_rounds" in said else before.num_rounds
            if checkpoint is not None and rounds < checkpoint.round:
                raise ConfigError(
                    f"num_rounds is {rounds} and {path} has {checkpoint.round} rounds already; give as many or more"
                )
            config = found_out(config, before).model_copy(update={"num_rounds": rounds})
            check_same(folder, checkpoint, config, None, accept_changes)  # what takes no reading of records
        learner = load_learner(config, watch, inputs)
        records = prepare(config, watch, inputs, learner)
        folder = folder or RunFolder.create(path, records.config)
        stack.enter_context(folder.held())
        simulation = Simulation(folder, records, watch, learner.model, trackers, records.config, accept_changes)
        try:
            checkpoint = simulation.train()
        except BaseException:  # Ctrl-C too: else somebody's model would be left in the middle of a step
            if inputs.model is not None:
                simulation.to_base()
            raise
        simulation.restore()
    return Result(folder.path, checkpoint, folder.recorded().losses, folder.recorded().rewards)
