"""What PPO starts from, tiny: an sft model with a reward model on its body, and a batch of rollouts."""

from pathlib import Path

import torch

from rollout.api import Rollout
from stages.training.models import ScoreNormaliser, full_state, reward_from_causal_lm, save_model

PAD, EOS = 0, 2


def ppo_inputs(sft: Path, reward: Path) -> dict[str, Path]:
    """The directory `sft` as it is, and a random reward model on it, written to `reward`."""
    torch.manual_seed(0)
    model = reward_from_causal_lm(sft, pad_token_id=PAD)
    save_model(model, reward, full_state(model))
    ScoreNormaliser(mean=0.1, std=1.5).save(reward)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (sft / name).exists():
            (reward / name).write_bytes((sft / name).read_bytes())
    return {"sft": sft, "reward": reward}


def some_rollouts(count=8) -> list[Rollout]:
    generator = torch.Generator().manual_seed(5)
    rollouts = []
    for index in range(count):
        length = 2 + index % 5
        response = torch.randint(5, 300, (length,), generator=generator).tolist()
        ended = index % 3 != 0
        rollouts.append(
            Rollout(
                request_id=str(index),
                prompt_ids=tuple(torch.randint(5, 300, (3 + index % 2,), generator=generator).tolist()),
                response_ids=tuple([*response[:-1], EOS] if ended else response),
                logprobs=(-1.0,) * length,
                finish_reason="stop" if ended else "length",
                weight_versions=(0,) * length,
                seed=index,
            )
        )
    return rollouts
