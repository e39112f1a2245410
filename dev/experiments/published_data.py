"""A `data` folder for `main.py` as the published code wants it, with the responses in place or shuffled (the control).

    python dev/experiments/published_data.py SOURCE OUT [--shuffle]

SOURCE has databricks-dolly-15k.jsonl and natural-instructions-2.8. Shuffled are the responses of training records, each
within its category or task, so that what answers look like stays and only what they answer is lost. Test tasks and, of
Dolly, the category that the published runs hold out stay as they are.
"""

import argparse
import json
from pathlib import Path

from fedkseed.data import Example, shuffle_responses
from fedkseed.randomness import generator

HELD_OUT = "summarization"
DOLLY, INSTRUCTIONS = "databricks-dolly-15k.jsonl", "natural-instructions-2.8"
SPLITS = "splits/default"


def shuffled(outputs: list, purpose: str) -> list:
    """The outputs, none in its own place."""
    places = [Example("", "", str(i), "") for i in range(len(outputs))]
    return [outputs[int(example.output)] for example in shuffle_responses(places, generator(0, "published control", purpose))]


def shuffle_dolly(source: Path, out: Path) -> None:
    records = [json.loads(line) for line in source.read_text(encoding="utf-8").split("\n") if line.strip()]
    for category in sorted({record["category"] for record in records} - {HELD_OUT}):
        own = [record for record in records if record["category"] == category]
        for record, response in zip(own, shuffled([record["response"] for record in own], category), strict=True):
            record["response"] = response
    out.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def shuffle_instructions(source: Path, out: Path) -> None:
    (out / "tasks").mkdir(parents=True)
    (out / SPLITS).mkdir(parents=True)
    for split in ("train", "test"):
        names = (source / SPLITS / f"{split}_tasks.txt").read_text(encoding="utf-8")
        (out / SPLITS / f"{split}_tasks.txt").write_text(names, encoding="utf-8")
        for name in names.split():
            task = json.loads((source / "tasks" / f"{name}.json").read_text(encoding="utf-8"))
            if split == "train":
                outputs = shuffled([instance["output"] for instance in task["Instances"]], name)
                for instance, output in zip(task["Instances"], outputs, strict=True):
                    instance["output"] = output
            (out / "tasks" / f"{name}.json").write_text(json.dumps(task), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shuffle", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    for name, shuffle in ((DOLLY, shuffle_dolly), (INSTRUCTIONS, shuffle_instructions)):
        if args.shuffle:
            shuffle(args.source / name, args.out / name)
        else:
            (args.out / name).symlink_to((args.source / name).resolve())


if __name__ == "__main__":
    main()
