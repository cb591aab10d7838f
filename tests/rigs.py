"""A rig: an engine beside the trainer's model that its weights come from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from fakes import FakeEngine
from forks import ENGINES
from transformers import AutoModelForCausalLM, PreTrainedModel

from rollout.api import Diagnosis, Rollout, RolloutEngine, RolloutRequest, Sampling
from rollout.config import EngineConfig
from rollout.engines import open_engine
from rollout.loop import LoopThread
from rollout.weight_source import ModuleSource
from rollout.weight_sync import WeightSync

CONFIG = EngineConfig(
    kv_cache_mib=64,
    max_num_seqs=32,
    start_timeout_s=120,
    generate_timeout_s=60,
    sync_timeout_s=30,
    parity_num_prompts=3,
    parity_max_tokens=12,
)
MAX_MODEL_LEN = 768
SAME = Diagnosis(differing=(), not_compared=())


@dataclass
class Rig:
    """An engine, its loop, and the model it is synced from. `oracle` gives log-probs in a way that no engine
    shares.
    """

    kind: str
    engine: RolloutEngine
    loop: LoopThread
    config: EngineConfig = CONFIG
    model: PreTrainedModel | None = None
    sync: WeightSync | None = None
    initial: dict[str, torch.Tensor] = field(default_factory=dict)
    version: int = 0

    def run(self, coroutine):
        return self.loop.run(coroutine, timeout_s=90, what="test")

    def submit(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        return self.run(self.engine.submit(requests))

    def sync_next(self) -> int:
        """Sync the model as it is now, under the next version."""
        self.version += 1
        self.sync.sync(self.version)
        return self.version

    def reset(self) -> None:
        """The initial weights again, synced."""
        if self.sync is not None:
            self.model.load_state_dict(self.initial)
            self.sync_next()

    def close(self) -> None:
        """End the engine and free what the sync holds."""
        self.run(self.engine.close())
        if self.sync is not None:
            self.sync.close()

    def oracle(self, rollout: Rollout, temperature: float = 1.0) -> list[float]:
        if isinstance(self.engine, FakeEngine):
            tokens = rollout.prompt_ids + rollout.response_ids
            start = len(rollout.prompt_ids)
            return [
                self.engine.logprobs(tokens[t - 1], temperature)[tokens[t]] for t in range(start, len(tokens))
            ]
        return logprobs_of(self.model, rollout.prompt_ids, rollout.response_ids, temperature)

    def max_diff(self, rollouts: Sequence[Rollout], temperature: float = 1.0) -> float:
        """Largest distance between the engine's log-probs and the model's, in nats."""
        return max(
            abs(a - b)
            for rollout in rollouts
            for a, b in zip(rollout.logprobs, self.oracle(rollout, temperature), strict=True)
        )


@torch.no_grad()
def logprobs_of(
    model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int], temperature: float
) -> list[float]:
    """One sequence, one forward, no cache, no padding."""
    tokens = torch.tensor([[*prompt, *response]])
    logits = model(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(1, tokens[0, len(prompt) :, None])[:, 0].tolist()


@torch.no_grad()
def perturb_all(model: torch.nn.Module, *, seed: int) -> None:
    """Every parameter, in all of its elements, by half its own size."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5 * parameter.abs().mean())


def request(
    index: int = 0,
    *,
    prompt: Sequence[int] = (7, 11, 13),
    name: str = "r",
    temperature: float = 1.0,
    max_tokens: int = 12,
    stop: Sequence[int] = (),
    seed: int | None = None,
) -> RolloutRequest:
    """A request whose id is `name`-`index`, seeded by its index unless told otherwise."""
    sampling = Sampling(
        temperature=temperature,
        max_tokens=max_tokens,
        stop_token_ids=tuple(stop),
        seed=index if seed is None else seed,
    )
    return RolloutRequest(request_id=f"{name}-{index}", prompt_ids=tuple(prompt), sampling=sampling)


def start_rig(
    kind: str, loop: LoopThread, model_dir: Path, log_dir: Path, *, max_model_len: int = MAX_MODEL_LEN
) -> Rig:
    """The trainer's model attends eagerly: softcaps and sinks are in it whatever an engine makes of them."""
    if kind == "fake":
        return Rig(kind=kind, engine=loop.run(_fake(), timeout_s=5, what="fake"), loop=loop)
    config = CONFIG.model_copy(update={"engine": "hf" if kind == "hf" else "vllm"})
    if kind == "actor":
        from rollout.pool import start_actor_engines

        engine = start_actor_engines(
            config, model_dir=model_dir, dtype="float32", max_model_len=max_model_len, log_dir=log_dir
        )
    else:
        opening = open_engine(
            config,
            model_dir=model_dir,
            dtype="float32",
            max_model_len=max_model_len,
            log_path=log_dir / "engine.log",
        )
        if kind == "vllm":
            _inspect_models_here()
        with ENGINES.forking():
            engine = loop.run(opening, timeout_s=150, what="start")
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    sync = WeightSync(ModuleSource(model, dtype="float32"), engine=engine, loop=loop, config=config)
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return Rig(kind=kind, engine=engine, loop=loop, config=config, model=model, sync=sync, initial=initial)


def _inspect_models_here() -> None:
    """vLLM looks at a model's class in a process of its own, to keep away from a GPU. That takes ten seconds
    for every architecture that its cache does not know, and here is no GPU.
    """
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda inspect: inspect()


async def _fake() -> FakeEngine:
    return FakeEngine(token_seconds=0.002, max_model_len=MAX_MODEL_LEN)
