"""bf16: a policy and its own frozen copy are the same model before any update, in every family."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from families.figures import record, why_refused
from families.table import FAMILIES
from inline import worker_in

from stages.data.packing import pack
from stages.errors import ModelError
from stages.training.distributed import Worker, place
from stages.training.models import check_context, freeze, load_causal_lm

OFTEN = {"llama", "gemma2", "gpt2", "olmo2", "mixtral"}
"""What `make test` measures; `make test-all` measures all."""
NAMES = [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in FAMILIES]
SEQUENCES = [list(range(5, 25)), [9, 8, 7], list(range(60, 100))]
LONGEST = 40


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    """A worker whose process group, which bf16 training opens, ends with the test."""
    yield worker_in(tmp_path, "ppo")
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_in_bf16_is_its_own_frozen_copy(
    name: str, family_dir: Callable[[str], Path], worker: Worker
) -> None:
    directory = family_dir(name)
    try:
        policy, frozen = load_causal_lm(directory), freeze(load_causal_lm(directory))
        check_context(policy, LONGEST)
    except ModelError as error:
        record(name, "bf16", why_refused(directory, error, context_length=LONGEST))
        return
    row = pack(SEQUENCES)
    logprobs = []
    for model, trained in ((policy, True), (frozen, False)):
        placed = place(model, worker, precision="bf16", trained=trained)
        with torch.no_grad():
            logits = placed(row.model_inputs(), torch.arange(row.num_tokens))[0]
        assert logits.dtype == torch.float32
        logprobs.append(logits.log_softmax(-1))
    record(name, "bf16", float((logprobs[0] - logprobs[1]).abs().max()))
