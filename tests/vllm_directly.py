"""vLLM as a user without this project starts it: a script in a process of its own.

by_vllm("generate" | "score", directory, token ids) -> greedy responses | raw scores
"""

import json
import os
import subprocess
import sys
from pathlib import Path

MARK = "answers: "
ENVIRONMENT = {
    "VLLM_PLUGINS": "",  # ours is not there either
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
    "TORCHDYNAMO_DISABLE": "1",  # else the sampler is compiled at the first request
    "OMP_WAIT_POLICY": "passive",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
"""Speed, and no network; nothing that changes what is computed."""


def by_vllm(task: str, directory: Path, sequences: list[list[int]]) -> list[list]:
    """Per sequence [id, log-prob] of every token of a greedy response, 24 at most; or [raw score]."""
    result = subprocess.run(
        [sys.executable, __file__, task, directory.resolve(), json.dumps(sequences)],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    (answer,) = [line for line in result.stdout.splitlines() if line.startswith(MARK)]  # vLLM logs there too
    return json.loads(answer.removeprefix(MARK))


def _main(task: str, directory: str, sequences: list[list[int]]) -> None:
    from vllm import LLM, PoolingParams, SamplingParams

    prompts = [{"prompt_token_ids": ids} for ids in sequences]
    options = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 64 * 2**20}
    if task == "generate":
        llm = LLM(directory, **options)
        greedy = SamplingParams(temperature=0, max_tokens=24, logprobs=0)
        outputs = [output.outputs[0] for output in llm.generate(prompts, greedy, use_tqdm=False)]
        answers = [
            [
                [token, found[token].logprob]
                for token, found in zip(answer.token_ids, answer.logprobs, strict=True)
            ]
            for answer in outputs
        ]
    else:
        llm = LLM(directory, runner="pooling", convert="classify", **options)
        raw = PoolingParams(task="classify", use_activation=False)  # else the sigmoid of the score
        outputs = llm.encode(prompts, raw, pooling_task="classify", use_tqdm=False)
        answers = [output.outputs.data.tolist() for output in outputs]
    print(MARK + json.dumps(answers), flush=True)


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
