"""Chat: messages -> token ids and a training mask, through the model's own template.

    messages --template, content replaced by placeholders--> marker | content | marker | ...
             --joined to prompt | answer | prompt | ..., each tokenised behind the one before--> ids, mask

Markers may become special tokens; message content never does, whatever it spells. The mask covers what the
assistant has to produce: its content and the end-of-turn token. The ids are the tokenizer's own for the whole
text, but an answer always begins with a token of its own: a prompt is given to the model without the answer.
Owns tokenizer, template, stop tokens and truncation. Does not own batches, how a template is run (templates),
nor what a tokenizer finds in a text (encoders).
"""

import json
import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby, product
from pathlib import Path
from typing import Any, Literal

import numpy as np
from blake3 import blake3
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from stages.data.encoders import TextEncoder, any_of
from stages.data.records import Message, Role
from stages.data.templates import render as render_template
from stages.errors import ModelError

END_OF_TEXT, IM_START, IM_END, PAD = SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|pad|>",
)
"""Special tokens of the tokenizers that prepare trains, in id order."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

MAX_TEMPLATE_BYTES = 2**20

_logger = logging.getLogger(__name__)
_PAD = "\x0c"  # white space that no template writes: where it is gone, the template trimmed the content
_PLACEHOLDER = re.compile(rf"({_PAD}?)zqContent([0-9]{{1,9}})Xqz({_PAD}?)")


def _placeholder(index: int) -> str:
    """Stands for a message's content. Letters and digits: survives escaping and JSON filters."""
    return f"{_PAD}zqContent{index}Xqz{_PAD}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """Token ids of a conversation, and which are trained: assistant content and end-of-turn tokens."""

    ids: tuple[int, ...]
    mask: tuple[bool, ...]  # True: a token the assistant has to produce


@dataclass(frozen=True, slots=True, kw_only=True)
class PairIds:
    """A preference pair as token ids; both responses follow the same prompt ids."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """A part of a rendered conversation: template text, or the place of a message's content."""

    text: str = ""
    message: int | None = None  # index of the message whose content stands here
    trim_left: bool = False
    trim_right: bool = False
    trained: bool = False


