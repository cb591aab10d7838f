"""Nothing in a model is random: a forward in training is the forward of evaluation, bit for bit.

    loaded model --switch_off--> no module is ever in train mode --recompute_activations--> less memory

Owns: the rule that keeps dropout, LayerDrop, router jitter and sampled routing off, and recomputing
activations without train mode. Does not own: which families are computed right.

The rule goes by mode, not by name. Each family of transformers names its knobs in its own way (`attn_pdrop`,
`layerdrop`, `router_jitter_noise`, `ffn_config.moe_jitter_eps`; phimoe samples its experts with no knob at
all), but everything random asks `self.training` first. Names would also mislead: phimoe's
`router_jitter_noise` is not noise but a threshold, which evaluation and the engine use too.
"""

from contextvars import copy_context
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from stages.errors import ModelError


def switch_off(model: PreTrainedModel) -> None:
    """Put `model` in eval mode for good: `train()` on it, or on what contains it, changes nothing.

    Dropout probabilities are 0 besides, in the modules and in the config, so that a part that someone else
    puts in train mode has none.
    """
    model.eval()
    model.train = partial(_stay_in_eval, model)  # type: ignore[method-assign]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        _no_dropout(module)
    _no_dropout(model.config)


def _stay_in_eval(model: PreTrainedModel, mode: bool = True) -> PreTrainedModel:
    """`model.train`, from now on."""
    return model


def _no_dropout(owner: nn.Module | PreTrainedConfig) -> None:
    for name, value in list(vars(owner).items()):
        if "dropout" in name and isinstance(value, float):
            setattr(owner, name, 0.0)


def recompute_activations(model: PreTrainedModel) -> None:
    """From now on the backward pass recomputes what is inside each layer; its gradient is the same to the
    bit. ModelError for a model that transformers has not cut into such layers.

    transformers' own switch (`gradient_checkpointing_enable`) works in train mode alone. A layer's hooks stay
    outside, so that a sharded layer is gathered for the recomputation as for any backward pass.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"{type(model).__name__}: transformers cannot recompute its activations; "
            "set gradient_checkpointing: false"
        )
    for layer in layers:
        layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    """The recomputation sees the context variables of the forward pass, also on the threads that run a GPU's
    backward pass.
    """
    context = copy_context()

    def run(*args: Any, **kwargs: Any) -> Any:
        return context.copy().run(forward, *args, **kwargs)

    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
