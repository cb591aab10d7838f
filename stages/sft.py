"""Recipe: supervised fine-tuning on the assistant's tokens.

    conversations --chat template--> ids + mask --pack--> model --cross-entropy on the mask--> AdamW

A step is batch_size examples - a conversation each, or one of its answers with all before it, where the
template writes that differently later - packed into rows of micro_batch_size of them; or, with batch_tokens,
rows of context_length slots, into which all examples are packed best-fit once, before the first step. Either
way nothing is padded: an empty slot does not go through the model. Packed sequences do not see each other;
the end-of-turn token is trained once per assistant turn.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.config.sft import SFTSettings
from stages.data.batches import BatchOrder, rank_share, stage_seed
from stages.data.chat.ids import Rendered
from stages.data.chat.tokenizer import ChatTokenizer
from stages.data.fitting import check_left, check_rendering, data_metrics, fit_conversations, fit_rows
from stages.data.packing import PackedRow, best_fit, pack, plan_packs, utilisation
from stages.data.reading.readers import read_conversations
from stages.data.token_file import Columns, MappedTokens, Prepared, prepared
from stages.runtime import START, Runtime
from stages.training import ranks
from stages.training.distributed import Worker
from stages.training.fsdp import trained
from stages.training.loop import run_loop
from stages.training.models import check_context, load_causal_lm, set_stop_tokens
from stages.training.routing import check_balanced, router_metrics, with_balance
from stages.training.supervised import Supervised
from stages.training.trainable import Outputs, Reads, TermLoss

RECIPE_VERSION = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversations:
    """A micro-batch: packed conversations and their trained tokens."""

    row: PackedRow
    predicting_N: Tensor  # int64, one position before each trained token
    targets_N: Tensor  # int64, the trained tokens
    num_targets: int  # trained tokens of the whole optimizer step
    share_of_tokens: float  # this micro-batch's, of the tokens of that step


def prepare(settings: SFTSettings, inputs: Mapping[str, Path], runtime: Runtime) -> Mapping[str, Prepared]:
    """What the stage task does once: conversations as ids with a mask of what is trained, in a file that all
    workers map.
    """
    chat = ChatTokenizer.load(inputs[START], settings.model.chat_template)

    def rendered() -> Columns:
        examples, data = _examples(settings, chat)
        runtime.check_files()
        return Columns(
            ragged={"ids": [one.ids for one in examples]},
            masks={"mask": [one.mask for one in examples]},
            flat={},
            facts={"metrics": list(data.items())},
        )

    return {"rows": prepared(runtime.work_dir, rendered)}


def train(
    worker: Worker, *, settings: SFTSettings, inputs: Mapping[str, Path], out_dir: Path, rows: Prepared
) -> dict[str, float]:
    """Fine-tune, on every worker; writes a model directory. Inputs: start."""
    config = settings.sft

    # 1. Data: the conversations of the stage task's file, in an order that is a function of the step.
    chat = ChatTokenizer.load(inputs[START], settings.model.chat_template, warns=False)
    batches = _batches(Mapped(MappedTokens(rows)), settings, worker)

    # 2. Model and optimizer.
    initial = load_causal_lm(inputs[START])
    check_context(initial, settings.model.context_length)
    if config.router_aux_loss_coef > 0:
        check_balanced(initial.inner, f"{config.KEY}.router_aux_loss_coef")
    max_steps = batches.order.num_steps(config.num_epochs, config.max_steps)
    model = trained(initial, worker, config, lr=config.lr, max_steps=max_steps)

    # 3. Train.
    stepper = Supervised(
        model,
        config,
        runtime=worker.runtime,
        reads=Reads(logprobs=True, router_loss=True, temperature=1.0),
        batch_of=batches.of_step,
        loss_of=partial(_loss, router_coef=config.router_aux_loss_coef),
        watched=router_metrics,
    )
    run_loop(stepper, config, max_steps=max_steps, runtime=worker.runtime)

    # 4. The model directory: it stops at the template's end of turn from now on.
    set_stop_tokens(
        initial,
        eos_token_id=chat.end_of_turn_id,
        stop_token_ids=chat.stop_token_ids,
        pad_token_id=chat.pad_token_id,
    )
    model.save(out_dir)
    if ranks.is_main():
        chat.save(out_dir)
    return {
        **stepper.summary(),
        **dict(rows.facts["metrics"]),
        **batches.metrics,
    }


class Mapped(Sequence[Rendered]):
    """The examples of a file of tokens: each is read when it is asked for."""

    def __init__(self, tokens: MappedTokens) -> None:
        self._tokens = tokens

    def __len__(self) -> int:
        return self._tokens.num_examples("ids")

    def lengths(self) -> list[int]:
        """Tokens of each example; reads none of them."""
        return self._tokens.lengths("ids")

    def __getitem__(self, index: Any) -> Any:
        mask = self._tokens.row("mask", index)
        return Rendered(ids=self._tokens.row("ids", index), mask=tuple(map(bool, mask)))


def _examples(settings: SFTSettings, chat: ChatTokenizer) -> tuple[list[Rendered], dict[str, float]]:
    """What there is to train on, cut to the context, and what became of the rows, as metrics: one example per
    conversation, or several (`ChatTokenizer.examples`).
    """
    rows = read_conversations(settings.sft.data, seed=stage_seed(settings.seed, "sft", "rows"))
    fitted = fit_rows(rows, partial(fit_conversations, chat, context_length=settings.model.context_length))
    check_rendering(chat, fitted)
    check_left(rows.sizes, fitted)
    kept = [one.example for one in fitted if one.example is not None]
    return [example for examples in kept for example in examples], {
        "conversations": float(len(kept)),
        "examples": float(sum(map(len, kept))),
        "turns_left_out": float(sum(one.num_turns_left_out for one in rows.records)),
        **data_metrics(rows, fitted, "conversations"),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Batches:
    """What the steps train on."""

    order: BatchOrder  # of the conversations, or of the rows they were packed into
    of_step: Callable[[int], list[Conversations]]  # this rank's share of a step
    metrics: Mapping[str, float]  # of the packing, where rows have a fixed size that it could fill or not


def _batches(examples: Mapped, settings: SFTSettings, worker: Worker) -> Batches:
    config, context_length = settings.sft, settings.model.context_length
    seed = stage_seed(settings.seed, "sft", "order")
    if config.batch_tokens is None:
        order = BatchOrder(num_rows=len(examples), batch_size=config.batch_size, seed=seed)
        return Batches(
            order=order,
            of_step=lambda step: _micro_batches(
                [examples[index] for index in order.indices(step)], config.micro_batch_size, worker
            ),
            metrics={},
        )
    lengths = examples.lengths()
    plan = best_fit(lengths, context_length)
    rows_per_step = config.batch_tokens // context_length
    order = BatchOrder(num_rows=len(plan.packs), batch_size=rows_per_step, seed=seed)
    return Batches(
        order=order,
        of_step=lambda step: _row_batches(
            [[examples[index] for index in plan.packs[row]] for row in order.indices(step)], worker
        ),
        metrics={
            "rows": float(len(plan.packs)),
            "packing_utilisation": utilisation(plan, lengths, context_length),
        },
    )


def _micro_batches(
    examples: Sequence[Rendered], micro_batch_size: int, worker: Worker
) -> list[Conversations]:
    """This rank's share of a step's `examples`, packed."""
    of_step = _Counts.of(examples)
    mine = rank_share(examples, worker.rank, worker.world_size)
    plan = plan_packs([len(example.ids) for example in mine], micro_batch_size)
    return [_packed([mine[index] for index in members], of_step, worker.device) for members in plan.packs]


def _row_batches(rows: Sequence[Sequence[Rendered]], worker: Worker) -> list[Conversations]:
    """This rank's share of a step's `rows`, one row per forward."""
    of_step = _Counts.of([example for row in rows for example in row])
    return [_packed(row, of_step, worker.device) for row in rank_share(rows, worker.rank, worker.world_size)]


@dataclass(frozen=True, slots=True)
class _Counts:
    """Of a whole step, all ranks together."""

    targets: int  # trained tokens
    tokens: int

    @classmethod
    def of(cls, examples: Sequence[Rendered]) -> "_Counts":
        return cls(
            targets=sum(sum(example.mask) for example in examples),
            tokens=sum(len(example.ids) for example in examples),
        )


def _packed(examples: Sequence[Rendered], of_step: _Counts, device: torch.device) -> Conversations:
    mask_N = torch.tensor([is_trained for example in examples for is_trained in example.mask])
    row = pack([example.ids for example in examples]).to(device)
    token_K = mask_N.nonzero().squeeze(-1).to(device)
    return Conversations(
        row=row,
        predicting_N=token_K - 1,
        targets_N=row.input_ids_1N[0, token_K],
        num_targets=of_step.targets,
        share_of_tokens=len(mask_N) / of_step.tokens,
    )


def _loss(conversations: Conversations, now: Outputs, *, router_coef: float) -> TermLoss:
    """This micro-batch's share of the mean cross-entropy over the step's trained tokens, nats, and of its
    balance loss.
    """
    assert now.logprobs_N is not None
    return with_balance(
        TermLoss(loss=-now.logprobs_N.sum() / conversations.num_targets),
        now,
        coef=router_coef,
        num_tokens=conversations.row.num_tokens,
        share=conversations.share_of_tokens,
    )
