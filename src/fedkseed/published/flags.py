"""The published flags with their published defaults, and what to know of each."""

import argparse
from collections.abc import Sequence
from pathlib import Path

DESCRIPTION = """\
The published FedKSeed command line, run by fedkseed. Every call prints the `fedkseed simulate` command that does the same.
Data are expected in ./data/natural-instructions-2.8 and ./data/databricks-dolly-15k.jsonl."""


PUBLISHED = {
    "--num-rounds": "--rounds",
    "--fraction-train": "-m",
    "--num-clients": "--num_clients",
    "--local-steps": "--local_step",
    "--batch-size": "--batch_size",
    "--max-length": "--max_length",
    "--eps": "--zo_eps",
    "--num-seeds": "-K",
    "--loss-clip": "--grad_clip",
    "--importance-clip": "--bias_loss_clip",
    "--importance-start": "--grad_initial",
    "--subsample": "--dataset_subsample",
    "--alpha": "--iid's alpha",
    "--eval-limit": "--eval_limit",
}
"""What errors call a setting, and the published flag that it came from."""


def yes_or_no(text: str) -> bool:
    """The value of --use_prompts: `--use_prompts False` means no, which in the published code it does not."""
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is neither yes nor no; expected one of {', '.join(known)}")
    return known[text.lower()]


def given(arguments: Sequence[str] | None) -> set[str]:
    """Which flags a command line names, whatever their values."""
    p = parser()
    for action in p._actions:
        action.default = argparse.SUPPRESS
    return {*vars(p.parse_args(arguments))}


def parser() -> argparse.ArgumentParser:
    """The parser of `python main.py`."""
    p = argparse.ArgumentParser(
        prog="main.py", description=DESCRIPTION, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = p.add_argument
    add("--num_clients", type=int, default=200, help="N; for instruct it is the number of training tasks, whatever is given")
    add("-m", type=float, default=0.05, help="fraction of the clients in a round")
    add("--rounds", type=int, default=40, help="rounds of federated training")
    add("--local_step", type=int, default=200, help="tau: a client's steps in a round, or its epochs")
    add("--batch_or_epoch", choices=("epoch", "batch"), default="batch", help="what --local_step counts")
    add("--equal_weight", action="store_true", help="clients weigh the same, whatever they hold")
    add("--dataset", choices=("instruct", "dolly"), default="instruct", help="Natural Instructions or Dolly-15K")
    add(
        "--batch_size",
        type=int,
        default=1,
        help="records per step (beyond 1 the published evaluation scored one of each batch)",
    )
    add(
        "--max_length", type=int, default=1024,
        help="tokens of a record; in Natural Instructions also the characters that an input must be below",
    )  # fmt: skip
    add(
        "--use_prompts", type=yes_or_no, nargs="?", const=True, default=True, metavar="yes|no",
        help="Alpaca's prompt for Natural Instructions (Dolly always has its own)",
    )  # fmt: skip
    add("--iid", default="dir0.5", help="dirALPHA: Dirichlet over categories; anything else: equal random shares (dolly)")
    add("--zerotask", type=int, default=7, help="which Dolly category is held out, counted from 0 in alphabetical order")
    add("--dataset_subsample", type=float, default=1.0, help="fraction of Dolly's records to use")
    add("--model", default="datajuicer/LLaMA-1B-dj-refine-150B", help="a model folder or hub id")
    add(
        "--lr",
        type=float,
        default=1e-3,
        help="learning rate. The default is a trap: training diverges; published runs have 3e-7",
    )
    add("--weight_decay", type=float, default=0.0, help="only 0: decay cannot be written as a sum over seeds")
    add("--grad_clip", type=float, default=-100.0, help="drop a step whose losses differ by more; 0 or less: none")
    add("-K", type=int, default=4096, help="number of candidate seeds")
    add("--zo_eps", type=float, default=5e-4, help="half the distance of a step's two probes")
    add("--bias_sampling", action="store_true", help="FedKSeed-Pro")
    add("--bias_loss_clip", type=float, default=1000.0, help="largest gradient that counts in a seed's importance")
    add("--grad_initial", type=float, default=0.0, help="first entry of every seed's history")
    add("--device", type=int, default=0, help="GPU, with float16 weights; where there is none, the CPU with float32")
    add("--log", action="store_true", help="write config.yaml, results.json and final_eval.json")
    add("--log_root", type=Path, default=Path("logs"), help="where --log makes a folder")
    add("--seed", type=int, default=42, help="of everything random")
    add("--eval_metric", choices=("rouge", "loss"), default="rouge", help="of the evaluation after the last round")
    add("--save", action="store_true", help="write the tuned model as a model folder too; its ledger is always kept")
    ours = p.add_argument_group("beyond the published flags")
    ours.add_argument("--noise", choices=("gaussian", "hadamard"), default="gaussian", help="gaussian is the published one")
    ours.add_argument("--eval_limit", type=int, default=None, help="evaluate on a seeded draw of so many records")
    ours.add_argument("--resume", type=Path, default=None, metavar="FOLDER", help="go on with the run in this folder")
    return p
