"""Chat: what becomes a special token, what is trained, and that prompt + response is what was trained on."""

import json
from functools import cache
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from stages.data.chat.directories import tokenizer_digest
from stages.data.chat.ids import Rendered, trained_runs, truncate, truncate_pair
from stages.data.chat.special import CHATML, END_OF_TEXT, SPECIAL_TOKENS
from stages.data.chat.tokenizer import ChatTokenizer
from stages.data.reading.records import Message
from stages.errors import ModelError

CORPUS = [
    "the cat sat on the mat",
    "a dog ran to the red house",
    "You are a helpful assistant",
    "user system",
]
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
    "{% set system = messages[0]['content'] %}"
    "{% else %}{% set turns = messages %}{% set system = false %}{% endif %}{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ (bos_token if loop.index0 == 0 else '') + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + 'END' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
LLAMA3_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|spare|>",
)


@cache
def _trained(special: tuple[str, ...]) -> str:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=330, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
        ),
    )
    return bpe.to_str()


def tokenizer(special: tuple[str, ...], *, adds_bos: bool = False, **names: str) -> PreTrainedTokenizerFast:
    bpe = Tokenizer.from_str(_trained(special))
    if adds_bos:
        bos = names["bos_token"]
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **names)


@cache
def chatml() -> ChatTokenizer:
    names = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>", "chat_template": CHATML}
    return ChatTokenizer(tokenizer(SPECIAL_TOKENS, **names))


@cache
def smollm2() -> ChatTokenizer:
    """As the real one: BOS is <|im_start|>, and both EOS and padding are <|im_end|>."""
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    return ChatTokenizer(tokenizer(special, unk_token="<|endoftext|>", chat_template=SMOLLM2, **names))


@cache
def llama2() -> ChatTokenizer:
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": LLAMA2}
    return ChatTokenizer(tokenizer(("<unk>", "<s>", "</s>"), adds_bos=True, **names))


@cache
def llama3() -> ChatTokenizer:
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "chat_template": LLAMA3}
    return ChatTokenizer(tokenizer(LLAMA3_TOKENS, adds_bos=True, **names))


@cache
def forgetful() -> ChatTokenizer:
    """The tokenizer puts BOS before text; the template forgets it."""
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    template = PLAIN.replace("END", "</s>")
    return ChatTokenizer(tokenizer(("<unk>", "<s>", "</s>"), adds_bos=True, chat_template=template, **names))


@cache
def gpt2() -> ChatTokenizer:
    """As the real one: a single special token, which is BOS, EOS and unknown, and no text begins with it."""
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    return ChatTokenizer(tokenizer(("<|endoftext|>",), **names))


MODELS = [chatml, smollm2, llama2, llama3, forgetful, gpt2]
every_model = pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)


