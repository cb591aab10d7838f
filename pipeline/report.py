"""A run directory -> report.html: one file that shows what ran, what it measured and what the models now say.

    runs/<name>/{config.yaml, summary.json, <stage>/{manifest.json, metrics.jsonl, ...}} --> report.html

Owns: what is shown, and in which order. Does not own: markup and drawing (report_page), the files it reads.
A part whose file is missing or unreadable is left out, so half a run has a report too.
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
from pipeline.headline import Card, as_number, cards, comparison, sentence, shown_measure
from pipeline.progress import duration
from pipeline.report_page import Box, Html, curve, el, graph, join, number, page, table
from pipeline.stage_table import EVALUATED, MEASURES, STAGES
from pipeline.yaml_source import read_config
from stages.runtime import BASE
from stages.training.metrics import METRICS

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
        "Results": _results(stages),
        "Graph": _graph(stages),
        "Evaluation": _evaluation(stages),
        "Samples": _samples(stages, run_dir),
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


def outcome(run_dir: Path) -> str | None:
    """The sentence that the report of this run opens with; None where no stage says anything."""
    return sentence(_metrics(_stages(run_dir)))


# --- reading


def _stages(run_dir: Path) -> list[_Stage]:
    summary = _mapping(_read_json(run_dir / "summary.json"))
    return [
        _Stage(
            name=name,
            directory=run_dir / name,
            skipped=entry.get("skipped") is True,
            fingerprint=str(entry.get("fingerprint", "")),
            seconds=as_number(entry.get("seconds")),
            metrics=_mapping(entry.get("metrics")),
            manifest=_mapping(_read_json(run_dir / name / "manifest.json")),
        )
        for name, entry in ((name, _mapping(entry)) for name, entry in summary.items())
    ]


def _metrics(stages: Sequence[_Stage]) -> dict[str, Mapping[str, Any]]:
    return {stage.name: stage.metrics for stage in stages}


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


def _num_samples(run_dir: Path, stage: str) -> int:
    """`<stage>.num_samples_shown` of the resolved config."""
    try:
        config = read_config(run_dir / "config.yaml")
    except ConfigError:
        return NUM_SAMPLES
    stated = config.nearest((stage, "num_samples_shown")).value
    return stated if isinstance(stated, int) else NUM_SAMPLES


# --- sections


def _results(stages: Sequence[_Stage]) -> Html | None:
    """What came of the run in one sentence, and its figures in large print."""
    metrics = _metrics(stages)
    said, shown = sentence(metrics), [*cards(metrics), *_time(stages)]
    if not shown:
        return None
    boxes = [
        el(
            "div",
            el("div", card.label, class_="label"),
            el("div", card.value, class_="value"),
            el("div", card.small_print, class_="more"),
            class_="card",
        )
        for card in shown
    ]
    return join(el("p", said, class_="sentence") if said else None, el("div", *boxes, class_="cards"))


def _time(stages: Sequence[_Stage]) -> Iterator[Card]:
    ran = [stage for stage in stages if not stage.skipped]
    if stages:
        seconds = sum(stage.seconds or 0.0 for stage in ran)
        counted = f"{len(ran)} stages ran, {len(stages) - len(ran)} skipped"
        yield Card(label="Time", value=_duration(seconds), small_print=counted)


def _graph(stages: Sequence[_Stage]) -> Html | None:
    boxes = [
        Box(
            name=stage.name,
            status="skipped" if stage.skipped else "ran",
            detail="skipped" if stage.skipped else f"ran, {_duration(stage.seconds)}",
            hint=f"{stage.name} {stage.fingerprint}, took {_duration(stage.seconds)} when it ran",
            needs=tuple(_mapping(stage.manifest.get("inputs"))),
            row=1 if _makes(stage) == "reward model" else 0,
        )
        for stage in stages
    ]
    return graph(boxes) if boxes else None


def _evaluation(stages: Sequence[_Stage]) -> Html | None:
    """A row per measure, a column per model."""
    metrics = next((stage.metrics for stage in stages if _makes(stage) == "figures"), {})
    models = [model for model in EVALUATED if any(key.endswith(f"_{model}") for key in metrics)]
    keys = [key for key in metrics if "_vs_" not in key]
    ends = tuple(f"_{model}" for model in models)
    found = dict.fromkeys(key.rpartition("_")[0] for key in keys if key.endswith(ends))
    if not found:
        return None
    first, *others = MEASURES
    components = [other for other in found if other.startswith(f"{first}_")]
    ordered = dict.fromkeys([first, *components, *others, *found])
    tuned = [model for model in models if model != BASE]
    compared = (tuned[0], tuned[-1]) if len(tuned) > 1 else None
    rows = []
    for measure in (measure for measure in ordered if measure in found):
        values = {model: metrics.get(f"{measure}_{model}") for model in models}
        label = MEASURES[measure].label if measure in MEASURES else measure.removeprefix(f"{first}_")
        row = [label, *(shown_measure(metrics, measure, value) for value in values.values())]
        if compared is not None:
            before, after = (as_number(values[model]) for model in compared)
            change = None if before is None or after is None else after - before
            row.append(_signed(shown_measure(metrics, measure, change)))
        rows.append(row)
    header = ["", *models, *([f"{compared[1]} \u2212 {compared[0]}"] if compared else [])]
    notes = (f"{card.label}: {card.value} ({card.small_print})." for card in comparison(metrics))
    asked = f"{number(metrics['prompts'])} held-out prompts." if "prompts" in metrics else ""
    note = el("p", " ".join([*notes, asked]), class_="muted")
    return join(table(header, rows, class_="numbers"), note)


def _samples(stages: Sequence[_Stage], run_dir: Path) -> Html | None:
    rows: list[Mapping[str, Any]] = []
    for stage in stages:
        rows += islice(_read_lines(stage.directory / "samples.jsonl"), _num_samples(run_dir, stage.name))
    models = [model for model in EVALUATED if any(model in row for row in rows)]
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
            if (points := [(float(step), as_number(row[name])) for step, row in _steps(rows) if name in row])
        ]
        drawn = [figure for figure in figures if figure is not None]
        if drawn:
            parts.append(join(el("h3", stage.name), el("div", *drawn, class_="curves")))
    return join(*parts) if parts else None


def _steps(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, Mapping[str, Any]]]:
    """Rows with their step; by their place in the file where they state none."""
    numbered = []
    for place, row in enumerate(rows, start=1):
        step = as_number(row.get("step"))
        numbered.append((step if step is not None and math.isfinite(step) else float(place), row))
    return sorted(numbered, key=lambda item: item[0])


def _rollouts(stages: Sequence[_Stage]) -> Html | None:
    """What the policy said in training: the first logged step beside the last."""
    first: list[Mapping[str, Any]] = []
    last: list[Mapping[str, Any]] = []
    for stage in stages:
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
        statistics = _mapping(_read_json(stage.directory / "statistics.json"))
        rows = [
            [key.replace("_", " "), number(value)]
            for key, value in statistics.items()
            if as_number(value) is not None
        ]
        if rows:
            numbers = table([stage.name, ""], rows, class_="numbers")
            return join(_filter_steps(statistics), _sources(statistics, stage.name), numbers)
    return None


def _sources(statistics: Mapping[str, Any], stage: str) -> Html:
    """What became of each source of the corpus, in documents and characters."""
    sources = [_mapping(source) for source in _sequence(statistics.get("sources"))]
    if not sources:
        return join()
    columns = ("documents", "documents_kept", "chars_kept", "documents_train", "chars_train")
    rows = [
        [f"{stage}.data.{number(source.get('source'))}", *(number(source.get(key)) for key in columns)]
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
    """A fact per line; by stage where they differ, because a stage may come from another day or machine."""
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


def _makes(stage: _Stage) -> str | None:
    return STAGES[stage.name].makes if stage.name in STAGES else None


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def _signed(shown: str) -> str:
    return f"+{shown}" if shown[0].isdigit() else shown


def _duration(seconds: float | None) -> str:
    return "\u2013" if seconds is None or not math.isfinite(seconds) else duration(seconds)
