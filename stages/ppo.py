"""Recipe: proximal policy optimisation of the sft model against the reward model, with a value model.

    prompts --source--> engines --trajectories--> trainer: scores, KL to the reference, values, advantages
       ^                                             | gate: do engine and trainer agree on this batch?
       |                                             | source: on the disk before the update
       +--- weights, version + 1 <--- sync <--- E epochs of clipped policy and value updates, one pack plan

Per token: -beta * k1 against the frozen reference; on the last token the normalised, clipped score. GAE,
advantages whitened once per batch. Where the engine computes in bf16, weights correct the policy loss for
what it sampled from another distribution. Schulman et al. 2017 (arXiv 1707.06347); InstructGPT (2203.02155);
Huang et al. 2024 (2403.17031). The parts are in stages/rl.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from rollout.ground.disk import disk_problems
from stages.config.ppo import PPOSettings
from stages.data.chat.directories import tokenizer_digest
from stages.data.chat.tokenizer import ChatTokenizer
from stages.engines import ENGINE_DTYPE, EngineClient, open_engines
from stages.errors import ModelError
from stages.rl.algorithms import algorithm_of
from stages.rl.experience import batch_metrics, experiences_of
from stages.rl.iterations import Iterations, agreed_batch
from stages.rl.limits import check_rollouts
from stages.rl.publish import publisher_of
from stages.rl.roles import Judges, load_models, scores_to_commit
from stages.rl.source import Source, SourcePlan, open_source, prompts_of
from stages.rl.update import Learner
from stages.runtime import POLICY, REWARD_MODEL, Runtime
from stages.training import ranks
from stages.training.distributed import Worker
from stages.training.health import Health
from stages.training.loop import run_loop
from stages.training.models import set_stop_tokens

RECIPE_VERSION = 4
ROLLOUTS_FILE = "rollouts.jsonl"


def prepare(settings: PPOSettings, inputs: Mapping[str, Path], runtime: Runtime) -> Mapping[str, Any]:
    """What the stage task reads and checks before anything is placed: what is sampled, and what became of the
    rows, as metrics.
    """
    if tokenizer_digest(inputs[POLICY]) != tokenizer_digest(inputs[REWARD_MODEL]):
        raise ModelError(
            f"{inputs[REWARD_MODEL]}: its tokenizer is not the policy's; "
            f"train the reward model from {inputs[POLICY]}"
        )
    chat = ChatTokenizer.load(inputs[POLICY], settings.model.chat_template)
    prompts, data = prompts_of(settings, chat)
    runtime.check_files()
    return {"plan": SourcePlan.of(settings, prompts, stop_token_ids=chat.stop_token_ids), "data": data}


@contextmanager
def held(
    settings: PPOSettings,
    inputs: Mapping[str, Path],
    runtime: Runtime,
    *,
    plan: SourcePlan,
    data: Mapping[str, float],
) -> Iterator[Mapping[str, Any]]:
    """What the stage task holds while the workers train: the engines, and the source that draws from them."""
    with (
        open_engines(
            settings.rollout,
            model_dir=inputs[POLICY],
            dtype=ENGINE_DTYPE[settings.ppo.precision],
            max_model_len=settings.model.context_length,
            runtime=runtime,
        ) as client,
        open_source(client, plan, runtime=runtime) as source,
    ):
        probed = [prompt.ids for prompt in plan.prompts[: settings.rollout.parity_num_prompts]]
        yield {"client": client, "source": source, "probe_prompts": probed, "data": data}


def train(
    worker: Worker,
    *,
    settings: PPOSettings,
    inputs: Mapping[str, Path],
    out_dir: Path,
    client: EngineClient,
    source: Source,
    probe_prompts: Sequence[tuple[int, ...]],
    data: Mapping[str, float],
) -> dict[str, float]:
    """Tune the policy; writes a model directory and rollouts.jsonl. Inputs: policy, reward_model. `data`:
    what became of the rows, as metrics.

    TrainingStopped (exit 5) when bad steps do not end or a batch is beyond a limit of ppo; ParityError (5)
    when engine and trainer disagree; EngineError, WeightSyncError (4).
    """
    # 1. Models, optimizers, and what an algorithm makes of a batch.
    config = settings.ppo
    chat = ChatTokenizer.load(inputs[POLICY], settings.model.chat_template, warns=False)
    algorithm = algorithm_of(settings)
    policy_dir, reward_dir = inputs[POLICY], inputs[REWARD_MODEL]
    models = load_models(algorithm, config, worker, policy_dir=policy_dir, reward_dir=reward_dir)
    judges = Judges.of(models, algorithm, config, chat=chat, device=worker.device)
    health = Health(config.health, worker.runtime)
    learner = Learner(models.trained, algorithm.terms, config, seed=settings.seed, health=health)

    # 2. The way of the policy's weights to the engines, and its gate.
    publisher = publisher_of(models.policy, client, settings, worker, chat=chat, prompts=probe_prompts)

    def step(iterations: Iterations, number: int, position: int) -> None:
        now = iterations.begin(number, position)
        kl_coef, clock = now.kl_coef, now.clock
        # 3. Rollouts by the weights that the engines hold, and what the models say of them.
        drawn, batch = agreed_batch(source, publisher, judges, now)
        # 4. Rewards, advantages and returns of the whole batch.
        with clock.measure("scoring"):
            credited = algorithm.credit(batch, kl_coef=kl_coef)
            experiences = experiences_of(batch, credited, kl_coef=kl_coef, keeps_anchor=learner.keeps_anchor)
            seen = batch_metrics(batch, credited, kl_coef=kl_coef, correction=algorithm.correction)
        # 5. A batch that must not be learned from ends the run.
        check_rollouts(number, seen, config)
        # 6. On the disk before the update: a kill in it replays these rollouts and draws no others.
        if ranks.is_main() and not drawn.is_replayed:
            source.commit(position, scores_to_commit(batch, drawn))
        # 7. Epochs of clipped value and policy updates; then the engines get the new policy, and prove it.
        now.batch, now.seen = batch, seen
        with clock.measure("training"):
            now.learnt = learner.update(number, experiences)

    iterations = Iterations(
        step,
        learner,
        config=config,
        source=source,
        publisher=publisher,
        chat=chat,
        rollouts_file=worker.runtime.work_dir / ROLLOUTS_FILE,
    )
    with closing(publisher):
        run_loop(iterations, config, max_steps=config.max_steps, runtime=worker.runtime)
    metrics = iterations.summary()

    # 8. The model directory: it stops at the template's end of turn, also where no chat model was tuned.
    set_stop_tokens(
        models.policy.model,
        eos_token_id=chat.end_of_turn_id,
        stop_token_ids=chat.stop_token_ids,
        pad_token_id=chat.pad_token_id,
    )
    models.policy.save(out_dir)
    if ranks.is_main():
        chat.save(out_dir)
        with disk_problems(out_dir):
            shutil.copyfile(worker.runtime.work_dir / ROLLOUTS_FILE, out_dir / ROLLOUTS_FILE)
    return {**metrics, **data}
