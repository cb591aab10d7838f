"""bf16: a policy and its own frozen copy are the same model before any update, in every family: the same
numbers in the same dtypes.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from families.figures import record, why_refused
from families.table import FAMILIES
from inline import worker_in
from torch import Tensor, nn

from stages.data.packing import pack
from stages.errors import ModelError
from stages.training.distributed import Worker, place
from stages.training.models import CausalLM, check_context, freeze, load_causal_lm

OFTEN = {"llama", "gemma2", "gpt2", "olmo2", "ernie4_5", "mixtral"}
"""What `make test` measures; `make test-all` measures all."""
NAMES = [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in FAMILIES]
IN_BF16 = {
    *("llama", "gemma2", "gpt2", "olmo", "ernie4_5", "qwen2", "qwen3", "gemma"),
    *("mistral", "olmo2", "olmo3", "phi3", "opt", "cohere"),
}
"""Families without a part that transformers computes in fp32 on purpose."""
FP32 = {"inner.model.rotary_emb", "inner.lm_head", "inner", ""}
"""Modules that may give fp32: rotary tables (positions), the head, and with it the whole."""
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
    place(policy, worker, precision="bf16", trained=True)
    place(frozen, worker, precision="bf16", trained=False)
    (policy_logprobs, dtypes), (frozen_logprobs, frozen_dtypes) = map(logprobs_and_dtypes, (policy, frozen))
    record(name, "bf16", float((policy_logprobs - frozen_logprobs).abs().max()))
    assert policy_logprobs.std() > 0.1, "flat log-probs would show nothing"
    assert dtypes == frozen_dtypes
    if name in IN_BF16:
        in_fp32 = {module for module, dtype in dtypes.items() if dtype != torch.bfloat16}
        assert in_fp32 <= FP32, "a layer computes in fp32"
        assert len(dtypes.keys() - FP32) > 10, "every layer was looked at"


def logprobs_and_dtypes(model: CausalLM) -> tuple[Tensor, dict[str, torch.dtype]]:
    """Of one packed row; the dtypes by module that gives one tensor, or several of which it is the first."""
    dtypes: dict[str, torch.dtype] = {}

    def noted(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor):
                dtypes[name] = first.dtype

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(noted(name))
    row = pack(SEQUENCES)
    with torch.no_grad():
        logits = model(row.model_inputs(), torch.arange(row.num_tokens))[0]
    assert logits.dtype == torch.float32
    return logits.log_softmax(-1), dtypes
