"""The balance loss in training: transformers' own number, per micro-batch, weighed by tokens."""

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from families.table import FAMILIES
from inline import worker_in
from torch import Tensor

from stages.data.packing import PackedRow, pack
from stages.errors import ModelError
from stages.objectives.balance import load_balancing_loss
from stages.training.distributed import place
from stages.training.fsdp import outputs_of
from stages.training.model_rules import check_model_config
from stages.training.models import CausalLM, load_causal_lm
from stages.training.optimize import Tally
from stages.training.randomness import recompute_activations
from stages.training.routing import check_balanced, router_metrics, with_balance
from stages.training.trainable import Reads, TermLoss

BALANCED = [
    *("mixtral", "qwen3_moe", "olmoe", "qwen2_moe", "granitemoe", "granitemoeshared"),
    *("phimoe", "gpt_oss", "jetmoe", "flex_olmo", "minimax_m2", "ernie4_5_moe", "dbrx", "mellum"),
    *("laguna", "granitemoe_swa"),
]
NOT_BALANCED = ["llama", "gpt2", "deepseek_v3", "glm4_moe", "afmoe"]  # the last three balance by a bias
SEQUENCES = [[5, 6, 7, 8, 9], [10, 11, 12], [20, 21, 22, 23, 24, 25, 26], [30, 31]]
NUM_TOKENS = sum(map(len, SEQUENCES))
COEF = 0.5


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A pack."""

    row: PackedRow
    predicting_N: Tensor
    targets_N: Tensor


def model_of(name: str) -> CausalLM:
    return CausalLM(FAMILIES[name].make())


def term_of(
    model: CausalLM, sequences: list[list[int]], *, coef: float, num_tokens: int, weight: float = 1.0
) -> TermLoss:
    """A micro-batch's share of a step of `num_tokens`: `weight` times a sum over tokens, and its balance."""
    row = pack(sequences)
    positions_N, ids_N = torch.arange(row.num_tokens), row.input_ids_1N[0]
    asked = Asked(row=row, predicting_N=positions_N, targets_N=ids_N)
    now = outputs_of(model, asked, Reads(logprobs=True, router_loss=True, temperature=1.0))
    term = TermLoss(loss=-weight * now.logprobs_N.sum() / num_tokens)
    share = row.num_tokens / num_tokens
    return with_balance(term, now, coef=coef, num_tokens=row.num_tokens, share=share)


def split_loss(model: CausalLM, split: list[int], *, coef: float = COEF) -> Tensor:
    """The loss of a step over SEQUENCES in micro-batches of `split` sequences."""
    losses, start = [], 0
    for size in split:
        part = SEQUENCES[start : start + size]
        losses.append(term_of(model, part, coef=coef, num_tokens=NUM_TOKENS).loss)
        start += size
    return torch.stack(losses).sum()


def watched(*terms: TermLoss) -> dict[str, float]:
    """The metrics of a window over these."""
    tally = Tally()
    for term in terms:
        tally.add(term)
    return router_metrics(tally.sums)


