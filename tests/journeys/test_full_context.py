"""At full context: responses that are cut off where the context ends, scored with the end token they lack.

GPT-2 looks positions up in a table as long as the context, so that one token too many anywhere is an error.
"""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inline import run_recipe, runtime_in, worker_in
from ppo_inputs import EOS, Parts, invented, ppo_inputs

from rollout.config import EngineConfig
from stages import evaluate, reward
from stages.config.data import DataSource
from stages.config.evaluate import EvaluateConfig, EvaluateSettings
from stages.config.model import ModelConfig
from stages.config.ppo import PPOConfig, PPOSettings
from stages.config.reward import RewardConfig, RewardSettings
from stages.data.chat.tokenizer import ChatTokenizer
from stages.data.reading.records import Message
from stages.errors import DataError
from stages.training import forwards
from stages.training.forwards import with_end

CONTEXT, RESPONSE = 32, 6
MODEL = ModelConfig(context_length=CONTEXT)
HF = EngineConfig(engine="hf", parity_num_prompts=2, parity_max_tokens=16)
STEPS = {"batch_size": 4, "micro_batch_size": 4, "max_steps": 1}
BASE_PROMPT = "{prompt}"


@pytest.fixture(scope="module")
def inputs(make_gpt2_dir, tmp_path_factory) -> dict[str, Path]:
    """sft and reward model of 32 positions."""
    return ppo_inputs(make_gpt2_dir(CONTEXT), tmp_path_factory.mktemp("reward"))


def prompts_of(chat: ChatTokenizer, num_tokens: int) -> list[str]:
    """Four texts whose prompts have exactly `num_tokens` tokens."""
    texts = []
    for letter in "bfjk":
        text = letter
        while len(chat.prompt_ids((Message(role="user", content=text),))) < num_tokens:
            text += letter
        assert len(chat.prompt_ids((Message(role="user", content=text),))) == num_tokens
        texts.append(text)
    return texts


def fitting_and_not(inputs) -> list[str]:
    """Four prompts that leave room for a response and its end, and four that are a token too long for it."""
    chat = ChatTokenizer.load(inputs["policy"])
    return prompts_of(chat, CONTEXT - RESPONSE - 1) + prompts_of(chat, CONTEXT - RESPONSE)


def written(path: Path, rows: list[dict]) -> list[DataSource]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [DataSource(path=str(path))]


@pytest.fixture
def scored(monkeypatch) -> list[tuple[int, ...]]:
    """Every sequence that a reward model reads."""
    read = []
    sequence_scores = forwards.sequence_scores

    def remember(model, sequences, *, device):
        read.extend(map(tuple, sequences))
        return sequence_scores(model, sequences, device=device)

    monkeypatch.setattr(forwards, "sequence_scores", remember)
    monkeypatch.setattr("stages.rl.roles.sequence_scores", remember)
    return read


def check_full(scored, *, num_at_least: int) -> None:
    full = [sequence for sequence in scored if len(sequence) == CONTEXT]
    assert len(full) >= num_at_least
    assert all(sequence[-1] == EOS and len(sequence) <= CONTEXT for sequence in scored)


def test_ppo_scores_responses_that_the_context_cut_off(inputs, tmp_path, scored):
    rows = [{"prompt": text} for text in fitting_and_not(inputs)]
    config = PPOConfig(
        data=written(tmp_path / "prompts.jsonl", rows),
        num_prompts=4,
        max_response_tokens=RESPONSE,
        truncation="bootstrap",
        **STEPS,
    )
    settings = PPOSettings(seed=1, model=MODEL, ppo=config, rollout=HF)
    metrics = run_recipe(settings, inputs, tmp_path / "out", runtime_in(tmp_path, "ppo"))
    assert metrics["prompts"] == 4 and metrics["prompts_dropped"] == 4
    check_full(scored, num_at_least=3)


def test_one_token_more_would_be_one_too_many(inputs, tmp_path):
    """What a table of positions says to a response of the length that the prompt leaves without its end."""
    config = PPOConfig(data=[DataSource(path="unused")], max_response_tokens=RESPONSE)
    parts = Parts(config, inputs, worker_in(tmp_path, "ppo"))

    def judged(num_prompt_tokens):
        trajectory = invented(0, (7,) * num_prompt_tokens, (9,) * RESPONSE, "length")
        return parts.judged([trajectory]).scores_B

    room = MODEL.max_prompt_tokens(RESPONSE)
    assert room == CONTEXT - RESPONSE - 1 and judged(room).isfinite().all()
    with pytest.raises(IndexError):
        judged(room + 1)


def reward_settings(path: Path, texts: list[str], **changes) -> RewardSettings:
    rows = [{"prompt": text, "chosen": "oh", "rejected": "o"} for text in texts]
    own = {"heldout_frac": 0.5, "min_accuracy": 0.0, "normaliser_prompts": 8}
    config = RewardConfig(data=written(path, rows), **STEPS | own | changes)
    ppo_config = PPOConfig(data=[DataSource(path="x")], max_response_tokens=RESPONSE, temperature=0.7)
    return RewardSettings(seed=1, model=MODEL, reward=config, rollout=HF, ppo_sampling=ppo_config.sampling)


