"""The vocabulary: trained on any text, in time that grows with its length."""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from stages.data.chat.special import CHATML, SPECIAL_TOKENS
from stages.data.chat.tokenizer import ChatTokenizer
from stages.data.corpus.vocabulary import MAX_WORD_BYTES, TRAINING_WORDS, WORDS, rounded_up, train_tokenizer

ORDINARY = [
    "A cat, a dog and 1234 birds don't mind.\n\n\tIndented  twice   here",
    "日本語の文章。 ü é 🎉👩‍👩‍👧 naïve " + "x" * (MAX_WORD_BYTES - 1),
    "é" * (MAX_WORD_BYTES // 2) + "\n" + " " * (MAX_WORD_BYTES - 1),
] * 3


def test_a_vocabulary_is_filled_up_to_its_multiple_with_reserved_tokens():
    assert [rounded_up(n, 64) for n in (1, 64, 65)] == [64, 64, 128]
    tokenizer = train_tokenizer(["a cat and a dog"], 512, 64)
    reserved = [token for token in tokenizer.get_vocab() if token.startswith("<|reserved_")]
    assert (
        len(tokenizer) == 320
        and reserved
        and set(reserved) <= set(tokenizer.all_special_tokens) | set(reserved)
    )
    forged = ChatTokenizer(tokenizer, template=CHATML).text_ids("<|reserved_0|>")
    assert tokenizer.convert_tokens_to_ids("<|reserved_0|>") not in forged, (
        "text never becomes a special token"
    )


def test_words_are_cut_for_training_where_they_are_longer_than_any_of_a_language():
    for sign, num_bytes in (("x", 1), (" ", 1), ("-", 1), ("日", 3)):
        pieces = TRAINING_WORDS.pre_tokenize_str(sign * 10_000)
        lengths = [len(piece) for piece, _ in pieces]
        assert max(lengths) == MAX_WORD_BYTES and sum(lengths) == 10_000 * num_bytes
    for text in ORDINARY:
        assert TRAINING_WORDS.pre_tokenize_str(text) == WORDS.pre_tokenize_str(text)


def test_a_tokenizer_of_ordinary_text_is_that_of_words_never_cut():
    whole = Tokenizer(models.BPE())
    whole.pre_tokenizer, whole.decoder = WORDS, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    whole.train_from_iterator(ORDINARY, trainer)
    expected = json.loads(whole.to_str())
    found = json.loads(train_tokenizer(ORDINARY, 400, 1).backend_tokenizer.to_str())
    for part in ("model", "pre_tokenizer", "decoder", "added_tokens"):
        assert found[part] == expected[part], part


def test_a_tokenizer_is_trained_on_a_megabyte_of_one_sign():
    tokenizer = train_tokenizer(["x" * 1_000_000], 300, 1)
    longest = max(tokenizer.get_vocab(), key=len)
    ids = tokenizer.encode("x" * (2 * MAX_WORD_BYTES), add_special_tokens=False)
    assert set(longest) == {"x"} and tokenizer.decode(ids) == "x" * (2 * MAX_WORD_BYTES)
