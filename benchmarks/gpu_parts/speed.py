"""Speed and memory of supervised steps: the code as it is, then with one change at a time."""

import contextlib
import inspect
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import AttentionInterface

from gpu_parts.setting import MODELS, PEAK_BF16_FLOPS, UNSUPPORTED, VOCABULARY, Asked, Setting, refused
from stages.config.data import DataSource
from stages.config.sft import SFTConfig
from stages.training.distributed import place
from stages.training.fsdp import Trained
from stages.training.models import CausalLM
from stages.training.packed_attention import PACKED_ATTENTION, packed_attention
from stages.training.randomness import recompute_activations
from stages.training.trainable import Outputs, Reads, TermLoss

BUDGET_S = 200.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What is changed of the code as it is."""

    fused_adamw: bool = False
    head_in_bf16: bool = False  # bf16 x bf16 -> fp32, as vLLM's head
    varlen: bool = False  # torch's attention over lengths, one kernel a row
    keeps_layers: bool = False  # gathered layers stay until the backward pass
    autocast: bool = False  # the plain module instead of FSDP
    recomputes: bool = False
    on_cpu: bool = True  # whether a rehearsal can run it


EVERYTHING = {
    "fused_adamw": True,
    "head_in_bf16": True,
    "varlen": True,
    "keeps_layers": True,
    "on_cpu": False,
}
VARIANTS = {
    "as it is": Variant(),
    "fused adamw": Variant(fused_adamw=True),
    "head bf16 to fp32": Variant(head_in_bf16=True, on_cpu=False),
    "varlen": Variant(varlen=True, on_cpu=False),
    "no reshard": Variant(keeps_layers=True),
    "autocast, no fsdp": Variant(autocast=True),
    "recomputed": Variant(recomputes=True),
    "all": Variant(**EVERYTHING),
    "all, recomputed": Variant(**EVERYTHING, recomputes=True),
}


def speed(setting: Setting) -> None:
    """Tokens per second, share of the card's peak and memory, by model, row and variant; those that are not
    begun within BUDGET_S, or before the deadline of all checks, are left out.
    """
    until = min(time.perf_counter() + BUDGET_S, setting.deadline)
    cases = [((9, 20, 7), 2)] if setting.is_small else [((150,) * 8, 8), ((512,) * 16, 2)]
    for size in setting.sizes:
        for lengths, num_rows in cases:
            for name, variant in VARIANTS.items():
                if not (variant.on_cpu or setting.has_gpu):
                    continue
                shape = {"model": size, "variant": name, "sequences": len(lengths), "rows": num_rows}
                if time.perf_counter() > until:
                    setting.say("speed", **shape, left_out="no time left")
                    continue
                with setting.clean():
                    try:
                        figures = _measured(setting, size, lengths, num_rows, variant)
                    except UNSUPPORTED as error:
                        figures = {"failed": refused(error)}
                    setting.say("speed", **shape, **figures)


def _measured(
    setting: Setting, size: str, lengths: tuple[int, ...], num_rows: int, variant: Variant
) -> dict[str, Any]:
    model = _placed(setting, size, variant)
    config = SFTConfig(data=[DataSource(path="unused")], precision="bf16", warmup_frac=0)
    learner = Trained(model, config, lr=1e-5, max_steps=100)
    if variant.fused_adamw:
        _fuse(learner.state().adamw, setting.device)
    tokens = sum(lengths)
    trained = torch.arange(tokens // 2, tokens - 1, device=setting.device)  # half of them
    packs = [Asked.of(setting.row(lengths, size=size, seed=index), trained) for index in range(num_rows)]
    reads = Reads(logprobs=True, temperature=1.0)

    def loss_of(_: Asked, now: Outputs) -> TermLoss:
        assert now.logprobs_N is not None
        return TermLoss(loss=-now.logprobs_N.sum() / (tokens * num_rows))

    losses: list[float] = []

    def step() -> None:
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=variant.autocast):
            result = learner.take_step(1, packs, reads, loss_of, lambda *_: True)
        losses.append(result.loss)

    with _varlen_attention() if variant.varlen else contextlib.nullcontext():
        seconds = setting.seconds(step, repeats=3)
    flops = num_rows * _flops(model, size, lengths, len(trained))
    return {
        "ms": round(seconds * 1e3, 1),
        "tokens_per_s": round(num_rows * tokens / seconds),
        "mfu": round(flops / seconds / PEAK_BF16_FLOPS, 4) if setting.has_gpu else None,
        "peak_gib": setting.peak_gib(),
        "first_loss": round(losses[0], 5),
    }


def _placed(setting: Setting, size: str, variant: Variant) -> CausalLM:
    model = setting.fresh_model(size)
    if variant.recomputes:
        recompute_activations(model.inner)
    if variant.autocast:
        return model
    place(model, setting.worker("sft"), precision="bf16", trained=True)
    if variant.keeps_layers:
        for part in model.modules():
            if isinstance(part, FSDPModule):
                part.set_reshard_after_forward(False)
    if variant.head_in_bf16:
        _compute_head_in_bf16(model)
    return model


def _compute_head_in_bf16(model: CausalLM) -> None:
    head: Any = model.head

    def forward(hidden: Tensor) -> Tensor:
        logits = _BF16Head.apply(hidden.flatten(0, -2), head.weight)
        return logits.unflatten(0, hidden.shape[:-1])

    head.forward = forward


class _BF16Head(torch.autograd.Function):
    """hidden [N, D] x weight [V, D] in bf16 -> logits [N, V] in fp32, accumulated in fp32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        gradient = gradient.to(hidden.dtype)
        return gradient @ weight, gradient.t() @ hidden


def _fuse(adamw: torch.optim.AdamW, device: torch.device) -> None:
    for group in adamw.param_groups:
        group["fused"], group["foreach"] = True, False
    for moments in adamw.state.values():
        moments["step"] = moments["step"].to(device)


@contextlib.contextmanager
def _varlen_attention() -> Iterator[None]:
    """Inside, layers attend by torch's own kernel over lengths."""
    from torch.nn.attention.varlen import varlen_attn

    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    ends: dict[tuple[int, ...], Tensor] = {}

    def attend(
        _module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        *,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        lengths = tuple(mask.tolist()[1:])
        if lengths not in ends:
            ends[lengths] = torch.tensor([0, *lengths]).cumsum(0).to(query.device, torch.int32)
        rows = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        where = (ends[lengths], ends[lengths], max(lengths), max(lengths))
        return varlen_attn(*rows, *where, window_size=(-1, 0), scale=scaling, **grouped)[None], None

    AttentionInterface.register(PACKED_ATTENTION, attend)
    try:
        yield
    finally:
        AttentionInterface.register(PACKED_ATTENTION, packed_attention)


def _flops(model: CausalLM, size: str, lengths: tuple[int, ...], num_logits: int) -> int:
    """Of forward and backward of one row: 6 per weight and token, the head at its positions alone, and half
    of all pairs of tokens within sequences (12 x hidden x layers, causal).
    """
    shape, tokens = MODELS[size], sum(lengths)
    head = VOCABULARY[size] * shape.hidden_size
    body = sum(parameter.numel() for parameter in model.parameters()) - head
    pairs = sum(length * length for length in lengths)
    return 6 * (body * tokens + head * num_logits) + 6 * shape.layers * shape.hidden_size * pairs
