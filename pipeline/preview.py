"""What `rlhf check` shows of every dataset: its schema, its figures, and one example with its loss mask.

Owns: the words and colours. Does not own: the figures (stages.data.overview), which load a tokenizer and so
are imported where they are computed.
"""

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

from rich.text import Text

from pipeline import dag, identity
from pipeline.data_remarks import files_read, remarks
from pipeline.experiment import ExperimentConfig
from pipeline.stage_table import STAGES, data_of
from stages.data.reading.files import one_line, printable
from stages.data.reading.readers import unread_keys_in_words

if TYPE_CHECKING:
    from stages.data.chat.template_marks import Headers
    from stages.data.chat.tokenizer import ChatTokenizer
    from stages.data.overview import Limits, Overview

TRAINED, CONTEXT = "bold green", "dim"
MARKS = "\u27e6", "\u27e7"
"""Around what is trained, so that the mask is seen without colours too."""
NUM_RULES = 12
"""Shown of each dataset, the most frequent ones: every language is a rule."""
PROMPT_CHARS = 80
"""Of a prompt that no column holds."""
LAID_OUT = "\n\t\u00a0\u3000\u200c\u200d"
"""Line ends, tabs, wide spaces and the joiners of emoji and scripts: they do not print, and do no harm."""


def previews(config: ExperimentConfig, *, model_at_hand: bool) -> Iterator[Text]:
    """One block of text per dataset of the configured stages, once all are validated. Raises DataError,
    ModelError.
    """
    from stages.data.observations import Observed
    from stages.data.overview import overview
    from stages.data.validation import validate

    datasets = identity.datasets(config, dag.configured(config))
    ngram = None if config.prepare is None else config.prepare.decontaminate_ngram
    given = _given_chat(config, model_at_hand)
    headers = _headers(config, given)
    observed = {
        stage: [
            Observed(source, ngram=ngram if data_of(stage).asks == "to evaluate" else None, headers=headers)
            for source in sources.values()
        ]
        for stage, sources in datasets.items()
    }
    validated = {
        stage: validate(list(sources.values()), data_of(stage).reads, getattr(config, stage), observed[stage])
        for stage, sources in datasets.items()
    }
    chat, origin = _chat(config) if given is None else given
    yield Text.assemble(
        f"lengths: {origin}; example: ", _marked("trained", True), " ", _marked("not trained", False)
    )
    for stage, sources in datasets.items():
        for (key, source), found, seen in zip(
            sources.items(), validated[stage], observed[stage], strict=True
        ):
            shown = overview(source, data_of(stage).reads, found, chat, _limits(config, stage))
            told = chain(files_read(source, found), _figures(shown), remarks(stage, seen, observed, chat))
            lines = "".join(f"  {line}\n" for line in told)
            example = (_marked(span.text, span.trained) for span in shown.example)
            yield Text.assemble(f"\n{key}: {one_line(source.path)}\n{lines}", *example)


def _given_chat(config: ExperimentConfig, model_at_hand: bool) -> "tuple[ChatTokenizer | None, str] | None":
    """The tokenizer that the stages will have, and where it is from; None: prepare makes it."""
    from stages.data.chat.tokenizer import ChatTokenizer

    template, prepare = config.model.chat_template, config.prepare
    if config.model.path is not None:
        if not model_at_hand:
            return None, f"in characters, for {config.model.path} has to be fetched first"
        chat = ChatTokenizer.load(config.model.path, template, revision=config.model.revision)
        return chat, f"in tokens of {config.model.path}"
    if prepare is None:
        return None, "in characters, for the config names no model"
    if prepare.tokenizer is not None:
        return ChatTokenizer.load(prepare.tokenizer, template), f"in tokens of {prepare.tokenizer}"
    return None


def _chat(config: ExperimentConfig) -> "tuple[ChatTokenizer, str]":
    """A tokenizer like the one that prepare makes."""
    from stages.data.corpus.vocabulary import tokenizer_for
    from stages.data.overview import first_texts

    prepare = config.prepare
    assert prepare is not None, "else the tokenizer is given, or there is none"
    texts = [text for source in prepare.data if source.weight > 0 for text in first_texts(source, prepare)]
    chat = tokenizer_for(texts, prepare, config.model.chat_template)
    return chat, "in tokens like prepare's, trained on the start of its data"


