"""Models of the chain: building, loading, forwards over packed rows, saving.

    model directory --load--> module --forward over a packed row--> logits | scores --save--> model directory

Owns: which architecture, where heads come from, in what precision a forward runs. Does not own: packing
(data.packing), losses (objectives), sharding (distributed), that nothing is random (randomness).
Every forward here has `use_cache=False`: with the cache on, transformers drops the mask between packed
sequences without a word.

Shapes: R rows (1 where packed), N tokens of a row, K and J of its positions, V vocabulary, D hidden.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from stages.config.model import ModelConfig
from stages.data.packing import pack
from stages.errors import ModelError
from stages.training import ranks
from stages.training.model_rules import (
    build_without_memory,
    check_ends,
    check_length,
    check_model_config,
    raise_unless_of_the_model,
    read_config,
)
from stages.training.packed_attention import packed, register_packed_attention
from stages.training.packing_probe import check_packed
from stages.training.randomness import switch_off
from stages.training.routing import routers

Precision = Literal["fp32", "bf16"]
NORMALISER_FILE = "score_normaliser.json"
Model = TypeVar("Model", bound=nn.Module)


class CausalLM(nn.Module):
    """A language model over packed rows. `inner` is the transformers model that is saved."""

    def __init__(self, inner: PreTrainedModel) -> None:
        super().__init__()
        self.inner = inner
        self.routers = routers(inner)  # in a list: they are modules of `inner`, registered there

    def forward(
        self, inputs: Mapping[str, Any], positions_K: Tensor, *, with_router_logits: bool = False
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """Logits [R, K, V] at the positions `positions_K` of each row; logits elsewhere are never computed.

        `inputs`: `PackedRow.model_inputs()`, or `input_ids` [R, N] of unpacked rows with `use_cache=False`.
        `with_router_logits`, of a model that has `routers`: also what each of its
        layers with experts routed by, [R * N, E].
        """
        assert inputs["use_cache"] is False
        wanted = {"output_router_logits": True} if with_router_logits else {}
        with packed(inputs) as keywords:
            output = self.inner(**keywords, logits_to_keep=positions_K, **wanted)
        return (output.logits, output.router_logits) if with_router_logits else output.logits

    @property
    def head(self) -> nn.Module:
        """What gives logits for hidden states."""
        return self.inner.get_output_embeddings()


class TokenScorer(nn.Module):
    """A scalar per position of a packed row: reward model (read at last tokens) and value model (read
    anywhere).
    """

    def __init__(self, inner: PreTrainedModel, *, bias: float | None = None) -> None:
        super().__init__()
        self.inner = inner
        self.bias = None if bias is None else nn.Parameter(torch.tensor([bias]))

    def forward(
        self, inputs: Mapping[str, Any], positions_K: Tensor, further_J: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Scores [K], float32, at the positions `positions_K` of the row behind `PackedRow.model_inputs()`;
        with `further_J` also those [J] at these, from the same forward of the body.
        """
        assert inputs["use_cache"] is False
        body: Any = self.inner.base_model
        with packed(inputs) as keywords:
            hidden_ND = body(**keywords).last_hidden_state[0]
        scores_K = self._scores(hidden_ND[positions_K])
        return scores_K if further_J is None else (scores_K, self._scores(hidden_ND[further_J]))

    def _scores(self, hidden_KD: Tensor) -> Tensor:
        scores_K = self.head(hidden_KD).squeeze(-1).float()
        return scores_K if self.bias is None else scores_K + self.bias.float()

    @property
    def head(self) -> nn.Linear:
        """The linear layer behind the scores: `score` in transformers' sequence classifiers."""
        assert isinstance(self.inner.score, nn.Linear)
        return self.inner.score


def build_causal_lm(
    config: ModelConfig, *, vocab_size: int, eos_token_id: int, pad_token_id: int | None
) -> CausalLM:
    """A LLaMA, or with experts a Mixtral, with fresh weights from torch's global generator, in fp32; seed
    that before.

    A Mixtral is a LLaMA whose MLPs are mixtures: all sizes keep their meaning.
    """
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "max_position_embeddings": config.context_length,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
    }
    architecture = (
        LlamaConfig(**sizes)
        if config.num_experts is None
        else MixtralConfig(
            **sizes,
            num_local_experts=config.num_experts,
            num_experts_per_tok=config.num_chosen_experts,
        )
    )
    inner = AutoModelForCausalLM.from_config(architecture, dtype=torch.float32, **_attention())
    switch_off(inner)
    return CausalLM(inner)


