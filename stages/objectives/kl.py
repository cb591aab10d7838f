"""KL between two policies, estimated from samples, and the coefficient that weighs it.

    policy_, reference_logprobs --k1 | k2 | k3--> per token --sum--> nats per response --controller--> beta

Owns: Schulman's three estimators, the KL of a response, the fixed and the adaptive coefficient. Does not own:
where the KL enters. Placement decides what is optimised: k1 in the reward (`advantages.token_rewards`) and k2
on the log-ratio of the sequence as a loss (`losses.sequence_kl_loss`) have pi* proportional to pi_ref exp(r /
beta) as their optimum; per-token k2 or k3 as a loss (`losses.kl_surrogate_loss`) has another one.

Legend: B sequences, T response tokens. All KLs are in nats, of KL(policy || reference) on the policy's own
samples.
Source: Schulman, "Approximating KL Divergence" (2020), http://joschu.net/blog/kl-approx.html.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol, Self

from torch import Tensor

from stages.objectives.logprobs import bounded_exp
from stages.objectives.masked import check_mask, zero_masked

KlEstimator = Literal["k1", "k2", "k3"]

ADAPTIVE_ERROR_CLIP = 0.2  # largest relative error one update reacts to (Ziegler et al. 2019, section 2.2)


def k1(*, policy_logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """log(policy / reference): unbiased, any sign. Same shapes in and out."""
    return _log_ratio(policy_logprobs, reference_logprobs).to(policy_logprobs.dtype)


def k2(*, policy_logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """log(policy / reference)^2 / 2: biased, >= 0; the expected gradient on whole sequences is the KL's."""
    return (_log_ratio(policy_logprobs, reference_logprobs).square() / 2).to(policy_logprobs.dtype)


def k3(*, policy_logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """r - 1 - log r, r = reference / policy: unbiased, >= 0; linear beyond MAX_LOG_RATIO, so finite."""
    log_ratio = _log_ratio(policy_logprobs, reference_logprobs)
    return (bounded_exp(-log_ratio) - 1 + log_ratio).to(policy_logprobs.dtype)


def estimate_kl(*, estimator: KlEstimator, policy_logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """The estimator of that name, element by element. ValueError for another name."""
    estimators = {"k1": k1, "k2": k2, "k3": k3}
    if estimator not in estimators:
        raise ValueError(f"no KL estimator {estimator!r}; there are {', '.join(estimators)}")
    return estimators[estimator](policy_logprobs=policy_logprobs, reference_logprobs=reference_logprobs)


def sequence_log_ratio(
    *, policy_logprobs_BT: Tensor, reference_logprobs_BT: Tensor, mask_BT: Tensor
) -> Tensor:
    """log(policy / reference) of whole responses [B], nats: k1 summed over the tokens of `mask_BT`."""
    check_mask(
        mask=mask_BT, policy_logprobs_BT=policy_logprobs_BT, reference_logprobs_BT=reference_logprobs_BT
    )
    return zero_masked(values=policy_logprobs_BT - reference_logprobs_BT, mask=mask_BT).sum(-1)


class KlController(Protocol):
    """Where `kl_coef` comes from. Immutable: `updated` returns the next controller."""

    @property
    def coef(self) -> float:
        """beta now in force."""

    def updated(self, *, kl: float, num_sequences: int) -> Self:
        """The controller after a batch of `num_sequences` responses (all ranks); `kl`: mean nats of one."""

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint must hold; the settings come from the config."""

    def restored(self, state: Mapping[str, float]) -> Self:
        """This controller with the state of a checkpoint. KeyError if it lacks one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedKl:
    """beta stays as configured."""

    coef: float  # beta, score units per nat

    def __post_init__(self) -> None:
        _check_coef(self.coef)

    def updated(self, *, kl: float, num_sequences: int) -> Self:
        return self

    def state_dict(self) -> dict[str, float]:
        return {}

    def restored(self, state: Mapping[str, float]) -> Self:
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveKl:
    """beta follows a target KL: beta *= 1 + clip(kl / target - 1, +-0.2) * num_sequences / horizon.

    Source: Ziegler et al. 2019 (arXiv 1909.08593), section 2.2; the form with a horizon is that of its code.
    Example: AdaptiveKl(coef=0.1, target=6.0, horizon=10000).updated(kl=12.0, num_sequences=500).coef == 0.101
    """

    coef: float  # beta, score units per nat
    target: float  # nats per response
    horizon: float  # responses over which a persistent error of 20 % moves beta by about 20 %

    def __post_init__(self) -> None:
        _check_coef(self.coef)
        if not (self.target > 0 and self.horizon > 0):
            raise ValueError(f"target and horizon must be > 0, got {self.target} and {self.horizon}")

    def updated(self, *, kl: float, num_sequences: int) -> Self:
        error = min(max(kl / self.target - 1, -ADAPTIVE_ERROR_CLIP), ADAPTIVE_ERROR_CLIP)
        return replace(self, coef=self.coef * (1 + error * num_sequences / self.horizon))

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def restored(self, state: Mapping[str, float]) -> Self:
        return replace(self, coef=state["coef"])


def _log_ratio(policy_logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """In float64: k3 near 0 is the difference of two numbers that agree to its square."""
    if policy_logprobs.shape != reference_logprobs.shape:
        shapes = f"{tuple(policy_logprobs.shape)} and {tuple(reference_logprobs.shape)}"
        raise ValueError(f"log-probs of one set of tokens have shapes {shapes}")
    return policy_logprobs.double() - reference_logprobs.double()


def _check_coef(coef: float) -> None:
    if not coef >= 0:
        raise ValueError(f"the KL coefficient must be >= 0, got {coef}")
