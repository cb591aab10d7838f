"""Models that cannot be trained as the config asks: one line and code 2, by `check` and before any stage."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families.table import FAMILIES, Family
from safetensors.torch import save_file
from tiny_tokenizer import tiny_tokenizer

from pipeline import cli, executor
from rollout.ground.errors import EnvironmentProblem
from stages.data.chat.tokenizer import ChatTokenizer
from stages.data.packing import pack
from stages.errors import ModelError
from stages.training import model_rules
from stages.training.model_rules import check_length, check_model, check_model_config, num_positions
from stages.training.models import ScoreNormaliser

CONFIG = """
name: tried
model: {path: model, context_length: 64}
sft: {data: [{path: sft.jsonl}]}
reward: {data: [{path: pairs.jsonl}]}
ppo: {data: [{path: prompts.jsonl}], max_response_tokens: 8}
"""
ROWS = {
    "sft.jsonl": {"prompt": "two and three", "completion": "are five"},
    "pairs.jsonl": {"prompt": "say thank you", "chosen": "thank you", "rejected": "no"},
    "prompts.jsonl": {"prompt": "the cat sat"},
}
STARTED = "a stage would start now"
CODE_OF_STARTED = EnvironmentProblem.exit_code
WITH_A_STATE = ("jamba", "qwen3_next", "minimax", "bamba", "granitemoehybrid", "zamba2", "falcon_h1", "lfm2")
WITH_A_STATE += ("recurrent_gemma", "mamba", "rwkv")
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a config and its data, in which no stage ever starts."""

    def started(*_: object) -> None:
        raise EnvironmentProblem(STARTED)

    monkeypatch.setattr(executor, "execute", started)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(CONFIG)
    for name, row in ROWS.items():
        rows = [{**row, "prompt": f"{row['prompt']} {index}"} for index in range(40)]
        (tmp_path / name).write_text("".join(json.dumps(each) + "\n" for each in rows))
    return tmp_path


