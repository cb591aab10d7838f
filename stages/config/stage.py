"""What the settings of every stage hold. Light import: pydantic only."""

from rollout.config import EngineConfig
from rollout.ground.section import Section
from stages.config.model import ModelConfig


class StageSettings(Section):
    """What every recipe receives."""

    seed: int
    """Seed of the run; every generator is derived from it, the stage and the step."""
    model: ModelConfig

    @property
    def engines(self) -> EngineConfig | None:
        """The settings of the engines that the stage opens; None where it opens none."""
        return None
