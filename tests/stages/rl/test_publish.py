"""Publishing on two real ranks: whatever only rank 0 can know, both raise."""

import pytest
from ppo_inputs import ppo_inputs
from two_ranks_gate import raised_on_two


@pytest.mark.process
def test_both_ranks_raise_the_same_parity_error_and_it_names_tensors(tied_model_dir, tmp_path):
    """The engine is one sync behind, and 0.2 nats off in the first token of every training rollout."""
    main, other = raised_on_two(tmp_path, ppo_inputs(tied_model_dir, tmp_path / "reward"))
    assert main == other
    assert main["start"] == "nothing" and main["replayed batch"] == "False"
    assert "tokens of the training batch differ by 0.2 at most" in main["batch"]
    assert "the engine holds every tensor of the trainer" in main["batch"]
    assert main["no update"] == "nothing", "before this process has updated the policy nothing is compared"
    assert "after the sync of weight version 2" in main["update"]
    assert "model.layers.0.mlp.down_proj.weight" in main["update"]
