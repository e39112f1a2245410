"""Cut Dolly-15K to short records of one category, with a shuffled-response control: what dev/LOG.md's runs are fed with.

    python dev/experiments/dolly_subset.py DOLLY.jsonl MODEL OUT [--category classification] [--max-tokens 96]

Writes OUT/train.jsonl, OUT/shuffled.jsonl (the same prompts, responses dealt out among them) and OUT/held-out.jsonl.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from fedkseed.data import Example, encode, read_examples, shuffle_responses, split_off
from fedkseed.models.loading import load_tokenizer
from fedkseed.randomness import generator


def write(path: Path, examples: Sequence[Example]) -> None:
    lines = (
        json.dumps({"instruction": e.instruction, "input": e.input, "output": e.output, "category": e.category})
        for e in examples
    )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("dolly", type=Path)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--category", default="classification")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--held-out", type=int, default=60)
    args = parser.parse_args()
    examples = [e for e in read_examples(args.dolly) if args.category in ("all", e.category)]
    encoded = encode(examples, load_tokenizer(args.model), 100_000)
    short = [
        examples[i] for i, item in zip(encoded.kept, encoded.examples, strict=True) if len(item.input_ids) <= args.max_tokens
    ]
    train, held_out = split_off(len(short), args.held_out / len(short), generator(0, "dolly subset"))
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = [short[i] for i in train]
    write(args.out / "train.jsonl", chosen)
    write(args.out / "shuffled.jsonl", shuffle_responses(chosen, generator(0, "control")))
    write(args.out / "held-out.jsonl", [short[i] for i in held_out])
    print(f"{len(train)} training and {len(held_out)} held-out records in {args.out}")


if __name__ == "__main__":
    main()
