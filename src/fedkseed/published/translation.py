"""The published flags as settings of a simulation."""

import argparse
from pathlib import Path
from typing import Any

from fedkseed.data import read_examples
from fedkseed.errors import ConfigError
from fedkseed.runs.settings import SimulationConfig, build

NATURAL_INSTRUCTIONS = Path("data/natural-instructions-2.8")
DOLLY = Path("data/databricks-dolly-15k.jsonl")
MIN_PARTITION_SIZE = 10
"""Records that every client of a Dirichlet partition has in the published code."""


def translate(args: argparse.Namespace) -> SimulationConfig:
    """The settings that do what the published flags say.

    Raises:
        ConfigError: a flag that cannot be honoured or is out of its range; the message names it.
        DataError: Dolly cannot be read.
    """
    if args.weight_decay != 0:
        raise ConfigError(
            f"--weight_decay is {args.weight_decay}; expected 0: the tuned model is the base plus a sum over seeds, "
            "and a decayed base is no such sum (the published code decays once per seed at every replay)"
        )
    settings = {
        "algorithm": "fedkseed-pro" if args.bias_sampling else "fedkseed",
        "model": args.model,
        "num_rounds": args.rounds,
        "fraction_train": args.m,
        "local_steps": args.local_step,
        "local_unit": "epochs" if args.batch_or_epoch == "epoch" else "steps",
        "batch_size": args.batch_size,
        "max_length": args.max_length,
        "long_prompts": "drop",
        "lr": args.lr,
        "eps": args.zo_eps,
        "num_seeds": args.K,
        "noise": args.noise,
        "aggregator": "mean",
        "weighting": "equal" if args.equal_weight else "examples",
        "loss_clip": args.grad_clip if args.grad_clip > 0 else None,
        "importance_clip": args.bias_loss_clip,
        **({"importance_start": args.grad_initial} if args.bias_sampling else {}),
        "eval_limit": "all" if args.eval_limit is None else args.eval_limit,
        "seed": args.seed,
        **_precision(args.device),
    }
    return build(settings | (_dolly(args) if args.dataset == "dolly" else _natural_instructions(args)))


def _precision(gpu: int) -> dict[str, Any]:
    """The published code's GPU and half precision; where there is no GPU, the CPU, which is slow at half precision."""
    import torch

    return {"device": f"cuda:{gpu}", "dtype": "float16"} if torch.cuda.is_available() else {}


def _natural_instructions(args: argparse.Namespace) -> dict[str, Any]:
    if not NATURAL_INSTRUCTIONS.is_dir():
        raise ConfigError(
            f"--dataset instruct needs {NATURAL_INSTRUCTIONS}; unpack Natural Instructions v2.8 there, or link to it"
        )
    return {"data": NATURAL_INSTRUCTIONS, "partition": "client", "template": "alpaca" if args.use_prompts else "bare"}


def _dolly(args: argparse.Namespace) -> dict[str, Any]:
    if not DOLLY.is_file():
        raise ConfigError(f"--dataset dolly needs {DOLLY}; put Dolly-15K there, or link to it")
    categories = sorted({example.category for example in read_examples(DOLLY)})
    if not 0 <= args.zerotask < len(categories):
        named = ", ".join(f"{i} {name}" for i, name in enumerate(categories))
        raise ConfigError(f"--zerotask is {args.zerotask}; expected the number of a category: {named}")
    return {
        "data": DOLLY,
        "subsample": args.dataset_subsample,
        "held_out_category": categories[args.zerotask],
        "num_clients": args.num_clients,
        "template": "dolly",
        **_partition(args.iid),
    }


def _partition(iid: str) -> dict[str, Any]:
    if not iid.startswith("dir"):
        return {"partition": "iid"}
    try:
        alpha = float(iid[3:])
    except ValueError:
        raise ConfigError(f"--iid is {iid!r}; expected dir and a number, such as dir0.5, or iid") from None
    return {"partition": "dirichlet", "alpha": alpha, "min_partition_size": MIN_PARTITION_SIZE}
