"""vLLM behind the engine protocol: token ids in; token ids, processed log-probs and weight versions out.

    caller's loop --> AsyncLLM (this process) --> EngineCore (scheduler) --> Worker (model, `vllm_receiver`)

Owns: every option that vLLM starts with, deadlines, and the end of its processes. Does not own: batching,
scheduling and memory (vLLM), what a weight update holds (weight_source). The device is the one that the
installed vLLM was built for.
"""

import asyncio
import dataclasses
import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import psutil

from rollout.api import (
    Diagnosis,
    FinishReason,
    Rollout,
    RolloutRequest,
    Sampling,
    WeightUpdate,
    joined_diagnosis,
)
from rollout.config import EngineConfig
from rollout.engine_log import cause_of, size_of
from rollout.errors import EngineError, WeightSyncError
from rollout.foreign_environment import take_out
from rollout.ground.errors import GO_ON
from rollout.loop import before_deadline, while_healthy
from rollout.shared_memory import files_of
from rollout.vllm_plugin import LOG_PATH_VARIABLE, backend
from rollout.weight_file import checkpoint_layout

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # read by `import vllm`; an engine's log file has more
os.environ.pop("VLLM_ALLOW_INSECURE_SERIALIZATION", None)  # whoever set it: no pickles between processes

from vllm.config import WeightTransferConfig
from vllm.config.logging import LoggingConfig
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMError
from vllm.inputs import TokensPrompt
from vllm.logger import configure_logging
from vllm.logprobs import FlatLogprobs
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

T = TypeVar("T")

MIB = 2**20
LEVEL: Literal["DEBUG", "INFO"] = "DEBUG" if os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG" else "INFO"
"""Of an engine's log file."""
LOGGING = LoggingConfig(log_level=LEVEL)
FINISH_REASONS: dict[str | None, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}
"""vLLM's name -> ours; it has others ("error", None), which are errors here."""
SHUTDOWN_TIMEOUT_S = 5.0
"""How long an engine's processes may take to end by themselves before they are killed."""
PROCESS_CHECK_S = 0.5
"""Between looks whether the engine's processes are still there, during a control call."""
CLOSING_ANSWER_TIMEOUT_S = 3.0
"""Without an answer in this time they are killed at once."""


