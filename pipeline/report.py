"""A run directory -> report.html: one file that shows what ran, what it measured and what the models now say.

    runs/<name>/{config.yaml, summary.json, <stage>/{manifest.json, metrics.jsonl, ...}} --> report.html

Owns: what is shown, and in which order. Does not own: markup and drawing (report_page), the files it reads.
A part whose file is missing or unreadable is left out: a report of half a run is a report of half a run.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.progress import duration
from pipeline.report_page import Box, Html, curve, el, graph, join, number, page, table
from pipeline.yaml_source import read_config
from stages.training.metrics import METRICS

MODELS = ("base", "sft", "ppo")
MEASURES = {
    "score": "score, 0 to 1",
    "reward": "reward model, normalised",
    "perplexity": "perplexity, held-out text",
    "length": "length, tokens",
    "truncated": "responses without an end",
}
"""Of the evaluation, the first ones in this order."""
NUM_SAMPLES = 12
NUM_ROLLOUTS = 6
NOT_CURVES = ("step", "max_steps", "time")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stage:
    """What the report knows of one stage."""

    name: str
    directory: Path  # runs/<name>/<stage>, a link to the artifact
    skipped: bool
    fingerprint: str
    seconds: float | None
    metrics: Mapping[str, Any]
    manifest: Mapping[str, Any]  # {} without one


def write_report(run_dir: Path) -> Path:
    """Write `run_dir`/report.html, replacing an older one in one step; its path."""
    stages = _stages(run_dir)
    sections = {
        "Results": _headlines(stages),
        "Graph": _graph(stages),
        "Evaluation": _evaluation(stages),
        "Samples": _samples(stages, _num_samples(run_dir)),
        "Curves": _curves(stages),
        "Rollouts": _rollouts(stages),
        "Data": _data(stages),
        "All figures": _figures(stages),
        "Config": _config(run_dir),
        "Environment": _environment(stages),
    }
    shown = {heading: content for heading, content in sections.items() if content}
    started = [str(stage.manifest["started_at"]) for stage in stages if stage.manifest.get("started_at")]
    subtitle = f"RLHF run, {', '.join(stage.name for stage in stages) or 'no stage yet'}"
    subtitle += f"; newest stage started {max(started)}" if started else ""
    path = run_dir / "report.html"
    unfinished = path.with_name(f".report.{os.getpid()}")
    try:
        unfinished.write_text(page(run_dir.name, subtitle, shown), encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


# --- reading


def _stages(run_dir: Path) -> list[_Stage]:
    summary = _mapping(_read_json(run_dir / "summary.json"))
    return [
        _Stage(
            name=name,
            directory=run_dir / name,
            skipped=entry.get("skipped") is True,
            fingerprint=str(entry.get("fingerprint", "")),
            seconds=_as_number(entry.get("seconds")),
            metrics=_mapping(entry.get("metrics")),
            manifest=_mapping(_read_json(run_dir / name / "manifest.json")),
        )
        for name, entry in ((name, _mapping(entry)) for name, entry in summary.items())
    ]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _read_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    """The objects of a jsonl file; a torn line is left out."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(row, dict):
                    yield row
    except OSError:
        return


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _sequence(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else []


def _as_number(value: Any) -> float | None:
    """`value` as a double; None if it is no number, or one too large."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _num_samples(run_dir: Path) -> int:
    """`evaluate.num_samples_shown` of the resolved config."""
    try:
        config = read_config(run_dir / "config.yaml")
    except ConfigError:
        return NUM_SAMPLES
    stated = config.nearest(("evaluate", "num_samples_shown")).value
    return stated if isinstance(stated, int) else NUM_SAMPLES


# --- sections


def _headlines(stages: Sequence[_Stage]) -> Html | None:
    cards = [
        el(
            "div",
            el("div", label, class_="label"),
            el("div", value, class_="value"),
            el("div", more, class_="more"),
            class_="card",
        )
        for label, value, more in _headline_figures(stages)
    ]
    return el("div", *cards, class_="cards") if cards else None


def _headline_figures(stages: Sequence[_Stage]) -> Iterator[tuple[str, str, str]]:
    """Label, value, small print."""
    found = {stage.name: stage.metrics for stage in stages}
    evaluate, reward, ppo = (_mapping(found.get(name)) for name in ("evaluate", "reward", "ppo"))
    for measure, label in (("score", "Score"), ("reward", "Reward")):
        if {f"{measure}_sft", f"{measure}_ppo"} <= evaluate.keys():
            change = f"{number(evaluate[f'{measure}_sft'])} \u2192 {number(evaluate[f'{measure}_ppo'])}"
            base = evaluate.get(f"{measure}_base")
            yield f"{label}, sft \u2192 ppo", change, "" if base is None else f"base {number(base)}"
    if "win_rate_ppo_vs_sft" in evaluate:
        low, high = evaluate.get("win_rate_low"), evaluate.get("win_rate_high")
        interval = f"95 % interval {_percent(low)} to {_percent(high)}"
        yield "ppo wins over sft", _percent(evaluate["win_rate_ppo_vs_sft"]), interval
    if "kl_ppo_vs_sft" in evaluate:
        yield "KL of ppo to sft", number(evaluate["kl_ppo_vs_sft"]), "nats per response"
    if "accuracy_heldout" in reward:
        rule = reward.get("accuracy_longer_wins")
        more = "held-out pairs" + ("" if rule is None else f"; longer wins: {number(rule)}")
        yield "Reward model accuracy", number(reward["accuracy_heldout"]), more
    if "parity_max_abs_diff" in ppo:
        more = "worst log-prob difference after a sync, nats"
        yield "Engine against trainer", number(ppo["parity_max_abs_diff"]), more
    if "samples_per_second" in ppo:
        sync = ppo.get("sync_seconds_median")
        more = "whole loop" + ("" if sync is None else f"; a weight sync takes {number(sync)} s")
        yield "Responses per second", number(ppo["samples_per_second"]), more
    ran = [stage for stage in stages if not stage.skipped]
    if stages:
        seconds = sum(stage.seconds or 0.0 for stage in ran)
        yield "Time", _duration(seconds), f"{len(ran)} stages ran, {len(stages) - len(ran)} skipped"


def _graph(stages: Sequence[_Stage]) -> Html | None:
    boxes = [
        Box(
            name=stage.name,
            status="skipped" if stage.skipped else "ran",
            detail="skipped" if stage.skipped else f"ran, {_duration(stage.seconds)}",
            hint=f"{stage.name} {stage.fingerprint}, took {_duration(stage.seconds)} when it ran",
            needs=tuple(_mapping(stage.manifest.get("inputs"))),
        )
        for stage in stages
    ]
    return graph(boxes) if boxes else None


def _evaluation(stages: Sequence[_Stage]) -> Html | None:
    metrics = _metrics_of(stages, "evaluate")
    models = [model for model in MODELS if any(key.endswith(f"_{model}") for key in metrics)]
    keys = [key for key in metrics if "_vs_" not in key]
    ends = tuple(f"_{model}" for model in models)
    found = dict.fromkeys(key.rpartition("_")[0] for key in keys if key.endswith(ends))
    if not found:
        return None
    components = [measure for measure in found if measure.startswith("score_")]
    ordered = dict.fromkeys(["score", *components, *MEASURES, *found])
    rows = []
    for measure in (measure for measure in ordered if measure in found):
        values = [metrics.get(f"{measure}_{model}") for model in models]
        sft, ppo = (_as_number(metrics.get(f"{measure}_{model}")) for model in ("sft", "ppo"))
        change = "\u2013" if sft is None or ppo is None else f"{ppo - sft:+.4g}"
        label = MEASURES.get(measure, measure.removeprefix("score_") if measure in components else measure)
        rows.append([label, *map(number, values), change])
    notes = []
    if "win_rate_ppo_vs_sft" in metrics:
        low, high = number(metrics.get("win_rate_low")), number(metrics.get("win_rate_high"))
        win_rate = number(metrics["win_rate_ppo_vs_sft"])
        notes.append(
            f"Win rate of ppo over sft: {win_rate} (ties half; 95 % bootstrap interval {low} to {high})."
        )
    if "kl_ppo_vs_sft" in metrics:
        notes.append(f"KL of ppo to sft: {number(metrics['kl_ppo_vs_sft'])} nats per response.")
    if "prompts" in metrics:
        notes.append(f"{number(metrics['prompts'])} held-out prompts.")
    header = ["", *models, "ppo \u2212 sft"]
    return join(table(header, rows, class_="numbers"), el("p", " ".join(notes), class_="muted"))


def _samples(stages: Sequence[_Stage], count: int) -> Html | None:
    rows = []
    for stage in stages:
        if stage.name == "evaluate":
            rows = list(islice(_read_lines(stage.directory / "samples.jsonl"), count))
    models = [model for model in MODELS if any(model in row for row in rows)]
    if not models:
        return None
    cells = [[_as_text(row.get("prompt")), *(_answer(row.get(model)) for model in models)] for row in rows]
    note = el("p", f"The first {len(rows)} held-out prompts, one sampled response each.", class_="muted")
    return join(note, table(["prompt", *models], cells, class_="samples"))


def _answer(said: Any) -> Html:
    """One model's response, with its scores beneath."""
    fields = _mapping(said)
    scores = " \u00b7 ".join(f"{key} {number(value)}" for key, value in fields.items() if key != "response")
    response = fields.get("response", "" if isinstance(said, dict) else said)
    return join(_as_text(response), el("span", scores, class_="note") if scores else None)


def _curves(stages: Sequence[_Stage]) -> Html | None:
    parts = []
    for stage in stages:
        rows = list(_read_lines(stage.directory / "metrics.jsonl"))
        if len(rows) < 2:  # a stage of one step has figures, not curves
            continue
        names = dict.fromkeys(key for row in rows for key in row if key not in NOT_CURVES)
        figures = [
            curve(name, points, description=METRICS.get(name, ""))
            for name in names
            if (points := [(float(step), _as_number(row[name])) for step, row in _steps(rows) if name in row])
        ]
        drawn = [figure for figure in figures if figure is not None]
        if drawn:
            parts.append(join(el("h3", stage.name), el("div", *drawn, class_="curves")))
    return join(*parts) if parts else None


def _steps(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, Mapping[str, Any]]]:
    """Rows with their step; by their place in the file where they state none."""
    numbered = []
    for place, row in enumerate(rows, start=1):
        step = _as_number(row.get("step"))
        numbered.append((step if step is not None and math.isfinite(step) else float(place), row))
    return sorted(numbered, key=lambda item: item[0])


