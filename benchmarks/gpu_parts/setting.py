"""What the checks of one GPU share: the device, tiny or real sizes, clocks, and where findings go."""

import contextlib
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stages.config.model import ModelConfig
from stages.data.packing import PackedRow, pack
from stages.runtime import Runtime, StageResources
from stages.training.distributed import Worker
from stages.training.models import CausalLM, build_causal_lm

PEAK_BF16_FLOPS = 989e12
"""Of an H100 or H200, dense: NVIDIA's data sheet. What `mfu` is a share of."""
VOCABULARY = {"0.5b": 151936, "1b": 128256, "tiny": 512}
MODELS = {
    "0.5b": ModelConfig(
        layers=24, hidden_size=896, intermediate_size=4864, num_heads=14, num_kv_heads=2, context_length=16384
    ),
    "1b": ModelConfig(
        layers=16,
        hidden_size=2048,
        intermediate_size=8192,
        num_heads=32,
        num_kv_heads=8,
        context_length=16384,
    ),
    "tiny": ModelConfig(
        layers=2, hidden_size=64, intermediate_size=128, num_heads=2, num_kv_heads=1, context_length=16384
    ),
}
"""Shapes of Qwen2.5-0.5B, of Llama-3.2-1B, and one for a rehearsal on a CPU."""

UNSUPPORTED = (RuntimeError, ValueError, TypeError, ImportError)
"""What a way raises that this torch or this card does not have, or has no memory for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A row, and the tokens of it whose log-probs are asked: a pack."""

    row: PackedRow
    predicting_N: Tensor  # int64
    targets_N: Tensor  # int64

    @classmethod
    def of(cls, row: PackedRow, predicting_N: Tensor) -> "Asked":
        """Each of `predicting_N` predicts the token after it."""
        return cls(row=row, predicting_N=predicting_N, targets_N=row.input_ids_1N[0, predicting_N + 1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One run of the checks."""

    device: torch.device
    is_small: bool  # a rehearsal: tiny models, few repeats
    scratch: Path
    deadline: float  # of time.perf_counter: no part of a check begins later
    findings: list[dict[str, Any]] = field(default_factory=list)

    @property
    def has_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def left_s(self) -> float:
        """Seconds until the deadline; 0 or less after it."""
        return self.deadline - time.perf_counter()

    def check_time(self) -> None:
        """Raises TimeoutError after the deadline: before each part of a check whose result is a must."""
        if self.left_s <= 0:
            raise TimeoutError("no time left")

    @property
    def sizes(self) -> tuple[str, ...]:
        """Models whose speed is measured."""
        return ("tiny",) if self.is_small else ("0.5b", "1b")

    @property
    def size(self) -> str:
        """The model of checks that need one."""
        return self.sizes[0]

    def say(self, check: str, **figures: Any) -> None:
        """One finding: a JSON line now, a row of the table at the end."""
        self.findings.append({"check": check, **figures})
        print(json.dumps(self.findings[-1]), flush=True)

    def seconds(self, call: Callable[[], object], *, repeats: int = 5, warm_up: int = 2) -> float:
        """Median of `repeats` calls, after `warm_up` that do not count."""
        for _ in range(warm_up):
            call()
        return statistics.median(self.once(call) for _ in range(1 if self.is_small else repeats))

    def once(self, call: Callable[[], object]) -> float:
        """Seconds of one call, until the device is done."""
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Until the device has done what it was told."""
        if self.has_gpu:
            torch.cuda.synchronize()

    def peak_gib(self) -> float | None:
        """Of the device's memory since `clean`."""
        return round(torch.cuda.max_memory_allocated() / 2**30, 2) if self.has_gpu else None

    @contextlib.contextmanager
    def clean(self) -> Iterator[None]:
        """Around a part of a check: memory and process group are free before and after."""
        self._free()
        try:
            yield
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            self._free()

    def _free(self) -> None:
        gc.collect()
        if self.has_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def directory(self, name: str) -> Path:
        """A new directory for scratch."""
        made = self.scratch / f"{name}-{len(list(self.scratch.iterdir()))}"
        made.mkdir()
        return made

    def worker(self, stage: str) -> Worker:
        """The one worker of a stage on this device."""
        directory = self.directory(stage)
        for name in ("work", "logs"):
            (directory / name).mkdir()
        runtime = Runtime(
            stage=stage,
            work_dir=directory / "work",
            log_dir=directory / "logs",
            resources=StageResources(num_gpus=float(self.has_gpu)),
            executor="inline",
            placement_timeout_s=60,
            collective_timeout_s=120,
            num_threads=torch.get_num_threads(),
            stop_file=directory / "stop",
        )
        return Worker(rank=0, world_size=1, device=self.device, runtime=runtime)

    def fresh_model(self, size: str) -> CausalLM:
        """With weights from seed 0, in fp32, on the device."""
        torch.manual_seed(0)
        with self.device:
            return build_causal_lm(MODELS[size], vocab_size=VOCABULARY[size], eos_token_id=2, pad_token_id=0)

    def row(self, lengths: Sequence[int], *, size: str, seed: int = 0) -> PackedRow:
        """Random sequences in one row, on the device."""
        generator = torch.Generator().manual_seed(seed)
        ids = [torch.randint(5, VOCABULARY[size], (n,), generator=generator).tolist() for n in lengths]
        return pack(ids).to(self.device)


def refused(error: Exception) -> str:
    """An error in one short line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:200]
