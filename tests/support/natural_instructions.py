"""Folders in the layout of Natural Instructions, and how much the published rules take of them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

Split = Literal["train", "test"]


def task(lengths: Sequence[int], name: str = "") -> dict[str, Any]:
    """A task with inputs of these lengths, all unlike."""
    instances = [
        {"id": f"{name}-{i}", "input": f"{i:03}".ljust(n, "x")[:n], "output": [f"{name} {i}", "another answer"]}
        for i, n in enumerate(lengths)
    ]
    return {"Definition": [f"Do {name}.", "Otherwise."], "Categories": ["Tests"], "Instances": instances}


def write_folder(folder: Path, train: Mapping[str, Any], test: Mapping[str, Any] | None = None) -> Path:
    """A folder in the layout of Natural Instructions; tasks are as `task` makes them, or any JSON."""
    tasks = {"train": train, "test": {"task900_test": task([10] * 30, "test")} if test is None else test}
    (folder / "splits/default").mkdir(parents=True)
    (folder / "tasks").mkdir()
    for split, of_split in tasks.items():
        (folder / f"splits/default/{split}_tasks.txt").write_text("".join(name + "\n" for name in of_split))
        for name, content in of_split.items():
            (folder / f"tasks/{name}.json").write_text(json.dumps(content))
    return folder


def published_sizes(folder: Path, split: Split, max_chars: int) -> dict[str, int]:
    """How many instances the published rules take of each task."""
    sizes = {}
    for name in (folder / f"splits/default/{split}_tasks.txt").read_text().split():
        content = json.loads((folder / f"tasks/{name}.json").read_text())
        n = sum(len(instance["input"]) < max_chars for instance in content["Instances"])
        if split == "train":
            sizes[name] = n // 5 if n >= 20 else 0
        else:
            sizes[name] = n if n < 20 else max(20, n // 50)
    return {name: size for name, size in sizes.items() if size}


def in_words(content: dict[str, Any]) -> dict[str, Any]:
    """A task of which the tiny model's tokenizer leaves something."""
    for i, instance in enumerate(content["Instances"]):
        instance |= {"input": f"name the dog {i}", "output": ["red blue"[: 3 + 5 * (i % 2)]]}
    return content
