"""Recipe: proximal policy optimisation of the sft model against the reward model, with a value model.

    prompts --RolloutSource--> engines --rollouts--> trainer: scores, KL to the reference, values, advantages
       ^                                                | gate: do engine and trainer agree on this batch?
       |                                                | journal: on the disk before the update
       +--- weights, version + 1 <--- sync <--- E epochs of clipped policy and value updates, one pack plan

Per token: -beta * k1 against the frozen reference; on the last token the normalised, clipped score. GAE,
advantages whitened once per batch. Where the engine computes in bf16, weights correct the policy loss for
what it sampled from another distribution (objectives.correction). Schulman et al. 2017 (arXiv 1707.06347);
InstructGPT (2203.02155); Huang et al. 2024 (2403.17031).
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rollout.errors import WeightSyncError
from rollout.ground.disk import disk_problems
from rollout.ground.errors import EnvironmentProblem
from rollout.parity import ParityGate
from rollout.weight_sync import WeightSync
from stages.config.ppo import PPOConfig, PPOSettings
from stages.data.batches import stage_seed
from stages.data.chat.directories import tokenizer_digest
from stages.data.chat.tokenizer import ChatTokenizer
from stages.data.experience import Judgement, RolloutPack, assemble, correction_metrics, pack_rollouts
from stages.data.fitting import check_left, data_metrics, fit_prompts, fit_rows
from stages.data.journal import Journal, JournalEntry
from stages.data.reading.readers import read_prompts
from stages.errors import Interrupted, ModelError
from stages.objectives.kl import AdaptiveKl, FixedKl, KlController
from stages.rollout_source import (
    ENGINE_DTYPE,
    EngineClient,
    RolloutBatch,
    Source,
    SourcePlan,
    open_engines,
    open_source,
)
from stages.runtime import Runtime
from stages.training import ranks
from stages.training.checkpoint import Checkpoints
from stages.training.distributed import Worker, launch, placed
from stages.training.forwards import logprobs_by
from stages.training.health import Health, RollBack, check_rollouts
from stages.training.metrics import MetricsLog, StepLog
from stages.training.ppo_models import PPOModels, judge_all, load_ppo_models
from stages.training.ppo_totals import Clock, Totals
from stages.training.ppo_update import Learner
from stages.training.publish import Publisher

RECIPE_VERSION = 4
ROLLOUTS_FILE = "rollouts.jsonl"


def run(
    settings: PPOSettings, inputs: Mapping[str, Path], out_dir: Path, runtime: Runtime
) -> Mapping[str, float]:
    """Tune the policy; writes a model directory and rollouts.jsonl. Inputs: sft, reward.

    TrainingStopped (exit 5) when bad steps do not end or a batch is beyond a limit of ppo; ParityError (5)
    when engine and trainer disagree; EngineError, WeightSyncError (4).
    """
    config = settings.ppo
    if tokenizer_digest(inputs["sft"]) != tokenizer_digest(inputs["reward"]):
        raise ModelError(
            f"{inputs['reward']}: its tokenizer is not the policy's; "
            f"train the reward model from {inputs['sft']}"
        )
    chat = ChatTokenizer.load(inputs["sft"], settings.model.chat_template)
    prompts, data = _prompts(settings, chat)
    plan = SourcePlan(
        prompts=prompts,
        num_prompts=config.num_prompts,
        samples_per_prompt=config.samples_per_prompt,
        temperature=config.temperature,
        max_tokens=config.max_response_tokens,
        stop_token_ids=chat.stop_token_ids,
        seed=settings.seed,
    )
    with (
        placed(runtime, settings.engines) as in_place,
        open_engines(
            settings.rollout,
            model_dir=inputs["sft"],
            dtype=ENGINE_DTYPE[config.precision],
            max_model_len=settings.model.context_length,
            runtime=in_place,
        ) as client,
        open_source(client, plan, runtime=in_place) as source,
    ):
        metrics = launch(
            train,
            in_place,
            settings=settings,
            inputs=dict(inputs),
            out_dir=out_dir,
            client=client,
            source=source,
            probe_prompts=prompts[: settings.rollout.parity_num_prompts],
        )
    return metrics | data


def train(
    worker: Worker,
    *,
    settings: PPOSettings,
    inputs: Mapping[str, Path],
    out_dir: Path,
    client: EngineClient,
    source: Source,
    probe_prompts: Sequence[tuple[int, ...]],
) -> dict[str, float]:
    """The loop proper, on every worker."""
    config, work_dir = settings.ppo, worker.runtime.work_dir

    # 1. Models, optimizers, and where an interrupted run left off.
    chat = ChatTokenizer.load(inputs["sft"], settings.model.chat_template)
    models = load_ppo_models(config, inputs, worker)
    worker.runtime.check_files()
    health = Health(config.health, worker.runtime)
    correction = settings.correction
    learner = Learner(models, config, correction=correction, seed=settings.seed, health=health)
    state = LoopState(controller=_controller(config), totals=Totals(), health=health)
    parts = {name: model.state() for name, model in learner.trained.items()}
    checkpoints = Checkpoints(work_dir, keep=config.keep_checkpoints)
    journal = Journal(work_dir)
    step, extra = checkpoints.restore(parts)
    state.restore(extra)
    log = MetricsLog(work_dir, max_steps=config.max_steps, resumed_step=step)
    rollouts_log = StepLog(work_dir / ROLLOUTS_FILE, resumed_step=step)

    # 2. The engines get the policy before the loop: a broken transport fails in the first minute.
    sync = _weight_sync(models, config, client)
    gate = ParityGate(
        sync,
        prompts=probe_prompts,
        stop_token_ids=chat.stop_token_ids,
        temperature=config.temperature,
        seed=stage_seed(settings.seed, "ppo", "probe"),
        logprobs_of=logprobs_by(models.policy, micro_batch_size=config.pack_size, device=worker.device),
    )
    publisher = Publisher(sync, gate, stage="ppo")
    judged = partial(_judged, models=models, config=config, chat=chat, device=worker.device)
    try:
        state.totals.see_parity(publisher.begin(step).parity.max_abs_diff)

        # 3. Generate, judge, update, sync.
        while step < config.max_steps:
            clock = Clock()
            position = step + health.state.data_offset
            with clock.measure("generation"):
                known = _journaled(journal, position, step)
            if known is not None:
                batch = _batch_of(known)
                with clock.measure("scoring"):
                    packs, judgements = judged(batch, step)
                if not publisher.accepts_batch(step, packs, judgements):
                    known = None
            if known is None:
                with clock.measure("generation"):
                    batch = source.next(position)
                with clock.measure("scoring"):
                    packs, judgements = judged(batch, step)
                publisher.check_batch(step, packs, judgements)
            with clock.measure("scoring"):
                if known is not None:
                    judgements = _with_scores(packs, judgements, known)
                experiences, summary = assemble(packs, judgements, config, kl_coef=state.controller.coef)
                summary |= correction_metrics(packs, judgements, correction)
            check_rollouts(step, summary, config)
            if known is None:
                _commit(journal, batch, packs, judgements)
            try:
                with clock.measure("training"):
                    update = learner.update(step, experiences, kl_coef=state.controller.coef)
            except RollBack:
                back, extra = checkpoints.roll_back(parts)
                next_step = health.rolled_back(
                    step, back if extra else None, extra["health"] if extra else {}
                )
                if extra:
                    step = next_step
                    state.restore({**extra, "health": health.state_dict()})
                    log.cut(step)
                    rollouts_log.cut(step)
                    published = publisher.publish(step, has_moved=learner.policy_steps > 0)
                    state.totals.see_parity(published.parity.max_abs_diff)
                    continue
                update = {}  # on behind the bad data, with the steps that were taken before them
            with clock.measure("sync"):
                published = publisher.publish(step + 1, has_moved=learner.policy_steps > 0)
            state.totals.see_parity(published.parity.max_abs_diff)
            if step >= config.value_warmup_steps:  # the policy was the reference until then
                state.see(summary, num_sequences=len(batch.rollouts))
            step += 1
            if step % config.log_every_steps == 0 or step == config.max_steps:
                seen = {**summary, **update, **health.metrics()}
                log(step, {**seen, **clock.metrics(), **published.metrics()})
            rollouts_log.write(_rollout_lines(step, packs, judgements, chat, config))
            state.totals.add(
                clock, summary, responses=len(batch.rollouts), sync_seconds=published.sync.seconds
            )
            state.totals.see_comparison(published.comparison_seconds)
            if not health.is_good():
                continue  # a checkpoint is a place to go back to: none in the middle of bad steps
            stopping = ranks.any_rank(worker.runtime.stop_requested())
            due = step % config.checkpoint_every_steps == 0
            if stopping or (due and step < config.max_steps):
                score = summary["rollout/score"]
                checkpoints.save(step, parts, state.state_dict(), score=score, regular=due)
                if ranks.is_main():
                    journal.drop_before(position - config.keep_checkpoints * config.checkpoint_every_steps)
            if stopping:
                raise Interrupted(
                    f"ppo: stopped at step {step} of {config.max_steps}, state saved; run the same "
                    "command to go on"
                )
    finally:
        publisher.close()
    health.check_end("policy loss")

    # 4. The model directory.
    models.policy.save(out_dir)
    if ranks.is_main():
        chat.save(out_dir)
        with disk_problems(out_dir):
            shutil.copyfile(work_dir / ROLLOUTS_FILE, out_dir / ROLLOUTS_FILE)
    skipped = {"steps_skipped": float(health.state.skipped)}
    return state.totals.metrics(version=config.max_steps) | skipped


@dataclass(kw_only=True)
class LoopState:
    """What a checkpoint holds besides weights and optimizers."""

    controller: KlController
    totals: Totals
    health: Health

    def state_dict(self) -> dict[str, Any]:
        return {
            "controller": self.controller.state_dict(),
            "totals": self.totals.state_dict(),
            "health": self.health.state_dict(),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; from here without one."""
        if saved:
            self.controller = self.controller.restored(saved["controller"])
            self.totals = Totals(**saved["totals"])
            self.health.restore(saved["health"])

    def see(self, summary: Mapping[str, float], *, num_sequences: int) -> None:
        """The KL of a batch steers the next one's coefficient."""
        if "rollout/kl" in summary:
            self.controller = self.controller.updated(kl=summary["rollout/kl"], num_sequences=num_sequences)


