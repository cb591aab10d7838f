"""Recipe: causal language modelling on prepare's shards, from scratch or continued from `model.path`.

    token shards --rows of context_length--> model --cross-entropy--> AdamW, warm-up + cosine --> base model

Documents follow one another in a row, separated by the end-of-text token; every token but the first of a row
is a target.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stages.config import PretrainSettings
from stages.data.batches import BatchOrder, rank_share, stage_seed
from stages.data.chat import ChatTokenizer
from stages.data.shards import TokenShards, heldout_sequences
from stages.objectives.losses import causal_lm_loss_sum, target_mask
from stages.runtime import Runtime
from stages.training import ranks
from stages.training.distributed import Worker, launch, place
from stages.training.evaluation import perplexity
from stages.training.fit import fit, num_steps
from stages.training.models import (
    CausalLM,
    build_causal_lm,
    check_context,
    full_state,
    load_causal_lm,
    save_model,
)
from stages.training.optimize import Optimizer

RECIPE_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A micro-batch of whole rows."""

    input_ids_RN: Tensor
    num_targets: int  # of the whole optimizer step

    @property
    def num_tokens(self) -> int:
        return self.input_ids_RN.numel()


def run(
    settings: PretrainSettings, inputs: Mapping[str, Path], out_dir: Path, runtime: Runtime
) -> Mapping[str, float]:
    """Train; writes a model directory. Inputs: prepare, and model where training continues from one."""
    return launch(train, runtime, settings=settings, inputs=dict(inputs), out_dir=out_dir)


def train(
    worker: Worker, *, settings: PretrainSettings, inputs: Mapping[str, Path], out_dir: Path
) -> dict[str, float]:
    """The recipe proper, on every worker."""
    config = settings.pretrain

    # 1. Data: rows of prepare's shards, in an order that is a function of the step.
    shards = TokenShards(inputs["prepare"])
    chat = ChatTokenizer.load(inputs["prepare"], settings.model.chat_template)
    order = BatchOrder(
        num_rows=len(shards),
        batch_size=config.batch_size,
        seed=stage_seed(settings.seed, "pretrain", "order"),
    )

    # 2. Model and optimizer.
    model = _initial_model(settings, inputs, chat)
    if config.gradient_checkpointing:
        model.inner.gradient_checkpointing_enable()
    place(model, worker, precision=config.precision, trained=True)
    max_steps = num_steps(config, order)
    optimizer = Optimizer(model, config, lr=config.lr, max_steps=max_steps)

    # 3. Train.
    def batch_of(step: int) -> list[Rows]:
        mine = rank_share(order.indices(step), worker.rank, worker.world_size)
        ids_BN = torch.from_numpy(np.stack([shards.row(index) for index in mine])).to(worker.device)
        num_targets = config.batch_size * (ids_BN.shape[1] - 1)
        return [
            Rows(input_ids_RN=rows, num_targets=num_targets) for rows in ids_BN.split(config.micro_batch_size)
        ]

    result = fit(
        optimizer,
        config,
        max_steps=max_steps,
        runtime=worker.runtime,
        batch_of=batch_of,
        loss_of=lambda rows: _loss(model, rows),
    )

    # 4. Held-out perplexity, and the model directory.
    heldout = heldout_sequences(inputs["prepare"], settings.model.context_length)
    metrics = {
        **result.metrics(),
        "parameters": float(sum(parameter.numel() for parameter in model.parameters())),
        "perplexity_heldout": perplexity(model, heldout, device=worker.device),
    }
    state = full_state(model)
    if ranks.is_main():
        save_model(model, out_dir, state)
        chat.save(out_dir)
    return metrics


def _initial_model(settings: PretrainSettings, inputs: Mapping[str, Path], chat: ChatTokenizer) -> CausalLM:
    if "model" in inputs:
        model = load_causal_lm(inputs["model"])
        check_context(model, settings.model.context_length)
        return model
    torch.manual_seed(stage_seed(settings.seed, "pretrain", "init"))
    return build_causal_lm(
        settings.model,
        vocab_size=chat.vocab_size,
        eos_token_id=chat.separator_id,
        pad_token_id=chat.pad_token_id,
    )


def _loss(model: CausalLM, rows: Rows) -> Tensor:
    """This micro-batch's share of the mean cross-entropy of the step, nats per token."""
    ids_RN = rows.input_ids_RN
    every_N = torch.arange(ids_RN.shape[1], device=ids_RN.device)
    logits_RNV = model({"input_ids": ids_RN, "use_cache": False}, every_N)
    targets_RN = target_mask(
        loss_mask_BS=torch.ones_like(ids_RN, dtype=torch.bool), position_ids_BS=every_N.expand_as(ids_RN)
    )
    loss = causal_lm_loss_sum(logits_BSV=logits_RNV, input_ids_BS=ids_RN, target_mask_BS=targets_RN)
    return loss / rows.num_targets
