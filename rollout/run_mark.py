"""What marks everything that one run starts or creates, so that all of it can be found after any death.

    driver: RLHF_RUN_ID in its environment --inherited--> raylet, workers, engines; part of shared names

Owns: the variable and what names in shared memory start with. Not finding and removing: pipeline.janitor.
"""

import os

RUN_ID_VARIABLE = "RLHF_RUN_ID"
"""Set by the driver for all processes it starts."""
WEIGHTS_PREFIX = "rlhf-weights-"


def weights_prefix() -> str:
    """What the names of this run's weight directories start with."""
    run_id = os.environ.get(RUN_ID_VARIABLE)
    return WEIGHTS_PREFIX if run_id is None else f"{WEIGHTS_PREFIX}{run_id}-"