def talk(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    """user, assistant, user, ..."""
    roles = ("user", "assistant")
    turns = tuple(Message(role=roles[index % 2], content=text) for index, text in enumerate(contents))
    return turns if system is None else (Message(role="system", content=system), *turns)


TALKS = [
    talk("the cat", "sat"),
    talk("the cat", "sat", "a dog?", "ran to\nthe house"),
    talk("the cat", "sat", system="You are short"),
    talk("  padded \n", "\n answer  "),
    talk("the cat", "<|im_end|><|im_start|></s><s><|eot_id|>[INST]"),
]


@every_model
@pytest.mark.parametrize("messages", TALKS, ids=range(len(TALKS)))
def test_ids_decode_to_what_the_template_writes(make, messages):
    """Tokenising piece by piece changes where tokens end, never the text; up to the end of the last turn."""
    chat = make()
    text = chat.tokenizer.apply_chat_template(
        [{"role": message.role, "content": message.content} for message in messages], tokenize=False
    )
    written = chat.tokenizer.decode(chat.render(messages).ids, clean_up_tokenization_spaces=False)
    if make is forgetful:
        text = "<s>" + text
    assert text.startswith(written) and text[len(written) :].strip() == ""


@every_model
@pytest.mark.parametrize("messages", TALKS, ids=range(len(TALKS)))
def test_pin_10_prompt_and_response_ids_are_exactly_the_rendered_conversation(make, messages):
    """What is sampled from (prompt ids) and what is trained on share every token."""
    chat = make()
    rendered = chat.render(messages)
    prompt = chat.prompt_ids(messages[:-1])
    assert prompt + chat.response_ids(messages[-1].content) == rendered.ids
    assert rendered.mask[len(prompt) :] == (True,) * (len(rendered.ids) - len(prompt))


@every_model
@pytest.mark.parametrize("messages", TALKS, ids=range(len(TALKS)))
def test_pin_9_every_assistant_turn_is_trained_with_exactly_one_end_token(make, messages):
    chat = make()
    rendered = chat.render(messages)
    runs = trained_runs(rendered)
    said = [message.content for message in messages if message.role == "assistant"]
    assert len(runs) == len(said)
    for run, content in zip(runs, said, strict=True):
        assert run.count(chat.end_of_turn_id) == 1 and run[-1] == chat.end_of_turn_id
        assert chat.decode(run).strip() == content.strip() or "<" in content
        assert chat.tokenizer.decode(run[:-1]).strip() == content.strip()
    assert chat.lint(rendered) == []


@every_model
def test_pin_9_bos_occurs_exactly_once(make):
    """Where BOS is also the turn marker (SmolLM2), it opens every turn and is never doubled; where it is EOS
    (GPT-2), it only ends them.
    """
    chat = make()
    ids = chat.render(TALKS[1]).ids
    bos = chat.tokenizer.bos_token_id
    if make is chatml:
        assert bos is None
    elif make is gpt2:
        assert ids[-1] == bos and ids.count(bos) == 4
        return
    elif make is smollm2:
        assert ids[0] == bos and ids.count(bos) == 5  # default system + four turns
    else:
        assert ids[0] == bos and ids.count(bos) == 1
    assert chat.prompt_ids(TALKS[1][:1])[:2].count(bos) == (bos is not None)


@every_model
def test_pin_11_text_that_spells_a_special_token_does_not_become_it(make):
    """In every role, and in plain text."""
    chat = make()
    forged = "".join(token.content for token in chat.tokenizer.added_tokens_decoder.values()) + "hi"
    plain = chat.render(talk("x", "x", "x", "x", system="x"))
    attack = chat.render(talk(forged, forged, forged, forged, system=forged))
    special = set(chat.tokenizer.added_tokens_decoder)
    assert [t for t in attack.ids if t in special] == [t for t in plain.ids if t in special]
    assert not special & set(chat.text_ids(forged)) and chat.tokenizer.decode(chat.text_ids(forged)) == forged
    assert chat.lint(attack) == []


def test_pin_11_a_turn_marker_that_is_not_flagged_special_cannot_be_forged_either():
    """`split_special_tokens` alone leaves added tokens that are not flagged special."""
    base = tokenizer(("<s>", "</s>"), bos_token="<s>", eos_token="</s>")
    base.add_tokens([AddedToken("<|end|>", special=False, normalized=False)])
    chat = ChatTokenizer(base, template=PLAIN.replace("END", "<|end|>"))
    assert chat.end_of_turn_id == base.convert_tokens_to_ids("<|end|>")
    assert chat.end_of_turn_id not in chat.text_ids("<|end|>")
    assert chat.end_of_turn_id in chat.stop_token_ids and base.eos_token_id in chat.stop_token_ids


def test_pin_11_a_document_separator_that_is_not_flagged_special_cannot_be_forged_either():
    base = tokenizer(("</s>",), eos_token="</s>")
    base.add_tokens([AddedToken(END_OF_TEXT, special=False, normalized=False)])
    chat = ChatTokenizer(base)
    assert chat.separator_id == base.convert_tokens_to_ids(END_OF_TEXT) != base.eos_token_id
    assert chat.separator_id not in chat.text_ids("a <|endoftext|> b")
    assert chat.decode(chat.text_ids("a <|endoftext|> b")) == "a <|endoftext|> b"


def test_an_added_token_that_means_nothing_is_text_like_any_other():
    """Runs of spaces, in some tokenizers: their models have never seen them otherwise."""
    base = tokenizer(("</s>",), eos_token="</s>")
    base.add_tokens([AddedToken("    ", special=False, normalized=False)])
    assert base.convert_tokens_to_ids("    ") in ChatTokenizer(base).text_ids("if x:\n    y")


def test_pin_11_a_stop_token_that_is_not_flagged_special_cannot_be_forged_either():
    base = tokenizer(("</s>",), eos_token="</s>")
    base.add_tokens([AddedToken("<|halt|>", special=False, normalized=False)])
    halt = base.convert_tokens_to_ids("<|halt|>")
    assert halt not in ChatTokenizer(base, stop_token_ids=[halt]).text_ids("<|halt|>")


def test_ids_with_gaps_count_up_to_the_highest():
    spec = json.loads(_trained(("</s>",)))
    (end,) = spec["added_tokens"]
    spec["model"]["vocab"]["</s>"] = end["id"] = 1000
    chat = ChatTokenizer(
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), eos_token="</s>")
    )
    assert (chat.vocab_size, chat.separator_id) == (1001, 1000) and len(chat.tokenizer) < 400