def _rollouts(stages: Sequence[_Stage]) -> Html | None:
    """What the policy said in training: the first logged step beside the last."""
    first: list[Mapping[str, Any]] = []
    last: list[Mapping[str, Any]] = []
    for stage in stages:
        if stage.name == "ppo":
            for row in _read_lines(stage.directory / "rollouts.jsonl"):
                if not first or (row.get("step") == first[0].get("step") and len(first) < NUM_ROLLOUTS):
                    first.append(row)
                if last and row.get("step") != last[0].get("step"):
                    last = []
                if len(last) < NUM_ROLLOUTS:
                    last.append(row)
    if not first:
        return None
    tables = []
    for rows in [first] if first[0].get("step") == last[0].get("step") else [first, last]:
        cells = [
            [
                _as_text(row.get("prompt")),
                _as_text(row.get("response")),
                number(row.get("score")),
                number(row.get("kl")),
            ]
            for row in rows
        ]
        title = el("h3", f"step {number(rows[0].get('step'))}")
        tables.append(join(title, table(["prompt", "response", "score", "KL"], cells, class_="samples")))
    return join(*tables)


def _data(stages: Sequence[_Stage]) -> Html | None:
    for stage in stages:
        if stage.name == "prepare":
            statistics = _mapping(_read_json(stage.directory / "statistics.json"))
            rows = [
                [key.replace("_", " "), number(value)]
                for key, value in statistics.items()
                if _as_number(value) is not None
            ]
            if rows:
                numbers = table(["prepare", ""], rows, class_="numbers")
                return join(_filter_steps(statistics), _sources(statistics), numbers)
    return None


