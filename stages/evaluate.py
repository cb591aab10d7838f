"""Recipe: the models of a chain side by side on the same held-out prompts.

    for each model: weights into one engine -> seeded responses -> scoring function, reward model
    the last tuned model against the first: win rate with its interval, KL on the last one's samples
    perplexity on the held-out text of the corpus

It compares the models that are there. Without a reward model or a corpus, their figures are absent. The base
model is prompted as a plain continuation (`evaluate.base_prompt`), tuned ones through their chat template.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rollout.api import Rollout, RolloutRequest, Sampling
from stages.config.evaluate import EvaluateConfig, EvaluateSettings
from stages.data.batches import stage_seed
from stages.data.chat.tokenizer import ChatTokenizer
from stages.data.corpus.shards import heldout_sequences
from stages.data.fitting import (
    REFUSED,
    check_left,
    continuation_ids,
    fit_prompts,
    fit_rows,
    unread_metrics,
)
from stages.data.reading.readers import Rows, read_prompts
from stages.data.reading.records import Prompt
from stages.data.scoring import load_judge
from stages.engines import EngineClient, open_engines
from stages.objectives.winrate import bootstrap_interval
from stages.rl.publish import Probe, wired
from stages.runtime import BASE, CORPUS, REWARD_MODEL
from stages.training.distributed import Worker
from stages.training.evaluation import perplexity
from stages.training.forwards import logprobs_in_packs, scores_in_packs, with_end
from stages.training.fsdp import Placed
from stages.training.models import (
    ScoreNormaliser,
    freeze,
    load_causal_lm,
    load_reward_model,
)

RECIPE_VERSION = 4
SAMPLES_FILE = "samples.jsonl"
MICRO_BATCH_SIZE = 16  # sequences per forward; a matter of memory and rounding only


@dataclass(kw_only=True)
class Candidate:
    """One model under evaluation and what it produced, in the order of the prompts."""

    name: str  # as the metrics call it
    is_tuned: bool  # else it is prompted as a plain continuation
    model: Placed
    prompts: list[tuple[int, ...]]
    rollouts: list[Rollout] = field(default_factory=list)
    kl_rollouts: list[Rollout] = field(default_factory=list)  # at temperature 1, where a KL is asked for
    texts: list[str] = field(default_factory=list)
    judged: list[dict[str, float]] = field(default_factory=list)  # `score`, components; empty without a judge
    rewards: list[float] = field(default_factory=list)  # normalised; empty without a reward model

    def figures(self, index: int) -> dict[str, float]:
        """What is known of one response: its normalised reward, its score and the score's components."""
        reward = {"reward": self.rewards[index]} if self.rewards else {}
        return reward | (self.judged[index] if self.judged else {})


def evaluate(
    worker: Worker, *, settings: EvaluateSettings, inputs: Mapping[str, Path], out_dir: Path
) -> dict[str, float]:
    """Compare; writes samples.jsonl.

    Inputs: the base and the tuned models, by the names that the metrics give them; reward_model and corpus
    where they are there.
    """
    config = settings.evaluate

    # 1. Held-out prompts, models, judge.
    models = {name: path for name, path in inputs.items() if name not in (CORPUS, REWARD_MODEL)}
    tuned = [name for name in models if name != BASE]
    first = models[tuned[0] if tuned else BASE]  # whose tokenizer, template and shapes are those of all
    rows = read_prompts(config.prompts, seed=stage_seed(settings.seed, "evaluate", "rows"))
    chat = ChatTokenizer.load(first, settings.model.chat_template)
    prompts, num_refused = _fitting(rows, chat, settings)
    judge = None if config.score is None else load_judge(config.score, key=f"{config.KEY}.score")
    candidates = _candidates(models, prompts, chat, config, worker.device)
    compared = _compared(candidates)
    worker.runtime.check_files()

    # 2. Responses: one engine, each model's weights in turn.
    _generate(candidates, compared, settings, first, chat, worker)

    # 3. Scores.
    rewards_of = _rewards_by(inputs[REWARD_MODEL], worker.device) if REWARD_MODEL in inputs else None
    for candidate in candidates:
        candidate.texts = [_text(candidate, rollout, chat) for rollout in candidate.rollouts]
        if rewards_of is not None:
            sequences = _scored_sequences(candidate, prompts, chat, settings.model.context_length)
            candidate.rewards = rewards_of(sequences)
        if judge is not None:
            pairs = zip(prompts, candidate.texts, strict=True)
            candidate.judged = [
                judge(prompt.messages[-1].content, text, prompt.row) for prompt, text in pairs
            ]

    # 4. Comparison.
    metrics = {key: value for candidate in candidates for key, value in _means(candidate).items()}
    if compared is not None:
        metrics |= _win_rate(*compared, settings)
        metrics |= _kl(*compared, worker.device)
    if CORPUS in inputs:
        metrics |= _perplexities(candidates, inputs[CORPUS], settings, worker.device)
    metrics |= {"prompts": float(len(prompts)), "rows_skipped": float(rows.num_skipped + num_refused)}
    metrics |= unread_metrics(rows)
    _write_samples(out_dir / SAMPLES_FILE, prompts, candidates)
    return metrics


