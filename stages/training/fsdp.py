"""Models as they are placed here: transformers modules, sharded by FSDP2 where there are several workers.

    module --place--> Placed: outputs(pack, reads)          frozen: reference, reward model
                      Trained: take_step, state, save       with its AdamW

Owns: the one implementation of `Judge` and `Trainable`: the forward over a pack and what is read of its
logits, and the loop over the packs of a step. Does not own: AdamW, clipping and the schedule (optimize), what
a loss is (the recipes), where the module came from (models).
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from rollout.weight_source import ModuleSource
from stages.config.training import TrainingConfig
from stages.objectives.logprobs import token_entropies, token_logprobs
from stages.training import ranks
from stages.training.distributed import Worker, place
from stages.training.models import CausalLM, Precision, TokenScorer, freeze, full_state, save_model
from stages.training.optimize import Optimizer, Tally
from stages.training.randomness import recompute_activations
from stages.training.routing import routed_forward
from stages.training.trainable import (
    Accepts,
    Outputs,
    Pack,
    PackType,
    Reads,
    StepResult,
    TermLoss,
    TrainedState,
)


class Placed:
    """A model on its device that answers: a `Judge`.

    Example: judge = Placed(freeze(load_causal_lm(directory)))
             logprobs_N = judge.outputs(pack, Reads(logprobs=True, temperature=1.0)).logprobs_N
    """

    def __init__(self, model: CausalLM | TokenScorer) -> None:
        self.model = model

    @torch.no_grad()
    def outputs(self, pack: Pack, reads: Reads) -> Outputs:
        """See `Judge`."""
        return outputs_of(self.model, pack, reads)

    def weights(self, *, dtype: str) -> ModuleSource:
        """See `Trainable`. An evaluation's engine gets a frozen model's too."""
        return ModuleSource(self.model.inner, dtype=dtype)


class Trained(Placed):
    """A model with its optimizer: a `Trainable`.

    Example: policy = Trained(model, config, lr=1e-5, max_steps=100)
             result = policy.take_step(0, packs, Reads(logprobs=True, temperature=1.0), loss_of, accepts)
    """

    def __init__(
        self, model: CausalLM | TokenScorer, config: TrainingConfig, *, lr: float, max_steps: int
    ) -> None:
        super().__init__(model)
        self._optimizer = Optimizer(model, config, lr=lr, max_steps=max_steps)

    def take_step(
        self,
        step: int,
        packs: Sequence[PackType],
        reads: Reads,
        loss_of: Callable[[PackType, Outputs], TermLoss],
        accepts: Accepts,
    ) -> StepResult:
        """See `Trainable`."""
        self._optimizer.zero_grad()
        tally = Tally()
        for pack in packs:
            term = loss_of(pack, outputs_of(self.model, pack, reads))
            term.loss.backward()
            tally.add(term)
        return self._optimizer.step(step, tally, accepts)

    def state(self) -> TrainedState:
        """See `Trainable`."""
        return self._optimizer.state()

    def save(self, directory: Path) -> None:
        """See `Trainable`."""
        whole = full_state(self.model)
        if ranks.is_main():
            save_model(self.model, directory, whole)


def frozen(model: CausalLM | TokenScorer, worker: Worker, *, precision: Precision) -> Placed:
    """`model` without gradients, on the worker's device in its compute precision."""
    place(freeze(model), worker, precision=precision, trained=False)
    return Placed(model)


def trained(
    model: CausalLM | TokenScorer, worker: Worker, config: TrainingConfig, *, lr: float, max_steps: int
) -> Trained:
    """`model` on the worker's device with AdamW and the schedule of `config`, whose peak is `lr`."""
    if config.gradient_checkpointing:
        recompute_activations(model.inner)
    place(model, worker, precision=config.precision, trained=True)
    return Trained(model, config, lr=lr, max_steps=max_steps)


def outputs_of(model: CausalLM | TokenScorer, pack: Pack, reads: Reads) -> Outputs:
    """One forward over the row of `pack`, and what `reads` asks of it; differentiable."""
    return _of_language(model, pack, reads) if isinstance(model, CausalLM) else _of_scorer(model, pack, reads)


def _of_language(model: CausalLM, pack: Pack, reads: Reads) -> Outputs:
    assert not (reads.values or reads.final_values or reads.scores), "a language model has no scores"
    inputs, routed = pack.row.model_inputs(), None
    if reads.router_loss and model.routers:
        logits_1NV, routed = routed_forward(model, inputs, pack.predicting_N)
    else:
        logits_1NV = model(inputs, pack.predicting_N)
    logits_NV, logprobs_N, entropies_N = logits_1NV[0], None, None
    if reads.logprobs and reads.temperature is not None:
        logprobs_N = token_logprobs(logits=logits_NV, targets=pack.targets_N, temperature=reads.temperature)
    if reads.entropies and reads.temperature is not None:
        entropies_N = token_entropies(logits=logits_NV, temperature=reads.temperature)
    return Outputs(
        logprobs_N=logprobs_N,
        entropies_N=entropies_N,
        router_loss=None if routed is None else routed.balance_loss,
        expert_counts_LE=None if routed is None else routed.expert_counts_LE,
    )


def _of_scorer(model: TokenScorer, pack: Pack, reads: Reads) -> Outputs:
    assert not (reads.logprobs or reads.entropies), "a scorer has no distribution over tokens"
    inputs, values_N, ends_B = pack.row.model_inputs(), None, None
    reads_ends = reads.scores or reads.final_values
    if reads.values and reads_ends:
        values_N, ends_B = model(inputs, pack.predicting_N, pack.row.last_tokens())
    elif reads.values:
        values_N = model(inputs, pack.predicting_N)
    elif reads_ends:
        ends_B = model(inputs, pack.row.last_tokens())
    return Outputs(
        values_N=values_N,
        final_values_B=ends_B if reads.final_values else None,
        scores_B=ends_B if reads.scores else None,
    )
