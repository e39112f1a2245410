"""What a baseline tunes: all parameters, or adapters and soft prompts; the only module that imports peft."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Any

import torch

from fedkseed.baselines.checkpoint import TunedTensors
from fedkseed.baselines.parameters import fingerprint
from fedkseed.baselines.projected import parameters_of
from fedkseed.errors import ConfigError, ModelError, RunError, installing
from fedkseed.federation import FederationConfig
from fedkseed.federation.algorithms import Algorithm
from fedkseed.models.adapter_folder import has_adapter
from fedkseed.randomness import derive
from fedkseed.text import one_line

ENCODER_HIDDEN_SIZE = 128


def require_peft(algorithm: Algorithm) -> None:
    """Refuse an algorithm whose extra is not installed.

    Raises:
        ConfigError: it is not.
    """
    if algorithm.needs_peft:
        _require_peft(f"--algorithm {algorithm.name}")


def _require_peft(what: str) -> None:
    if find_spec("peft") is None:
        raise ConfigError(f"{what} needs an extra; install it with: {installing('baselines')}")


def attach(model: Any, config: FederationConfig) -> Any:
    """Make the parameters that the algorithm tunes the ones that require a gradient, adding them where they are new.

    An algorithm that adds none tunes those that require one already.

    LoRA goes where peft puts it for the model's architecture (for Llama the query and value projections). A soft prompt
    starts at the embeddings of tokens drawn from the vocabulary; p-tuning's goes through peft's encoder of two layers.
    New parameters are drawn from the run's seed; torch's own generator is left as it was.

    Args:
        model: a Hugging Face causal LM in eval mode.
        config: the algorithm and its settings.

    Returns:
        The model to train and evaluate: `model` itself, or with a soft prompt in front of it.

    Raises:
        ConfigError: the extra is missing.
        ModelError: peft cannot attach to this architecture, or there is an adapter already.
    """
    if not config.facts.needs_peft:
        return model
    if has_adapter(model):
        raise ModelError(
            f"--algorithm {config.algorithm} attaches something of its own, and the model has an adapter; give its base "
            "model, or an algorithm that tunes what is there, such as fedkseed-grad"
        )
    model.requires_grad_(False)
    require_peft(config.facts)
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(derive(config.seed, "adapter"))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for an attribute by its old name
                return _attach(model, config).eval()
        except (ValueError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{config.algorithm} cannot be attached to {type(model).__name__} ({one_line(error)}); "
                "choose another --algorithm, such as fedavg"
            ) from error


def restore(model: Any, config: FederationConfig, tuned: TunedTensors) -> Any:
    """A base model, whose parameters that are tuned require a gradient, with a baseline's tuned tensors; see `attach`.

    Raises:
        RunError: they are of another base model or algorithm.
        FedKSeedError: see `attach`; or the tensors are not those that the settings attach.
    """
    _check(model, config, tuned)
    attached = attach(model, config)
    parameters_of(attached, config).write(tuned.tensors)
    return attached


def adapter(model: Any, config: FederationConfig, tuned: TunedTensors, base: str) -> Any:
    """A base model with a baseline's adapter or soft prompt as a `peft.PeftModel`, to be saved.

    Args:
        model: the base model.
        config: of an algorithm that attaches something.
        tuned: its tensors.
        base: what the saved configuration calls the base model.

    Raises:
        RunError, FedKSeedError: see `restore`.
    """
    require_peft(config.facts)
    if config.facts.attaches == "lora":
        _check(model, config, tuned)
        attached = _wrapped(model, _lora(config)).eval()
        parameters_of(attached.base_model.model, config).write(tuned.tensors)
    else:
        attached = restore(model, config, tuned)
    return _named(attached, base)


def fresh_lora(model: Any, rank: int, base: str) -> Any:
    """A model wrapped by PEFT with a new LoRA adapter over all linear layers, alpha twice the rank.

    Args:
        model: the base model.
        rank: of the adapter.
        base: what the saved configuration calls the base model.

    Raises:
        ConfigError: peft is not installed.
        ModelError: peft cannot wrap this architecture.
    """
    _require_peft("a LoRA adapter")
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    try:
        return _named(_wrapped(model, config), base)
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{base}: peft can put no adapter over all its linear layers ({one_line(error)}); give another model"
        ) from error


def _wrapped(model: Any, config: Any) -> Any:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # as in `attach`
        return peft.get_peft_model(model, config)


def _named(attached: Any, base: str) -> Any:
    """With what the saved configuration calls the base model."""
    for saved in attached.peft_config.values():
        saved.base_model_name_or_path = base
    return attached


def _check(model: Any, config: FederationConfig, tuned: TunedTensors) -> None:
    if tuned.algorithm != config.algorithm or tuned.base != fingerprint(model):
        raise RunError(f"the tensors are of {tuned.algorithm} on another base model; load the one that the run started from")


def _lora(config: FederationConfig) -> Any:
    import peft

    return peft.LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=0.0, task_type="CAUSAL_LM")


def _attach(model: Any, config: FederationConfig) -> Any:
    import peft

    if config.facts.attaches == "lora":
        return peft.inject_adapter_in_model(_lora(config), model)
    prompt: Any
    if config.facts.attaches == "prompt":
        prompt = peft.PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=config.num_virtual_tokens, prompt_tuning_init="SAMPLE_VOCAB"
        )
    else:
        prompt = peft.PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=config.num_virtual_tokens, encoder_hidden_size=ENCODER_HIDDEN_SIZE
        )
    return peft.get_peft_model(model, prompt)
