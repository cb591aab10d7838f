"""Which models can be trained here: what their config and their class tell, before any weight is read.

    directory --read_config--> config --check_model_config--> nothing | ModelError in one line
    directory --check_model--> also: built without memory --> rows of the embedding --check_rows--> ...

A config is judged by what transformers' own classes say of it, never by a list of families. The rules on
lengths refuse what a short probe of a loaded model cannot see. Owns: those rules. Does not own: what the
files of a directory are (pipeline.model_files), whether a loaded model computes packed rows (packing_probe).
Light import: torch and transformers come with the first model that is judged.
"""

import copy
import inspect
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

POSITION_LIMITS = ("max_position_embeddings", "max_seq_len", "max_sequence_length", "seq_length")
"""What families call the number of their positions; `n_positions` and others are mapped to the first by
transformers. The smallest that is stated holds, as in vLLM.
"""
OWN_LIMIT = "model_max_length"
"""Where it is stated, it holds instead (Command R), as in vLLM."""
NOT_ATTENTION = ("conv", "hybrid", "hybrid_sliding", "linear_attention", "mamba", "recurrent")
"""Of the types of layers: a state or a convolution runs along the row."""
NEEDED = {
    "position_ids": "so packed sequences could not each start at position 0",
    "logits_to_keep": "so logits could not be computed at the trained positions alone",
}
"""What the forward of a language model has to take, and why."""
ANOTHER_FAMILY = "give a model of another family"


def read_config(directory: Path, *, named: str) -> "PreTrainedConfig":
    """The config of a model directory, as the class that transformers has for it. Raises ModelError."""
    from transformers import AutoConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # what it notices of a config: judged here in a line
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # a config.json with senseless values brings up any error of transformers
        raise_unless_of_the_model(error)
        raise ModelError(
            f"{named}: transformers cannot read its config.json ({_in_short(error)}); give a model that this "
            "version of transformers knows"
        ) from error
    return config


def check_model_config(
    config: "PreTrainedConfig", *, named: str, context_length: int | None, scores: bool = False
) -> None:
    """Raise ModelError unless a model of this config can be trained on packed sequences of `context_length`
    tokens (None: of lengths that are not known here).

    `named`: what the user gave. `scores`: it is to be a reward model, which transformers has to know too.
    """
    name = _name(config, named)
    _check_text_alone(config, name)
    _check_decoder(config, name)
    _check_class(_class_of(config, name, scores=False), name)
    _check_layers(config, name)
    _check_temperature(config, name)
    if scores:
        _class_of(config, name, scores=True)
    if context_length is not None:
        check_length(config, context_length, named=named)


def check_model(
    directory: Path,
    *,
    named: str,
    context_length: int,
    scores: bool,
    recomputing: Sequence[str] = (),
    balancing: Sequence[str] = (),
) -> int:
    """Raise ModelError for what `check_model_config` refuses in the config of `directory`, and for what its
    class cannot build of it, recompute (gradient checkpointing) or balance (routed experts). Returns the rows
    of its embedding.

    `recomputing`, `balancing`: the keys of the settings that ask for it.

    Reads no weights and builds without memory: seconds, most of them to import torch and transformers.
    """
    config = read_config(directory, named=named)
    check_model_config(config, named=named, context_length=context_length, scores=scores)
    model = build_without_memory(config, named, scores=False)
    rows = check_ends(model, named, scores=False)
    for key in recomputing:
        if not model.supports_gradient_checkpointing:
            raise ModelError(
                f"{_name(config, named)} has no gradient checkpointing in transformers; set {key} to false"
            )
    if balancing:
        from stages.training.routing import check_balanced

        for key in balancing:
            check_balanced(model, key)
    if scores:
        check_ends(build_without_memory(config, named, scores=True), named, scores=True)
    return rows


