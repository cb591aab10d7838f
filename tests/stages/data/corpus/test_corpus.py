"""The corpus on its way through prepare: blocks on disk, what all documents decide, and the mixture."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.config.data import DataSource
from stages.config.prepare import PrepareConfig
from stages.data.batches import content_share
from stages.data.corpus import blocks as corpora
from stages.data.corpus.blocks import Corpus, documents, encode_block
from stages.data.corpus.filtering import STEPS, Dropped, Filter, filter_block, normalise
from stages.data.corpus.selection import mixing_weights, select, tokenizer_sample
from stages.data.reading.readers import splits_of
from stages.errors import DataError

TEXTS = [f"document {number} about {'cats' if number % 2 else 'dogs'}" for number in range(40)]


def written(path: Path, texts: list[str]) -> DataSource:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DataSource(path=str(path))


def made(directory: Path, sources: list[DataSource], *, block_bytes: int = 300, **settings: Any):
    """(config, corpus) of the sources, filtered into blocks."""
    config = PrepareConfig(data=sources, **settings)
    directory.mkdir()
    parts = [(at, split) for at, source in enumerate(sources) for split in splits_of(source, block_bytes)]
    keeps = Filter(config, ())
    reports = [
        filter_block(directory, number, split, sources[at], config, keeps)
        for number, (at, split) in enumerate(parts)
    ]
    return config, Corpus(directory, [report.num_kept for report in reports], [at for at, _ in parts])


def test_a_corpus_gives_back_every_document_by_number_and_by_block(tmp_path):
    _, corpus = made(tmp_path / "blocks", [written(tmp_path / "a.jsonl", ["héllo", "", "日本 🎉", *TEXTS])])
    kept = ["héllo", "日本 🎉", *TEXTS]  # the empty one is too short
    assert corpus.num_blocks > 3 and len(corpus) == len(kept)
    assert [corpus.text(number) for number in range(len(kept))] == kept
    assert [text for block in range(corpus.num_blocks) for text in corpus.texts(block)] == kept
    assert corpus.chars.tolist() == [len(text) for text in kept]
    assert corpus.shares.tolist() == pytest.approx([content_share(text) for text in kept], abs=1e-15)


def test_the_first_of_equal_documents_stays_whatever_block_it_is_in(tmp_path):
    texts = [*TEXTS, TEXTS[3], "new", TEXTS[0]]
    config, corpus = made(tmp_path / "blocks", [written(tmp_path / "a.jsonl", texts)], heldout_frac=1e-9)
    selection = select(corpus, config, 0)
    kept = sorted([*selection.train.tolist(), *selection.heldout.tolist()])
    assert kept == [*range(40), 41] and selection.num_kept == 41
    assert selection.dropped["duplicate"].examples == [["same text", TEXTS[3]], ["same text", TEXTS[0]]]
    config, corpus = made(tmp_path / "all", [written(tmp_path / "a.jsonl", texts)], exact_dedup=False)
    assert select(corpus, config, 0).num_kept == 43


def test_a_near_copy_is_dropped_and_counted(tmp_path):
    words = [f"word{number}" for number in range(60)]
    texts = [" ".join(words), *TEXTS, " ".join([*words, "more"])]
    source = written(tmp_path / "a.jsonl", texts)
    config, corpus = made(tmp_path / "blocks", [source], near_dedup={"jaccard": 0.8}, heldout_frac=1e-9)
    selection = select(corpus, config, 0)
    assert selection.dropped["near_duplicate"].total == 1 and selection.num_kept == 41
    assert selection.dropped["near_duplicate"].examples[0][1].startswith("word0 word1")


def test_white_space_that_the_normal_form_makes_is_no_part_of_a_document():
    assert normalise("\u00a8 a text", "NFKC") == "\u0308 a text"


def test_a_document_of_which_c4_leaves_too_little_is_too_short(tmp_path):
    sentences = [f"This is sentence {number} of a longer page." for number in range(5)]
    menu = ["home", "about us", "contact", "a longer entry of the menu, without a full stop"]
    texts = ["short", "\n".join([*menu, *sentences]), "\n".join([*sentences, *sentences]), "small"]
    config = PrepareConfig(data=[written(tmp_path / "a.jsonl", texts)], quality=["c4"], min_chars=250)
    dropped = {step: Dropped() for step in STEPS}
    assert Filter(config, ())(texts, dropped) == ["\n".join([*sentences, *sentences])]
    assert dropped["length"].counts == {"too_short": 3} and dropped["quality"].total == 0
    shown = [text for _, text in dropped["length"].examples]
    assert shown == ["short", "\n".join(sentences)[:200], "small"], "in the order of the documents"


def test_whole_blocks_are_taken_up_and_damaged_ones_made_again(tmp_path, monkeypatch):
    source = written(tmp_path / "a.jsonl", TEXTS)
    config = PrepareConfig(data=[source])
    splits = splits_of(source, 10**9)
    (tmp_path / "blocks").mkdir()
    first = filter_block(tmp_path / "blocks", 0, splits[0], source, config, Filter(config, ()))

    def never(texts, dropped):
        raise AssertionError("filtered again")

    assert filter_block(tmp_path / "blocks", 0, splits[0], source, config, never) == first  # type: ignore[arg-type]
    damaged = tmp_path / "blocks" / "000000.text"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"X")
    with pytest.raises(AssertionError, match="filtered again"):
        filter_block(tmp_path / "blocks", 0, splits[0], source, config, never)  # type: ignore[arg-type]


RECORDS = {
    "a changed number": lambda text: text.replace('"num_kept": 40', '"num_kept": 39'),
    "a longer number": lambda text: text.replace('"num_kept": 40', '"num_kept": 400'),
    "cut": lambda text: text[: len(text) // 2],
    "no digest of itself": lambda text: json.dumps({**json.loads(text), "digest": None}),
    "no report": lambda text: '{"files": {}}',
    "files in a list": lambda text: '{"digest": "", "files": [], "report": {}}',
    "a list": lambda text: "[]",
    "null": lambda text: "null",
    "deep": lambda text: "[" * 100_000,
    "half a character": lambda text: "\udcff",
}


@pytest.mark.parametrize("damage", RECORDS.values(), ids=RECORDS)
def test_a_block_whose_record_is_damaged_is_made_again(tmp_path, damage):
    source = written(tmp_path / "a.jsonl", TEXTS)
    config = PrepareConfig(data=[source])
    (split,) = splits_of(source, 10**9)
    keeps = Filter(config, ())
    report = filter_block(tmp_path, 0, split, source, config, keeps)
    record = tmp_path / "000000.filtered.json"
    whole = record.read_text()
    record.write_text(damage(whole), errors="surrogateescape")
    assert record.read_bytes() != whole.encode()
    assert filter_block(tmp_path, 0, split, source, config, keeps) == report
    assert record.read_text() == whole


def test_tokens_come_back_in_the_order_asked_for_and_only_of_wanted_documents(tmp_path):
    _, corpus = made(tmp_path / "blocks", [written(tmp_path / "a.jsonl", TEXTS)])
    wanted = np.arange(len(corpus)) % 3 == 0
    dtype = np.dtype("<u2")

    def encode(texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(dtype) for text in texts]

    for block in range(corpus.num_blocks):
        encode_block(
            corpus,
            block,
            wanted[corpus.starts[block] : corpus.starts[block + 1]],
            encode,
            dtype,
            tokenizer="one",
        )
    which = np.array([0, 3, 39, 0, 6])
    found = [bytes(ids.astype(np.uint8)).decode() for ids in documents(corpus, which, dtype)]
    assert found == [TEXTS[number] for number in which]
    sizes = [
        (tmp_path / "blocks" / f"{block:06d}.tokens").stat().st_size for block in range(corpus.num_blocks)
    ]
    assert sum(sizes) == 2 * sum(len(TEXTS[number]) for number in np.flatnonzero(wanted))


def test_tokens_of_another_tokenizer_are_not_taken_up(tmp_path):
    _, corpus = made(tmp_path / "blocks", [written(tmp_path / "a.jsonl", TEXTS)], block_bytes=10**9)
    wanted, dtype = np.ones(len(corpus), bool), np.dtype("<u2")
    for tokenizer, value in (("one", 1), ("one", 2), ("other", 3)):
        encode_block(
            corpus,
            0,
            wanted,
            lambda texts, value=value: [np.full(2, value, dtype) for _ in texts],
            dtype,
            tokenizer=tokenizer,
        )
        (ids,) = documents(corpus, np.array([5]), dtype)
        assert ids.tolist() == {"one": [1, 1], "other": [3, 3]}[tokenizer]


def test_more_blocks_than_files_may_be_open_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "MAX_OPEN_FILES", 2)
    _, corpus = made(tmp_path / "blocks", [written(tmp_path / "a.jsonl", TEXTS)])
    assert corpus.num_blocks > 4
    for number in (0, 39, 20, 10, 30, 0, 39):
        assert corpus.text(number) == TEXTS[number]
    corpus.close()


def test_temperature_one_mixes_sources_as_they_come_and_a_higher_one_evens_them_out():
    chars = np.array([900.0, 100.0])
    assert mixing_weights(chars, [1, 1], 1.0) == pytest.approx([1, 1])
    even = mixing_weights(chars, [1, 1], 1e9)
    assert [weight * size for weight, size in zip(even, chars, strict=True)] == pytest.approx(
        [500, 500], rel=1e-4
    )
    half = mixing_weights(chars, [1, 1], 2.0)  # shares 30 : 10
    assert [weight * size for weight, size in zip(half, chars, strict=True)] == pytest.approx([750, 250])
    assert mixing_weights(chars, [1, 2], 2.0) == pytest.approx([half[0], 2 * half[1]])
    assert mixing_weights(np.array([10.0, 0.0]), [1, 1], 2.0) == pytest.approx([1, 1])
    assert mixing_weights(np.array([10.0, 1e9]), [1, 1], 0.1) == pytest.approx([0, 1])


def test_sources_are_mixed_by_weight_and_temperature(tmp_path):
    sources = [written(tmp_path / "a.jsonl", TEXTS[:36]), written(tmp_path / "b.jsonl", TEXTS[36:])]
    config, corpus = made(tmp_path / "one", sources, heldout_frac=1e-9, mixing_temperature=100)
    train = select(corpus, config, 0).train
    small, large = (train >= 36).sum(), (train < 36).sum()
    assert abs(int(small) - int(large)) <= 3 and abs(len(train) - 39) <= 2
    assert set(train[train >= 36].tolist()) | set(select(corpus, config, 0).heldout) >= {36, 37, 38, 39}
    np.testing.assert_array_equal(train, select(corpus, config, 0).train)


def test_a_source_of_which_nothing_is_trained_on_is_named(tmp_path):
    def failure(name: str, *texts: list[str], weight: float = 1.0, **settings: Any) -> str:
        files = (tmp_path / f"{name}-{number}.jsonl" for number in range(len(texts)))
        sources = [written(file, its) for file, its in zip(files, texts, strict=True)]
        sources[-1] = sources[-1].model_copy(update={"weight": weight})
        config, corpus = made(tmp_path / name, sources, **settings)
        with pytest.raises(DataError) as caught:
            select(corpus, config, 0)
        return str(caught.value)

    assert "copied-1.jsonl: no rows left: all are duplicates" in failure("copied", TEXTS, TEXTS[3:6])
    assert "alone-0.jsonl: no rows left to train on: held out 1 of 1" in failure("alone", TEXTS[:1])
    line = "light-1.jsonl: no rows at weight 0.1 and mixing_temperature 1 of 4; raise weight, or set it to 0"
    assert line in failure("light", TEXTS[:36], TEXTS[36:], weight=0.1, heldout_frac=1e-9)
    cold = {"mixing_temperature": 0.1, "heldout_frac": 1e-9}
    line = "cold-1.jsonl: no rows at weight 1 and mixing_temperature 0.1 of 4"
    assert line in failure("cold", TEXTS[:36], TEXTS[36:], **cold)


def test_the_tokenizer_sample_is_chosen_by_content_and_keeps_the_order(tmp_path):
    _, corpus = made(tmp_path / "blocks", [written(tmp_path / "a.jsonl", TEXTS)])
    train = np.array([*range(40), 5, 6])
    assert list(tokenizer_sample(corpus, train, 10**9)) == [*TEXTS, TEXTS[5], TEXTS[6]]
    few = list(tokenizer_sample(corpus, train, 100))
    assert 0 < sum(map(len, few)) <= 100 and [text for text in TEXTS if text in few] == few
    assert len(list(tokenizer_sample(corpus, train, 1))) in (1, 2)
    _, again = made(tmp_path / "reversed", [written(tmp_path / "b.jsonl", TEXTS[::-1])])
    assert set(tokenizer_sample(again, np.arange(40), 100)) == set(
        tokenizer_sample(corpus, np.arange(40), 100)
    )
