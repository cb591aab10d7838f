"""The sender yields exactly what `save_pretrained` writes, whatever the trainer has wrapped around its
model.
"""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rollout.ground.errors import EnvironmentProblem
from rollout.weight_file import checkpoint_layout
from rollout.weight_source import ModuleSource


def load(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


def sent(model, dtype="float32") -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for group in ModuleSource(model, dtype=dtype).groups():
        assert not tensors.keys() & group.keys()
        tensors |= group
    return tensors


def assert_same(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 0.0
) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=tolerance)


@pytest.fixture(params=["tied", "untied"])
def model_dir(request):
    return request.getfixturevalue(f"{request.param}_model_dir")


def test_names_and_tensors_are_those_of_save_pretrained(model_dir, tmp_path):
    model = load(model_dir)
    model.save_pretrained(tmp_path)
    assert_same(sent(model), load_file(tmp_path / "model.safetensors"))


def test_tied_names_are_given_apart_and_only_when_tied(tied_model_dir, untied_model_dir):
    tied, untied = (ModuleSource(load(path), dtype="float32") for path in (tied_model_dir, untied_model_dir))
    assert tied.aliases() == {"lm_head.weight": "model.embed_tokens.weight"}
    assert untied.aliases() == {}


def test_a_group_is_one_layer(untied_model_dir):
    groups = [
        sorted({name.split(".")[2] for name in group if ".layers." in name})
        for group in ModuleSource(load(untied_model_dir), dtype="float32").groups()
    ]
    assert [layers for layers in groups if layers] == [["0"], ["1"]]


def test_the_engines_dtype_is_what_is_sent(model_dir):
    assert {tensor.dtype for tensor in sent(load(model_dir), dtype="bfloat16").values()} == {torch.bfloat16}


def test_the_layout_of_a_directory_is_what_its_model_sends(model_dir):
    layout = checkpoint_layout(model_dir, dtype="float32")
    assert layout.shapes == {name: tuple(tensor.shape) for name, tensor in sent(load(model_dir)).items()}


def test_a_directory_without_weights_is_a_clear_error(tmp_path):
    with pytest.raises(EnvironmentProblem, match="save_pretrained"):
        checkpoint_layout(tmp_path, dtype="float32")


def test_names_of_wrappers_do_not_travel(model_dir):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    plain = sent(load(model_dir))
    model = load(model_dir)
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    model.model.layers[1] = torch.compile(model.model.layers[1])
    assert_same(sent(torch.compile(model)), plain)


def test_lora_is_merged_into_the_weights_that_are_sent(untied_model_dir):
    import peft

    model = peft.get_peft_model(
        load(untied_model_dir),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    ours = {name: tensor.clone() for name, tensor in sent(model).items()}
    with model.disable_adapter():
        assert_same(sent(model), sent(load(untied_model_dir)))
    assert not torch.equal(
        ours["model.layers.0.self_attn.q_proj.weight"],
        sent(load(untied_model_dir))["model.layers.0.self_attn.q_proj.weight"],
    )
    assert_same(ours, sent(model.merge_and_unload()), tolerance=1e-6)


def test_adapters_that_are_more_than_a_sum_are_refused(untied_model_dir):
    import peft

    model = peft.get_peft_model(
        load(untied_model_dir), peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)
    )
    with pytest.raises(EnvironmentProblem, match="plain LoRA"):
        sent(model)


def test_sharded_parameters_are_gathered_whole(model_dir, tmp_path):
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    plain = sent(load(model_dir))
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = load(model_dir)
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        assert_same(sent(model), plain)
        assert (
            ModuleSource(model, dtype="float32").aliases()
            == ModuleSource(load(model_dir), dtype="float32").aliases()
        )
    finally:
        distributed.destroy_process_group()