def _sources(statistics: Mapping[str, Any]) -> Html:
    """What became of each source of prepare, in documents and characters."""
    sources = [_mapping(source) for source in _sequence(statistics.get("sources"))]
    if not sources:
        return join()
    columns = ("documents", "documents_kept", "chars_kept", "documents_train", "chars_train")
    rows = [
        [f"prepare.data.{number(source.get('source'))}", *(number(source.get(key)) for key in columns)]
        for source in sources
    ]
    return table(["source", *(key.replace("_", " ") for key in columns)], rows, class_="numbers")


def _filter_steps(statistics: Mapping[str, Any]) -> Html:
    """What each step of prepare kept and dropped, by which rules, and the documents it shows for it."""
    steps = [_mapping(step) for step in _sequence(statistics.get("steps"))]
    rows, shown = [], []
    for step in steps:
        name = _as_text(step.get("step")).replace("_", " ")
        rules = _mapping(step.get("rules"))
        by_rule = ", ".join(f"{rule}: {number(count)}" for rule, count in rules.items())
        rows.append([name, number(step.get("kept")), number(step.get("dropped")), by_rule])
        examples = [_mapping(example) for example in _sequence(step.get("examples"))]
        if examples:
            cells = [[_as_text(example.get("rule")), _as_text(example.get("text"))] for example in examples]
            summary = el("summary", f"dropped by {name}: the first {len(examples)}")
            shown.append(el("details", summary, table(["rule", "document"], cells, class_="samples")))
    if not rows:
        return join()
    return join(table(["step", "kept", "dropped", "by rule"], rows, class_="numbers"), *shown)