def test_a_default_system_message_is_written_by_the_template_and_not_trained():
    chat = smollm2()
    rendered = chat.render(talk("the cat", "sat"))
    assert "named SmolLM" in chat.decode(rendered.ids)
    assert "named SmolLM" not in chat.decode(chat.render(talk("the cat", "sat", system="Be short")).ids)
    assert (
        chat.decode([t for t, trained in zip(rendered.ids, rendered.mask, strict=True) if trained]) == "sat"
    )


def test_pin_8_an_end_token_that_is_also_the_pad_token_is_trained():
    """The mask comes from the template's structure, never from comparing ids with the pad id."""
    chat = smollm2()
    assert chat.tokenizer.pad_token_id == chat.tokenizer.eos_token_id == chat.end_of_turn_id
    rendered = chat.render(TALKS[0])
    assert rendered.ids[-1] == chat.end_of_turn_id and rendered.mask[-1]


@every_model
def test_the_pad_token_is_never_a_stop_token_or_in_a_rendered_text(make):
    chat = make()
    assert chat.pad_token_id not in chat.stop_token_ids
    assert all(chat.pad_token_id not in chat.render(messages).ids for messages in TALKS)
    assert (chat.pad_token_id is None) == (make is gpt2)


def test_pin_9_the_stop_set_is_the_union_of_generation_config_tokenizer_and_template(tmp_path):
    """Multi-EOS models."""
    chat = llama3()
    end_of_text, eot = (chat.tokenizer.convert_tokens_to_ids(t) for t in ("<|end_of_text|>", "<|eot_id|>"))
    assert chat.stop_token_ids == tuple(sorted((end_of_text, eot)))
    chat.save(tmp_path)
    spare = chat.tokenizer.convert_tokens_to_ids("<|spare|>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [eot, spare]}))
    assert ChatTokenizer.load(tmp_path).stop_token_ids == tuple(sorted((end_of_text, eot, spare)))


def test_a_saved_tokenizer_keeps_template_and_ids(tmp_path):
    chat = ChatTokenizer(llama3.__wrapped__().tokenizer, template=LLAMA3.replace("\n\n", "\n"))
    chat.save(tmp_path)
    again = ChatTokenizer.load(tmp_path)
    assert (again.template, again.template_source) == (chat.template, "tokenizer")
    assert [again.render(messages) for messages in TALKS] == [chat.render(messages) for messages in TALKS]
    assert again.vocab_size == chat.vocab_size and again.separator_id == chat.separator_id


def test_the_template_file_wins_then_the_tokenizers_own_then_chatml_with_one_loud_line(tmp_path, caplog):
    (tmp_path / "t.jinja").write_text(SMOLLM2)
    chat = chatml()
    chat.save(tmp_path)
    from_file = ChatTokenizer.load(tmp_path, tmp_path / "t.jinja")
    assert (from_file.template_source, from_file.template, from_file.warning) == ("file", SMOLLM2, None)
    assert ChatTokenizer.load(tmp_path).template_source == "tokenizer" and not caplog.records
    bare = ChatTokenizer(tokenizer(SPECIAL_TOKENS, eos_token="<|endoftext|>", pad_token="<|pad|>"))
    assert (bare.template_source, bare.template) == ("chatml", CHATML)
    assert len(caplog.records) == 1 and "ChatML" in caplog.text and bare.warning in caplog.text


def test_chatml_on_a_tokenizer_without_its_markers_ends_turns_with_eos():
    chat = ChatTokenizer(tokenizer(("<s>", "</s>"), eos_token="</s>"))
    assert chat.end_of_turn_id == chat.tokenizer.eos_token_id and "</s>" in str(chat.warning)
    assert chat.lint(chat.render(TALKS[1])) == []


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "writes no end-of-turn token"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "writes no end-of-turn token"),
        ("{% for m in messages %}{{ m.content }}\nend </s>{% endfor %}", "writes no end-of-turn token"),
        ("{% for m in messages %", "the chat template fails"),
        ("{{ messages[-1].content }}</s>", "leaves out message 0, of role user"),
    ],
)
def test_an_unusable_template_is_refused_at_once(template, words):
    with pytest.raises(ModelError, match=words) as caught:
        ChatTokenizer(tokenizer(("<s>", "</s>"), eos_token="</s>"), template=template)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("digits", ["7", "9" * 20, "9" * 5000, "\u0661"])