def gradient(model: CausalLM, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def balance_by_transformers(model: CausalLM, sequences: list[list[int]]) -> Tensor:
    return model.inner(**pack(sequences).model_inputs(), output_router_logits=True).aux_loss


@pytest.mark.parametrize("name", BALANCED)
def test_the_balance_loss_is_the_one_transformers_computes_for_the_family(name):
    model = model_of(name)
    assert model.routers
    found = split_loss(model, [4]) - split_loss(model, [4], coef=0.0)
    wanted = COEF * balance_by_transformers(model, SEQUENCES)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert wanted > 0.5 * model.inner.num_experts_per_tok


@pytest.mark.parametrize("name", NOT_BALANCED)
def test_a_coefficient_for_a_model_that_has_no_balance_loss_is_refused_in_a_line(name):
    with pytest.raises(ModelError, match=r"^sft\.router_aux_loss_coef: .* no balance loss .* set 0$"):
        check_balanced(model_of(name).inner, "sft.router_aux_loss_coef")
    assert split_loss(model_of(name), [4]).isfinite()


def test_without_routers_nothing_is_measured_and_nothing_is_added():
    term = term_of(model_of("llama"), SEQUENCES, coef=COEF, num_tokens=NUM_TOKENS)
    assert term.sums == {}
    assert torch.equal(term.loss, split_loss(model_of("llama"), [4], coef=0.0))


def test_pin_33_of_a_mixtures_gradient_only_the_balance_loss_depends_on_the_split():
    model = model_of("mixtral")
    whole = gradient(model, split_loss(model, [4], coef=0.0))
    for split in ([1, 3], [2, 2], [1, 1, 1, 1]):
        found = gradient(model, split_loss(model, split, coef=0.0))
        assert (found - whole).norm() <= 1e-6 * whole.norm()
    with_balance = gradient(model, split_loss(model, [4]))
    halved = gradient(model, split_loss(model, [2, 2]))
    assert (halved - with_balance).norm() > 1e-3 * whole.norm()


@pytest.mark.parametrize("split", [[4], [1, 3], [2, 2], [1, 1, 1, 1]])
def test_pin_33_the_balance_loss_of_a_step_is_the_mean_of_its_micro_batches_weighed_by_tokens(split):
    """The exception to the pin, and its rule: value and gradient."""
    model = model_of("mixtral")
    wanted, start = split_loss(model, [4], coef=0.0), 0
    num_tokens = sum(map(len, SEQUENCES))
    for size in split:
        part = SEQUENCES[start : start + size]
        start += size
        wanted = wanted + COEF * sum(map(len, part)) / num_tokens * balance_by_transformers(model, part)
    found = split_loss(model, split)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    expected = gradient(model, wanted)
    assert (gradient(model, found) - expected).norm() <= 1e-6 * expected.norm()


def test_the_order_of_sequences_in_a_row_does_not_change_the_balance_loss():
    model = model_of("mixtral")
    torch.testing.assert_close(
        balance_by_transformers(model, SEQUENCES),
        balance_by_transformers(model, SEQUENCES[::-1]),
        atol=1e-5,
        rtol=0,
    )


def test_recomputed_activations_change_neither_the_loss_nor_the_counts():
    plain, recomputing = model_of("mixtral"), model_of("mixtral")
    recompute_activations(recomputing.inner)
    results = []
    for model in (plain, recomputing):
        term = term_of(model, SEQUENCES, coef=COEF, num_tokens=NUM_TOKENS)
        results.append((term.loss.detach(), gradient(model, term.loss), watched(term)))
    (loss, grad, metrics), (loss_again, grad_again, metrics_again) = results
    assert torch.equal(loss, loss_again) and torch.equal(grad, grad_again) and metrics == metrics_again


@pytest.mark.parametrize("recomputing", [False, True])
def test_in_bf16_the_sharded_model_has_the_balance_loss_of_its_own_routing(tmp_path: Path, recomputing):
    """fully_shard's hooks see a forward that also returns router logits; the gradient reaches the routers."""
    model = load_causal_lm(FAMILIES["mixtral"].directory(tmp_path / "model"))
    if recomputing:
        recompute_activations(model.inner)
    exact = split_loss(model, [4]).item() - split_loss(model, [4], coef=0.0).item()
    place(model, worker_in(tmp_path / "stage", "sft"), precision="bf16", trained=True)
    with torch.no_grad():
        found = split_loss(model, [4]).item() - split_loss(model, [4], coef=0.0).item()
    assert found == pytest.approx(exact, rel=0.05)
    grads = []
    for coef in (0.0, COEF):
        model.zero_grad()
        split_loss(model, [2, 2], coef=coef).backward()
        named = dict(model.inner.named_parameters())
        grads.append(named["model.layers.0.mlp.gate.weight"].grad.full_tensor().clone())
    assert (grads[1] - grads[0]).norm() > 1e-3 * grads[0].norm()
    torch.distributed.destroy_process_group()


def test_the_metrics_of_a_window_are_those_of_all_its_tokens():
    model = model_of("mixtral")
    parts = [SEQUENCES[:1], SEQUENCES[1:]]
    metrics = watched(*(term_of(model, part, coef=0.0, num_tokens=NUM_TOKENS) for part in parts))
    routed = model.inner(**pack(SEQUENCES).model_inputs(), output_router_logits=True).router_logits
    chosen = [logits_NE.topk(2, dim=-1).indices.flatten().bincount(minlength=4) for logits_NE in routed]
    num_tokens = sum(map(len, SEQUENCES))
    loads = [float(counts.max()) / (2 * num_tokens / 4) for counts in chosen]
    assert metrics["train/router_max_load"] == pytest.approx(sum(loads) / len(loads))
    assert metrics["train/router_dead_experts"] == sum(int((counts == 0).sum()) for counts in chosen)
    weighed = [
        sum(map(len, part)) / num_tokens * float(balance_by_transformers(model, part)) for part in parts
    ]
    assert metrics["train/router_aux_loss"] == pytest.approx(sum(weighed), abs=1e-5)


def test_the_weights_of_micro_batches_sum_to_one_so_that_more_of_them_do_not_weigh_more():
    """Equal micro-batches: the step's balance loss is that of one of them, however many there are."""
    model = model_of("mixtral")
    routed = model(pack(SEQUENCES[:1]).model_inputs(), torch.arange(5), with_router_logits=True)[1]
    one = load_balancing_loss(router_logits=routed, num_chosen=2)
    added = [term_of(model, SEQUENCES[:1], coef=1.0, num_tokens=15, weight=0.0).loss for _ in range(3)]
    torch.testing.assert_close(torch.stack(added).sum(), one, atol=1e-6, rtol=0)


def test_the_balance_loss_and_nothing_else_evens_the_load_of_decided_routers():
    """Trained on no other loss. Without a coefficient the routers have no gradient and stay as they are."""
    results: dict[float, list[dict[str, float]]] = {0.0: [], 1.0: []}
    for coef, found in results.items():
        model = model_of("mixtral")
        routers = [layer.mlp.gate.weight for layer in model.inner.model.layers]
        with torch.no_grad():
            for weight_EH in routers:
                weight_EH *= 3
        adam = torch.optim.Adam(routers, lr=0.02)
        for _ in range(40):
            adam.zero_grad()
            term = term_of(model, SEQUENCES, coef=coef, num_tokens=NUM_TOKENS, weight=0.0)
            term.loss.backward()
            adam.step()
            found.append(watched(term))
    assert results[0.0][0] == results[0.0][-1] == results[1.0][0]
    assert results[1.0][-1]["train/router_aux_loss"] < results[1.0][0]["train/router_aux_loss"] - 0.2
    assert (
        results[1.0][0]["train/router_dead_experts"] == 1
        and results[1.0][-1]["train/router_dead_experts"] == 0
    )


def is_accepted(name: str) -> bool:
    """Whether the family's config is one that is trained."""
    try:
        check_model_config(FAMILIES[name].config(), named=name, context_length=8)
    except ModelError:
        return False
    return True


MIXTURES = [name for name, family in FAMILIES.items() if family.moe and is_accepted(name)]


@pytest.mark.parametrize("name", MIXTURES)
def test_every_family_with_experts_is_counted_or_has_nothing_to_balance(name):
    model = model_of(name)
    term = term_of(model, SEQUENCES, coef=0.0, num_tokens=NUM_TOKENS)
    assert term.loss.isfinite()
    measured = watched(term) if term.sums else {}
    assert bool(measured) is bool(model.routers) is (name.removesuffix("_window") in BALANCED)
    if measured:
        assert measured["train/router_max_load"] >= 1 and math.isfinite(measured["train/router_aux_loss"])


@pytest.mark.parametrize("name", ["ernie4_5_moe", "minimax_m2", "laguna"])
def test_experts_that_a_router_chooses_by_a_bias_of_its_own_are_counted_as_chosen(name):
    model = model_of(name)
    biases = {
        key: bias for key, bias in model.inner.state_dict().items() if key.endswith("e_score_correction_bias")
    }
    for bias in biases.values():
        bias.copy_(torch.tensor([100.0, 100.0, 0.0, 0.0]).expand_as(bias))
    measured = watched(term_of(model, SEQUENCES, coef=0.0, num_tokens=NUM_TOKENS))
    assert measured["train/router_max_load"] == 2.0
    assert measured["train/router_dead_experts"] == 2 * len(biases)