class ChatTokenizer:
    """A Hugging Face tokenizer together with the template its model is trained and served with."""

    tokenizer: PreTrainedTokenizerFast
    template: str  # Jinja source in use
    template_source: Literal["file", "tokenizer", "chatml"]
    warning: str | None  # one loud line when ChatML had to be assumed; also logged
    vocab_size: int  # the highest id plus one: ids may have gaps
    end_of_turn_id: int  # the token the template writes after an assistant turn
    stop_token_ids: tuple[int, ...]  # sorted union of generation config, tokenizer and template
    separator_id: int  # stands between documents

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        template: str | None = None,
        stop_token_ids: Sequence[int] = (),
    ) -> None:
        """`template`: Jinja source that wins over the tokenizer's own; `stop_token_ids`: further stop tokens.

        Raises ModelError when the template is broken or ends no assistant turn with a token of its own.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                "the model's tokenizer has no tokenizer.json (a fast tokenizer); convert it once"
            )
        self.tokenizer = tokenizer
        self.template, self.template_source, self.warning = _choose_template(tokenizer, template)
        tokenizer.chat_template = self.template
        if self.warning:
            _logger.warning(self.warning)
        self.separator_id = document_separator_id(tokenizer)
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self._bos_id: int | None = tokenizer.bos_token_id
        # The tokenizer itself puts BOS before plain text; most templates then write it, a few forget to.
        self._adds_bos = self._bos_id is not None and tokenizer("x")["input_ids"][:1] == [self._bos_id]
        self._pieces_cache: dict[tuple[tuple[str, ...], bool], list[_Piece]] = {}
        self._marker_cache: dict[str, str] = {}
        self._end_of_turn, self.end_of_turn_id = self._find_end_of_turn()
        self._lead = self._find_lead()
        meant = {self.separator_id, self.end_of_turn_id, *tokenizer.all_special_ids, *stop_token_ids}
        inert = {
            index
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special or index in meant or self._spells(token.content)
        }
        self._encoder = TextEncoder(tokenizer.backend_tokenizer.to_str(), inert)
        self._check_ids()
        stops = {*stop_token_ids, self.end_of_turn_id, tokenizer.eos_token_id}
        self.stop_token_ids = tuple(sorted(token for token in stops if token is not None))

    @classmethod
    def load(
        cls, directory: Path | str, template: Path | None = None, *, revision: str | None = None
    ) -> "ChatTokenizer":
        """From a model directory, with the stop tokens of its generation config, or a hub id.

        Raises ModelError.
        """
        from transformers import AutoTokenizer  # brings in torch, 270 MB in each process that does without

        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(
                str(directory), revision=revision or "main", trust_remote_code=False
            )
        except MemoryError:  # the machine's fault, not the tokenizer's
            raise
        except Exception as error:  # tokenizers has no errors of its own, and a broken file brings up any
            reason = str(error).strip().partition("\n")[0]
            raise ModelError(f"{directory}: no tokenizer that can be loaded ({reason})") from error
        source = None if template is None else read_template(template)
        stops = _configured_stops(Path(directory))
        try:
            return cls(tokenizer, template=source, stop_token_ids=stops)
        except ModelError as error:
            raise ModelError(f"{directory}: {error}") from error

    @property
    def pad_token_id(self) -> int | None:
        """A token to pad with: no stop token, not BOS, in no rendered text. The tokenizer's own if possible.

        Many tokenizers pad with EOS; a model that looks for the last token that is not padding then reads the
        wrong one, and one whose embedding has a row for padding never trains EOS. None where every special
        token has a meaning (GPT-2 has one, which ends everything): nothing is padded here, and who pads for
        such a model chooses a token then.
        """
        written = {*self.prompt_ids((_QUESTION, _ANSWER, _QUESTION)), self._bos_id, *self.stop_token_ids}
        special = sorted(i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special)
        for token in (self.tokenizer.pad_token_id, self.tokenizer.unk_token_id, *special):
            if token is not None and token not in written:
                return int(token)
        return None

    def highest_id(self, *, documents: bool) -> int:
        """The highest id that may occur in a row: what the embedding of a model needs a row for. `documents`:
        in plain text too, which the separator stands between or ahead of.

        From content comes the vocabulary and every added token that is no special one; special ones come from
        the template, as BOS, and behind answers. One that nothing writes does not count.
        """
        added = self.tokenizer.added_tokens_decoder
        content = {
            *self.tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False).values(),
            *added,
        } - self._encoder.inert
        written = {*self._written_ids(), self.end_of_turn_id, *([self.separator_id] if documents else [])}
        return max(content | written)

    def _spells(self, token: str) -> bool:
        """Whether the template's source has the text of an added token in it, which then means something.

        White space means nothing (runs of it are tokens in GPT-NeoX, Phi and CodeGen): there it is layout.
        """
        return bool(token.strip()) and token in self.template

    def _written_ids(self) -> set[int]:
        """Of the special tokens that the template spells, and of all that it writes around known roles."""
        added = self.tokenizer.added_tokens_decoder
        ids = {id_ for id_, token in added.items() if self._spells(token.content)}
        for roles in _CONVERSATIONS:
            with suppress(ModelError):  # no template takes all roles
                for piece in self._template_pieces(roles, add_generation_prompt=True):
                    ids.update(self._encoder.encode([self._encoder.named(piece.text)])[0])
        return ids | ({self._bos_id} if self._adds_bos and self._bos_id is not None else set())

    def render(self, messages: Sequence[Message]) -> Rendered:
        """Ids and mask of a conversation that ends with the assistant, up to its last end-of-turn token.

        The ids are exactly `prompt_ids(messages[:-1]) + response_ids(messages[-1].content)`. BOS stands there
        once, if the model has one. Raises ModelError when the template refuses the messages.
        """
        assert messages and messages[-1].role == "assistant", (
            "a conversation to train on ends with the assistant"
        )
        return self._encode(self._conversation_pieces(tuple(message.role for message in messages)), messages)

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Ids up to the place where the assistant starts to write."""
        return self._encode(self._prompt_pieces(tuple(message.role for message in messages)), messages).ids

    def response_ids(self, text: str) -> tuple[int, ...]:
        """Ids of an assistant's answer, its end-of-turn token included."""
        answered = (_QUESTION, Message(role="assistant", content=text))
        return self.render(answered).ids[len(self.prompt_ids(answered[:1])) :]

    def render_pair(
        self, prompt: Sequence[Message], chosen: Sequence[Message], rejected: Sequence[Message]
    ) -> PairIds:
        """Prompt ids and the ids of both continuations, end-of-turn token included."""
        prompt_ids = self.prompt_ids(prompt)
        sides = [self.render((*prompt, *side)).ids for side in (chosen, rejected)]
        if any(ids[: len(prompt_ids)] != prompt_ids for ids in sides):
            raise ModelError(
                "the chat template writes a prompt differently once more turns follow; pairs need it fixed"
            )
        return PairIds(
            prompt=prompt_ids, chosen=sides[0][len(prompt_ids) :], rejected=sides[1][len(prompt_ids) :]
        )

    def text_ids(self, text: str) -> tuple[int, ...]:
        """Ids of plain text: no special token comes out of it, none is added."""
        return tuple(self._encoder.text_ids(text))

    def documents_ids(self, texts: Sequence[str], dtype: np.dtype) -> list[np.ndarray]:
        """`text_ids` of many texts at once, on all cores, as arrays of `dtype`."""
        return self._encoder.documents_ids(texts, dtype)

    @property
    def content_spec(self) -> str:
        """What `content_encoder` makes the encoder of plain text of again, in another process."""
        return self._encoder.spec

    def continuation_ids(self, text: str) -> tuple[int, ...]:
        """Ids for a base model to continue: BOS (or the document separator), then the text."""
        return (
            self._bos_id if self._adds_bos and self._bos_id is not None else self.separator_id,
            *self.text_ids(text),
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids with which a text begins, special tokens left out."""
        return str(
            self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def continued_text(self, ids: Sequence[int]) -> str:
        """Text of ids that go on with a text: a space that they begin with is kept, as `decode` may not."""
        before = self.text_ids("x")
        whole, start = self.decode((*before, *ids)), self.decode(before)
        return whole[len(start) :] if whole.startswith(start) else self.decode(ids)

    def response_text(self, ids: Sequence[int]) -> str:
        """What the assistant says: `response_ids` the other way, but for special tokens, which are left out.

        The space that a template or tokenizer puts before every answer is no part of it.
        """
        return self.continued_text(ids).removeprefix(self._before_answer)

    @cached_property
    def _before_answer(self) -> str:
        """What decoded response ids begin with, before the answer itself."""
        prompt = self._stretches(self._prompt_pieces(("user",)), (_QUESTION,))
        ids = self._encoder.encode([text for _, text in prompt] + [self._lead + _ANSWER.content])[-1]
        return self.continued_text(ids).partition(_ANSWER.content)[0]

    def lint(self, rendered: Rendered) -> list[str]:
        """What is wrong with a rendered conversation: BOS not once, a turn without one trained end token."""
        problems = []
        probe = self.prompt_ids((_QUESTION, _ANSWER, _QUESTION))
        is_mere_end = self._bos_id == self.tokenizer.eos_token_id and not self._adds_bos  # as in GPT-2
        if self._bos_id in probe and not is_mere_end:
            doubled = rendered.ids[:2] == (self._bos_id, self._bos_id)
            opens_turns = probe.count(self._bos_id) > 1  # SmolLM2: <|im_start|> is BOS too
            if (
                rendered.ids[0] != self._bos_id
                or doubled
                or (not opens_turns and rendered.ids.count(self._bos_id) > 1)
            ):
                problems.append(
                    f"BOS occurs {rendered.ids.count(self._bos_id)} times, expected once, at the start"
                )
        runs = _trained_runs(rendered)
        if not runs:
            problems.append("no token is trained")
        for run in runs:
            ends = run.count(self.end_of_turn_id)
            if ends != 1 or run[-1] != self.end_of_turn_id:
                problems.append(f"an assistant turn has {ends} trained end tokens, expected one, at its end")
        return problems

    def save(self, directory: Path) -> None:
        """Write the tokenizer with the template in use, as save_pretrained does."""
        self.tokenizer.save_pretrained(directory)

    def _encode(self, pieces: Sequence[_Piece], messages: Sequence[Message]) -> Rendered:
        ids: list[int] = []
        mask: list[bool] = []
        stretches = self._stretches(pieces, messages)
        found = self._encoder.encode([text for _, text in stretches])
        for (trained, _), tokens in zip(stretches, found, strict=True):
            ids += tokens
            mask += [trained] * len(tokens)
        if lacking := self._lacking_bos(ids):
            ids, mask = [*lacking, *ids], [False, *mask]
        return Rendered(ids=tuple(ids), mask=tuple(mask))

    def _lacking_bos(self, ids: Sequence[int]) -> list[int]:
        """What the tokenizer puts before plain text and the template forgot: BOS, or nothing."""
        forgotten = self._adds_bos and list(ids[:1]) != [self._bos_id]
        return [self._bos_id] if forgotten and self._bos_id is not None else []

    def _stretches(self, pieces: Sequence[_Piece], messages: Sequence[Message]) -> list[tuple[bool, str]]:
        """(trained, text) in turn: what the assistant is given, what it answers."""
        return [
            (trained, "".join(self._text_of(piece, messages) for piece in run))
            for trained, run in groupby(pieces, key=lambda piece: piece.trained)
        ]

    def _text_of(self, piece: _Piece, messages: Sequence[Message]) -> str:
        """As the encoder reads it: special tokens of the template under their names, content as it is."""
        if piece.message is None:
            if piece.text not in self._marker_cache:
                self._marker_cache[piece.text] = self._encoder.named(piece.text)
            return self._marker_cache[piece.text]
        return _content_of(piece, messages)

    def _prompt_pieces(self, roles: tuple[str, ...]) -> list[_Piece]:
        """A prompt, its earlier assistant turns cut at the same places as in a conversation."""
        key = (roles, True)
        if key not in self._pieces_cache:
            self._pieces_cache[key] = self._cut_turns(
                self._template_pieces(roles, add_generation_prompt=True), roles
            )
        return self._pieces_cache[key]

    def _conversation_pieces(self, roles: tuple[str, ...]) -> list[_Piece]:
        """The prompt's pieces, then what the assistant adds, to the end of its turn: all of that is trained.

        Some templates write something between the end of a prompt and the answer (Llama 2: a space). The
        assistant has to produce that too, so it is trained.
        """
        key = (roles, False)
        if key in self._pieces_cache:
            return self._pieces_cache[key]
        prompt = self._prompt_pieces(roles[:-1])
        pieces = self._cut_turns(self._template_pieces(roles, add_generation_prompt=False), roles)
        last = max(index for index, piece in enumerate(pieces) if piece.message == len(roles) - 1)
        ahead = pieces[:last]
        shared = len(prompt) - (prompt[-1].message is None)
        opening = "".join(piece.text for piece in ahead[shared:])  # between last prompt message and answer
        if ahead[:shared] != prompt[:shared] or not opening.startswith(prompt[-1].text):
            raise ModelError(
                "the chat template opens a known answer with other text than its generation prompt"
            )
        lead = opening[len(prompt[-1].text) :]
        answer = [_Piece(text=lead, trained=True), *pieces[last : last + 2]]
        self._pieces_cache[key] = prompt + [
            piece for piece in answer if piece.message is not None or piece.text
        ]
        return self._pieces_cache[key]

    def _cut_turns(self, pieces: list[_Piece], roles: tuple[str, ...]) -> list[_Piece]:
        """Cut template text after an answer behind its end-of-turn token; what is before it is trained."""
        cut: list[_Piece] = []
        answering = False
        for piece in pieces:
            if piece.message is not None:
                if answering:
                    raise ModelError(
                        "the chat template writes nothing between an answer and the next message"
                    )
                answering = roles[piece.message] == "assistant"
                if answering:
                    cut += self._cut_lead(cut)
                cut.append(replace(piece, trained=answering))
            elif answering:
                before, end, after = piece.text.partition(self._end_of_turn)
                if not end or before.strip():
                    raise ModelError(
                        f"the chat template does not end every assistant turn with {self._end_of_turn}"
                    )
                cut += [_Piece(text=before + end, trained=True), _Piece(text=after)]
                answering = False
            else:
                cut.append(piece)
        return [piece for piece in cut if piece.message is not None or piece.text]

    def _cut_lead(self, pieces: list[_Piece]) -> list[_Piece]:
        """Take what an answer begins with from the end of `pieces`."""
        if not self._lead or not pieces or pieces[-1].trained or not pieces[-1].text.endswith(self._lead):
            return []
        pieces[-1] = replace(pieces[-1], text=pieces[-1].text.removesuffix(self._lead))
        return [_Piece(text=self._lead, trained=True)]

    def _template_pieces(self, roles: tuple[str, ...], *, add_generation_prompt: bool) -> list[_Piece]:
        """Run the template with placeholders for contents and cut its output at them."""
        messages = [{"role": role, "content": _placeholder(index)} for index, role in enumerate(roles)]
        variables = {
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self.tokenizer.special_tokens_map,
        }
        try:
            text = render_template(self.template, variables)
        except ModelError as error:
            raise ModelError(f"the chat template fails on the roles {_in_short(roles)}: {error}") from error
        pieces: list[_Piece] = []
        at = 0
        for found in _PLACEHOLDER.finditer(text):
            left, digits, right = found.groups()
            index = int(digits)
            if index >= len(roles):  # no placeholder: the template's own text
                continue
            pieces += [
                _Piece(text=text[at : found.start()]),
                _Piece(message=index, trim_left=not left, trim_right=not right),
            ]
            at = found.end()
        pieces.append(_Piece(text=text[at:]))
        left_out = set(range(len(roles))) - {piece.message for piece in pieces}
        if left_out:
            raise ModelError(
                f"the chat template leaves out message {min(left_out)}, of role {roles[min(left_out)]}"
            )
        return [piece for piece in pieces if piece.message is not None or piece.text]

    def _find_end_of_turn(self) -> tuple[str, int]:
        """(text, id) of the first added token that the template writes after an assistant's content."""
        pieces = self._template_pieces(("user", "assistant"), add_generation_prompt=False)
        tail = "" if pieces[-1].message is not None else pieces[-1].text
        added = {token.content: index for index, token in self.tokenizer.added_tokens_decoder.items()}
        found = any_of(added).search(tail)
        if found is None or tail[: found.start()].strip():
            raise ModelError(
                "the chat template writes no end-of-turn token after the assistant; set model.chat_template"
            )
        return found[0], added[found[0]]

    def _find_lead(self) -> str:
        """What the template writes between the end of a prompt and every answer (Llama 2: a space)."""
        prompt = self._template_pieces(("user",), add_generation_prompt=True)
        answered = self._template_pieces(("user", "assistant"), add_generation_prompt=False)
        last = max(index for index, piece in enumerate(answered) if piece.message == 1)
        opening, generation = answered[last - 1].text, prompt[-1].text
        return opening.removeprefix(generation) if opening.startswith(generation) else ""

    def _check_ids(self) -> None:
        """Raise ModelError when our ids of a plain conversation are not the tokenizer's own.

        Where the tokenizer has one token for the end of a prompt and the start of an answer, ours differ: the
        model is never given that token.
        """
        prompt, roles = self._prompt_pieces(("user",)), ("user", "assistant")
        whole = self._cut_turns(self._template_pieces(roles, add_generation_prompt=False), roles)
        for said, pieces in product(_SAID, (prompt, whole)):
            messages = (Message(role="user", content=said), Message(role="assistant", content=said))
            runs = (run for _, run in groupby(pieces, key=lambda piece: piece.trained))
            stretches = ["".join(piece.text or _content_of(piece, messages) for piece in run) for run in runs]
            own = self.tokenizer("".join(stretches), add_special_tokens=False)["input_ids"]
            ids = list(self._encode(pieces, messages).ids)
            if ids != self._lacking_bos(own) + own and not self._merges(stretches):
                raise ModelError(
                    "the tokenizer's ids of the chat template's text are not those of its prompt and answer; "
                    "set model.chat_template to one whose prompts end with a special token"
                )

    def _merges(self, stretches: Sequence[str]) -> bool:
        """Whether the tokenizer has a token that begins in one stretch and ends in the next."""
        spec = json.loads(self.tokenizer.backend_tokenizer.to_str())
        plain = {"truncation": None, "padding": None, "post_processor": None}  # the last may move offsets
        encoder = Tokenizer.from_str(json.dumps(spec | plain))
        offsets = encoder.encode("".join(stretches), add_special_tokens=False).offsets
        cuts = list(accumulate(map(len, stretches)))
        return any(start < cut < end for start, end in offsets for cut in cuts)


def _content_of(piece: _Piece, messages: Sequence[Message]) -> str:
    """What a message says, less what the template trims."""
    assert piece.message is not None
    content = messages[piece.message].content
    content = content.lstrip() if piece.trim_left else content
    return content.rstrip() if piece.trim_right else content


def _in_short(roles: Sequence[str]) -> str:
    return ", ".join(roles[:8]) + (f" and {len(roles) - 8} more" if len(roles) > 8 else "")


_SAID = ("x 1 x", "\n\nx  1\n    x\t\tx")
"""Contents by which our ids are held against the tokenizer's: the second with runs of white space."""
_QUESTION, _ANSWER = Message(role="user", content="x"), Message(role="assistant", content="x")
_CONVERSATIONS: tuple[tuple[Role, ...], ...] = (
    ("user", "assistant", "user"),
    ("system", "user"),
    ("user", "assistant", "tool"),
)
"""In which every role occurs that a message may have."""


def _trained_runs(rendered: Rendered) -> list[list[int]]:
    """The trained tokens of each assistant turn."""
    pairs = zip(rendered.ids, rendered.mask, strict=True)
    return [
        [token for token, _ in run] for trained, run in groupby(pairs, key=lambda pair: pair[1]) if trained
    ]


def _choose_template(
    tokenizer: PreTrainedTokenizerFast, given: str | None
) -> tuple[str, Literal["file", "tokenizer", "chatml"], str | None]:
    if given is not None:
        return given, "file", None
    if isinstance(tokenizer.chat_template, str):
        return tokenizer.chat_template, "tokenizer", None
    if isinstance(tokenizer.chat_template, dict) and "default" in tokenizer.chat_template:
        return tokenizer.chat_template["default"], "tokenizer", None
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


def _configured_stops(directory: Path) -> list[int]:
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


def document_separator_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """`<|endoftext|>` where the vocabulary has it, else EOS."""
    token = tokenizer.backend_tokenizer.token_to_id(END_OF_TEXT)
    token = tokenizer.eos_token_id if token is None else token
    if token is None:
        raise ModelError("the tokenizer has neither <|endoftext|> nor an EOS token to put between documents")
    return int(token)


def truncate(rendered: Rendered, max_tokens: int) -> Rendered | None:
    """Keep the first max_tokens tokens (sft's policy); None when no trained token is left."""
    if not any(rendered.mask[:max_tokens]):
        return None
    return Rendered(ids=rendered.ids[:max_tokens], mask=rendered.mask[:max_tokens])


def truncate_pair(
    prompt_ids: Sequence[int], chosen_ids: Sequence[int], rejected_ids: Sequence[int], max_len: int
) -> PairIds | None:
    """Make prompt + either response fit max_len tokens by cutting the prompt's start, the same for both.

    A response longer than max_len loses its own start: its end, where a reward model reads, is always kept.
    None when what is left of the two is the same: the difference was cut away.
    """
    chosen, rejected = tuple(chosen_ids[-max_len:]), tuple(rejected_ids[-max_len:])
    if chosen == rejected:
        return None
    room = max_len - max(len(chosen), len(rejected))
    prompt = tuple(prompt_ids[max(0, len(prompt_ids) - room) :])
    return PairIds(prompt=prompt, chosen=chosen, rejected=rejected)


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
