"""The gate passes when engine and trainer agree, and names the tensors when they do not."""

import math

import pytest
import torch
from rigs import CONFIG, SAME, Rig, logprobs_of
from transformers import AutoModelForCausalLM

from rollout.errors import ParityError
from rollout.parity import ParityGate, ParityReport
from rollout.weight_source import ModuleSource
from rollout.weight_sync import WeightSync

pytestmark = pytest.mark.engine

PROMPTS = [(5, 9, 30), (44, 2), (61, 62, 63, 64), (7,)]


@pytest.fixture(params=["vllm", "hf"])
def rig(rigs, request) -> Rig:
    rig = rigs(request.param, tied=True)
    rig.reset()
    return rig


def gate(rig: Rig, *, temperature: float = 1.0, error: float = 0.0, **limits: float) -> ParityGate:
    """`error` is added to what the trainer says about every token."""
    rig.sync.config = rig.config.model_copy(update=limits)

    def policy_logprobs(prompts, responses, temperature):
        return [
            [logprob + error for logprob in logprobs_of(rig.model, prompt, response, temperature)]
            for prompt, response in zip(prompts, responses, strict=True)
        ]

    return ParityGate(
        rig.sync,
        prompts=PROMPTS,
        stop_token_ids=(2,),
        temperature=temperature,
        seed=100,
        logprobs_of=policy_logprobs,
    )


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_parity_on_fresh_weights_is_at_rounding(rig, temperature):
    report = gate(rig, temperature=temperature).check(rig.version)
    assert report.version == rig.version
    assert 3 <= report.num_tokens <= 36
    assert report.mean_abs_diff <= report.max_abs_diff <= 5e-6


def test_a_trainer_that_moved_without_a_sync_stops_the_run_and_is_named(rig):
    with torch.no_grad():
        rig.model.model.layers[1].mlp.up_proj.weight.mul_(1.3)
        rig.model.model.layers[0].self_attn.k_proj.weight.mul_(-1.0)
    with pytest.raises(ParityError) as error:
        gate(rig).check(rig.version)
    message = str(error.value)
    assert "model.layers.0.self_attn.k_proj.weight; model.layers.1.mlp.up_proj.weight" in message
    assert "q_proj" not in message and "lm_head" not in message and "\n" not in message


def test_a_trainer_that_computes_differently_is_told_that_the_weights_agree(rig):
    with pytest.raises(ParityError, match="the engine holds every tensor"):
        gate(rig, error=2e-4).check(rig.version)


def test_not_a_number_does_not_pass(rig):
    with pytest.raises(ParityError):
        gate(rig, error=math.nan).check(rig.version)


def test_the_limit_is_the_configs(rig):
    assert gate(rig, error=2e-4, parity_max_abs_diff=1e-3).check(rig.version).max_abs_diff == pytest.approx(
        2e-4, rel=0.1
    )


def test_in_bf16_the_mean_decides(rig):
    """The rule alone, on an fp32 engine: log-probs 0.04 off on average pass a ratio of 1.05, 0.06 do not."""
    source = ModuleSource(rig.model, dtype="bfloat16")
    sync = WeightSync(source, engine=rig.engine, loop=rig.loop, config=rig.config)
    for error, passes in ((0.04, True), (0.06, False)):
        one = gate(rig, error=error)
        one._sync = sync
        rollouts = one.probe(rig.version)
        if passes:
            assert one.compare(rollouts).mean_abs_diff == pytest.approx(0.04, abs=1e-4)
        else:
            with pytest.raises(ParityError, match=r"0\.06 on average"):
                one.compare(rollouts)
    sync.close()


def test_every_tensor_is_compared_after_a_sync_and_what_differs_is_named(rig):
    """A change of a ten-thousandth, which no limit on log-probs in bf16 would show."""
    one = gate(rig)
    assert one.compare_tensors(rig.version) == SAME
    with torch.no_grad():
        rig.model.model.layers[1].self_attn.q_proj.weight.mul_(1 + 1e-4)
    with pytest.raises(ParityError) as error:
        one.compare_tensors(rig.version)
    message = str(error.value)
    assert f"after the sync of weight version {rig.version}, which reported no error" in message
    assert "trainer's model.layers.1.self_attn.q_proj.weight: it samples" in message and "\n" not in message


@pytest.mark.parametrize(
    ("dtype", "limits", "mean", "most", "passes"),
    [
        ("float32", {}, 1e-6, 1e-4, True),
        ("float32", {}, 1e-6, 1.1e-4, False),
        ("float32", {}, math.nan, math.nan, False),
        ("bfloat16", {}, 0.048, 3.0, True),
        ("bfloat16", {}, 0.049, 0.05, False),
        ("bfloat16", {}, math.nan, math.nan, False),
        ("bfloat16", {"parity_max_mean_ratio": 3.0}, 1.09, 2.0, True),
        ("bfloat16", {"parity_max_mean_ratio": 3.0}, 1.2, 2.0, False),
        ("bfloat16", {"parity_max_mean_ratio": 1e300}, 1e3, 1e3, False),
    ],
)
def test_in_fp32_the_maximum_decides_and_in_bf16_the_exponential_of_the_mean(
    tied_model_dir, dtype, limits, mean, most, passes
):
    model = AutoModelForCausalLM.from_pretrained(tied_model_dir)
    config = CONFIG.model_copy(update=limits)
    sync = WeightSync(ModuleSource(model, dtype=dtype), engine=None, loop=None, config=config)
    one = ParityGate(
        sync, prompts=PROMPTS, stop_token_ids=(2,), temperature=1.0, seed=0, logprobs_of=lambda *_: []
    )
    report = ParityReport(sample="probe", version=0, num_tokens=9, max_abs_diff=most, mean_abs_diff=mean)
    assert one.accepts(report) == passes


def test_one_token_that_is_not_a_number_is_not_hidden_by_the_others():
    for place in range(3):
        diffs_N = torch.full((3,), 0.01)
        diffs_N[place] = math.nan
        report = ParityReport.of(diffs_N, sample="probe", version=0)
        assert math.isnan(report.max_abs_diff) and math.isnan(report.mean_abs_diff)


def test_a_probe_sampled_under_another_version_is_refused(rig):
    with pytest.raises(ParityError, match=f"version {rig.version + 1} was sampled under \\[{rig.version}\\]"):
        gate(rig).check(rig.version + 1)
