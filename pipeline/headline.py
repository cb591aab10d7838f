"""What came of a run, in words: a headline per stage and one sentence for all of it.

    {stage: metrics} --sentence--> "score 0.49 -> 0.90, ppo wins 87 % (84 to 89), KL 2.2"
              `--headline, cards--> "accuracy on held-out pairs 0.95, loss 0.21"

Owns: the wording, and how many digits of a number are known. Does not own: which metrics are telling
(stage_table), where they are shown (cli, report). A metric that is missing or is no number is left out.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.stage_table import EVALUATED, MEASURES, STAGES, Figure
from stages.runtime import BASE

FINE = 0.05
"""Standard error of a share up to which its second digit is shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One figure in large print."""

    label: str
    value: str
    small_print: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Comparison:
    """What an evaluation says of its models, as far as it says it."""

    metrics: Mapping[str, Any]

    def values(self, measure: str) -> dict[str, float]:
        """Model -> its value, in the order of tuning."""
        found = {model: as_number(self.metrics.get(f"{measure}_{model}")) for model in EVALUATED}
        return {model: value for model, value in found.items() if value is not None}

    def between(self, measure: str) -> tuple[str, str, float] | None:
        """(model, the one it is compared with, value) of a metric like `kl_ppo_vs_sft`."""
        for key, value in self.metrics.items():
            ours, _, theirs = key.removeprefix(f"{measure}_").partition("_vs_")
            if key.startswith(f"{measure}_") and theirs and (number := as_number(value)) is not None:
                return ours, theirs, number
        return None

    def shown(self, measure: str, value: float) -> str:
        """A value of one measure, with the digits that are known of it."""
        name = measure.partition("_")[0]  # score_polite is a component of score
        if name in MEASURES and MEASURES[name].form == "share":
            return share(value, self.metrics.get("prompts"))
        return two_digits(value)


def sentence(metrics: Mapping[str, Mapping[str, Any]]) -> str | None:
    """What came of the stages whose metrics these are; None where none of them says anything.

    The evaluation's comparison; without one the headline of the last stage.
    Example: "score 0.49 -> 0.90, ppo wins 87 % (84 to 89), KL 2.2"
    """
    for stage in reversed(STAGES):
        if stage not in metrics:
            continue
        if STAGES[stage].makes == "figures":
            if said := ", ".join(_compared(_Comparison(metrics=metrics[stage]))):
                return said
        elif said := headline(stage, metrics[stage]):
            return f"{stage}: {said}"
    return None


def headline(stage: str, metrics: Mapping[str, Any]) -> str:
    """The telling metrics of one stage in a line; "" where it has none."""
    if stage not in STAGES:
        return ""
    if STAGES[stage].makes == "figures":
        return ", ".join(_of_models(_Comparison(metrics=metrics)))
    figures = ((figure, _value(figure, metrics)) for figure in STAGES[stage].headline)
    return ", ".join(figure.words.format(value) for figure, value in figures if value is not None)


def cards(metrics: Mapping[str, Mapping[str, Any]]) -> Iterator[Card]:
    """The figures that a report opens with, the evaluation's first."""
    for stage in reversed(STAGES):
        if stage in metrics and STAGES[stage].makes == "figures":
            yield from _cards_of_comparison(_Comparison(metrics=metrics[stage]))
    for stage, row in STAGES.items():
        for figure in row.headline if stage in metrics else ():
            value = _value(figure, metrics[stage])
            if figure.card is not None and value is not None:
                more = _beside(figure, metrics[stage])
                yield Card(label=figure.card, value=value, small_print=figure.small_print + more)


def comparison(metrics: Mapping[str, Any]) -> Iterator[Card]:
    """How an evaluation compares two of its models: win rate and KL."""
    found = _Comparison(metrics=metrics)
    if (win := found.between("win_rate")) is not None:
        ours, theirs, rate = win
        ends = [as_number(found.metrics.get(f"win_rate_{end}")) for end in ("low", "high")]
        interval = " to ".join(percent(end) for end in ends if end is not None)
        yield Card(
            label=f"{ours} wins over {theirs}",
            value=percent(rate),
            small_print=f"ties half; 95 % interval {interval}",
        )
    if (kl := found.between("kl")) is not None:
        ours, theirs, value = kl
        yield Card(
            label=f"KL of {ours} to {theirs}", value=two_digits(value), small_print="nats per response"
        )