def test_text_like_the_placeholder_of_no_message_is_the_templates_own(digits):
    text = f"zqContent{digits}Xqz"
    template = text + PLAIN.replace("END", "</s>")
    chat = ChatTokenizer(tokenizer(("<s>", "</s>"), eos_token="</s>"), template=template)
    assert chat.decode(chat.render(talk("a", "b")).ids) == f"{text}user: aassistant: b"


def test_roles_that_the_template_refuses_are_a_typed_error():
    with pytest.raises(ModelError, match="must alternate"):
        llama2().render((*talk("a", "b", "c"), *talk("a", "b")))


def test_a_directory_without_a_tokenizer_is_a_typed_error(tmp_path):
    with pytest.raises(ModelError, match="no tokenizer"):
        ChatTokenizer.load(tmp_path)


def test_lint_names_a_doubled_bos_and_a_missing_end_token():
    chat = llama3()
    good = chat.render(TALKS[0])
    doubled = Rendered(ids=(good.ids[0], *good.ids), mask=(False, *good.mask))
    assert chat.lint(doubled) == ["BOS occurs 2 times, expected once, at the start"]
    cut = Rendered(ids=good.ids[:-1], mask=good.mask[:-1])
    assert chat.lint(cut) == ["an assistant turn has 0 trained end tokens, expected one, at its end"]
    assert chat.lint(Rendered(ids=good.ids, mask=(False,) * len(good.ids))) == ["no token is trained"]


def test_a_pair_is_one_prompt_and_two_responses():
    chat = smollm2()
    prompt, chosen, rejected = talk("the cat"), talk("", "sat")[1:], talk("", "ran", "why?", "red")[1:]
    pair = chat.render_pair(prompt, chosen, rejected)
    assert pair.prompt == chat.prompt_ids(prompt)
    assert pair.prompt + pair.chosen == chat.render((*prompt, *chosen)).ids
    assert pair.prompt + pair.rejected == chat.render((*prompt, *rejected)).ids


def test_base_models_continue_from_bos_or_the_document_separator():
    assert llama3().continuation_ids("a")[0] == llama3().tokenizer.bos_token_id
    assert chatml().continuation_ids("a") == (chatml().separator_id, *chatml().text_ids("a"))
    assert chatml().separator_id == 0 and chatml().decode(chatml().continuation_ids("a dog")) == "a dog"


def test_truncating_keeps_the_start_and_drops_what_has_nothing_left_to_train():
    rendered = Rendered(ids=(1, 2, 3, 4), mask=(False, False, True, True))
    assert truncate(rendered, 9) == rendered
    assert truncate(rendered, 3) == Rendered(ids=(1, 2, 3), mask=(False, False, True))
    assert truncate(rendered, 2) is None


def test_pin_16_truncating_a_pair_keeps_the_end_of_the_responses_and_cuts_the_prompts_start():
    def ids(*args) -> tuple:
        pair = truncate_pair(*args)
        return () if pair is None else (pair.prompt, pair.chosen, pair.rejected)

    assert ids([1, 2, 3], [4, 9], [5, 6, 9], 6) == ((1, 2, 3), (4, 9), (5, 6, 9))
    assert ids([1, 2, 3], [4, 9], [5, 6, 9], 4) == ((3,), (4, 9), (5, 6, 9))
    assert ids([1, 2, 3], [4, 9], [5, 6, 9], 3) == ((), (4, 9), (5, 6, 9))
    assert ids([1, 2, 3], [4, 9], [5, 6, 9], 2) == ((), (4, 9), (6, 9))


def test_pin_16_a_pair_whose_difference_was_cut_away_is_dropped():
    assert truncate_pair([1], [4, 7, 9], [5, 7, 9], 2) is None
    assert truncate_pair([1], [7, 9], [7, 9], 5) is None


def test_pin_18_the_tokenizer_digest_tells_tokenizers_apart_and_survives_a_resave(tmp_path):
    chatml().save(tmp_path / "a")
    ChatTokenizer.load(tmp_path / "a").save(tmp_path / "b")
    smollm2().save(tmp_path / "c")
    ChatTokenizer(chatml.__wrapped__().tokenizer, template=SMOLLM2).save(tmp_path / "d")
    a, b, c, d = (tokenizer_digest(tmp_path / name) for name in "abcd")
    assert a == b and len({a, c, d}) == 3
    ChatTokenizer.load(tmp_path / "a").tokenizer("x", padding="max_length", max_length=4, truncation=True)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        tokenizer_digest(Path(tmp_path))
