"""What shares a row with a segment does not change it: the very micro-batches that pretrain and sft train on,
in all packings, with and without gradients.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from inline import run_recipe, runtime_in, worker_in
from plain_models import losses_of
from torch import Tensor

from stages import pretrain, sft
from stages.config.data import DataSource
from stages.config.model import ModelConfig
from stages.config.sft import SFTConfig, SFTSettings
from stages.data.chat.tokenizer import ChatTokenizer
from stages.data.corpus.shards import TokenShards, write_shards
from stages.data.packing import PackedRow, packed_row
from stages.data.token_file import MappedTokens
from stages.training.distributed import Worker
from stages.training.evaluation import perplexity
from stages.training.fsdp import Placed
from stages.training.models import CausalLM, load_causal_lm

SEP = 2
CONTEXT = 32
LENGTHS = [3, 20, 7, 45, 1, 11, 30, 14, 9, 62, 5, 16]
DOCUMENTS = [
    [3 + (7 * index + 13 * place) % 250 for place in range(length)] for index, length in enumerate(LENGTHS)
]
PACKINGS = ["concat", "best_fit", "bucket"]
MODES = ["train", "eval", "no_grad"]


def prepared(directory: Path, packing: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    write_shards(
        directory,
        DOCUMENTS,
        DOCUMENTS[:4],
        packing=packing,
        separator_id=SEP,
        vocab_size=300,
        context_length=CONTEXT,
        shard_tokens=100,
    )
    return directory


def pretrain_row(directory: Path, packing: str) -> PackedRow:
    """All rows of the shards, in one forward."""
    shards = TokenShards(prepared(directory / packing, packing))
    (rows,) = pretrain._micro_batches(shards, range(len(shards)), len(shards), worker_in(directory, "p"))
    return rows.row


def sft_settings(directory: Path, **config) -> SFTSettings:
    """Conversations of which several share a row of 96 slots, and one is too long for it."""
    words = ["cat", "a dog ran", "red house", "two and three are five", "thank you", "please say"]
    rows = [
        {"prompt": words[index % 6] * (1 + index % 3), "completion": words[(index * 5 + 1) % 6]}
        for index in range(26)
    ]
    rows.append({"prompt": "cat", "completion": "the red house " * 30})
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [DataSource(path=str(directory / "rows.jsonl"))]
    config = {"max_steps": 2, "micro_batch_size": 2, "log_every_steps": 1, **config}
    return SFTSettings(seed=3, model=ModelConfig(context_length=96), sft=SFTConfig(data=data, **config))


def sft_batches(directory: Path, model_dir: Path, worker: Worker | None = None, **config) -> sft.Batches:
    settings = sft_settings(directory, **config)
    worker = worker_in(directory, "sft") if worker is None else worker
    rows = sft.prepare(settings, {"start": model_dir}, worker.runtime)["rows"]
    return sft._batches(sft.Mapped(MappedTokens(rows)), settings, worker)


def row_of(kind: str, directory: Path, model_dir: Path) -> PackedRow:
    """A packed row as the stage makes it: several segments, at least."""
    if kind in PACKINGS:
        row = pretrain_row(directory, kind)
    else:
        batches = sft_batches(directory, model_dir, batch_tokens=96 * 4)
        row = max((batch.row for batch in batches.of_step(0)), key=lambda row: len(row.lengths))
    assert len(row.lengths) >= 3
    return row


@pytest.fixture(scope="module")
def model(tied_model_dir) -> CausalLM:
    return load_causal_lm(tied_model_dir)


def logprobs_of(model: CausalLM, row: PackedRow) -> list[Tensor]:
    """All log-probs of all tokens at every place, per segment [N, V]."""
    every_N = torch.arange(row.num_tokens)
    return row.split(model(row.model_inputs(), every_N)[0].log_softmax(-1))


def in_mode(model: CausalLM, mode: str):
    model.train(mode == "train")
    return torch.set_grad_enabled(mode != "no_grad")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [*PACKINGS, "sft"])
def test_pin_6_every_segment_of_a_row_has_the_log_probs_it_has_alone(
    model, tied_model_dir, tmp_path, kind, mode
):
    row = row_of(kind, tmp_path, tied_model_dir)
    with in_mode(model, mode):
        for ids_T, packed_TV in zip(row.split(row.input_ids_1N[0]), logprobs_of(model, row), strict=True):
            alone_TV = model.inner(input_ids=ids_T[None], use_cache=False).logits[0].log_softmax(-1)
            # log-probs of this model go down to -20, where float32 itself has steps of 2e-6
            torch.testing.assert_close(packed_TV, alone_TV, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [*PACKINGS, "sft"])
def test_pin_7_changing_any_tokens_of_a_segment_changes_no_other_segment(
    model, tied_model_dir, tmp_path, kind, mode
):
    row = row_of(kind, tmp_path, tied_model_dir)
    with in_mode(model, mode):
        before = logprobs_of(model, row)
        for changed in range(0, len(row.lengths), max(1, len(row.lengths) // 5)):
            ids_N = row.input_ids_1N[0].clone()
            segment = slice(row.starts[changed], row.starts[changed] + row.lengths[changed])
            ids_N[segment] = (ids_N[segment] + 17) % 250
            after = logprobs_of(model, replace(row, input_ids_1N=ids_N[None]))
            for index, (old, new) in enumerate(zip(before, after, strict=True)):
                if index != changed:
                    torch.testing.assert_close(new, old, atol=1e-6, rtol=0)
            assert (after[changed] - before[changed]).abs().max() > 0.1


@pytest.mark.parametrize("kind", [*PACKINGS, "sft"])
def test_without_the_boundaries_the_same_row_would_leak(model, tied_model_dir, tmp_path, kind):
    """So the tests above can fail."""
    row = row_of(kind, tmp_path, tied_model_dir)
    with in_mode(model, "no_grad"):
        leaky = logprobs_of(model, packed_row(row.input_ids_1N[0], [row.num_tokens]))
        whole = torch.cat(logprobs_of(model, row))
    assert (leaky[0] - whole).abs().max() > 0.1


# pretrain


def pretrain_loss(
    model: CausalLM, shards: TokenShards, indices, micro_batch_size: int, worker: Worker
) -> Tensor:
    rows = pretrain._micro_batches(shards, indices, micro_batch_size, worker)
    return losses_of(model, rows, pretrain._loss)


def gradient_of(model: CausalLM, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("packing", PACKINGS)
def test_pin_12_the_loss_of_a_step_is_the_mean_over_its_targets_each_predicted_in_its_own_document(
    model, tmp_path, packing
):
    """By plain transformers, a segment at a time. Under concat the separator behind a segment belongs to
    it.
    """
    shards = TokenShards(prepared(tmp_path / packing, packing))
    losses = []
    for index in range(len(shards)):
        row = shards.row(index)
        starts = [sum(row.lengths[:place]) for place in range(len(row.lengths))]
        for start, length in zip(starts, row.lengths, strict=True):
            ids = row.ids[start : start + length].tolist()
            logits_TV = model.inner(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            targets = ids[1:]
            if packing == "concat" and start + length < len(row.ids):
                targets.append(SEP)
            losses += [-logits_TV[t].log_softmax(-1)[token] for t, token in enumerate(targets)]
    expected = torch.stack(losses).mean()
    expected_gradient = gradient_of(model, expected)
    for micro_batch_size in (1, 2, 100):
        worker = worker_in(tmp_path, "pretrain")
        loss = pretrain_loss(model, shards, range(len(shards)), micro_batch_size, worker)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
        gradient = gradient_of(model, loss)
        assert (gradient - expected_gradient).norm() <= 1e-5 * expected_gradient.norm()


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_shares_of_several_ranks_sum_to_the_loss_of_one(model, tmp_path, packing):
    """Rows have different numbers of targets: the denominator is that of all ranks."""
    shards = TokenShards(prepared(tmp_path / packing, packing))
    worker, indices = worker_in(tmp_path, "pretrain"), [0, 3, 1, 4]
    whole = pretrain_loss(model, shards, indices, 2, worker)
    shares = [
        pretrain_loss(model, shards, indices, 2, replace(worker, rank=rank, world_size=2)) for rank in (0, 1)
    ]
    assert sum(share.item() for share in shares) == pytest.approx(whole.item(), abs=1e-6)


def test_held_out_perplexity_does_not_depend_on_who_else_is_evaluated(model, tmp_path):
    import numpy as np

    documents = [np.array([SEP, *document, SEP]) for document in DOCUMENTS[:4]]
    alone = [perplexity(Placed(model), [document], device=torch.device("cpu")) for document in documents]
    tokens = [len(document) - 1 for document in documents]
    logs = torch.tensor(alone).double().log() * torch.tensor(tokens)
    together = perplexity(Placed(model), documents, device=torch.device("cpu"))
    assert together == pytest.approx(float((logs.sum() / sum(tokens)).exp()), rel=1e-5)


# sft by tokens


def ids_of(batches: sft.Batches, step: int) -> list[list[int]]:
    return [batch.row.input_ids_1N[0].tolist() for batch in batches.of_step(step)]


def test_batch_tokens_are_rows_of_the_context_filled_best_fit_and_every_conversation_is_seen_once(
    tmp_path, tied_model_dir
):
    settings = sft_settings(tmp_path)
    examples, _ = sft._examples(settings, ChatTokenizer.load(tied_model_dir))
    batches = sft_batches(tmp_path, tied_model_dir, batch_tokens=96 * 2 + 50)
    assert batches.order.batch_size == 2, "whole rows within the budget"
    rows = batches.order.num_rows
    assert batches.metrics["rows"] == rows
    assert batches.metrics["packing_utilisation"] == sum(len(e.ids) for e in examples) / (rows * 96) > 0.9
    seen = [
        tuple(ids.tolist())
        for step in range(rows)
        for batch in batches.of_step(step)
        for ids in batch.row.split(batch.row.input_ids_1N[0])
    ]
    assert sorted(seen) == sorted(2 * [example.ids for example in examples]), "two epochs"
    for step in range(4):
        assert sum(batch.row.num_tokens for batch in batches.of_step(step)) <= 96 * 2 + 50
        assert all(batch.row.num_tokens <= 96 for batch in batches.of_step(step))


def test_a_step_by_tokens_is_a_function_of_its_number_alone(tmp_path, tied_model_dir):
    straight = sft_batches(tmp_path, tied_model_dir, batch_tokens=96 * 2)
    steps = [ids_of(straight, step) for step in range(9)]
    again = sft_batches(tmp_path, tied_model_dir, batch_tokens=96 * 2)
    assert [ids_of(again, step) for step in (8, 3, 0)] == [steps[8], steps[3], steps[0]]
    assert steps[0] != steps[1]


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_rows_of_a_step_and_its_denominator_are_the_same_for_any_number_of_ranks(
    tmp_path, tied_model_dir, world_size
):
    one = worker_in(tmp_path, "sft")
    whole = sft_batches(tmp_path, tied_model_dir, one, batch_tokens=96 * 4)
    shares = [
        sft_batches(
            tmp_path, tied_model_dir, replace(one, rank=rank, world_size=world_size), batch_tokens=96 * 4
        )
        for rank in range(world_size)
    ]
    for step in range(3):
        assert [ids for share in shares for ids in ids_of(share, step)] == ids_of(whole, step)
        counts = {batch.num_targets for share in [whole, *shares] for batch in share.of_step(step)}
        (count,) = counts
        assert count == sum(len(batch.targets_N) for batch in whole.of_step(step))


def test_sft_by_tokens_has_the_loss_of_the_same_conversations_by_number(tmp_path, tied_model_dir):
    """One step over everything, both ways."""
    worker = worker_in(tmp_path, "sft")
    num_examples = len(sft._examples(sft_settings(tmp_path), ChatTokenizer.load(tied_model_dir))[0])
    rows = sft_batches(tmp_path, tied_model_dir, worker, batch_tokens=96).order.num_rows
    model = load_causal_lm(tied_model_dir)

    def gradient(**config) -> tuple[float, Tensor]:
        batches = sft_batches(tmp_path, tied_model_dir, worker, **config).of_step(0)
        loss = losses_of(model, batches, sft._loss)
        return loss.item(), gradient_of(model, loss)

    by_number, by_tokens = gradient(batch_size=num_examples), gradient(batch_tokens=96 * rows)
    assert by_tokens[0] == pytest.approx(by_number[0], abs=1e-5)
    assert (by_tokens[1] - by_number[1]).norm() <= 1e-5 * by_number[1].norm()


def test_the_recipe_reports_its_utilisation_where_rows_have_a_size(tmp_path, tied_model_dir):
    def metrics(name: str, **config) -> dict[str, float]:
        runtime = runtime_in(tmp_path / name, "sft")
        settings = sft_settings(tmp_path, **config)
        return dict(run_recipe(settings, {"start": tied_model_dir}, tmp_path / name / "out", runtime))

    by_tokens = metrics("tokens", batch_tokens=96 * 2)
    assert 0.9 < by_tokens["packing_utilisation"] <= 1 and by_tokens["steps"] == 2
    assert "packing_utilisation" not in metrics("number", batch_size=2)
