"""Compares what a vLLM model computes with to the tensors of a checkpoint, whatever the model made of them.

    {name: tensor} --model.load_weights, on meta parameters--> calls of its parameters' loaders, recorded
        `--again, each filled with its number--> replayed into scratch: value and origin of every element
    live layers --read out: packed weights by their outputs, experts in their kernel's layout--> same or not?

Owns: finding a tensor in the live model. vLLM renames, joins, transposes and packs; each architecture does it
in its own `load_weights`, which is asked here instead of being written down a second time. Does not own:
which tensors there are, and loading them for real (`vllm_receiver`). Tensor shapes: N outputs, K inputs of a
linear layer.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.oracle.unquantized import (
    UnquantizedMoeBackend,
    convert_to_unquantized_kernel_format,
)
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import _get_original_loader, get_layerwise_info
from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

from rollout.api import Diagnosis, joined_diagnosis
from rollout.weight_source import by_layer

READ_OUT_COLUMNS = 1024
"""Columns of a packed weight that are read out at once: bounds the memory of a comparison."""
READABLE_EXPERTS = (UnquantizedMoeBackend.CPU, UnquantizedMoeBackend.TRITON)
"""Kernels of which it is known that a layer's experts are all that their layout is made of."""
NUMBERS = torch.int32
"""What tensors are numbered in, to see where their elements go."""
DIGIT = 128
"""Numbers of tensors below its square survive an expert kernel's layout in bf16, as two digits."""

Places = dict[tuple[torch.nn.Module, str], torch.Tensor]
"""A tensor for parameters of the live model: (layer, name in it) -> in the shape that a checkpoint fills."""
Leaves = dict[str, torch.Tensor]
"""The same, of one layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """One call of a parameter's loader, not carried out on the live model."""

    module: torch.nn.Module
    leaf: str
    parameter: torch.Tensor  # on meta, in the shape of the checkpoint
    loader: Callable[..., Any]
    arguments: inspect.BoundArguments

    def replay(self, scratch: torch.Tensor) -> None:
        """Load into `scratch`, which stands for the parameter."""
        self.arguments.arguments["param"] = scratch
        self.loader(*self.arguments.args, **self.arguments.kwargs)


def takes_head(model: Any, name: str, shape: tuple[int, ...]) -> bool:
    """Whether the model loads a tensor of this name as an embedding or an output head of its own. One that
    ties its head without a name for it raises, each in its own way; so does one that has never heard of it.
    """
    try:
        calls = _recorded(model, {name: torch.empty(shape, device="meta")}, dtype=None)
    except Exception:  # of any architecture, each with errors of its own
        return False
    return bool(calls) and all(isinstance(call.module, VocabParallelEmbedding) for call in calls)


@torch.no_grad()
def diagnosis(model: Any, tensors: Mapping[str, torch.Tensor]) -> Diagnosis:
    """See `RolloutEngine.diagnose`. `tensors`: whole, on the CPU, under their checkpoint names.

    Takes memory where the model is, about five times that of the tensors of its largest layer. Raises
    nothing: a layer that cannot be compared does not hide what others show.
    """
    return joined_diagnosis(_compared_or_why_not(model, group) for group in by_layer(tensors))


def _compared_or_why_not(model: Any, tensors: Mapping[str, torch.Tensor]) -> Diagnosis:
    try:
        return _compared(model, tensors)
    except Exception as error:  # of any architecture's loaders, and of memory that runs out
        return Diagnosis.failed(error, tensors)


def _compared(model: Any, tensors: Mapping[str, torch.Tensor]) -> Diagnosis:
    """The diagnosis of a few tensors, together all that their layers are loaded from."""
    assert len(tensors) < DIGIT**2
    device = next(model.parameters()).device
    numbers = {
        name: torch.full(tensor.shape, number, dtype=NUMBERS, device=device)
        for number, (name, tensor) in enumerate(tensors.items(), start=1)
    }
    values, origins = _loaded(model, tensors, device), _loaded(model, numbers, device, dtype=NUMBERS)
    tally = _Tally(tensors)
    for module in dict.fromkeys(module for module, _ in values):
        value = {leaf: tensor for (owner, leaf), tensor in values.items() if owner is module}
        origin = {leaf: tally.only_numbers(origins[module, leaf]) for leaf in value}
        if isinstance(module, RoutedExperts):
            if not _is_readable(module):
                tally.leave_out(
                    origin.values(), f"experts in the layout of {type(module.quant_method).__name__}"
                )
                continue
            value, origin = _in_kernel_layout(module, value, origin)
        for leaf in value:
            readings = _readings(module, leaf, value[leaf])
            if any(held.shape != value[leaf].shape for held in readings):
                tally.leave_out([origin[leaf]], "its layer keeps it in another shape")
                continue
            different = [held != value[leaf] for held in readings]
            tally.add(origin[leaf], functools.reduce(torch.logical_or, different))
    return tally.diagnosis()


