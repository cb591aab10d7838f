"""What a stage reserves, what can never be placed, and how much memory a plan counts."""

import json
from itertools import accumulate
from pathlib import Path

import pytest
from fake_chain import Chain
from families.table import FAMILIES

from pipeline import placement
from pipeline.architecture import TIED_BY_DEFAULT, Architecture
from pipeline.config import load
from pipeline.errors import ConfigError
from pipeline.placement import architecture_of, bundles_by_stage, host_memory_of, memory_of, plan
from rollout.config import EngineConfig
from stages.bundles import bundles_of, lacking
from stages.runtime import StageResources

CONFIGS = Path(__file__).parents[2] / "configs"
GIB = 2**30
GPU_WORKERS = StageResources(num_workers=8, num_cpus=4, num_gpus=1, num_gpus_per_engine=1)


def nodes(*resources: dict[str, float]) -> dict[str, dict[str, float]]:
    return {f"node-{index}": node for index, node in enumerate(resources)}


def test_with_a_shared_file_the_engines_sit_in_the_first_workers_bundle():
    rollout = EngineConfig(sync="shm", num_engines=2)
    bundles = bundles_of("ppo", GPU_WORKERS.model_copy(update={"num_workers": 2}), rollout)
    assert bundles.all == ({"CPU": 4, "GPU": 3}, {"CPU": 4, "GPU": 1})
    assert [bundles.engine_index(engine) for engine in range(2)] == [0, 0]
    assert (
        str(bundles) == "ppo: 1 x {CPU: 4, GPU: 3} + 1 x {CPU: 4, GPU: 1} + 2 engines with the first worker"
    )


def test_with_another_transport_each_engine_has_a_bundle_of_its_own():
    bundles = bundles_of("ppo", GPU_WORKERS, EngineConfig(sync="nccl", num_engines=4))
    assert bundles.all == ({"CPU": 4, "GPU": 1},) * 8 + ({"GPU": 1},) * 4
    assert [bundles.engine_index(engine) for engine in range(4)] == [8, 9, 10, 11]
    assert str(bundles) == "ppo: 8 x {CPU: 4, GPU: 1} + 4 engines x {GPU: 1}"


def test_engines_that_reserve_nothing_may_go_anywhere():
    bundles = bundles_of("ppo", StageResources(), EngineConfig(sync="gloo", num_engines=2))
    assert bundles.all == ({"CPU": 1},)
    assert bundles.engine_index(1) is None
    assert str(bundles) == "ppo: 1 x {CPU: 1} + 2 engines anywhere"


def test_shares_of_one_gpu_add_up_to_it():
    resources = StageResources(num_gpus=0.7, num_gpus_per_engine=0.1)
    bundles = bundles_of("ppo", resources, EngineConfig(num_engines=3))
    assert bundles.all == ({"CPU": 1, "GPU": 1.0},)
    assert lacking([bundles], nodes({"CPU": 1, "GPU": 1})) is None


def test_what_the_cluster_lacks_in_all_is_counted():
    bundles = bundles_of("ppo", GPU_WORKERS, EngineConfig(sync="nccl", num_engines=4))
    assert lacking([bundles], nodes({"CPU": 32, "GPU": 2}, {"CPU": 32, "GPU": 2})) == (
        "ppo: 8 x {CPU: 4, GPU: 1} + 4 engines x {GPU: 1}: the cluster has 4 GPUs on 2 nodes; missing 8 GPU"
    )


def test_a_bundle_larger_than_every_node_is_refused_although_the_total_would_do():
    bundles = bundles_of("sft", StageResources(num_cpus=3, num_workers=2), None)
    assert lacking([bundles], nodes({"CPU": 2}, {"CPU": 4})) == (
        "sft: 2 x {CPU: 3}: a bundle is never split over nodes, and the room on 2 nodes is for 1 x "
        "{CPU: 3}; missing 1"
    )
    assert lacking([bundles], nodes({"CPU": 3}, {"CPU": 4})) is None


