"""Headers: what stands before turns is found in any template, and nothing else is taken for it."""

import pytest

from stages.data.chat.headers import headers_of
from stages.data.chat.special import CHATML
from stages.data.chat.template_marks import Headers

ENDS = {"bos_token": "<s>", "eos_token": "</s>"}
VICUNA = (
    "A chat between two. {% for m in messages %}{{ {'user': 'USER: ', 'assistant': 'ASSISTANT: '}[m.role] }}"
    "{{ m.content }}{{ ' ' if m.role == 'user' else eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
THINKING = (
    "{% for m in messages %}[|{{ m.role }}|]\n"
    "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}[|end|]\n{% endfor %}{% if add_generation_prompt %}[|assistant|]\n<think>\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (CHATML, ("<|im_start|>user", "<|im_start|>assistant")),
        (VICUNA, ("USER:", "ASSISTANT:")),
        (THINKING, ("[|user|]", "[|assistant|]")),
        ("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}", ("", "")),
        ("{% for m in messages %}> {{ m.content }}\n{% endfor %}", ("", "")),
        ("{{ raise_exception('Not so') }}", None),
        ("{% for m in messages %}", None),
    ],
)
def test_headers_are_what_both_turns_of_a_side_begin_with(template, found):
    expected = () if found is None else (Headers(user=found[0], assistant=found[1]),)
    assert headers_of(template, ENDS) == expected