class _Tally:
    """How many elements of each tensor were found in the live model, and how many of them with another
    value.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._num_read, self._num_wrong = torch.zeros(2, len(tensors) + 1, dtype=torch.long)
        self._reasons: dict[int, str] = {}

    def only_numbers(self, origin: torch.Tensor) -> torch.Tensor:
        """The numbers of tensors in `origin`; 0 where an architecture changed them, as it will the values."""
        return origin * ((origin > 0) & (origin <= len(self._tensors)))

    def add(self, origin: torch.Tensor, different: torch.Tensor) -> None:
        self._num_read += self._counts(origin)
        self._num_wrong += self._counts(origin[different])

    def leave_out(self, origins: Iterable[torch.Tensor], reason: str) -> None:
        for origin in origins:
            self._reasons |= dict.fromkeys(origin.unique().tolist(), reason)

    def diagnosis(self) -> Diagnosis:
        differing, not_compared, num_same = [], [], 0
        for number, (name, tensor) in enumerate(self._tensors.items(), start=1):
            if self._num_wrong[number]:
                differing.append(name)
            elif number in self._reasons:
                not_compared.append(f"{name} ({self._reasons[number]})")
            elif self._num_read[number] < tensor.numel():
                not_compared.append(f"{name} (the engine's model does not keep it as it is)")
            else:
                num_same += 1
        return Diagnosis(differing=tuple(differing), not_compared=tuple(not_compared), num_same=num_same)

    def _counts(self, origin: torch.Tensor) -> torch.Tensor:
        return torch.bincount(origin.flatten(), minlength=len(self._tensors) + 1).cpu()


def _loaded(
    model: Any, tensors: Mapping[str, torch.Tensor], device: torch.device, *, dtype: torch.dtype | None = None
) -> Places:
    """What the parameters of the live model would hold if they were loaded from `tensors`, in `dtype` or
    their own: 0 where nothing is loaded, and without parameters that get nothing.
    """
    places: Places = {}
    for call in _recorded(model, tensors, dtype):
        place = call.module, call.leaf
        if place not in places:
            places[place] = _like(call.parameter, torch.zeros_like(call.parameter, device=device))
        call.replay(places[place])
    return places


def _recorded(model: Any, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> list[_Call]:
    """How the model's own `load_weights` loads `tensors`, nothing of which reaches the model. Raises what the
    model raises.
    """
    with _meta_parameters(model, dtype) as calls:
        model.load_weights(tensors.items())
    return calls


@contextmanager
def _meta_parameters(model: torch.nn.Module, dtype: torch.dtype | None) -> Iterator[list[_Call]]:
    """Inside, every parameter and buffer of a checkpoint is an empty one of the shape that it had before it
    was first loaded, as vLLM recorded them, in `dtype` or its own. Each call of a loader of theirs is added
    to the list.
    """
    calls: list[_Call] = []
    live: list[tuple[dict[str, Any], dict[str, Any]]] = []  # (of a module, as it was)
    try:
        for module in model.modules():
            recorded = get_layerwise_info(module).restore_metadata
            holders: tuple[Any, Any] = module._parameters, module._buffers
            for held, first in zip(holders, recorded, strict=True):
                live.append((held, dict(held)))
                for leaf, tensor in {**held, **first}.items():
                    if tensor is not None and leaf not in module._non_persistent_buffers_set:
                        empty = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device="meta")
                        held[leaf] = _recording(module, leaf, _like(tensor, empty), calls)
        yield calls
    finally:
        for held, before in live:
            held.clear()
            held.update(before)


def _recording(module: torch.nn.Module, leaf: str, parameter: Any, calls: list[_Call]) -> Any:
    """`parameter` with a loader that also writes down how it was called."""
    restore_layer_refs(parameter, module)  # which vLLM took out of its record
    loader = _get_original_loader(parameter)  # without the wrapper that a reload leaves on it
    untouched = _like(parameter, parameter)

    @functools.wraps(loader, assigned=("__doc__",))
    def record(*args: Any, **kwargs: Any) -> Any:
        calls.append(
            _Call(
                module=module,
                leaf=leaf,
                parameter=untouched,
                loader=loader,
                arguments=inspect.signature(loader).bind(*args, **kwargs),
            )
        )
        return loader(*args, **kwargs)

    parameter.weight_loader = record
    return parameter


def _like(parameter: Any, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` with the class and the attributes of `parameter`, by which loaders find their way."""
    alike = tensor.detach()
    alike.__class__ = parameter.__class__
    alike.__dict__ = parameter.__dict__.copy()
    return alike


