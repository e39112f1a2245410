"""A choice of privacy whose noise can be chosen too."""

from dataclasses import dataclass
from typing import Any, Literal

from fedkseed.privacy import Mechanism, Source
from tests.support.entropy import Bytes


@dataclass(frozen=True)
class Chosen:
    """What a client asks of `fedkseed.privacy.Privacy`."""

    unit: Literal["record", "client"]
    mechanism: Mechanism


def chosen(unit: Literal["record", "client"], clip_norm: float, noise: float = 0.0, source: Source | None = None) -> Any:
    """Without noise, unless some is asked for."""
    return Chosen(unit, Mechanism(clip_norm, noise, source or Bytes("private")))