class VLLMEngine:
    """One vLLM engine: two processes below the caller's. Use it on the event loop that opened it."""

    def __init__(
        self, llm: AsyncLLM, *, config: EngineConfig, name: str, log_path: Path, log_start: int
    ) -> None:
        self._llm = llm
        self._config = config
        self._name = name
        self._log_path = log_path
        self._log_start = log_start  # bytes in the log from before this engine
        self._processes = _processes_of(llm)
        # what they talk through; they remove it themselves, unless they are killed
        self._shared_memory = files_of(process.pid for process in self._processes)
        self._paused = False
        self._closed = False

    @classmethod
    async def open(
        cls,
        config: EngineConfig,
        *,
        model_dir: Path,
        dtype: str,
        max_model_len: int,
        log_path: Path,
        name: str,
    ) -> Self:
        """Start the engine on the weights of `model_dir` (version 0). Blocks the loop while vLLM starts."""
        layout = checkpoint_layout(model_dir, dtype=dtype)
        arguments = _arguments(config, model_dir=model_dir, dtype=dtype, max_model_len=max_model_len)
        log_start = size_of(log_path)
        _log_to(log_path)
        with _process_environment(config, dtype=dtype, log_path=log_path):
            try:
                llm = AsyncLLM.from_engine_args(arguments)
            except (RuntimeError, ValueError, OSError, ImportError) as error:
                raise EngineError(
                    f"{name} did not start: {cause_of(error, log_path, log_start)}; see {log_path}"
                ) from error
        engine = cls(llm, config=config, name=name, log_path=log_path, log_start=log_start)
        try:
            await engine._make_ready(
                {"dtype": layout.dtype, "shapes": layout.shapes, "timeout_s": config.sync_timeout_s}
            )
        except BaseException:
            await engine.close()
            raise
        return engine

    async def submit(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        """See `RolloutEngine.submit`. Requests that arrive while the engine is paused wait for `resume`."""
        self._check_open()
        tasks = [asyncio.ensure_future(self._generate(request)) for request in requests]
        try:
            return await before_deadline(
                while_healthy(
                    asyncio.gather(*tasks), probe=self.version, interval_s=self._config.health_interval_s
                ),
                timeout_s=self._config.generate_timeout_s,
                what=f"{self._name}: {len(requests)} rollouts",
            )
        except VLLMError as error:
            raise EngineError(f"{self._name}: {self._cause(error)}; see {self._log_path}; {GO_ON}") from error
        finally:
            for task in tasks:
                task.cancel()  # after a failure the others are not wanted any more; vLLM aborts them

    async def abort(self, request_ids: Sequence[str]) -> None:
        """See `RolloutEngine.abort`."""
        await self._call("abort", lambda llm: llm.abort(list(request_ids)))

    async def pause(self) -> None:
        """See `RolloutEngine.pause`."""
        await self._call(
            "pause",
            lambda llm: llm.pause_generation(mode="abort", clear_cache=True),
            timeout_s=min(self._config.sync_timeout_s, self._config.health_timeout_s),
        )
        self._paused = True

    async def update(self, update: WeightUpdate) -> None:
        """See `RolloutEngine.update`."""
        assert self._paused, "update() only between pause() and resume()"
        request = WeightTransferUpdateRequest(update_info=dataclasses.asdict(update))
        try:
            await self._call("start of the weight update", lambda llm: llm.start_weight_update())
            await self._call("weight update", lambda llm: llm.update_weights(request))
            await self._call(
                "end of the weight update",
                lambda llm: llm.finish_weight_update(weight_version=str(update.version)),
            )
        except EngineError as error:
            raise WeightSyncError(f"{error}; rebuild this engine") from error

    async def resume(self) -> None:
        """See `RolloutEngine.resume`."""
        await self._call("resume", lambda llm: llm.resume_generation())
        self._paused = False

    async def diagnose(self, update: WeightUpdate) -> Diagnosis:
        """See `RolloutEngine.diagnose`: what any of its workers says."""
        payload = dataclasses.asdict(update)
        answers: list[dict[str, Any]] = await self._call(
            "comparison of all tensors",
            lambda llm: llm.collective_rpc("rlhf_diagnose", args=(payload,)),
            timeout_s=self._config.comparison_timeout_s,
        )
        return joined_diagnosis(Diagnosis(**one) for one in answers)

    async def version(self) -> int:
        """See `RolloutEngine.version`: asks the scheduler, and through it the process that holds the
        weights.
        """
        timeout_s = self._config.health_timeout_s
        scheduler = int(
            await self._call("version", lambda llm: llm.get_weight_version(), timeout_s=timeout_s)
        )
        workers: list[int] = await self._call(
            "version", lambda llm: llm.collective_rpc("rlhf_version"), timeout_s=timeout_s
        )
        if {scheduler} != set(workers):
            raise WeightSyncError(
                f"{self._name}: scheduler at weight version {scheduler}, workers at {workers}; "
                "rebuild this engine"
            )
        return scheduler

    async def close(self) -> None:
        """See `RolloutEngine.close`."""
        if self._closed:
            return
        if not await self._answers():
            _kill(self._processes)  # a frozen process never ends by itself
        self._closed = True
        await asyncio.to_thread(self._llm.shutdown, SHUTDOWN_TIMEOUT_S)
        del self._llm  # its finaliser must not run at interpreter exit
        await asyncio.to_thread(_end, self._processes, self._shared_memory)

    async def _answers(self) -> bool:
        """Whether the engine's processes are there to be told to end."""
        with suppress(EngineError, VLLMError):
            await before_deadline(self.version(), timeout_s=CLOSING_ANSWER_TIMEOUT_S, what=self._name)
            return True
        return False

    async def _make_ready(self, layout: dict[str, Any]) -> None:
        """Name the weights, tell the receiver what an update must hold, and generate once: the first time is
        slow.
        """
        request = WeightTransferInitRequest(init_info=layout)
        await self._call("start", lambda llm: llm.init_weight_transfer_engine(request))
        await self._call("start", lambda llm: llm.update_weight_version("0"))
        await self.version()
        warm_up = Sampling(temperature=1.0, max_tokens=2, stop_token_ids=(), seed=0)
        await self.submit([RolloutRequest(request_id="warm-up", prompt_ids=(0,), sampling=warm_up)])

    async def _generate(self, request: RolloutRequest) -> Rollout:
        final: RequestOutput | None = None
        prompt = TokensPrompt(prompt_token_ids=list(request.prompt_ids))
        async for output in self._llm.generate(
            prompt, _sampling_params(request.sampling), request.request_id
        ):
            final = output
        assert final is not None
        return _rollout(request, final)

    async def _call(
        self, what: str, call: Callable[[AsyncLLM], Awaitable[T]], *, timeout_s: float | None = None
    ) -> T:
        """One control call: a deadline, and an error that names this engine. vLLM reports what fails in its
        other processes as a bare Exception, so the outcome is looked at instead of caught. It says nothing
        of a scheduler that is killed during the call. `timeout_s`: else that of a sync.
        """
        self._check_open()
        (outcome,) = await before_deadline(
            while_healthy(
                asyncio.gather(call(self._llm), return_exceptions=True),
                probe=self._check_processes,
                interval_s=PROCESS_CHECK_S,
            ),
            timeout_s=self._config.sync_timeout_s if timeout_s is None else timeout_s,
            what=f"{self._name}: {what}",
        )
        if isinstance(outcome, VLLMError) or type(outcome) is Exception:
            raise EngineError(
                f"{self._name}: {what}: {self._cause(outcome)}; see {self._log_path}; {GO_ON}"
            ) from outcome
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    async def _check_processes(self) -> None:
        for process in self._processes:
            if not _runs(process):
                raise EngineError(
                    f"{self._name}: its process {process.pid} is gone; see {self._log_path}; {GO_ON}"
                )

    def _cause(self, error: BaseException) -> str:
        return cause_of(error, self._log_path, self._log_start)

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError(f"{self._name}: closed")


def _arguments(config: EngineConfig, *, model_dir: Path, dtype: str, max_model_len: int) -> AsyncEngineArgs:
    """Everything that changes what is computed is said here, so that no default of vLLM's decides it."""
    options: dict[str, Any] = {"dtype": dtype}
    if current_platform.is_cpu():
        options["kv_cache_memory_bytes"] = config.kv_cache_mib * MIB
    else:
        options["gpu_memory_utilization"] = config.gpu_memory_frac
    if config.tensor_parallel_size > 1:
        # child processes on the actor's GPUs: in a placement group vLLM would ask Ray for more
        options["distributed_executor_backend"] = "mp"
    return AsyncEngineArgs(
        model=str(model_dir),
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        tensor_parallel_size=config.tensor_parallel_size,
        enforce_eager=config.enforce_eager,
        seed=0,
        **options,
        load_format="safetensors",  # a pickle beside them is never opened
        trust_remote_code=False,
        skip_tokenizer_init=True,
        generation_config="vllm",  # the model directory sets no sampling defaults
        hf_overrides={"head_dtype": "float32"},  # as the trainer does: bf16 would round logits to eighths
        logprobs_mode="processed_logprobs",  # of the distribution that is sampled from: after the temperature
        # vLLM cannot rewind a CPU generator, as it must when a seeded request's prompt is only half
        # prefilled.
        enable_chunked_prefill=not current_platform.is_cpu(),
        enable_prefix_caching=False,  # with it, fp32 output depends on what ran before
        weight_transfer_config=WeightTransferConfig(backend=backend(config.sync)),
        worker_extension_cls="rollout.vllm_receiver.WorkerExtension",
        disable_log_stats=True,
        logging_config=LOGGING,
    )


@contextmanager
def _process_environment(config: EngineConfig, *, dtype: str, log_path: Path) -> Iterator[None]:
    """What the engine's processes inherit. Afterwards this process has its own environment back: vLLM leaves
    LD_PRELOAD and thread settings in it that are not meant for a trainer's other children.
    """
    before = dict(os.environ)
    take_out(os.environ)
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    os.environ |= {
        LOG_PATH_VARIABLE: str(log_path),
        "VLLM_LOGGING_LEVEL": LEVEL,
        "VLLM_PLUGINS": "rlhf_weight_receivers",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENGINE_READY_TIMEOUT_S": str(int(config.start_timeout_s) + 1),
        # "auto" leaves a core out; a binding that the machine's owner has chosen stays
        "VLLM_CPU_OMP_THREADS_BIND": before.get("VLLM_CPU_OMP_THREADS_BIND", cores),
        # a waiting thread must not spin: trainer and engine take turns on the cores
        "OMP_WAIT_POLICY": "passive",
        "HF_HUB_OFFLINE": "1",  # the model directory is all there is
    }
    if dtype == "float32":
        # vLLM's kernels for fp32 attention on a GPU are Triton's, whose default precision is TF32: 10 bits,
        # and 1e-3 nats. Matrix products are torch's: "highest" is vLLM's default (0.32), said here because
        # whoever set another meant a server.
        os.environ |= {"TRITON_F32_DEFAULT": "ieee", "VLLM_FLOAT32_MATMUL_PRECISION": "highest"}
    if config.enforce_eager and current_platform.is_cpu():
        # else the sampler alone is compiled, in 10 s, at the first request
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        yield
    finally:
        for key in os.environ.keys() - before.keys():
            del os.environ[key]
        os.environ |= before


def _log_to(log_path: Path) -> None:
    """vLLM's messages of this process join those of its children, whose output `vllm_plugin` redirects."""
    configure_logging(LOGGING)  # now, so that vLLM does not do it later and undo the next line
    logger = logging.getLogger("vllm")
    logger.handlers = [logging.FileHandler(log_path)]
    logger.propagate = False


def _processes_of(llm: AsyncLLM) -> list[psutil.Process]:
    """The scheduler's process and its workers."""
    cores = [psutil.Process(process.pid) for process in llm.engine_core.resources.engine_manager.processes]
    return [process for core in cores for process in (core, *core.children(recursive=True))]


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _end(processes: Sequence[psutil.Process], shared_memory: set[Path]) -> None:
    """Kill what has not ended by itself, and remove what it could not remove."""
    _, alive = psutil.wait_procs(processes, timeout=SHUTDOWN_TIMEOUT_S)
    _kill(alive)
    psutil.wait_procs(alive, timeout=SHUTDOWN_TIMEOUT_S)
    for path in shared_memory:
        path.unlink(missing_ok=True)


def _sampling_params(sampling: Sampling) -> SamplingParams:
    return SamplingParams(
        temperature=sampling.temperature,
        seed=sampling.seed,
        max_tokens=sampling.max_tokens,
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=True,  # our stop set alone ends a response
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _rollout(request: RolloutRequest, output: RequestOutput) -> Rollout:
    (completion,) = output.outputs
    if completion.finish_reason not in FINISH_REASONS:
        raise EngineError(f"request {request.request_id} ended with {completion.finish_reason!r}")
    logprobs: tuple[float, ...] = ()
    versions: list[int] = []
    if completion.token_ids:  # else it was aborted before its first one
        assert isinstance(completion.logprobs, FlatLogprobs) and completion.weight_versions is not None
        logprobs = tuple(completion.logprobs.logprobs)
        for span in completion.weight_versions:
            versions += [int(span.version)] * (span.end - span.start)
    assert len(versions) == len(logprobs) == len(completion.token_ids), request.request_id
    return Rollout(
        request_id=request.request_id,
        prompt_ids=request.prompt_ids,
        response_ids=tuple(completion.token_ids),
        logprobs=logprobs,
        finish_reason=FINISH_REASONS[completion.finish_reason],
        weight_versions=tuple(versions),
        seed=request.sampling.seed,
    )