def _readings(module: Any, leaf: str, value: torch.Tensor) -> list[torch.Tensor]:
    """Everything that the layer computes with where `value` was loaded: a packed copy, the parameter, or both
    where an embedding is also an output head.
    """
    is_matrix = leaf == "weight" and value.ndim == 2
    if is_matrix and isinstance(module, VocabParallelEmbedding):
        return [module.get_parameter(leaf), _read_out(module, value)]
    if is_matrix and isinstance(module, LinearBase):
        return [_read_out(module, value)]
    return [getattr(module, leaf)]


def _read_out(module: Any, value: torch.Tensor) -> torch.Tensor:
    """The weight (N, K) that the layer computes with: its outputs for the rows of the identity. Exact in any
    precision, because each output is one weight times one, plus zeros. A packed layer keeps no other readable
    copy.
    """
    num_inputs = value.shape[1]
    columns = []
    for start in range(0, num_inputs, READ_OUT_COLUMNS):
        num_rows = min(READ_OUT_COLUMNS, num_inputs - start)
        basis = value.new_zeros(num_rows, num_inputs)
        basis[:, start : start + num_rows].fill_diagonal_(1)
        columns.append(module.quant_method.apply(module, basis, None).T)
    return torch.cat(columns, dim=1)


def _is_readable(experts: Any) -> bool:
    """Whether it is known how the kernel of fused experts keeps their weights."""
    method = experts.quant_method
    return isinstance(method, UnquantizedFusedMoEMethod) and method.unquantized_backend in READABLE_EXPERTS


def _in_kernel_layout(experts: Any, value: Leaves, origin: Leaves) -> tuple[Leaves, Leaves]:
    """`value` and `origin` of fused experts in the layout in which their kernel reads them, as the live
    parameters have it. The kernels only move and pad values, so that the numbers of tensors can go the same
    way.
    """
    low, high = (
        _prepared(experts, {leaf: digit(number).to(value[leaf].dtype) for leaf, number in origin.items()})
        for digit in (lambda number: number % DIGIT, lambda number: number // DIGIT)
    )
    numbers = {leaf: high[leaf].to(NUMBERS) * DIGIT + low[leaf].to(NUMBERS) for leaf in origin}
    return _prepared(experts, value), numbers


def _prepared(experts: Any, plain: Leaves) -> Leaves:
    """What vLLM makes of freshly loaded experts, once, before their kernel can read them."""
    layer: Any = torch.nn.Module()
    layer.moe_config, layer.activation = copy.copy(experts.moe_config), experts.activation
    for leaf, tensor in plain.items():
        layer.register_parameter(leaf, torch.nn.Parameter(tensor.clone(), requires_grad=False))
    method = experts.quant_method
    layer.w13_weight.data, layer.w2_weight.data = convert_to_unquantized_kernel_format(
        method.unquantized_backend,
        moe_config=layer.moe_config,
        w13_weight=layer.w13_weight.data,
        w2_weight=layer.w2_weight.data,
        layer=layer,
    )
    method.moe_kernel.fused_experts.process_weights_after_loading(layer)
    return {leaf: layer.get_parameter(leaf) for leaf in plain}
