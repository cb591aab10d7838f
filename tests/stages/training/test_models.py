"""Models: heads, normalisers, precision, and what a plain `transformers` user of a saved directory gets."""

import math

import pytest
import torch
from plain_models import response_logprobs, response_values
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)

from stages.data.packing import pack
from stages.errors import ModelError
from stages.training.forwards import (
    logprobs_in_packs,
    pack_responses,
    scores_in_packs,
    sequence_scores,
    with_end,
)
from stages.training.fsdp import Placed
from stages.training.models import (
    ScoreNormaliser,
    build_causal_lm,
    freeze,
    full_state,
    load_causal_lm,
    load_reward_model,
    reward_from_causal_lm,
    save_model,
    set_stop_tokens,
    value_from_reward_model,
)
from stages.training.packed_attention import PACKED_ATTENTION

CPU = torch.device("cpu")
PAD, EOS = 0, 2
SEQUENCES = [(5, 9, 30, 2), (7, 8, 9, 10, 11, 2), (40, 2), (17, 3, 2)]


@pytest.fixture(scope="module")
def reward_dir(tied_model_dir, tmp_path_factory):
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("reward")
    model = reward_from_causal_lm(tied_model_dir, pad_token_id=PAD)
    save_model(model, directory, full_state(model))
    ScoreNormaliser(mean=0.25, std=2.0).save(directory)
    return directory


