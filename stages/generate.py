"""One response of a finished model, for a person: what `rlhf generate` prints. Makes no artifact.

prompt --chat template, if the model has one--> ids --> engine --> response ids --> text
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from rollout.api import RolloutRequest, Sampling
from rollout.config import EngineConfig
from rollout.errors import EngineError
from stages.data.chat.tokenizer import ChatTokenizer
from stages.data.reading.records import Message
from stages.engines import open_engines
from stages.errors import ModelError
from stages.runtime import Runtime, StageResources
from stages.training.model_rules import num_positions, read_config


def generate(
    model_dir: Path,
    prompt: str,
    *,
    temperature: float,
    max_tokens: int,
    seed: int,
    engine: Literal["vllm", "hf"],
) -> str:
    """The model's response, special tokens left out. A model without a chat template continues the text.

    Raises ModelError when the prompt does not fit, EngineError when the engine does not start.
    """
    chat = ChatTokenizer.load(model_dir)
    if chat.template_source == "chatml":
        ids, text_of = chat.continuation_ids(prompt), chat.continued_text
    else:
        ids, text_of = chat.prompt_ids((Message(role="user", content=prompt),)), chat.response_text
    context = num_positions(read_config(model_dir, named=str(model_dir)))
    if context is not None and len(ids) >= context:
        raise ModelError(f"{model_dir}: the prompt has {len(ids)} tokens, the model's context {context}")
    sampling = Sampling(
        temperature=temperature,
        max_tokens=max_tokens if context is None else min(max_tokens, context - len(ids)),
        stop_token_ids=chat.stop_token_ids,
        seed=seed,
    )
    with tempfile.TemporaryDirectory(prefix="rlhf-generate-") as directory:
        runtime = Runtime(
            stage="generate",
            work_dir=Path(directory),
            log_dir=Path(directory),
            resources=StageResources(),
            executor="inline",
            placement_timeout_s=60.0,
            collective_timeout_s=60.0,
            num_threads=len(os.sched_getaffinity(0)),
            stop_file=Path(directory) / "stop",
        )
        config = EngineConfig(engine=engine, max_num_seqs=1, kv_cache_mib=64)
        with (
            _log_kept(runtime),
            open_engines(
                config,
                model_dir=model_dir,
                dtype="float32",
                max_model_len=len(ids) + sampling.max_tokens,
                runtime=runtime,
            ) as client,
        ):
            request = RolloutRequest(request_id="generate", prompt_ids=ids, sampling=sampling)
            (rollout,) = client.generate([request])
    return text_of(rollout.response_ids)


@contextlib.contextmanager
def _log_kept(runtime: Runtime) -> Iterator[None]:
    """Inside, an EngineError names a copy of the engine's log that outlives the directory of this command."""
    try:
        yield
    except EngineError as error:
        text = str(error)
        for log in runtime.log_dir.glob("*-engines/*.log"):
            # $TMPDIR is the command's own, and goes with it
            kept = Path("/tmp", f"{runtime.log_dir.name}.log")
            shutil.copyfile(log, kept)
            text = text.replace(str(log), str(kept))
        raise type(error)(text) from error
