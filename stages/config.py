"""Every knob of every stage: documented, bounded, with its one default. Light import: pydantic only.

    ExperimentConfig (pipeline) --settings_for(stage)--> XxxSettings --run()--> recipe

A recipe receives its `XxxSettings`: the sections it may read and no others, so that what is read is what is
fingerprinted.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from rollout.config import EXECUTION, EngineConfig, Section

DataFormat = Literal[
    "text",
    "messages",
    "sharegpt",
    "prompt_completion",
    "instruction",
    "preference",
    "hh_transcript",
    "ranked",
    "tree",
    "labelled",
    "prompt",
]
QualityRules = Literal["gopher_quality", "gopher_repetition", "c4", "fineweb"]
CorrectionType = Literal[
    "off", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask"
]


class DataSource(Section):
    """One dataset of a stage."""

    path: str = Field(min_length=1, json_schema_extra=EXECUTION)
    """Local file, glob or directory (jsonl, json, parquet, arrow, csv, tsv, txt; .gz and .zst of them), or
    the hub id of a dataset, `organisation/name`. Identified by its content, not by this name.
    """
    revision: str | None = Field(default=None, json_schema_extra=EXECUTION)
    """Commit, tag or branch of a hub id; absent: its newest. The commit it means is recorded."""
    subset: str | None = None
    """Configuration of a hub id that has several."""
    split: str = "train"
    """Split of a hub id, or of a directory whose file and folder names tell several (train, validation,
    test). A named file or glob is read whole, and so is a directory whose names tell one split or none.
    """
    format: DataFormat | None = None
    """Row schema; detected from the columns and the stage when absent."""
    columns: dict[str, str] | list[str] = Field(default_factory=dict)
    """Field name -> column that holds it, where the file's names differ (e.g. `prompt: question`); a path
    reaches into nested values (`completion: instances.0.output`), with `*` into every item of a list
    (`scores: answers.*.votes`). A list names the columns of a csv or tsv file that has no header line.
    """
    document: Literal["file", "paragraph", "line"] = "paragraph"
    """What one document of a txt file is: all of it, a block of lines between blank lines, or a line."""
    min_margin: float = Field(default=0.0, ge=0)
    """Ranked responses make a pair when their scores (or ranks) differ by more than this."""
    weight: float = Field(default=1.0, ge=0, le=1000)
    """How often each row is seen per epoch: 2 twice, 0.5 a seeded half of the rows."""
    part: Literal["all", "train", "heldout"] = "all"
    """Which rows to use: `heldout` those of a share `heldout_frac` chosen by a hash of what the user asks
    first, `train` the others. The same file may so give one stage its training rows and another its held-out
    ones.
    """
    heldout_frac: float = Field(default=0.1, gt=0, lt=1)
    """Share of the rows that part: heldout means."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a malformed row does: end the run, or be left out and counted."""
    max_skipped_frac: float = Field(default=0.01, ge=0, le=1, json_schema_extra=EXECUTION)
    """Under on_bad_row: skip, the share of the rows (but at least one row) that may be left out."""

    @property
    def column_of(self) -> dict[str, str]:
        """Field -> column, as configured."""
        return self.columns if isinstance(self.columns, dict) else {}

    @property
    def header(self) -> list[str] | None:
        """Names of the columns of a csv or tsv file without header line."""
        return self.columns if isinstance(self.columns, list) else None


class ScoreFunction(Section):
    """A user's own scoring function: the one kind of code a config may name."""

    type: Literal["python"] = "python"
    """A function in a local Python file."""
    path: Path = Field(json_schema_extra=EXECUTION)
    """The file; identified by its content."""
    function: str = "score"
    """`function(prompt, response, row)` -> score in [0, 1], or a mapping with `score` and named
    components.
    """


