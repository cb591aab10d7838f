"""One optimizer step: clipping over parameters of any placement, and what is added up of the packs."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from stages.config.pretrain import PretrainConfig
from stages.training import ranks
from stages.training.optimize import Optimizer, Tally, clip_gradient
from stages.training.trainable import TermLoss

CONFIG = PretrainConfig(lr=1e-2, max_grad_norm=1.0)


def some_model() -> nn.ModuleDict:
    """A trunk and a head, of sizes that no number of ranks divides."""
    torch.manual_seed(3)
    return nn.ModuleDict({"trunk": nn.Linear(3, 5), "head": nn.Linear(5, 1)})


def differentiated(model: nn.ModuleDict) -> nn.ModuleDict:
    """`model` after a backward pass, with a gradient far above the norm of 1 that it is clipped to."""
    inputs = torch.arange(12, dtype=torch.float32).reshape(4, 3)
    (100 * model["head"](model["trunk"](inputs)).square().mean()).backward()
    return model


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clipped(model: nn.ModuleDict) -> tuple[float, Tensor, Tensor]:
    """The norm that clipping reports, the gradient it leaves, and the weights after a step of AdamW."""
    optimizer = Optimizer(differentiated(model), CONFIG, lr=CONFIG.lr, max_steps=10)
    norm = clip_gradient(model.parameters(), CONFIG.max_grad_norm)
    gradient = torch.cat([whole(parameter.grad).flatten() for parameter in model.parameters()])
    optimizer.adamw.step()
    weights = torch.cat([whole(parameter.detach()).flatten() for parameter in model.parameters()])
    return norm, gradient, weights


def halves_on(meshes: list) -> nn.ModuleDict:
    """Trunk and head, each sharded over the mesh of its place; None: as it is. Both ranks have the whole
    batch, so the mean of their gradients is the gradient.
    """
    model = some_model()
    for part, mesh in zip(model.values(), meshes, strict=True):
        if mesh is not None:
            fully_shard(part, mesh=mesh).set_gradient_divide_factor(2.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo knows no mean
    return model


def _process(rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", world_size=2, rank=rank)
    mesh = init_device_mesh("cpu", (2,))
    other = init_device_mesh("cpu", (2, 1), mesh_dim_names=("shard", "rest"))["shard"]
    found = {}
    for name, meshes in {
        "one mesh": [mesh, mesh],
        "a mesh and none": [mesh, None],
        "two meshes": [mesh, other],
    }.items():
        model = halves_on(meshes)
        norm, gradient, weights = clipped(model)
        found[name] = (norm, gradient, weights)
    for place in range(2):
        assert math.isnan(ranks.largest(math.nan if rank == place else 2.0))
    assert ranks.largest([2.0, 3.0][rank]) == 3.0
    if ranks.is_main():
        torch.save(found, directory / "found.pt")
    ranks.barrier()
    dist.destroy_process_group()


def test_the_norm_and_the_clipped_gradient_are_the_same_however_parameters_are_placed(tmp_path):
    """Both halves on one mesh, one of them on none, and each on a mesh of its own."""
    norm, gradient, weights = clipped(some_model())
    assert norm > 100 and float(gradient.norm()) == pytest.approx(1.0, rel=1e-5)
    multiprocessing.spawn(_process, args=(tmp_path,), nprocs=2)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for name, (of_ranks, clipped_gradient, stepped) in found.items():
        assert of_ranks == pytest.approx(norm, rel=1e-6), name
        torch.testing.assert_close(clipped_gradient, gradient, rtol=1e-5, atol=1e-8, msg=name)
        torch.testing.assert_close(stepped, weights, rtol=1e-5, atol=1e-7, msg=name)


def test_one_mesh_is_clipped_by_torchs_own_function_to_the_bit():
    ours, theirs = differentiated(some_model()), differentiated(some_model())
    norm = clip_gradient(ours.parameters(), 1.0)
    assert norm == float(nn.utils.clip_grad_norm_(theirs.parameters(), 1.0))
    for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(left.grad, right.grad)


def test_a_gradient_below_the_norm_is_left_as_it_is():
    model = differentiated(some_model())
    before = [parameter.grad.clone() for parameter in model.parameters()]
    clip_gradient(model.parameters(), 1e9)
    assert all(torch.equal(a, b.grad) for a, b in zip(before, model.parameters(), strict=True))


def test_sums_of_packs_are_added_in_double_in_pack_order_and_extremes_are_the_largest():
    tally = Tally()
    shares = [0.1, 0.2, 0.3]
    for share, ratio in zip(shares, (1.5, 0.5, -math.inf), strict=True):
        tally.add(
            TermLoss(
                loss=torch.tensor(0.25),
                sums={"share": torch.tensor(share, dtype=torch.float64), "counts": torch.ones(2, 3)},
                extremes={"ratio": torch.tensor(ratio)},
            )
        )
    assert tally.loss == 0.75 and tally.extremes == {"ratio": 1.5}
    assert float(tally.sums["share"]) == 0.1 + 0.2 + 0.3
    assert tally.sums["counts"].tolist() == [[3.0] * 3] * 2 and tally.sums["counts"].dtype == torch.float64
    assert tally.over_ranks().sums["counts"].shape == (2, 3)


@pytest.mark.parametrize("ratios", [(math.nan, 2.0), (2.0, math.nan)])
def test_an_extreme_that_is_not_a_number_is_kept_whatever_the_order_of_packs(ratios):
    tally = Tally()
    for ratio in ratios:
        tally.add(TermLoss(loss=torch.tensor(0.0), extremes={"ratio": torch.tensor(ratio)}))
    assert math.isnan(tally.extremes["ratio"])


def test_a_step_that_is_not_accepted_leaves_weights_alone_and_gives_no_sums():
    model = differentiated(some_model())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = Optimizer(model, CONFIG, lr=CONFIG.lr, max_steps=10)
    tally, asked = Tally(), []
    tally.add(
        TermLoss(
            loss=torch.tensor(2.0),
            sums={"right": torch.tensor(3)},
            extremes={"ratio": torch.tensor(0.5)},
        )
    )

    def accepts(*seen):
        asked.append(seen)
        return False

    result = optimizer.step(0, tally, accepts)
    ((loss, norm, sums, extremes),) = asked
    assert loss == result.loss == 2.0 and norm == result.grad_norm
    assert float(sums["right"]) == 3.0 and extremes == {"ratio": 0.5}
    assert not result.taken and result.sums == {} and result.extremes == {}
    assert all(torch.equal(a, b.detach()) for a, b in zip(before, model.parameters(), strict=True))
