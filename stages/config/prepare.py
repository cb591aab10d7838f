"""`prepare:` - how documents become a tokenizer and token shards. Light import: pydantic only."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from rollout.ground.section import EXECUTION, Section, by_content
from stages.config.data import DataSource
from stages.config.stage import StageSettings

QualityRules = Literal["gopher_quality", "gopher_repetition", "c4", "fineweb"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""What makes a tokenizer; the first is always there."""


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

    KEY: ClassVar[str] = "prepare"
    """Where this section stands in a config."""
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
    tokenizer: Path | None = Field(default=None, json_schema_extra=by_content(*TOKENIZER_FILES))
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
