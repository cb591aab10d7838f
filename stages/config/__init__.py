"""Every knob of every stage: documented, bounded, with its one default. Light import: pydantic only.

    ExperimentConfig (pipeline) --settings_of(stage)--> XxxSettings --> recipe

There is one file per section of the YAML. What several sections share has a file of its own: `data`
(datasets), `score` (the scoring function), `model`, `training`, `sampling`, `stage`. A recipe receives its
`XxxSettings`: the sections that it may read and no others, so that what is read is what is fingerprinted.
"""
