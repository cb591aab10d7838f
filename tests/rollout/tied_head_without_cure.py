"""A program, run by test_tied_head.py: one sync inside an in-process vLLM, with our cure for tied heads or without it.

    python tied_head_without_cure.py MODEL_DIR UPDATE_JSON with|without  ->  one JSON line: the tensors not held

In one process, so that the receiver can be taken apart here and nowhere else.
"""

import json
import os
import sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "TORCHDYNAMO_DISABLE": "1",
               "VLLM_NO_USAGE_STATS": "1", "VLLM_PLUGINS": "rlhf_weight_receivers", "OMP_WAIT_POLICY": "passive"}

from vllm import LLM
from vllm.config import WeightTransferConfig

from rollout import vllm_receiver


def main(model_dir: str, update_path: str, cure: str) -> None:
    if cure == "without":
        vllm_receiver.ShmReceiver._rebuild_tied_heads = lambda self: None
    with open(update_path) as file:
        message = json.load(file)
    llm = LLM(model=model_dir, dtype="float32", max_model_len=128, kv_cache_memory_bytes=2**24, enforce_eager=True,
              skip_tokenizer_init=True, weight_transfer_config=WeightTransferConfig(backend="shm"),
              worker_extension_cls="rollout.vllm_receiver.WorkerExtension")
    for method, arguments in (("init_weight_transfer_engine", (message["init"],)), ("start_weight_update", ()),
                              ("update_weights", (message["update"],)), ("finish_weight_update", ())):
        llm.collective_rpc(method, args=arguments)
    (differing,) = llm.collective_rpc("rlhf_diagnose", args=(message["update"],))
    print(json.dumps(differing))


if __name__ == "__main__":
    main(*sys.argv[1:])
