"""vLLM's general plugin: makes our weight receiver known in every process of an engine. Cheap to import, on
purpose.

    vLLM process starts --entry point `rlhf_weight_receivers`--> register()

Owns: the receiver's name in vLLM's factory, and where the output of an engine's child processes goes. Does
not own: the receiver (`vllm_receiver`, imported only in the process that loads weights).
"""

import os
from multiprocessing import parent_process

RECEIVERS = {"shm": "FetchReceiver", "gloo": "FetchReceiver", "nccl": "NcclReceiver"}
"""`rollout.sync` -> our receiver (in `vllm_receiver`)."""

LOG_PATH_VARIABLE = "RLHF_ENGINE_LOG"
"""Environment variable that names the file for the output of an engine's child processes."""

_registered = False


def backend(sync: str) -> str:
    """The name of a receiver in vLLM's config, which has an `nccl` of its own."""
    return f"rlhf_{sync}"


def register() -> None:
    """Called by vLLM, possibly more than once in a process. Without our engine around it, it only adds a
    name.
    """
    global _registered
    if _registered:
        return
    _registered = True
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    for sync, receiver in RECEIVERS.items():
        WeightTransferEngineFactory.register_engine(backend(sync), "rollout.vllm_receiver", receiver)
    if LOG_PATH_VARIABLE in os.environ and parent_process() is not None:
        _send_output_to(os.environ[LOG_PATH_VARIABLE])


def _send_output_to(path: str) -> None:
    """At the level of file descriptors: gloo and oneDNN write from C++."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
