"""Recipe: a Bradley-Terry reward model from preference pairs.

    pairs --chat template--> prompt, chosen, rejected ids --pack--> scores at the last tokens
    --logsigmoid--> AdamW --> held-out accuracy, normaliser over the sft model's responses, gates --> model

A response always ends with the end-of-turn token when it is scored: here, in evaluation and in PPO.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rollout.api import RolloutRequest, Sampling
from stages.config.reward import RewardSettings
from stages.data.batches import BatchOrder, rank_share, stage_seed
from stages.data.chat.ids import PairIds
from stages.data.chat.tokenizer import ChatTokenizer
from stages.data.fitting import check_left, data_metrics, fit_pairs, fit_rows
from stages.data.packing import pack, plan_packs
from stages.data.reading.readers import check_sides, is_held_out, read_pairs
from stages.data.token_file import Columns, MappedTokens, Prepared, prepared
from stages.engines import ENGINE_DTYPE, open_engines
from stages.errors import DataError, TrainingStopped
from stages.objectives.losses import pair_loss_sum
from stages.runtime import START, Runtime
from stages.training import ranks
from stages.training.distributed import Worker
from stages.training.forwards import WholeSequences, scores_in_packs, with_end
from stages.training.fsdp import trained
from stages.training.loop import run_loop
from stages.training.models import ScoreNormaliser, reward_from_causal_lm
from stages.training.supervised import Supervised
from stages.training.trainable import Judge, Outputs, Reads, TermLoss

RECIPE_VERSION = 5
_RAGGED = ("prompt", "chosen", "rejected")


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One pair as token ids."""

    ids: PairIds
    has_whole_prompt: bool  # nothing was cut from the prompt's start to fit the context
    group: str | None  # value of `reward.group_column`

    @property
    def chosen(self) -> tuple[int, ...]:
        return (*self.ids.prompt, *self.ids.chosen)

    @property
    def rejected(self) -> tuple[int, ...]:
        return (*self.ids.prompt, *self.ids.rejected)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs(WholeSequences):
    """A micro-batch: in its row all chosen responses, then all rejected ones."""

    num_pairs: int  # of the whole optimizer step


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """All pairs of the stage, split by prompt."""

    train: Sequence[Example]
    heldout: Sequence[Example]
    data: Mapping[str, float]  # metrics: what became of the rows


def prepare(settings: RewardSettings, inputs: Mapping[str, Path], runtime: Runtime) -> Mapping[str, Prepared]:
    """What the stage task does once: pairs as ids, in a file that all workers map."""
    chat = ChatTokenizer.load(inputs[START], settings.model.chat_template)

    def rendered() -> Columns:
        examples = _examples(settings, chat)
        runtime.check_files()
        _normaliser_prompts(settings, examples)  # that there are too few is said before training
        return _columns(examples)

    return {"rows": prepared(runtime.work_dir, rendered)}


def train(
    worker: Worker, *, settings: RewardSettings, inputs: Mapping[str, Path], out_dir: Path, rows: Prepared
) -> dict[str, float]:
    """Train, on every worker; writes a model directory with its normaliser. Inputs: start.

    TrainingStopped (exit 5) when a gate is not met.
    """
    config, source = settings.reward, inputs[START]

    # 1. Data: the pairs of the stage task's file; whole prompts are held out.
    chat = ChatTokenizer.load(source, settings.model.chat_template, warns=False)
    examples = _mapped(rows)
    order = BatchOrder(
        num_rows=len(examples.train),
        batch_size=config.batch_size,
        seed=stage_seed(settings.seed, "reward", "order"),
    )

    # 2. Model and optimizer.
    torch.manual_seed(stage_seed(settings.seed, "reward", "head"))
    initial = reward_from_causal_lm(source, pad_token_id=chat.pad_token_id)
    max_steps = order.num_steps(config.num_epochs, config.max_steps)
    model = trained(initial, worker, config, lr=config.lr, max_steps=max_steps)

    # 3. Train.
    stepper = Supervised(
        model,
        config,
        runtime=worker.runtime,
        reads=Reads(scores=True),
        batch_of=lambda step: _micro_batches(
            [examples.train[index] for index in order.indices(step)], config.micro_batch_size, worker
        ),
        loss_of=_loss,
        watched=_ranked_share,
    )
    run_loop(stepper, config, max_steps=max_steps, runtime=worker.runtime)

    # 4. Held-out accuracy, normaliser, gates.
    initial.eval()
    metrics = {
        **stepper.summary(),
        "pairs": float(len(examples.train)),
        "pairs_heldout": float(len(examples.heldout)),
        **examples.data,
        **_accuracies(model, examples.heldout, config.micro_batch_size, worker.device),
    }
    sequences = _normaliser_sequences(settings, source, examples, chat, worker.runtime)
    scores = scores_in_packs(model, sequences, micro_batch_size=config.micro_batch_size, device=worker.device)
    normaliser = ScoreNormaliser(mean=float(scores.mean()), std=float(scores.std()))
    metrics |= {
        "score_mean": normaliser.mean,
        "score_std": normaliser.std,
        "score_responses": float(len(sequences)),
    }
    _check_gates(settings, metrics)

    # 5. The model directory.
    model.save(out_dir)
    if ranks.is_main():
        normaliser.save(out_dir)
        chat.save(out_dir)
    return metrics


