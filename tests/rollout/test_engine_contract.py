"""One contract, four engines: vLLM in this process tree, vLLM in a Ray actor, transformers, and the test
fake.
"""

import asyncio

import pytest
from rigs import MAX_MODEL_LEN, Rig, request

from rollout.api import Rollout, Sampling
from rollout.errors import EngineError

pytestmark = pytest.mark.engine


@pytest.fixture(params=["vllm", "hf", "actor", "fake"])
def rig(rigs, request) -> Rig:
    rig = rigs(request.param, tied=True)
    rig.reset()
    return rig


def drawn(rollouts: list[Rollout]) -> list[tuple[int, ...]]:
    return [rollout.response_ids for rollout in rollouts]


async def first_tokens_then(engine, requests, action) -> list[Rollout]:
    """Submit, let a few tokens come, do something, and return what became of the requests."""
    pending = asyncio.ensure_future(engine.submit(requests))
    await asyncio.sleep(0.15)
    await action()
    return await pending


def test_results_come_in_the_order_of_the_requests(rig):
    requests = [
        request(index, prompt=(3,) * (1 + 7 * index % 5), max_tokens=1 + index % 4) for index in range(8)
    ]
    rollouts = rig.submit(requests)
    assert [rollout.request_id for rollout in rollouts] == [f"r-{index}" for index in range(8)]
    assert [rollout.prompt_ids for rollout in rollouts] == [r.prompt_ids for r in requests]
    assert [len(rollout.response_ids) for rollout in rollouts] == [1 + index % 4 for index in range(8)]
    assert [rollout.seed for rollout in rollouts] == list(range(8))


def test_the_same_request_twice_gives_the_same_response(rig):
    first, again = rig.submit([request(5)]), rig.submit([request(5)])
    assert first == again


def test_pin_35_two_samples_of_one_prompt_differ(rig):
    assert len(set(drawn(rig.submit([request(index) for index in range(8)])))) == 8


def test_a_response_does_not_depend_on_what_runs_beside_it(rig):
    requests = [request(index, prompt=(9, 4, 6)[: 1 + index % 3]) for index in range(6)]
    together = rig.submit(requests)
    alone = [rig.submit([one])[0] for one in requests]
    assert drawn(together) == drawn(alone)
    for one, other in zip(together, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_more_requests_than_the_engine_decodes_at_once_are_all_answered(rig):
    rollouts = rig.submit([request(index, max_tokens=2) for index in range(70)])
    assert [rollout.request_id for rollout in rollouts] == [f"r-{index}" for index in range(70)]


def test_long_prompts_that_do_not_fit_one_prefill_step_are_answered_and_repeatable(rig):
    requests = [request(index, prompt=[3 + index] * 600, max_tokens=2) for index in range(6)]
    assert drawn(rig.submit(requests)) == drawn([rig.submit([one])[0] for one in requests])


def test_a_stop_token_ends_the_response_and_is_kept(rig):
    free = rig.submit([request()])[0].response_ids
    stop = free[3]
    (rollout,) = rig.submit([request(stop=[stop])])
    assert rollout.response_ids == free[: free.index(stop) + 1]
    assert len(rollout.logprobs) == len(rollout.response_ids)
    assert rollout.finish_reason == "stop"


def test_pin_9_any_token_of_the_stop_set_ends_the_response(rig):
    free = rig.submit([request()])[0].response_ids
    first = min(free.index(free[2]), free.index(free[5]))
    (rollout,) = rig.submit([request(stop=[free[5], free[2]])])
    assert rollout.response_ids == free[: first + 1]
    assert rollout.finish_reason == "stop"


def test_a_stop_token_in_the_last_place_counts_as_a_stop(rig):
    free = rig.submit([request()])[0].response_ids
    length = free.index(free[3]) + 1
    (rollout,) = rig.submit([request(stop=[free[3]], max_tokens=length)])
    assert rollout.finish_reason == "stop"


def test_only_the_stop_set_ends_a_response_not_the_models_own_end_of_sequence(rig):
    eos = 2
    rollouts = rig.submit([request(index, max_tokens=60, temperature=2.0) for index in range(24)])
    assert any(eos in rollout.response_ids[:-1] for rollout in rollouts)
    assert {rollout.finish_reason for rollout in rollouts} == {"length"}


def test_max_tokens_ends_the_response_with_length(rig):
    (rollout,) = rig.submit([request(max_tokens=5)])
    assert (len(rollout.response_ids), rollout.finish_reason) == (5, "length")


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 1.6])
def test_pin_2_logprobs_are_those_of_the_distribution_sampled_from(rig, temperature):
    rollouts = rig.submit([request(index, temperature=temperature) for index in range(4)])
    assert rig.max_diff(rollouts, temperature=temperature if temperature else 1.0) < 1e-5