def _fitting(rows: Rows[Prompt], chat: ChatTokenizer, settings: EvaluateSettings) -> tuple[list[Prompt], int]:
    """The first `max_prompts` prompts that leave room for a response, as chat and as a continuation; and
    how many the chat template refuses.
    """
    config = settings.evaluate
    longest = settings.model.max_prompt_tokens(config.max_response_tokens)
    fit = functools.partial(fit_prompts, chat, max_prompt_tokens=longest, base_prompt=config.base_prompt)
    found = fit_rows(rows, fit)
    check_left(rows.sizes, found)
    kept = [prompt for prompt, one in zip(rows.records, found, strict=True) if one.example is not None]
    return kept[: config.max_prompts], sum(one.rule == REFUSED for one in found)


def _candidates(
    models: Mapping[str, Path],
    prompts: Sequence[Prompt],
    chat: ChatTokenizer,
    config: EvaluateConfig,
    device: torch.device,
) -> list[Candidate]:
    as_chat = [chat.prompt_ids(prompt.messages, prompt.tools) for prompt in prompts]
    as_text = [continuation_ids(chat, prompt, config.base_prompt) for prompt in prompts]
    return [
        Candidate(
            name=name,
            is_tuned=name != BASE,
            model=Placed(freeze(load_causal_lm(directory)).to(device)),
            prompts=as_text if name == BASE else as_chat,
        )
        for name, directory in models.items()
    ]


def _compared(candidates: Sequence[Candidate]) -> tuple[Candidate, Candidate] | None:
    """The last tuned model and the first, which it is compared with; None where there are not two."""
    tuned = [candidate for candidate in candidates if candidate.is_tuned]
    return (tuned[-1], tuned[0]) if len(tuned) > 1 else None


def _rewards_by(directory: Path, device: torch.device) -> Callable[[Sequence[tuple[int, ...]]], list[float]]:
    """Normalised scores of sequences by the reward model in `directory`."""
    reward_model = Placed(freeze(load_reward_model(directory)).to(device))
    normaliser = ScoreNormaliser.load(directory)

    def rewards(sequences: Sequence[tuple[int, ...]]) -> list[float]:
        raw = scores_in_packs(reward_model, sequences, micro_batch_size=MICRO_BATCH_SIZE, device=device)
        scores: list[float] = normaliser(raw).tolist()
        return scores

    return rewards


def _generate(
    candidates: Sequence[Candidate],
    compared: tuple[Candidate, Candidate] | None,
    settings: EvaluateSettings,
    model_dir: Path,
    chat: ChatTokenizer,
    worker: Worker,
) -> None:
    """Fill in every candidate's rollouts. One engine takes each model's weights by sync and is checked after
    it.
    """
    engines = open_engines(
        settings.rollout,
        model_dir=model_dir,
        dtype="float32",
        max_model_len=settings.model.context_length,
        runtime=worker.runtime,
    )
    with engines as client:
        for version, candidate in enumerate(candidates, start=1):
            sync, gate = wired(
                candidate.model,
                client,
                _probe(candidate, settings, chat),
                dtype="float32",
                micro_batch_size=MICRO_BATCH_SIZE,
                device=worker.device,
            )
            with contextlib.closing(sync):
                sync.sync(version)
                gate.check(version)
            sample = functools.partial(_sample, client, candidate, settings, chat)
            candidate.rollouts = sample(temperature=settings.evaluate.temperature)
            if compared is not None and candidate is compared[0]:
                at_one = settings.evaluate.temperature == 1.0
                candidate.kl_rollouts = candidate.rollouts if at_one else sample(temperature=1.0)


def _probe(candidate: Candidate, settings: EvaluateSettings, chat: ChatTokenizer) -> Probe:
    return Probe(
        prompts=candidate.prompts,
        stop_token_ids=chat.stop_token_ids,
        temperature=1.0,
        seed=stage_seed(settings.seed, "evaluate", "probe"),
    )


def _sample(
    client: EngineClient,
    candidate: Candidate,
    settings: EvaluateSettings,
    chat: ChatTokenizer,
    *,
    temperature: float,
) -> list[Rollout]:
    stop = (chat.separator_id, *chat.stop_token_ids) if not candidate.is_tuned else chat.stop_token_ids
    return client.generate(
        [
            RolloutRequest(
                request_id=f"evaluate-{candidate.name}-{index}",
                prompt_ids=prompt,
                sampling=Sampling(
                    temperature=temperature,
                    max_tokens=settings.evaluate.max_response_tokens,
                    stop_token_ids=stop,
                    seed=stage_seed(settings.seed, "evaluate", index),
                ),
            )
            for index, prompt in enumerate(candidate.prompts)
        ]
    )


