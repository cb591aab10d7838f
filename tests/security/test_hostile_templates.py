"""A chat template is a program from elsewhere: it can read nothing, run nothing, and not run on."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.data.chat import templates
from stages.data.chat.special import CHATML
from stages.data.chat.templates import Chat, Refused, Spellings, render, render_chats
from stages.data.chat.tokenizer import ChatTokenizer
from stages.data.reading.records import Message
from stages.errors import ModelError

pytestmark = pytest.mark.process

TALK = [Message(role=role, content=f"words {role}") for role in ("system", "user", "assistant", "user")]
FAITHFUL = {
    "chatml": CHATML,
    "tags": "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{{ eos_token }}"
    "{% endfor %}",
    "controls": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.content }}"
    "{% if loop.index > 2 %}{% break %}{% endif %}\n{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{% set x = m.role %}{{ x }}<eos>\n"
    "{% endgeneration %}{{ x }}{% endfor %}",
    "whitespace": "  {% if tools %}\n tools\n  {% endif %}\n{%- for m in messages -%}\n {{ m.content }}\n"
    "{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ '<é>' | tojson }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}",
    "macro": "{% macro turn(m) %}<{{ m['role'] }}>{{ m['content'] }}{% endmacro %}{{ turn(messages[0]) }}",
    "defined": "{% if add_generation_prompt is defined %}{{ add_generation_prompt }}{% endif %}"
    "{% if documents is not none %}b{% endif %}{{ strftime_now is defined }}",
}


@pytest.mark.parametrize("name", FAITHFUL)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_a_template_writes_here_what_it_writes_in_transformers(
    tied_model_dir: Path, name: str, add_generation_prompt: bool
):
    tokenizer = ChatTokenizer.load(tied_model_dir).tokenizer
    messages = [{"role": message.role, "content": message.content} for message in TALK]
    variables = {
        "messages": messages,
        "tools": None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        **tokenizer.special_tokens_map,
    }
    assert render(FAITHFUL[name], variables) == tokenizer.apply_chat_template(
        messages,
        chat_template=FAITHFUL[name],
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )


def test_a_template_has_no_clock_and_no_chance():
    """Else a run resumed tomorrow trains on other tokens, and PPO asks otherwise than sft trained."""
    assert render("{{ strftime_now('%d %b %Y %H:%M:%S.%f') }}", {}) == "26 Jul 2024 00:00:00.000000"
    by_chance = "{{ range(10 ** 5) | random }} {{ lipsum() }}"
    assert render(by_chance, {}) == render(by_chance, {})


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('touch PWNED').read() }}",
    "{{ self.__init__.__globals__.__builtins__.open('PWNED', 'w') }}",
    "{{ lipsum.__globals__['os'].system('touch PWNED') }}",
    "{{ namespace.__init__.__globals__.os.environ }}",
    "{{ (''|attr('__class__')).__mro__ }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ ('{0.__class__.__init__.__globals__}' | attr('format'))('').x }}",
    "{{ raise_exception.__globals__['json'].codecs.open('PWNED', 'w') }}",
    "{{ strftime_now.__globals__['sys'].modules['os'].system('touch PWNED') }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='system') }}",
    "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as p %}{{ p }}",
    "{% extends '/etc/passwd' %}",
    "{% from 'os' import system %}{{ system('touch PWNED') }}",
]
BOMBS = {
    "endless loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a huge range": "{{ range(10 ** 12) | list }}",
    "a huge text": "{{ 'x' * 10 ** 11 }}",
    "a huge number": "{{ 7 ** (10 ** 9) }}",
    "doubling": "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a wide column": "{{ 'x'.center(10 ** 11) }}{{ '%99999999999d' % 1 }}",
    "indentation": "{{ 'x\ny' | indent(10 ** 11) }}",
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "recursive loop": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "deep source": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "deep blocks": "{% if 1 %}" * 5_000,
    "a long output": "{% for a in range(9999) %}{% for b in range(999) %}xxxxxxxx{% endfor %}{% endfor %}",
    "a slow pattern": "{{ ('a' * 30000) | replace('', 'b' * 30000) | length }}",
}
BROKEN = {
    "syntax": "{% for %}",
    "division": "{{ 1 / 0 }}",
    "key": "{{ messages[99].role.x }}",
    "type": "{{ 1 + 'a' }}",
    "filter": "{{ 1 | nothing }}",
    "half a surrogate pair": "{{ '\\ud800' }}",
    "half a surrogate pair in its source": "{# \ud800 #}",
    "its own words": "{{ raise_exception('no \x1b[2J\nsystem role') }}",
}


@pytest.fixture
def refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """The one line in which rendering a template ends."""
    monkeypatch.chdir(tmp_path)

    def refused(template: str) -> str:
        started = time.process_time()
        with pytest.raises(ModelError) as error:
            render(template, {"messages": [{"role": "user", "content": "x"}]})
        assert time.process_time() - started < 1  # whatever it cost, it cost another process
        assert not list(tmp_path.iterdir())
        assert len(str(error.value)) <= 300
        return str(error.value)

    return refused


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_cannot_leave_its_sandbox(refusal: Callable[[str], str], template: str):
    line = refusal(template)
    assert "Error" in line or "unsafe" in line


@pytest.mark.parametrize(
    "reach",
    ["_real", "_cut", "split.__globals__", "split.__func__", "__class__", "__new__", "replace.__code__"],
)
def test_hidden_content_opens_no_way_out_either(reach: str):
    """Stand-in texts are objects of ours, with methods of ours."""
    chat = Chat(messages=[{"role": "user", "content": "<x>"}], tools=None, cuts=[(1, False)])
    for template in (f"{{{{ messages[0].content.{reach} }}}}", f"{{{{ messages[0].content['{reach}'] }}}}"):
        (found,) = render_chats(template, {}, [chat], Spellings(signs="<>"))
        if isinstance(found, Refused):
            assert "unsafe" in found.words
        else:
            assert found.texts == ("",)


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_would_take_all_time_or_memory_is_ended(refusal: Callable[[str], str], name: str):
    assert refusal(BOMBS[name])
    assert render("{{ 1 }}", {}) == "1"  # the next one is not worse off


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_template_is_an_error_of_the_model(refusal: Callable[[str], str], name: str):
    assert refusal(BROKEN[name])


def test_a_template_sees_no_environment_and_its_process_has_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "planted-secret")
    templates._renderer._process = None
    assert render("{{ HF_TOKEN }}|{{ environ }}", {}) == "|"
    process = templates._renderer._process
    assert process is not None
    environment = Path(f"/proc/{process.pid}/environ").read_bytes()
    assert b"PYTHONPATH" in environment and b"planted-secret" not in environment


def test_the_process_ends_by_itself_and_is_started_again_when_needed():
    assert render("{{ 1 }}", {}) == "1"
    first = templates._renderer._process
    assert first is not None
    first.wait(timeout=60)
    assert render("{{ 2 }}", {}) == "2"
    assert templates._renderer._process is not first


def test_a_killed_process_is_one_line_and_the_next_rendering_works():
    render("{{ 1 }}", {})
    process = templates._renderer._process
    assert process is not None
    os.kill(process.pid, 9)
    process.wait()
    assert render("{{ 2 }}", {}) == "2"


def test_a_hostile_template_of_a_model_is_named_with_the_roles_it_failed_on(tied_model_dir: Path):
    tokenizer = ChatTokenizer.load(tied_model_dir).tokenizer
    with pytest.raises(ModelError, match=r"the chat template fails on the roles user, assistant: .*CPU"):
        ChatTokenizer(tokenizer, template=BOMBS["endless loops"])