def _weight_sync(models: PPOModels, config: PPOConfig, client: EngineClient) -> WeightSync:
    """Every rank gathers; rank 0 alone talks to the engines."""
    weights = models.policy.weights(dtype=ENGINE_DTYPE[config.precision])
    if not ranks.is_main():
        return WeightSync(weights, engine=None, loop=None, config=client.config)
    return WeightSync(weights, engine=client.engine, loop=client.loop, config=client.config, host=client.host)


def _judged(
    batch: RolloutBatch,
    version: int,
    *,
    models: PPOModels,
    config: PPOConfig,
    chat: ChatTokenizer,
    device: torch.device,
) -> tuple[list[RolloutPack], list[Judgement]]:
    """The pack plan of a batch that `version` drew, and what the models say of it. Every rank, together."""
    _check_versions(batch, version)
    packs = pack_rollouts(
        batch.rollouts,
        micro_batch_size=config.pack_size,
        max_length=config.max_response_tokens,
        device=device,
    )
    judgements = judge_all(
        models, packs, config, end_of_turn_id=chat.end_of_turn_id, stop_token_ids=chat.stop_token_ids
    )
    return packs, judgements


def _journaled(journal: Journal, position: int, version: int) -> JournalEntry | None:
    """The batch that a killed run had drawn for this step; None where it is to be drawn again."""
    entry = journal.read(position)
    if entry is not None and _versions(_batch_of(entry)) != {version}:
        entry = None
    is_known: bool = ranks.from_main(lambda: entry is not None)
    if is_known and entry is None:
        raise EnvironmentProblem(
            f"ppo step {version + 1}: rank {ranks.rank()} does not see the journal that rank 0 sees; outputs "
            "must be one file system for all workers"
        )
    return entry if is_known else None


