"""An engine some PPO steps behind its trainer, in bf16: what log-probs tell of it, and what the tensors do.

python benchmarks/lagging_engine.py            rehearses on a tiny random model: the table's form, no more
python benchmarks/lagging_engine.py --input sft=DIR --input reward=DIR ppo.data.0.path=PROMPTS.jsonl

    N PPO steps, the weights of some kept --each synced into the engine--> it samples, the policy scores that
                                                             `--> its tensors are compared with the policy's

The settings are those of configs/smollm2_hh.yaml (bf16, a vLLM engine, 16 prompts of 48 tokens), its learning
rate schedule included; KEY=VALUE overrides them. Every lag samples the same prompts with the same seeds.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pipeline.config import load
from pipeline.identity import settings_for
from rollout.config import EngineConfig
from rollout.weight_source import ModuleSource
from rollout.weight_sync import WeightSync
from stages.config.model import ModelConfig
from stages.config.ppo import PPOSettings
from stages.config.prepare import PrepareConfig
from stages.data.chat.tokenizer import ChatTokenizer
from stages.data.corpus.vocabulary import tokenizer_for
from stages.engines import ENGINE_DTYPE, EngineClient, open_engines
from stages.rl.algorithms import algorithm_of
from stages.rl.experience import JudgedBatch, engine_differences, experiences_of
from stages.rl.roles import Judges, load_models
from stages.rl.source import SourcePlan, open_source, prompts_of
from stages.rl.update import Learner
from stages.runtime import Runtime, StageResources
from stages.training.distributed import Worker
from stages.training.health import Health
from stages.training.models import (
    ScoreNormaliser,
    build_causal_lm,
    full_state,
    reward_from_causal_lm,
    save_model,
)

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs/smollm2_hh.yaml"
DEMO = ROOT / "configs/demo"
DEFAULT_LIMIT = EngineConfig().parity_max_mean_ratio


class Snapshot(ModuleSource):
    """The weights of an earlier step, as they were sent to the engine."""

    def __init__(self, live: ModuleSource, path: Path) -> None:
        self.dtype = live.dtype
        self._path = path
        self._aliases = live.aliases()
        save_file({name: tensor.clone() for group in live.groups() for name, tensor in group.items()}, path)

    def groups(self) -> Iterator[dict[str, torch.Tensor]]:
        yield load_file(self._path)

    def aliases(self) -> dict[str, str]:
        return self._aliases


class Experiment:
    """A PPO trainer beside one engine, and what it takes to put the engine back in time."""

    def __init__(
        self, settings: PPOSettings, inputs: dict[str, Path], client: EngineClient, worker: Worker
    ) -> None:
        self._config = settings.ppo
        self.limit = settings.rollout.parity_max_mean_ratio
        self._chat = ChatTokenizer.load(inputs["sft"], settings.model.chat_template)
        self._plan = plan_of(settings, self._chat)
        self._client, self._worker = client, worker
        self._algorithm = algorithm_of(settings)
        self.models = load_models(
            self._algorithm,
            self._config,
            worker,
            policy_dir=inputs["sft"],
            reward_dir=inputs["reward"],
        )
        self._judges = Judges.of(
            self.models, self._algorithm, self._config, chat=self._chat, device=worker.device
        )
        self._learner = Learner(
            self.models.trained,
            self._algorithm.terms,
            self._config,
            seed=settings.seed,
            health=Health(self._config.health, worker.runtime),
        )
        self.live = self.models.policy.weights(dtype=ENGINE_DTYPE[self._config.precision])

    def sync_of(self, source: ModuleSource) -> WeightSync:
        client = self._client
        return WeightSync(
            source, engine=client.engine, loop=client.loop, config=client.config, host=client.host
        )

    def drawn(self, position: int, *, version: int) -> JudgedBatch:
        """The batch at `position`, by the `version` that the engine holds, and what the policy says of it."""
        with open_source(self._client, self._plan, runtime=self._worker.runtime) as source:
            batch = source.next(position, version, redraw=True)
        return self._judges.judge(batch.trajectories)

    def step(self, number: int) -> None:
        """One PPO step, on what the engine samples with the weights it was given last."""
        batch, kl_coef = self.drawn(number, version=number), self._config.kl_coef
        credited = self._algorithm.credit(batch, kl_coef=kl_coef)
        experiences = experiences_of(
            batch, credited, kl_coef=kl_coef, keeps_anchor=self._learner.keeps_anchor
        )
        self._learner.update(number, experiences)
        differences_N = engine_differences(batch)
        print(
            f"step {number + 1}: score {float(batch.scores_B.mean()):+.2f}, "
            f"engine - trainer {float(differences_N.mean()):.4f} on average, "
            f"{float(differences_N.max()):.2f} at most",
            flush=True,
        )


def measure(
    experiment: Experiment, *, steps: int, lags: Sequence[int], batches: int, directory: Path
) -> None:
    """Train, then one line of the table for each lag, judged by the default limit and the config's."""
    limits = sorted({DEFAULT_LIMIT, experiment.limit})
    kept: dict[int, Snapshot] = {}
    with_live = experiment.sync_of(experiment.live)
    for version in range(steps + 1):
        with_live.sync(version)
        if steps - version in lags:
            kept[steps - version] = Snapshot(experiment.live, directory / f"{version}.safetensors")
        if version < steps:
            experiment.step(version)
    print(
        "\n| steps behind | mean, nats | exp(mean) | max, nats | mean stops it at "
        + " | at ".join(f"{limit:g}" for limit in limits)
        + " | tensors that differ |\n"
        + "|---" * (5 + len(limits))
        + "|"
    )
    for lag in sorted(lags):
        sync = experiment.sync_of(kept[lag])
        sync.sync(steps)
        diffs = [
            engine_differences(experiment.drawn(steps + 1 + batch, version=steps)) for batch in range(batches)
        ]
        sync.close()
        print(line(lag, torch.cat(diffs), with_live, limits), flush=True)
    with_live.close()