class Mapped(Sequence[Example]):
    """Some of the pairs of a file of tokens: each is read when it is asked for."""

    def __init__(self, tokens: MappedTokens, places: range, groups: Sequence[str]) -> None:
        self._tokens = tokens
        self._places = places
        self._groups = groups

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        place = self._places[index]
        prompt, chosen, rejected = (self._tokens.row(name, place) for name in _RAGGED)
        group = int(self._tokens.flat("group")[place])
        return Example(
            ids=PairIds(prompt=prompt, chosen=chosen, rejected=rejected),
            has_whole_prompt=bool(self._tokens.flat("has_whole_prompt")[place]),
            group=None if group < 0 else self._groups[group],
        )


def _columns(examples: Examples) -> Columns:
    """Those of training first, then those held out."""
    pairs = [*examples.train, *examples.heldout]
    groups = sorted({pair.group for pair in pairs if pair.group is not None})
    numbers = {None: -1} | {group: number for number, group in enumerate(groups)}
    return Columns(
        ragged={name: [getattr(pair.ids, name) for pair in pairs] for name in _RAGGED},
        masks={},
        flat={
            "group": [numbers[pair.group] for pair in pairs],
            "has_whole_prompt": [pair.has_whole_prompt for pair in pairs],
        },
        facts={
            "num_train": len(examples.train),
            "groups": groups,
            "metrics": list(examples.data.items()),
        },
    )


def _mapped(rows: Prepared) -> Examples:
    """What `_columns` was given."""
    tokens, facts = MappedTokens(rows), rows.facts
    num_train, num_pairs = facts["num_train"], tokens.num_examples("prompt")
    return Examples(
        train=Mapped(tokens, range(num_train), facts["groups"]),
        heldout=Mapped(tokens, range(num_train, num_pairs), facts["groups"]),
        data=dict(facts["metrics"]),
    )


def _examples(settings: RewardSettings, chat: ChatTokenizer) -> Examples:
    config = settings.reward
    rows = read_pairs(
        config.data, seed=stage_seed(settings.seed, "reward", "rows"), group_column=config.group_column
    )
    fit = partial(fit_pairs, chat, context_length=settings.model.context_length, too_long=config.too_long)
    fitted = fit_rows(rows, fit)
    check_left(rows.sizes, fitted)
    data = data_metrics(rows, fitted, "pairs")
    train: list[Example] = []
    heldout: list[Example] = []
    for pair, one in zip(rows.records, fitted, strict=True):
        if one.example is None:
            continue
        example = Example(
            ids=one.example,
            has_whole_prompt=one.rule is None,
            group=None if config.group_column is None else str(pair.row[config.group_column]),
        )
        (heldout if is_held_out(pair, config.heldout_frac) else train).append(example)
    check_sides(
        config.data,
        num_train=len(train),
        num_heldout=len(heldout),
        num_dropped=int(data["pairs_dropped"]),
    )
    return Examples(train=train, heldout=heldout, data=data)


def _micro_batches(examples: Sequence[Example], micro_batch_size: int, worker: Worker) -> list[Pairs]:
    """This rank's share of a step's `examples`."""
    mine = rank_share(examples, worker.rank, worker.world_size)
    plan = plan_packs([len(example.chosen) + len(example.rejected) for example in mine], micro_batch_size)
    return [
        _packed([mine[index] for index in members], len(examples), worker.device) for members in plan.packs
    ]


def _packed(examples: Sequence[Example], num_pairs: int, device: torch.device) -> Pairs:
    sequences = [example.chosen for example in examples] + [example.rejected for example in examples]
    return Pairs(row=pack(sequences).to(device), num_pairs=num_pairs)


def _loss(pairs: Pairs, now: Outputs) -> TermLoss:
    """This micro-batch's share of the step's mean Bradley-Terry loss, nats per pair. Watched: pairs ranked as
    labelled, the sum of their margins, their number.
    """
    assert now.scores_B is not None
    chosen_P, rejected_P = now.scores_B.chunk(2)
    loss = pair_loss_sum(
        chosen_scores_P=chosen_P, rejected_scores_P=rejected_P, margins_P=torch.zeros_like(chosen_P)
    )
    margins_P = (chosen_P - rejected_P).detach().double()
    return TermLoss(
        loss=loss / pairs.num_pairs,
        sums={
            "right": (margins_P > 0).sum(),
            "margin": margins_P.sum(),
            "pairs": torch.tensor(len(margins_P)),
        },
    )


