"""What PPO starts from, tiny: an sft model with a reward model on its body, a batch of trajectories, and the
parts of the recipe without its engines.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout.api import FinishReason
from rollout.config import EngineConfig
from stages.config.model import ModelConfig
from stages.config.ppo import PPOConfig, PPOSettings
from stages.rl.algorithms import algorithm_of
from stages.rl.experience import Experience, JudgedBatch, batch_metrics, experiences_of, pack_rollouts
from stages.rl.roles import Judges, load_models
from stages.rl.trajectories import Trajectory, Turn
from stages.rl.update import Learner
from stages.training.distributed import Worker
from stages.training.health import Health
from stages.training.models import ScoreNormaliser, full_state, reward_from_causal_lm, save_model

PAD, EOS, OTHER_STOP = 0, 2, 301


def ppo_inputs(sft: Path, reward: Path) -> dict[str, Path]:
    """The directory `sft` as it is, and a random reward model on it, written to `reward`."""
    torch.manual_seed(0)
    model = reward_from_causal_lm(sft, pad_token_id=PAD)
    save_model(model, reward, full_state(model))
    ScoreNormaliser(mean=0.1, std=1.5).save(reward)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (sft / name).exists():
            (reward / name).write_bytes((sft / name).read_bytes())
    return {"policy": sft, "reward_model": reward}


def some_trajectories(count=8) -> list[Trajectory]:
    generator = torch.Generator().manual_seed(5)
    trajectories = []
    for index in range(count):
        length = 2 + index % 5
        response = torch.randint(5, 300, (length,), generator=generator).tolist()
        ended = index % 3 != 0
        prompt = torch.randint(5, 300, (3 + index % 2,), generator=generator).tolist()
        ids = [*response[:-1], EOS] if ended else response
        trajectories.append(invented(index, prompt, ids, "stop" if ended else "length"))
    return trajectories


def invented(
    index: int, prompt_ids: Sequence[int], response_ids: Sequence[int], finish_reason: FinishReason = "stop"
) -> Trajectory:
    """One sample of prompt `index`, drawn by weight version 0 with a log-prob of -1 per token."""
    length = len(response_ids)
    turn = Turn(
        prompt_ids=tuple(prompt_ids),
        response_ids=tuple(response_ids),
        logprobs=(-1.0,) * length,
        weight_versions=(0,) * length,
        finish_reason=finish_reason,
    )
    return Trajectory(
        id=str(index), prompt_index=index, place=index, sample=0, seed=index, turns=(turn,), row={}, scores={}
    )


def with_turn(trajectory: Trajectory, **changes: Any) -> Trajectory:
    """The trajectory with changes to its one turn."""
    return replace(trajectory, turns=(replace(trajectory.turn, **changes),))


class Parts:
    """What learns from a batch on one worker: the algorithm of `config` with its models."""

    def __init__(self, config: PPOConfig, inputs: dict[str, Path], worker: Worker) -> None:
        settings = PPOSettings(
            seed=0, model=ModelConfig(context_length=64), ppo=config, rollout=EngineConfig(engine="hf")
        )
        self.config, self.device = config, worker.device
        self.algorithm = algorithm_of(settings)
        self.models = load_models(
            self.algorithm, config, worker, policy_dir=inputs["policy"], reward_dir=inputs["reward_model"]
        )
        self.judges = Judges(
            models=self.models,
            config=config,
            value_reads=self.algorithm.credit.reads,
            end_of_turn_id=EOS,
            stop_token_ids=(EOS, OTHER_STOP),
            device=worker.device,
        )
        self.learner = Learner(
            self.models.trained,
            self.algorithm.terms,
            config,
            seed=0,
            health=Health(config.health, worker.runtime),
        )

    def judged(
        self, trajectories: Sequence[Trajectory] | None = None, *, size: int | None = None
    ) -> JudgedBatch:
        """Of eight trajectories unless told, `size` to a pack."""
        packs = pack_rollouts(
            some_trajectories() if trajectories is None else trajectories,
            micro_batch_size=self.config.pack_size if size is None else size,
            max_length=self.config.max_response_tokens,
            device=self.device,
        )
        return self.judges.judge_packs(packs)

    def experiences(self, batch: JudgedBatch, *, kl_coef: float = 0.05) -> list[Experience]:
        """By pack, ready for an update."""
        credited = self.algorithm.credit(batch, kl_coef=kl_coef)
        return experiences_of(batch, credited, kl_coef=kl_coef, keeps_anchor=self.learner.keeps_anchor)

    def metrics(self, batch: JudgedBatch, *, kl_coef: float = 0.05) -> dict[str, float]:
        """Of the batch before its updates."""
        credited = self.algorithm.credit(batch, kl_coef=kl_coef)
        return batch_metrics(batch, credited, kl_coef=kl_coef, correction=self.algorithm.correction)


def joined(experiences: Sequence[Experience], name: str) -> torch.Tensor:
    """One field of all packs, rows in pack order."""
    return torch.cat([getattr(item, name) for item in experiences])


class Killed(Exception):
    """Stands for a SIGKILL in the middle of an update."""


@contextmanager
def killed_in_step(step_to_die_in: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, a run ends in the update of this step (0-based)."""
    update = Learner.update

    def dying(self, step, experiences):
        if step == step_to_die_in:
            raise Killed
        return update(self, step, experiences)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Learner, "update", dying)
        yield
