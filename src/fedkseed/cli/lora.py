"""`fedkseed lora`: an adapter's folder to start from, the same bits wherever it is made (docs/adapter.md)."""

from __future__ import annotations

from pathlib import Path

from fedkseed.baselines import fresh_lora
from fedkseed.cli.console import say, say_command
from fedkseed.cli.display import Lines, waiting
from fedkseed.cli.export import public_name
from fedkseed.cli.outputs import require_new
from fedkseed.errors import ConfigError
from fedkseed.files import placed
from fedkseed.kseed.card import ADAPTER_FIELD, head_of
from fedkseed.models.adapter_folder import has_adapter
from fedkseed.models.loading import load_model, load_tokenizer, save_model
from fedkseed.models.lora import seed_lora

CARD = """\
---
{head}
---

# A LoRA adapter to start from

Rank {rank}, alpha {alpha}, all linear layers of {base}. Its random factors are drawn from key {key} (`fedkseed lora`), the
others are zero: it changes nothing yet.
"""
MOST = 14
"""The proposed number of seeds is a power of two, no more than the adapter's numbers, with at most this exponent."""


def lora(model: str, output: Path, rank: int, key: int) -> None:
    """Write a folder with a LoRA adapter over all linear layers, alpha twice the rank, that changes nothing yet.

    Args:
        model: the base model.
        output: the folder to make.
        rank: of the adapter.
        key: what its random factors are drawn from.

    Raises:
        ConfigError: peft is not installed, the model is an adapter already, or the rank is beyond its matrices'.
        RunFolderError: the output exists.
        FedKSeedError: the model cannot be loaded, or the folder cannot be written.
    """
    require_new(output)
    folder = placed(model)
    with waiting(Lines().note, f"loading {model}"):
        base, tokenizer = load_model(model), load_tokenizer(model)
    if has_adapter(base):  # as a hub's name may have one
        raise ConfigError(f"{model} is an adapter already, so it can be --model as it is; give its base model for a new one")
    widest = max((min(p.shape) for p in base.parameters() if p.dim() == 2), default=0)
    if rank > widest:
        raise ConfigError(f"--rank is {rank} and no matrix of {model} has a rank above {widest}; give at most that")
    adapted = fresh_lora(base, rank, str(folder.resolve()) if folder.is_dir() else model)
    seed_lora(adapted, key)
    named = public_name(model)
    fields = {"base_model": named, ADAPTER_FIELD: f"fedkseed lora {named} start --rank {rank} --key {key}"}
    card = CARD.format(head=head_of(fields), rank=rank, alpha=2 * rank, base=named, key=key)
    save_model(adapted, tokenizer, output, card, save_embedding_layers=False)
    numbers = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    say(f"{output}: an adapter of {numbers:,} numbers for {model}, rank {rank}, factors from key {key}")
    say("Its matrices are what K numbers move:")
    size = 1 << min(numbers.bit_length() - 1, MOST)
    say_command(
        (
            *("fedkseed", "simulate", "--model", output, "--data", "YOUR.jsonl", "--algorithm", "fedkseed-grad"),
            *("--local-optimizer", "adam", "--lr", "auto", "--num-seeds", size, "--wire", "int4"),
        )
    )
