"""Which tensors a model's checkpoint consists of: the sending end of a weight sync, without any transport.

    trainer's model (wrapped, sharded, with adapters) --one layer at a time--> {checkpoint name: whole tensor}

Owns: names as `save_pretrained` writes them, gathering, merging of LoRA adapters, the engine's dtype. Does
not own: where the tensors go (weight_sync), how they are loaded.
"""

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rollout.ground.errors import EnvironmentProblem
from rollout.weight_file import DTYPES

WRAPPER_PARTS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.")
"""Name parts that torch.compile, FSDP, activation checkpointing and DDP put in."""


class ModuleSource:
    """The weights of a causal LM under its checkpoint names. Read again at every iteration: it holds no
    copy.
    """

    def __init__(self, model: torch.nn.Module, *, dtype: str) -> None:
        """`model`: a `PreTrainedModel`, possibly inside DDP, torch.compile or peft, its parameters possibly
        DTensors. `dtype`: "float32" or "bfloat16", what the engine computes in.
        """
        self.dtype = dtype
        self._model = _pretrained(model)

    def groups(self) -> Iterator[dict[str, torch.Tensor]]:
        """One layer's tensors at a time, whole, in the engine's dtype. With DTensors a collective: every rank
        of the model's mesh has to iterate, at the same time.
        """
        aliases = self.aliases()
        for group in by_layer(_merged_state(self._model)):
            whole = {name: self._whole(tensor) for name, tensor in group.items() if name not in aliases}
            if whole:
                yield revert_weight_conversion(self._model, whole)

    def aliases(self) -> dict[str, str]:
        """{tied name: the name it shares its tensor with}: not in the groups, nor in `save_pretrained`'s
        files.
        """
        parameters = dict(_unwrapped(self._model.named_parameters(remove_duplicate=False)))
        return {
            tied: source
            for tied, source in self._model.all_tied_weights_keys.items()
            if parameters[tied] is parameters[source]
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{name: shape} of everything in the groups, in their order. Gathers nothing: no collective."""
        aliases = self.aliases()
        shapes: dict[str, tuple[int, ...]] = {}
        for group in by_layer(_merged_state(self._model)):
            empty = {
                name: torch.empty(tensor.shape, dtype=DTYPES[self.dtype], device="meta")
                for name, tensor in group.items()
                if name not in aliases
            }
            if empty:
                sent = revert_weight_conversion(self._model, empty)
                shapes |= {name: tuple(tensor.shape) for name, tensor in sent.items()}
        return shapes

    def whole(self) -> dict[str, torch.Tensor]:
        """All groups and aliases in one mapping: for small models and for tests."""
        tensors = {name: tensor for group in self.groups() for name, tensor in group.items()}
        return tensors | {tied: tensors[source] for tied, source in self.aliases().items()}

    def _whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """Cast before the gather: a bf16 engine costs half the communication."""
        cast = tensor.detach().to(DTYPES[self.dtype])
        return cast.full_tensor() if isinstance(cast, DTensor) else cast


def _pretrained(model: torch.nn.Module) -> PreTrainedModel:
    """The model inside DDP, torch.compile and peft: each is a module with one child."""
    inner = model
    while not isinstance(inner, PreTrainedModel):
        children = list(inner.children())
        if len(children) != 1:
            raise TypeError(f"no PreTrainedModel inside {type(model).__name__}")
        (inner,) = children
    return inner


def _unwrapped(named: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    return ((WRAPPER_PARTS.sub("", name), tensor) for name, tensor in named)


def _merged_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state dict under plain names, as `save_pretrained` picks it, with adapters added to the weights
    they adapt.
    """
    state = dict(_unwrapped(model.state_dict().items()))
    assert model._keys_to_ignore_on_save is not None  # a set, once the model is built
    for name in model._keys_to_ignore_on_save:
        state.pop(name, None)
    if not any(".base_layer." in name or ".modules_to_save." in name for name in state):
        return state
    deltas = _lora_deltas(model)
    merged = {}
    for name, tensor in state.items():
        if ".lora_" in name or ".original_module." in name:
            continue
        plain = re.sub(r"\.modules_to_save\.[^.]+", "", name.replace(".base_layer.", "."))
        merged[plain] = tensor + deltas[plain].to(tensor.dtype) if plain in deltas else tensor
    return merged


def _lora_deltas(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """{plain weight name: what the active adapters add to it}. Adapters that are more than a sum are
    refused.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    deltas: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if not isinstance(module, LoraLayer) or module.lora_variant or any(module.lora_bias.values()):
            raise EnvironmentProblem(
                f"{name}: this kind of adapter cannot be merged for a weight sync; use plain LoRA"
            )
        if not module.merged and not module.disable_adapters:
            added = [
                module.get_delta_weight(adapter).detach()  # type: ignore[attr-defined]  # every kind has one
                for adapter in module.active_adapters
            ]
            deltas[f"{WRAPPER_PARTS.sub('', name)}.weight"] = functools.reduce(torch.add, added)
    return deltas


def by_layer(state: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Neighbours with the same first number in their name ("model.layers.3."): a whole layer, experts
    included.
    """
    for _, named in groupby(state.items(), key=lambda item: _layer_of(item[0])):
        yield dict(named)


def _layer_of(name: str) -> str:
    match = re.match(r".*?\.\d+\.", name)
    return match.group() if match else ""
