"""Text -> token ids: the tokenizer's own, but only the template's special tokens are special in it.

    template text | content | template text     special tokens of the template under random names
             --joined--> one text --tokenizer--> ids, the names' ids replaced by the real ones

So a token may span template text and content (` hello`), and a tokenizer that puts a space before a text does
it where it would in the whole text. Content never becomes a special token, because it cannot know the names.

Owns: what is special, and how a text goes on behind another. Does not own: templates, masks (chat).
"""

import json
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer

from stages.data.chat.stand_ins import any_of
from stages.errors import ModelError

FLAGS = "single_word", "lstrip", "rstrip", "normalized"


class TextEncoder:
    """Encodes whole texts, and texts of which parts must begin with a token of their own."""

    def __init__(self, spec: str, inert: Collection[int]) -> None:
        """`spec`: a tokenizer.json; `inert`: ids of added tokens that no content may become."""
        self.inert = frozenset(inert)
        name = secrets.token_hex(16)  # in lower case and without signs: no normaliser changes it
        bare = _with_inert(json.loads(spec), inert, name)
        tokens = [token for token in json.loads(spec)["added_tokens"] if token["id"] in inert]
        self._names = {token["content"]: f"{name}x{token['id']}x" for token in tokens}
        self._written = any_of(self._names)
        self._named = re.compile(f"{name}x[0-9]+x")
        self._whole = self._encoder(bare, tokens)
        named_ids = {self._whole.token_to_id(self._names[token["content"]]): token for token in tokens}
        self._real = {named: token["id"] for named, token in named_ids.items()}
        self._tokens = {named: self._names[token["content"]] for named, token in named_ids.items()}
        for token in bare["added_tokens"]:  # those that mean nothing are found in content too
            if self._whole.encode(token["content"], add_special_tokens=False).ids == [token["id"]]:
                self._tokens[token["id"]] = token["content"]
        going_on = _without_prefix(bare)
        self._going_on = self._whole if going_on == bare else self._encoder(going_on, tokens)

    @property
    def spec(self) -> str:
        """What `content_encoder` makes the encoder of `text_ids` of again, in another process."""
        return str(self._whole.to_str())

    def named(self, text: str) -> str:
        """Template text, its special tokens under the names by which `encode` knows them."""
        return self._written.sub(lambda found: self._names[found[0]], text)

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text that stands alone: no special token comes out of it, none is added."""
        ids: list[int] = self._whole.encode(text, add_special_tokens=False).ids
        return ids

    def documents_ids(self, texts: Sequence[str], dtype: np.dtype) -> list[np.ndarray]:
        """`text_ids` of many texts at once, on all cores, as arrays of `dtype`."""
        return documents_ids(self._whole, texts, dtype)

    def encode(self, stretches: Sequence[str]) -> list[list[int]]:
        """Ids of each stretch of one text. A stretch never shares a token with the one before it.

        What a stretch begins with goes on with the text before it: no space is put there, unless that text
        ends with a special token behind which the tokenizer puts one. Raises ModelError when the tokenizer
        does not find a special token that the template writes.
        """
        found: list[list[int]] = []
        last: int | None = None
        for text in stretches:
            ids = self._behind(last, text)
            last = ids[-1] if ids else last
            found.append([self._real.get(token, token) for token in ids])
        return found

    def _behind(self, last: int | None, text: str) -> list[int]:
        """Ids of `text` behind the token `last`, special tokens under their names' ids."""
        if last is None:
            return self._ids(text)
        if last in self._tokens:
            ids = self._ids(self._tokens[last] + text)
            if ids[0] == last:  # not where white space became a longer run, which is another token
                return ids[1:]
        going_on = self._going_on.encode(text, add_special_tokens=False)
        ids = going_on.ids
        at = next((at for at, token in enumerate(ids) if token in self._tokens), None)
        if self._going_on is self._whole or at is None:
            return self._checked(ids, text)
        end = going_on.offsets[at][1]  # what is behind a token is as in every text
        return self._checked(ids[: at + 1], text[:end]) + self._behind(ids[at], text[end:])

    def _ids(self, text: str) -> list[int]:
        return self._checked(self._whole.encode(text, add_special_tokens=False).ids, text)

    def _checked(self, ids: list[int], text: str) -> list[int]:
        names = [name[0] for name in self._named.finditer(text)]
        if names != [self._tokens[token] for token in ids if token in self._real]:
            raise ModelError(
                "the tokenizer does not find all special tokens that the chat template writes; set"
                " normalized and single_word of added_tokens in tokenizer.json to false"
            )
        return ids

    def _encoder(self, spec: dict[str, Any], tokens: Sequence[dict[str, Any]]) -> Tokenizer:
        """`spec` with a name for each of `tokens`, whose ids are above all others."""
        names = [
            AddedToken(self._names[token["content"]], special=False, **{flag: token[flag] for flag in FLAGS})
            for token in tokens
        ]
        encoder = content_encoder(json.dumps(_with_ids_for(spec, [name.content for name in names])))
        encoder.add_tokens(names)
        return encoder