def _scored_sequences(
    candidate: Candidate, prompts: Sequence[Prompt], chat: ChatTokenizer, context_length: int
) -> list[tuple[int, ...]]:
    """What the reward model reads: prompt and response of each rollout, as the ids that were sampled.

    The base model was not asked in chat form. Its answer is put into the chat as text and encoded again. That
    may take more tokens than were sampled, so it is cut to the context; its end token stays.
    """
    if not candidate.is_tuned:
        return [
            _within(context_length, chat.prompt_ids(prompt.messages, prompt.tools), chat.response_ids(text))
            for prompt, text in zip(prompts, candidate.texts, strict=True)
        ]
    return [
        (*rollout.prompt_ids, *with_end(rollout.response_ids, chat.end_of_turn_id, chat.stop_token_ids))
        for rollout in candidate.rollouts
    ]


def _within(context_length: int, prompt: tuple[int, ...], response: tuple[int, ...]) -> tuple[int, ...]:
    """Prompt and response in `context_length` tokens: a response that is too long is cut before its last
    token, which stays.
    """
    too_many = max(0, len(prompt) + len(response) - context_length)
    return (*prompt, *response[: len(response) - 1 - too_many], response[-1])


def _text(candidate: Candidate, rollout: Rollout, chat: ChatTokenizer) -> str:
    """The response as its reader sees it; the base model's answer ends at its first line break."""
    if not candidate.is_tuned:
        return chat.continued_text(rollout.response_ids).strip().split("\n")[0].strip()
    return chat.response_text(rollout.response_ids)


def _means(candidate: Candidate) -> dict[str, float]:
    """score_*, score_<component>_*, reward_*, length_* and truncated_* of one model."""
    name, count = candidate.name, len(candidate.rollouts)
    rewards = {f"reward_{name}": sum(candidate.rewards) / count} if candidate.rewards else {}
    means = rewards | {
        f"length_{name}": sum(len(rollout.response_ids) for rollout in candidate.rollouts) / count,
        f"truncated_{name}": sum(rollout.finish_reason == "length" for rollout in candidate.rollouts) / count,
    }
    for part in candidate.judged[0] if candidate.judged else ():
        key = f"score_{name}" if part == "score" else f"score_{part}_{name}"
        means[key] = sum(judged[part] for judged in candidate.judged) / count
    return means


def _win_rate(ours: Candidate, theirs: Candidate, settings: EvaluateSettings) -> dict[str, float]:
    """Share of prompts on which `ours` scores higher, ties half. By the scoring function, else by the reward
    model; none without either.
    """
    scores, other_scores = (
        [judged["score"] for judged in candidate.judged] if candidate.judged else candidate.rewards
        for candidate in (ours, theirs)
    )
    if not scores:
        return {}
    outcomes = torch.tensor([(a > b) + (a == b) / 2 for a, b in zip(scores, other_scores, strict=True)])
    low, high = bootstrap_interval(
        outcomes_N=outcomes,
        num_samples=settings.evaluate.bootstrap_samples,
        seed=stage_seed(settings.seed, "evaluate", "bootstrap"),
    )
    return {
        f"win_rate_{ours.name}_vs_{theirs.name}": float(outcomes.mean()),
        "win_rate_low": low,
        "win_rate_high": high,
    }


def _kl(ours: Candidate, theirs: Candidate, device: torch.device) -> dict[str, float]:
    """KL(ours || theirs) in nats per response: k1 on our own responses, at temperature 1."""
    responses = [rollout.response_ids for rollout in ours.kl_rollouts]
    logprobs, other_logprobs = (
        logprobs_in_packs(
            candidate.model,
            ours.prompts,
            responses,
            temperature=1.0,
            micro_batch_size=MICRO_BATCH_SIZE,
            device=device,
        )
        for candidate in (ours, theirs)
    )
    total = sum(float((a - b).sum()) for a, b in zip(logprobs, other_logprobs, strict=True))
    return {f"kl_{ours.name}_vs_{theirs.name}": total / len(responses)}


def _perplexities(
    candidates: Sequence[Candidate], corpus: Path, settings: EvaluateSettings, device: torch.device
) -> dict[str, float]:
    documents = heldout_sequences(corpus, settings.model.context_length)
    return {
        f"perplexity_{candidate.name}": perplexity(candidate.model, documents, device=device)
        for candidate in candidates
    }


def _write_samples(path: Path, prompts: Sequence[Prompt], candidates: Sequence[Candidate]) -> None:
    """One object per prompt: the prompt, and per model its response and the figures that are known of it."""
    with path.open("w") as file:
        for index, prompt in enumerate(prompts):
            line: dict[str, Any] = {"prompt": prompt.messages[-1].content}
            for candidate in candidates:
                line[candidate.name] = {"response": candidate.texts[index], **candidate.figures(index)}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