def _figures(stages: Sequence[_Stage]) -> Html | None:
    parts = [
        el(
            "details",
            el("summary", stage.name),
            table(
                ["metric", ""],
                [[key, number(value)] for key, value in stage.metrics.items()],
                class_="numbers",
            ),
        )
        for stage in stages
        if stage.metrics
    ]
    return join(*parts) if parts else None


def _config(run_dir: Path) -> Html | None:
    try:
        config = (run_dir / "config.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return el("details", el("summary", "config.yaml, every setting resolved"), el("pre", config))


def _environment(stages: Sequence[_Stage]) -> Html | None:
    """A fact per line; by stage where they differ, for a stage may come from another day and machine."""
    known = [stage for stage in stages if stage.manifest]
    facts = {stage.name: dict(_environment_facts(stage.manifest)) for stage in known}
    keys = dict.fromkeys(key for stage_facts in facts.values() for key in stage_facts)
    if not keys:
        return None
    rows = []
    for key in keys:
        values = dict.fromkeys(facts[stage.name].get(key, "\u2013") for stage in known)
        if len(values) == 1:
            rows.append([key, next(iter(values))])
        else:
            by_stage = (f"{name}: {found.get(key, chr(0x2013))}" for name, found in facts.items())
            rows.append([key, "; ".join(by_stage)])
    return table(["", ""], rows)


def _environment_facts(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    shown = ("fingerprint", "started_at", "seconds", "git_commit", "exactness", "recipe_version", "machine")
    for key in shown:
        if manifest.get(key) is not None:
            value = manifest[key]
            entries = value.items() if isinstance(value, dict) else [("", value)]
            for name, inner in entries:
                yield f"{key} {name}".strip().replace("_", " "), number(inner)
    for package, version in _mapping(manifest.get("packages")).items():
        yield package, str(version)


# --- words


def _metrics_of(stages: Sequence[_Stage], name: str) -> Mapping[str, Any]:
    return next((stage.metrics for stage in stages if stage.name == name), {})


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def _percent(share: Any) -> str:
    value = _as_number(share)
    return number(share) if value is None else f"{value:.0%}"


def _duration(seconds: float | None) -> str:
    return "\u2013" if seconds is None or not math.isfinite(seconds) else duration(seconds)