def load_causal_lm(directory: Path) -> CausalLM:
    """The language model of a model directory, in fp32 on the CPU, nothing random in it."""
    inner, missing = _loaded(AutoModelForCausalLM, directory)
    _check_nothing_missing(directory, missing)
    return _probed(CausalLM(inner), directory)


def reward_from_causal_lm(directory: Path, *, pad_token_id: int | None) -> TokenScorer:
    """A reward model on the body of a language model; its head is drawn with std 1/sqrt(D + 1) from torch's
    global generator (Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO").

    `pad_token_id` must not be an end token: transformers reads the score at the last token that is another.
    With None it refuses a batch of several sequences.
    """
    inner, missing = _loaded(AutoModelForSequenceClassification, directory, num_labels=1)
    _check_nothing_missing(directory, [name for name in missing if not name.startswith("score.")])
    inner.config.pad_token_id = _with_a_row(inner, pad_token_id)
    scorer = TokenScorer(inner)
    nn.init.normal_(scorer.head.weight, std=1 / math.sqrt(inner.config.hidden_size + 1))
    return _probed(scorer, directory)


def load_reward_model(directory: Path) -> TokenScorer:
    """The reward model of a model directory. ModelError when its head is not in the file: a random head is no
    model.
    """
    inner, missing = _loaded(AutoModelForSequenceClassification, directory, num_labels=1)
    if any(name.startswith("score.") for name in missing):
        raise ModelError(f"{directory}: no score head in it; give a reward model (rlhf reward makes one)")
    _check_nothing_missing(directory, missing)
    return _probed(TokenScorer(inner), directory)


def value_from_reward_model(directory: Path) -> TokenScorer:
    """A value model that starts as the reward model, with the score normaliser folded into its head."""
    scorer = load_reward_model(directory)
    normaliser = ScoreNormaliser.load(directory)
    with torch.no_grad():
        scorer.head.weight.div_(normaliser.std)
    return TokenScorer(scorer.inner, bias=-normaliser.mean / normaliser.std)


