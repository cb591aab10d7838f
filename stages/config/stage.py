"""What the settings of every stage hold. Light import: pydantic only."""

from rollout.ground.section import Section
from stages.config.model import ModelConfig


class StageSettings(Section):
    """What every recipe receives."""

    seed: int
    """Seed of the run; every generator is derived from it, the stage and the step."""
    model: ModelConfig
