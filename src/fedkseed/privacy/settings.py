"""What whoever adds the noise has chosen."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from fedkseed.privacy.mechanism import Mechanism

DELTA = 1e-5
"""Where none is given."""
WITHHELD = 1
"""What a private client says its number of records is."""
Unit = Literal["record", "client"]
ClipNorm = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NoiseMultiplier: TypeAlias = Annotated[float, Field(ge=0, le=1e6)]
Delta = Annotated[float, Field(gt=0, lt=1)]
Epsilon = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Privacy(BaseModel):
    """A choice of differential privacy.

    Attributes:
        unit: whose presence is hidden: a `record`'s, or a whole `client`'s.
        clip_norm: longest vector that one unit contributes to a release, by the Euclidean norm.
        noise_multiplier: the noise's standard deviation over the clip norm; 0 adds none and promises nothing.
        delta: at which epsilon is counted.
        epsilon: the budget; None: none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    unit: Unit
    clip_norm: ClipNorm
    noise_multiplier: NoiseMultiplier
    delta: Delta = DELTA
    epsilon: Epsilon | None = None

    @property
    def mechanism(self) -> Mechanism:
        """What clips and adds noise, with bytes of the operating system."""
        return Mechanism(self.clip_norm, self.noise_multiplier)
