"""The four published commands on a model of this machine's size, each with its shuffled control, before and after.

    OMP_NUM_THREADS=1 python dev/experiments/published_runs.py --model MODEL --data SOURCE --work WORK

SOURCE is as for published_data.py. Every run goes on where it was when this is started again; a finished one is skipped.
WORK/runs/NAME is a run of main.py, and WORK/NAME.json what `fedkseed evaluate` makes of it. What is scaled down from the
published commands is in SCALE and --local_step; the learning rate is one that moves a model of 135M parameters (the
published 3e-7 is for 1.3B and 3B), and the noise is hadamard (gaussian took three quarters of a round's time here).
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCALE = [
    "--rounds", "4", "--max_length", "256", "--lr", "0.000005", "--eval_limit", "48", "--eval_metric", "loss",
    "--noise", "hadamard",
]  # fmt: skip
INSTRUCT = ["--use_prompts", "--dataset", "instruct", "-K", "1024", "-m", "0.05", "--local_step", "10"]
DOLLY = [
    "--use_prompts", "--dataset", "dolly", "--iid", "dir0.5", "--num_clients", "200", "-K", "1024", "-m", "0.05",
    "--local_step", "5",
]  # fmt: skip
COMMANDS = {
    "instruct": INSTRUCT,
    "dolly": DOLLY,
    "instruct-pro": ["--bias_sampling", *INSTRUCT],
    "dolly-pro": ["--bias_sampling", *DOLLY],
}
DATASETS = ("instruct", "dolly")
ANSWERS = "48"


def run(name: str, flags: list[str], data: Path, work: Path, model: str) -> None:
    logs = work / "runs" / name
    scores = work / f"{name}.json"
    if scores.exists():
        return
    started = sorted(logs.glob("*/config.yaml"))
    chosen = (
        ["--resume", str(started[0].parent)]
        if started
        else ["--model", model, *flags, *SCALE, "--log", "--log_root", str(logs)]
    )
    subprocess.run([sys.executable, str(ROOT / "main.py"), *chosen], cwd=data.parent, check=True)
    (folder,) = {path.parent for path in logs.glob("*/config.yaml")}
    evaluate = ["evaluate", str(folder), "--answers", ANSWERS, "--by-category", "--output", str(scores)]
    subprocess.run([str(Path(sys.executable).parent / "fedkseed"), *evaluate], check=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    work, model = args.work.resolve(), str(Path(args.model).resolve())
    folders = {"": work / "real" / "data", "-shuffled": work / "control" / "data"}
    for suffix, folder in folders.items():
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            script = ROOT / "dev/experiments/published_data.py"
            subprocess.run([sys.executable, script, args.data, folder, *(["--shuffle"] if suffix else [])], check=True)
    for name in (
        "instruct",
        "instruct-shuffled",
        "dolly",
        "dolly-shuffled",
        *(f"{n}-pro{s}" for s in folders for n in DATASETS),
    ):
        suffix = "-shuffled" if name.endswith("-shuffled") else ""
        run(name, COMMANDS[name.removesuffix(suffix)], folders[suffix], work, model)


if __name__ == "__main__":
    main()