def check_rows(rows: int, highest_id: int, *, named: str, tokenizer: str) -> None:
    """Raise ModelError when an id that `tokenizer` may write has none of the `rows` of the embedding."""
    if highest_id >= rows:
        raise ModelError(
            f"{tokenizer}: its tokenizer and template write ids up to {highest_id}, but the embedding of "
            f"{named} has {rows} rows; give the tokenizer that the model was trained with, or resize it "
            f"(resize_token_embeddings({highest_id + 1}) of transformers) and save it again"
        )


def check_length(config: "PreTrainedConfig", length: int, *, named: str) -> None:
    """Raise ModelError when the model has no positions for sequences of `length` tokens, or computes
    sequences of a packed row otherwise where one is as long.
    """
    for rope in _ropes(config):
        _check_rope(rope, config, length, named)
    _check_chunks(config, length, named)
    limit = num_positions(config)
    if limit is not None and length > limit:
        raise ModelError(
            f"model.context_length {length} is more than the {limit} positions of {named}; lower it, or give "
            "a model with a longer context"
        )


def num_positions(config: "PreTrainedConfig") -> int | None:
    """Tokens that a sequence may have, as the model states it; None where it has no limit (alibi, states)."""
    if _has_alibi(config):
        return None
    own = _size(config, OWN_LIMIT)
    stated = [_size(config, key) for key in POSITION_LIMITS] if own is None else [own]
    return min((size for size in stated if size is not None), default=None)


def _check_text_alone(config: "PreTrainedConfig", name: str) -> None:
    """A model that reads images or sound too is not trained here; its language model alone can be."""
    try:
        text = config.get_text_config()
    except ValueError as error:  # it has several
        raise ModelError(
            f"{name} is not one language model ({_in_short(error)}); {ANOTHER_FAMILY}"
        ) from error
    if text is config and not _reads_more(config):
        return
    parts = ", ".join(key for key in sorted(config.sub_configs) if key != "text_config")
    remedy = "give a model of text alone"
    if text is not config and _has_class(text, scores=False):
        remedy = f"give its language model alone, saved as {_class_of(text, name, scores=False).__name__}"
    raise ModelError(f"{name} is a model of more than text ({parts}), which cannot be trained here; {remedy}")


def _reads_more(config: "PreTrainedConfig") -> bool:
    """Whether its class reads more than text and it has configs of the parts that do. What the class says is
    not enough: a language model inherits it from the model that it is taken out of.
    """
    reads = (
        _class_of(config, "", scores=False).input_modalities if _has_class(config, scores=False) else "text"
    )
    return bool(config.sub_configs) and reads not in ("text", ("text",), ["text"])


def _check_decoder(config: "PreTrainedConfig", name: str) -> None:
    """What reads a whole text before it answers cannot continue one. GPT-NeoX leaves is_decoder false, so
    only families with a masked-LM class are asked.
    """
    from transformers import AutoModelForMaskedLM

    if config.is_encoder_decoder:
        raise ModelError(f"{name} is an encoder-decoder (is_encoder_decoder); give a decoder-only model")
    fills_in = type(config) in AutoModelForMaskedLM._model_mapping.keys()  # noqa: SIM118 - as below
    if fills_in and not (hasattr(config, "is_decoder") and config.is_decoder):
        raise ModelError(
            f"{name} is an encoder (is_decoder is not true), whose tokens see what follows; give a "
            "decoder-only model"
        )


def _check_class(found: "type[PreTrainedModel]", name: str) -> None:
    if found._is_stateful:
        raise ModelError(_mixes_tokens(name, f"{found.__name__} keeps a state"))
    taken = inspect.signature(found.forward).parameters
    for needed, reason in NEEDED.items():
        if needed not in taken:
            raise ModelError(
                f"{name} cannot be trained here: transformers' {found.__name__} takes no {needed}, {reason}; "
                f"{ANOTHER_FAMILY}"
            )


def _check_layers(config: "PreTrainedConfig", name: str) -> None:
    if found := sorted({*_layer_types(config)} & {*NOT_ATTENTION}):
        raise ModelError(_mixes_tokens(name, f"layer_types: {', '.join(found)}"))