def _ranked_share(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Training accuracy and margin of a window."""
    right, margin, number = (float(sums[name]) for name in ("right", "margin", "pairs"))
    return {"train/accuracy": right / number, "train/margin": margin / number}


def _accuracies(
    model: Judge, examples: Sequence[Example], micro_batch_size: int, device: torch.device
) -> dict[str, float]:
    """Shares of held-out pairs ranked as labelled: all, per group, and by the longer-wins rule; ties count
    half.
    """
    chosen = scores_in_packs(
        model, [example.chosen for example in examples], micro_batch_size=micro_batch_size, device=device
    )
    rejected = scores_in_packs(
        model, [example.rejected for example in examples], micro_batch_size=micro_batch_size, device=device
    )
    lengths = torch.tensor([len(example.ids.chosen) - len(example.ids.rejected) for example in examples])
    groups: dict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        if example.group is not None:
            groups[example.group].append(index)
    margins = chosen - rejected
    return {
        "accuracy_heldout": _share_positive(margins),
        "accuracy_longer_wins": _share_positive(lengths),
        "margin_heldout": float(margins.mean()),
        **{
            f"accuracy_{group}": _share_positive(margins[members])
            for group, members in sorted(groups.items())
        },
    }


def _share_positive(differences: Tensor) -> float:
    return float((differences > 0).float().mean() + (differences == 0).float().mean() / 2)


def _normaliser_prompts(settings: RewardSettings, examples: Examples) -> list[tuple[int, ...]]:
    """The pairs' prompts that the sft model answers for mean and std, held-out ones first; none where nothing
    is sampled. Raises DataError where fewer than 2 leave room for a response.
    """
    config, sampling = settings.reward, settings.normaliser
    if sampling is None:
        return []
    longest = settings.model.max_prompt_tokens(sampling.max_response_tokens)
    fitting: dict[tuple[int, ...], None] = {}  # each once, in order
    for example in chain(examples.heldout, examples.train):
        if len(fitting) == config.normaliser_prompts:
            break
        if example.has_whole_prompt and len(example.ids.prompt) <= longest:
            fitting[example.ids.prompt] = None
    if len(fitting) < 2:
        raise DataError(
            f"reward.data: fewer than 2 prompts of at most {longest} tokens to sample the normaliser with, "
            f"whose responses have {sampling.max_response_tokens}; raise model.context_length, or lower "
            f"{settings.normaliser_length_key}"
        )
    return list(fitting)


def _normaliser_sequences(
    settings: RewardSettings, source: Path, examples: Examples, chat: ChatTokenizer, runtime: Runtime
) -> list[tuple[int, ...]]:
    """The sequences whose scores give mean and std: the sft model's own answers to the pairs' prompts, or
    where none are sampled the held-out pairs themselves.
    """
    config, sampling = settings.reward, settings.normaliser
    if sampling is None:
        return [sequence for example in examples.heldout for sequence in (example.chosen, example.rejected)]
    requests = [
        RolloutRequest(
            request_id=f"normaliser-{index}",
            prompt_ids=prompt,
            sampling=Sampling(
                temperature=sampling.temperature,
                max_tokens=sampling.max_response_tokens,
                stop_token_ids=chat.stop_token_ids,
                seed=stage_seed(settings.seed, "reward", "normaliser", index),
            ),
        )
        for index, prompt in enumerate(_normaliser_prompts(settings, examples))
    ]

    def sampled() -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        with open_engines(
            settings.rollout,
            model_dir=source,
            dtype=ENGINE_DTYPE[config.precision],
            max_model_len=settings.model.context_length,
            runtime=runtime,
        ) as client:
            return [(rollout.prompt_ids, rollout.response_ids) for rollout in client.generate(requests)]

    return [
        (*prompt, *with_end(response, chat.end_of_turn_id, chat.stop_token_ids))
        for prompt, response in ranks.from_main(sampled)
    ]


def _check_gates(settings: RewardSettings, metrics: Mapping[str, float]) -> None:
    config = settings.reward
    if metrics["accuracy_heldout"] < config.min_accuracy:
        raise TrainingStopped(
            f"reward: held-out accuracy {metrics['accuracy_heldout']:.3f} is below reward.min_accuracy "
            f"{config.min_accuracy}; train longer, add pairs, or lower the gate"
        )
    if not metrics["score_std"] > config.min_score_std:
        raise TrainingStopped(
            f"reward: scores of sampled responses spread by {metrics['score_std']:.2g} only "
            f"(reward.min_score_std {config.min_score_std}): a constant reward teaches nothing"
        )
