"""The stage table: the one file that knows stages. Everything else reads its columns.

    STAGES["sft"] -> Stage(recipe, settings, needs, makes, data, models, headline, ...)

A further stage is one more row, its recipe (stages/<name>.py) and its section and settings in `experiment`.

Owns: the rows, and what a column means. Does not own: the graph of one config (dag), what names an artifact
(identity), the checks of sections against each other (experiment). Light import: recipes are named only.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from pipeline.experiment import SETTINGS, ExperimentConfig
from stages.config.ppo import TRAINED_ROLES, Role
from stages.config.stage import StageSettings
from stages.data.reading.schemas import Kind
from stages.runtime import BASE, CORPUS, POLICY, REWARD_MODEL, START

MODEL = "model"
"""Input key of the directory that `model.path` names; every other input key is the name of a stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """One input of a stage.

    Example: Need(role="start", key="pretrain")
    """

    role: str  # what the recipe calls it
    key: str  # the stage that makes it, or MODEL


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The code of a stage, as "module:function": it is imported only where the stage runs."""

    entry: str  # what every worker runs, or the stage task where it has none
    on_workers: bool = False
    prepares: str | None = None
    """What the stage task reads and checks before the workers are placed. It returns more arguments for them,
    or for `holds`.
    """
    holds: str | None = None
    """A context that the stage task opens once they are placed, while they run. It yields their arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """The datasets in the section of a stage."""

    field: str  # the setting that lists them
    reads: Kind
    asks: Literal["nobody", "to train", "to evaluate"]  # what the prompts in it are for


ModelKind = Literal["language model", "scorer"]
"""A scorer has a head of one number in place of the output head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """The models that each worker of a stage holds."""

    trained: tuple[ModelKind, ...] = ()
    frozen: tuple[ModelKind, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A metric that the headline of its stage shows, and a card of the report."""

    key: str
    words: str  # of the headline, around the value: "loss {}"
    form: Literal["share", "number", "count"] = "number"  # a share is a mean of numbers from 0 to 1
    counted: str | None = None  # the metric that says over how many it is a mean
    card: str | None = None  # the title of its card; None: the report shows it among all figures only
    small_print: str = ""  # of the card
    beside: tuple[str, str] | None = None  # a further metric of the small print, and the words around it


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """What an evaluation says of each model that it compares, under `<measure>_<model>` in its metrics."""

    label: str  # in the report's table
    card: str | None = None  # the title of its card; None: it has none
    form: Literal["share", "number"] = "number"


Inputs = Callable[[ExperimentConfig, Collection[str]], tuple[Need, ...]]
"""(config, keys given besides) -> what a stage takes: what is there of it, and what it must have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One row of the stage table."""

    name: str
    recipe: Recipe
    needs: Inputs
    makes: Literal["corpus", "policy", "reward model", "figures"]
    is_tuned: bool = False  # what it makes answers in turns of a chat; an evaluation compares such models
    lacks: Callable[[Collection[str]], str | None] = lambda keys: None
    """Input keys -> what it cannot run without, although the graph can be planned; None: nothing."""
    data: Data | None = None  # None: its section lists no datasets
    also_reads: Mapping[str, str] = field(default_factory=dict)
    """Field of its settings -> the setting of another section whose datasets that field holds."""
    models: Callable[[ExperimentConfig, Collection[str]], Models] = lambda config, keys: Models()
    headline: tuple[Figure, ...] = ()  # the most telling first
    matter: tuple[str, ...] = ()  # settings that `rlhf check` shows where a config does not state them
    rates: Mapping[str, float] = field(default_factory=dict)
    """Learning rates for a given model of 1 B parameters or more, with their sources beside them."""
    has_workers: bool = True  # else it works in the stage task and reserves nothing
    syncs_what_it_trains: bool = False  # its engines generate with the weights and in the precision it trains
    sequences_per_row: int = 1  # of a micro-batch: a pair is two

    @property
    def settings(self) -> type[StageSettings]:
        """What the recipe may read, hence what is fingerprinted."""
        return SETTINGS[self.name]


def missing(key: str, user: str) -> str:
    """What to say of the input `key` that `user` needs and that no section makes."""
    return (
        f"{key}: no such section, which {user} needs; add `{key}:`, or give `rlhf {user}` --input {key}=DIR"
    )


def is_there(config: ExperimentConfig, given: Collection[str], key: str) -> bool:
    """Whether an input is configured, or given besides."""
    if key == MODEL:
        return config.model.path is not None
    return key in given or getattr(config, key) is not None


