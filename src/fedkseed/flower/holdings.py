"""What a node's process holds: the model in its two roles, and the records of a source of its own or of the engine's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from logging import DEBUG, INFO
from typing import Literal

from fedkseed.data import EncodedExample, Example, read_source
from fedkseed.flower.config import EngineConfig, FlowerConfig
from fedkseed.flower.log import Log
from fedkseed.kseed.server import seed_pool
from fedkseed.models.dtypes import Dtype
from fedkseed.noise.pool import SeedPool
from fedkseed.runs.learner import Learner, learner_of
from fedkseed.runs.records import Records, encoded_for, prepare, sample
from fedkseed.runs.task import BoundModel, bind_loaded, checkpoint_activations, compile_passes


@dataclass(frozen=True)
class Loaded:
    """A model in its two roles.

    Attributes:
        learner: what it answered.
        bound: the same model as base plus coefficients.
    """

    learner: Learner
    bound: BoundModel


# One model and one data set stay in a process that lives on, as the simulation engine's actors and a node's worker do.
@lru_cache(maxsize=1)
def load_bound(
    source: str,
    dtype: Dtype,
    device: str,
    max_length: int | None,
    tensors: tuple[str | None, str | None],
    pool: SeedPool,
    pages: bool,
    checkpointing: bool = False,
    compiled: bool = False,
) -> Loaded:
    """Load a base model, ask it and bind it; see `learner_of` and `bind_loaded`.

    Args:
        source, dtype, device, max_length: see `learner_of`.
        tensors: the settings `train` and `freeze`.
        pool: of the run, or of its first page.
        pages: whether the run has pages; those that others have opened are not for one that has not.
        checkpointing: whether backward passes recompute activations.
        compiled: whether forward passes are compiled.

    Raises:
        FedKSeedError: the model cannot be loaded or used.
    """
    learner = learner_of(source, dtype, device, max_length, Log(INFO))
    loaded = bind_loaded(source, learner.model, pool, learner.frozen(*tensors))
    if checkpointing:
        checkpoint_activations(loaded.model)
    if compiled:
        compile_passes(loaded.model)
    return Loaded(learner, loaded)


def load_for(config: FlowerConfig, *, training: bool) -> Loaded:
    """The model that a run's settings name, to train it or to evaluate it; see `load_bound`."""
    return load_bound(
        config.model,
        config.dtype,
        config.device,
        config.max_length,
        (config.train, config.freeze),
        seed_pool(config),
        config.facts.has_pages,
        training and config.checkpointing == "on",
        training and config.compile == "on",
    )


@lru_cache(maxsize=1)
def simulated_records(config: EngineConfig) -> Records:
    """The records of all clients of Flower's simulation engine, dealt out as `fedkseed simulate` does.

    Raises:
        FedKSeedError: the data cannot be read or dealt out.
    """
    return prepare(config, Log(DEBUG), learner=load_for(config, training=True).learner)


@dataclass(frozen=True)
class Held:
    """Records of a source of one's own.

    Attributes:
        examples: tokenised.
        records: what they were encoded from.
        stop_ids: the ids that end a response.
    """

    examples: list[EncodedExample]
    records: list[Example]
    stop_ids: tuple[int, ...]

    def drawn(self, config: FlowerConfig) -> Held:
        """Those that are evaluated on: all, or the same seeded draw as in a simulation."""
        chosen = sample(len(self.examples), config.eval_limit, config.seed)
        return Held([self.examples[i] for i in chosen], [self.records[i] for i in chosen], self.stop_ids)


NOTHING = Held([], [], ())


def read_held(config: FlowerConfig, learner: Learner, source: str, what: str, split: Literal["train", "test"]) -> Held:
    """The records of a source of one's own; `split` says which of its tasks, of a Natural Instructions folder.

    Raises:
        FedKSeedError: the file or the tokenizer cannot be used.
    """
    records = read_source(source, split, learner.max_length(config.max_length), config.seed, config.columns)
    encoded = encoded_for(config, learner, records, what, Log(INFO))
    return Held(list(encoded.examples), [records[i] for i in encoded.kept], encoded.stop_ids)
