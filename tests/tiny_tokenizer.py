"""The tokenizer of the tests' tiny models: byte-level BPE over a few sentences, with a chat template."""

from functools import cache
from typing import Any

CORPUS = [
    "the cat sat on the mat",
    "a dog ran to the red house",
    "two and three are five",
    "please say thank you",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
PAD, BOS, EOS = 0, 1, 2


@cache
def tiny_tokenizer() -> Any:
    """A `PreTrainedTokenizerFast` of at most 320 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>", "<user>", "<assistant>"]
    bpe.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=special,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template=CHAT_TEMPLATE,
    )
