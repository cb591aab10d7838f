"""What a model directory says about chat: its template, its stop tokens, and whether tokenizers are equal."""

import json
from pathlib import Path
from typing import Any, Literal

from blake3 import blake3
from transformers import PreTrainedTokenizerFast

from stages.data.chat.special import CHATML, IM_END
from stages.errors import ModelError

MAX_TEMPLATE_BYTES = 2**20


def choose_template(
    tokenizer: PreTrainedTokenizerFast, given: str | None
) -> tuple[str, Literal["file", "tokenizer", "chatml"], str | None]:
    """(Jinja source, where it is from, one loud line where ChatML has to be assumed). Raises ModelError."""
    if given is not None:
        return given, "file", None
    if isinstance(tokenizer.chat_template, str):
        return tokenizer.chat_template, "tokenizer", None
    if isinstance(tokenizer.chat_template, dict) and tokenizer.chat_template:
        if "default" in tokenizer.chat_template:
            return tokenizer.chat_template["default"], "tokenizer", None
        names = ", ".join(sorted(tokenizer.chat_template))
        raise ModelError(
            f"the tokenizer has only chat templates with names ({names}) and no default; write the one to "
            "train with to a file and set model.chat_template to it"
        )
    warning = "NO CHAT TEMPLATE: the tokenizer has none and model.chat_template is not set; assuming ChatML"
    if tokenizer.backend_tokenizer.token_to_id(IM_END) is not None:
        return CHATML, "chatml", warning
    if tokenizer.eos_token is None:
        raise ModelError(
            "the tokenizer has no chat template, no <|im_end|> and no EOS; set model.chat_template"
        )
    return (
        CHATML.replace(IM_END, tokenizer.eos_token),
        "chatml",
        f"{warning} with {tokenizer.eos_token} as end of turn",
    )


def read_template(path: Path) -> str:
    """A chat template file. Raises ModelError."""
    try:
        with path.open("rb") as file:
            source = file.read(MAX_TEMPLATE_BYTES + 1)
        if len(source) > MAX_TEMPLATE_BYTES:
            raise ModelError(f"model.chat_template: {path}: more than {MAX_TEMPLATE_BYTES >> 20} MiB")
        return source.decode("utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"model.chat_template: cannot read {path}: {error}") from error


def configured_stops(directory: Path) -> list[int]:
    """eos_token_id of generation_config.json and config.json: a number or a list of them."""
    stops: list[int] = []
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        if path.is_file():
            match _read_object(path):
                case {"eos_token_id": int(eos)}:
                    stops.append(eos)
                case {"eos_token_id": [*several]} if all(isinstance(eos, int) for eos in several):
                    stops += several
                case {"eos_token_id": eos} if eos is not None:
                    raise ModelError(f"{path}: eos_token_id is no token id, nor a list of them")
    return stops


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object of a model directory. Raises ModelError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object")
    return value


def tokenizer_digest(directory: Path) -> str:
    """blake3 of what decides ids and rendering: equal iff one model's ids can be handed to the other.

    Covers tokenizer.json, less truncation and padding (settings of a call), and the chat template.
    """
    spec = _read_object(directory / "tokenizer.json")
    spec = {key: value for key, value in spec.items() if key not in ("truncation", "padding")}
    template_file, config_file = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    template = None
    if template_file.is_file():
        template = template_file.read_text(encoding="utf-8", errors="replace")  # loading it tells errors
    elif config_file.is_file():
        template = _read_object(config_file).get("chat_template")
    return blake3(json.dumps([spec, template], sort_keys=True).encode()).hexdigest()