def test_sampled_tokens_follow_their_probabilities(rig):
    """First tokens of 1,500 seeds against the oracle's distribution: total variation as small as chance makes
    it.
    """
    rollouts = rig.submit([request(index, max_tokens=1, temperature=0.8) for index in range(1500)])
    counts = {token: sum(r.response_ids == (token,) for r in rollouts) for (token,) in set(drawn(rollouts))}
    frequent = [token for token, count in counts.items() if count >= 40]
    assert frequent
    for token in frequent:
        rollout = next(r for r in rollouts if r.response_ids == (token,))
        probability = 2.718281828459045 ** rig.oracle(rollout, 0.8)[0]
        deviation = (probability * (1 - probability) / 1500) ** 0.5
        assert abs(counts[token] / 1500 - probability) < 4.5 * deviation


def test_greedy_takes_the_most_likely_token_whatever_the_seed(rig):
    one, other = rig.submit([request(0, temperature=0.0, seed=1), request(1, temperature=0.0, seed=2)])
    assert one.response_ids == other.response_ids
    assert all(logprob > -6 for logprob in one.logprobs)


def test_every_token_says_which_weights_drew_it(rig):
    version = rig.run(rig.engine.version())
    (rollout,) = rig.submit([request(max_tokens=3)])
    assert rollout.weight_versions == (version,) * 3


def test_aborted_requests_end_early_and_say_so(rig):
    requests = [request(0, max_tokens=700), request(1, max_tokens=4)]
    aborted, other = rig.run(
        first_tokens_then(rig.engine, requests, lambda: rig.engine.abort(["r-0", "never heard of"]))
    )
    assert aborted.finish_reason == "abort"
    assert len(aborted.response_ids) < 700
    assert len(aborted.response_ids) == len(aborted.logprobs) == len(aborted.weight_versions)
    assert other.finish_reason == "length"


def test_pause_aborts_what_is_in_flight(rig):
    requests = [request(index, max_tokens=700) for index in range(3)]
    rollouts = rig.run(first_tokens_then(rig.engine, requests, rig.engine.pause))
    rig.run(rig.engine.resume())
    assert {rollout.finish_reason for rollout in rollouts} == {"abort"}


def test_requests_that_arrive_during_a_pause_wait_for_resume(rig):
    async def scenario() -> tuple[bool, list[Rollout]]:
        await rig.engine.pause()
        await rig.engine.pause()  # idempotent
        pending = asyncio.ensure_future(rig.engine.submit([request(max_tokens=2)]))
        await asyncio.sleep(0.3)
        held = not pending.done()
        await rig.engine.resume()
        return held, await pending

    held, (rollout,) = rig.run(scenario())
    assert held
    assert rollout.finish_reason == "length"


def test_a_prompt_that_leaves_no_room_is_refused(rig):
    with pytest.raises(EngineError, match=r"r-0|prompt"):
        rig.submit([request(prompt=[5] * MAX_MODEL_LEN)])
    assert rig.submit([request(max_tokens=2)])[0].finish_reason == "length"


def test_a_response_ends_where_the_context_ends(rig):
    (rollout,) = rig.submit([request(prompt=[5] * (MAX_MODEL_LEN - 3), max_tokens=50)])
    assert (len(rollout.response_ids), rollout.finish_reason) == (3, "length")


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0.001},
        {"temperature": -1.0},
        {"temperature": 2.5},
        {"max_tokens": 0},
        {"seed": -1},
        {"seed": 2**63},
    ],
)
def test_settings_that_an_engine_would_silently_change_are_refused(wrong):
    good = {"temperature": 1.0, "max_tokens": 4, "stop_token_ids": (), "seed": 0}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**(good | wrong))
