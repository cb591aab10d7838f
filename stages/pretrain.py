"""Recipe: causal language modelling on prepare's shards, from scratch or continued from `model.path`.

    token shards --rows of segments--> model --cross-entropy on targets--> AdamW --> base model

Segments of a row (documents or parts of them) do not see each other, whatever the packing; positions restart
with each. What is a target is for the shards to say. The loss is the mean over the targets of the step; with
routed experts and a coefficient above 0 the balance loss of the routers is added (training.routing).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stages.config.pretrain import PretrainSettings
from stages.data.batches import BatchOrder, rank_share, stage_seed
from stages.data.chat.tokenizer import ChatTokenizer
from stages.data.corpus.shards import TokenRow, TokenShards, heldout_sequences
from stages.data.packing import PackedRow, packed_row
from stages.errors import ModelError
from stages.objectives.logprobs import next_tokens
from stages.objectives.losses import causal_lm_loss_sum
from stages.runtime import CORPUS, START
from stages.training import ranks
from stages.training.distributed import Worker
from stages.training.evaluation import perplexity
from stages.training.fsdp import trained
from stages.training.loop import run_loop
from stages.training.model_rules import check_ends, check_rows
from stages.training.models import CausalLM, build_causal_lm, check_context, load_causal_lm
from stages.training.routing import check_balanced, router_metrics, with_balance
from stages.training.supervised import Supervised
from stages.training.trainable import Outputs, Reads, TermLoss

RECIPE_VERSION = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A micro-batch: the segments of some rows end to end. Each position predicts the next token."""

    row: PackedRow
    predicting_N: Tensor  # int64, all positions of the row
    targets_N: Tensor  # int64, the token after each; that of the last one does not count
    is_target_1N: Tensor  # bool, the tokens to predict, each from the one before
    num_targets: int  # of the whole optimizer step, all ranks together
    share_of_tokens: float  # this micro-batch's, of the tokens of that step


def train(
    worker: Worker, *, settings: PretrainSettings, inputs: Mapping[str, Path], out_dir: Path
) -> dict[str, float]:
    """Train; writes a model directory. Inputs: corpus; start where a given model is trained further."""
    config = settings.pretrain

    # 1. Data: rows of prepare's shards, in an order that is a function of the step.
    shards = TokenShards(inputs[CORPUS])
    if shards.context_length != settings.model.context_length:
        raise ModelError(
            f"{inputs[CORPUS]}: rows of {shards.context_length} tokens, but model.context_length is "
            f"{settings.model.context_length}; run prepare with this config, or set the other"
        )
    chat = ChatTokenizer.load(inputs[CORPUS], settings.model.chat_template, warns=ranks.is_main())
    order = BatchOrder(
        num_rows=len(shards),
        batch_size=config.batch_size,
        seed=stage_seed(settings.seed, "pretrain", "order"),
    )

    # 2. Model and optimizer.
    initial = _initial_model(settings, inputs, chat)
    if settings.router_aux_loss_coef > 0:
        check_balanced(initial.inner, f"{settings.pretrain.KEY}.router_aux_loss_coef")
    max_steps = order.num_steps(config.num_epochs, config.max_steps)
    model = trained(initial, worker, config, lr=config.lr, max_steps=max_steps)

    # 3. Train.
    stepper = Supervised(
        model,
        config,
        runtime=worker.runtime,
        reads=Reads(logprobs=True, router_loss=True, temperature=1.0),
        batch_of=lambda step: _micro_batches(shards, order.indices(step), config.micro_batch_size, worker),
        loss_of=partial(_loss, router_coef=settings.router_aux_loss_coef),
        watched=router_metrics,
    )
    run_loop(stepper, config, max_steps=max_steps, runtime=worker.runtime)

    # 4. Held-out perplexity, and the model directory.
    heldout = heldout_sequences(inputs[CORPUS], settings.model.context_length)
    metrics = {
        **stepper.summary(),
        "parameters": float(sum(parameter.numel() for parameter in initial.parameters())),
        "perplexity_heldout": perplexity(model, heldout, device=worker.device),
    }
    model.save(out_dir)
    if ranks.is_main():
        chat.save(out_dir)
    return metrics


def _initial_model(settings: PretrainSettings, inputs: Mapping[str, Path], chat: ChatTokenizer) -> CausalLM:
    if START in inputs:
        model = load_causal_lm(inputs[START])
        check_context(model, settings.model.context_length)
        named = str(inputs[START])
        rows = check_ends(model.inner, named, scores=False)
        highest = chat.highest_id(documents=True)
        check_rows(rows, highest, named=named, tokenizer=str(inputs[CORPUS]))
        return model
    torch.manual_seed(stage_seed(settings.seed, "pretrain", "init"))
    return build_causal_lm(
        settings.model,
        vocab_size=chat.vocab_size,
        eos_token_id=chat.separator_id,
        pad_token_id=chat.pad_token_id,
    )


def _micro_batches(
    shards: TokenShards, indices: Sequence[int], micro_batch_size: int, worker: Worker
) -> list[Rows]:
    """This rank's share of the rows of a step, `micro_batch_size` to a forward."""
    num_targets = sum(shards.num_targets(index) for index in indices)
    num_tokens = sum(shards.num_tokens(index) for index in indices)
    mine = rank_share(indices, worker.rank, worker.world_size)
    rows = [shards.row(index) for index in mine]
    return [
        _end_to_end(rows[start : start + micro_batch_size], num_targets, num_tokens, worker.device)
        for start in range(0, len(rows), micro_batch_size)
    ]


def _end_to_end(rows: Sequence[TokenRow], num_targets: int, num_tokens: int, device: torch.device) -> Rows:
    ids_N = torch.from_numpy(np.concatenate([row.ids for row in rows]))
    is_target_N = torch.from_numpy(np.concatenate([row.is_target for row in rows]))
    row = packed_row(ids_N, [length for row in rows for length in row.lengths]).to(device)
    return Rows(
        row=row,
        predicting_N=torch.arange(row.num_tokens, device=device),
        targets_N=next_tokens(row.input_ids_1N)[0],
        is_target_1N=is_target_N[None].to(device),
        num_targets=num_targets,
        share_of_tokens=row.num_tokens / num_tokens,
    )


def _loss(rows: Rows, now: Outputs, *, router_coef: float) -> TermLoss:
    """This micro-batch's share of the mean cross-entropy of the step, nats per target, and of its balance
    loss.
    """
    assert now.logprobs_N is not None
    loss = causal_lm_loss_sum(logprobs_BS=now.logprobs_N[None], target_mask_BS=rows.is_target_1N)
    return with_balance(
        TermLoss(loss=loss / rows.num_targets),
        now,
        coef=router_coef,
        num_tokens=rows.row.num_tokens,
        share=rows.share_of_tokens,
    )
