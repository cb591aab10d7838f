"""Plain transformers behind the engine protocol: slow, small and readable. What the vLLM engine is checked
against.

    submit --batches of max_num_seqs--> one worker thread: prefill, then token by token --> Rollouts

Owns: sampling by the letter of `Sampling`, one generator per request. Does not own: speed. The event loop is
never blocked: all tensors live on the worker thread. Tensor shapes: B sequences, T prompt tokens (padded
left), V vocabulary.
"""

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, TypeVar

import torch
import transformers.utils.logging
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from rollout.api import Diagnosis, FinishReason, Rollout, RolloutRequest, WeightUpdate
from rollout.config import EngineConfig
from rollout.errors import EngineError, WeightSyncError
from rollout.loop import before_deadline
from rollout.weight_file import DTYPES, Layout, checkpoint_layout, fetch_tensors, load_verified
from rollout.weight_source import ModuleSource

T = TypeVar("T")

ATTENTION = "eager"
"""Each architecture's own formula. Torch's sdpa leaves out gemma2's softcap and gpt-oss's sinks, in silence;
what it would save in time and memory does not matter here.
"""


class HFEngine:
    """One transformers model in the caller's process. Use it on the event loop that opened it."""

    def __init__(
        self, model: PreTrainedModel, *, layout: Layout, config: EngineConfig, max_model_len: int, name: str
    ) -> None:
        self._model = model
        self._layout = layout
        self._config = config
        self._max_model_len = max_model_len
        self._name = name
        self._version = 0  # the weights of the model directory
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        # set: given up; the worker thread looks before every token
        self._in_flight: dict[str, threading.Event] = {}
        self._running = asyncio.Event()
        self._running.set()
        self._closed = False

    @classmethod
    async def open(
        cls, config: EngineConfig, *, model_dir: Path, dtype: str, max_model_len: int, name: str
    ) -> Self:
        """Load `model_dir` (version 0) on the GPU if torch sees one, else on the CPU."""
        layout = checkpoint_layout(model_dir, dtype=dtype)
        try:
            model = await before_deadline(
                asyncio.to_thread(_load, model_dir, dtype),
                timeout_s=config.start_timeout_s,
                what=f"{name}: start",
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise EngineError(f"{name} did not start: {error}") from error
        return cls(model, layout=layout, config=config, max_model_len=max_model_len, name=name)

    async def submit(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        """See `RolloutEngine.submit`. Requests that arrive while the engine is paused wait for `resume`."""
        self._check_open()
        self._check_lengths(requests)
        given_up = {request.request_id: threading.Event() for request in requests}
        assert len(given_up) == len(requests) and not given_up.keys() & self._in_flight.keys(), (
            "ids are unique"
        )
        self._in_flight |= given_up
        try:
            return await before_deadline(
                self._generate(requests, given_up),
                timeout_s=self._config.generate_timeout_s,
                what=f"{self._name}: {len(requests)} rollouts",
            )
        finally:
            for request_id, event in given_up.items():
                event.set()
                del self._in_flight[request_id]

    async def abort(self, request_ids: Sequence[str]) -> None:
        """See `RolloutEngine.abort`."""
        self._check_open()
        self._give_up(self._in_flight.keys() & set(request_ids))

    async def pause(self) -> None:
        """See `RolloutEngine.pause`. There is nothing to clear: keys and values live as long as their
        batch.
        """
        self._check_open()
        self._running.clear()
        self._give_up(self._in_flight)
        await self._on_worker(lambda: None, "pause")  # runs after the batch that was being decoded

    async def update(self, update: WeightUpdate) -> None:
        """See `RolloutEngine.update`."""
        assert not self._running.is_set(), "update() only between pause() and resume()"
        try:
            await self._on_worker(lambda: self._load_update(update), "weight update")
        except WeightSyncError as error:
            raise WeightSyncError(f"{self._name}: {error}; rebuild this engine") from error
        self._version = update.version

    async def resume(self) -> None:
        """See `RolloutEngine.resume`."""
        self._check_open()
        self._running.set()

    async def diagnose(self, update: WeightUpdate) -> Diagnosis:
        """See `RolloutEngine.diagnose`."""
        return await self._on_worker(
            lambda: _diagnosis(self._model, update, timeout_s=self._config.sync_timeout_s), "diagnosis"
        )

    async def version(self) -> int:
        """See `RolloutEngine.version`. The process that decodes is this one."""
        self._check_open()
        return self._version

    async def close(self) -> None:
        """See `RolloutEngine.close`."""
        if self._closed:
            return
        self._closed = True
        self._give_up(self._in_flight)
        self._running.set()
        await asyncio.to_thread(self._worker.shutdown)

    async def _generate(
        self, requests: Sequence[RolloutRequest], given_up: Mapping[str, threading.Event]
    ) -> list[Rollout]:
        """Whole batches, one after another; concurrent calls take turns."""
        await self._running.wait()
        self._check_open()
        rollouts: list[Rollout] = []
        size = self._config.max_num_seqs
        for start in range(0, len(requests), size):
            batch = requests[start : start + size]
            rollouts += await asyncio.get_running_loop().run_in_executor(
                self._worker, self._decode, batch, given_up
            )
        return rollouts

    def _decode(
        self, batch: Sequence[RolloutRequest], given_up: Mapping[str, threading.Event]
    ) -> list[Rollout]:
        return decode(
            self._model,
            batch,
            max_model_len=self._max_model_len,
            version=self._version,
            is_aborted=lambda request_id: given_up[request_id].is_set(),
        )

    def _give_up(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._in_flight[request_id].set()

    def _load_update(self, update: WeightUpdate) -> None:
        """Through transformers' own checkpoint loading, so that in-memory layouts that differ are its
        business.
        """
        tensors = load_verified(update, self._layout, timeout_s=self._config.sync_timeout_s)
        # it adopts the tensors it is given
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        with _no_progress_bar():
            model = type(self._model).from_pretrained(
                None,
                config=self._model.config,
                state_dict=copies,
                dtype=DTYPES[self._layout.dtype],
                attn_implementation=ATTENTION,
            )
        self._model = model.to(self._model.device).eval()  # type: ignore[arg-type]  # hidden overload

    async def _on_worker(self, work: Callable[[], T], what: str) -> T:
        self._check_open()
        return await before_deadline(
            asyncio.get_running_loop().run_in_executor(self._worker, work),
            timeout_s=self._config.sync_timeout_s,
            what=f"{self._name}: {what}",
        )

    def _check_lengths(self, requests: Sequence[RolloutRequest]) -> None:
        for request in requests:
            if not 0 < len(request.prompt_ids) < self._max_model_len:
                raise EngineError(
                    f"{self._name}: request {request.request_id} has {len(request.prompt_ids)} prompt "
                    f"tokens; 1 to {self._max_model_len - 1} leave room for a response"
                )

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError(f"{self._name}: closed")


@dataclass(slots=True, kw_only=True)
class _Row:
    """One response in the making."""

    request: RolloutRequest
    max_tokens: int
    uniforms: list[float]  # one draw per token: a response depends on no other row of its batch
    response_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @classmethod
    def start(cls, request: RolloutRequest, *, max_model_len: int) -> Self:
        max_tokens = min(request.sampling.max_tokens, max_model_len - len(request.prompt_ids))
        generator = torch.Generator().manual_seed(request.sampling.seed)
        draws = torch.rand(max_tokens, generator=generator, dtype=torch.float64)
        return cls(request=request, max_tokens=max_tokens, uniforms=draws.tolist())

    def take(self, token: int, logprob: float) -> None:
        self.response_ids.append(token)
        self.logprobs.append(logprob)
        if token in self.request.sampling.stop_token_ids:
            self.finish_reason = "stop"
        elif len(self.response_ids) == self.max_tokens:
            self.finish_reason = "length"

    def rollout(self, version: int) -> Rollout:
        assert self.finish_reason is not None
        return Rollout(
            request_id=self.request.request_id,
            prompt_ids=self.request.prompt_ids,
            response_ids=tuple(self.response_ids),
            logprobs=tuple(self.logprobs),
            finish_reason=self.finish_reason,
            weight_versions=(version,) * len(self.response_ids),
            seed=self.request.sampling.seed,
        )


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    requests: Sequence[RolloutRequest],
    *,
    max_model_len: int,
    version: int,
    is_aborted: Callable[[str], bool],
) -> list[Rollout]:
    """One batch to its end. `is_aborted(request_id)` is asked before every token."""
    rows = [_Row.start(request, max_model_len=max_model_len) for request in requests]
    tokens_BT, attention_BT = _left_padded(requests, device=model.device)
    cache = DynamicCache(config=model.config)
    live = rows
    while live:
        logits_BV = _next_logits(model, tokens_BT, attention_BT, cache)
        for row, logits_V in zip(live, logits_BV, strict=True):
            _advance(row, logits_V, aborted=is_aborted(row.request.request_id))
        keep = [index for index, row in enumerate(live) if row.finish_reason is None]
        if keep and len(keep) < len(live):
            cache.batch_select_indices(torch.tensor(keep, device=model.device))
            attention_BT = attention_BT[keep]
        live = [live[index] for index in keep]
        tokens_BT = torch.tensor([[row.response_ids[-1]] for row in live], device=model.device)
        attention_BT = torch.cat([attention_BT[: len(live)], attention_BT.new_ones(len(live), 1)], dim=1)
    return [row.rollout(version) for row in rows]


def _left_padded(
    requests: Sequence[RolloutRequest], *, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(len(request.prompt_ids) for request in requests)
    tokens = [[0] * (length - len(request.prompt_ids)) + list(request.prompt_ids) for request in requests]
    attention = [
        [0] * (length - len(request.prompt_ids)) + [1] * len(request.prompt_ids) for request in requests
    ]
    return torch.tensor(tokens, device=device), torch.tensor(attention, device=device)


def _next_logits(
    model: PreTrainedModel, tokens_BT: torch.Tensor, attention_BT: torch.Tensor, cache: DynamicCache
) -> torch.Tensor:
    """float32 logits (B, V) of the token after `tokens_BT`, on the CPU; `attention_BT` covers the cache
    too.
    """
    positions_BT = (attention_BT.cumsum(1) - 1).clamp(min=0)[:, -tokens_BT.shape[1] :]
    output = model(
        input_ids=tokens_BT,
        attention_mask=attention_BT,
        position_ids=positions_BT,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1].float().cpu()


def _advance(row: _Row, logits_V: torch.Tensor, *, aborted: bool) -> None:
    if aborted:
        row.finish_reason = "abort"
        return
    temperature = row.request.sampling.temperature
    logprobs_V = torch.log_softmax(logits_V if temperature == 0 else logits_V / temperature, dim=-1)
    token = (
        int(logprobs_V.argmax())
        if temperature == 0
        else _inverse_cdf(logprobs_V, row.uniforms[len(row.response_ids)])
    )
    row.take(token, float(logprobs_V[token]))


def _inverse_cdf(logprobs_V: torch.Tensor, uniform: float) -> int:
    """The token whose interval of the cumulative distribution holds `uniform` in [0, 1); never one of
    probability 0.
    """
    cdf_V = logprobs_V.double().exp().cumsum(0)
    return int(torch.searchsorted(cdf_V, uniform * cdf_V[-1], right=True).clamp(max=len(cdf_V) - 1))


def _load(model_dir: Path, dtype: str) -> PreTrainedModel:
    torch.set_float32_matmul_precision("highest")  # no TF32, whatever the environment says
    with _no_progress_bar():
        model = AutoModelForCausalLM.from_pretrained(
            model_dir,
            dtype=DTYPES[dtype],
            attn_implementation=ATTENTION,
            use_safetensors=True,
            trust_remote_code=False,
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval()  # type: ignore[arg-type]  # hidden overload


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers draws one for every load, and there is one load per sync."""
    enabled = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers.utils.logging.enable_progress_bar()


def _diagnosis(model: PreTrainedModel, update: WeightUpdate, *, timeout_s: float) -> Diagnosis:
    """See `RolloutEngine.diagnose`. Every tensor can be compared: both sides are transformers' models."""
    sent = fetch_tensors(update, timeout_s=timeout_s)
    held = ModuleSource(model, dtype=update.tensors[0].dtype).whole()
    differing = tuple(
        name for name, tensor in sent.items() if name not in held or not torch.equal(held[name].cpu(), tensor)
    )
    return Diagnosis(differing=differing, not_compared=(), num_same=len(sent) - len(differing))