def _start(config: ExperimentConfig) -> str:
    """The model that tuning starts from."""
    return MODEL if config.pretrain is None and config.model.path is not None else "pretrain"


def _prepare_needs(config: ExperimentConfig, given: Collection[str]) -> tuple[Need, ...]:
    return (Need(role=START, key=MODEL),) if is_there(config, given, MODEL) else ()


def _pretrain_needs(config: ExperimentConfig, given: Collection[str]) -> tuple[Need, ...]:
    return (Need(role=CORPUS, key="prepare"), *_prepare_needs(config, given))


def _sft_needs(config: ExperimentConfig, given: Collection[str]) -> tuple[Need, ...]:
    return (Need(role=START, key=_start(config)),)


def _reward_needs(config: ExperimentConfig, given: Collection[str]) -> tuple[Need, ...]:
    is_from_sft = config.reward is None or config.reward.init_from == "sft"
    return (Need(role=START, key="sft" if is_from_sft else _start(config)),)


def _ppo_needs(config: ExperimentConfig, given: Collection[str]) -> tuple[Need, ...]:
    starts_untuned = not is_there(config, given, "sft") and is_there(config, given, _start(config))
    scores = (Need(role=REWARD_MODEL, key="reward"),) if is_there(config, given, "reward") else ()
    return (Need(role=POLICY, key=_start(config) if starts_untuned else "sft"), *scores)


def _evaluate_needs(config: ExperimentConfig, given: Collection[str]) -> tuple[Need, ...]:
    needs = (
        Need(role=CORPUS, key="prepare"),
        *(Need(role=model, key=_start(config) if model == BASE else model) for model in EVALUATED),
        Need(role=REWARD_MODEL, key="reward"),
    )
    made = ["prepare", MODEL, *STAGES].index
    there = (need for need in needs if is_there(config, given, need.key))
    return tuple(sorted(there, key=lambda need: made(need.key)))


def _ppo_lacks(keys: Collection[str]) -> str | None:
    return None if "reward" in keys else missing("reward", "ppo")


def _evaluate_lacks(keys: Collection[str]) -> str | None:
    return None if {MODEL, "pretrain", *_TUNED}.intersection(keys) else missing("sft", "evaluate")


def _language_model(config: ExperimentConfig, keys: Collection[str]) -> Models:
    return Models(trained=("language model",))


def _scorer(config: ExperimentConfig, keys: Collection[str]) -> Models:
    return Models(trained=("scorer",))


_KINDS: Mapping[Role, ModelKind] = {
    "policy": "language model",
    "reference": "language model",
    "value": "scorer",
    "reward_model": "scorer",
}


def _ppo_models(config: ExperimentConfig, keys: Collection[str]) -> Models:
    roles = () if config.ppo is None else config.ppo.roles
    return Models(
        trained=tuple(_KINDS[role] for role in roles if role in TRAINED_ROLES),
        frozen=tuple(_KINDS[role] for role in roles if role not in TRAINED_ROLES),
    )


def _evaluate_models(config: ExperimentConfig, keys: Collection[str]) -> Models:
    """Each of the models that are compared, and the reward model."""
    makes = [STAGES[key].makes if key in STAGES else "policy" for key in keys]
    policies: list[ModelKind] = ["language model" for made in makes if made == "policy"]
    return Models(frozen=(*policies, *(("scorer",) if "reward model" in makes else ())))


