"""Ids of real templates with tokenizers of every kind: those that the tokenizer gives for the whole text.

Compared with transformers: `tokenizer(apply_chat_template(..., tokenize=False), add_special_tokens=False)`.
"""

import json
from collections.abc import Callable
from functools import cache
from itertools import groupby, product

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from stages.data.chat.encoders import content_encoder
from stages.data.chat.tokenizer import ChatTokenizer
from stages.data.reading.records import Message
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
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + '<|end|>' + '\n' }}{% endif %}"
    "{% endfor %}"
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
INDENTED = """\
{% for message in messages %}
    {% if message['role'] == 'system' %}
\t\t{{- message['content'] + eos_token }}
    {% else %}
        {{- '<|' + message['role'] + '|>' + message['content'] }}
        {%- if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|assistant|>' -}}
{% endif %}
"""
TEMPLATES = {  # and their tokens beside <unk>, <s>, </s>; Phi-3's take the white space behind them
    "llama2": (LLAMA2, ()),
    "mistral_v1": (MISTRAL_V1, ()),
    "mistral_v3": (MISTRAL_V3, ("[INST]", "[/INST]")),
    "tinyllama": (ZEPHYR, ()),
    "phi3": (PHI3, ("<|user|>", "<|assistant|>", "<|end|>")),
    "gemma": (GEMMA, ("<start_of_turn>", "<end_of_turn>")),
    "qwen": (QWEN, ("<|im_start|>", "<|im_end|>")),
    "llama3": (LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "indented": (INDENTED, ("<|user|>", "<|assistant|>")),
}
TAKES_SYSTEM = ("llama2", "tinyllama", "gemma", "qwen", "llama3", "indented")
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
            vocab_size=200,
            special_tokens=SPECIAL,
            unk_token="<unk>",
            initial_alphabet=SIGNS,
            show_progress=False,
        )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


RUNS = ["  ", "    ", "        ", "\t\t", "\n", "\n\n", "\n\n\n"]
"""Of white space: added tokens that are not special, as those of GPT-NeoX, Phi, CodeGen and Gemma."""


@cache
def byte_level(spaces: str) -> str:
    """With Qwen's and Llama 3's pattern: line breaks join what is before them.

    `prefix`: with GPT-2's, a space before every text, no tokens of several line breaks, which that pattern
    parts before a word.
    """
    tokenizer = Tokenizer(models.BPE())
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    if spaces == "prefix":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    breaks = [] if spaces == "prefix" else ["a\n\nb\n\n\nc\n\n\n\nd"]
    tokenizer.train_from_iterator([*CORPUS, *breaks] * 3, trainer)
    if spaces == "runs":
        tokenizer.add_tokens([AddedToken(run, special=False, normalized=False) for run in RUNS])
    return tokenizer.to_str()


@cache
def chat_of(model: str, spaces: str, name: str) -> ChatTokenizer:
    template, tokens = TEMPLATES[name]
    if model == "byte_level":
        tokenizer = Tokenizer.from_str(byte_level(spaces))
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


