"""bf16: what computes in bf16, what stays fp32, and that policy and frozen reference still agree exactly."""

import pytest
import torch
import torch.distributed as dist
from inline import worker_in
from plain_models import take_step
from ppo_inputs import Parts, invented
from safetensors.torch import load_file

from stages.config.data import DataSource
from stages.config.ppo import PPOConfig
from stages.config.sft import SFTConfig
from stages.data.packing import pack
from stages.objectives.logprobs import token_logprobs
from stages.training.distributed import place
from stages.training.models import (
    ScoreNormaliser,
    freeze,
    full_state,
    load_causal_lm,
    reward_from_causal_lm,
    save_model,
)
from stages.training.optimize import Optimizer

CPU = torch.device("cpu")
PAD, EOS = 0, 2
PPO = PPOConfig(
    data=[DataSource(path="unused")],
    precision="bf16",
    max_steps=2,
    num_prompts=4,
    batch_size=2,
    micro_batch_size=2,
    max_response_tokens=6,
    warmup_frac=0.0,
)
SFT = SFTConfig(data=[DataSource(path="unused")], precision="bf16", warmup_frac=0.0)


@pytest.fixture
def worker(tmp_path):
    """A worker whose process group, which bf16 training opens, ends with the test."""
    yield worker_in(tmp_path, "ppo")
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def inputs(tied_model_dir, tmp_path_factory):
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("reward")
    model = reward_from_causal_lm(tied_model_dir, pad_token_id=PAD)
    save_model(model, directory, full_state(model))
    ScoreNormaliser(mean=0.0, std=1.0).save(directory)
    return {"policy": tied_model_dir, "reward_model": directory}


def four_trajectories():
    generator = torch.Generator().manual_seed(1)
    trajectories = []
    for index in range(4):
        prompt, response = (
            tuple(torch.randint(5, 300, (n,), generator=generator).tolist()) for n in (3, 2 + index)
        )
        trajectories.append(invented(index, prompt, (*response, EOS)))
    return trajectories


def test_in_bf16_the_kl_to_the_reference_is_exactly_zero_before_any_update(inputs, worker):
    batch = Parts(PPO, inputs, worker).judged(four_trajectories())
    assert torch.equal(batch.kl_B, torch.zeros(4))
    assert torch.equal(batch.anchor_logprobs_BT, batch.reference_logprobs_BT)
    assert batch.anchor_logprobs_BT.dtype == torch.float32


def test_pin_4_in_bf16_too_the_first_ratio_is_exactly_one_and_updates_leave_the_reference(inputs, worker):
    parts = Parts(PPO, inputs, worker)
    batch = parts.judged(four_trajectories())
    assert parts.learner.update(0, parts.experiences(batch))["ppo/ratio_first"] == 0.0
    assert float(parts.judges.judge_packs(batch.packs).kl_B.abs().max()) > 0


@pytest.mark.parametrize("trained", [True, False])
def test_in_bf16_the_rotary_frequencies_stay_fp32(tied_model_dir, worker, trained):
    """In bf16 they would be other positions: the eighth bit of a frequency is a token's distance in 256."""
    plain = load_causal_lm(tied_model_dir)
    model = load_causal_lm(tied_model_dir)
    place(model if trained else freeze(model), worker, precision="bf16", trained=trained)
    expected = {name: buffer for name, buffer in plain.named_buffers() if "inv_freq" in name}
    found = {name: buffer for name, buffer in model.named_buffers() if "inv_freq" in name}
    assert expected and found.keys() == expected.keys()
    for name, buffer in found.items():
        assert buffer.dtype == torch.float32 and torch.equal(buffer, expected[name])


def test_in_bf16_a_frozen_model_holds_bf16_and_a_trained_one_fp32(inputs, worker):
    models = Parts(PPO, inputs, worker).models
    dtypes = {
        name: {parameter.dtype for parameter in getattr(models, name).model.parameters()}
        for name in ("policy", "reference", "reward_model", "value")
    }
    assert dtypes["reference"] == dtypes["reward_model"] == {torch.bfloat16}
    assert dtypes["policy"] == dtypes["value"] == {torch.float32}


def test_bf16_training_lowers_the_loss_and_keeps_and_saves_fp32_masters(tied_model_dir, worker, tmp_path):
    model = load_causal_lm(tied_model_dir)
    before = {name: tensor.clone() for name, tensor in model.inner.state_dict().items()}
    place(model, worker, precision="bf16", trained=True)
    optimizer = Optimizer(model, SFT, lr=1e-3, max_steps=30)
    row = pack([(5, 9, 30, 31, 2), (7, 8, 9, 10, 11, 2)])
    targets = torch.tensor([1, 2, 3, 4, 6, 7, 8, 9, 10])
    computed_in = set()
    model.inner.model.norm.register_forward_hook(
        lambda _module, _inputs, output: computed_in.add(output.dtype)
    )

    def loss_of(_):
        logits_KV = model(row.model_inputs(), targets - 1)[0]
        assert logits_KV.dtype == torch.float32, "the head is computed in fp32, on both sides"
        return -token_logprobs(logits=logits_KV, targets=row.input_ids_1N[0, targets], temperature=1.0).mean()

    losses = [take_step(optimizer, step, [None], loss_of).loss for step in range(30)]
    assert computed_in == {torch.bfloat16} and losses[-1] < 0.5 * losses[0]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    state = optimizer.adamw.state.values()
    assert {moments[key].dtype for moments in state for key in ("exp_avg", "exp_avg_sq")} == {torch.float32}

    save_model(model, tmp_path / "saved", full_state(model))
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    rounded = [torch.equal(tensor, tensor.bfloat16().float()) for tensor in saved.values()]
    assert not any(rounded), "masters are finer than bf16"
    assert all(not torch.equal(tensor, before[name]) for name, tensor in saved.items())
    again = load_causal_lm(tmp_path / "saved")
    for name, tensor in full_state(model).items():
        assert torch.equal(tensor, again.inner.state_dict()[name])


def test_parameters_are_the_fp32_masters_again_after_a_forward_without_gradient(inputs, worker):
    policy = load_causal_lm(inputs["policy"])
    place(policy, worker, precision="bf16", trained=True)
    with torch.no_grad():
        policy(pack([[5, 6, 7]]).model_inputs(), torch.tensor([0, 1]))
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
