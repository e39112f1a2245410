"""Natural Instructions v2.8 in its own folder layout, by the published rules: one training task is one client.

The folder has `splits/default/{train,test}_tasks.txt` and `tasks/*.json` (Wang et al., 2022, arXiv:2204.07705). The rules
are those of the published FedKSeed code.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from fedkseed.data.example import Example
from fedkseed.data.values import checked, kind, once
from fedkseed.errors import DataError
from fedkseed.randomness import generator

MIN_INSTANCES = 20
TRAIN_SHARE, TEST_SHARE = 0.2, 0.02
SPLITS = Path("splits/default")


def is_natural_instructions(path: Path) -> bool:
    """Whether a folder has this layout."""
    return (path / SPLITS / "train_tasks.txt").is_file()


def read_tasks(
    folder: Path,
    split: Literal["train", "test"],
    max_chars: int,
    seed: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Example]:
    """A sample of a split's tasks; an example's category is its task's name, its client that name's number, such as task033.

    Of each task, instances whose input has fewer than `max_chars` characters count. Training tasks with fewer than 20 of
    them are left out, of the others 20 % are drawn. Of test tasks 2 % are drawn, at least 20 and at most all. The
    instruction is the task's first definition, the response the first of an instance's outputs.

    Args:
        folder: as above.
        split: which tasks.
        max_chars: see above (the published code takes its `max_length` for it).
        seed: draws the instances of each task, whichever other tasks there are.
        on_progress: hears how many of the tasks are read.

    Raises:
        DataError: a split or task file is missing or broken, a task without instances, or no task is left; the message
            names the file.
    """
    names = _names(folder / SPLITS / f"{split}_tasks.txt")
    examples: list[Example] = []
    for number, name in enumerate(names, start=1):
        path = folder / "tasks" / f"{name}.json"
        instruction, instances = _read_task(path, folder / SPLITS / f"{split}_tasks.txt")
        short = [instance for instance in instances if len(instance[0]) < max_chars]
        if split == "train":
            size = int(TRAIN_SHARE * len(short)) if len(short) >= MIN_INSTANCES else 0
        else:
            size = min(len(short), max(MIN_INSTANCES, int(TEST_SHARE * len(short))))
        draw = generator(seed, "natural instructions", split, name)
        for i in sorted(draw.choice(len(short), size, replace=False).tolist()) if size else ():
            examples.append(
                Example(instruction, short[i][0], short[i][1], name, client=name.partition("_")[0], where=str(path))
            )
        if on_progress is not None:
            on_progress(number, len(names))
    if not examples:
        raise DataError(
            f"{folder}: no {split} task has enough instances with inputs under {max_chars} characters; raise --max-length"
        )
    return examples


def _names(path: Path) -> list[str]:
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected the list of tasks of this split") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); restore the file") from None
    if not names:
        raise DataError(f"{path}: no tasks; expected one name a line, such as task033_winogrande_answer_generation")
    return list(dict.fromkeys(names))


def _read_task(path: Path, split: Path) -> tuple[str, list[tuple[str, str]]]:
    """A task's definition, and its instances as (input, first output)."""
    try:
        task = json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=once)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file, though {split} names the task; restore it or take its line out") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected a task file") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); restore the file") from None
    if not isinstance(task, dict):
        raise DataError(f"{path}: {kind(task)}; expected an object with 'Definition' and 'Instances'")
    definition, instances = task.get("Definition"), task.get("Instances")
    if not isinstance(definition, list) or not definition:
        raise DataError(f"{path}: field 'Definition' is no list of texts; expected the task's instruction in it")
    if not isinstance(instances, list) or not instances:
        raise DataError(f"{path}: no instances; expected a list of at least one under 'Instances'")
    return checked(definition[0], "Definition", str(path)), [
        _instance(item, f"{path}: instance {number}") for number, item in enumerate(instances, start=1)
    ]


def _instance(item: Any, where: str) -> tuple[str, str]:
    outputs = item.get("output") if isinstance(item, dict) else None
    if not isinstance(outputs, list) or not outputs:
        raise DataError(f"{where} lacks a list 'output' with a text in it; mend or delete the instance")
    return checked(item.get("input"), "input", where), checked(outputs[0], "output", where)
