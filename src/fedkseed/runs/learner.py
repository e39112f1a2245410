"""What a run tunes: a model with its tokenizer, asked once what it takes (`fedkseed.models.probing`).

Simulation, tuning, evaluation and nodes on Flower all come by their model here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from fedkseed.baselines import require_peft
from fedkseed.data import EncodedExample, pad_token_id
from fedkseed.errors import ConfigError, ModelError
from fedkseed.evaluation.generation import end_ids
from fedkseed.models.dtypes import Dtype
from fedkseed.models.loading import load_model, load_tokenizer, require_device
from fedkseed.models.parameters import is_quantised, named_parameters
from fedkseed.models.probing import TOKENS, Traits, probe
from fedkseed.models.selection import frozen_names
from fedkseed.noise import get_backend
from fedkseed.runs.inputs import Inputs
from fedkseed.runs.observer import WARNING, Nobody, Observer
from fedkseed.runs.settings import RunConfig, patterns

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

USUAL_LENGTH = 1024
"""Tokens of the longest record where neither the user nor the model says less."""


@dataclass(frozen=True)
class Learner:
    """A base model as it was loaded, and what is known of it.

    Attributes:
        source: what settings call it.
        model: in eval mode.
        tokenizer: its tokenizer.
        traits: what it answered.
    """

    source: str
    model: PreTrainedModel = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    traits: Traits

    @property
    def pad_id(self) -> int | None:
        """What padding holds; None if padding would change the losses."""
        return pad_token_id(self.tokenizer, self.traits.rows) if self.traits.pads else None

    def max_length(self, wanted: int | None, soft_prompt: int = 0) -> int:
        """The longest record in tokens: what is wanted, else what is usual or the model takes.

        Args:
            wanted: what the settings say.
            soft_prompt: tokens that stand in front of every record.

        Raises:
            ConfigError: the model does not take so many.
        """
        takes = self.traits.context
        if takes is None:
            return wanted or USUAL_LENGTH
        room = takes - soft_prompt
        beside = f" and the soft prompt {soft_prompt}" if soft_prompt else ""
        if room < 2:
            raise ConfigError(f"{self.source} takes {takes} tokens{beside}: no room for a record; lower --num-virtual-tokens")
        if wanted is not None and wanted > room:
            raise ConfigError(f"--max-length is {wanted}{beside}; {self.source} takes {takes} tokens, so give {room} or less")
        return wanted or min(USUAL_LENGTH, room)

    def frozen(self, train: str | None, freeze: str | None) -> tuple[str, ...]:
        """Names of the tensors that a run with these settings leaves as they are.

        Raises:
            ConfigError: see `frozen_names`.
        """
        return frozen_names(self.model, patterns(train), patterns(freeze), self.traits.idle)

    def check_ids(self, examples: Iterable[EncodedExample]) -> None:
        """Refuse token ids that the model does not have.

        Raises:
            ModelError: there is one; the message names it.
        """
        highest = max((int(example.input_ids.max()) for example in examples), default=0)
        if highest >= self.traits.rows:
            token = self.tokenizer.convert_ids_to_tokens(highest)
            raise ModelError(
                f"{self.source}: its tokenizer gives the id {highest} ({token!r}), its embedding has {self.traits.rows} rows; "
                "take the tokenizer that the model was trained with, or enlarge the model first (resize_token_embeddings)"
            )


def require(config: RunConfig) -> None:
    """Refuse what this machine cannot do, before anything is loaded.

    Raises:
        ConfigError: the algorithm's extra is missing.
        InvalidValueError: torch cannot use the device here.
        BackendError: no noise backend works on the device.
    """
    require_peft(config.facts)
    require_device(config.device)
    if config.facts.needs_noise:
        get_backend("auto", torch.device(config.device).type)


def load_learner(config: RunConfig, observer: Observer | None = None, inputs: Inputs | None = None) -> Learner:
    """The learner that a run's settings name; see `require` and `learner_of`.

    Args:
        config: the settings.
        observer: hears what is left alone.
        inputs: a loaded model and its tokenizer in place of the named ones.
    """
    require(config)
    return learner_of(config.model, config.dtype, config.device, config.max_length, observer, inputs)


def learner_of(
    source: str,
    dtype: Dtype,
    device: str,
    max_length: int | None = None,
    observer: Observer | None = None,
    inputs: Inputs | None = None,
) -> Learner:
    """Load a model and its tokenizer, and ask it.

    Args:
        source, dtype, device: see `load_model`.
        max_length: records of so many tokens are of interest.
        observer: hears what is left alone.
        inputs: a loaded model and its tokenizer in place of the named ones.

    Raises:
        ModelError: they cannot be loaded, or the model cannot be tuned on text; see `probe`.
        InvalidValueError: torch cannot use the device here.
    """
    given, watch = inputs or Inputs(), observer or Nobody()
    tokenizer = given.tokenizer or load_tokenizer(source)
    model = load_model(source, dtype, device) if given.model is None else given.model
    traits = probe(model, _ordinary_ids(tokenizer), max_length or USUAL_LENGTH)
    entries = named_parameters(model) if traits.idle else []
    idle = [e.name for e in entries if e.name in traits.idle and not is_quantised(e.parameter)]  # of those `bind` tells
    if idle:
        watch.note(f"left alone: {len(idle)} tensors on which no loss on text depends, such as {idle[0]}")
    if (other := _other_ends(tokenizer, model)) is not None:
        watch.note(f"{WARNING}{source}: {other}")
    if not traits.pads:
        watch.note("padding would change this model's losses: records of one length share a pass")
    return Learner(source, model, tokenizer, traits)


def _other_ends(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> str | None:
    """Where the tokenizer ends a text with another token than the model's configuration says: in what they differ."""
    own, named = tokenizer.eos_token_id, sorted(end_ids(model))
    if own is None or not named or own in named:
        return None
    known = ", ".join(repr(tokenizer.convert_ids_to_tokens(i)) for i in named[:3] if i < len(tokenizer))
    return (
        f"its tokenizer ends a text with {tokenizer.eos_token!r} ({own}), its config with {known or 'an id beyond it'} "
        f"({', '.join(map(str, named[:3]))}): responses are taught the tokenizer's; if that is wrong, mend eos_token in "
        "tokenizer_config.json"
    )


def _ordinary_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids from all over the vocabulary, without those that mean something of their own."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ids = sorted(set(tokenizer.get_vocab().values()) - special)
    # more of them than are asked with: some may be beyond the embedding
    return ids[:: max(1, len(ids) // (4 * TOKENS))]
