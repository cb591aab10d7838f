"""What a word from another tool, or one of ours at a wrong place, is answered with: settings that exist."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from pipeline.config import ConfigError, load
from pipeline.config_fields import has_setting
from pipeline.experiment import STAGE_FIELDS, ExperimentConfig
from pipeline.foreign_settings import GROUPS, MEANINGS, Meaning
from pipeline.suggestions import suggestion
from pipeline.yaml_source import read_config

CONFIG = """\
name: demo
model: {path: org/name}
sft: {data: [{path: a.jsonl}]}
reward: {data: [{path: a.jsonl}]}
ppo: {data: [{path: a.jsonl}]}
evaluate: {prompts: [{path: a.jsonl}]}
"""
REWARD_MODEL = (
    "ppo is scored by the model of the reward stage; give one of yours by "
    "`rlhf ppo CONFIG --input reward=DIR`"
)
ENGINES = "the engines are set up for training, and this is not for a config to say; remove it"
ROWS = sorted({(meaning.settings, meaning.note) for meaning in MEANINGS.values()})
PLACES = (
    "",
    "model.",
    *(f"{stage}." for stage in STAGE_FIELDS),
    "rollout.",
    "resources.",
    "resources.sft.",
    "x.",
)


@pytest.fixture
def line_of(tmp_path, monkeypatch):
    """The one line that loading a config with this override ends in, without its position."""
    monkeypatch.chdir(tmp_path)
    Path("demo.yaml").write_text(CONFIG)

    def line_of(override: str) -> str:
        with pytest.raises(ConfigError) as error:
            load(Path("demo.yaml"), [override])
        return str(error.value).removeprefix(f"override {override}: ")

    return line_of


def keys_of(setting: str) -> tuple[str | int, ...]:
    return tuple(int(key) if key.isdigit() else key for key in setting.split("."))


def exists(setting: str) -> bool:
    """Whether some config has it; a bare name counts in any section."""
    if "." not in setting:
        sections = ("", *STAGE_FIELDS, "model", "rollout")
        return any(has_setting((*filter(None, [section]), setting)) for section in sections)
    return any(has_setting(keys_of(setting.replace("<stage>", stage))) for stage in STAGE_FIELDS)


def names_in(line: str) -> list[str]:
    """The settings that a line names."""
    named = re.findall(r"`([^` ]+)`|'([\w.<>]+)(?:, at the left margin)?'", line)
    return [first or second for first, second in named]


@pytest.mark.parametrize(("settings", "note"), ROWS, ids=lambda value: " ".join(value)[:40])
def test_every_setting_of_a_row_exists_and_a_row_without_one_says_what_to_do(settings, note):
    for setting in (*settings, *re.findall(r"`([^` ]+)`", note)):
        assert exists(setting), setting
    assert settings or note, "nothing is said"


def test_no_word_is_a_setting_of_every_place_it_could_stand_at():
    """A word that is a setting where it stands never gets here; it must be unknown somewhere."""
    for word in MEANINGS:
        assert word == word.lower() and "-" not in word, word
        assert not all(has_setting((stage, *keys_of(word))) for stage in STAGE_FIELDS), word


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place or "top")
def test_each_word_at_each_place_is_answered_in_one_line_that_names_what_exists(tmp_path, place):
    path = tmp_path / "demo.yaml"
    path.write_text(CONFIG)
    tree = read_config(path, [])
    for word in MEANINGS:
        key = keys_of(place + word)
        if has_setting(key):
            continue
        ends = (".".join(map(str, key[start:])) for start in range(len(key)))
        meaning = MEANINGS[next(end for end in ends if end in MEANINGS)]  # the longest
        line = suggestion(key, tree)
        assert line != "; docs/configuration.md lists them all", key
        assert line.isprintable() and len(line) < 300, line
        for name in names_in(line):
            assert exists(name) or has_setting((*key[:-1], name)), (key, line)
        assert _answers(line, meaning), (key, line)


def _answers(line: str, meaning: Meaning) -> bool:
    """Whether the last part of a setting, or the note, is in it."""
    wanted = [setting.rpartition(".")[2] for setting in meaning.settings] or [meaning.note]
    return any(want in line for want in wanted)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("sft.learning_rate=1", "sft.learning_rate: no such setting; did you mean 'lr'?"),
        ("sft.learning-rate=1", "sft.learning-rate: no such setting; did you mean 'lr'?"),
        ("sft.learningRate=1", "sft.learningRate: no such setting; did you mean 'lr'?"),
        ("learning_rate=1",
         "learning_rate: no such setting; did you mean 'sft.lr' or 'reward.lr' or 'ppo.lr'?"),
        ("lr=1", "lr: no such setting; did you mean 'sft.lr' or 'reward.lr' or 'ppo.lr'?"),
        ("ppo.beta=1", "ppo.beta: no such setting; did you mean 'kl_coef'?"),
        ("ppo.kl_coeff=1", "ppo.kl_coeff: no such setting; did you mean 'kl_coef'?"),
        ("ppo.init_kl_coef=1", "ppo.init_kl_coef: no such setting; did you mean 'kl_coef'?"),
        ("ppo.critic_learning_rate=1", "ppo.critic_learning_rate: no such setting; did you mean 'value_lr'?"),
        ("sft.per_device_train_batch_size=1",
         "sft.per_device_train_batch_size: no such setting; did you mean 'micro_batch_size'? (`batch_size` "
         "counts a whole optimizer step, over all workers)"),
        ("sft.max_length=1",
         "sft.max_length: no such setting; did you mean 'model.context_length'? (prompt and "
         "response together)"),
        ("model.max_seq_length=1",
         "model.max_seq_length: no such setting; did you mean 'context_length'? (prompt and response "
         "together)"),
        ("sft.num_train_epochs=1", "sft.num_train_epochs: no such setting; did you mean 'num_epochs'?"),
        ("ppo.max_new_tokens=1", "ppo.max_new_tokens: no such setting; did you mean 'max_response_tokens'?"),
        ("rollout.max_tokens=1", "rollout.max_tokens: no such setting; did you mean "
         "'ppo.max_response_tokens' or 'evaluate.max_response_tokens'?"),
        ("rollout.n=4", "rollout.n: no such setting; did you mean 'ppo.samples_per_prompt'?"),
        ("rollout.temperature=1", "rollout.temperature: no such setting; did you mean 'ppo.temperature' or "
         "'evaluate.temperature'?"),
        ("rollout.gpu_memory_utilization=1",
         "rollout.gpu_memory_utilization: no such setting; did you mean 'gpu_memory_frac'?"),
        ("sft.bf16=true", "sft.bf16: no such setting; did you mean 'precision'? (fp32 or bf16)"),
        ("model_name_or_path=x", "model_name_or_path: no such setting; did you mean 'model.path'?"),
        ("model.name=x", "model.name: no such setting; did you mean 'path'?"),
        ("sft.dataset_name=x", "sft.dataset_name: no such setting; did you mean 'sft.data.0.path'? (data "
         "is a list of sources, each with a path)"),
        ("sft.path=x", "sft.path: no such setting; did you mean 'sft.data.0.path'?"),
        ("sft.data.0.dataset_name=x", "sft.data.0.dataset_name: no such setting; did you mean 'path'? (data "
         "is a list of sources, each with a path)"),
        ("evaluate.prompts.0.data_files=x", "evaluate.prompts.0.data_files: no such setting; did you mean "
         "'path'? (data is a list of sources, each with a path)"),
        ("sft.data.0.name=x", "sft.data.0.name: no such setting; did you mean 'subset'?"),
        ("sft.seed=1", "sft.seed: no such setting; did you mean 'seed, at the left margin'?"),
        ("output_dir=x", "output_dir: no such setting; did you mean 'outputs'?"),
        ("sft.output_dir=x", "sft.output_dir: no such setting; did you mean 'outputs, at the left margin'?"),
        ("resources.num_gpus=1", "resources.num_gpus: no such setting; did you mean "
         "'resources.<stage>.num_gpus'? (per worker; 0 is the CPU)"),
        ("sft.lora_r=8", "sft.lora_r: no such setting; all weights are trained, without adapters; merge "
         "yours into its model, and give that as `model.path`"),
        ("ppo.vf_coef=1", "ppo.vf_coef: no such setting; the value model is trained by itself, so its loss "
         "has no weight; its learning rate is `ppo.value_lr`"),
        # sections of other tools
        ("actor_rollout_ref.rollout.n=4", "actor_rollout_ref: no such setting; its 'rollout.n' is "
         "'ppo.samples_per_prompt'"),
        ("actor_rollout_ref.actor.optim.lr=1", "actor_rollout_ref: no such setting; its 'actor.optim.lr' is "
         "'ppo.lr'"),
        ("critic.optim.lr=1", "critic: no such setting; its 'optim.lr' is 'ppo.value_lr'"),
        ("algorithm.kl_ctrl.kl_coef=1", "algorithm: no such setting; its 'kl_ctrl.kl_coef' is 'ppo.kl_coef'"),
        ("trainer={total_epochs: 1, nnodes: 1}", "trainer: no such setting; its 'total_epochs' is "
         "'sft.num_epochs' or 'reward.num_epochs' or 'ppo.num_epochs', its 'nnodes' is 'resources.address'"),
        ("actor_rollout_ref.model.path=x", "actor_rollout_ref: no such setting; its 'model.path' is "
         "'model.path'"),
        ("config.sft.lr=1", "config: no such setting; its 'sft.lr' is 'sft.lr'"),
        ("trainer.warmup_steps=9", "trainer: no such setting; its 'warmup_steps' is 'sft.warmup_frac' or "
         "'reward.warmup_frac' or 'ppo.warmup_frac' (a share of the steps, not their number)"),
        ("reward_model.path=x", f"reward_model: no such setting; its 'path': {REWARD_MODEL}"),
        ("reward_model.model.path=x", f"reward_model: no such setting; its 'model.path': {REWARD_MODEL}"),
        ("reward_model.model=x", f"reward_model: no such setting; its 'model': {REWARD_MODEL}"),
        ("ppo.ref.path=x", "ppo.ref: no such setting; its 'path': the reference is the sft model that ppo "
         "starts from; remove it"),
        ("optimizer={name: adamw, lr: 1}", "optimizer: no such setting; its 'lr' is 'sft.lr' or "
         "'reward.lr' or 'ppo.lr', its 'name': AdamW is the only optimizer; its settings are `adam_beta1`, "
         "`adam_beta2`, `adam_eps` and `weight_decay`"),
        ("data.path=x", "data: no such setting; its 'path' is 'sft.data.0.path' or 'reward.data.0.path' or "
         "'ppo.data.0.path' (data is a list of sources, each with a path)"),
        ("critic.model.path=x", "critic: no such setting; its 'model.path': the value model starts from the "
         "reward model; remove it"),
        ("actor_rollout_ref.rollout.top_p=1", "actor_rollout_ref: no such setting; its 'rollout.top_p': "
         "responses are sampled from the whole distribution, at `ppo.temperature`; remove it"),
        ("trainer={logger: x, nnodes: 2, project_name: x}", "trainer: no such setting; its 'nnodes' is "
         "'resources.address', its 'logger' and 'project_name': metrics are in metrics.jsonl and "
         "report.html of the run; remove it"),
        ("data.shuffle=true", "data: no such setting; its 'shuffle': data is read once, shuffled by the seed "
         "and kept in the artifacts; remove it"),
        ("data.truncation=error", "data: no such setting; its 'truncation': prompts that leave no room for a "
         "response are left out and counted; for pairs see `reward.too_long`"),
        # a stage that has no such thing
        ("evaluate.learning_rate=1", "evaluate.learning_rate: no such setting; nothing like it in evaluate, "
         "only 'sft.lr' or 'reward.lr' or 'ppo.lr'"),
        ("sft.kl_coef=1", "sft.kl_coef: no such setting; nothing like it in sft, only 'ppo.kl_coef'"),
        ("sft.beta=1", "sft.beta: no such setting; nothing like it in sft, only 'ppo.kl_coef'"),
        ("sft.val_size=0.1", "sft.val_size: no such setting; did you mean 'sft.data.0.part' or "
         "'sft.data.0.heldout_frac'? (train here, heldout in `evaluate.prompts`)"),
        ("evaluate.num_prompts=1", "evaluate.num_prompts: no such setting; did you mean 'max_prompts'?"),
        ("evaluate.max_samples=1", "evaluate.max_samples: no such setting; did you mean 'max_prompts'?"),
        ("evaluate.n=1", "evaluate.n: no such setting; did you mean 'max_prompts'? (each of them gets one "
         "response)"),
        ("evaluate.data=x", "evaluate.data: no such setting; did you mean 'prompts'?"),
        ("evaluate.dataset=x", "evaluate.dataset: no such setting; did you mean 'evaluate.prompts.0.path'? "
         "(data is a list of sources, each with a path)"),
        ("evaluate.path=x", "evaluate.path: no such setting; did you mean 'evaluate.prompts.0.path'?"),
        ("sft.data.0.num_samples=1", "sft.data.0.num_samples: no such setting; did you mean 'weight'? (0.5 "
         "takes half of the rows)"),
        ("ppo.max_prompt_tokens=1", "ppo.max_prompt_tokens: no such setting; did you mean "
         "'model.context_length'? (prompt and response share it, so a prompt has what "
         "`ppo.max_response_tokens` leaves)"),
        ("ppo.generation_batch_size=1", "ppo.generation_batch_size: no such setting; did you mean "
         "'num_prompts' or 'samples_per_prompt'? (their product is how many responses are generated per "
         "step)"),
        ("rollout.max_num_batched_tokens=1", f"rollout.max_num_batched_tokens: no such setting; {ENGINES}"),
        ("rollout.block_size=16", f"rollout.block_size: no such setting; {ENGINES}"),
        ("reward.loss_type=x", "reward.loss_type: no such setting; the reward model's loss is that of "
         "Bradley and Terry; there is no other, so remove it"),
        ("ppo.kl_clip=1", "ppo.kl_clip: no such setting; the KL is not clipped; a run ends where its mean "
         "exceeds `ppo.max_kl`"),
        ("deepspeed={zero_optimization: {stage: 2}}", "deepspeed: no such setting; several workers share the "
         "model by FSDP2; set `resources.<stage>.num_workers`"),
        ("pretrain=org/model", "pretrain: must be a group of settings, not 'org/model'; did you mean "
         "'model.path'?"),
        ("model=org/model", "model: must be a group of settings, not 'org/model'; did you mean "
         "'model.path'?"),
    ],
)  # fmt: skip
def test_what_a_user_reads(line_of, override, line):
    assert line_of(override) == line


def test_every_field_of_transformers_training_arguments_is_answered():
    (package,) = importlib.util.find_spec("transformers").submodule_search_locations
    tree = ast.parse((Path(package) / "training_args.py").read_text())
    (found,) = [node for node in tree.body if getattr(node, "name", "") == "TrainingArguments"]
    fields = [item.target.id for item in found.body if isinstance(item, ast.AnnAssign)]
    assert len(fields) > 80
    assert [name for name in fields if name not in MEANINGS and not exists(name)] == []


def test_only_stages_that_the_config_has_are_named(tmp_path):
    path = tmp_path / "demo.yaml"
    path.write_text("name: demo\nppo: {data: [{path: a.jsonl}]}\n")
    assert suggestion(("warmup_ratio",), read_config(path, [])) == "; did you mean 'ppo.warmup_frac'?"


def test_a_section_of_another_tool_is_none_of_ours():
    assert not set(GROUPS.split()) & set(ExperimentConfig.model_fields)