class ModelConfig(Section):
    """`model:` - take a model (`path`) or describe one to train from scratch: a LLaMA, or with num_experts a
    Mixtral.
    """

    path: str | None = Field(default=None, json_schema_extra=EXECUTION)
    """Model directory or hub id to start from; identified by its content. Absent: train from scratch."""
    revision: str | None = Field(default=None, json_schema_extra=EXECUTION)
    """Commit of a hub id."""
    architecture: Path | None = Field(default=None, json_schema_extra=EXECUTION)
    """config.json of a hub model that is not on this machine yet: `rlhf check` plans memory by it."""
    layers: int = Field(default=4, ge=1)
    """Transformer layers."""
    hidden_size: int = Field(default=160, ge=32)
    """Width of the residual stream."""
    intermediate_size: int = Field(default=432, ge=32)
    """Width of the MLP; of each expert where there are experts."""
    num_experts: int | None = Field(default=None, ge=2, le=4096)
    """Experts of each layer, a mixture (MoE) in place of the MLP; absent: none."""
    num_experts_per_tok: int = Field(default=2, ge=1)
    """Experts that work for each token, chosen and weighed by a router."""
    num_heads: int = Field(default=5, ge=1)
    """Attention heads; vLLM on CPU wants hidden_size / num_heads to be 32 or a larger multiple of 16."""
    num_kv_heads: int = Field(default=5, ge=1)
    """Key/value heads; must divide num_heads."""
    tie_embeddings: bool = True
    """Share the input embedding with the output head."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary position embedding."""
    context_length: int = Field(default=256, ge=16)
    """Tokens a sequence may have, prompt and response together."""
    chat_template: Path | None = Field(default=None, json_schema_extra=EXECUTION)
    """Jinja file; absent: the tokenizer's own template, else ChatML. Identified by its content."""

    def max_prompt_tokens(self, max_response_tokens: int) -> int:
        """Tokens of the longest prompt whose responses can be scored within the context: a response that was
        cut off at `max_response_tokens` has no end token yet, and scoring appends one.
        """
        return self.context_length - max_response_tokens - 1

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.path is None:
            if self.hidden_size % self.num_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
                )
            if self.num_heads % self.num_kv_heads:
                raise ValueError(
                    f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
                )
            if self.hidden_size // self.num_heads in (8, 16):
                raise ValueError(
                    "hidden_size / num_heads is below 32, which vLLM's CPU attention rejects; use 32 or more"
                )
        return self

    @model_validator(mode="after")
    def _experts_fit(self) -> Self:
        if self.num_experts is None:
            return self
        if self.path is not None:
            raise ValueError("num_experts describes a model from scratch, path takes one; remove either")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is more than num_experts {self.num_experts}"
            )
        if self.hidden_size % 32:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of 32, which vLLM's experts on CPU ask for"
            )
        return self


class NearDedupConfig(Section):
    """`prepare.near_dedup:` - MinHash-LSH; candidates are verified by their true Jaccard similarity."""

    jaccard: float = Field(default=0.8, gt=0, le=1)
    """A document this similar to an earlier one that is kept is dropped."""
    ngram: int = Field(default=5, ge=1, le=100)
    """Words per shingle; a shorter document is one shingle."""
    num_perm: int = Field(default=128, ge=16, le=1024)
    """Hash functions of a signature: more find more of the pairs that are just similar enough."""


