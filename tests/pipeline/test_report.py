"""The report of a small synthetic run: what is in it, what is left out, and that hostile text stays text."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from pipeline.config import load, resolved_yaml
from pipeline.report import write_report
from pipeline.report_page import Box, curve, el, graph, number
from stages.training.metrics import METRICS as DESCRIBED

HOSTILE = "</td><script>alert(1)</script>&amp;\0\x1b[2J\u202e\ud800 \u2603"
INPUTS = {
    "prepare": [],
    "pretrain": ["prepare"],
    "sft": ["pretrain"],
    "reward": ["sft"],
    "ppo": ["sft", "reward"],
    "evaluate": ["prepare", "pretrain", "sft", "reward", "ppo"],
}
METRICS = {
    "reward": {"accuracy_heldout": 0.91, "accuracy_longer_wins": 0.52},
    "ppo": {"parity_max_abs_diff": 1.5e-6, "samples_per_second": 41.25, "sync_seconds_median": 0.03},
    "evaluate": {
        "score_base": 0.125, "score_sft": 0.25, "score_ppo": 0.63, "score_polite_sft": 0.5,
        "score_polite_ppo": 0.9, "reward_sft": -0.5, "reward_ppo": 1.5, "perplexity_base": 7.5,
        "win_rate_ppo_vs_sft": 0.75, "win_rate_low": 0.7, "win_rate_high": 0.8, "kl_ppo_vs_sft": 4.3,
        "length_ppo": None, "prompts": 288,
    },
}  # fmt: skip

SHOWN = (
    "score 0.25 -> 0.63, ppo wins 75 % (70 to 80), KL 4.3",
    "0.25 \u2192 0.63",
    "75 %",
    "ties half; 95 % interval 70 % to 80 %",
    "288 held-out prompts.",
    "held-out pairs; longer wins: 0.52",
    "1.5e-06",
    "12,345",
    "abc123-dirty",
    "ran, 7.0 s",
    "+0.38",
    "prepare.data.2",
)
READ = (
    "config.yaml",
    "summary.json",
    "sft/metrics.jsonl",
    "ppo/rollouts.jsonl",
    "evaluate/samples.jsonl",
    "prepare/statistics.json",
    "ppo/manifest.json",
)


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """outputs/runs/demo, with links to artifacts as the executor leaves them."""
    run_dir = tmp_path / "runs" / "demo"
    run_dir.mkdir(parents=True)
    summary = {}
    for seconds, (stage, needs) in enumerate(INPUTS.items(), start=5):
        artifact = tmp_path / "artifacts" / f"{stage}-0123"
        artifact.mkdir(parents=True)
        manifest = {
            "stage": stage, "fingerprint": f"{stage}0123", "started_at": "2026-11-20T10:00:00Z",
            "git_commit": "abc123-dirty",
            "packages": {"torch": "2.13.0", "vllm": "0.32.0" if stage == "ppo" else "0.31.0"},
            "inputs": dict.fromkeys(needs, "f"), "machine": {"cpus": 2},
        }  # fmt: skip
        (artifact / "manifest.json").write_text(json.dumps(manifest))
        summary[stage] = {
            "fingerprint": f"{stage}0123",
            "skipped": stage in ("prepare", "pretrain"),
            "seconds": seconds,
            "metrics": METRICS.get(stage, {"loss_final": 1.25}),
        }
        (run_dir / stage).symlink_to(artifact)
    (run_dir / "summary.json").write_text(json.dumps(summary))
    steps = [
        {"step": i, "max_steps": 9, "time": 1.0, "train/loss": 2.0 / i, "odd/one": math.nan}
        for i in range(1, 10)
    ]
    steps[4]["train/loss"] = math.nan
    steps[5]["train/loss"] = None
    (run_dir / "sft/metrics.jsonl").write_text("\n".join(map(json.dumps, steps)) + '\n{"step": 10, "train/lo')
    rollouts = [
        {"step": i // 2, "prompt": "p", "response": f"said {i}", "score": 0.5, "kl": None}
        for i in range(2, 20)
    ]
    (run_dir / "ppo/rollouts.jsonl").write_text("\n".join(map(json.dumps, rollouts)))
    answer = {"response": HOSTILE, "score": 0.5, "reward": -1.0}
    rows = [{"prompt": HOSTILE, "base": answer, "sft": answer, "ppo": answer}] * 20
    (run_dir / "evaluate/samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (run_dir / "prepare/statistics.json").write_text(
        '{"documents": 12345, "sources": [{"source": 2, "chars_kept": 77}, 5], "steps": [5]}'
    )
    config = "name: demo\nevaluate: {num_samples_shown: 3, base_prompt: '{prompt}<script>'}\n"
    (run_dir / "config.yaml").write_text(config)
    return run_dir


class _Page(HTMLParser):
    """Tags, attributes and text of a page; every element is closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in ("meta",):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data + "\n"


