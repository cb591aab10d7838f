"""A program, run by test_tied_head.py: syncs inside an in-process vLLM whose receiver is taken apart, here
and nowhere else.

    python tied_head_without_cure.py MESSAGE_JSON  ->  one JSON line: {case: its `Diagnosis`}
"""

import json
import os
import sys

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "rlhf_weight_receivers",
    "OMP_WAIT_POLICY": "passive",
}

from vllm import LLM
from vllm.config import WeightTransferConfig

from rollout import vllm_receiver
from rollout.vllm_plugin import backend


def main(path: str) -> None:
    with open(path) as file:
        message = json.load(file)
    llm = LLM(
        model=message["model_dir"],
        dtype="float32",
        max_model_len=128,
        kv_cache_memory_bytes=2**24,
        enforce_eager=True,
        skip_tokenizer_init=True,
        weight_transfer_config=WeightTransferConfig(backend=backend("shm")),
        worker_extension_cls="rollout.vllm_receiver.WorkerExtension",
    )
    llm.collective_rpc("init_weight_transfer_engine", args=(message["init"],))
    cure = vllm_receiver.FetchReceiver._rebuild_tied_heads
    found = {}
    for case, update in message["updates"].items():
        vllm_receiver.FetchReceiver._rebuild_tied_heads = cure if "with cure" in case else lambda self: None
        llm.collective_rpc("start_weight_update")
        llm.collective_rpc("update_weights", args=(update["sent"],))
        llm.collective_rpc("finish_weight_update")
        (found[case],) = llm.collective_rpc("rlhf_diagnose", args=(update["meant"],))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
