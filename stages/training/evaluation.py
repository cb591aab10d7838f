"""Measures of a finished language model that several stages report. Owns: perplexity."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from stages.training.forwards import logprobs_in_packs
from stages.training.trainable import Judge

MICRO_BATCH_SIZE = 8  # documents per forward; a matter of memory, never of the result


def perplexity(judge: Judge, documents: Sequence[np.ndarray], *, device: torch.device) -> float:
    """exp of the mean negative log-prob per token over `documents` (each of 2 or more ids; the first is
    given).
    """
    ids = [document.tolist() for document in documents]
    logprobs = logprobs_in_packs(
        judge,
        [document[:1] for document in ids],
        [document[1:] for document in ids],
        temperature=1.0,
        micro_batch_size=MICRO_BATCH_SIZE,
        device=device,
    )
    total = sum(float(values.double().sum()) for values in logprobs)
    return math.exp(-total / sum(len(values) for values in logprobs))