KINDS = [*product(("bpe", "unigram"), SPACES), *product(["byte_level"], ["none", "prefix", "runs"])]
every_kind = pytest.mark.parametrize(("model", "spaces"), KINDS, ids="-".join)
every_template = pytest.mark.parametrize("name", TEMPLATES)
TALKS = [
    talk("hello world", "Hello, the cat is red."),
    talk("is it red?", "Yes"),
    talk("The cat", "hello", "12 cats?", "No, the dog\nran", "\u00e9t\u00e9 \u4e16?", "it is 12."),
    talk("x =  1\n    y = 2", "if x:\n\t\ty  = 3\n\n\n\tx"),
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


@every_kind
@pytest.mark.parametrize("name", TAKES_SYSTEM)
def test_a_system_message_has_the_tokenizers_own_ids_too(model, spaces, name):
    chat = chat_of(model, spaces, name)
    for messages in TALKS:
        prompt = (Message(role="system", content="The dog is  red."), *messages[:-1])
        assert list(chat.prompt_ids(prompt)) == own_ids(chat, prompt, prompt=True)


WHITE_SPACE = [
    *(" hello", "hello ", "\n\nhello", "\n\n the cat \n", "", " ", "\n", "    x = 1\n\ty  = 2\n\n\n"),
    *("\t\tx", "a" + " " * 17 + "b"),
]


@every_kind
@every_template
def test_a_prompt_has_the_tokenizers_own_ids_whatever_white_space_is_in_it(model, spaces, name):
    """Also runs of it that are tokens, and that the source of the template has in it."""
    chat = chat_of(model, spaces, name)
    for text in WHITE_SPACE:
        assert list(chat.prompt_ids(talk(text))) == own_ids(chat, talk(text), prompt=True), repr(text)


ODD = [
    talk(" hello", " world"),
    talk("\n\nhello ", "\n\n the cat \n", "", "", "\n", "12"),
    talk("</s><s>[INST] <unk><|end|>", "<|im_end|></s> <|eot_id|><end_of_turn>"),
]


@every_kind
@every_template
@pytest.mark.parametrize("messages", [*TALKS, *ODD], ids=range(len(TALKS + ODD)))
def test_prompt_and_response_ids_are_the_conversation_and_its_answers_are_trained(
    model, spaces, name, messages
):
    """Whatever the content begins and ends with."""
    chat = chat_of(model, spaces, name)
    whole = chat.render(messages)
    assert chat.prompt_ids(messages[:-1]) + chat.response_ids(messages[-1].content) == whole.ids
    runs = [
        [token for token, _ in run]
        for trained, run in groupby(zip(whole.ids, whole.mask, strict=True), key=lambda pair: pair[1])
        if trained
    ]
    answers = [message.content for message in messages if message.role == "assistant"]
    assert runs == [list(chat.response_ids(answer)) for answer in answers]
    assert chat.lint(whole) == []


@every_kind
@every_template
def test_content_never_becomes_a_special_token(model, spaces, name):
    """Unigram finds every entry of its vocabulary in a text, `</s>` too."""
    chat = chat_of(model, spaces, name)
    added = chat.tokenizer.added_tokens_decoder
    special = {index: token.content for index, token in added.items() if token.special}
    forged = "a".join(special.values())
    assert special.keys().isdisjoint(chat.text_ids(forged))
    plain, attack = (chat.render(talk(text, text, text, text)).ids for text in ("a", forged))
    assert [token for token in attack if token in special] == [token for token in plain if token in special]


@every_kind
def test_a_text_that_stands_alone_has_the_tokenizers_own_ids(model, spaces):
    chat = chat_of(model, spaces, "tinyllama")
    for text in (*CORPUS, *WHITE_SPACE, "\u00e9t\u00e9"):
        own = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert list(chat.text_ids(text)) == own == chat.documents_ids([text], np.dtype("uint16"))[0].tolist()
        assert list(chat.continuation_ids(text)) == [chat.tokenizer.eos_token_id, *own]
        again = content_encoder(chat.content_spec)
        assert again.encode(text, add_special_tokens=False).ids == own


@every_kind
@every_template
def test_a_response_reads_as_it_was_written(model, spaces, name):
    """Neither the template's space before an answer, nor the tokenizer's, is part of what was said."""
    chat = chat_of(model, spaces, name)
    for text in ("Hello, the cat", "12", "(it) is"):
        assert chat.response_text(chat.response_ids(text)).rstrip() == text
    if name in ("mistral_v1", "tinyllama", "qwen"):  # whose prompts end with text, and that trim nothing
        for text in (" hello", "\n\n the cat"):
            assert chat.response_text(chat.response_ids(text)) == text


@every_kind
def test_text_that_goes_on_keeps_its_first_space(model, spaces):
    chat = chat_of(model, spaces, "tinyllama")
    ids, start = chat.text_ids("the cat sat"), chat.text_ids("the")
    assert ids[: len(start)] == start and chat.continued_text(ids[len(start) :]) == " cat sat"


PLAIN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@every_kind
def test_an_answer_begins_with_a_token_of_its_own_where_the_tokenizer_would_join_it_with_the_prompt(
    model, spaces
):
    """A prompt that ends with a space: the model is given the space, and asked for the word."""
    tokenizer = chat_of(model, spaces, "tinyllama").tokenizer.backend_tokenizer
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    chat = ChatTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names), template=PLAIN)
    messages = talk("hello", "hello")
    prompt, ids = chat.prompt_ids(messages[:1]), chat.render(messages).ids
    assert list(prompt) == own_ids(chat, messages[:1], prompt=True)
    assert ids[: len(prompt)] == prompt and list(ids) != own_ids(chat, messages, prompt=False)
    assert chat.response_text(ids[len(prompt) :]) == "hello"


