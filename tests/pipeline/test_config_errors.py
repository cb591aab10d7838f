"""Every mistake is one line - where, what, how to fix it - here exactly as a user sees it."""

import time
from pathlib import Path

import pytest

from pipeline.config import ConfigError, load

SFT = "sft:\n  data:\n    - path: a.jsonl\n"
NAME = "name: demo\n"


@pytest.fixture
def line_of(tmp_path, monkeypatch):
    """The one line that loading a config ends in."""
    monkeypatch.chdir(tmp_path)

    def line_of(text: str | bytes, *overrides: str) -> str:
        Path("demo.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ConfigError) as error:
            load(Path("demo.yaml"), overrides)
        assert error.value.exit_code == 2
        assert error.value.__cause__ is None
        line = str(error.value)
        assert line.isprintable() and len(line) < 600
        return line

    return line_of


IN_FILES = [
    # unknown keys
    (NAME + SFT + "  lrr: 1\n", "demo.yaml:5: sft.lrr: no such setting; did you mean 'lr'?"),
    (NAME + SFT + "  batchsize: 1\n",
     "demo.yaml:5: sft.batchsize: no such setting; did you mean 'batch_size'?"),
    (NAME + SFT + "  LR: 1\n", "demo.yaml:5: sft.LR: no such setting; did you mean 'lr'?"),
    (NAME + SFT + "  learning_rate: 1\n",
     "demo.yaml:5: sft.learning_rate: no such setting; did you mean 'lr'?"),
    (NAME + SFT + "  kl_coef: 1\n",
     "demo.yaml:5: sft.kl_coef: no such setting; nothing like it in sft, only 'ppo.kl_coef'"),
    (NAME + SFT + "  rollout: {}\n",
     "demo.yaml:5: sft.rollout: no such setting; did you mean 'rollout, at the left margin'?"),
    (NAME + SFT + "zzz: 1\n", "demo.yaml:5: zzz: no such setting; docs/configuration.md lists them all"),
    (NAME + "sftt:\n  lr: 1\n", "demo.yaml:2: sftt: no such setting; did you mean 'sft'?"),
    (NAME + "sft:\n  datta: []\n", "demo.yaml:3: sft.datta: no such setting; did you mean 'data'?"),
    (NAME + SFT + "      weigth: 2\n",
     "demo.yaml:5: sft.data.0.weigth: no such setting; did you mean 'weight'?"),
    (NAME + SFT + "5: x\n", "demo.yaml:5: 5: no such setting; docs/configuration.md lists them all"),
    # missing
    (SFT, "demo.yaml:1: name: missing; add `name:` (Name of the run: `outputs/runs/<name>`.)"),
    (NAME + "sft:\n  lr: 0.1\n", "demo.yaml:2: sft.data: missing; add `data:` "
     "(Conversations: messages, prompt + completion, or instruction/input/output.)"),
    (NAME + "sft:\n", "demo.yaml:2: sft.data: missing; add `data:` "
     "(Conversations: messages, prompt + completion, or instruction/input/output.)"),
    # types
    (NAME + SFT + "  lr: fast\n", "demo.yaml:5: sft.lr: must be a number, not 'fast'"),
    (NAME + SFT + "  lr:\n", "demo.yaml:5: sft.lr: must be a number, not nothing"),
    (NAME + SFT + "  lr: [1]\n", "demo.yaml:5: sft.lr: must be a number, not a list"),
    (NAME + SFT + "  lr: .nan\n", "demo.yaml:5: sft.lr: must be a finite number, not .nan"),
    (NAME + SFT + "  max_steps: 1.5\n", "demo.yaml:5: sft.max_steps: must be a whole number, not 1.5"),
    (NAME + SFT + "  max_steps: true\n", "demo.yaml:5: sft.max_steps: must be a number, not true"),
    (NAME + SFT + "  lr: true\n", "demo.yaml:5: sft.lr: must be a number, not true"),
    (NAME + SFT + "  gradient_checkpointing: maybe\n",
     "demo.yaml:5: sft.gradient_checkpointing: must be true or false, not 'maybe'"),
    (NAME + SFT + "  precision: fp16\n",
     "demo.yaml:5: sft.precision: must be 'fp32' or 'bf16', not 'fp16'"),
    (NAME + "sft:\n  data:\n    path: a.jsonl\n",
     "demo.yaml:3: sft.data: must be a list; start each item with '- '"),
    (NAME + "sft:\n  data: a.jsonl\n", "demo.yaml:3: sft.data: must be a list, not 'a.jsonl'"),
    (NAME + "sft:\n  data:\n    - a.jsonl\n",
     "demo.yaml:4: sft.data.0: must be a group of settings, not 'a.jsonl'"),
    (NAME + "sft: 5\n", "demo.yaml:2: sft: must be a group of settings, not 5"),
    (NAME + SFT + "model: null\n", "demo.yaml:5: model: must be a group of settings, not nothing"),
    ("name: [a]\n" + SFT, "demo.yaml:1: name: must be text, not a list"),
    ("name: a/b\n" + SFT,
     "demo.yaml:1: name: use letters, digits, '.', '_' and '-' only: it names a directory"),
    ("name: ''\n" + SFT, "demo.yaml:1: name: must not be empty"),
    # bounds
    (NAME + SFT + "  lr: 5\n", "demo.yaml:5: sft.lr: 5 is out of range; must be > 0 and <= 1"),
    (NAME + SFT + "  lr: -1e-3\n", "demo.yaml:5: sft.lr: -1e-3 is out of range; must be > 0 and <= 1"),
    (NAME + SFT + "  max_steps: 0\n", "demo.yaml:5: sft.max_steps: 0 is out of range; must be >= 1"),
    (NAME + SFT + "seed: 99999999999999999999\n",
     "demo.yaml:5: seed: 99999999999999999999 does not fit into 64 bits"),
    (NAME + SFT + "seed: -9223372036854775809\n",
     "demo.yaml:5: seed: -9223372036854775809 does not fit into 64 bits"),
    (NAME + SFT + "seed: 0x8000000000000000\n",
     "demo.yaml:5: seed: 0x8000000000000000 does not fit into 64 bits"),
    (NAME + SFT + "seed: 9223372036854775807\n",
     "demo.yaml:5: seed: 9223372036854775807 is out of range; must be >= 0 and < 2147483648"),
    (NAME + SFT + "resources: {sft: {num_workers: 1000000000}}\n",
     "demo.yaml:5: resources.sft.num_workers: 1000000000 is out of range; must be >= 1 and <= 10000"),
    (NAME + SFT + "pipeline: {stop_timeout_s: 1e300}\n",
     "demo.yaml:5: pipeline.stop_timeout_s: 1e300 is out of range; must be > 0 and <= 1000000"),
    (NAME + "sft:\n  data: []\n", "demo.yaml:3: sft.data: must not be empty"),
    (NAME + "ppo:\n  data:\n    - path: a.jsonl\n  rollout_correction: {type: token_truncate, min: 0.5}\n",
     "demo.yaml:5: ppo.rollout_correction: min 0.5 has no meaning with type token_truncate: truncation caps "
     "weights from above only; remove min, or use type token_mask"),
    (NAME + "ppo:\n  data:\n    - path: a.jsonl\n  rollout_correction: {type: tis}\n",
     "demo.yaml:5: ppo.rollout_correction.type: must be 'auto' or 'off' or 'token_truncate' or 'token_mask' "
     "or 'sequence_truncate' or 'sequence_mask' or 'geometric_mask', not 'tis'"),
    # YAML
    (NAME + "name: again\n", "demo.yaml:2: name: stated twice (first in line 1); keep one"),
    (NAME + SFT + "  lr: 1\n  lr: 2\n", "demo.yaml:6: sft.lr: stated twice (first in line 5); keep one"),
    (NAME + "sft: [\n",
     "demo.yaml:3: not valid YAML: expected the node content, but found '<stream end>' "
     "(while parsing a flow node that starts in line 3)"),
    (NAME + "a: b: c\n", "demo.yaml:2: not valid YAML: mapping values are not allowed here; "
     "check the indentation, and quote a text that holds ': '"),
    (NAME + "sft:\n\tlr: 1\n",
     "demo.yaml:3: not valid YAML: found character '\\t' that cannot start any token; "
     "indent with spaces, not tabs"),
    (NAME + "loose\n", "demo.yaml:3: not valid YAML: could not find expected ':'; "
     "every line is `key: value` or `- item`"),
    ("", "demo.yaml: empty; a config is lines of `key: value`, at least `name: ...`"),
    ("# a comment\n", "demo.yaml: empty; a config is lines of `key: value`, at least `name: ...`"),
    ("---\n", "demo.yaml: empty; a config is lines of `key: value`, at least `name: ...`"),
    ("- a\n", "demo.yaml:1: must be settings (lines of `key: value`), not a list"),
    ("hello", "demo.yaml:1: must be settings (lines of `key: value`), not 'hello'"),
    (NAME + "---\nname: b\n", "demo.yaml:2: a second document; one config per file"),
    (NAME + "? [a, b]\n: c\n", "demo.yaml:2: a key must be plain text"),
    (NAME + "seed: *x\n", "demo.yaml:2: alias *x: nothing above is anchored as &x"),
    (
        NAME + "seed: *" + "x" * 500,
        f"demo.yaml:2: alias *{'x' * 79}…: nothing above is anchored as &{'x' * 79}…",
    ),
    (NAME + "sft: &a\n  data: [*a]\n", "demo.yaml:3: alias *a: nothing above is anchored as &a"),
    # hostile
    ("name: !!python/object/apply:os.system ['true']\n",
     "demo.yaml:1: tags such as !!python/object/apply:os.system are not allowed; write plain values"),
    ("!!map {name: a}\n", "demo.yaml:1: tags such as !!map are not allowed; write plain values"),
    (NAME + "a: \"\\0\"\n", "demo.yaml:2: NUL characters are not allowed"),
    (NAME + "a: b\0c\n", "demo.yaml:2: not valid YAML: character 0x00 is not allowed"),
    (NAME + 'a: "\\ud800"\n',
     "demo.yaml:2: \\ud800: half of a surrogate pair (or a byte that is not UTF-8) "
     "is not a character"),
    (b"name: caf\xe9\n", "demo.yaml:1: not UTF-8 (byte 0xE9); convert with iconv"),
    ("name: a\n".encode("utf-16"), "demo.yaml:1: not UTF-8 (byte 0xFF); convert with iconv"),
    ("a: " + "[" * 100_000, "demo.yaml:1: nested deeper than 32 levels"),
    ("- " * 100_000, "demo.yaml:1: nested deeper than 32 levels"),
    ("a: " + "{a: " * 100_000, "demo.yaml:1: nested deeper than 32 levels"),
    (NAME + "a: b\n" * 300_000, "demo.yaml: larger than 1 MiB; is this a config?"),
    (NAME + SFT + f"  max_steps: {'9' * 6000}\n",
     f"demo.yaml:5: sft.max_steps: must be a finite number, not {'9' * 39}…"),
    (NAME + SFT + f"seed: 0x{'f' * 5000}\n",
     f"demo.yaml:5: seed: must be a finite number, not 0x{'f' * 37}…"),
    # within one section
    (NAME + SFT + "model:\n  num_heads: 7\n",
     "demo.yaml:6: model: hidden_size 160 is not a multiple of num_heads 7"),
    (NAME + SFT + "model:\n  num_experts: 4\n  num_experts_per_tok: 5\n",
     "demo.yaml:7: model: num_experts_per_tok 5 is more than num_experts 4"),
    (NAME + SFT + "model:\n  path: somewhere\n  num_experts_per_tok: 2\n",
     "demo.yaml:7: model: num_experts_per_tok says how many of num_experts work for a token, and that is not "
     "set; remove it, or describe a mixture with num_experts"),
    (NAME + SFT + "model:\n  path: somewhere\n  num_experts: 4\n",
     "demo.yaml:7: model: num_experts describes a model from scratch, path takes one; remove either"),
    (NAME + "ppo:\n  data: [{path: a}]\n  kl_placement: loss\n",
     "demo.yaml:4: ppo: kl_estimator k1 in the loss does not optimise the KL-regularised objective; "
     "use k2, or another kl_placement"),
    (NAME + "ppo:\n  data: [{path: a}]\n  kl_placement: loss\n  kl_estimator: k2\n"
     "  loss_aggregation: sequence_mean_token_mean\n",
     "demo.yaml:4: ppo: kl_placement loss takes the KL of whole responses, but loss_aggregation "
     "sequence_mean_token_mean divides each response's policy loss by its own length, so no kl_coef weighs "
     "both alike; use another loss_aggregation, or kl_placement reward with kl_estimator k1"),
    (NAME + "ppo:\n  data: [{path: a}]\n  max_steps: 8\n  value_warmup_steps: 8\n",
     "demo.yaml:5: ppo: value_warmup_steps 8 leaves the policy none of the max_steps 8 to learn in; use 7 at "
     "most, or more max_steps"),
    (NAME + "reward:\n  data: [{path: a}]\n  init_from: pretrain\n  normaliser_max_response_tokens: 9\n",
     "demo.yaml:5: reward: normaliser_max_response_tokens bounds nothing with init_from: pretrain, where the "
     "held-out pairs' own responses are scored; remove it"),
    # across sections
    (NAME, "demo.yaml:1: name: no stage has a section: nothing to run; "
     "add one of prepare, pretrain, sft, reward, ppo, evaluate"),
    (NAME + "ppo:\n  data: [{path: a}]\n  max_response_tokens: 300\n",
     "demo.yaml:4: ppo.max_response_tokens: 300 leaves no room for a prompt and an end token in "
     "model.context_length 256; use 254 at most, or a longer context"),
    (NAME + "ppo:\n  data: [{path: a}]\nmodel:\n  context_length: 32\n",
     "demo.yaml:5: ppo.max_response_tokens: 32 leaves no room for a prompt and an end token in "
     "model.context_length 32; use 30 at most, or a longer context"),
    (NAME + "ppo:\n  data: [{path: a}]\n  max_response_tokens: 31\nmodel: {context_length: 32}\n",
     "demo.yaml:4: ppo.max_response_tokens: 31 leaves no room for a prompt and an end token in "
     "model.context_length 32; use 30 at most, or a longer context"),
    (NAME + "evaluate:\n  prompts: [{path: a}]\n  max_response_tokens: 255\n",
     "demo.yaml:4: evaluate.max_response_tokens: 255 leaves no room for a prompt and an end token in "
     "model.context_length 256; use 254 at most, or a longer context"),
    (NAME + "reward:\n  data: [{path: a}]\n  normaliser_max_response_tokens: 255\n",
     "demo.yaml:4: reward.normaliser_max_response_tokens: 255 leaves no room for a prompt and an end token "
     "in model.context_length 256; use 254 at most, or a longer context"),
    (NAME + "reward:\n  data: [{path: a}]\nppo:\n  data: [{path: a}]\n  max_response_tokens: 255\n",
     "demo.yaml:6: ppo.max_response_tokens: 255 leaves no room for a prompt and an end token in "
     "model.context_length 256; use 254 at most, or a longer context"),
    (NAME + "reward:\n  data: [{path: a}]\nmodel: {context_length: 32}\n",
     "demo.yaml:4: reward.normaliser_max_response_tokens: 32 leaves no room for a prompt and an end token "
     "in model.context_length 32; use 30 at most, or a longer context"),
    (NAME + "sft:\n  data: [{path: a, weight: 0}]\n",
     "demo.yaml:3: sft.data: every weight is 0, so there is nothing to read; set one above 0"),
    (NAME + "pretrain:\n  router_aux_loss_coef: 0.01\n",
     "demo.yaml:3: pretrain.router_aux_loss_coef: 0.01, but the model has no experts to balance; "
     "set model.num_experts, or 0"),
    (NAME + SFT + "  router_aux_loss_coef: 0.1\npretrain: {}\n",
     "demo.yaml:5: sft.router_aux_loss_coef: 0.1, but the model has no experts to balance; "
     "set model.num_experts, or 0"),
    (NAME + "ppo:\n  data: [{path: a}]\n"
     "model: {num_experts: 4, hidden_size: 176, num_heads: 1, num_kv_heads: 1}\n",
     "demo.yaml:4: model.hidden_size: 176 is not a multiple of 32, which vLLM's experts on the CPU ask for "
     "in ppo; use one that is, rollout.engine: hf, or a GPU (resources.ppo.num_gpus_per_engine)"),
    (NAME + SFT + "model: {revision: abc}\n",
     "demo.yaml:5: model.revision: has no meaning without model.path; set that, or remove this"),
    (NAME + SFT + "rollout:\n  num_engines: 2\npipeline: {executor: inline}\n",
     "demo.yaml:6: rollout.num_engines: several engines need Ray; set 1, or pipeline.executor: ray"),
    (NAME + SFT + "resources:\n  sft:\n    num_workers: 3\n",
     "demo.yaml:7: resources.sft.num_workers: sft.batch_size 32 cannot be shared out evenly between 3 "
     "workers; "
     "use a multiple of 3"),
    (NAME + SFT + "  batch_tokens: 2560\nresources:\n  sft:\n    num_workers: 4\n",
     "demo.yaml:8: resources.sft.num_workers: sft.batch_tokens 2560 is 10 rows of model.context_length 256, "
     "which cannot be shared out evenly between 4 workers; use a multiple of 1024"),
    (NAME + SFT + "  batch_tokens: 200\n",
     "demo.yaml:5: sft.batch_tokens: 200 do not hold one row of model.context_length 256; use 256 or more"),
    (NAME + SFT + "pipeline: {executor: inline}\nresources:\n  sft:\n    num_workers: 2\n",
     "demo.yaml:8: resources.sft.num_workers: pipeline.executor inline runs each stage in one process; "
     "set 1, or "
     "pipeline.executor ray"),
    (NAME + "evaluate:\n  prompts: [{path: a}]\nresources:\n  evaluate:\n    num_workers: 2\n",
     "demo.yaml:6: resources.evaluate.num_workers: evaluate does not train, it runs in one process; set 1"),
    (NAME + "ppo:\n  data: [{path: p}]\n  precision: bf16\nrollout:\n  engine: hf\n",
     "demo.yaml:6: rollout.engine: hf is the fp32 reference; use vllm with ppo.precision bf16"),
    (NAME + SFT + "resources:\n  address: head:6379\npipeline: {executor: inline}\n",
     "demo.yaml:6: resources.address: pipeline.executor inline joins no cluster; use ray, or remove this"),
    (NAME + "ppo:\n  data: [{path: p}]\nrollout:\n  sync: nccl\n",
     "demo.yaml:5: rollout.sync: nccl connects GPUs of their own; set resources.ppo.num_gpus and "
     "resources.ppo.num_gpus_per_engine to 1 or more, or use gloo or shm"),
    (NAME + SFT + "rollout:\n  sync: nccl\n  engine: hf\n",
     "demo.yaml:6: rollout.sync: nccl is vLLM's own transport; use gloo or shm with rollout.engine hf"),
    (NAME + SFT + "rollout:\n  sync: nccl\npipeline: {executor: inline}\n",
     "demo.yaml:6: rollout.sync: nccl needs trainer and engine in processes of their own; use executor ray"),
    (NAME + "ppo:\n  data: [{path: p}]\nrollout:\n  tensor_parallel_size: 2\n",
     "demo.yaml:5: rollout.tensor_parallel_size: 2 GPUs per engine; set resources.ppo.num_gpus_per_engine "
     "to 2 too, not 0"),
    (NAME + SFT + "rollout:\n  tensor_parallel_size: 2\n  engine: hf\n",
     "demo.yaml:6: rollout.tensor_parallel_size: only vllm splits a model over GPUs; set 1"),
    (NAME + "ppo:\n  data: [{path: p}]\nresources:\n  ppo: {num_gpus: 1, num_gpus_per_engine: 0.5}\n",
     "demo.yaml:5: resources.ppo: 1.5 GPUs for one bundle; Ray grants a share of one GPU, or whole ones "
     "(with rollout.sync shm the engines share the first worker's bundle)"),
    # base
    (NAME + "base: gone.yaml\n", "demo.yaml:2: base: no such file: gone.yaml"),
    (NAME + "base: [a]\n", "demo.yaml:2: base: must be the path of another config file"),
    (NAME + "base: .\n", "demo.yaml:2: base: a directory (.), not a YAML file"),
    (NAME + "base: demo.yaml\n", "demo.yaml:2: base: demo.yaml builds on this file: a circle"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line"), IN_FILES)
def test_a_mistake_in_a_file_is_one_line(line_of, text, line):
    assert line_of(text) == line


IN_OVERRIDES = [
    ("sft.lrr=1", "override sft.lrr=1: sft.lrr: no such setting; did you mean 'lr'?"),
    ("sft.lr=5", "override sft.lr=5: sft.lr: 5 is out of range; must be > 0 and <= 1"),
    ("sft.lr", "override 'sft.lr': expected KEY=VALUE, as in sft.lr=1e-4"),
    ("=1", "override '=1': expected KEY=VALUE, as in sft.lr=1e-4"),
    ("sft..lr=1", "override 'sft..lr=1': expected KEY=VALUE, as in sft.lr=1e-4"),
    ("--force", "override '--force': expected KEY=VALUE, as in sft.lr=1e-4"),
    ("model.path=", "override 'model.path=': no value; for none at all write model.path=null"),
    ("sft.data.7.path=x",
     "override sft.data.7.path=x: no item '7' in this list of 1; they count from 0, and 1 adds one"),
    ("sft.data.path=x",
     "override sft.data.path=x: no item 'path' in this list of 1; they count from 0, and 1 adds one"),
    ("sft.data.-1.path=x",
     "override sft.data.-1.path=x: no item '-1' in this list of 1; they count from 0, and 1 adds one"),
    ("sft.lr.x=1", "override sft.lr.x=1: sft.lr: must be a number, not a group of settings"),
    ("sft.data.0.columns={a: 1",
     "override sft.data.0.columns={a: 1: not valid YAML: expected ',' or '}', but got "
     "'<stream end>' (while parsing a flow mapping that starts in line 1)"),
    ("sft.data.0.columns={a: b, a: c}",
     "override sft.data.0.columns={a: b, a: c}: a: stated twice; keep one"),
    ("sft={lr: !!int 5}",
     "override sft={lr: !!int 5}: tags such as !!int are not allowed; write plain values"),
    ("sft.precision=fp8",
     "override sft.precision=fp8: sft.precision: must be 'fp32' or 'bf16', not 'fp8'"),
    ("model.context_length=16",
     "override model.context_length=16: ppo.max_response_tokens: 32 leaves no room for "
     "a prompt and an end token in model.context_length 16; use 14 at most, or a longer context"),
    ("name=a\nb",
     "override name=a\\nb: name: use letters, digits, '.', '_' and '-' only: it names a directory"),
    ("name=\udce9",
     "override name=\\udce9: name=\\udce9: half of a surrogate pair (or a byte that is not UTF-8) "
     "is not a character"),
    (".".join("a" * 5000) + "=1", None),
    ("sft.data." + "1" * 5000 + ".path=1", None),
]  # fmt: skip


@pytest.mark.parametrize(
    "address",
    ["h", ":80", "h:", "h:0", "h:65536", "h:099", "h:\u00b2", "h:\u0663", "a..b:80", "-a:80", "ray://h:80",
     "x" * 64 + ":80", "me@h:80", "h:80/x", "::1:80", "[h]:80", f"[{'1:' * 30}]:80", "Auto", "", " h:80 "],
)  # fmt: skip
def test_a_cluster_is_named_by_host_and_port(line_of, address):
    line = line_of(NAME + SFT + f"resources:\n  address: '{address}'\n")
    said = "must be `auto`, or `host:port` with a port from 1 to 65535"
    assert line == f"demo.yaml:6: resources.address: {said}"


@pytest.mark.parametrize(("override", "line"), IN_OVERRIDES)
def test_a_mistake_in_an_override_is_one_line(line_of, override, line):
    found = line_of(NAME + SFT + "ppo: {data: [{path: p}]}\n", override)
    assert line is None or found == line


def test_a_mistake_in_a_base_is_blamed_on_the_base(line_of, tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/base.yaml").write_text("seed: 0\nsft:\n  lrr: 1\n")
    assert line_of("base: shared/base.yaml\n" + NAME + SFT) == (
        "shared/base.yaml:3: sft.lrr: no such setting; did you mean 'lr'?"
    )


def test_a_circle_of_bases_is_found(line_of, tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: demo.yaml\n")
    assert line_of("base: a.yaml\n") == "b.yaml:1: base: demo.yaml builds on this file: a circle"
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    assert (
        line_of("base: loop.yaml\n") == "demo.yaml:1: base: cannot be read: Too many levels of symbolic links"
    )


def test_aliases_cannot_exhaust_memory(line_of):
    """Billion laughs: ten anchors of ten aliases each."""
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
    )
    start = time.monotonic()
    assert line_of(bomb) == "demo.yaml:5: more than 100000 values, aliases expanded"
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("gone.yaml", "gone.yaml: no such file"),
        (".", ".: a directory, not a YAML file"),
        ("a\0b", "a\\x00b: cannot be read: embedded null byte"),
        ("x" * 300, f"{'x' * 299}…: cannot be read: File name too long"),
    ],
)
def test_a_config_that_cannot_be_read_is_one_line(tmp_path, monkeypatch, path, line):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        load(Path(path))
    assert str(error.value) in (line, line.replace("…", "x"))