def _read(run_dir: Path) -> _Page:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return _Page(path.read_text(encoding="utf-8"))


def test_the_report_holds_every_part_of_the_run(run_dir):
    page = _read(run_dir)
    for heading in (
        "Results",
        "Graph",
        "Evaluation",
        "Samples",
        "Curves",
        "Rollouts",
        "Data",
        "Config",
        "Environment",
    ):
        assert f"\n{heading}\n" in page.text
    for stage in INPUTS:
        assert f"\n{stage}\n" in page.text
    for shown in SHOWN:
        assert shown in page.text
    assert (
        "prepare: 0.31.0; pretrain: 0.31.0; sft: 0.31.0; reward: 0.31.0; ppo: 0.32.0; evaluate: 0.31.0"
        in page.text
    )


def test_the_report_is_one_file_without_scripts_that_fetches_nothing(run_dir):
    page = _read(run_dir)
    assert not {"script", "link", "img", "iframe", "object", "style src"} & set(page.tags)
    targets = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "action")]
    assert all(value.startswith("#") for value in targets)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "url(" not in re.sub(r"url\(#\w+\)", "", (run_dir / "report.html").read_text())
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_what_a_model_wrote_stays_text(run_dir):
    page = _read(run_dir)
    assert "</td><script>alert(1)</script>&amp;\u2400\u241b[2J" in page.text
    assert "{prompt}<script>" in page.text
    assert (
        page.text.count("<script>alert(1)") == 3 * 4
    )  # 3 rows are asked for; a prompt and three models in each


def test_the_first_and_the_last_step_of_training_are_shown(run_dir):
    text = _read(run_dir).text
    assert [i for i in range(2, 20) if f"\nsaid {i}\n" in text] == [2, 3, 18, 19]


def test_values_that_are_no_numbers_leave_a_gap_in_the_curve_and_are_counted(run_dir):
    page = _read(run_dir)
    assert "train/loss: min 0.2222, max 2, last 0.2222, 2 not finite" in page.text
    assert "odd/one" not in page.text
    assert DESCRIBED["train/loss"] in page.text


@pytest.mark.parametrize("missing", READ)
@pytest.mark.parametrize(
    "content", [None, "", "[1", "[]", "null", '"x"', '{"sft": 5}', "\0\xff", "[" * 100_000]
)
def test_a_missing_or_broken_part_is_left_out(run_dir, missing, content):
    (run_dir / missing).unlink()
    if content is not None:
        (run_dir / missing).write_text(content, encoding="latin-1")
    _read(run_dir)


def test_odd_values_do_not_break_the_report(run_dir):
    metrics = {
        "score_sft": "x",
        "score_ppo": [1],
        "win_rate_ppo_vs_sft": None,
        "kl_ppo_vs_sft": 10**400,
        "huge": 1e999,
    }
    summary = {
        "evaluate": {"seconds": "long", "metrics": metrics},
        "sft": {"seconds": 1e999, "metrics": None},
        "<b>": 1,
    }
    (run_dir / "summary.json").write_text(json.dumps(summary))
    rows = [
        {"step": "a", "x/y": 1},
        {"x/y": 1e308},
        {"step": 1e999, "x/y": -1e308},
        {"step": 2, "x/y": 10**400},
        5,
    ]
    (run_dir / "sft/metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (run_dir / "evaluate/samples.jsonl").write_text(
        '{"prompt": 5, "sft": "plain", "ppo": {"response": [1]}}\n'
    )
    page = _read(run_dir)
    assert "plain" in page.text and "<b>" in page.text