class ScoreNormaliser:
    """Mean and std of the raw scores over responses sampled from the initial policy; saved with the reward
    model.

    Dividing by std rescales what `ppo.kl_coef` means: it weighs nats against standard deviations of the
    score.
    """

    def __init__(self, *, mean: float, std: float) -> None:
        self.mean = mean
        self.std = std

    def __call__(self, scores: Tensor) -> Tensor:
        return (scores - self.mean) / self.std

    def save(self, directory: Path) -> None:
        (directory / NORMALISER_FILE).write_text(json.dumps({"mean": self.mean, "std": self.std}) + "\n")

    @classmethod
    def load(cls, directory: Path) -> "ScoreNormaliser":
        path = directory / NORMALISER_FILE
        if not path.is_file():
            raise ModelError(
                f"{path}: missing; without it scores have no scale - make the model with rlhf reward"
            )
        try:
            values = json.loads(path.read_text())
            return cls(mean=float(values["mean"]), std=float(values["std"]))
        except (ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise ModelError(f"{path}: no mean and std in it; make the model with rlhf reward") from error


def compute_head_in_fp32(model: CausalLM) -> None:
    """From now on logits are a float32 product of hidden states and head, whatever the precision of the body.

    bf16 has 8 bits: logits near 20 would be rounded to eighths, by trainer and engine each in its own way.
    """
    head = model.head
    assert isinstance(head, nn.Linear)

    def forward(hidden: Tensor) -> Tensor:
        bias = None if head.bias is None else head.bias.float()
        return nn.functional.linear(hidden.float(), head.weight.float(), bias)

    head.forward = forward  # type: ignore[assignment]  # in place: the module keeps its names


def check_context(model: CausalLM, length: int) -> None:
    """Raise ModelError when a given model is not made for sequences of `model.context_length` tokens."""
    check_length(model.inner.config, length, named="the model")


def freeze(model: Model) -> Model:
    """No gradient for any parameter of `model`, and eval mode."""
    return model.requires_grad_(False).eval()


def set_stop_tokens(
    model: CausalLM | TokenScorer,
    *,
    eos_token_id: int,
    stop_token_ids: Sequence[int],
    pad_token_id: int | None,
) -> None:
    """What a saved chat model ends at, in transformers' `generate` and in vLLM alike."""
    pad_token_id = _with_a_row(model.inner, pad_token_id)
    model.inner.config.eos_token_id = eos_token_id
    model.inner.config.pad_token_id = pad_token_id
    model.inner.generation_config.eos_token_id = list(stop_token_ids)
    model.inner.generation_config.pad_token_id = pad_token_id


def _with_a_row(inner: PreTrainedModel, token_id: int | None) -> int | None:
    """`token_id` if the embedding has a row for it: with a pad token that has none, the model is saved and
    never loads again.
    """
    return token_id if token_id is not None and token_id < inner.config.vocab_size else None


def save_model(model: CausalLM | TokenScorer, directory: Path, state: dict[str, Tensor]) -> None:
    """Write a plain `save_pretrained` layout (safetensors) with the full tensors of `state`, named as in
    `inner`. Rank 0's to call, with what `full_state` gave it.
    """
    model.inner.save_pretrained(directory, state_dict=state)


def full_state(model: CausalLM | TokenScorer) -> dict[str, Tensor]:
    """The whole, unsharded fp32 weights of `inner`, on the CPU, by transformers' names. Every rank takes
    part, one tensor at a time; only rank 0 gets them.
    """
    whole: dict[int, Tensor] = {}  # by parameter: tied names stay one tensor
    state = {}
    for name, tensor in model.inner.state_dict(keep_vars=True).items():
        if id(tensor) not in whole:
            gathered = _gathered(tensor).detach()
            whole[id(tensor)] = gathered.cpu() if ranks.is_main() else gathered.new_empty(0)
        state[name] = whole[id(tensor)]
    return state if ranks.is_main() else {}


def _gathered(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _loaded(auto_class: Any, directory: Path, **options: Any) -> tuple[PreTrainedModel, list[str]]:
    """The model of `directory` in fp32 with nothing random in it, and the names of the weights its files do
    not have.
    """
    _check_is_a_model(directory)
    scores = auto_class is AutoModelForSequenceClassification
    named = str(directory)
    config = read_config(directory, named=named)
    check_model_config(config, named=named, context_length=None, scores=scores)
    transformers_logging.set_verbosity_error()  # its load report: checked here in a line
    transformers_logging.disable_progress_bar()
    try:
        model, info = auto_class.from_pretrained(
            directory,
            dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            **_attention(),
            **options,
        )
    except Exception as error:  # a config.json with senseless values brings up any error of transformers
        raise_unless_of_the_model(error)
        build_without_memory(config, named, scores=scores)  # says more where the class is at fault
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"{directory}: transformers cannot load it ({type(error).__name__}: {reason})"[:400]
        ) from error
    check_ends(model, named, scores=scores)
    switch_off(model)
    return model, list(info["missing_keys"])


def _probed(model: Model, directory: Path) -> Model:
    """`model`, which computes packed rows as it should. Raises ModelError for one that does not."""

    def forward(sequences: Sequence[Sequence[int]]) -> Tensor:
        row = pack(sequences)
        outputs: Tensor = model(row.model_inputs(), torch.arange(row.num_tokens))
        return outputs[0].log_softmax(-1) if isinstance(model, CausalLM) else outputs

    assert isinstance(model, CausalLM | TokenScorer)
    check_packed(model.inner, model.head, forward, directory)
    return model


def _attention() -> dict[str, str]:
    return {"attn_implementation": register_packed_attention()}


def _check_is_a_model(directory: Path) -> None:
    if not (directory / "config.json").is_file():
        raise ModelError(
            f"{directory}: not a model directory (no config.json); give a save_pretrained directory"
        )
    if not any(directory.glob("*.safetensors")):
        raise ModelError(f"{directory}: no safetensors weights; convert it with save_pretrained first")


def _check_nothing_missing(directory: Path, missing: list[str]) -> None:
    if missing:
        raise ModelError(f"{directory}: weights missing from its files: {', '.join(sorted(missing)[:5])}")