def _check_temperature(config: "PreTrainedConfig", name: str) -> None:
    """Llama 4 sharpens the queries of its layers without rope by their place in the *row* (transformers'
    modeling_llama4 counts from its start), where a packed sequence has a place of its own. It shows in rows
    of `floor_scale` tokens and more, which several short sequences fill.
    """
    without_rope = hasattr(config, "no_rope_layers") and not all(config.no_rope_layers or ())
    if without_rope and hasattr(config, "attn_temperature_tuning") and config.attn_temperature_tuning:
        raise ModelError(
            f"{name} cannot be trained here: its layers without rope scale queries by their place in the row "
            f"(attn_temperature_tuning), which is not that in a packed sequence; {ANOTHER_FAMILY}"
        )


def _mixes_tokens(name: str, how: str) -> str:
    return (
        f"{name} cannot be trained here: its layers mix tokens outside of attention ({how}), so packed "
        f"sequences would see each other; {ANOTHER_FAMILY}"
    )


def _check_rope(rope: Mapping[str, Any], config: "PreTrainedConfig", length: int, named: str) -> None:
    """Of the scaled ropes, two go by the longest sequence of a row, so that neighbours change each other.

    longrope has factors for rows beyond the original length (Ding et al. 2024, arXiv 2402.13753; vLLM takes
    them by its max_model_len); the base of dynamic NTK grows with the longest sequence so far, beyond
    max_position_embeddings. Below that both compute the same, in transformers and in vLLM.
    """
    match rope["rope_type"]:
        case "longrope":
            original, beyond = rope["original_max_position_embeddings"], "its long factors (longrope)"
        case "dynamic":
            original, beyond = config.max_position_embeddings, "scaling (dynamic rope)"
        case _:
            return
    if length > original:
        raise ModelError(
            f"model.context_length {length} is more than the {original} positions that {named} has without "
            f"{beyond}, which goes by the longest sequence of a row, so packed sequences would change each "
            f"other; use {original} at most"
        )


def _check_chunks(config: "PreTrainedConfig", length: int, named: str) -> None:
    """Chunks are cut from the start of a row, not of each sequence in it."""
    chunk, types = _size(config, "attention_chunk_size"), _layer_types(config)
    if chunk is not None and length > chunk and (not types or "chunked_attention" in types):
        raise ModelError(
            f"model.context_length {length} is more than one chunk of {named} (attention_chunk_size {chunk}),"
            f" and chunks do not begin with each packed sequence; use {chunk} at most"
        )


def _ropes(config: "PreTrainedConfig") -> Iterator[Mapping[str, Any]]:
    """The rope parameters of all layers, or of each type of layer that has its own."""
    parameters = config.rope_parameters if hasattr(config, "rope_parameters") else None
    if isinstance(parameters, Mapping):
        for each in (parameters, *parameters.values()):
            if isinstance(each, Mapping) and "rope_type" in each:
                yield each


def _layer_types(config: "PreTrainedConfig") -> tuple[str, ...]:
    types = config.layer_types if hasattr(config, "layer_types") else None
    return tuple(types or ())


def _has_alibi(config: "PreTrainedConfig") -> bool:
    """Distances to other tokens instead of positions. MPT states it among the settings of its attention."""
    stated = config.attn_config if hasattr(config, "attn_config") else config
    return hasattr(stated, "alibi") and bool(stated.alibi)


def _size(config: "PreTrainedConfig", key: str) -> int | None:
    """A size that the config states under this name or, mapped by transformers, under the family's own."""
    value = getattr(config, key) if hasattr(config, key) else None
    return value if type(value) is int and value > 0 else None


def _auto_class(scores: bool) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if scores else AutoModelForCausalLM


def _has_class(config: "PreTrainedConfig", *, scores: bool) -> bool:
    return type(config) in _auto_class(scores)._model_mapping.keys()  # noqa: SIM118 - iterating gives others


