"""The tokenizer of a model together with the template it is trained and served with.

    messages --forms, template process--> texts --turns--> prompt | answer | prompt | ...
             --each tokenised behind the one before--> ids, mask

Template text may become special tokens. Message content never does, whatever it spells, except that an
assistant may spell the tokens that the template writes or strips inside its turn (`<think>`). The mask covers
what the assistant has to produce: what the template adds to its prompt, up to the end-of-turn token. The ids
are the tokenizer's own for the whole text, but an answer always begins with a token of its own: a prompt is
given to the model without the answer.
Owns tokenizer, template, stop tokens. Does not own batches, how a template is run (templates), where answers
stand (turns), nor what a tokenizer finds in a text (encoders).
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerFast

from stages.data.chat.directories import choose_template, configured_stops, read_template
from stages.data.chat.encoders import TextEncoder, has_joint
from stages.data.chat.frame import CONVERSATIONS, Template, find_frame, spelled_inside
from stages.data.chat.ids import PairIds, Rendered, trained_runs
from stages.data.chat.messages import Talk
from stages.data.chat.rendering import Rendering, attempt, cuts_of_prompt, or_raise
from stages.data.chat.special import document_separator_id
from stages.data.chat.templates import Refused, Written
from stages.data.chat.turns import Stretch, Unfit, cuts_of, examples_of, stretches
from stages.data.reading.records import Message, Messages, Tools
from stages.errors import ModelError

_logger = logging.getLogger(__name__)
R = TypeVar("R")


class ChatTokenizer:
    """A Hugging Face tokenizer together with the template its model is trained and served with.

    Of many conversations at once: `examples`, `prompts`, `pairs`, which say of each that cannot be rendered
    why. Of one: `render`, `prompt_ids`, `render_pair`, which raise ModelError.
    """

    tokenizer: PreTrainedTokenizerFast
    template: str  # Jinja source in use
    template_source: Literal["file", "tokenizer", "chatml"]
    warning: str | None  # one loud line when ChatML had to be assumed
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
        warns: bool = True,
    ) -> None:
        """`template`: Jinja source that wins over the tokenizer's own; `stop_token_ids`: further stop tokens;
        `warns`: whether to log `warning`, which one process of a stage does.

        Raises ModelError when the template is broken, writes no generation prompt where answers have a
        header, or ends no assistant turn with a token of its own.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                "the model's tokenizer has no tokenizer.json (a fast tokenizer); convert it once"
            )
        self.tokenizer = tokenizer
        self.template, self.template_source, self.warning = choose_template(tokenizer, template)
        tokenizer.chat_template = self.template
        if self.warning and warns:
            _logger.warning(self.warning)
        self.separator_id = document_separator_id(tokenizer)
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self._bos_id: int | None = tokenizer.bos_token_id
        # The tokenizer itself puts BOS before plain text; most templates then write it, a few forget to.
        self._adds_bos = self._bos_id is not None and tokenizer("x")["input_ids"][:1] == [self._bos_id]
        self._template = Template(
            source=self.template, variables={"documents": None, **tokenizer.special_tokens_map}
        )
        self._added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
        self._frame = find_frame(self._template, self._added)
        self.end_of_turn_id = self._frame.end_id
        stops = {*stop_token_ids, self.end_of_turn_id, tokenizer.eos_token_id}
        self.stop_token_ids = tuple(sorted(token for token in stops if token is not None))
        self._inside, inert = self._meanings()
        self._encoder = TextEncoder(tokenizer.backend_tokenizer.to_str(), inert)
        self._rendering = Rendering(
            self._template,
            self._frame,
            spelled=[text for text, index in self._added.items() if index in inert],
            inside=self._inside,
            ends=[text for text, index in self._added.items() if index in self.stop_token_ids],
        )
        self._check_ids()

    def _meanings(self) -> tuple[frozenset[str], set[int]]:
        """(texts of the tokens that an answer may spell, ids of those that no other content may become)."""
        tokenizer = self.tokenizer
        named = (
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
            tokenizer.unk_token_id,
        )
        meant = {self.separator_id, *self.stop_token_ids, *(index for index in named if index is not None)}
        inside = spelled_inside(self._template, self._frame, self._added, frozenset(meant))
        inert = {
            index
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special or index in meant or token.content in inside or self._spells(token.content)
        } | set(tokenizer.all_special_ids)
        return inside, inert

    @classmethod
    def load(
        cls,
        directory: Path | str,
        template: Path | None = None,
        *,
        revision: str | None = None,
        warns: bool = True,
    ) -> "ChatTokenizer":
        """From a model directory, with the stop tokens of its generation config, or a hub id. `warns`: as of
        the constructor.

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
        stops = configured_stops(Path(directory))
        try:
            return cls(tokenizer, template=source, stop_token_ids=stops, warns=warns)
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
        spelled = {self._added[text] for text in self._inside}
        written = {*self._asked_again, self._bos_id, *self.stop_token_ids, *spelled}
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
        for roles in CONVERSATIONS:
            with suppress(ModelError):  # no template takes all roles
                for piece in self._template.pieces(roles, is_prompt=True):
                    ids.update(self._encoder.encode([self._encoder.named(piece.text)])[0])
        ids |= {self._added[text] for text in self._inside}
        return ids | ({self._bos_id} if self._adds_bos and self._bos_id is not None else set())

    def examples(self, talks: Sequence[Talk]) -> Iterator[tuple[Rendered, ...] | Refused]:
        """What there is to train on in each conversation: one example, or one per trained answer where the
        template writes an earlier answer differently once more turns follow; none where no turn is trained.

        An example ends with its last trained answer and its end-of-turn token. Its ids are those of the
        prompt that the model is given there and of the answer. BOS stands there once, if the model has one.
        """
        asked = [(talk, cuts_of(talk)) for talk in talks]
        for talk, written in zip(talks, self._rendering.written(asked), strict=True):
            yield attempt(self._examples, talk, written)

    def prompts(self, talks: Sequence[Talk]) -> Iterator[tuple[int, ...] | Refused]:
        """Ids of each conversation up to the place where the assistant starts to write."""
        asked = [(talk, cuts_of_prompt(talk)) for talk in talks]
        for talk, written in zip(talks, self._rendering.written(asked), strict=True):
            yield attempt(self._prompt, talk, written)

    def pairs(self, pairs: Sequence[tuple[Talk, Messages, Messages]]) -> Iterator[PairIds | Refused]:
        """Of each (prompt, chosen, rejected): prompt ids and the ids of both continuations, end-of-turn token
        included. Refused where the template writes the prompt differently once more turns follow.
        """
        sides = [
            Talk(messages=(*prompt.messages, *side), tools=prompt.tools)
            for prompt, chosen, rejected in pairs
            for side in (chosen, rejected)
        ]
        found = zip(sides, self._rendering.written([(side, cuts_of(side)) for side in sides]), strict=True)
        for prompt, _, _ in pairs:
            of_side = partial(self._side, start=len(prompt.messages))
            chosen, rejected = (attempt(of_side, *next(found)) for _ in range(2))
            if isinstance(chosen, Refused):
                yield chosen
            elif isinstance(rejected, Refused):
                yield rejected
            else:
                yield PairIds(prompt=chosen[0], chosen=chosen[1], rejected=rejected[1])

    def refusals(self, talks: Sequence[Talk]) -> Iterator[Refused | None]:
        """Why the template does not render each conversation, or prompt; no ids are made."""
        asked = [(talk, cuts_of(talk) if talk.is_answered else cuts_of_prompt(talk)) for talk in talks]
        for talk, written in zip(talks, self._rendering.written(asked), strict=True):
            since = 0 if talk.is_answered else len(talk.messages)
            made = attempt(partial(self._rendering.turns, since=since), talk, written)
            yield made if isinstance(made, Refused) else None

    def render(self, messages: Sequence[Message], tools: Tools = ()) -> Rendered:
        """The last example of a conversation that ends with the assistant: see `examples`.

        The ids are exactly those of `prompt_ids(messages[:-1], tools)` and of the answer behind them. Raises
        ModelError when the template refuses the messages.
        """
        assert messages and messages[-1].role == "assistant", (
            "a conversation to train on ends with the assistant"
        )
        (found,) = self.examples([Talk(messages=messages, tools=tools)])
        return or_raise(found)[-1]

    def prompt_ids(self, messages: Sequence[Message], tools: Tools = ()) -> tuple[int, ...]:
        """Ids up to the place where the assistant starts to write. Raises ModelError."""
        (found,) = self.prompts([Talk(messages=messages, tools=tools)])
        return or_raise(found)

    def response_ids(self, text: str) -> tuple[int, ...]:
        """Ids of an assistant's answer, its end-of-turn token included.

        Where prompts open the answer (`<think>`) and the text does not, it is taken as what goes on behind
        that.
        """
        asked = Talk(messages=(_QUESTION, Message(role="assistant", content=text)))
        (found,) = self.examples([asked])
        if isinstance(found, Refused) and self._frame.opens_a_block:
            return tuple(
                self._encoder.encode([self._question, text + self._encoder.named(self._frame.tail)])[-1]
            )
        return or_raise(found)[-1].ids[len(self.prompt_ids(asked.messages[:1])) :]

    def render_pair(
        self, prompt: Sequence[Message], chosen: Messages, rejected: Messages, tools: Tools = ()
    ) -> PairIds:
        """Prompt ids and the ids of both continuations, end-of-turn token included. Raises ModelError."""
        (found,) = self.pairs([(Talk(messages=prompt, tools=tools), chosen, rejected)])
        return or_raise(found)

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
        answer = self._encoder.named(self._frame.lead) + _ANSWER.content
        ids = self._encoder.encode([self._question, answer])[-1]
        return self.continued_text(ids).partition(_ANSWER.content)[0]

    def lint(self, rendered: Rendered) -> list[str]:
        """What is wrong with an example: BOS not once, a turn without one trained end token."""
        return [*self._bos_problems(rendered), *self._end_problems(rendered)]

    def _bos_problems(self, rendered: Rendered) -> Iterator[str]:
        probe, number = self._asked_again, rendered.ids.count(self._bos_id)
        is_mere_end = self._bos_id == self.tokenizer.eos_token_id and not self._adds_bos  # as in GPT-2
        if self._bos_id not in probe or is_mere_end:
            return
        is_doubled = rendered.ids[:2] == (self._bos_id, self._bos_id)
        opens_turns = probe.count(self._bos_id) > 1  # SmolLM2: <|im_start|> is BOS too
        if rendered.ids[0] != self._bos_id or is_doubled or (not opens_turns and number > 1):
            yield f"BOS occurs {number} times, expected once, at the start"

    def _end_problems(self, rendered: Rendered) -> Iterator[str]:
        runs = trained_runs(rendered)
        if not runs:
            yield "no token is trained"
        for run in runs:
            ends = run.count(self.end_of_turn_id)
            is_call = not ends and run[-1] in self.stop_token_ids  # which may end otherwise
            if not is_call and (ends != 1 or run[-1] != self.end_of_turn_id):
                yield f"an assistant turn has {ends} trained end tokens, expected one, at its end"

    def save(self, directory: Path) -> None:
        """Write the tokenizer with the template in use, as save_pretrained does."""
        self.tokenizer.save_pretrained(directory)

    def _examples(self, talk: Talk, written: Written) -> tuple[Rendered, ...]:
        turns = self._rendering.turns(talk, written, since=0)
        return tuple(self._encode(example, written.plain) for example in examples_of(turns))

    def _prompt(self, talk: Talk, written: Written) -> tuple[int, ...]:
        turns = self._rendering.turns(talk, written, since=len(talk.messages))
        return self._encode(stretches(written.texts[-1], turns, is_prompt=True), written.plain).ids

    def _side(self, talk: Talk, written: Written, start: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(prompt ids, ids behind them) of a pair's side that begins at message `start`.

        Raises Unfit.
        """
        turns = self._rendering.turns(talk, written, since=start)
        before = [turn for turn in turns if turn.message < start]
        prompt, whole = turns[len(before)].prompt, turns[-1].whole
        prompt_ids = self._encode(stretches(prompt, before), written.plain).ids
        ids = self._encode(stretches(whole, turns), written.plain).ids
        if not whole.startswith(prompt) or ids[: len(prompt_ids)] != prompt_ids:
            raise Unfit(
                "the chat template writes a prompt differently once more turns follow; pairs need it fixed"
            )
        return prompt_ids, ids[len(prompt_ids) :]

    def _encode(self, parts: Sequence[Stretch], plain: Mapping[int, int]) -> Rendered:
        """Ids of a text in parts, of which each begins with a token of its own."""
        ids: list[int] = []
        mask: list[bool] = []
        texts = [self._encoder.named(text) for _, text in parts]
        found = self._encoder.encode([text.translate(plain) for text in texts] if plain else texts)
        for (trained, _), tokens in zip(parts, found, strict=True):
            ids += tokens
            mask += [trained] * len(tokens)
        if lacking := self._lacking_bos(ids):
            ids, mask = [*lacking, *ids], [False, *mask]
        return Rendered(ids=tuple(ids), mask=tuple(mask))

    def _lacking_bos(self, ids: Sequence[int]) -> list[int]:
        """What the tokenizer puts before plain text and the template forgot: BOS, or nothing."""
        forgotten = self._adds_bos and list(ids[:1]) != [self._bos_id]
        return [self._bos_id] if forgotten and self._bos_id is not None else []

    @cached_property
    def _question(self) -> str:
        """The text of a short prompt, as the encoder reads it."""
        talk = Talk(messages=(_QUESTION,))
        (written,) = self._rendering.written([(talk, cuts_of_prompt(talk))])
        if isinstance(written, Refused):
            raise ModelError(written.words)
        return self._encoder.named(written.texts[-1])

    @cached_property
    def _asked_again(self) -> tuple[int, ...]:
        """Ids of the prompt of a second question."""
        return self.prompt_ids((_QUESTION, _ANSWER, _QUESTION))

    def _check_ids(self) -> None:
        """Raise ModelError when our ids of a plain conversation are not the tokenizer's own.

        Where the tokenizer has one token for the end of a prompt and the start of an answer, ours differ: the
        model is never given that token.
        """
        spec = self.tokenizer.backend_tokenizer.to_str()
        for said in _SAID:
            talk = Talk(
                messages=(Message(role="user", content=said), Message(role="assistant", content=said))
            )
            (written,) = self._rendering.written([(talk, cuts_of(talk))])
            if isinstance(written, Refused):
                raise ModelError(written.words)
            turns = self._rendering.turns(talk, written, since=len(talk.messages))
            prompt, whole = written.texts
            for parts in (stretches(prompt, ()), stretches(whole, turns)):
                texts = [text.translate(written.plain) for _, text in parts]
                own = self.tokenizer("".join(texts), add_special_tokens=False)["input_ids"]
                ids = list(self._encode(parts, written.plain).ids)
                if ids != self._lacking_bos(own) + own and not has_joint(spec, texts):
                    raise ModelError(
                        "the tokenizer's ids of the chat template's text are not those of its prompt and "
                        "answer; set model.chat_template to one whose prompts end with a special token"
                    )


_SAID = ("x 1 x", "\n\nx  1\n    x\t\tx")
"""Contents by which our ids are held against the tokenizer's: the second with runs of white space."""
_QUESTION, _ANSWER = Message(role="user", content="x"), Message(role="assistant", content="x")