class PrepareConfig(Section):
    """`prepare:` - documents in; tokenizer, packed shards and statistics out."""

    data: list[DataSource] = Field(min_length=1)
    """Documents."""
    unicode_form: Literal["NFC", "NFKC"] | None = "NFC"
    """Unicode normal form applied to every document."""
    min_chars: int = Field(default=1, ge=1)
    """Shorter documents are dropped (and counted)."""
    max_chars: int = Field(default=1_000_000, ge=1)
    """Longer documents are dropped (and counted)."""
    languages: list[str] = Field(default_factory=list)
    """ISO 639-1 codes of the languages to keep (`en`); none: all, unidentified."""
    min_language_score: float = Field(default=0.5, ge=0, le=1)
    """Probability of its language that a document needs."""
    quality: list[QualityRules] = Field(default_factory=list)
    """Sets of quality rules that every document must pass."""
    exact_dedup: bool = True
    """Drop a document whose text, after normalisation, stood before."""
    near_dedup: NearDedupConfig | None = None
    """Drop near copies of earlier documents; absent: keep them."""
    decontaminate: bool = True
    """Drop documents that share a run of `decontaminate_ngram` words with the prompts of `evaluate:`."""
    decontaminate_ngram: int = Field(default=13, ge=5, le=100)
    """Words of such a run; prompts with fewer words are not looked for."""
    mixing_temperature: float = Field(default=1.0, ge=0.1, le=100)
    """Sources are mixed in proportion to (their characters) ** (1 / this), times their weights: 1 as they
    come, above 1 small sources are repeated and large ones thinned, to the same total.
    """
    heldout_frac: float = Field(default=0.01, gt=0, lt=0.5)
    """Share of the documents held out for perplexity, chosen by content hash."""
    tokenizer: Path | None = Field(default=None, json_schema_extra=EXECUTION)
    """Directory of a tokenizer to take; absent: one is trained. Identified by its content; unused with
    `model.path`.
    """
    vocab_size: int = Field(default=512, ge=300)
    """Entries of the byte-level BPE tokenizer that is trained, special tokens included."""
    vocab_multiple: int = Field(default=64, ge=1, le=4096)
    """The vocabulary is filled up to a multiple of this with reserved tokens: matrix products are faster."""
    tokenizer_sample_chars: int = Field(default=100_000_000, ge=1000)
    """Characters of training text, chosen by content hash, that the tokenizer is trained on at most."""
    packing: Literal["concat", "best_fit", "bucket"] = "concat"
    """How documents fill rows of context_length tokens: cut where a row ends; whole where they fit, with
    padding; or cut into powers of two, equal lengths together (dataset decomposition). In none does a token
    attend to another document.
    """
    shard_tokens: int = Field(default=1_000_000, ge=1024)
    """Tokens per shard file."""
    block_mb: float = Field(default=16.0, ge=0.001, json_schema_extra=EXECUTION)
    """Megabytes of input that are worked on at once by each worker: what bounds memory."""
    ray_data_mb: float = Field(default=1024.0, ge=0, json_schema_extra=EXECUTION)
    """Input larger than this is prepared on Ray Data, by all CPUs; on a joined cluster every input is."""


class HealthConfig(Section):
    """`<stage>.health:` - what happens to optimizer steps that would do harm."""

    max_skipped_in_a_row: int = Field(default=3, ge=0)
    """A step whose loss or gradient is not finite is skipped and its batch kept; after more than so many in a
    row training goes back to the last checkpoint and leaves out the data since then.
    """
    max_rollbacks: int = Field(default=2, ge=0)
    """The run stops (exit 5) when it would have to go back once more than this."""
    spike_mads: float | None = Field(default=10.0, gt=0)
    """A loss is a spike when it lies so many robust standard deviations (median absolute deviations times
    1.48) above the median of the recent ones; absent: no detection.
    """
    spike_window: int = Field(default=64, ge=16)
    """Recent losses that a spike is measured against."""
    on_spike: Literal["log", "skip"] = "log"
    """Take the step of a spike and say so, or skip it like one that is not finite."""


FITTED = ("lr", "value_lr", "precision", "micro_batch_size", "gradient_checkpointing")
"""Settings of a `TrainingConfig` that are fitted to a given model where a config states none, or null
(pipeline.fitted_defaults). The defaults beside the fields are those of a chain from scratch.
"""


