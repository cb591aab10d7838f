"""Template marks: what chat templates write around turns, and people hardly do.

    text, headers of the model's own template --marks_in--> the marks that stand in it

Owns: how a text is known that was templated already. Does not own: what is made of it (observations), how a
template is rendered (chat). Light import.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

_WRITTEN = re.compile(
    r"<\|[^<>|\s]{1,40}\|>"  # <|im_start|>, <|user|>, <|start_header_id|>
    r"|<\uff5c[^<>\uff5c\n]{1,40}\uff5c>"  # DeepSeek's, with wide bars
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]|<</?SYS>>"  # Llama 2, Mistral
    r"|\[\|(?i:human|user|ai|assistant|bot|system|endofturn)\|\]"  # EXAONE, and [|Human|]
    r"|\[UNUSED_TOKEN_\d{1,4}\]|<reserved_\d{1,4}>|<extra_id_\d{1,3}>(?:System|User|Assistant)\b"
    r"|<role>\w{1,20}</role>"  # InternLM, Baichuan, Nemotron, Ling
    r"|<(?:start|end)_of_turn>|</?(?:user|assistant|system|human|bot)>"  # Gemma, and home-made ones
    r"|^### (?:Instruction|Response|Human|Assistant):"  # Alpaca, Guanaco
    r"|\A\s*(?:<s>|<bos>)|(?:</s>|<eos>)\s*\Z",
    re.MULTILINE,
)
_SIGNS = re.compile(r"[^\w\s:.,;-]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Headers:
    """What a chat template writes before what a user says, and before an answer; empty: nothing to know it
    by.
    """

    user: str
    assistant: str

    def in_text(self, text: str) -> set[str]:
        """Those that stand in a text. One in plain words (`USER:`) tells nothing unless the other follows."""
        at = text.find(self.user) if self.user else -1
        if self.assistant and at >= 0 and text.find(self.assistant, at + len(self.user)) >= 0:
            return {self.user, self.assistant}
        return {one for one in (self.user, self.assistant) if _SIGNS.search(one) and one in text}


IN_WORDS = (Headers(user="USER:", assistant="ASSISTANT:"),)
"""Those of templates without signs of their own (Vicuna)."""


def marks_in(text: str, headers: Sequence[Headers] = ()) -> set[str]:
    """The marks of any template in a text; `headers`: those of the model's own."""
    found = {mark.strip() for mark in _WRITTEN.findall(text)}
    return found.union(*(one.in_text(text) for one in (*headers, *IN_WORDS)))