def _headers(
    config: ExperimentConfig, given: "tuple[ChatTokenizer | None, str] | None"
) -> "tuple[Headers, ...]":
    """What the model's chat template writes before turns, as far as it is known before data is read."""
    from stages.data.chat.directories import read_template
    from stages.data.chat.headers import headers_of

    chat = None if given is None else given[0]
    if chat is not None:
        return headers_of(chat.template, chat.tokenizer.special_tokens_map)
    template = config.model.chat_template
    return () if template is None else headers_of(read_template(template), {})


def _limits(config: ExperimentConfig, stage: str) -> "Limits":
    from stages.data.overview import Limits

    section, data = getattr(config, stage), data_of(stage)
    return Limits(
        context_length=config.model.context_length,
        max_prompt_tokens=(
            config.model.max_prompt_tokens(section.max_response_tokens)
            if data.reads == "prompts"
            else config.model.context_length
        ),
        base_prompt=section.base_prompt if data.asks == "to evaluate" else None,
        pairs_too_long=section.too_long if data.reads == "pairs" else "drop",
        group_column=section.group_column if data.reads == "pairs" else None,
        normaliser_prompt_tokens=(
            _normaliser_prompt_tokens(config) if STAGES[stage].makes == "reward model" else None
        ),
        prepare=config.prepare,
    )


def _normaliser_prompt_tokens(config: ExperimentConfig) -> int | None:
    """The longest prompt that the reward model's normaliser can be sampled with; None where it is not."""
    sampling = None if config.reward is None else config.reward.normaliser_sampling(config.ppo_sampling)
    return None if sampling is None else config.model.max_prompt_tokens(sampling.max_response_tokens)


def _figures(found: "Overview") -> Iterator[str]:
    renamed = [f"{field} from {column}" for field, column in found.columns.items() if field != column]
    yield f"format {found.format}" + (f" ({', '.join(renamed)})" if renamed else "")
    left_out = {"malformed and skipped": found.num_skipped, "without a record": found.num_filtered}
    yield f"{found.num_rows} rows, {found.num_records} records" + "".join(
        f"; rows {what}: {count}" for what, count in left_out.items() if count
    )
    if found.num_rendered:
        refused = f", {found.num_refused} refused and skipped" if found.num_refused else ""
        yield f"chat template tried on {found.num_rendered} of {found.num_records} records{refused}"
    if found.num_examples > found.num_sampled:
        yield (
            f"{found.num_examples} examples, one per trained answer where the chat template writes an "
            "earlier answer differently once more turns follow"
        )
    if found.unread_keys:
        yield f"message keys that are not read: {unread_keys_in_words(found.unread_keys)}"
    if found.num_shared_prompts:
        prompt = one_line(found.shared_prompt)
        prompt = prompt if len(prompt) <= PROMPT_CHARS else f"{prompt[:PROMPT_CHARS]}\u2026"
        yield (
            f"no prompt column: of {found.num_shared_prompts} the prompt is what chosen and rejected begin "
            f"with, such as '{prompt}'"
        )
    of = "" if found.num_sampled == found.num_records else f" of the first {found.num_sampled}"
    yield f"{found.unit}{of}: median {found.median}, p95 {found.p95}, longest {found.max}"
    if found.normaliser_prompts is not None:
        fitting, of_all = found.normaliser_prompts
        if fitting < of_all:
            yield (
                f"{fitting} of {of_all} prompts{of} leave room for the responses that scores are normalised "
                "over"
            )
    rules = sorted(found.rules.items(), key=lambda counted: (-counted[1], counted[0]))
    for rule, count in rules[:NUM_RULES]:
        yield f"{count}{of} {'is' if count == 1 else 'are'} affected: {rule}"
    if others := rules[NUM_RULES:]:
        yield f"{sum(count for _, count in others)}{of} affected by {len(others)} further rules"


def _marked(text: str, trained: bool) -> Text:
    """As a terminal may be given it: data may hold what moves the cursor, or turns the line round."""
    opening, closing = MARKS if trained else ("", "")
    shown = printable(text, but_also=LAID_OUT)
    return Text(f"{opening}{shown}{closing}", style=TRAINED if trained else CONTEXT)
