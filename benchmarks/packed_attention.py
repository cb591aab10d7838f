"""Attention per sequence against the block-diagonal mask, same rows, same run: behind docs/decisions/0001.

python benchmarks/packed_attention.py        prints a table; the times are of this machine, the ratio travels
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import statistics
import time

import torch

from stages.config.model import ModelConfig
from stages.training.forwards import ResponsePack, pack_responses
from stages.training.fsdp import outputs_of
from stages.training.models import CausalLM, build_causal_lm
from stages.training.packed_attention import PACKED_ATTENTION
from stages.training.trainable import Reads

CASES = ((16, 60), (16, 256), (4, 512))  # sequences, tokens each
REPEATS = 5


def seconds(model: CausalLM, packed: ResponsePack) -> float:
    """Of one forward and backward."""
    start = time.perf_counter()
    now = outputs_of(model, packed, Reads(logprobs=True, temperature=1.0))
    assert now.logprobs_N is not None
    now.logprobs_N.sum().backward()
    return time.perf_counter() - start


def main() -> None:
    model = build_causal_lm(ModelConfig(context_length=512), vocab_size=512, eos_token_id=1, pad_token_id=3)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, the demo's model, fp32")
    for count, length in CASES:
        prompts, responses = [[5] * (length // 2)] * count, [[7] * (length - length // 2)] * count
        packed = pack_responses(prompts, responses, max_length=length, device=torch.device("cpu"))
        times: dict[str, list[float]] = {"sdpa": [], PACKED_ATTENTION: []}
        for repeat in range(REPEATS + 1):
            for name, measured in times.items():
                model.inner.set_attn_implementation(name)
                if repeat:
                    measured.append(seconds(model, packed))
                else:
                    seconds(model, packed)
        masked, by_length = (statistics.median(measured) for measured in times.values())
        print(
            f"{count:3} x {length:4} tokens: mask {masked * 1e3:7.1f} ms, "
            f"per sequence {by_length * 1e3:7.1f} ms, ratio {masked / by_length:.1f}"
        )


if __name__ == "__main__":
    main()
