"""Ids of real templates with tokenizers of every kind: those that the tokenizer gives for the whole text.

Compared with transformers: `tokenizer(apply_chat_template(..., tokenize=False), add_special_tokens=False)`.
"""

import json
from collections.abc import Callable
from functools import cache
from itertools import product

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from stages.data.chat import ChatTokenizer
from stages.data.records import Message
from stages.errors import ModelError

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}"
    "{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_V1 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token + ' ' }}{% endif %}{% endfor %}"
)
MISTRAL_V3 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + '[/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (  # TinyLlama's too
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
PHI3 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<|user|>' + '\n' + message['content'] + '<|end|>' + '\n' + '<|assistant|>' + '\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + '<|end|>' + '\n' }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + "
    "message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
QWEN = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
TEMPLATES = {  # template, and its tokens beside <unk>, <s>, </s>; those of Phi-3 take the white space behind them
    "llama2": (LLAMA2, ()),
    "mistral_v1": (MISTRAL_V1, ()),
    "mistral_v3": (MISTRAL_V3, ("[INST]", "[/INST]")),
    "tinyllama": (ZEPHYR, ()),
    "phi3": (PHI3, ("<|user|>", "<|assistant|>", "<|end|>")),
    "gemma": (GEMMA, ("<start_of_turn>", "<end_of_turn>")),
    "qwen": (QWEN, ("<|im_start|>", "<|im_end|>")),
    "llama3": (LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
}
SPECIAL = ["<unk>", "<s>", "</s>"]
CORPUS = [
    "hello world, the cat sat on the mat. Hello hello!",
    "The dog ran to the house; is it red? Yes, it is red. 12 cats",
    "user assistant system model You are a helpful assistant. [INST] hi [/INST] <|user|> <|assistant|>",
] * 4
SIGNS = sorted({*"".join(CORPUS), *map(chr, range(33, 127)), "\n"})


def _metaspace(scheme: str) -> Callable[[Tokenizer], None]:
    def fit(tokenizer: Tokenizer) -> None:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)

    return fit


def _prepend(tokenizer: Tokenizer) -> None:
    """As Llama-2's and Phi-3's tokenizer.json."""
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = None


def _gemma(tokenizer: Tokenizer) -> None:
    """Replaces spaces and puts none before a text."""
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = None


SPACES = {
    "first": _metaspace("first"),
    "always": _metaspace("always"),
    "never": _metaspace("never"),
    "prepend": _prepend,
    "replace": _gemma,
}
LLAMA_DECODER = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


@cache
def _sentencepiece(model: str) -> str:
    if model == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIAL, initial_alphabet=SIGNS, show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", initial_alphabet=SIGNS, show_progress=False
        )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


@cache
def _byte_level() -> str:
    """With Qwen's and Llama 3's pattern: line breaks join what is before them."""
    tokenizer = Tokenizer(models.BPE())
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*CORPUS, "a\n\nb\n\n\nc\n\n\n\nd"] * 3, trainer)
    return tokenizer.to_str()


@cache
def chat_of(model: str, spaces: str, name: str) -> ChatTokenizer:
    template, tokens = TEMPLATES[name]
    if model == "byte_level":
        tokenizer = Tokenizer.from_str(_byte_level())
    else:
        tokenizer = Tokenizer.from_str(_sentencepiece(model))
        SPACES[spaces](tokenizer)
        strip = [] if spaces in ("never", "replace") else [decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence([*LLAMA_DECODER, *strip])
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False, rstrip=name == "phi3") for token in tokens]
    )
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    return ChatTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names), template=template)


def talk(*contents: str) -> tuple[Message, ...]:
    roles = ("user", "assistant")
    return tuple(Message(role=roles[at % 2], content=text) for at, text in enumerate(contents))


KINDS = [*product(("bpe", "unigram"), SPACES), ("byte_level", "none")]
every_kind = pytest.mark.parametrize(("model", "spaces"), KINDS, ids="-".join)
every_template = pytest.mark.parametrize("name", TEMPLATES)
TALKS = [
    talk("hello world", "Hello, the cat is red."),
    talk("is it red?", "Yes"),
    talk("The cat", "hello", "12 cats?", "No, the dog\nran", "\u00e9t\u00e9 \u4e16?", "it is 12."),
]


def own_ids(chat: ChatTokenizer, messages: tuple[Message, ...], *, prompt: bool) -> list[int]:
    rows = [{"role": message.role, "content": message.content} for message in messages]
    text = chat.tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=prompt)
    return chat.tokenizer(text, add_special_tokens=False)["input_ids"]


@every_kind
@every_template
@pytest.mark.parametrize("messages", TALKS, ids=range(len(TALKS)))
def test_ids_are_those_that_the_tokenizer_gives_for_the_whole_text(model, spaces, name, messages):
    chat = chat_of(model, spaces, name)
    ids = list(chat.render(messages).ids)
    own = own_ids(chat, messages, prompt=False)
    assert ids == own[: len(ids)] and chat.end_of_turn_id not in own[len(ids) :]
    assert list(chat.prompt_ids(messages[:-1])) == own_ids(chat, messages[:-1], prompt=True)