_STEPS = ("max_steps", "num_epochs")
_TRAINING = (
    "lr_schedule",
    "warmup_frac",
    "batch_size",
    "micro_batch_size",
    "precision",
    "gradient_checkpointing",
)
_LOSS = Figure(key="loss_final", words="loss {}")

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            name="prepare",
            recipe=Recipe(entry="stages.prepare:run"),
            needs=_prepare_needs,
            makes="corpus",
            data=Data(field="data", reads="documents", asks="nobody"),
            also_reads={"evaluation_prompts": "evaluate.prompts"},
            headline=(
                Figure(key="documents_kept", words="{} documents", form="count"),
                Figure(key="tokens_train", words="{} tokens", form="count"),
            ),
            matter=("vocab_size", "packing", "exact_dedup"),
            has_workers=False,
        ),
        Stage(
            name="pretrain",
            recipe=Recipe(entry="stages.pretrain:train", on_workers=True),
            needs=_pretrain_needs,
            makes="policy",
            models=_language_model,
            headline=(Figure(key="perplexity_heldout", words="held-out perplexity {}"), _LOSS),
            matter=(*_STEPS, "lr", *_TRAINING),
            # It goes on with somebody's pretraining: the default of transformers' TrainingArguments.
            rates={"lr": 5e-5},
        ),
        Stage(
            name="sft",
            recipe=Recipe(entry="stages.sft:train", on_workers=True, prepares="stages.sft:prepare"),
            needs=_sft_needs,
            makes="policy",
            is_tuned=True,
            data=Data(field="data", reads="conversations", asks="to train"),
            models=_language_model,
            headline=(_LOSS,),
            matter=(*_STEPS, "lr", *_TRAINING),
            rates={"lr": 2e-5},  # Zephyr 7B (alignment-handbook), TRL's scripts/sft.py
        ),
        Stage(
            name="reward",
            recipe=Recipe(entry="stages.reward:train", on_workers=True, prepares="stages.reward:prepare"),
            needs=_reward_needs,
            makes="reward model",
            data=Data(field="data", reads="pairs", asks="nobody"),
            models=_scorer,
            headline=(
                Figure(
                    key="accuracy_heldout",
                    words="accuracy on held-out pairs {}",
                    form="share",
                    counted="pairs_heldout",
                    card="Reward model accuracy",
                    small_print="held-out pairs",
                    beside=("accuracy_longer_wins", "longer wins: {}"),
                ),
                _LOSS,
            ),
            matter=("init_from", *_STEPS, "lr", *_TRAINING, "too_long", "min_accuracy"),
            rates={"lr": 1e-5},  # TRL's reward_modeling.py, for 0.5 B and 8 B
            sequences_per_row=2,
        ),
        Stage(
            name="ppo",
            recipe=Recipe(
                entry="stages.ppo:train",
                on_workers=True,
                prepares="stages.ppo:prepare",
                holds="stages.ppo:held",
            ),
            needs=_ppo_needs,
            lacks=_ppo_lacks,
            makes="policy",
            is_tuned=True,
            data=Data(field="data", reads="prompts", asks="to train"),
            models=_ppo_models,
            headline=(
                Figure(key="score_final", words="reward {}"),
                Figure(key="kl_final", words="KL {}"),
                Figure(
                    key="samples_per_second",
                    words="{} responses per second",
                    card="Responses per second",
                    small_print="whole loop",
                    beside=("sync_seconds_median", "a weight sync takes {} s"),
                ),
                Figure(
                    key="parity_max_abs_diff",
                    words="engine and trainer within {} nats",
                    card="Engine against trainer",
                    small_print="worst log-prob difference after a sync, nats",
                ),
            ),
            matter=(
                "max_steps",
                "num_prompts",
                "samples_per_prompt",
                "max_response_tokens",
                "temperature",
                "num_epochs",
                "lr",
                "value_lr",
                *_TRAINING,
                "gamma",
                "gae_lambda",
                "clip_low",
                "clip_high",
                "kl_coef",
                "kl_placement",
                "truncation",
                "missing_eos_penalty",
                "max_kl",
            ),
            rates={"lr": 1e-6, "value_lr": 1e-5},  # verl's run_qwen2-7b_rm.sh, policy and critic
            syncs_what_it_trains=True,
        ),
        Stage(
            name="evaluate",
            recipe=Recipe(entry="stages.evaluate:evaluate", on_workers=True),
            needs=_evaluate_needs,
            lacks=_evaluate_lacks,
            makes="figures",
            data=Data(field="prompts", reads="prompts", asks="to evaluate"),
            models=_evaluate_models,
            matter=("max_prompts", "max_response_tokens", "temperature", "base_prompt"),
        ),
    )
}
"""In an order in which every stage comes after all it may need."""


def data_of(stage: str) -> Data:
    """The datasets of a stage that has some."""
    data = STAGES[stage].data
    assert data is not None, f"{stage} lists no datasets"
    return data


_TUNED = tuple(stage.name for stage in STAGES.values() if stage.is_tuned)
EVALUATED = (BASE, *_TUNED)
"""The names of the models that an evaluation compares, in the order of their tuning: they end its metrics."""
MEASURES: Mapping[str, Measure] = {
    "score": Measure(label="score, 0 to 1", card="Score", form="share"),
    "reward": Measure(label="reward model, normalised", card="Reward"),
    "perplexity": Measure(label="perplexity, held-out text"),
    "length": Measure(label="length, tokens"),
    "truncated": Measure(label="responses without an end", form="share"),
}
"""By name, the most telling first."""