@pytest.fixture
def said(project: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Exit code and the line on stderr of a command in `project`; a second line is an error."""

    def run(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        stderr = capsys.readouterr().err
        assert stderr.count("\n") == (1 if stderr else 0), stderr
        return int(str(ended.value.code)), stderr.strip()

    return run


@pytest.fixture
def refused(said: Callable[..., tuple[int, str]]) -> Callable[..., str]:
    """The line with which `check`, `run` and `sft` refuse the model, all three the same."""

    def refuse(*overrides: str) -> str:
        lines = {said(command, "c.yaml", *overrides) for command in ("check", "run", "sft")}
        ((code, line),) = lines
        assert code == ModelError.exit_code
        assert line.isprintable() and len(line) < 500
        return line

    return refuse


def with_settings(family: str, settings: dict[str, Any]) -> Family:
    row = FAMILIES[family]
    return replace(row, settings={**row.settings, **settings})


def saved(family: str, directory: Path, **settings: Any) -> Path:
    """A tiny model of the family, some settings of its config replaced."""
    return with_settings(family, settings).directory(directory)


def save_config(directory: Path, config: Any) -> Path:
    """What looks like a model to all that opens no weights."""
    config.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    save_file({"a": torch.zeros(1)}, directory / "model.safetensors")
    return directory


def config_of(family: str, **settings: Any) -> Any:
    return with_settings(family, settings).config()


def test_a_model_that_can_be_trained_is_let_through(project: Path, said):
    for family in ("llama", "gemma3", "gpt2"):
        saved(family, project / "model")
        assert said("run", "c.yaml") == (CODE_OF_STARTED, STARTED), family
        assert said("check", "c.yaml") == (0, ""), family
        shutil.rmtree(project / "model")


@pytest.mark.parametrize("family", ["olmoe", "cohere", "granite", "llama4_text_untuned", "ernie4_5"])
def test_a_family_without_a_reward_model_in_transformers_is_refused_where_a_reward_stage_runs(
    project: Path, said, family: str
):
    directory = save_config(project / "model", config_of(family))
    for command in ("check", "run"):
        code, line = said(command, "c.yaml")
        assert code == 2 and "has no reward model in transformers" in line, line
        assert line.startswith(f"model.path {directory.resolve()}: ") or line.startswith("model.path model: ")
        assert "leave out the reward stage" in line
    for arguments in (("sft", "c.yaml"), ("run", "c.yaml", "--until", "sft")):
        assert said(*arguments) == (CODE_OF_STARTED, STARTED)
    assert said("check", "c.yaml", "reward=null", "ppo=null") == (0, "")


def test_a_given_input_is_judged_for_what_its_stage_does_with_it(project: Path, said):
    save_config(project / "model", config_of("llama"))
    save_config(project / "other", config_of("olmoe"))
    save_file({"score.weight": torch.zeros(1, 64)}, project / "model/head.safetensors")
    ScoreNormaliser(mean=0.0, std=1.0).save(project / "model")
    code, line = said("reward", "c.yaml", "--input", "sft=other")
    assert code == 2 and line.startswith("--input sft=") and "olmoe has no reward model" in line
    code, line = said("ppo", "c.yaml", "--input", "sft=model", "--input", "reward=other")
    assert code == 2 and line.startswith("--input reward=") and "olmoe has no reward model" in line
    assert said("ppo", "c.yaml", "--input", "sft=other", "--input", "reward=model")[1] == STARTED
    code, line = said(
        "ppo", "c.yaml", "--input", "sft=model", "--input", "reward=model", "model.context_length=512"
    )
    assert code == 2 and "model.context_length 512 is more than the 256 positions of --input sft=" in line


def test_a_language_model_given_as_the_reward_model_is_refused_before_any_stage(project: Path, said):
    inputs = ("--input", "sft=model", "--input", "reward=model")
    save_config(project / "model", config_of("llama"))
    code, line = said("ppo", "c.yaml", *inputs)
    assert code == 2 and "no score head in it; give a reward model" in line
    save_file({"score.weight": torch.zeros(1, 64)}, project / "model/head.safetensors")
    code, line = said("ppo", "c.yaml", *inputs)
    assert code == 2 and "score_normaliser.json: missing" in line


def test_gradient_checkpointing_that_a_family_does_not_have_is_refused(project: Path, said):
    save_config(project / "model", config_of("jetmoe"))
    assert said("sft", "c.yaml") == (CODE_OF_STARTED, STARTED)
    code, line = said("sft", "c.yaml", "sft.gradient_checkpointing=true")
    assert code == 2 and line.endswith("set sft.gradient_checkpointing to false")


@pytest.mark.parametrize(
    ("family", "settings", "refused"),
    [
        ("llama", {}, True),
        ("afmoe", {}, True),  # its routers are seen, and not balanced by transformers
        ("deepseek_v3", {}, True),
        ("qwen3_moe", {"mlp_only_layers": [0, 1]}, True),  # every layer is dense
        ("qwen3_moe", {"mlp_only_layers": [0]}, False),
        ("mixtral", {}, False),
    ],
)
def test_a_balance_loss_that_a_family_does_not_have_is_refused_by_its_key(
    project: Path, said, family: str, settings: dict[str, Any], refused: bool
):
    save_config(project / "model", config_of(family, **settings))
    for command in ("check", "sft"):
        off = ("reward=null", "ppo=null")
        assert said(command, "c.yaml", *off)[1] in ("", STARTED)
        code, line = said(command, "c.yaml", *off, "sft.router_aux_loss_coef=0.1")
        assert line.startswith("sft.router_aux_loss_coef: transformers has no balance loss") is refused, line
        assert code == 2 or not refused


def test_llama_4_is_refused_where_it_scales_queries_by_their_place_in_the_row():
    for settings in ({}, {"floor_scale": 32}, {"no_rope_layers": [1, 1, 0, 1]}):
        with pytest.raises(ModelError, match="layers without rope scale queries by their place in the row"):
            check_model_config(config_of("llama4_text", **settings), named="x", context_length=None)
    for settings in ({"attn_temperature_tuning": False}, {"no_rope_layers": [1] * 4}):
        check_model_config(config_of("llama4_text", **settings), named="x", context_length=None)


def test_a_mixture_that_vllm_has_no_kernel_for_on_the_cpu_is_refused_where_it_would_be_asked_for(
    project: Path, said
):
    narrow = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16}
    save_config(project / "model", config_of("mixtral", **narrow))
    for command in ("check", "run"):
        code, line = said(command, "c.yaml")
        assert code == 2 and "hidden_size 48 is not a multiple of 32, which vLLM's experts on the CPU" in line
    for overrides in (("rollout.engine=hf",), ("reward=null", "ppo=null")):
        assert said("run", "c.yaml", *overrides)[1] == STARTED
    (project / "model/config.json").unlink()
    save_config(project / "model", config_of("llama", **narrow))
    assert said("run", "c.yaml")[1] == STARTED


def test_check_judges_a_model_that_is_not_here_by_its_config(project: Path, said):
    config_of("olmoe").to_json_file(project / "olmoe.json")
    overrides = ("model.path=somebody/unheard-of", "model.architecture=olmoe.json")
    code, line = said("check", "c.yaml", *overrides)
    assert code == 2
    named = "model.path somebody/unheard-of (as model.architecture describes it)"
    assert line.startswith(f"{named}: olmoe has no reward model in transformers")
    code, line = said("check", "c.yaml", *overrides, "reward=null", "ppo=null", "model.context_length=257")
    assert code == 2 and f"more than the 256 positions of {named}" in line


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts the config of a family into the hub's cache, as that of somebody/unheard-of, and no weights: as
    other programs do that ask for the config alone.
    """
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub/models--somebody--unheard-of"

    def put(family: str) -> None:
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs/main").write_text("abc")
        save_config(repository / "snapshots/abc", config_of(family))
        (repository / "snapshots/abc/model.safetensors").unlink()

    return put


def test_check_judges_a_model_by_its_own_config_and_plans_memory_by_the_one_given(
    project: Path, said, hub_cache
):
    """A stand-in of the same size may be of another family, trainable or not."""
    for given in ("olmoe", "llama"):
        config_of(given).to_json_file(project / f"{given}.json")
    overrides = ("check", "c.yaml", "model.path=somebody/unheard-of")
    hub_cache("llama")
    assert said(*overrides, "model.architecture=olmoe.json") == (0, "")
    hub_cache("olmoe")
    code, line = said(*overrides, "model.architecture=llama.json")
    assert code == 2
    assert line.startswith("model.path somebody/unheard-of: olmoe has no reward model in transformers")


def test_a_sequence_classifier_without_a_linear_score_is_no_reward_model():
    from transformers import CTRLConfig

    config = CTRLConfig(vocab_size=312, n_embd=64, dff=96, n_layer=2, n_head=2)
    with pytest.raises(
        ModelError, match="CTRLForSequenceClassification of transformers has no linear `score`"
    ):
        model_rules.check_ends(model_rules.build_without_memory(config, "x", scores=True), "x", scores=True)


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows_is_refused(project: Path, refused, said):
    size = len(tiny_tokenizer())
    saved("llama", project / "model", vocab_size=size - 1)
    line = refused()
    assert f"its tokenizer and template write ids up to {size - 1}, but the embedding of" in line
    assert f"has {size - 1} rows" in line
    assert f"resize_token_embeddings({size})" in line
    shutil.rmtree(project / "model")
    saved("llama", project / "model", vocab_size=size)
    assert said("run", "c.yaml")[1] == STARTED


@pytest.mark.parametrize(
    ("token", "special", "template", "counts"),
    [
        ("<extra>", False, "", True),  # content may spell it
        ("<extra>", True, "", False),  # as content it is mere text, and the template does not write it
        ("<extra>", True, "<extra>", True),
        ("<tool>", True, "", True),  # written around the role of that name
        ("[PAD]", True, "", False),
    ],
)
def test_a_token_needs_a_row_when_content_or_the_template_can_write_it(
    project: Path, refused, said, token: str, special: bool, template: str, counts: bool
):
    from tokenizers import AddedToken

    tokenizer = copy.deepcopy(tiny_tokenizer())
    size = len(tokenizer)
    tokenizer.add_tokens([AddedToken(token, special=special)], special_tokens=special)
    tokenizer.chat_template = template + tokenizer.chat_template
    saved("llama", project / "model", vocab_size=size)
    tokenizer.save_pretrained(project / "model")
    if counts:
        assert f"its tokenizer and template write ids up to {size}, but" in refused()
    else:
        assert said("run", "c.yaml")[1] == STARTED


def multimodal(**text: Any) -> Any:
    from transformers import Gemma3Config

    return Gemma3Config(
        text_config={**FAMILIES["gemma3"].settings, "vocab_size": len(tiny_tokenizer()), **text},
        vision_config=VISION,
        mm_tokens_per_image=4,
    )


def test_what_stands_between_documents_needs_a_row_where_documents_are_read():
    """transformers gives every tokenizer beside a qwen2 config an <|endoftext|>."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    size = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    chat = ChatTokenizer(tokenizer)
    assert chat.highest_id(documents=True) == size
    assert chat.highest_id(documents=False) == size - 1


def test_a_multimodal_directory_is_refused_and_its_text_model_is_not(project: Path, refused, said):
    save_config(project / "model", multimodal())
    line = refused()
    assert "gemma3 is a model of more than text (vision_config), which cannot be trained here" in line
    assert "give its language model alone, saved as Gemma3ForCausalLM" in line
    shutil.rmtree(project / "model")
    save_config(project / "model", multimodal().get_text_config())
    assert said("run", "c.yaml")[1] == STARTED


def test_models_of_several_kinds_of_input_are_refused_whatever_their_config_looks_like():
    from transformers import Llama4Config, LlamaConfig, LlavaConfig, Phi4MultimodalConfig, Qwen2_5_VLConfig

    for config in (
        LlavaConfig(text_config=LlamaConfig(), vision_config=None),
        Llama4Config(),
        Phi4MultimodalConfig(),
        Qwen2_5_VLConfig(),
    ):
        with pytest.raises(ModelError, match=f"x: {config.model_type} is a model of more than text"):
            check_model_config(config, named="x", context_length=None)


@pytest.mark.parametrize(
    "settings",
    [{}, {"new_decoder_architecture": True, "num_kv_heads": 1}, {"alibi": True}, {"multi_query": False}],
    ids=str,
)
def test_falcon_is_refused_in_words(project: Path, refused, settings: dict[str, Any]):
    saved("falcon", project / "model", **settings)
    line = refused()
    assert "falcon cannot be trained here: transformers cannot exchange the attention of Falcon" in line


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("bloom", "BloomForCausalLM takes no position_ids"),
        ("mpt", "MptForCausalLM takes no position_ids"),
        ("gptj", "cannot exchange the attention of GPTJForCausalLM"),
        *((family, "its layers mix tokens outside of attention") for family in WITH_A_STATE),
    ],
)
def test_a_family_that_cannot_be_packed_is_refused_by_what_its_class_says(
    project: Path, refused, family: str, reason: str
):
    save_config(project / "model", config_of(family))
    assert reason in refused()


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "t5", "bart", "xlm"])
def test_encoders_are_refused(project: Path, refused, model_type: str):
    from transformers import AutoConfig

    save_config(project / "model", AutoConfig.for_model(model_type))
    assert any(
        words in refused()
        for words in ("is an encoder (is_decoder", "is an encoder-decoder", "has no language model")
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_let_through_or_refused_in_one_line(family: str, tmp_path: Path):
    directory = save_config(tmp_path / "model", config_of(family))
    try:
        assert check_model(directory, named="x", context_length=8, scores=False) == len(tiny_tokenizer())
    except ModelError as refusal:
        assert str(refusal).startswith("x: ") and str(refusal).isprintable()
        assert "; give a model" in str(refusal)


@pytest.mark.parametrize(
    ("family", "settings", "limit"),
    [
        ("llama", {}, 256),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, 256),
        ("gpt2", {}, 256),
        ("opt", {}, 256),
        ("gptj", {}, 256),
        ("falcon", {}, 256),
        ("rwkv", {}, 256),
        ("mpt", {"attn_config": {"alibi": False}}, 256),
        ("llama", {"max_sequence_length": 128}, 128),
        ("llama", {"seq_length": 512}, 256),
        ("cohere", {"model_max_length": 512}, 512),
        ("mpt", {}, None),
        ("falcon", {"alibi": True}, None),
        ("bloom", {}, None),
        ("mamba", {}, None),
    ],
    ids=str,
)
def test_the_positions_of_a_model_are_found_under_its_familys_own_name(
    family: str, settings: dict[str, Any], limit: int | None
):
    config = config_of(family, **settings)
    assert num_positions(config) == limit
    if limit is None:
        check_length(config, 10**6, named="x")
        return
    check_length(config, limit, named="x")
    with pytest.raises(
        ModelError, match=f"context_length {limit + 1} is more than the {limit} positions of x"
    ):
        check_length(config, limit + 1, named="x")


def test_a_model_has_as_many_positions_as_it_says(tmp_path: Path):
    """Of tables there is none beyond: the last position works, and the next one does not."""
    for family in ("gpt2", "opt"):
        model = with_settings(family, {"max_position_embeddings": 16, "n_positions": 16}).make()
        assert num_positions(model.config) == 16
        model(torch.zeros(1, 16, dtype=torch.int64))
        with pytest.raises(IndexError):
            model(torch.zeros(1, 17, dtype=torch.int64))


def test_a_model_that_is_too_short_for_the_context_is_refused_before_any_stage(project: Path, refused, said):
    for family in ("llama", "gpt2", "opt"):
        saved(family, project / "model")
        line = refused("model.context_length=257")
        assert line.startswith("model.context_length 257 is more than the 256 positions of model.path")
        assert said("run", "c.yaml", "model.context_length=256")[1] == STARTED
        shutil.rmtree(project / "model")


def test_longrope_is_refused_above_its_original_length_for_there_a_neighbour_changes_a_sequence(
    project: Path, refused, said
):
    saved("phi3_longrope", project / "model")
    line = refused("model.context_length=33")
    assert line.startswith("model.context_length 33 is more than the 32 positions that model.path ")
    assert "longrope" in line and "use 32 at most" in line
    assert said("run", "c.yaml", "model.context_length=32", "reward=null", "ppo=null")[1] == STARTED

    model = FAMILIES["phi3_longrope"].make()
    ids = torch.arange(5, 13)[None]

    def beside(neighbour: int) -> torch.Tensor:
        """Logits of the eight tokens, another sequence of that length behind them in the row."""
        row = torch.cat([ids, torch.full((1, neighbour), 9)], dim=1)
        positions = torch.cat([torch.arange(8), torch.arange(neighbour)])[None]
        with torch.no_grad():
            return model(row, position_ids=positions, use_cache=False).logits[0, :8]

    torch.testing.assert_close(beside(32), beside(8), atol=1e-4, rtol=0)
    assert (beside(33) - beside(8)).abs().max() > 0.01


def test_dynamic_ntk_is_refused_above_the_length_that_it_leaves_as_it_is():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    config = config_of("llama", rope_parameters=rope, model_max_length=1024)
    check_length(config, 256, named="x")
    with pytest.raises(
        ModelError, match=r"more than the 256 positions that x has without scaling \(dynamic rope"
    ):
        check_length(config, 257, named="x")


def test_ropes_of_single_types_of_layers_are_looked_at():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    ropes = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    config = config_of("gemma3", rope_parameters=ropes)
    with pytest.raises(ModelError, match="dynamic rope"):
        check_length(config, 257, named="x")


def test_chunked_attention_is_refused_above_one_chunk(project: Path, refused):
    save_config(project / "model", config_of("llama4_text_chunked"))
    line = refused("reward=null", "ppo=null")
    assert "model.context_length 64 is more than one chunk of model.path" in line and "use 8 at most" in line
    config = config_of("llama4_text_chunked")
    check_length(config, 8, named="x")
    config.layer_types = ["full_attention"] * 4
    check_length(config, 64, named="x")


def test_sliding_windows_are_let_through():
    for family in ("mistral", "gemma2", "gemma3", "olmo3"):
        check_model_config(config_of(family), named="x", context_length=256)


def test_generate_refuses_what_it_cannot_read_in_one_line(project: Path, said):
    save_config(project / "model", config_of("llama"))
    (project / "model/config.json").write_text('{"model_type": "never-heard-of"}')
    code, line = said("generate", "model", "hello")
    assert code == 2 and line.startswith("model: transformers cannot read its config.json (")


@pytest.mark.slow
def test_every_config_of_transformers_is_let_through_or_refused_in_one_line():
    """With its default sizes: none is built."""
    from transformers import CONFIG_MAPPING

    for model_type, config_class in CONFIG_MAPPING.items():
        try:
            config = config_class()
        except Exception:  # it needs parts that only a directory has
            continue
        try:
            check_model_config(config, named="x", context_length=8, scores=True)
        except ModelError as refusal:
            assert str(refusal).isprintable(), model_type


def out_of_memory() -> None:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you")


def not_ours() -> None:
    raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")


def of_a_library() -> None:
    exec(compile("assert False, 'only powers of two'", "/somewhere/else.py", "exec"))


@pytest.mark.parametrize(
    ("fails", "raised"),
    [
        (out_of_memory, MemoryError),
        (lambda: (_ for _ in ()).throw(MemoryError()), MemoryError),
        (lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to")), MemoryError),
        (lambda: pack([]), AssertionError),
        (of_a_library, None),
        (not_ours, None),
    ],
)
def test_lack_of_memory_and_our_own_mistakes_say_nothing_about_a_model(fails, raised):
    try:
        fails()
    except Exception as error:
        if raised is None:
            model_rules.raise_unless_of_the_model(error)
        else:
            with pytest.raises(raised):
                model_rules.raise_unless_of_the_model(error)
