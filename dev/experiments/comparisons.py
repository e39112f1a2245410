"""The comparisons of docs/results.md: cut the data to files that are quick to read, then `fedkseed compare` each.

    OMP_NUM_THREADS=1 python dev/experiments/comparisons.py --data SHARED --models MODELS --work WORK [NAME ...] [--jobs 2]

SHARED holds databricks-dolly-15k.jsonl and natural-instructions-2.8, MODELS the folders stories260k and smollm2; the demo's
model and tasks come along. WORK gets data/ and a folder for each comparison. NAMEs are of dev/experiments/comparisons/*.toml;
all of them without. Started again, it goes on. Table, numbers and curves are copied to results/runs/NAME, the settings,
metrics and scores of all runs into one archive there.

With --kept a comparison that WORK does not have begins with the runs of that archive, and only what the plan has beyond them
is done: a method or a seed more, or the table anew.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import tomli_w
from archive import RAW, pack, said, unpack

from fedkseed import demo
from fedkseed.data import Example, read_examples, read_tasks, split_off
from fedkseed.randomness import generator

ROOT = Path(__file__).resolve().parents[2]
PLANS = Path(__file__).with_suffix("")
HELD_OUT = 200
PER_TASK = {"train": 40, "test": 20}
MAX_CHARS = 400
DEMO = "demo-model"
MODELS = ("stories260k", "smollm2")
LORA = "smollm2-lora"


def write(path: Path, examples: Sequence[Example]) -> None:
    fields = ("instruction", "input", "output", "category", "client")
    path.write_text("".join(json.dumps({name: getattr(e, name) for name in fields}) + "\n" for e in examples), encoding="utf-8")


def cut_dolly(source: Path, out: Path) -> None:
    examples = [e for e in read_examples(source) if len(e.instruction) + len(e.input) < MAX_CHARS]
    train, held_out = split_off(len(examples), HELD_OUT / len(examples), generator(0, "comparison"))
    write(out / "dolly-train.jsonl", [examples[i] for i in train])
    write(out / "dolly-held-out.jsonl", [examples[i] for i in held_out])


def cut_tasks(source: Path, out: Path) -> None:
    for split, number in PER_TASK.items():
        examples = read_tasks(source, split, MAX_CHARS, 0)
        tasks: dict[str, list[Example]] = {}
        for example in examples:
            tasks.setdefault(example.category, []).append(example)
        chosen = []
        for name in sorted(tasks):
            draw = generator(0, "comparison", name).choice(len(tasks[name]), min(number, len(tasks[name])), replace=False)
            chosen += [tasks[name][i] for i in sorted(draw.tolist())]
        write(out / f"tasks-{split}.jsonl", chosen)


def cut_demo(out: Path) -> None:
    train = [replace(example, client=name) for name, own in demo.clients(0).items() for example in own]
    write(out / "demo-train.jsonl", train)
    write(out / "demo-held-out.jsonl", demo.held_out(0))


def make_lora(base: Path, out: Path) -> None:
    """An adapter of rank 8 over all linear layers, the same bits on every machine."""
    subprocess.run([sys.executable, "-m", "fedkseed", "lora", base, out, "--rank", "8", "--key", "7"], check=True)


def keep(folder: Path, kept: Path, data: Path) -> None:
    """Copy what is small; this machine's folders are taken out of the settings."""
    places = {str(data.resolve()) + "/": "", str(folder) + "/": ""} | {
        str((data / model).resolve()): model for model in (*MODELS, LORA, DEMO)
    }
    files = {}
    for file in folder.rglob("*"):
        if file.name in ("config.toml", "metrics.jsonl", "scores.json", "comparison.json", "table.md", "failed.txt"):
            text = file.read_text(encoding="utf-8")
            for place, name in places.items():
                text = text.replace(place, name)
            files[file.relative_to(folder).as_posix()] = text.encode()
    kept.mkdir(parents=True, exist_ok=True)
    table, numbers = files.pop("table.md"), files.pop("comparison.json")
    pack(files, kept / RAW)
    (kept / "table.md").write_bytes(table + said(kept / RAW).encode())
    (kept / "comparison.json").write_bytes(numbers)
    for picture in folder.glob("*.png"):
        shutil.copy(picture, kept / picture.name)


def take(kept: Path, folder: Path, data: Path) -> None:
    """The runs that are kept, with this machine's folders in their settings again."""
    unpack(kept / RAW, folder)
    for file in folder.rglob("config.toml"):
        settings = tomllib.loads(file.read_text(encoding="utf-8"))
        for name in ("model", "data", "eval_data"):
            if name in settings:
                settings[name] = str((data / settings[name]).resolve())
        file.write_text(tomli_w.dumps(settings), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--jobs", default="2")
    parser.add_argument("--kept", action="store_true", help="begin with the runs of results/runs")
    args = parser.parse_args()
    data = args.work / "data"
    if not (data / DEMO).exists():
        data.mkdir(parents=True, exist_ok=True)
        cut_dolly(args.data / "databricks-dolly-15k.jsonl", data)
        cut_tasks(args.data / "natural-instructions-2.8", data)
        cut_demo(data)
        for model in MODELS:
            (data / model).symlink_to((args.models / model).resolve())
        (data / DEMO).symlink_to(demo.model_folder())
    for name in args.names or sorted(path.stem for path in PLANS.glob("*.toml")):
        folder, kept = (args.work / name).resolve(), ROOT / "results" / "runs" / name
        if LORA in (PLANS / f"{name}.toml").read_text(encoding="utf-8") and not (data / LORA).exists():
            make_lora(args.models / "smollm2", data / LORA)
        if args.kept and not folder.exists() and (kept / RAW).exists():
            take(kept, folder, data)
        command = [sys.executable, "-m", "fedkseed", "compare", PLANS / f"{name}.toml", "--output", folder, "--jobs", args.jobs]
        subprocess.run(command, cwd=data, check=True)
        keep(folder, kept, data)


if __name__ == "__main__":
    main()
