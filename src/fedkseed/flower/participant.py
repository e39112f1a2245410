"""What a node is to the federation: its records, the model, and the answers to the server's three questions."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import lru_cache
from logging import DEBUG, INFO
from typing import Any

from flwr.supercore import log

from fedkseed.data import EncodedExample, encode, pad_token_id, read_source
from fedkseed.errors import ConfigError, ProtocolError
from fedkseed.flower.config import EngineConfig, FlowerConfig, node_settings
from fedkseed.flower.envelope import Evaluation, Hello
from fedkseed.flower.log import Log
from fedkseed.kseed.client import Client
from fedkseed.kseed.ledger import Ledger
from fedkseed.kseed.messages import TrainRequest
from fedkseed.kseed.server import seed_pool
from fedkseed.models.loading import Dtype, load_model, load_tokenizer
from fedkseed.noise.pool import SeedPool
from fedkseed.runs.records import Records, check_context, describe, prepare, sample
from fedkseed.runs.task import BoundModel, Stopwatch, TextTask, TimedModel, bind_loaded


# One model and one data set stay in a process that lives on, as the simulation engine's actors do. A SuperNode starts a
# process for each message, so that there everything is loaded anew.
@lru_cache(maxsize=1)
def load_bound(source: str, dtype: Dtype, device: str, pool: SeedPool) -> BoundModel:
    """Load a base model and bind it; see `bind_loaded`.

    Raises:
        FedKSeedError: the model cannot be loaded or used.
    """
    return bind_loaded(source, load_model(source, dtype, device), pool)


@lru_cache(maxsize=1)
def simulated_records(config: EngineConfig) -> Records:
    """The records of all clients of Flower's simulation engine, dealt out as `fedkseed simulate` does.

    Raises:
        FedKSeedError: the data cannot be read or dealt out.
    """
    return prepare(config, Log(DEBUG))


def read_examples(config: FlowerConfig, source: str, what: str) -> list[EncodedExample]:
    """The tokenised records of a file of one's own.

    Raises:
        FedKSeedError: the file or the tokenizer cannot be used.
    """
    records = read_source(source, "train", config.max_length, config.seed, config.columns)
    encoded = encode(records, load_tokenizer(config.model), config.max_length, config.prompts())
    check_context(config.model, config.max_length, encoded.examples)
    log(INFO, describe(what, encoded))
    return list(encoded.examples)


def drawn(config: FlowerConfig, examples: list[EncodedExample]) -> list[EncodedExample]:
    """The records that are evaluated on: all, or the same seeded draw as in a simulation."""
    return [examples[i] for i in sample(len(examples), config.eval_limit, config.seed)]


class Participant:
    """A client in the field, or one of Flower's simulation engine.

    Args:
        run_config: the run's settings.
        node_config: the node's own.

    Raises:
        FedKSeedError: the settings, the data or the model cannot be used.
    """

    def __init__(self, run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> None:
        begin = time.perf_counter()
        node = node_settings(run_config, node_config)
        who, config = node.client, node.config
        if isinstance(who, int) and isinstance(config, EngineConfig):
            records = simulated_records(config)
            names = sorted(records.clients)
            if who >= len(names):
                raise ConfigError(f"there are {len(names)} clients in the data and more SuperNodes; start {len(names)}")
            self.name = names[who]
            self._examples, self._held_out, self._pad_id = records.clients[self.name], [], records.pad_id
        else:
            self.name = str(who)
            self._pad_id = pad_token_id(load_tokenizer(config.model))
            self._examples = read_examples(config, node.data or "", "training")
            self._held_out = drawn(config, read_examples(config, node.eval_data, "evaluation")) if node.eval_data else []
        self._loaded = load_bound(config.model, config.dtype, config.device, seed_pool(config))
        self._seconds_loading = time.perf_counter() - begin

    def hello(self, data: bytes) -> bytes:
        """Who this is; the request's bytes say nothing."""
        return Hello(
            name=self.name,
            base=self._loaded.identity.fingerprint,
            num_examples=len(self._examples),
            num_eval_examples=len(self._held_out),
        ).encode()

    def train(self, data: bytes) -> bytes:
        """See `fedkseed.kseed.client.Client.answer`."""
        begin = time.perf_counter()
        watch = Stopwatch()
        task = TextTask(self._loaded.model, self._examples, self._pad_id, watch)
        client = Client(self.name, TimedModel(self._loaded.bound, watch), self._loaded.identity, task)
        reply = client.answer(data)
        request = TrainRequest.decode(data)
        spent = ", ".join(f"{activity} {seconds:.2f} s" for activity, seconds in watch.read().items())
        log(
            INFO,
            "%s: round %s, %s steps in %.2f s (%s) after %.2f s of loading",
            *(self.name, request.server_round, len(request.indices), time.perf_counter() - begin, spent, self._seconds_loading),
        )
        return reply

    def evaluate(self, data: bytes) -> bytes:
        """The loss of this node's evaluation records under the published ledger of these bytes.

        Raises:
            LedgerError: not a ledger.
            ProtocolError: it is of another base model or pool, or this node has no such records.
        """
        ledger = Ledger.decode(data)
        if not self._held_out:
            raise ProtocolError(f"{self.name!r} has no records to evaluate on; give eval-data in its node-config")
        difference = ledger.base.difference(self._loaded.identity, self._loaded.bound.names)
        if difference or ledger.pool != self._loaded.bound.pool:
            raise ProtocolError(
                f"the ledger is of another base model or pool than {self.name!r} has ({difference or ledger.pool})"
            )
        result = self._loaded.evaluate(ledger, self._held_out, self._pad_id)
        return Evaluation(
            ledger=ledger.digest(), loss=result.loss, num_examples=result.num_examples, num_tokens=result.num_tokens
        ).encode()