def shown_measure(metrics: Mapping[str, Any], measure: str, value: object) -> str:
    """A value in an evaluation's table with the digits that are known of it; anything else as it is."""
    number = as_number(value)
    if number is None:
        return "\u2013" if value is None else str(value)
    return _Comparison(metrics=metrics).shown(measure, number)


def share(value: float, counted: object) -> str:
    """A mean of numbers from 0 to 1 over `counted` things. Its second digit is shown where the standard
    error, at most 0.5 over the root of their number, leaves it a meaning.
    """
    number = as_number(counted)
    is_fine = number is None or (number > 0 and 0.5 / math.sqrt(number) <= FINE)
    return f"{value:.2f}" if is_fine else f"{value:.1f}"


def two_digits(value: float) -> str:
    """Two significant digits, and all digits before the point: "2.2", "-0.26", "1,234", "3.2e-06"."""
    rounded = float(f"{value:.1e}")  # 9.96 is 10
    return f"{value:,.0f}" if 10 <= abs(rounded) < math.inf else f"{value:#.2g}"


def percent(value: float) -> str:
    """Example: percent(0.874) == "87 %"."""
    return f"{100 * value:.0f} %"


def as_number(value: object) -> float | None:
    """`value` as a finite double; None if it is no number, or one too large."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _compared(found: _Comparison) -> Iterator[str]:
    for measure in MEASURES:
        if values := found.values(measure):
            yield _from_to(found, measure, values)
            break
    if (win := found.between("win_rate")) is not None:
        ours, _, rate = win
        low, high = (as_number(found.metrics.get(f"win_rate_{end}")) for end in ("low", "high"))
        interval = "" if low is None or high is None else f" ({100 * low:.0f} to {100 * high:.0f})"
        yield f"{ours} wins {percent(rate)}{interval}"
    if (kl := found.between("kl")) is not None:
        yield f"KL {two_digits(kl[2])}"


def _from_to(found: _Comparison, measure: str, values: Mapping[str, float]) -> str:
    """The first tuned model and the last; with base where only one model is tuned."""
    tuned = [model for model in values if model != BASE]
    ends = [tuned[0], tuned[-1]] if len(tuned) > 1 else list(values)
    arrow = " -> ".join(found.shown(measure, values[model]) for model in ends)
    named = "" if found.between("win_rate") is not None else f" ({' -> '.join(ends)})"
    return f"{measure} {arrow}{named}"


def _of_models(found: _Comparison) -> Iterator[str]:
    for measure in MEASURES:
        if values := found.values(measure):
            shown = (f"{model} {found.shown(measure, value)}" for model, value in values.items())
            yield f"{measure} of {', '.join(shown)}"
            return


def _cards_of_comparison(found: _Comparison) -> Iterator[Card]:
    for measure, row in MEASURES.items():
        values = found.values(measure)
        tuned = [model for model in values if model != BASE]
        if row.card is not None and len(tuned) > 1:
            first, last = tuned[0], tuned[-1]
            change = " \u2192 ".join(found.shown(measure, values[model]) for model in (first, last))
            base = f"{BASE} {found.shown(measure, values[BASE])}" if BASE in values else ""
            yield Card(label=f"{row.card}, {first} \u2192 {last}", value=change, small_print=base)
    yield from comparison(found.metrics)


def _value(figure: Figure, metrics: Mapping[str, Any]) -> str | None:
    value = as_number(metrics.get(figure.key))
    if value is None:
        return None
    match figure.form:
        case "share":
            return share(value, None if figure.counted is None else metrics.get(figure.counted))
        case "count":
            return f"{value:,.0f}"
        case "number":
            return two_digits(value)


def _beside(figure: Figure, metrics: Mapping[str, Any]) -> str:
    if figure.beside is None or (value := as_number(metrics.get(figure.beside[0]))) is None:
        return ""
    shown = share(value, None) if figure.form == "share" else two_digits(value)
    return f"; {figure.beside[1].format(shown)}"
