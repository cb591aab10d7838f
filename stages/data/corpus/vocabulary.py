"""The vocabulary: a tokenizer that is given, or a byte-level BPE trained on text.

Owns: how it is trained, and its size. Does not own: the special tokens and what they mean (chat), the sample
(corpus).
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from stages.config.prepare import PrepareConfig
from stages.data.chat.directories import read_template
from stages.data.chat.special import CHATML, END_OF_TEXT, PAD, SPECIAL_TOKENS
from stages.data.chat.tokenizer import ChatTokenizer


def given_tokenizer(
    directory: Path | None, config: PrepareConfig, template: Path | None
) -> ChatTokenizer | None:
    """The tokenizer of `directory`; None where one has to be trained first.

    Raises ModelError in both cases when it could not be used, because a template does not depend on the text.
    """
    if directory is not None:
        return ChatTokenizer.load(directory, template)
    tokenizer_for((), config, template)
    return None


def tokenizer_for(texts: Iterable[str], config: PrepareConfig, template: Path | None) -> ChatTokenizer:
    """prepare's own tokenizer, trained on `texts`, with the template of the config or ChatML."""
    trained = train_tokenizer(texts, config.vocab_size, config.vocab_multiple)
    return ChatTokenizer(trained, template=CHATML if template is None else read_template(template))


MAX_WORD_BYTES = 256
"""Training takes time with the square of a word's length, so a longer one (a megabyte of one sign) is learned
from in pieces; what is encoded is not cut.
"""
WORDS = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
TRAINING_WORDS = pre_tokenizers.Sequence(
    [WORDS, pre_tokenizers.Split(Regex(rf"[\s\S]{{1,{MAX_WORD_BYTES}}}"), behavior="isolated")]
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, multiple: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text comes back as it was; digits stand alone; the special tokens have ids 0 to 3.

    Both the entries asked for and those there are in the end are rounded up to a `multiple`, the latter with
    reserved special tokens, so that tokenizer and output layer agree on every id.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = TRAINING_WORDS
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=rounded_up(vocab_size, multiple),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = WORDS
    size = tokenizer.get_vocab_size()
    reserved = rounded_up(size, multiple) - size
    tokenizer.add_special_tokens([f"<|reserved_{number}|>" for number in range(reserved)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def rounded_up(number: int, multiple: int) -> int:
    """The lowest multiple that is not below `number`."""
    return -(-number // multiple) * multiple
