"""Recipe: proximal policy optimisation of the sft model against the reward model, with a value model.

    prompts --RolloutSource--> engines --rollouts--> trainer: scores, KL to the reference, values, advantages
       ^                                                |
       +--- weights, version + 1 <--- sync <--- E epochs of clipped policy and value updates, one pack plan

Per token: -beta * k1 against the frozen reference; on the last token the normalised, clipped score. GAE,
advantages whitened once per batch. Schulman et al. 2017 (arXiv 1707.06347); InstructGPT (2203.02155); Huang
et al. 2024 (2403.17031).
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rollout.errors import WeightSyncError
from rollout.weight_sync import ModuleSource, ParityGate, ParityReport, SyncReport, WeightSync
from stages.config import PPOConfig, PPOSettings
from stages.data.batches import stage_seed
from stages.data.chat import ChatTokenizer, tokenizer_digest
from stages.data.experience import Judgement, RolloutPack, assemble, pack_rollouts
from stages.data.readers import read_prompts
from stages.errors import DataError, ModelError, TrainingStopped
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
from stages.training.checkpoint import Checkpoints
from stages.training.distributed import Worker, launch
from stages.training.forwards import logprobs_by
from stages.training.metrics import MetricsLog, StepLog
from stages.training.models import full_state, save_model
from stages.training.ppo_models import judge, load_ppo_models
from stages.training.ppo_totals import Clock, Totals
from stages.training.ppo_update import Learner

RECIPE_VERSION = 1
ROLLOUTS_FILE = "rollouts.jsonl"


def run(
    settings: PPOSettings, inputs: Mapping[str, Path], out_dir: Path, runtime: Runtime
) -> Mapping[str, float]:
    """Tune the policy; writes a model directory and rollouts.jsonl. Inputs: sft, reward.

    TrainingStopped (exit 5) on non-finite numbers or a KL beyond ppo.max_kl; ParityError (5) when engine and
    trainer disagree; EngineError, WeightSyncError (4).
    """
    config = settings.ppo
    if tokenizer_digest(inputs["sft"]) != tokenizer_digest(inputs["reward"]):
        raise ModelError(
            f"{inputs['reward']}: its tokenizer is not the policy's; "
            f"train the reward model from {inputs['sft']}"
        )
    chat = ChatTokenizer.load(inputs["sft"], settings.model.chat_template)
    prompts, num_dropped = _prompts(settings, chat)
    plan = SourcePlan(
        prompts=prompts,
        num_prompts=config.num_prompts,
        samples_per_prompt=config.samples_per_prompt,
        temperature=config.temperature,
        max_tokens=config.max_response_tokens,
        stop_token_ids=chat.stop_token_ids,
        seed=settings.seed,
    )
    engines = open_engines(
        settings.rollout,
        model_dir=inputs["sft"],
        dtype=ENGINE_DTYPE[config.precision],
        max_model_len=settings.model.context_length,
        runtime=runtime,
    )
    with engines as client, open_source(client, plan, runtime=runtime) as source:
        metrics = launch(
            train,
            runtime,
            settings=settings,
            inputs=dict(inputs),
            out_dir=out_dir,
            client=client,
            source=source,
            probe_prompts=prompts[: settings.rollout.parity_num_prompts],
        )
    return metrics | {"prompts": float(len(prompts)), "prompts_dropped": float(num_dropped)}


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
    learner = Learner(models, config, seed=settings.seed)
    controller = _controller(config)
    totals = Totals()
    checkpoints = Checkpoints(work_dir)
    first_step, extra = checkpoints.restore(learner.parts)
    if extra:
        controller, totals = controller.restored(extra["controller"]), Totals(**extra["totals"])
    log = MetricsLog(work_dir, max_steps=config.max_steps, resumed_step=first_step)
    rollouts_log = StepLog(work_dir / ROLLOUTS_FILE, resumed_step=first_step)

    # 2. The engines get the policy before the loop: a broken transport fails in the first minute.
    weights = ModuleSource(models.policy.inner, dtype=ENGINE_DTYPE[config.precision])
    sync = WeightSync(weights, engine=client.engine, loop=client.loop, config=client.config)
    gate = ParityGate(
        sync,
        prompts=probe_prompts,
        stop_token_ids=chat.stop_token_ids,
        temperature=config.temperature,
        seed=stage_seed(settings.seed, "ppo", "probe"),
        logprobs_of=logprobs_by(models.policy, micro_batch_size=config.pack_size, device=worker.device),
    )
    try:
        sync.sync(first_step)
        totals.see_parity(gate.check(first_step).max_abs_diff)

        # 3. Generate, judge, update, sync.
        for step in range(first_step, config.max_steps):
            clock = Clock()
            with clock.measure("generation"):
                batch = source.next(step)
            _check_versions(batch, step)
            with clock.measure("scoring"):
                packs = pack_rollouts(
                    batch.rollouts,
                    micro_batch_size=config.pack_size,
                    max_length=config.max_response_tokens,
                    device=worker.device,
                )
                judgements = [
                    judge(
                        models,
                        pack,
                        config,
                        end_of_turn_id=chat.end_of_turn_id,
                        stop_token_ids=chat.stop_token_ids,
                    )
                    for pack in packs
                ]
                experiences, summary = assemble(packs, judgements, config, kl_coef=controller.coef)
            _stop_if_kl_exploded(step, summary, config)
            with clock.measure("training"):
                update = learner.update(step, experiences, kl_coef=controller.coef)
            with clock.measure("sync"):
                report = sync.sync(step + 1)
                parity = gate.check(step + 1)
            if "rollout/kl" in summary:
                controller = controller.updated(kl=summary["rollout/kl"], num_sequences=len(batch.rollouts))
            if (step + 1) % config.log_every_steps == 0 or step + 1 == config.max_steps:
                log(step + 1, {**summary, **update, **clock.metrics(), **_sync_metrics(report, parity)})
            rollouts_log.write(_rollout_lines(step + 1, packs, judgements, chat, config))
            totals.add(
                clock,
                summary,
                responses=len(batch.rollouts),
                sync_seconds=report.seconds,
                parity_max_abs_diff=parity.max_abs_diff,
            )
            if (step + 1) % config.checkpoint_every_steps == 0 and step + 1 < config.max_steps:
                state = {"controller": controller.state_dict(), "totals": totals.state_dict()}
                checkpoints.save(step + 1, learner.parts, state)
    finally:
        sync.close()

    # 4. The model directory.
    save_model(models.policy, out_dir, full_state(models.policy))
    chat.save(out_dir)
    shutil.copyfile(work_dir / ROLLOUTS_FILE, out_dir / ROLLOUTS_FILE)
    return totals.metrics(version=config.max_steps)


def _prompts(settings: PPOSettings, chat: ChatTokenizer) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Prompt ids in file order, and how many rows were left out: malformed, or no room to respond."""
    config = settings.ppo
    rows = read_prompts(config.data, seed=stage_seed(settings.seed, "ppo", "rows"))
    rendered = [chat.prompt_ids(prompt.messages) for prompt in rows.records]
    longest = settings.model.context_length - config.max_response_tokens
    kept = tuple(ids for ids in rendered if len(ids) <= longest)
    if not kept:
        raise DataError(
            f"ppo.data: none of {len(rendered)} prompts has at most {longest} tokens "
            "(model.context_length - ppo.max_response_tokens)"
        )
    return kept, rows.num_skipped + len(rendered) - len(kept)


