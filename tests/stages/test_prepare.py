"""prepare: documents in; tokenizer, shards and statistics out, byte for byte the same each time."""

import errno
import gzip
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import ray
from blake3 import blake3
from inline import runtime_in
from ray import cloudpickle
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline.stage_task import as_expected
from pipeline.supervisor import _committed
from rollout.ground.errors import EnvironmentProblem
from stages import prepare
from stages.config.data import DataSource
from stages.config.model import ModelConfig
from stages.config.prepare import PrepareConfig, PrepareSettings
from stages.data.chat.special import CHATML
from stages.data.chat.tokenizer import ChatTokenizer
from stages.data.corpus import workers
from stages.data.corpus.shards import TokenShards, heldout_sequences
from stages.data.corpus.vocabulary import train_tokenizer
from stages.data.reading.records import Message
from stages.errors import DataError, Interrupted, ModelError
from stages.runtime import Runtime

NOUNS = ["cat", "dog", "house", "tree", "river", "teacher", "window", "garden"]
VERBS = ["sees", "likes", "finds", "paints"]
DOCUMENTS = [
    f"The {a} {verb} the {b}. It is {len(a) + len(b)} o'clock."
    for a in NOUNS
    for verb in VERBS
    for b in NOUNS
]


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    return runtime_in(tmp_path, "prepare")


