"""Chat: conversations -> token ids and a training mask, through the model's own template.

    messages, tools --as the template takes them (messages)--> template process --> texts of every beginning
      --where each answer stands (turns)--> prompt | answer | prompt | ... --tokenizer--> ids, mask

`ChatTokenizer` is what stages use.
"""

from stages.data.chat.directories import read_template, tokenizer_digest
from stages.data.chat.ids import PairIds, Rendered, trained_runs, truncate, truncate_pair
from stages.data.chat.messages import Talk
from stages.data.chat.special import (
    CHATML,
    END_OF_TEXT,
    IM_END,
    IM_START,
    PAD,
    SPECIAL_TOKENS,
    document_separator_id,
)
from stages.data.chat.tokenizer import ChatTokenizer

__all__ = [
    "CHATML",
    "END_OF_TEXT",
    "IM_END",
    "IM_START",
    "PAD",
    "SPECIAL_TOKENS",
    "ChatTokenizer",
    "PairIds",
    "Rendered",
    "Talk",
    "document_separator_id",
    "read_template",
    "tokenizer_digest",
    "trained_runs",
    "truncate",
    "truncate_pair",
]
