"""Win rates and how sure one may be of them. Owns: the percentile bootstrap over prompts.

Legend: N prompts, S resamples.
"""

import torch
from torch import Tensor


def bootstrap_interval(*, outcomes_N: Tensor, num_samples: int, seed: int) -> tuple[float, float]:
    """95 % percentile interval of the mean of `outcomes_N` (1 win, 0.5 tie, 0 loss), resampling prompts.

    Source: Efron & Tibshirani 1993, chapter 13.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(outcomes_N)
    draws_SN = torch.randint(count, (num_samples, count), generator=generator)
    means_S = outcomes_N.double()[draws_SN].mean(-1)
    low, high = torch.quantile(means_S, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
