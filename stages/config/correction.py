"""`ppo.rollout_correction:` - weights for what an engine computes differently. Light import."""

import math
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field, model_validator

from rollout.ground.section import Section

CorrectionType = Literal[
    "off", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """A rollout correction as it is in force, with every default filled in."""

    type: CorrectionType
    min_weight: float  # 0: none; truncation caps from above only
    max_weight: float  # inf: none

    def __str__(self) -> str:
        low = f", min {self.min_weight:g}" if self.min_weight > 0 else ""
        return self.type + low + (f", max {self.max_weight:g}" if math.isfinite(self.max_weight) else "")


_CORRECTIONS = (
    Correction(type="off", min_weight=0.0, max_weight=math.inf),
    Correction(type="token_truncate", min_weight=0.0, max_weight=2.0),
    Correction(type="token_mask", min_weight=0.5, max_weight=5.0),
    Correction(type="sequence_truncate", min_weight=0.0, max_weight=2.0),
    Correction(type="sequence_mask", min_weight=0.5, max_weight=5.0),
    Correction(type="geometric_mask", min_weight=0.99, max_weight=1.01),
)


CORRECTIONS = {correction.type: correction for correction in _CORRECTIONS}
"""Each type with its limits where the config gives none. 2: TRL and verl; 0.5 to 5: IcePop (arXiv
2510.18855).
"""


class RolloutCorrectionConfig(Section):
    """`ppo.rollout_correction:` - weights on the policy loss: the probability of what an engine sampled under
    the trainer over that under the engine.
    """

    type: Literal["auto", CorrectionType] = "auto"
    """What is compared, and what happens to weights beyond the limits. Compared are tokens, whole responses
    (`sequence`: the product over their tokens) or the geometric mean over a response's tokens; `truncate`
    lowers a weight to max, `mask` makes it 0 (the tokens stay in the count). `auto`: token_truncate where
    precision is bf16 or rollout.max_staleness is above 0, else off.
    """
    max: float | None = Field(default=None, ge=1)
    """Largest weight; absent: 2 (truncate), 5 (mask) or 1.01 (geometric_mask)."""
    min: float | None = Field(default=None, ge=0, le=1)
    """Smallest weight, for masks only; absent: 0.5, or 0.99 (geometric_mask)."""

    def in_force(self, *, default: CorrectionType) -> Correction:
        """With the limits filled in, and `default` for auto."""
        preset = CORRECTIONS[default if self.type == "auto" else self.type]
        return Correction(
            type=preset.type,
            min_weight=preset.min_weight if self.min is None else self.min,
            max_weight=preset.max_weight if self.max is None else self.max,
        )

    @model_validator(mode="after")
    def _limits_apply(self) -> Self:
        if self.type in ("auto", "off") and (self.max is not None or self.min is not None):
            raise ValueError(
                f"type {self.type} takes no max and no min; remove them, or set type to one of "
                f"{', '.join(kind for kind in CORRECTIONS if kind != 'off')}"
            )
        if self.type in ("token_truncate", "sequence_truncate") and self.min is not None:
            raise ValueError(
                f"min {self.min:g} has no meaning with type {self.type}: truncation caps weights from above "
                f"only; remove min, or use type {self.type.replace('truncate', 'mask')}"
            )
        limits = self.in_force(default="off")
        if not limits.min_weight < limits.max_weight:
            raise ValueError(
                f"min {limits.min_weight:g} is not below max {limits.max_weight:g}, so that no weight is "
                "within them; raise max or lower min"
            )
        return self
