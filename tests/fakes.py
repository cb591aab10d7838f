"""Stand-ins for what is distributed or slow: they keep the contract, so a test that passes on one means
something.
"""

import asyncio
import math
import random
from collections.abc import Sequence

from rollout.api import Diagnosis, FinishReason, Rollout, RolloutRequest, WeightUpdate
from rollout.errors import EngineError


class FakeEngine:
    """A `RolloutEngine` whose model is a table: the next token depends on the last one alone. No tensors, no
    processes.

    Weight updates change its version and nothing else; they are kept in `updates`.
    """

    def __init__(
        self, *, vocab_size: int = 32, seed: int = 0, token_seconds: float = 0.0, max_model_len: int = 1024
    ) -> None:
        draw = random.Random(seed)
        self.updates: list[WeightUpdate] = []
        self._logits = [[draw.gauss(0.0, 1.5) for _ in range(vocab_size)] for _ in range(vocab_size)]
        self._token_seconds = token_seconds
        self._max_model_len = max_model_len
        self._version = 0
        self._in_flight: set[str] = set()
        self._aborted: set[str] = set()
        self._running = asyncio.Event()
        self._running.set()
        self._closed = False

    async def submit(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        self._check_open()
        for request in requests:
            if len(request.prompt_ids) >= self._max_model_len:
                raise EngineError(f"fake: {request.request_id}: its prompt fills the context")
        return list(await asyncio.gather(*(self._generate(request) for request in requests)))

    async def abort(self, request_ids: Sequence[str]) -> None:
        self._check_open()
        self._aborted |= self._in_flight & set(request_ids)

    async def pause(self) -> None:
        self._check_open()
        self._running.clear()
        self._aborted |= self._in_flight
        while self._in_flight:
            await asyncio.sleep(0.001)

    async def update(self, update: WeightUpdate) -> None:
        self._check_open()
        assert not self._running.is_set(), "update() only between pause() and resume()"
        self.updates.append(update)
        self._version = update.version

    async def resume(self) -> None:
        self._check_open()
        self._running.set()

    async def diagnose(self, update: WeightUpdate) -> Diagnosis:
        held = {spec.name: spec.digest for spec in self.updates[-1].tensors} if self.updates else {}
        differing = tuple(
            spec.name for spec in update.tensors if spec.name not in held or held[spec.name] != spec.digest
        )
        return Diagnosis(differing=differing, not_compared=())

    async def version(self) -> int:
        self._check_open()
        return self._version

    async def close(self) -> None:
        self._closed = True
        self._aborted |= self._in_flight
        self._running.set()

    def logprobs(self, token: int, temperature: float) -> list[float]:
        """Of every next token after `token`, in nats."""
        scaled = [logit / (1.0 if temperature == 0 else temperature) for logit in self._logits[token]]
        top = max(scaled)
        log_total = top + math.log(sum(math.exp(value - top) for value in scaled))
        return [value - log_total for value in scaled]

    async def _generate(self, request: RolloutRequest) -> Rollout:
        await self._running.wait()
        self._in_flight.add(request.request_id)
        try:
            return await self._decode(request)
        finally:
            self._in_flight.discard(request.request_id)
            self._aborted.discard(request.request_id)

    async def _decode(self, request: RolloutRequest) -> Rollout:
        draw = random.Random(request.sampling.seed)
        tokens: list[int] = []
        logprobs: list[float] = []
        reason: FinishReason | None = None
        while reason is None:
            await asyncio.sleep(self._token_seconds)
            if request.request_id in self._aborted:
                reason = "abort"
                continue
            row = self.logprobs((request.prompt_ids + tuple(tokens))[-1], request.sampling.temperature)
            token = _choose(row, draw.random(), greedy=request.sampling.temperature == 0)
            tokens.append(token)
            logprobs.append(row[token])
            reason = _reason(tokens, request, self._max_model_len)
        return Rollout(
            request_id=request.request_id,
            prompt_ids=request.prompt_ids,
            response_ids=tuple(tokens),
            logprobs=tuple(logprobs),
            finish_reason=reason,
            weight_versions=(self._version,) * len(tokens),
            seed=request.sampling.seed,
        )

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("fake: closed")


def _choose(logprobs: Sequence[float], uniform: float, *, greedy: bool) -> int:
    if greedy:
        return max(range(len(logprobs)), key=logprobs.__getitem__)
    total = 0.0
    for token, logprob in enumerate(logprobs):
        total += math.exp(logprob)
        if uniform < total:
            return token
    return len(logprobs) - 1


def _reason(tokens: Sequence[int], request: RolloutRequest, max_model_len: int) -> FinishReason | None:
    if tokens[-1] in request.sampling.stop_token_ids:
        return "stop"
    longest = min(request.sampling.max_tokens, max_model_len - len(request.prompt_ids))
    return "length" if len(tokens) == longest else None
