"""sft: what it trains on and what its loss is, against one conversation and one token at a time."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from inline import run_recipe, runtime_in, worker_in
from plain_models import losses_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages import sft
from stages.config.data import DataSource
from stages.config.model import ModelConfig
from stages.config.sft import SFTConfig, SFTSettings
from stages.data.chat.tokenizer import ChatTokenizer
from stages.training.metrics import read_steps
from stages.training.models import load_causal_lm

EOS = 2
CONVERSATIONS = [
    [("user", "the cat"), ("assistant", "sat on the mat")],
    [("user", "a dog"), ("assistant", "ran"), ("user", "two and three"), ("assistant", "are five")],
    [("system", "please say"), ("user", "thank you"), ("assistant", "to the red house")],
    [("user", "a"), ("assistant", "b")],
    [(role, text) for text in ("red", "two", "dog") for role in ("user", "assistant")],
]


@pytest.fixture
def settings(tmp_path) -> SFTSettings:
    """One optimizer step over all of the conversations."""
    rows = [
        {"messages": [{"role": role, "content": content} for role, content in conversation]}
        for conversation in CONVERSATIONS
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SFTSettings(
        seed=0,
        model=ModelConfig(context_length=128),
        sft=SFTConfig(
            data=[DataSource(path=str(tmp_path / "rows.jsonl"))],
            max_steps=1,
            batch_size=len(CONVERSATIONS),
            micro_batch_size=2,
            log_every_steps=1,
            max_grad_norm=1e9,
        ),
    )


def tokens_and_trained(model_dir: Path, conversation) -> tuple[list[int], list[bool]]:
    """Written out by hand: `<role> content<eos>` per message; the assistant's content and its <eos> are
    trained, and begin with a token of their own.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ids: list[int] = []
    trained: list[bool] = []
    for role, content in conversation:
        answers = role == "assistant"
        parts = [(f"<{role}> ", False), (content, True)] if answers else [(f"<{role}> {content}", False)]
        for text, is_trained in parts:
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += tokens
            trained += [is_trained] * len(tokens)
        ids.append(EOS)
        trained.append(answers)
    return ids, trained


def loss_token_by_token(model_dir: Path, *, shift: int = 1) -> tuple[float, torch.Tensor]:
    """Mean over trained tokens, and its gradient; every conversation alone, by plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    losses = []
    for conversation in CONVERSATIONS:
        ids, trained = tokens_and_trained(model_dir, conversation)
        logits_TV = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        for t, token in enumerate(ids):
            if trained[t]:
                losses.append(-logits_TV[t - shift].log_softmax(-1)[token])
    loss = torch.stack(losses).mean()
    loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return loss.item(), gradient


@pytest.mark.parametrize("micro_batch_size", [1, 2, 5])
def test_pin_12_loss_and_gradient_are_those_of_a_loop_over_conversations_and_assistant_tokens(
    tied_model_dir, settings, tmp_path, micro_batch_size
):
    chat = ChatTokenizer.load(tied_model_dir)
    examples, data = sft._examples(settings, chat)
    model = load_causal_lm(tied_model_dir)
    micro_batches = sft._micro_batches(examples, micro_batch_size, worker_in(tmp_path, "sft"))
    loss = losses_of(model, micro_batches, sft._loss)
    loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    expected, expected_gradient = loss_token_by_token(tied_model_dir)
    assert data["conversations_dropped"] == 0 and len(micro_batches) == -(
        -len(CONVERSATIONS) // micro_batch_size
    )
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    assert (gradient - expected_gradient).norm() <= 1e-5 * expected_gradient.norm()


def test_pin_12_a_shift_of_none_or_two_would_be_seen(tied_model_dir):
    right, _ = loss_token_by_token(tied_model_dir)
    for wrong in (0, 2):
        assert abs(loss_token_by_token(tied_model_dir, shift=wrong)[0] - right) > 0.01


def test_pin_12_trained_are_the_assistants_tokens_and_its_end_of_turn_and_no_first_token_of_a_pack(
    tied_model_dir, settings, tmp_path
):
    chat = ChatTokenizer.load(tied_model_dir)
    examples, _ = sft._examples(settings, chat)
    for example, conversation in zip(examples, CONVERSATIONS, strict=True):
        ids, trained = tokens_and_trained(tied_model_dir, conversation)
        assert (list(example.ids), list(example.mask)) == (ids, trained)
    (packed,) = sft._micro_batches(examples, len(examples), worker_in(tmp_path, "sft"))
    said, positions = packed.targets_N.tolist(), (packed.predicting_N + 1).tolist()
    assert packed.row.input_ids_1N[0, positions].tolist() == said
    assert said.count(EOS) == sum(role == "assistant" for turns in CONVERSATIONS for role, _ in turns)
    assert packed.num_targets == len(said) and not set(packed.row.starts) & set(positions)


def test_pin_12_the_recipe_itself_starts_at_the_loss_of_that_loop(tied_model_dir, settings, tmp_path):
    runtime = runtime_in(tmp_path, "sft")
    metrics = run_recipe(settings, {"start": tied_model_dir}, tmp_path / "out", runtime)
    expected, gradient = loss_token_by_token(tied_model_dir)
    (line,) = read_steps(tmp_path / "work" / "metrics.jsonl")
    assert metrics["loss_final"] == line["train/loss"] == pytest.approx(expected, abs=1e-5)
    assert line["train/grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-4)
    assert metrics["conversations"] == len(CONVERSATIONS) and metrics["conversations_dropped"] == 0


def test_a_stage_that_is_resumed_reads_no_row_again(tied_model_dir, settings, tmp_path):
    """Its rows are gone; the file of tokens in its work directory is all that it needs."""
    runtime = runtime_in(tmp_path, "sft")
    first = run_recipe(settings, {"start": tied_model_dir}, tmp_path / "out", runtime)
    (tmp_path / "rows.jsonl").unlink()
    shutil.rmtree(tmp_path / "work" / "checkpoints")
    again = run_recipe(settings, {"start": tied_model_dir}, tmp_path / "again", runtime)
    assert list(again) == list(first)
    assert {**again, "tokens_per_second": 0.0} == {**first, "tokens_per_second": 0.0}


def test_a_conversation_without_a_trained_token_in_the_context_is_dropped_and_counted(
    tied_model_dir, settings, tmp_path
):
    long = {"messages": [{"role": "user", "content": "cat " * 200}, {"role": "assistant", "content": "a"}]}
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps(long) + "\n")
    examples, data = sft._examples(settings, ChatTokenizer.load(tied_model_dir))
    assert (len(examples), data["conversations_dropped"]) == (len(CONVERSATIONS), 1)
