"""The special tokens of tokenizers that prepare trains, and the template of models that have none."""

from transformers import PreTrainedTokenizerFast

from stages.errors import ModelError

END_OF_TEXT, IM_START, IM_END, PAD = SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|pad|>",
)
"""In id order."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def document_separator_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """`<|endoftext|>` where the vocabulary has it, else EOS."""
    token = tokenizer.backend_tokenizer.token_to_id(END_OF_TEXT)
    token = tokenizer.eos_token_id if token is None else token
    if token is None:
        raise ModelError("the tokenizer has neither <|endoftext|> nor an EOS token to put between documents")
    return int(token)