def _class_of(config: "PreTrainedConfig", name: str, *, scores: bool) -> "type[PreTrainedModel]":
    """transformers' class of a language model, or of a reward model, with this config. Raises ModelError."""
    if not _has_class(config, scores=scores):
        remedy = "leave out the reward stage, or give" if scores else "give"
        kind = "reward model" if scores else "language model"
        raise ModelError(
            f"{name} has no {kind} in transformers "
            f"({_auto_class(scores).__name__} does not know it); {remedy} a model of another family"
        )
    found = _auto_class(scores)._model_mapping[type(config)]
    chosen: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
    return chosen


def build_without_memory(config: "PreTrainedConfig", named: str, *, scores: bool) -> "PreTrainedModel":
    """The model as it is trained, on torch's meta device: modules and shapes. Raises ModelError."""
    from stages.training.packed_attention import register_packed_attention

    try:
        return _on_meta(config, register_packed_attention(), scores=scores)
    except Exception as error:  # a config.json with senseless values brings up any error of transformers
        raise_unless_of_the_model(error)
        name, found = _name(config, named), _class_of(config, named, scores=scores).__name__
        if _can_be_built_without_memory(config, "eager", scores=scores):
            raise ModelError(
                f"{name} cannot be trained here: transformers cannot exchange the attention of {found}, so "
                f"packed sequences would see each other; {ANOTHER_FAMILY}"
            ) from error
        raise ModelError(
            f"{name}: transformers cannot build {found} ({_in_short(error)}); correct its config.json"
        ) from error


def _can_be_built_without_memory(config: "PreTrainedConfig", attention: str, *, scores: bool) -> bool:
    try:
        _on_meta(config, attention, scores=scores)
    except MemoryError:
        raise
    except Exception:  # as above
        return False
    return True


def _on_meta(config: "PreTrainedConfig", attention: str, *, scores: bool) -> "PreTrainedModel":
    import torch

    own = copy.deepcopy(config)
    if scores:
        own.num_labels = 1
    with torch.device("meta"):
        model: PreTrainedModel = _auto_class(scores).from_config(
            own, dtype=torch.float32, attn_implementation=attention
        )
    return model


def check_ends(model: "PreTrainedModel", named: str, *, scores: bool) -> int:
    """Raise ModelError unless `model` begins with an embedding, and ends with a linear head: of logits, or of
    `scores`. Returns the rows of the embedding.
    """
    from torch import nn

    embedding = model.get_input_embeddings()
    if not (isinstance(embedding, nn.Embedding) and (scores or _has_linear_head(model))):
        raise ModelError(
            f"{_name(model.config, named)} cannot be trained here: transformers' {type(model).__name__} has "
            f"no embedding, or no linear output head; {ANOTHER_FAMILY}"
        )
    if scores:
        _check_score(model, named)
    return embedding.num_embeddings


def _has_linear_head(model: "PreTrainedModel") -> bool:
    from torch import nn

    return isinstance(model.get_output_embeddings(), nn.Linear)


def _check_score(model: "PreTrainedModel", named: str) -> None:
    """transformers calls the linear layer of a sequence classifier on a decoder `score`."""
    from torch import nn

    if not (hasattr(model, "score") and isinstance(model.score, nn.Linear)):
        raise ModelError(
            f"{_name(model.config, named)} has no reward model here: {type(model).__name__} of transformers "
            f"has no linear `score`; leave out the reward stage, or {ANOTHER_FAMILY}"
        )


def _name(config: "PreTrainedConfig", named: str) -> str:
    return f"{named}: {config.model_type}"


def raise_unless_of_the_model(error: Exception) -> None:
    """Raise what says nothing about a model although it came up while one was read, built or tried: lack of
    memory (as MemoryError, however torch calls it) and failed assertions of our own.
    """
    import torch

    if isinstance(error, MemoryError) or (isinstance(error, AssertionError) and _is_ours(error)):
        raise error
    refused = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    if refused or isinstance(error, torch.OutOfMemoryError):
        raise MemoryError(_in_short(error)) from error


def _is_ours(error: BaseException) -> bool:
    """Whether a line of this package raised it."""
    *_, (innermost, _line) = traceback.walk_tb(error.__traceback__)
    return innermost.f_code.co_filename.startswith(str(Path(__file__).parents[1]))


def _in_short(error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {reason}"[:300]
