"""Names of tensors in few bytes: those of all layers at once, and the layers' numbers as ranges (docs/federation.md).

A model of 30 layers of which few tensors are tuned has hundreds of frozen ones, whose names would be larger than the K numbers:
`model.layers.0.input_layernorm.weight` to `model.layers.29.input_layernorm.weight` are `model.layers.#.input_layernorm.weight`
with `0-29`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

NUMBER = re.compile(r"(?:^|(?<=\.))(?:0|[1-9][0-9]{0,8})(?=\.|$)")
"""A part of a name that is a number, as `str` writes it."""
RANGE = re.compile(r"(0|[1-9][0-9]{0,8})(?:-([1-9][0-9]{0,8}))?")
PLACE = "#"


def folded(names: Sequence[str]) -> dict[str, str] | None:
    """Names by what they are without their first number, and these numbers; "" for a name without one.

    Args:
        names: sorted, none twice.

    Returns:
        None where that would not say which they are.
    """
    if any(PLACE in name for name in names) or list(names) != sorted(set(names)):
        return None
    numbers: dict[str, list[int]] = {}
    for name in names:
        found = NUMBER.search(name)
        pattern = name if found is None else f"{name[: found.start()]}{PLACE}{name[found.end() :]}"
        numbers.setdefault(pattern, []).extend([] if found is None else [int(found[0])])
    return {pattern: _ranges(sorted(each)) for pattern, each in numbers.items()}


def unfolded(patterns: Any, most: int) -> list[str]:
    """The names, sorted.

    Args:
        patterns: what `folded` gave, or a stranger.
        most: how many names there may be; more are refused before they are made.

    Raises:
        ValueError: it is nothing that `folded` gives.
    """
    if not isinstance(patterns, dict):
        raise ValueError("folded names are no table")
    spans = {pattern: _spans(pattern, ranges) for pattern, ranges in patterns.items()}
    count = sum(sum(last - first + 1 for first, last in each) if each else 1 for each in spans.values())
    if count > most:
        raise ValueError(f"{count:,} names are folded, of a model of {most:,} tensors")
    names: list[str] = []
    for pattern, each in spans.items():
        numbers = [number for first, last in each for number in range(first, last + 1)]
        names += [pattern.replace(PLACE, str(number)) for number in numbers] if each else [pattern]
    if folded(sorted(names)) != patterns:
        raise ValueError("names are folded in another way than they would be")
    return sorted(names)


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers as `0-29` or `0,2-4`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def _spans(pattern: Any, ranges: Any) -> list[tuple[int, int]]:
    if not isinstance(pattern, str) or not isinstance(ranges, str) or pattern.count(PLACE) != bool(ranges):
        raise ValueError(f"folded names {pattern!r:.40}: {ranges!r:.40}")
    spans = []
    for part in ranges.split(",") if ranges else []:
        found = RANGE.fullmatch(part)
        if found is None or int(found[2] or found[1]) < int(found[1]):
            raise ValueError(f"folded names {pattern!r:.40} have numbers {ranges!r:.40}")
        spans.append((int(found[1]), int(found[2] or found[1])))
    return spans