def _controller(config: PPOConfig) -> KlController:
    if config.kl_controller == "fixed":
        return FixedKl(coef=config.kl_coef)
    return AdaptiveKl(coef=config.kl_coef, target=config.kl_target, horizon=config.kl_horizon)


def _check_versions(batch: RolloutBatch, version: int) -> None:
    """In sync mode every token of a batch was drawn by the weights of the last sync."""
    drawn_by = {drawn for rollout in batch.rollouts for drawn in rollout.weight_versions}
    if drawn_by != {version}:
        raise WeightSyncError(
            f"ppo step {batch.step + 1}: tokens were drawn by weight versions {sorted(drawn_by)}, "
            f"not {version}"
        )


def _stop_if_kl_exploded(step: int, summary: Mapping[str, float], config: PPOConfig) -> None:
    if "rollout/kl" in summary and summary["rollout/kl"] > config.max_kl:
        raise TrainingStopped(
            f"ppo step {step + 1}: KL to the reference is {summary['rollout/kl']:.1f} nats per response, "
            f"above ppo.max_kl {config.max_kl:g}; raise ppo.kl_coef or lower ppo.lr"
        )


def _sync_metrics(report: SyncReport, parity: ParityReport) -> dict[str, float]:
    return {
        "sync/seconds": report.seconds,
        "sync/version": float(report.version),
        "sync/parity_max_abs_diff": parity.max_abs_diff,
    }


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
                "response": chat.decode(rollout.response_ids),
                "score": float(judgement.scores_B[index]),
                "kl": None if judgement.kl_B is None else float(judgement.kl_B[index]),
                "version": min(rollout.weight_versions),
                "finish_reason": rollout.finish_reason,
                "response_ids": list(rollout.response_ids),
            }
        left = max(0, left - len(pack.rollouts))