def test_the_normaliser_scores_responses_that_the_context_cut_off_sampled_as_ppo_samples(
    inputs, tmp_path, scored, monkeypatch
):
    asked = []
    generate = reward.open_engines

    def remembering(*args, **options):
        opened = generate(*args, **options)

        class Opened:
            def __enter__(self):
                client = opened.__enter__()
                submit = client.generate
                client.generate = lambda requests: asked.extend(requests) or submit(requests)
                return client

            def __exit__(self, *error):
                return opened.__exit__(*error)

        return Opened()

    monkeypatch.setattr(reward, "open_engines", remembering)
    settings = reward_settings(tmp_path / "pairs.jsonl", fitting_and_not(inputs))
    runtime = runtime_in(tmp_path, "reward")
    metrics = run_recipe(settings, {"start": inputs["policy"]}, tmp_path / "out", runtime)
    assert metrics["score_responses"] == 4
    assert {(request.sampling.max_tokens, request.sampling.temperature) for request in asked} == {
        (RESPONSE, 0.7)
    }
    assert {len(request.prompt_ids) for request in asked} == {CONTEXT - RESPONSE - 1} and len(asked) == 4
    check_full(scored, num_at_least=3)


@pytest.mark.parametrize(
    ("own_length", "key", "room"),
    [(None, "ppo.max_response_tokens", 25), (8, "reward.normaliser_max_response_tokens", 23)],
)
def test_prompts_too_long_for_the_normaliser_name_the_setting_that_says_so(
    inputs, tmp_path, own_length, key, room
):
    chat = ChatTokenizer.load(inputs["policy"])
    settings = reward_settings(
        tmp_path / "pairs.jsonl",
        prompts_of(chat, CONTEXT - RESPONSE),
        normaliser_max_response_tokens=own_length,
    )
    runtime = runtime_in(tmp_path, "reward")
    with pytest.raises(DataError, match=rf"of at most {room} tokens to sample .*; raise .*, or lower {key}$"):
        run_recipe(settings, {"start": inputs["policy"]}, tmp_path / "out", runtime)
    assert not (tmp_path / "work" / "metrics.jsonl").exists(), "said before training"


def test_evaluation_scores_responses_that_the_context_cut_off_the_base_models_answer_too(
    inputs, tmp_path, scored
):
    """A model of random weights answers with bytes that are no text: encoded again, they are three times as
    many tokens.
    """
    chat = ChatTokenizer.load(inputs["policy"])
    config = EvaluateConfig(
        prompts=written(tmp_path / "prompts.jsonl", [{"prompt": text} for text in fitting_and_not(inputs)]),
        max_response_tokens=RESPONSE,
        base_prompt=BASE_PROMPT,
    )
    settings = EvaluateSettings(seed=1, model=MODEL, evaluate=config, rollout=HF)
    given = {
        "base": inputs["policy"],
        "sft": inputs["policy"],
        "reward_model": inputs["reward_model"],
        "ppo": inputs["policy"],
    }
    metrics = run_recipe(settings, given, tmp_path / "out", runtime_in(tmp_path, "evaluate"))
    assert metrics["prompts"] == 4
    check_full(scored, num_at_least=7)
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").open()]
    assert any(len(chat.response_ids(line["base"]["response"])) > RESPONSE + 1 for line in lines)


@given(context=st.integers(16, 64), response=st.integers(1, 14), ends=st.booleans(), data=st.data())
def test_a_prompt_that_is_let_in_its_response_and_its_end_never_exceed_the_context(
    context, response, ends, data
):
    room = ModelConfig(context_length=context).max_prompt_tokens(response)
    prompt = [7] * data.draw(st.integers(1, room))
    answer = [9] * data.draw(st.integers(1, response))
    answer = [*answer[:-1], EOS] if ends else answer
    scored = (*prompt, *with_end(answer, EOS, (EOS,)))
    assert len(scored) <= context and scored[-1] == EOS
    assert (len(scored) == context) == (len(prompt) == room and len(answer) == response and not ends)


@given(prompt=st.lists(st.integers(3, 9), max_size=19), answer=st.lists(st.integers(3, 9), max_size=60))
def test_an_answer_that_is_encoded_again_is_cut_to_the_context_and_keeps_its_end(prompt, answer):
    within = evaluate._within(20, tuple(prompt), (*answer, EOS))
    assert within[-1] == EOS and within[: len(prompt)] == tuple(prompt)
    assert len(within) == min(20, len(prompt) + len(answer) + 1)
    assert within[len(prompt) : -1] == tuple(answer[: len(within) - len(prompt) - 1])