def _with_ids_for(spec: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The tokenizer, ready to give ids above all others to `names`.

    An added token's id is the number of entries, which is taken already where the ids of a vocabulary have
    gaps. There the ids are written into it.
    """
    vocab, added = spec["model"]["vocab"], {token["content"]: token["id"] for token in spec["added_tokens"]}
    if isinstance(vocab, list) or max(vocab.values(), default=-1) < len(vocab):
        return spec
    free = max(*vocab.values(), *added.values()) + 1
    ids = added | {name: free + at for at, name in enumerate(names)}
    return spec | {"model": spec["model"] | {"vocab": vocab | ids}}


def _with_inert(spec: dict[str, Any], inert: Collection[int], name: str) -> dict[str, Any]:
    """The tokenizer without truncation, padding and what it adds to a text, `inert` tokens flagged special.

    `content_encoder` does not look for those. The model may still make one out of text: Unigram, and others
    that look up whole words, find it in their vocabulary. There it gets another name.
    """
    found = _found_in_text(spec["model"])
    names = {}
    for token in spec["added_tokens"]:
        if token["id"] in inert:
            token["special"] = True
            if token["content"] in found:
                names[token["content"]] = token["content"] = f"{name}y{token['id']}y"
    model = spec["model"] | {"vocab": _renamed(spec["model"]["vocab"], names)}
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return spec | {"model": model, "truncation": None, "padding": None, "post_processor": None}


def _found_in_text(model: dict[str, Any]) -> set[str]:
    """Entries of the vocabulary that a text becomes if it spells them, and that may have other names.

    BPE merges its entries out of others, so it finds no special token unless it looks up whole words first;
    then what it merges has to keep its name. So have single signs, which models fall back on.
    """
    vocab = model["vocab"]
    found = {entry[0] for entry in vocab} if isinstance(vocab, list) else set(vocab)
    if model["type"] == "BPE":
        found = found - {"".join(merge) for merge in model["merges"]} if model["ignore_merges"] else set()
    return {entry for entry in found if len(entry) > 1}


def _renamed(vocab: Any, names: Mapping[str, str]) -> Any:
    """Of Unigram, a list of entries with their scores; of others, entries with their ids."""
    if not names:
        return vocab
    if isinstance(vocab, list):
        return [[names.get(entry, entry), score] for entry, score in vocab]
    return {names.get(entry, entry): index for entry, index in vocab.items()}


def _without_prefix(part: Any) -> Any:
    """A tokenizer.json in which nothing puts a space before a text: for text that goes on with another."""
    if isinstance(part, list):
        return [_without_prefix(one) for one in part if not (isinstance(one, dict) and _is_prepend(one))]
    if not isinstance(part, dict):
        return part
    changed = {
        key: None if isinstance(value, dict) and _is_prepend(value) else _without_prefix(value)
        for key, value in part.items()
        if key in ("normalizer", "normalizers", "pre_tokenizer", "pretokenizers")
    }
    changed |= {"prepend_scheme": "never"} if "prepend_scheme" in part else {}
    changed |= {"add_prefix_space": False} if "add_prefix_space" in part else {}
    return part | changed


def _is_prepend(part: dict[str, Any]) -> bool:
    return part.get("type") == "Prepend"


def content_encoder(spec: str) -> Tokenizer:
    """A tokenizer to which special tokens are mere text; the spec itself does not say so."""
    encoder = Tokenizer.from_str(spec)
    encoder.encode_special_tokens = True
    return encoder


def documents_ids(encoder: Tokenizer, texts: Sequence[str], dtype: np.dtype) -> list[np.ndarray]:
    """Ids of many texts at once, on all cores, as arrays of `dtype`."""
    encodings = encoder.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, dtype) for encoding in encodings]


def has_joint(spec: str, texts: Sequence[str]) -> bool:
    """Whether the tokenizer of this tokenizer.json has a token that begins in one of the texts, which follow
    each other, and ends in the next.
    """
    plain = {"truncation": None, "padding": None, "post_processor": None}  # the last may move offsets
    encoder = Tokenizer.from_str(json.dumps(json.loads(spec) | plain))
    offsets = encoder.encode("".join(texts), add_special_tokens=False).offsets
    cuts = list(accumulate(map(len, texts)))
    return any(start < cut < end for start, end in offsets for cut in cuts)
