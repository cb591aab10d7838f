"""Environment variables that libraries take for settings: they never beat the config of a run.

    environment --take_out--> the same without them; what was taken out --> one line (pipeline.cli)

Owns: the table of these variables, and of those that look alike but are the user's own. A command takes them
out of its environment before it starts anything; what runs on another machine does so again. Light import.
"""

from collections.abc import Mapping, MutableMapping
from fnmatch import fnmatchcase

USERS_OWN = (
    "VLLM_LOG*",  # logging
    "VLLM_CONFIGURE_LOGGING",
    "VLLM_DISABLE_LOG_LOGO",
    "VLLM_PROCESS_NAME_PREFIX",
    "VLLM_DEBUG*",
    "VLLM_TRACE_FUNCTION",
    "VLLM_RINGBUFFER_WARNING_INTERVAL",
    "VLLM_NO_USAGE_STATS",
    "VLLM_DO_NOT_TRACK",
    "VLLM_USAGE_*",
    "VLLM_HOST_IP",  # the network
    "VLLM_LOOPBACK_IP",
    "VLLM_PORT",
    "VLLM_RPC_BASE_PATH",
    "VLLM_GPU_NIC_PCIE_MAPPING",
    "VLLM_NIC_SELECTION_VARS",
    "VLLM_SKIP_P2P_CHECK",
    "VLLM_CPU_OMP_THREADS_BIND",  # binding
    "VLLM_CPU_NUM_OF_RESERVED_CPU",
    "VLLM_CACHE_ROOT",  # caches and libraries of this machine
    "VLLM_CONFIG_ROOT",
    "VLLM_XLA_CACHE_PATH",
    "VLLM_FLASHINFER_AUTOTUNE_CACHE_DIR",
    "VLLM_TUNED_CONFIG_FOLDER",
    "VLLM_NCCL_SO_PATH",
    "VLLM_NCCL_INCLUDE_PATH",
    "VLLM_CUDART_SO_PATH",
    "VLLM_CUDA_COMPATIBILITY_PATH",
    "VLLM_ENABLE_CUDA_COMPATIBILITY",
    "VLLM_USE_V2_MODEL_RUNNER",  # docs/operations.md says when
)
"""Stay as they are, although a pattern below would take them for a setting."""

DECIDED_BY: Mapping[str, str] = {
    "VLLM_CPU_KVCACHE_SPACE": "rollout.kv_cache_mib",
    "VLLM_ENGINE_READY_TIMEOUT_S": "rollout.start_timeout_s",
    "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "rollout.generate_timeout_s",
    "VLLM_USE_MODELSCOPE": "model.path",
    "VLLM_MODEL_REDIRECT_PATH": "model.path",
    "VLLM_PLUGINS": "rollout.sync",
    "VLLM_DP_*": "rollout.num_engines",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "model.context_length",
    "VLLM_FLOAT32_MATMUL_PRECISION": "<stage>.precision",
    "VLLM_*": "rollout",
    "TORCHDYNAMO_DISABLE": "rollout.enforce_eager",
    "TORCH_COMPILE_DISABLE": "rollout.enforce_eager",
    "NVIDIA_TF32_OVERRIDE": "<stage>.precision",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "<stage>.precision",
    "TRITON_F32_DEFAULT": "<stage>.precision",
    "ONEDNN_DEFAULT_FPMATH_MODE": "<stage>.precision",
    "DNNL_DEFAULT_FPMATH_MODE": "<stage>.precision",
    "CUBLAS_EMULATE_*": "<stage>.precision",
    "CUBLAS_FIXEDPOINT_*": "<stage>.precision",
    "ACCELERATE_*": "<stage>.precision, resources",
    "FSDP_*": "resources",
    "RANK": "resources.<stage>.num_workers",
    "LOCAL_RANK": "resources.<stage>.num_workers",
    "GROUP_RANK": "resources.<stage>.num_workers",
    "ROLE_RANK": "resources.<stage>.num_workers",
    "WORLD_SIZE": "resources.<stage>.num_workers",
    "LOCAL_WORLD_SIZE": "resources.<stage>.num_workers",
    "MASTER_ADDR": "resources.<stage>.num_workers",
    "MASTER_PORT": "resources.<stage>.num_workers",
    "TORCHELASTIC_*": "resources.<stage>.num_workers",
    "RAY_ADDRESS": "resources.address",
    "RAY_OVERRIDE_RESOURCES": "resources",
    "USE_HUB_KERNELS": "the model's own code in transformers",
    "USE_TORCH_XLA": "resources",
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "no pickle is loaded",
    "HF_DATASETS_TRUST_REMOTE_CODE": "no code of a dataset is run",
}
"""A variable (a pattern, as in a shell) -> what decides instead. The first that fits counts."""


def take_out(environment: MutableMapping[str, str]) -> dict[str, str]:
    """Removes from `environment` what stands for a setting. Returns name -> what decides instead.

    Example: {"VLLM_CPU_KVCACHE_SPACE": "rollout.kv_cache_mib"}.
    """
    found = {name: decided for name in sorted(environment) if (decided := _decided_by(name)) is not None}
    for name in found:
        del environment[name]
    return found


def _decided_by(name: str) -> str | None:
    if any(fnmatchcase(name, pattern) for pattern in USERS_OWN):
        return None
    return next((decided for pattern, decided in DECIDED_BY.items() if fnmatchcase(name, pattern)), None)