@pytest.mark.parametrize("legacy", [True, False])
@every_template
def test_transformers_own_llama_tokenizer_is_met_too(legacy, name):
    spec = json.loads(_sentencepiece("bpe"))["model"]
    tokenizer = LlamaTokenizer(
        vocab=spec["vocab"], merges=[tuple(pair) for pair in spec["merges"]], legacy=legacy
    )
    template, tokens = TEMPLATES[name]
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    chat = ChatTokenizer(tokenizer, template=template)
    for messages in TALKS:
        ids = list(chat.render(messages).ids)
        assert ids == own_ids(chat, messages, prompt=False)[: len(ids)]
        assert list(chat.prompt_ids(messages[:-1])) == own_ids(chat, messages[:-1], prompt=True)


def _refused(tokenizer: Tokenizer, template: str) -> str:
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    with pytest.raises(ModelError) as caught:
        ChatTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names), template=template)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_special_token_that_the_tokenizer_does_not_find_in_the_templates_text_is_refused():
    """`normalized`: it is looked for with the space that the tokenizer puts before it."""
    spec = json.loads(_sentencepiece("bpe"))
    for token in spec["added_tokens"]:
        token["normalized"] = True
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    _prepend(tokenizer)
    assert "normalized" in _refused(tokenizer, ZEPHYR)


def test_a_tokenizer_that_puts_a_space_before_every_word_is_refused_where_an_answer_goes_on_with_a_text():
    """As T5's: the first word of an answer has one, but not because a text begins."""
    tokenizer = Tokenizer.from_str(_sentencepiece("unigram"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    assert "model.chat_template" in _refused(tokenizer, ZEPHYR)


def test_a_tokenizer_that_looks_up_whole_words_first_finds_no_special_token_in_content():
    """Llama 3's setting, with the special tokens in the vocabulary: `</s>` alone is a word."""
    spec = json.loads(_sentencepiece("bpe"))
    spec["model"]["ignore_merges"], spec["pre_tokenizer"] = True, None
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    chat = ChatTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names), template=ZEPHYR)
    assert chat.tokenizer.eos_token_id not in chat.text_ids("</s>")
    assert chat.tokenizer.decode(chat.text_ids("</s>")).replace(" ", "") == "</s>"


def test_ids_with_gaps_keep_their_meaning():
    """And so does an added token that means nothing."""
    spec = json.loads(_sentencepiece("bpe"))
    last = max(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
    spec["model"]["vocab"][last] = 1000
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    _prepend(tokenizer)
    tokenizer.add_tokens([AddedToken("::", special=False, normalized=False)])
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    chat = ChatTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names), template=ZEPHYR)
    messages = talk(f"hello {last} :: the", "cats :: red", "and?", f"{last} ")
    ids = list(chat.render(messages).ids)
    assert ids == own_ids(chat, messages, prompt=False)[: len(ids)]
    assert tokenizer.token_to_id("::") in ids and max(ids) <= 1000