class TrainingConfig(Section):
    """What every stage that trains by gradient has."""

    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; absent: `num_epochs` over the data."""
    num_epochs: float = Field(default=1.0, gt=0)
    """Passes over the data where max_steps is absent."""
    lr: float = Field(gt=0, le=1)
    """Peak learning rate."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
    warmup_frac: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from 0."""
    min_lr_frac: float = Field(default=0.1, ge=0, le=1)
    """Where the decay ends, as a share of lr."""
    batch_size: int = Field(ge=1)
    """Sequences (pairs, for reward) per optimizer step."""
    micro_batch_size: int = Field(ge=1)
    """Sequences per forward: packed into one row, without padding."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32, or bf16: fp32 master weights with a bf16 compute copy."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW: decay of the first moment."""
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW: decay of the second moment."""
    adam_eps: float = Field(default=1e-8, gt=0)
    """AdamW: added to the denominator."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW: decoupled weight decay on matrices; norms and biases have none."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    health: HealthConfig = HealthConfig()
    """What happens to optimizer steps that would do harm."""
    gradient_checkpointing: bool = Field(default=False, json_schema_extra=EXECUTION)
    """Recompute activations in the backward pass: less memory, about a third more time."""
    log_every_steps: int = Field(default=10, ge=1, json_schema_extra=EXECUTION)
    """Steps between lines of metrics.jsonl."""
    checkpoint_every_steps: int = Field(default=50, ge=1, json_schema_extra=EXECUTION)
    """Steps between checkpoints that a killed run resumes from, and bad steps go back to."""
    keep_checkpoints: int = Field(default=2, ge=1, json_schema_extra=EXECUTION)
    """Newest of these checkpoints that are kept; the best one, and what a stop left, are kept besides."""


class PretrainConfig(TrainingConfig):
    """`pretrain:` - causal language modelling on prepare's shards; batch_size counts rows of context_length
    tokens.
    """

    lr: float = Field(default=2e-3, gt=0, le=1)
    """Peak learning rate."""
    batch_size: int = Field(default=16, ge=1)
    """Rows of context_length tokens per optimizer step."""
    micro_batch_size: int = Field(default=16, ge=1)
    """Rows per forward."""
    weight_decay: float = Field(default=0.1, ge=0)
    """AdamW: decoupled weight decay on matrices."""
    router_aux_loss_coef: float | None = Field(default=None, ge=0, le=10)
    """Weight of the routers' balance loss (Switch Transformers), added to the loss of each micro-batch;
    absent: 0.01 where `model.num_experts` describes a mixture from scratch, else 0.
    """


class SFTConfig(TrainingConfig):
    """`sft:` - supervised fine-tuning on assistant tokens only."""

    data: list[DataSource] = Field(min_length=1)
    """Conversations: messages, prompt + completion, or instruction/input/output."""
    lr: float = Field(default=1e-3, gt=0, le=1)
    """Peak learning rate."""
    batch_size: int = Field(default=32, ge=1)
    """Conversations per optimizer step."""
    micro_batch_size: int = Field(default=16, ge=1)
    """Conversations per forward."""
    router_aux_loss_coef: float = Field(default=0.0, ge=0, le=10)
    """Weight of the routers' balance loss (Switch Transformers), added to the loss of each micro-batch; 0:
    none. The value in the model's own config is not used.
    """
    batch_tokens: int | None = Field(default=None, ge=16)
    """Token slots per optimizer step instead of batch_size: conversations are packed best-fit into rows of
    model.context_length slots, and a step takes batch_tokens // context_length rows, one per forward.
    """


class ResponseSampling(Section):
    """How responses are sampled that a reward model scores: what the distribution of the scores hangs on."""

    max_response_tokens: int
    """Response tokens at most, the end token included."""
    temperature: float
    """Sampling temperature."""


NORMALISER_SAMPLING = ResponseSampling(max_response_tokens=32, temperature=1.0)
"""Of the reward stage where no ppo section says how responses will be sampled."""


class RewardConfig(TrainingConfig):
    """`reward:` - a Bradley-Terry reward model from preference pairs."""

    data: list[DataSource] = Field(min_length=1)
    """Preference pairs: explicit, implicit (shared prefix) or HH transcripts."""
    init_from: Literal["sft", "pretrain"] = "sft"
    """The model whose body the reward model starts from; `pretrain` lets it run beside sft."""
    lr: float = Field(default=1e-3, gt=0, le=1)
    """Peak learning rate."""
    batch_size: int = Field(default=32, ge=1)
    """Pairs per optimizer step."""
    micro_batch_size: int = Field(default=16, ge=1)
    """Pairs per forward."""
    too_long: Literal["drop", "truncate"] = "drop"
    """Pairs longer than model.context_length: left out and counted, or the start of the prompt is cut."""
    heldout_frac: float = Field(default=0.1, gt=0, lt=0.9)
    """Share of the pairs held out for accuracy, chosen by content hash of the prompt."""
    group_column: str | None = None
    """Column that every row must have; held-out accuracy is also reported per value of it, as
    accuracy_<value>.
    """
    min_accuracy: float = Field(default=0.55, ge=0, le=1)
    """Gate: a lower held-out accuracy ends the run (exit 5)."""
    min_score_std: float = Field(default=1e-3, ge=0)
    """Gate: a smaller spread of the scores over sampled responses ends the run (exit 5)."""
    normaliser_prompts: int = Field(default=128, ge=2)
    """Prompts answered by the sft model for the mean and std that scores are normalised by, sampled as ppo
    samples (ppo.temperature; 1.0 without a ppo section). With init_from: pretrain nothing is sampled and this
    is not read: the held-out pairs' own responses are scored.
    """
    normaliser_max_response_tokens: int | None = Field(default=None, ge=1)
    """Length bound of those responses; absent: ppo.max_response_tokens, or 32 without a ppo section. With
    init_from: pretrain it has no meaning and is refused.
    """

    def normaliser_sampling(self, ppo: ResponseSampling | None) -> ResponseSampling | None:
        """How the responses of the normaliser are sampled: as `ppo` will sample (None: no such section), up
        to a length of their own where one is set. None with init_from: pretrain: nothing is sampled.
        """
        if self.init_from == "pretrain":
            return None
        like = NORMALISER_SAMPLING if ppo is None else ppo
        own_length = self.normaliser_max_response_tokens
        return like if own_length is None else like.model_copy(update={"max_response_tokens": own_length})

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.init_from == "pretrain" and self.normaliser_max_response_tokens is not None:
            raise ValueError(
                "normaliser_max_response_tokens bounds nothing with init_from: pretrain, where the held-out "
                "pairs' own responses are scored; remove it"
            )
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """A rollout correction as it is in force, with every default filled in."""

    type: CorrectionType
    min_weight: float  # 0: none; truncation caps from above only
    max_weight: float  # inf: none

    def __str__(self) -> str:
        low = f", min {self.min_weight:g}" if self.min_weight > 0 else ""
        return self.type + low + (f", max {self.max_weight:g}" if math.isfinite(self.max_weight) else "")


_CORRECTIONS = (
    Correction(type="off", min_weight=0.0, max_weight=math.inf),
    Correction(type="token_truncate", min_weight=0.0, max_weight=2.0),
    Correction(type="token_mask", min_weight=0.5, max_weight=5.0),
    Correction(type="sequence_truncate", min_weight=0.0, max_weight=2.0),
    Correction(type="sequence_mask", min_weight=0.5, max_weight=5.0),
    Correction(type="geometric_mask", min_weight=0.99, max_weight=1.01),
)
CORRECTIONS = {correction.type: correction for correction in _CORRECTIONS}
"""Each type with its limits where the config gives none. 2: TRL and verl; 0.5 to 5: IcePop (arXiv
2510.18855).
"""


class RolloutCorrectionConfig(Section):
    """`ppo.rollout_correction:` - weights on the policy loss: the probability of what an engine sampled under
    the trainer over that under the engine.
    """

    type: Literal["auto", CorrectionType] = "auto"
    """What is compared, and what happens to weights beyond the limits. Compared are tokens, whole responses
    (`sequence`: the product over their tokens) or the geometric mean over a response's tokens; `truncate`
    lowers a weight to max, `mask` makes it 0 (the tokens stay in the count). `auto`: token_truncate where
    precision is bf16 or rollout.max_staleness is above 0, else off.
    """
    max: float | None = Field(default=None, ge=1)
    """Largest weight; absent: 2 (truncate), 5 (mask) or 1.01 (geometric_mask)."""
    min: float | None = Field(default=None, ge=0, le=1)
    """Smallest weight, for masks only; absent: 0.5, or 0.99 (geometric_mask)."""

    def in_force(self, *, default: CorrectionType) -> Correction:
        """With the limits filled in, and `default` for auto."""
        preset = CORRECTIONS[default if self.type == "auto" else self.type]
        return Correction(
            type=preset.type,
            min_weight=preset.min_weight if self.min is None else self.min,
            max_weight=preset.max_weight if self.max is None else self.max,
        )

    @model_validator(mode="after")
    def _limits_apply(self) -> Self:
        if self.type in ("auto", "off") and (self.max is not None or self.min is not None):
            raise ValueError(
                f"type {self.type} takes no max and no min; remove them, or set type to one of "
                f"{', '.join(kind for kind in CORRECTIONS if kind != 'off')}"
            )
        if self.type in ("token_truncate", "sequence_truncate") and self.min is not None:
            raise ValueError(
                f"min {self.min:g} has no meaning with type {self.type}: truncation caps weights from above "
                f"only; remove min, or use type {self.type.replace('truncate', 'mask')}"
            )
        limits = self.in_force(default="off")
        if not limits.min_weight < limits.max_weight:
            raise ValueError(
                f"min {limits.min_weight:g} is not below max {limits.max_weight:g}, so that no weight is "
                "within them; raise max or lower min"
            )
        return self


class PPOConfig(TrainingConfig):
    """`ppo:` - proximal policy optimisation with a value model; batch_size counts responses per optimizer
    step.
    """

    data: list[DataSource] = Field(min_length=1)
    """Prompts."""
    max_steps: int = Field(default=40, ge=1)
    """PPO iterations: one batch of rollouts and one weight sync each."""
    num_prompts: int = Field(default=128, ge=1)
    """Prompts per iteration."""
    samples_per_prompt: int = Field(default=1, ge=1)
    """Responses sampled per prompt."""
    max_response_tokens: int = Field(default=32, ge=1)
    """Response tokens at most, the end token included."""
    temperature: float = Field(default=1.0, ge=0.01, le=2)
    """Sampling temperature, 0.01 to 2; policy log-probs are taken at the same."""
    num_epochs: int = Field(default=2, ge=1)  # type: ignore[assignment]  # passes over one batch of rollouts
    """Passes over each batch of rollouts."""
    lr: float = Field(default=3e-4, gt=0, le=1)
    """Peak learning rate of the policy."""
    value_lr: float = Field(default=1e-3, gt=0, le=1)
    """Peak learning rate of the value model."""
    value_warmup_steps: int = Field(default=0, ge=0)
    """Iterations, the first ones, in which only the value model learns; the policy's learning rate warms up
    and decays over those that are left.
    """
    batch_size: int = Field(default=64, ge=1)
    """Responses per optimizer step; all of a batch of rollouts where it has fewer."""
    micro_batch_size: int = Field(default=16, ge=1)
    """Responses per forward."""
    adam_eps: float = Field(default=1e-5, gt=0)
    """AdamW: added to the denominator."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount per token."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """GAE: weight of longer returns."""
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """Policy ratio is clipped below at 1 - clip_low."""
    clip_high: float = Field(default=0.2, gt=0)
    """Policy ratio is clipped above at 1 + clip_high."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Bound on the loss of negative advantages, as a ratio; absent: none."""
    rollout_correction: RolloutCorrectionConfig = RolloutCorrectionConfig()
    """Weights on the policy loss for what the engine computes differently than the trainer."""
    value_clip: float | None = Field(default=0.2, gt=0)
    """Range of a value around its value before the update; absent: no clipping."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the policy's entropy, in nats per token, that is added to the objective."""
    loss_aggregation: Literal[
        "token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "constant"
    ] = "token_mean"
    """How token losses become one number."""
    whiten_advantages: bool = True
    """Whiten advantages once per batch of rollouts; with KL in the loss this changes the effective
    kl_coef.
    """
    score_clip: float | None = Field(default=10.0, gt=0)
    """Normalised scores are clipped to this range (normalise, then clip, then KL); absent: none."""
    truncation: Literal["penalty", "mask", "bootstrap"] = "penalty"
    """Responses without an end token: add missing_eos_penalty, leave them out, or bootstrap from the
    value.
    """
    missing_eos_penalty: float = Field(default=1.0, ge=0)
    """Subtracted from the score of a truncated response, with truncation: penalty."""
    kl_coef: float = Field(default=0.05, ge=0)
    """beta: weight of the KL to the reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL (Schulman 2020)."""
    kl_placement: Literal["reward", "loss", "kl_surrogate"] = "reward"
    """Where the KL acts: per token in the reward (k1), as a loss on the sequence log-ratio (k2), or per token
    in the loss (k2, k3), which optimises another objective. `loss` divides the KL by what loss_aggregation
    divides the policy loss by, so kl_coef means the same in all; it refuses sequence_mean_token_mean.
    """
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """Whether kl_coef stays or is steered towards kl_target."""
    kl_target: float = Field(default=6.0, gt=0)
    """Adaptive: wanted KL to the reference, in nats per response."""
    kl_horizon: int = Field(default=10_000, ge=1)
    """Adaptive: responses over which kl_coef adapts."""
    max_kl: float = Field(default=50.0, gt=0)
    """The run stops (exit 5) when the mean KL to the reference exceeds this, in nats per response."""
    min_score_std: float = Field(default=1e-4, ge=0)
    """The run stops (exit 5) when the normalised scores of a batch spread less: a constant reward."""
    min_entropy: float = Field(default=0.0, ge=0)
    """The run stops (exit 5) when the mean entropy falls below this, in nats per token; 0: no floor."""
    max_truncated_frac: float = Field(default=1.0, ge=0, le=1)
    """The run stops (exit 5) when a larger share of a batch's responses has no end token."""
    max_repeated_frac: float = Field(default=1.0, ge=0, le=1)
    """The run stops (exit 5) when a larger share of the responses' 4-grams stood earlier in the same
    response.
    """
    log_every_steps: int = Field(default=1, ge=1, json_schema_extra=EXECUTION)
    """Iterations between lines of metrics.jsonl."""
    checkpoint_every_steps: int = Field(default=10, ge=1, json_schema_extra=EXECUTION)
    """Iterations between checkpoints."""
    num_logged_rollouts: int = Field(default=16, ge=0, json_schema_extra=EXECUTION)
    """Rollouts written to rollouts.jsonl per iteration."""

    @property
    def responses_per_step(self) -> int:
        """Responses in one batch of rollouts."""
        return self.num_prompts * self.samples_per_prompt

    @property
    def pack_size(self) -> int:
        """Responses per forward: a micro-batch is never larger than the batch it is part of."""
        return min(self.micro_batch_size, self.batch_size)

    @property
    def sampling(self) -> ResponseSampling:
        """How its responses are sampled."""
        return ResponseSampling(max_response_tokens=self.max_response_tokens, temperature=self.temperature)

    @property
    def reads_reference(self) -> bool:
        """Whether anything weighs the KL to the reference."""
        return self.kl_coef > 0

    def torn_packs(self) -> str | None:
        """What is wrong with a batch_size that micro-batches do not divide, in words that follow its name."""
        if self.batch_size % self.pack_size == 0:
            return None
        return (
            f"{self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}, and packs are "
            "never torn"
        )

    def correction(self, *, max_staleness: int) -> Correction:
        """The rollout correction in force where rollouts are up to `max_staleness` versions old."""
        differs = self.precision == "bf16" or max_staleness > 0
        return self.rollout_correction.in_force(default="token_truncate" if differs else "off")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        allowed = {"reward": {"k1"}, "loss": {"k2"}, "kl_surrogate": {"k2", "k3"}}[self.kl_placement]
        if self.kl_estimator not in allowed:
            raise ValueError(
                f"kl_estimator {self.kl_estimator} in the {self.kl_placement} does not optimise the "
                f"KL-regularised objective; use {' or '.join(sorted(allowed))}, or another kl_placement"
            )
        if self.kl_placement == "loss" and self.loss_aggregation == "sequence_mean_token_mean":
            raise ValueError(
                "kl_placement loss takes the KL of whole responses, but loss_aggregation "
                "sequence_mean_token_mean divides each response's policy loss by its own length, so no "
                "kl_coef weighs both alike; use another loss_aggregation, or kl_placement reward with "
                "kl_estimator k1"
            )
        if self.value_warmup_steps >= self.max_steps:
            raise ValueError(
                f"value_warmup_steps {self.value_warmup_steps} leaves the policy none of the max_steps "
                f"{self.max_steps} to learn in; use {self.max_steps - 1} at most, or more max_steps"
            )
        if self.kl_controller == "adaptive" and self.kl_coef == 0:
            raise ValueError("kl_controller adaptive scales kl_coef, which is 0; give it a start value")
        if "micro_batch_size" in self.model_fields_set and (problem := self.torn_packs()) is not None:
            raise ValueError(f"batch_size {problem}")
        if self.kl_horizon < self.responses_per_step:
            raise ValueError(
                f"kl_horizon {self.kl_horizon} is below the {self.responses_per_step} responses of an "
                "iteration"
            )
        if self.dual_clip is not None and self.dual_clip <= 1 + self.clip_high:
            raise ValueError(
                f"dual_clip {self.dual_clip:g} is not above 1 + clip_high = {1 + self.clip_high:g}"
            )
        return self