def _batch_of(entry: JournalEntry) -> RolloutBatch:
    return RolloutBatch(step=entry.step, prompt_indices=entry.prompt_indices, rollouts=entry.rollouts)


def _with_scores(
    packs: Sequence[RolloutPack], judgements: Sequence[Judgement], entry: JournalEntry
) -> list[Judgement]:
    """The judgements with the scores that were committed: what judges may not say the same twice."""
    scores = {rollout.request_id: score for rollout, score in zip(entry.rollouts, entry.scores, strict=True)}
    return [
        replace(
            judgement,
            scores_B=judgement.scores_B.new_tensor([scores[rollout.request_id] for rollout in pack.rollouts]),
        )
        for pack, judgement in zip(packs, judgements, strict=True)
    ]


def _commit(
    journal: Journal, batch: RolloutBatch, packs: Sequence[RolloutPack], judgements: Sequence[Judgement]
) -> None:
    """On the disk before the update: a kill in it replays these rollouts and draws no others."""
    if not ranks.is_main():
        return
    scores = {
        rollout.request_id: score
        for pack, judgement in zip(packs, judgements, strict=True)
        for rollout, score in zip(pack.rollouts, judgement.scores_B.tolist(), strict=True)
    }
    journal.write(
        JournalEntry(
            step=batch.step,
            prompt_indices=batch.prompt_indices,
            rollouts=batch.rollouts,
            scores=tuple(scores[rollout.request_id] for rollout in batch.rollouts),
        )
    )