def plain_scores(directory, sequences, side):
    """What a user without this project computes: a padded batch through transformers."""
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    width = max(len(sequence) for sequence in sequences)
    rows, masks = [], []
    for sequence in sequences:
        fill = [PAD] * (width - len(sequence))
        rows.append([*fill, *sequence] if side == "left" else [*sequence, *fill])
        masks.append(
            [int(place >= len(fill) if side == "left" else place < len(sequence)) for place in range(width)]
        )
    with torch.no_grad():
        return model(torch.tensor(rows), attention_mask=torch.tensor(masks)).logits[:, 0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_pin_13_a_score_is_the_same_padded_left_or_right_alone_and_in_a_pack(reward_dir, side):
    model = Placed(freeze(load_reward_model(reward_dir)))
    packed = scores_in_packs(model, SEQUENCES, micro_batch_size=3, device=CPU)
    alone = torch.cat([sequence_scores(model, [sequence], device=CPU) for sequence in SEQUENCES])
    torch.testing.assert_close(packed, alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(packed, plain_scores(reward_dir, SEQUENCES, side), atol=2e-6, rtol=0)


def test_pin_13_a_saved_reward_model_never_pads_with_an_end_token(reward_dir):
    config = AutoModelForSequenceClassification.from_pretrained(reward_dir).config
    assert config.pad_token_id == PAD != EOS


def test_a_pad_token_that_the_embedding_has_no_row_for_does_not_keep_a_saved_model_from_loading(
    tied_model_dir, tmp_path
):
    """Tokenizers are given a pad token more often than models are given a row for it."""
    model = load_causal_lm(tied_model_dir)
    rows = model.inner.config.vocab_size
    set_stop_tokens(model, eos_token_id=EOS, stop_token_ids=[EOS], pad_token_id=rows)
    save_model(model, tmp_path, full_state(model))
    again = reward_from_causal_lm(tmp_path, pad_token_id=rows)
    assert load_causal_lm(tmp_path).inner.config.pad_token_id is again.inner.config.pad_token_id is None


def test_pin_13_a_cut_off_response_is_scored_with_its_end_token_and_an_ended_one_gets_no_second():
    assert with_end((4, 5), EOS, (EOS, 9)) == (4, 5, EOS)
    assert with_end((4, 5, EOS), EOS, (EOS, 9)) == (4, 5, EOS)


def test_pin_13_a_response_that_ended_with_another_stop_token_is_scored_with_the_end_of_turn_instead():
    assert with_end((4, 5, 9), EOS, (EOS, 9)) == (4, 5, EOS)
    assert with_end((9, 5), EOS, (EOS, 9)) == (9, 5, EOS)
    assert with_end((9,), EOS, (EOS, 9)) == (EOS,)


def test_pin_14_the_head_starts_with_std_one_over_root_of_width_plus_one(tied_model_dir):
    torch.manual_seed(1)
    heads = [reward_from_causal_lm(tied_model_dir, pad_token_id=PAD).head.weight.flatten() for _ in range(40)]
    width = len(heads[0])
    assert torch.cat(heads).std().item() == pytest.approx(1 / math.sqrt(width + 1), rel=0.05)
    assert all(parameter.abs().sum() > 0 for parameter in heads)


def test_pin_15_the_normaliser_is_reloaded_and_applied(tmp_path):
    ScoreNormaliser(mean=0.5, std=2.0).save(tmp_path)
    assert ScoreNormaliser.load(tmp_path)(torch.tensor([2.5, 0.5])).tolist() == [1.0, 0.0]


def test_pin_15_a_value_model_has_the_normaliser_folded_into_its_head(reward_dir):
    raw = freeze(load_reward_model(reward_dir))
    value = freeze(value_from_reward_model(reward_dir))
    row = pack(SEQUENCES)
    positions = torch.arange(row.num_tokens)
    scores = raw(row.model_inputs(), positions)
    values = value(row.model_inputs(), positions)
    torch.testing.assert_close(values, (scores - 0.25) / 2.0, atol=1e-6, rtol=0)


def test_pin_15_a_reward_model_without_a_normaliser_is_refused(tied_model_dir):
    with pytest.raises(ModelError, match=r"score_normaliser\.json: missing"):
        ScoreNormaliser.load(tied_model_dir)


def test_pin_17_a_reward_model_without_its_head_is_an_error_and_not_a_random_head(tied_model_dir):
    with pytest.raises(ModelError, match="no score head"):
        load_reward_model(tied_model_dir)


def test_a_directory_without_a_model_or_with_other_weights_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_causal_lm(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no safetensors"):
        load_causal_lm(tmp_path)


def test_pin_5_dropout_named_in_a_model_directory_is_never_active(tied_model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tied_model_dir)
    model.config.attention_dropout = 0.5
    model.save_pretrained(tmp_path)
    for load in (load_causal_lm, lambda directory: reward_from_causal_lm(directory, pad_token_id=PAD)):
        loaded = load(tmp_path).train()
        assert loaded.inner.config.attention_dropout == 0.0
        assert all(
            module.attention_dropout == 0.0
            for module in loaded.modules()
            if hasattr(module, "attention_dropout")
        )
    policy = load_causal_lm(tmp_path)
    packed = pack_responses([(5, 6)], [(7, 8, 9)], max_length=3, device=CPU)
    assert torch.equal(
        response_logprobs(policy.train(), packed, temperature=1.0),
        response_logprobs(policy.eval(), packed, temperature=1.0),
    )


@pytest.mark.parametrize("load", ["policy", "reward_head", "reward_model"])
def test_pin_5_dropout_under_gpt2s_names_is_never_active(tied_model_dir, tmp_path, load):
    """GPT-2 calls its dropouts attn_pdrop, resid_pdrop and embd_pdrop; all three are active by default."""
    torch.manual_seed(0)
    options = {"attn_pdrop": 0.4, "resid_pdrop": 0.4, "embd_pdrop": 0.4, "pad_token_id": PAD}
    config = GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=2, n_positions=64, **options)
    if load == "reward_model":
        config.num_labels = 1
        GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
        model = load_reward_model(tmp_path)
    else:
        GPT2LMHeadModel(config).save_pretrained(tmp_path)
        model = (
            load_causal_lm(tmp_path)
            if load == "policy"
            else reward_from_causal_lm(tmp_path, pad_token_id=PAD)
        )
    assert [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)] == [0.0] * 7

    packed = pack_responses([(5, 6), (7,)], [(7, 8, 9), (4,)], max_length=3, device=CPU)
    model.train()
    if load == "policy":
        first, again = (response_logprobs(model, packed, temperature=1.0) for _ in range(2))
    else:
        first, again = (response_values(model, packed) for _ in range(2))
    assert torch.equal(first, again)


def test_pin_8_masks_come_from_lengths_so_pad_and_end_ids_inside_a_response_are_scored(tied_model_dir):
    model = freeze(load_causal_lm(tied_model_dir))
    response = (PAD, 7, EOS, EOS)
    packed = pack_responses([(5, EOS), (9,)], [response, (4,)], max_length=5, device=CPU)
    assert packed.mask_BT.tolist() == [[True] * 4 + [False], [True] + [False] * 4]
    with torch.no_grad():
        logits_TV = model.inner(torch.tensor([[5, EOS, *response]]), use_cache=False).logits[0, 1:5]
    expected = logits_TV.log_softmax(-1)[range(4), list(response)]
    scored = response_logprobs(model, packed, temperature=1.0)[0, :4]
    torch.testing.assert_close(scored, expected, atol=1e-6, rtol=0)


def test_pin_7_every_forward_switches_the_cache_off_and_passes_no_mask(tied_model_dir, reward_dir):
    calls = []

    def remember(module, args, kwargs):
        calls.append(kwargs)

    policy, reward = load_causal_lm(tied_model_dir), load_reward_model(reward_dir)
    policy.inner.register_forward_pre_hook(remember, with_kwargs=True)
    reward.inner.base_model.register_forward_pre_hook(remember, with_kwargs=True)
    packed = pack_responses([(5, 6), (7,)], [(7, 8, 9), (4,)], max_length=3, device=CPU)
    response_logprobs(policy, packed, temperature=1.0)
    response_values(reward, packed)
    sequence_scores(Placed(reward), SEQUENCES, device=CPU)
    assert len(calls) == 3
    assert all(call["use_cache"] is False and call.get("attention_mask") is None for call in calls)


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
def test_pin_7_a_tokens_log_prob_does_not_change_with_its_neighbours_in_the_pack(tied_model_dir, mode):
    model = load_causal_lm(tied_model_dir).train(mode == "train")
    prompts, responses = [(5, 6, 7), (9,), (30, 31)], [(8, 2), (10, 11, 12, 2), (32, 2)]

    def scored(indices):
        packed = pack_responses(
            [prompts[i] for i in indices], [responses[i] for i in indices], max_length=4, device=CPU
        )
        with torch.set_grad_enabled(mode != "no_grad"):
            return response_logprobs(model, packed, temperature=1.0).detach()

    alone = torch.cat([scored([index]) for index in range(3)])
    for order in ([0, 1, 2], [2, 0, 1]):
        torch.testing.assert_close(scored(order), alone[order], atol=1e-6, rtol=0)


def test_pin_2_log_probs_divide_the_logits_by_the_temperature(tied_model_dir):
    model = freeze(load_causal_lm(tied_model_dir))
    prompt, response = (5, 6, 7), (8, 9)
    with torch.no_grad():
        logits = model.inner(torch.tensor([[*prompt, *response]]), use_cache=False).logits[0, 2:4]
    expected = torch.log_softmax(logits / 0.7, -1)[[0, 1], list(response)]
    (scored,) = logprobs_in_packs(
        Placed(model), [prompt], [response], temperature=0.7, micro_batch_size=1, device=CPU
    )
    torch.testing.assert_close(scored, expected, atol=1e-6, rtol=0)


def test_pin_33_the_gradient_of_the_whole_model_does_not_depend_on_how_a_batch_is_split(tied_model_dir):
    prompts, responses = (
        [(5, 6, 7), (9,), (30, 31), (12, 13)],
        [(8, 2), (10, 11, 12, 2), (32, 2), (14, 15, 2)],
    )
    num_tokens = sum(len(response) for response in responses)

    def gradient(splits):
        model = load_causal_lm(tied_model_dir)
        for members in splits:
            packed = pack_responses(
                [prompts[i] for i in members], [responses[i] for i in members], max_length=4, device=CPU
            )
            (-response_logprobs(model, packed, temperature=1.0).sum() / num_tokens).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    whole = gradient([[0, 1, 2, 3]])
    for splits in ([[0, 1], [2, 3]], [[0], [1], [2], [3]], [[3, 0, 2], [1]]):
        assert (gradient(splits) - whole).norm() <= 1e-6 * whole.norm()


def test_a_model_built_from_the_config_is_the_one_described():
    from stages.config.model import ModelConfig

    config = ModelConfig(
        layers=2, hidden_size=64, intermediate_size=96, num_heads=2, num_kv_heads=1, context_length=64
    )
    model = build_causal_lm(config, vocab_size=300, eos_token_id=1, pad_token_id=3).inner
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.vocab_size) == (2, 64, 300)
    assert model.config._attn_implementation == PACKED_ATTENTION
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_pin_39_a_saved_model_reloads_in_transformers_with_the_same_greedy_output(tied_model_dir, tmp_path):
    model = load_causal_lm(tied_model_dir)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.02)
    save_model(model, tmp_path, full_state(model))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": PAD}
    assert torch.equal(model.inner.generate(prompt, **options), reloaded.generate(prompt, **options))