def line(lag: int, diffs_N: torch.Tensor, with_live: WeightSync, limits: Sequence[float]) -> str:
    """What the gate sees of an engine that is `lag` steps behind."""
    mean = float(diffs_N.double().mean())
    told = ["yes" if not mean < math.log(limit) else "no" for limit in limits]
    found = with_live.diagnose()
    names = ", ".join(found.differing[:2]) + (", ..." if len(found.differing) > 2 else "")
    compared = f"{len(found.differing)}" + (f": {names}" if names else "")
    if found.not_compared:
        compared += f"; not compared: {len(found.not_compared)} ({found.not_compared[0]})"
    cells = [str(lag), f"{mean:.4f}", f"{math.exp(mean):.4f}", f"{float(diffs_N.max()):.2f}", *told, compared]
    return f"| {' | '.join(cells)} |"


def plan_of(settings: PPOSettings, chat: ChatTokenizer) -> SourcePlan:
    """The prompts as ppo reads them."""
    prompts, _ = prompts_of(settings, chat)
    return SourcePlan.of(settings, prompts, stop_token_ids=chat.stop_token_ids)


def tiny_inputs(directory: Path) -> dict[str, Path]:
    """A random sft model with wide distributions, and a random reward model on it."""
    model = ModelConfig(
        layers=4, hidden_size=64, intermediate_size=128, num_heads=2, num_kv_heads=1, context_length=256
    )
    chat = tokenizer_for(
        [(DEMO / "corpus.jsonl").read_text(encoding="utf-8")[:100_000]],
        PrepareConfig.model_construct(vocab_size=512, vocab_multiple=64),
        None,
    )
    torch.manual_seed(0)
    policy = build_causal_lm(
        model, vocab_size=len(chat.tokenizer), eos_token_id=chat.end_of_turn_id, pad_token_id=None
    )
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "norm" not in name:
                parameter.mul_(5)
    inputs = {stage: directory / stage for stage in ("sft", "reward")}
    for path in inputs.values():
        path.mkdir(parents=True)
        chat.save(path)
    save_model(policy, inputs["sft"], full_state(policy))
    scorer = reward_from_causal_lm(inputs["sft"], pad_token_id=chat.tokenizer.pad_token_id)
    save_model(scorer, inputs["reward"], full_state(scorer))
    ScoreNormaliser(mean=0.0, std=1.0).save(inputs["reward"])
    return inputs


def main() -> None:
    arguments = _parsed()
    with tempfile.TemporaryDirectory(prefix="lagging-engine-") as name:
        directory = Path(name)
        inputs, overrides = dict(arguments.input), list(arguments.overrides)
        if not inputs:
            inputs = tiny_inputs(directory)
            overrides = [
                f"ppo.data=[{{path: {DEMO}/prompts.jsonl}}]",
                "ppo.max_response_tokens=16",
                "rollout.kv_cache_mib=64",
                *overrides,
            ]
        settings = settings_for(load(CONFIG, overrides).config, "ppo")
        assert isinstance(settings, PPOSettings)
        runtime = Runtime(
            stage="ppo",
            work_dir=directory,
            log_dir=directory,
            resources=StageResources(),
            executor="inline",
            placement_timeout_s=60,
            collective_timeout_s=600,
            num_threads=os.cpu_count() or 1,
            stop_file=directory / "stop",
        )
        torch.set_num_threads(runtime.num_threads)
        worker = Worker(rank=0, world_size=1, device=torch.device("cpu"), runtime=runtime)
        with open_engines(
            settings.rollout,
            model_dir=inputs["sft"],
            dtype=ENGINE_DTYPE[settings.ppo.precision],
            max_model_len=settings.model.context_length,
            runtime=runtime,
        ) as client:
            measure(
                Experiment(settings, inputs, client, worker),
                steps=arguments.steps,
                lags=arguments.lags,
                batches=arguments.batches,
                directory=directory,
            )


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="settings that win over the config's"
    )
    parser.add_argument(
        "--input", action="append", default=[], type=_input, metavar="STAGE=DIR", help="sft and reward"
    )
    parser.add_argument("--steps", type=int, default=12, help="PPO steps that are taken")
    parser.add_argument("--lags", type=int, nargs="+", default=[0, 1, 2, 4, 8, 12], help="steps behind")
    parser.add_argument("--batches", type=int, default=2, help="of the config's number of prompts, per lag")
    arguments = parser.parse_args()
    if arguments.input and dict(arguments.input).keys() != {"sft", "reward"}:
        parser.error("give --input sft=DIR and --input reward=DIR, or neither")
    if not all(0 <= lag <= arguments.steps for lag in arguments.lags):
        parser.error("--lags: from 0 to --steps")
    return arguments


def _input(text: str) -> tuple[str, Path]:
    stage, equals, directory = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError("write STAGE=DIR")
    return stage, Path(directory)


if __name__ == "__main__":
    main()