def _prompts(
    settings: PPOSettings, chat: ChatTokenizer
) -> tuple[tuple[tuple[int, ...], ...], dict[str, float]]:
    """Prompt ids in file order, and what became of the rows, as metrics."""
    config = settings.ppo
    rows = read_prompts(config.data, seed=stage_seed(settings.seed, "ppo", "rows"))
    longest = settings.model.max_prompt_tokens(config.max_response_tokens)
    fitted = fit_rows(rows, partial(fit_prompts, chat, max_prompt_tokens=longest))
    check_left(rows.sizes, fitted)
    kept = tuple(one.example for one in fitted if one.example is not None)
    return kept, {"prompts": float(len(kept)), **data_metrics(rows, fitted, "prompts")}


def _controller(config: PPOConfig) -> KlController:
    if config.kl_controller == "fixed":
        return FixedKl(coef=config.kl_coef)
    return AdaptiveKl(coef=config.kl_coef, target=config.kl_target, horizon=config.kl_horizon)


def _versions(batch: RolloutBatch) -> set[int]:
    """The weight versions that drew the tokens of a batch."""
    return {drawn for rollout in batch.rollouts for drawn in rollout.weight_versions}


def _check_versions(batch: RolloutBatch, version: int) -> None:
    """In sync mode every token of a batch was drawn by the weights of the last sync."""
    drawn_by = _versions(batch)
    if drawn_by != {version}:
        raise WeightSyncError(
            f"ppo step {version + 1}: tokens were drawn by weight versions {sorted(drawn_by)}, not {version}"
        )


def _rollout_lines(
    step: int,
    packs: Sequence[RolloutPack],
    judgements: Sequence[Judgement],
    chat: ChatTokenizer,
    config: PPOConfig,
) -> Iterator[dict[str, Any]]:
    """The first `num_logged_rollouts` of a step, as text with what was made of them."""
    left = config.num_logged_rollouts
    for pack, judgement in zip(packs, judgements, strict=True):
        for index, rollout in enumerate(pack.rollouts[:left]):
            yield {
                "step": step,
                "prompt": chat.decode(rollout.prompt_ids),
                "response": chat.response_text(rollout.response_ids),
                "score": float(judgement.scores_B[index]),
                "kl": None if judgement.kl_B is None else float(judgement.kl_B[index]),
                "version": min(rollout.weight_versions),
                "finish_reason": rollout.finish_reason,
                "response_ids": list(rollout.response_ids),
            }
        left = max(0, left - len(pack.rollouts))