def corpus(path: Path, texts: list[str]) -> Path:
    """The texts in a file of the kind that its name says."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
        return path
    cells = ["text", *('"{}"'.format(text.replace('"', '""')) for text in texts)]
    match path.name.split(".")[1]:
        case "jsonl":
            data = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        case "json":
            data = json.dumps([{"text": text} for text in texts])
        case "csv":
            data = "\n".join(cells)
        case "tsv":
            data = "\n".join(["text", *texts])
        case "txt":
            data = "\n\n".join(texts)
    path.write_bytes(compressed(data.encode(), path.suffix))
    return path


def compressed(data: bytes, suffix: str) -> bytes:
    if suffix == ".zst":
        return pyarrow.Codec("zstd").compress(data, asbytes=True)
    return gzip.compress(data) if suffix == ".gz" else data


def blocks_of(runtime: Runtime) -> list[Path]:
    """Records of the blocks that a run left, of the one with most of them."""
    found = [list(directory.glob("*.filtered.json")) for directory in runtime.work_dir.glob("blocks-*")]
    return max(found, key=len)


def settings(
    *paths: Path | DataSource,
    weight: float = 1.0,
    model: dict[str, Any] | None = None,
    evaluation: tuple[Path, ...] = (),
    **config: Any,
) -> PrepareSettings:
    sources = [
        path if isinstance(path, DataSource) else DataSource(path=str(path), weight=weight) for path in paths
    ]
    config = {"vocab_size": 320, "heldout_frac": 0.1, "shard_tokens": 1024, **config}
    return PrepareSettings(
        seed=0,
        evaluation_prompts=[DataSource(path=str(path)) for path in evaluation],
        model=ModelConfig(context_length=64, **model or {}),
        prepare=PrepareConfig(data=sources, **config),
    )


def digests(directory: Path) -> dict[str, str]:
    return {path.name: blake3(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def statistics(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "statistics.json").read_text())


def train_text(directory: Path) -> str:
    shards = TokenShards(directory)
    ids = [token for index in range(len(shards)) for token in shards.row(index).ids.tolist()]
    return AutoTokenizer.from_pretrained(directory).decode(ids)


def test_the_artifact_holds_a_loadable_tokenizer_rows_and_statistics(tmp_path, runtime):
    path = corpus(tmp_path / "a.jsonl", DOCUMENTS)
    metrics = prepare.run(settings(path), {}, tmp_path / "out", runtime)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    assert tokenizer.convert_tokens_to_ids(special) == [0, 1, 2, 3]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        "<|endoftext|>",
        "<|pad|>",
        None,
    )
    assert tokenizer.chat_template == CHATML
    shards = TokenShards(tmp_path / "out")
    assert shards.row(0).ids.shape == (64,) and shards.row(0).ids[0] == tokenizer.eos_token_id
    assert shards.vocab_size == len(tokenizer) == metrics["vocab_size"] == 320
    assert len(shards) == metrics["rows"] == metrics["tokens_train"] // 64
    assert len(list((tmp_path / "out").glob("train-*.bin"))) > 1
    texts = [text for text in train_text(tmp_path / "out").split("<|endoftext|>") if text]
    assert set(texts[:-1]) <= set(DOCUMENTS)
    statistics = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert statistics["documents"] == len(DOCUMENTS) and statistics["chars_per_token"] > 1.5
    assert all(statistics[name] == value for name, value in metrics.items())


def test_the_chat_template_works_with_the_trained_tokenizer(tmp_path, runtime):
    prepare.run(settings(corpus(tmp_path / "a.jsonl", DOCUMENTS)), {}, tmp_path / "out", runtime)
    chat = ChatTokenizer.load(tmp_path / "out")
    rendered = chat.render([Message(role="user", content="Hi"), Message(role="assistant", content="A cat")])
    assert chat.lint(rendered) == [] and chat.stop_token_ids == (0, 2) and chat.pad_token_id == 3


def test_the_same_documents_give_the_same_bytes(tmp_path, runtime):
    chosen = settings(corpus(tmp_path / "a.jsonl", DOCUMENTS), weight=1.5)
    for name in ("one", "two"):
        prepare.run(chosen, {}, tmp_path / name, runtime)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_any_text_survives_encoding_and_forged_special_tokens_stay_text(tmp_path, runtime):
    odd = "<|endoftext|><|im_end|> naïve 日本語 🎉 \t tabs, 12345"
    prepare.run(settings(corpus(tmp_path / "a.jsonl", [*DOCUMENTS, odd])), {}, tmp_path / "out", runtime)
    chat = ChatTokenizer.load(tmp_path / "out")
    assert chat.decode(chat.text_ids(odd)) == odd and not {0, 1, 2, 3} & set(chat.text_ids(odd))
    separators = sum(
        TokenShards(tmp_path / "out").row(i).ids.tolist().count(0)
        for i in range(len(TokenShards(tmp_path / "out")))
    )
    assert separators <= len(DOCUMENTS) + 2


def test_repetitions_and_wrong_lengths_are_dropped_counted_and_shown(tmp_path, runtime):
    extra = [
        "  " + DOCUMENTS[0] + "\r\n",
        DOCUMENTS[1],
        "caf\u00e9 au lait, please",
        "cafe\u0301 au lait, please",
        "x",
        "",
        "y" * 3000,
    ]
    first, second = corpus(tmp_path / "a.jsonl", DOCUMENTS), corpus(tmp_path / "b.jsonl", extra)
    chosen = settings(first, second, min_chars=2, max_chars=2000)
    metrics = prepare.run(chosen, {}, tmp_path / "out", runtime)
    assert metrics["documents"] == len(DOCUMENTS) + 7
    assert (metrics["dropped_duplicate"], metrics["dropped_too_short"], metrics["dropped_too_long"]) == (
        3,
        2,
        1,
    )
    assert metrics["documents_kept"] == len(DOCUMENTS) + 1
    steps = {step["step"]: step for step in statistics(tmp_path / "out")["steps"]}
    shown = [(example["rule"], example["text"]) for example in steps["length"]["examples"]]
    assert shown == [("too_short", "x"), ("too_short", ""), ("too_long", "y" * 200)]
    assert steps["length"]["rules"] == {"too_long": 1, "too_short": 2} and steps["length"]["dropped"] == 3
    assert [example["text"] for example in steps["duplicate"]["examples"]] == [
        DOCUMENTS[0],
        DOCUMENTS[1],
        "caf\u00e9 au lait, please",
    ]
    assert steps["duplicate"]["kept"] == metrics["documents_kept"]


def test_held_out_documents_are_chosen_by_their_content(tmp_path, runtime):
    def heldout(name: str, texts: list[str]) -> set[str]:
        prepare.run(settings(corpus(tmp_path / f"{name}.jsonl", texts)), {}, tmp_path / name, runtime)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        found = {tokenizer.decode(ids[1:-1]) for ids in heldout_sequences(tmp_path / name, 1000)}
        assert not any(text in train_text(tmp_path / name) for text in found)
        return found

    everything = heldout("all", DOCUMENTS)
    assert 0.03 < len(everything) / len(DOCUMENTS) < 0.2
    assert heldout("reversed", DOCUMENTS[::-1]) == everything
    assert heldout("half", DOCUMENTS[:128]) == everything & set(DOCUMENTS[:128])


def test_even_a_tiny_share_holds_out_one_document(tmp_path, runtime):
    chosen = settings(corpus(tmp_path / "a.jsonl", DOCUMENTS), heldout_frac=1e-9)
    assert prepare.run(chosen, {}, tmp_path / "out", runtime)["documents_heldout"] == 1


def test_weights_repeat_training_documents_only(tmp_path, runtime):
    path = corpus(tmp_path / "a.jsonl", DOCUMENTS)
    once = prepare.run(settings(path), {}, tmp_path / "once", runtime)
    twice = prepare.run(settings(path, weight=2), {}, tmp_path / "twice", runtime)
    assert twice["tokens_heldout"] == once["tokens_heldout"]
    assert (
        twice["chars_train"] == 2 * once["chars_train"] and twice["documents_kept"] == once["documents_kept"]
    )


def test_statistics_say_what_each_source_gives_to_the_mixture(tmp_path, runtime):
    first = corpus(tmp_path / "a.jsonl", DOCUMENTS)
    second = corpus(tmp_path / "b.csv", [*DOCUMENTS[:9], "New."])
    unused = DataSource(path=str(corpus(tmp_path / "c.jsonl", ["no"])), weight=0)
    often = DataSource(path=str(second), weight=3)
    metrics = prepare.run(settings(first, unused, often), {}, tmp_path / "out", runtime)
    one, other = statistics(tmp_path / "out")["sources"]
    num = len(DOCUMENTS)
    assert (one["source"], one["documents"], one["documents_kept"]) == (0, num, num)
    assert one["chars_kept"] == sum(map(len, DOCUMENTS))
    assert one["documents_train"] == num - metrics["documents_heldout"]
    assert other == {
        "source": 2,
        "documents": 10,
        "documents_kept": 1,
        "chars_kept": 4,
        "documents_train": 3,
        "chars_train": 12,
    }
    assert one["chars_train"] + other["chars_train"] == metrics["chars_train"]


def test_evaluation_texts_that_are_too_short_to_be_looked_for_are_counted(tmp_path, runtime):
    path, question = corpus(tmp_path / "a.jsonl", DOCUMENTS), evaluation(tmp_path / "e.jsonl")
    metrics = prepare.run(settings(path, evaluation=(question,)), {}, tmp_path / "out", runtime)
    assert (metrics["evaluation_texts"], metrics["evaluation_texts_too_short"]) == (2, 1)  # the answer


def test_a_given_models_tokenizer_is_taken_with_its_template(tmp_path, runtime, tied_model_dir):
    path = corpus(tmp_path / "a.jsonl", DOCUMENTS)
    metrics = prepare.run(settings(path), {"start": tied_model_dir}, tmp_path / "out", runtime)
    given, taken = (AutoTokenizer.from_pretrained(d) for d in (tied_model_dir, tmp_path / "out"))
    assert taken.get_vocab() == given.get_vocab() and taken.chat_template == given.chat_template
    assert TokenShards(tmp_path / "out").separator_id == given.eos_token_id
    assert metrics["vocab_size"] == len(given)


def test_a_tokenizer_that_is_given_may_have_gaps_between_its_ids(tmp_path, runtime):
    given = train_tokenizer([], 300, 1)
    spec = json.loads(given.backend_tokenizer.to_str())
    (end,) = (token for token in spec["added_tokens"] if token["content"] == given.eos_token)
    spec["model"]["vocab"][given.eos_token] = end["id"] = 70_000
    gap = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)), eos_token=given.eos_token
    )
    gap.save_pretrained(tmp_path / "gap")
    chosen = settings(corpus(tmp_path / "a.jsonl", DOCUMENTS), tokenizer=tmp_path / "gap")
    metrics = prepare.run(chosen, {}, tmp_path / "out", runtime)
    shards = TokenShards(tmp_path / "out")
    assert shards.vocab_size == metrics["vocab_size"] == 70_001 > shards.separator_id == 70_000
    assert shards.row(0).ids[0] == shards.separator_id


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("no file", "no tokenizer that can be loaded"),
        ("no end", "nor an EOS token"),
        ("template", "writes no end-of-turn token"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_refused_before_a_document_is_read(
    tmp_path, runtime, given, words
):
    (tmp_path / "documents.jsonl").write_text("{broken")
    (tmp_path / "no file").mkdir()
    tokenizer = train_tokenizer([], 300, 1)
    spec = tokenizer.backend_tokenizer.to_str().replace("<|endoftext|>", "<|start|>")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(spec), chat_template=CHATML).save_pretrained(
        tmp_path / "no end"
    )
    (tmp_path / "template").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    taken: dict[str, Any] = {"tokenizer": tmp_path / given}
    if given == "template":
        taken = {"model": {"chat_template": tmp_path / given}}
    with pytest.raises(ModelError, match=words):
        prepare.run(settings(tmp_path / "documents.jsonl", **taken), {}, tmp_path / "out", runtime)
    assert not list((tmp_path / "work").iterdir())


def test_a_template_file_is_stored_with_the_tokenizer(tmp_path, runtime):
    template = CHATML.replace("assistant\\n", "assistant: ").replace("assistant\n", "assistant\n")
    (tmp_path / "t.jinja").write_text(template)
    chosen = settings(corpus(tmp_path / "a.jsonl", DOCUMENTS), model={"chat_template": tmp_path / "t.jinja"})
    prepare.run(chosen, {}, tmp_path / "out", runtime)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template


@pytest.mark.parametrize(
    ("texts", "config", "words"),
    [
        (["only one document"], {}, r"a\.jsonl: no rows left to train on: held out 1 of 1"),
        (["a short text", "another text", "a third"], {}, "do not fill one row of model.context_length 64"),
        (["x", "y"], {"min_chars": 5}, r"a\.jsonl: no rows left of 2 \(dropped: 2 by length \(too_short\)\)"),
    ],
)
def test_too_little_data_is_one_line_that_says_what_to_do(tmp_path, runtime, texts, config, words):
    with pytest.raises(DataError, match=words) as caught:
        prepare.run(settings(corpus(tmp_path / "a.jsonl", texts), **config), {}, tmp_path / "out", runtime)
    assert "\n" not in str(caught.value) and ";" in str(caught.value)


EVERY_STEP: dict[str, Any] = {
    "min_chars": 20,
    "languages": ["en"],
    "min_language_score": 0.2,
    "quality": ["fineweb"],
    "near_dedup": {"jaccard": 0.7, "ngram": 2},
}


def varied() -> list[str]:
    """Documents of which every step has something to drop."""
    spoiled = ["too short", "der Hund und die Katze sitzen zusammen im Garten und schlafen", DOCUMENTS[0]]
    repeated = "\n".join(["the same line again and again in a document"] * 12)
    long = " ".join(f"{DOCUMENTS[number]}" for number in range(30))
    leaked = "He wrote: what do you call the place where the two rivers of that old country meet? It is old."
    return [*DOCUMENTS, *spoiled, repeated, long, f"{long} And that is all.", leaked]


def evaluation(path: Path) -> Path:
    question = "What do you call the place where the two rivers of that old country meet"
    path.write_text(json.dumps({"prompt": question, "answer": "A confluence"}) + "\n")
    return path


def test_every_step_counts_what_it_drops_and_shows_some_of_it(tmp_path, runtime):
    path = corpus(tmp_path / "a.jsonl", varied())
    chosen = settings(path, evaluation=(evaluation(tmp_path / "e.jsonl"),), **EVERY_STEP)
    metrics = prepare.run(chosen, {}, tmp_path / "out", runtime)
    steps = {step["step"]: step for step in statistics(tmp_path / "out")["steps"]}
    assert list(steps) == ["length", "language", "quality", "contamination", "duplicate", "near_duplicate"]
    for name, step in steps.items():
        assert step["dropped"] > 0 and 0 < len(step["examples"]) <= 5, name
        assert sum(step["rules"].values()) == step["dropped"], name
    kept = metrics["documents"]
    for step in steps.values():
        kept -= step["dropped"]
        assert step["kept"] == kept
    assert kept == metrics["documents_kept"]
    assert "confluence" not in train_text(tmp_path / "out")
    assert "two rivers" in steps["contamination"]["examples"][0]["text"]


@pytest.mark.ray
def test_the_bytes_depend_on_neither_the_size_of_blocks_nor_the_number_of_workers(
    tmp_path, start_ray, monkeypatch
):
    texts = varied()
    parts = {"a.jsonl": texts[:90], "b.csv": texts[90:180], "c.jsonl.gz": texts[180:]}
    paths = [corpus(tmp_path / name, part) for name, part in parts.items()]
    given = {"evaluation": (evaluation(tmp_path / "e.jsonl"),), **EVERY_STEP}
    inline = runtime_in(tmp_path / "inline", "prepare")
    prepare.run(settings(*paths, **given), {}, tmp_path / "whole", inline)
    whole = digests(tmp_path / "whole")
    prepare.run(settings(*paths, block_mb=0.002, **given), {}, tmp_path / "small", inline)
    assert digests(tmp_path / "small") == whole
    start_ray()
    spread = runtime_in(tmp_path / "ray", "prepare", num_workers=2)
    prepare.run(settings(*paths, block_mb=0.002, **given), {}, tmp_path / "spread", spread)
    assert digests(tmp_path / "spread") == whole
    assert all(len(blocks_of(runtime)) > 3 * len(paths) for runtime in (inline, spread))


@pytest.mark.parametrize(
    "name", ["a.csv", "a.tsv", "a.txt", "a.json", "a.jsonl.gz", "a.csv.zst", "a.parquet"]
)
def test_every_kind_of_file_is_worked_on_in_blocks_and_gives_the_same_bytes(tmp_path, runtime, name):
    prepare.run(settings(corpus(tmp_path / "plain.jsonl", DOCUMENTS)), {}, tmp_path / "plain", runtime)
    path = corpus(tmp_path / name, DOCUMENTS)
    undisturbed = runtime_in(tmp_path / "other", "prepare")
    prepare.run(settings(path, block_mb=0.001), {}, tmp_path / "out", undisturbed)
    assert digests(tmp_path / "out") == digests(tmp_path / "plain")
    assert len(blocks_of(undisturbed)) > 10


def test_bad_rows_of_a_file_that_cannot_be_cut_are_counted_once_and_named_by_its_lines(tmp_path, runtime):
    path = corpus(tmp_path / "a.csv", DOCUMENTS)
    path.write_text(path.read_text() + "\ntoo,many\n")
    with pytest.raises(DataError, match=r"a\.csv:258: expected 1 cells, got 2"):
        prepare.run(settings(path, block_mb=0.001), {}, tmp_path / "out", runtime)
    source = DataSource(path=str(path), on_bad_row="skip")
    metrics = prepare.run(settings(source, block_mb=0.001), {}, tmp_path / "out", runtime)
    assert (metrics["rows_skipped"], metrics["documents"]) == (1, len(DOCUMENTS))
    assert len(blocks_of(runtime)) > 10


@pytest.mark.ray
def test_ray_datas_workers_stop_while_they_read_a_file_that_cannot_be_cut(tmp_path, start_ray):
    path = corpus(tmp_path / "a.jsonl.gz", DOCUMENTS)
    start_ray()
    runtime = runtime_in(tmp_path / "ray", "prepare", num_workers=2)
    runtime.stop_file.touch()
    with pytest.raises(Interrupted, match="run the same command to go on"):
        prepare.run(settings(path, block_mb=0.002), {}, tmp_path / "out", runtime)
    assert not list(runtime.work_dir.rglob("*.read.json"))


@pytest.mark.ray
def test_ray_datas_workers_report_bad_data_as_one_line(tmp_path, start_ray):
    path = corpus(tmp_path / "a.jsonl", DOCUMENTS)
    path.write_text(path.read_text() + '{"text": 7}\n')
    start_ray()
    with pytest.raises(DataError, match=r"a\.jsonl:257: text: expected text, got number 7") as caught:
        prepare.run(
            settings(path, block_mb=0.002, ray_data_mb=0),
            {},
            tmp_path / "out",
            runtime_in(tmp_path / "ray", "prepare", num_workers=1),
        )
    assert "\n" not in str(caught.value)


class FullDisk:
    """Work that fails as it would on a full disk."""

    def __call__(self, row: dict[str, int]) -> dict[str, Any]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "000000.text")


class Deadly:
    """Work that kills its process each time."""

    def __call__(self, row: dict[str, int]) -> dict[str, Any]:
        os._exit(9)


def all_answers(work: Callable[..., Any], given: Runtime) -> list[dict[str, Any]]:
    return list(workers.on_ray_data(work, {}, [{"number": 0}], given))


@pytest.mark.ray
@pytest.mark.parametrize(
    ("work", "words"), [(FullDisk, "No space left on device"), (Deadly, "a process of it died")]
)
def test_what_stops_ray_datas_workers_is_the_machines_fault_and_ends_the_stage(
    tmp_path, start_ray, work, words
):
    start_ray()
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this module
    given = runtime_in(tmp_path / "ray", "prepare", num_workers=2)
    try:
        with pytest.raises(ray.exceptions.RayError) as caught:  # whatever Ray makes of it
            # in a process that ends with it, like a stage: errors of Ray Data hold workers, and so CPUs
            ray.get(ray.remote(num_cpus=0, max_retries=0, max_calls=1)(all_answers).remote(work, given))
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    told = as_expected("prepare", caught.value, tmp_path)
    assert isinstance(told, EnvironmentProblem) and words in str(told) and "\n" not in str(told)
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != 2:
        assert time.monotonic() < deadline, "workers that nobody needs any more hold CPUs"
        time.sleep(0.1)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.jsonl.gz"])
def test_a_stopped_run_ends_between_two_blocks_and_goes_on_to_the_same_bytes(tmp_path, runtime, name):
    path = corpus(tmp_path / name, varied())
    chosen = settings(path, block_mb=0.002, **EVERY_STEP)
    prepare.run(chosen, {}, tmp_path / "whole", runtime_in(tmp_path / "undisturbed", "prepare"))
    runtime.stop_file.touch()
    for _ in range(2):
        with pytest.raises(Interrupted, match="run the same command to go on"):
            prepare.run(chosen, {}, tmp_path / "out", runtime)
    runtime.stop_file.unlink()
    prepare.run(chosen, {}, tmp_path / "out", runtime)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_supervisor_counts_every_new_block_as_progress(tmp_path, runtime):
    chosen = settings(corpus(tmp_path / "a.jsonl", DOCUMENTS), block_mb=0.002)
    in_outputs = replace(runtime, work_dir=tmp_path / "work/prepare-0")
    runtime.stop_file.touch()
    seen = []
    for _ in range(2):
        with pytest.raises(Interrupted):
            prepare.run(chosen, {}, tmp_path / "out", in_outputs)
        seen.append(_committed(tmp_path))
    assert len(seen[0]) == 1 and seen[1] == seen[0]
    runtime.stop_file.unlink()
    prepare.run(chosen, {}, tmp_path / "out", in_outputs)
    assert _committed(tmp_path) > seen[0]


def test_a_block_of_what_a_file_held_for_a_while_is_made_again(tmp_path, runtime):
    """The file is edited under a running stage, which then dies, and gets back its content, size and date."""
    path = corpus(tmp_path / "a.jsonl", DOCUMENTS)
    chosen = settings(path, block_mb=0.002)
    prepare.run(chosen, {}, tmp_path / "whole", runtime_in(tmp_path / "undisturbed", "prepare"))
    before, stamp = path.read_text(), path.stat()
    path.write_text(before.replace("cat", "cow"))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    runtime.stop_file.touch()
    with pytest.raises(Interrupted):
        prepare.run(chosen, {}, tmp_path / "out", runtime)
    path.write_text(before)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    runtime.stop_file.unlink()
    prepare.run(chosen, {}, tmp_path / "out", runtime)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_another_tokenizer_takes_up_the_filtered_blocks(tmp_path, runtime, tied_model_dir):
    path = corpus(tmp_path / "a.csv", varied())
    others = settings(path, block_mb=0.002, tokenizer=tied_model_dir, ray_data_mb=7)
    prepare.run(others, {}, tmp_path / "fresh", runtime_in(tmp_path / "undisturbed", "prepare"))
    prepare.run(settings(path, block_mb=0.002), {}, tmp_path / "trained", runtime)
    before = {record: record.stat().st_mtime_ns for record in blocks_of(runtime)}
    prepare.run(others, {}, tmp_path / "given", runtime)
    assert digests(tmp_path / "given") == digests(tmp_path / "fresh")
    assert {record: record.stat().st_mtime_ns for record in blocks_of(runtime)} == before
    assert len(list(runtime.work_dir.glob("blocks-*"))) == 1


def test_a_directory_of_a_tokenizer_is_taken(tmp_path, runtime, tied_model_dir):
    path = corpus(tmp_path / "a.jsonl", DOCUMENTS)
    prepare.run(settings(path, tokenizer=tied_model_dir), {}, tmp_path / "out", runtime)
    given, taken = (AutoTokenizer.from_pretrained(d) for d in (tied_model_dir, tmp_path / "out"))
    assert taken.get_vocab() == given.get_vocab()


def test_an_unknown_language_is_named_with_the_known_ones(tmp_path, runtime):
    path = corpus(tmp_path / "a.jsonl", DOCUMENTS)
    with pytest.raises(DataError, match="english"):
        prepare.run(settings(path, languages=["english"]), {}, tmp_path / "out", runtime)


@pytest.mark.parametrize("packing", ["concat", "best_fit", "bucket"])
def test_every_packing_fills_rows_and_says_how_well(tmp_path, runtime, packing):
    path = corpus(tmp_path / "a.jsonl", DOCUMENTS)
    metrics = prepare.run(settings(path, packing=packing), {}, tmp_path / "out", runtime)
    assert metrics["rows"] == len(TokenShards(tmp_path / "out")) > 10
    assert 0.8 < metrics["packing_utilisation"] <= 1
