"""The rollout service's records and its protocol: token ids in; token ids, log-probs and the weight version
out.

    RolloutRequest --submit--> RolloutEngine --> Rollout
    WeightUpdate   --update--> RolloutEngine         (between pause and resume)

Owns: what travels between a trainer and an engine. Text-free: nothing here knows a tokenizer. No torch at
import time.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, Self

from rollout.ground.errors import in_a_line

FinishReason = Literal["stop", "length", "abort"]
LogprobsOf = Callable[[Sequence[tuple[int, ...]], Sequence[tuple[int, ...]], float], list[list[float]]]
"""(prompt_ids, response_ids, temperature) -> log-probs of each response's tokens by the trainer's model, in
nats.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one response is drawn. Nothing else may change the distribution: an engine applies no hidden
    defaults.

    Example: Sampling(temperature=1.0, max_tokens=32, stop_token_ids=(2,), seed=7)
    """

    temperature: float  # > 0 samples softmax(logits / temperature); 0 is greedy
    max_tokens: int  # response tokens at most, a stop token included
    stop_token_ids: tuple[
        int, ...
    ]  # generation ends after any of these; the token itself is kept in the response
    seed: int  # in [0, 2^63), of this request alone: whatever runs beside it, the response is the same

    def __post_init__(self) -> None:
        """Refuse what an engine would change: vLLM raises temperatures below 0.01 and refuses them above
        2.
        """
        if not (self.temperature == 0 or 0.01 <= self.temperature <= 2):
            raise ValueError(f"temperature {self.temperature}: use 0 (greedy) or 0.01 to 2")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens {self.max_tokens}: at least 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed}: use 0 to 2^63 - 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRequest:
    """One prompt to continue."""

    request_id: str  # unique among the requests in flight
    prompt_ids: tuple[int, ...]  # as rendered by the caller; the engine adds nothing (no BOS)
    sampling: Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled response.

    Example: Rollout(request_id="s3-p17", prompt_ids=(5, 9), response_ids=(11, 2), logprobs=(-0.7, -0.1),
                     finish_reason="stop", weight_versions=(3, 3), seed=7)
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]  # T tokens, the stop token included when there was one
    logprobs: tuple[
        float, ...
    ]  # T, nats, under the distribution sampled from (temperature applied); greedy: at 1
    finish_reason: (
        FinishReason  # "stop": a stop token; "length": max_tokens; "abort": given up, not for training
    )
    weight_versions: tuple[int, ...]  # T, the weights that drew each token
    seed: int


def to_record(rollout: Rollout) -> dict[str, Any]:
    """A rollout as JSON types; `from_record` gives the same one back, every float to the bit."""
    return asdict(rollout)


def from_record(record: Mapping[str, Any]) -> Rollout:
    """The rollout behind `to_record`, whether or not it went through JSON, which knows no tuples."""
    values: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in record.items()}
    return Rollout(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor of a weight update, under its checkpoint name."""

    name: str  # as in the model directory's safetensors, e.g. "model.layers.0.mlp.up_proj.weight"
    dtype: str  # "float32" | "bfloat16"
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the update
    digest: str  # blake3 of the bytes, hex


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdate:
    """All weights of one version: where their bytes can be had, and what those have to be."""

    version: int
    location: (
        str  # path of a file both sides can map; gloo://host:port/secret; nccl:world size:id of the group
    )
    tensors: tuple[TensorSpec, ...]
    receiver: int = 0  # which engine of the pool this is for: ranks of an nccl group are counted by it


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What comparing every tensor of an update with what an engine holds has shown.

    Example: Diagnosis(differing=("model.norm.weight",), not_compared=("lm_head.weight (split over 2 GPUs)",))
    """

    differing: tuple[str, ...]  # checkpoint names of tensors that the engine does not hold bit for bit
    not_compared: tuple[str, ...]  # "name (reason)": what could not be read out of the engine
    num_same: int = field(default=0, compare=False)  # tensors that were found to be equal

    @property
    def shows_nothing(self) -> bool:
        """Whether no tensor at all was compared."""
        return not self.differing and not self.num_same

    @classmethod
    def failed(cls, error: Exception, names: Iterable[str] = ("all weights",)) -> Self:
        """Of a comparison of `names` that gave no result because of `error`."""
        reason = in_a_line(error)
        return cls(differing=(), not_compared=tuple(f"{name} ({reason})" for name in names))


def joined_diagnosis(parts: Iterable[Diagnosis]) -> Diagnosis:
    """What any of several engines or workers found, every name once."""
    found = list(parts)
    return Diagnosis(
        differing=tuple(dict.fromkeys(name for one in found for name in one.differing)),
        not_compared=tuple(dict.fromkeys(name for one in found for name in one.not_compared)),
        num_same=sum(one.num_same for one in found),
    )


class RolloutEngine(Protocol):
    """Request-level and asynchronous. Every call has a deadline (EngineConfig) and raises EngineError beyond
    it.
    """

    async def submit(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        """Generate for all of `requests`, concurrently with other calls; results in the order of the
        requests.
        """

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Give up on requests in flight: they end with finish_reason "abort". Unknown ids are ignored."""

    async def pause(self) -> None:
        """Stop decoding, abort what is in flight and clear every cache of keys and values. Idempotent."""

    async def update(self, update: WeightUpdate) -> None:
        """Replace all weights and take `update.version`. Only while paused. WeightSyncError: rebuild this
        engine.
        """

    async def resume(self) -> None:
        """Decode again after `pause`."""

    async def diagnose(self, update: WeightUpdate) -> Diagnosis:
        """Compare every tensor of `update` with what the engine computes with now. Changes nothing."""

    async def version(self) -> int:
        """The weight version in force: a real round trip to the process that decodes, so also the health
        check.
        """

    async def close(self) -> None:
        """Release processes and memory. Idempotent."""