def test_a_run_with_nothing_in_it_has_an_empty_report(tmp_path):
    assert "no stage yet" in _read(tmp_path).text


def test_a_long_curve_keeps_its_extremes():
    points = [(float(i), 1000.0 if i == 4321 else math.sin(i)) for i in range(10_000)]
    drawing = curve("a/b", points)
    lines = [node for node in ElementTree.fromstring(drawing).iter() if node.tag == "polyline"]
    drawn = lines[0].get("points").split()
    assert len(lines) == 1 and len(drawn) <= 400
    assert min(float(point.split(",")[1]) for point in drawn) == 16.0  # the top of the plot


def test_a_single_point_and_a_constant_are_drawn():
    for points in ([(1.0, 5.0)], [(1.0, 5.0), (2.0, 5.0)], [(1.0, None), (2.0, 5.0), (3.0, None)]):
        assert "nan" not in curve("a", points)
    assert curve("a", [(1.0, None), (2.0, math.nan)]) is None


def test_the_graph_draws_every_edge_once():
    boxes = [
        Box(name=name, status="ran", detail="", hint="", needs=tuple(needs)) for name, needs in INPUTS.items()
    ]
    paths = [node for node in ElementTree.fromstring(graph(boxes)).iter() if node.get("class") == "edge"]
    assert len(paths) == sum(map(len, INPUTS.values()))
    assert len({path.get("d") for path in paths}) == len(paths)


def test_the_graph_shows_that_sft_feeds_reward_and_ppo():
    """ppo stands beside sft in the main line; the reward model is a detour below it."""
    needs = {"sft": (), "reward": ("sft",), "ppo": ("sft", "reward"), "evaluate": ("sft", "reward", "ppo")}
    boxes = [
        Box(name=name, status="ran", detail="", hint="", needs=needs[name], row=int(name == "reward"))
        for name in needs
    ]
    drawn = [node for node in ElementTree.fromstring(graph(boxes)).iter() if node.get("class") == "edge"]
    paths = [str(path.get("d")) for path in drawn]
    assert len(set(paths)) == 6
    straight = [path for path in paths if "H" in path and "Q" not in path]
    assert [path.split("H")[0] for path in straight] == [
        "M132,88.0",
        "M476,88.0",
    ]  # sft to ppo, ppo to evaluate
    tops = {node.get("y") for node in ElementTree.fromstring(graph(boxes)).iter() if node.tag == "rect"}
    assert tops == {"57", "145"}


def test_a_run_of_half_a_chain_opens_with_what_there_is(run_dir):
    summary = json.loads((run_dir / "summary.json").read_text())
    half = {stage: summary[stage] for stage in ("prepare", "pretrain", "sft")}
    (run_dir / "summary.json").write_text(json.dumps(half))
    assert "\nsft: loss 1.2\n" in _read(run_dir).text


def test_elements_escape_text_and_keep_markup():
    inner = el("b", "<&>", title='"')
    assert inner == '<b title="&quot;">&lt;&amp;&gt;</b>'
    assert el("p", inner, "<i>", None, class_="x") == f'<p class="x">{inner}&lt;i&gt;</p>'


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "\u2013"),
        (0.123456, "0.1235"),
        (1234567.8, "1,234,568"),
        (math.nan, "nan"),
        (True, "True"),
        (3, "3"),
    ],
)
def test_numbers_have_four_digits(value, shown):
    assert number(value) == shown


def test_the_report_reads_a_resolved_config(run_dir, tmp_path):
    source = tmp_path / "demo.yaml"
    source.write_text("name: demo\nevaluate:\n  prompts: [{path: p}]\n  num_samples_shown: 1\n")
    (run_dir / "config.yaml").write_text(resolved_yaml(load(source).config))
    assert _read(run_dir).text.count("<script>alert(1)") == 4
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["name"] == "demo"