def test_a_larger_bundle_takes_a_place_from_the_smaller_ones():
    """3 + 1 GPUs and 2 x 1: the bundle of 3 needs a node that could have held three."""
    resources = StageResources(num_workers=2, num_gpus=1, num_gpus_per_engine=1)
    bundles = bundles_of("ppo", resources, EngineConfig(num_engines=2))  # {3 GPU}, {1 GPU}
    assert lacking([bundles], nodes({"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 2})) is not None
    assert lacking([bundles], nodes({"CPU": 8, "GPU": 3}, {"CPU": 8, "GPU": 1})) is None


def test_stages_that_run_side_by_side_are_added_up(chain: Chain):
    config = chain.config("reward.init_from=pretrain")
    stages = list(bundles_by_stage(config, ("sft", "reward")).values())
    assert lacking(stages[:1], nodes({"CPU": 1})) is None
    assert lacking(stages, nodes({"CPU": 1})) == (
        "sft: 1 x {CPU: 1}, side by side with reward: 1 x {CPU: 1}: "
        "the cluster has 1 CPU on 1 node; missing 1 CPU"
    )


def test_a_reward_stage_without_a_policy_to_sample_from_has_no_engine(chain: Chain):
    assert bundles_by_stage(chain.config(), ("reward",))["reward"].num_engines == 1
    assert bundles_by_stage(chain.config("reward.init_from=pretrain"), ("reward",))["reward"].num_engines == 0


def test_prepare_reserves_nothing(chain: Chain):
    assert bundles_by_stage(chain.config(), ("prepare",)) == {}


@pytest.mark.parametrize(
    ("directory", "num_parameters"), [("llama_hh_cluster", 8_030_261_248), ("qwen_gsm8k_gpu", 494_032_768)]
)
def test_the_parameters_counted_from_a_config_json_are_those_of_the_model(directory, num_parameters):
    """As published; qwen2's attention biases, 0.006 %, are not counted."""
    counted = Architecture.from_file(CONFIGS / directory / "architecture.json").whole
    assert counted == pytest.approx(num_parameters, rel=1e-4)


@pytest.mark.parametrize("overrides", [[], ["model.num_experts=6"]], ids=["dense", "mixture"])
def test_the_parameters_of_a_model_from_scratch_are_those_torch_allocates(chain: Chain, tmp_path, overrides):
    from stages.training.models import build_causal_lm

    config = chain.config("prepare.vocab_size=400", "model.tie_embeddings=false", *overrides)
    model = build_causal_lm(config.model, vocab_size=400, eos_token_id=2, pad_token_id=0)
    architecture = architecture_of(config)
    assert architecture.whole == sum(parameter.numel() for parameter in model.parameters())
    layer = model.inner.model.layers[0]
    assert architecture.layer == sum(parameter.numel() for parameter in layer.parameters())
    model.inner.config.save_pretrained(tmp_path)
    assert Architecture.from_file(tmp_path / "config.json") == architecture


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe", "granitemoe", "qwen2_moe"])
def test_the_experts_of_a_config_json_are_counted_whatever_its_family_calls_them(name, tmp_path):
    """Norms of queries and keys, biases and the gate of a shared expert are not counted."""
    family = FAMILIES[name]
    family.config().save_pretrained(tmp_path)
    counted = Architecture.from_file(tmp_path / "config.json").whole
    assert counted == pytest.approx(family.make().num_parameters(), rel=0.02)


def test_masters_gradients_and_moments_are_sharded_and_frozen_models_too():
    loaded = load(CONFIGS / "llama_hh_cluster.yaml").config
    memory = memory_of(loaded, "ppo", architecture_of(loaded))
    parts = memory["worker"].parts
    trained = 8_030_261_248 + 7_504_924_672  # policy, and a value model without an output head
    assert parts["fp32 weights"] == pytest.approx(4 * trained / 8, rel=1e-3)
    assert parts["Adam"] == 2 * parts["fp32 weights"] == 2 * parts["gradients"]
    assert parts["frozen models"] == pytest.approx(4 * trained / 8, rel=1e-3)
    assert memory["engine"].parts["weights"] == pytest.approx(2 * 8_030_261_248, rel=1e-3)
    kv_per_token = 2 * 32 * 8 * 128 * 2  # keys and values, layers, heads, head_dim, bf16
    (cache,) = (size for name, size in memory["engine"].parts.items() if name.startswith("keys"))
    assert cache == 128 * 2048 * kv_per_token
    assert str(memory["engine"]).startswith("47 GiB: weights 15")


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_activations_counted_of_a_token_are_those_autograd_keeps(dtype: str, recomputed: bool):
    """Within a hundredth; with checkpointing those of the forward, and the plan has a layer more."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from stages.data.packing import pack
    from stages.training.models import CausalLM
    from stages.training.packed_attention import register_packed_attention
    from stages.training.randomness import recompute_activations

    sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    no_experts = {"num_experts": 0, "expert_size": 1, "experts_per_token": 1, "shared_size": 0}
    others = {**heads, **no_experts, "tie_word_embeddings": False}
    inner = AutoModelForCausalLM.from_config(
        LlamaConfig(**sizes, **heads),
        dtype=getattr(torch, dtype),
        attn_implementation=register_packed_attention(),
    )
    model = CausalLM(inner)
    if recomputed:
        recompute_activations(inner)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    row = pack([list(range(5, 55)), list(range(5, 19))])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.inner.model(**row.model_inputs())
    per_token = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 64
    architecture = Architecture(**sizes, **others)
    itemsize = torch.finfo(getattr(torch, dtype)).bits // 8
    counted = architecture.activations(itemsize, recomputed=recomputed)
    if recomputed:
        one_layer = Architecture(**sizes | {"num_hidden_layers": 1}, **others)
        counted -= one_layer.activations(itemsize, recomputed=False)
        assert per_token == pytest.approx(counted + 4 * 128 + itemsize * 128, rel=0.01)  # and the last norm
    else:
        assert per_token == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("positions", [300, 1500], ids=["one chunk", "two"])
def test_the_logits_counted_are_what_log_probs_and_their_gradient_allocate(chain: Chain, positions: int):
    import torch
    from torch.profiler import ProfilerActivity, profile

    from stages.objectives.logprobs import token_logprobs

    config = chain.config(f"model.context_length={positions}", "sft.micro_batch_size=1", "sft.batch_size=1")
    architecture = architecture_of(config)
    assert architecture is not None
    parts = memory_of(config, "sft", architecture)["worker"].parts
    counted = parts["largest logits and their gradients"] + parts["a chunk of log-softmax and its gradient"]
    inputs, head = torch.randn(positions, 4, requires_grad=True), torch.randn(4, architecture.vocab_size)
    targets = torch.zeros(positions, dtype=torch.int64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        token_logprobs(logits=inputs @ head, targets=targets, temperature=1.0).sum().backward()
    events = sorted(run.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held = accumulate(event.nbytes() for event in events if event.name() == "[memory]")
    assert max(held) == pytest.approx(counted, rel=0.02)


def test_a_bf16_language_model_copies_its_head_to_fp32_and_a_reward_model_has_none():
    config = load(CONFIGS / "qwen_gsm8k_gpu.yaml").config
    part = "fp32 copy of the head and its gradient"
    sft, ppo, reward = (
        memory_of(config, stage, architecture_of(config))["worker"].parts
        for stage in ("sft", "ppo", "reward")
    )
    assert sft[part] == ppo[part] == 2 * 4 * 151936 * 896
    assert reward[part] == 0


def test_a_pair_of_the_reward_stage_is_two_sequences_and_a_row_by_tokens_one(chain: Chain):
    def activations(stage: str, *overrides: str) -> float:
        config = chain.config(*overrides)
        parts = memory_of(config, stage, architecture_of(config))["worker"].parts
        (size,) = (size for name, size in parts.items() if name.startswith("activations"))
        return size

    same = ("sft.micro_batch_size=4", "reward.micro_batch_size=4")
    assert activations("reward", *same) == 2 * activations("sft", *same)
    assert activations("sft", *same) == 4 * activations("sft", "sft.batch_tokens=2560")


def test_the_peak_is_that_of_a_micro_batch_or_of_adams_step_and_on_a_cpu_adam_has_no_temporaries():
    """8B on one GPU: 30 GiB of temporaries, more than a micro-batch has; on eight it is the other way."""
    path, part = CONFIGS / "llama_hh_cluster.yaml", "temporaries of Adam"
    alone, on_cpu, sharded = (
        memory_of(config, "sft", architecture_of(config))["worker"].parts
        for config in (
            load(path, ["resources.sft.num_workers=1"]).config,
            load(path, ["resources.sft.num_workers=1", "resources.sft.num_gpus=0"]).config,
            load(path).config,
        )
    )
    assert alone[part] == pytest.approx(4 * 8_030_261_248, rel=1e-3)
    assert "largest logits and their gradients" not in alone
    assert part not in on_cpu and part not in sharded
    assert sharded["largest logits and their gradients"] > 0


def test_a_whole_model_lies_in_host_memory_before_it_is_sharded(chain: Chain):
    config = load(CONFIGS / "llama_hh_cluster.yaml").config
    loading = host_memory_of(config, "ppo", architecture_of(config))
    assert loading is not None
    assert loading.parts["a whole model"] == pytest.approx(4 * 8_030_261_248, rel=1e-3)
    on_one_cpu = chain.config()
    assert host_memory_of(on_one_cpu, "ppo", architecture_of(on_one_cpu)) is None


def test_the_plan_of_evaluate_counts_the_forwards_that_it_does():
    from stages import evaluate
    from stages.objectives import logprobs
    from stages.training import evaluation

    assert placement.SEQUENCES_EVALUATED == evaluate.MICRO_BATCH_SIZE
    assert placement.DOCUMENTS_EVALUATED == evaluation.MICRO_BATCH_SIZE
    assert placement.LOGPROB_CHUNK == logprobs.CHUNK_TOKENS


def test_one_fp32_worker_gathers_nothing_and_a_cpu_engine_has_its_configured_cache(chain: Chain):
    config = chain.config()
    memory = memory_of(config, "ppo", architecture_of(config))
    assert memory["worker"].parts["gathered fp32 layers and gradients"] == 0
    assert memory["engine"].parts["keys and values"] == config.rollout.kv_cache_mib * 2**20


def test_sft_by_tokens_has_the_logits_of_one_row_at_a_time(chain: Chain):
    """Of 256 positions, where 16 conversations (the micro-batch) have those of 16 times as many."""
    by_number, by_tokens = (
        memory_of(config, "sft", architecture_of(config))["worker"].parts[
            "largest logits and their gradients"
        ]
        for config in (chain.config(), chain.config("sft.batch_tokens=2560"))
    )
    assert by_number == 16 * by_tokens > 0


@pytest.mark.parametrize("name", ["llama_hh_cluster", "qwen_gsm8k_gpu"])
def test_the_plan_of_a_gpu_config_needs_neither_network_nor_weights(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    import socket

    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("asked the network"))
    config = load(CONFIGS / f"{name}.yaml").config
    lines = list(plan(config, ("sft", "ppo")))
    assert lines[0].startswith("sft: ") and "each worker" in lines[1]
    assert any("each engine" in line for line in lines)


def test_a_model_that_nothing_here_describes_is_said_to_be_unknown(chain: Chain, monkeypatch):
    config = chain.config("model.path=somebody/unheard-of")
    *_, last = plan(config, ("sft",))
    assert last == (
        "memory: size unknown, for somebody/unheard-of is not on this machine; "
        "give its config.json as model.architecture"
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_the_plan_of_every_family_has_its_memory_or_says_that_it_does_not_know(
    chain: Chain, tmp_path, name: str
):
    FAMILIES[name].config().save_pretrained(tmp_path / "model")
    lines = list(plan(chain.config(f"model.path={tmp_path}/model"), ("sft",)))
    assert ("each worker" in lines[1]) != lines[-1].startswith("memory: size unknown")


@pytest.mark.parametrize("name", FAMILIES)
def test_where_a_config_json_does_not_say_the_head_is_tied_as_transformers_has_it(name: str, tmp_path):
    config = FAMILIES[name].config()
    stated = {key: value for key, value in config.to_dict().items() if key != "tie_word_embeddings"}
    (tmp_path / "config.json").write_text(json.dumps(stated, default=str))
    try:
        counted = Architecture.from_file(tmp_path / "config.json")
    except ConfigError:
        return  # of other names for its sizes, or lists of them
    assert counted.tie_word_embeddings == type(config)().tie_word_embeddings


def test_a_head_that_is_said_to_be_tied_by_default_is():
    from transformers import AutoConfig

    assert all(AutoConfig.for_model(name).tie_word_embeddings for name in TIED_BY_DEFAULT)


def test_a_model_directory_describes_itself(chain: Chain, tmp_path):
    (tmp_path / "model").mkdir()
    text = (CONFIGS / "qwen_gsm8k_gpu/architecture.json").read_text()
    (tmp_path / "model/config.json").write_text(text)
    config = chain.config(f"model.path={tmp_path}/model")
    assert architecture_of(config) == Architecture.from_file(CONFIGS / "qwen_gsm8k_gpu/architecture.json")


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "falcon", "bloom", "mpt", "gemma3n_text"])
def test_the_plan_of_a_family_with_other_names_for_its_sizes_says_that_it_does_not_know(
    chain: Chain, tmp_path, model_type: str
):
    from transformers import AutoConfig

    AutoConfig.for_model(model_type).save_pretrained(tmp_path / "model")
    *_, last = plan(chain.config(f"model.path={tmp_path}/model"), ("sft",))
    assert last == (
        f"memory: size unknown, for {tmp_path}/model calls its sizes otherwise than a LLaMA; "
        "give a LLaMA's config.json of its size as model.architecture"
    )


def test_a_config_json_that_is_no_language_models_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "hidden_size": 8}))
    with pytest.raises(ConfigError, match=r"not the config.json of a language model"):
        Architecture.from_file(tmp_path / "config.json")


@pytest.mark.parametrize(
    "stated",
    [
        '"num_attention_heads": 0, "head_dim": null',
        '"num_attention_heads": 128, "hidden_size": 64, "head_dim": null',
        '"hidden_size": -5',
        '"hidden_size": 1.5',
        '"hidden_size": 1e999',
        '"hidden_size": "896"',
        '"num_hidden_layers": true',
        f'"vocab_size": 1{"0" * 4000}',
        '"tie_word_embeddings": "no"',
        f'"deep": {"[" * 100_000}',
    ],
    ids=range(10),
)
def test_a_config_json_of_senseless_sizes_is_one_line(tmp_path, stated: str):
    good = (CONFIGS / "qwen_gsm8k_gpu/architecture.json").read_text()
    (tmp_path / "config.json").write_text(f"{good.rstrip().removesuffix('}')}, {stated}}}")
    with pytest.raises(ConfigError, match=r"not the config.json of a language model") as refused:
        Architecture.from_file(tmp_path / "config.json")
    assert len(str(refused.value)) < 500