class EvaluateConfig(Section):
    """`evaluate:` - base, sft and ppo models on the same held-out prompts."""

    prompts: list[DataSource] = Field(min_length=1)
    """Held-out prompts; further columns are handed to the scoring function."""
    score: ScoreFunction | None = None
    """Judge of a response, in [0, 1]; absent: the reward model alone."""
    max_prompts: int = Field(default=512, ge=1)
    """Prompts used, from the start of the data."""
    max_response_tokens: int = Field(default=32, ge=1)
    """Response tokens at most."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    """Sampling temperature, up to 2; 0 is greedy."""
    base_prompt: str = "{prompt}\n"
    """How the base model is prompted, as a plain continuation; it ends at a line break or the end of its
    document.
    """
    bootstrap_samples: int = Field(default=1000, ge=100)
    """Resamples behind the 95 % interval of the win rate."""
    num_samples_shown: int = Field(default=12, ge=0, json_schema_extra=EXECUTION)
    """Rows of the sample table."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if 0 < self.temperature < 0.01:
            raise ValueError(f"temperature {self.temperature:g}: use 0 (greedy) or 0.01 to 2")
        if "{prompt}" not in self.base_prompt:
            raise ValueError("base_prompt has no {prompt} in it")
        return self


class StageSettings(Section):
    """What every recipe receives."""

    seed: int
    """Seed of the run; every generator is derived from it, the stage and the step."""
    model: ModelConfig


