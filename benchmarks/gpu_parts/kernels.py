"""What the card can do, and packed attention on it: the same numbers as a mask, and which way is fastest."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from gpu_parts.setting import UNSUPPORTED, Setting, refused
from stages.training.packed_attention import packed_attention

Way = Callable[[Tensor, Tensor, Tensor, tuple[int, ...]], Tensor]
"""Queries [1, H, N, D], keys and values [1, K, N, D], lengths -> outputs [1, N, H, D]."""
MAX_MASKED = 8192
"""Tokens of a row whose mask is still built."""
MAX_EXACT = 2100
"""Tokens of a row whose attention is also computed in float64, on the CPU."""


def ceilings(setting: Setting) -> None:
    """TFLOP/s of matrix products: what every other number is held against."""
    size = 8192 if setting.has_gpu and not setting.is_small else 1024
    a, b = (torch.randn(size, size, device=setting.device, dtype=torch.bfloat16) for _ in range(2))
    a32, b32 = a.float(), b.float()

    def tflops(call: Callable[[], object]) -> float:
        return round(2 * size**3 / setting.seconds(call) / 1e12, 2)

    setting.say(
        "ceilings",
        torch=torch.__version__,
        device=torch.cuda.get_device_name() if setting.has_gpu else "cpu",
        fp32_precision=torch.get_float32_matmul_precision(),
        bf16_tflops=tflops(lambda: a @ b),
        fp32_tflops=tflops(lambda: a32 @ b32),
        bf16_to_fp32_tflops=tflops(lambda: torch.mm(a, b, out_dtype=torch.float32))
        if setting.has_gpu
        else None,
    )


def attention(setting: Setting) -> None:
    """Each way to attend within sequences: milliseconds of forward and backward, and the relative error."""
    num_heads, num_kv_heads, head_dim = (8, 2, 32) if setting.is_small else (32, 8, 64)
    cases: list[tuple[int, ...]] = [(7, 19, 5), (16,) * 8]
    if not setting.is_small:
        mixed = tuple(97 + 53 * (index % 7) for index in range(8))
        cases = [mixed, (256,) * 8, (64,) * 32, (2048,) * 4, (8192,)]
    for dtype in (torch.bfloat16, torch.float32):
        for lengths in cases:
            setting.check_time()
            generator = torch.Generator(device=setting.device).manual_seed(0)
            shapes = [(1, heads, sum(lengths), head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads)]
            inputs = [
                torch.randn(shape, device=setting.device, dtype=dtype, generator=generator)
                for shape in shapes
            ]
            figures = {
                name: _measured(setting, way, inputs, lengths)
                for name, way in _ways(setting, dtype).items()
                if name != "mask" or sum(lengths) <= MAX_MASKED
            }
            named = {"dtype": str(dtype).removeprefix("torch."), "sequences": len(lengths)}
            setting.say("attention", **named, tokens=sum(lengths), **figures)


def _ways(setting: Setting, dtype: torch.dtype) -> dict[str, Way]:
    ways: dict[str, Way] = {"mask": _by_mask, "ours": _ours}
    if setting.has_gpu and dtype == torch.bfloat16:
        ways |= {
            "ours_flash": _with_kernel(SDPBackend.FLASH_ATTENTION),
            "ours_cudnn": _with_kernel(SDPBackend.CUDNN_ATTENTION),
            "varlen_attn": _varlen,
        }
    return ways


def _measured(
    setting: Setting, way: Way, inputs: list[Tensor], lengths: tuple[int, ...]
) -> dict[str, Any] | str:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    last: dict[str, Tensor] = {}

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        last["output"] = way(*leaves, lengths)
        last["output"].sum().backward()

    try:
        first_s = setting.once(step)
        median_s = setting.seconds(step)
    except UNSUPPORTED as error:
        return refused(error)
    error = None
    if sum(lengths) <= MAX_EXACT:
        exact = _exact(inputs, lengths)
        error = float((last["output"].detach().double().cpu() - exact).norm() / exact.norm())
    return {"ms": round(median_s * 1e3, 3), "first_ms": round(first_s * 1e3, 1), "relative_error": error}


def _exact(inputs: list[Tensor], lengths: tuple[int, ...]) -> Tensor:
    """In float64, sequence by sequence."""
    query, key, value = (tensor.double().cpu() for tensor in inputs)
    groups = query.shape[1] // key.shape[1]
    parts = (tensor.split(list(lengths), dim=2) for tensor in (query, key, value))
    outputs = [
        scaled_dot_product_attention(
            q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), is_causal=True
        )
        for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _by_mask(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    counts = torch.tensor(lengths, device=query.device)
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=query.device), counts)
    place = torch.arange(sum(lengths), device=query.device)
    mask = (owner[:, None] == owner) & (place[:, None] >= place)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask[None, None]).transpose(1, 2)


def _ours(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """As a layer of a packed row asks for it: no window, then the lengths."""
    output, _ = packed_attention(nn.Module(), query, key, value, torch.tensor([0, *lengths]))
    return output


def _with_kernel(backend: SDPBackend) -> Way:
    def way(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
        with sdpa_kernel([backend]):
            return _ours(query, key, value, lengths)

    return way


def _varlen(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """torch's own attention over lengths: one kernel for the whole row."""
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor([0, *lengths], device=query.device).cumsum(0).to(torch.int32)
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    rows = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    longest = max(lengths)
    return varlen_attn(*rows, ends, ends, longest, longest, window_size=(-1, 0), **grouped)[None]