class PrepareSettings(StageSettings):
    """What the prepare recipe may read."""

    prepare: PrepareConfig
    evaluation_prompts: list[DataSource] = Field(default_factory=list)
    """Prompts of `evaluate:` that documents are compared with; none where that is switched off."""

    def identity(self) -> dict[str, Any]:
        """Of `model:` only what this recipe reads; a given model and a template are identified by their
        content.
        """
        return {**super().identity(), "model": {"context_length": self.model.context_length}}


class PretrainSettings(StageSettings):
    """What the pretrain recipe may read."""

    pretrain: PretrainConfig

    @property
    def router_aux_loss_coef(self) -> float:
        """The weight in force. 0.01 is Switch Transformers' own (Fedus et al. 2021, section 2.2)."""
        if self.pretrain.router_aux_loss_coef is not None:
            return self.pretrain.router_aux_loss_coef
        return 0.0 if self.model.num_experts is None else 0.01


class SFTSettings(StageSettings):
    """What the sft recipe may read."""

    sft: SFTConfig


class RewardSettings(StageSettings):
    """What the reward recipe may read."""

    reward: RewardConfig
    rollout: EngineConfig
    ppo_sampling: ResponseSampling | None = None
    """How ppo will sample the responses that this model scores; none without a ppo section."""

    @property
    def normaliser(self) -> ResponseSampling | None:
        """How the responses of the normaliser are sampled; None: they are not."""
        return self.reward.normaliser_sampling(self.ppo_sampling)

    @property
    def normaliser_length_key(self) -> str:
        """The setting that bounds their length."""
        follows_ppo = self.reward.normaliser_max_response_tokens is None and self.ppo_sampling is not None
        return "ppo.max_response_tokens" if follows_ppo else "reward.normaliser_max_response_tokens"

    def identity(self) -> dict[str, Any]:
        """With the sampling that holds, whichever section states it: stating what is so changes nothing."""
        identity, sampling = super().identity(), self.normaliser
        del identity["ppo_sampling"]
        identity["reward"] |= {
            "normaliser_max_response_tokens": None if sampling is None else sampling.max_response_tokens,
            "normaliser_temperature": None if sampling is None else sampling.temperature,
        }
        return identity


class PPOSettings(StageSettings):
    """What the ppo recipe may read."""

    ppo: PPOConfig
    rollout: EngineConfig

    @property
    def correction(self) -> Correction:
        """The rollout correction in force."""
        return self.ppo.correction(max_staleness=self.rollout.max_staleness)


class EvaluateSettings(StageSettings):
    """What the evaluate recipe may read."""

    evaluate: EvaluateConfig
    rollout: EngineConfig
