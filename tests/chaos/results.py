"""docs/results/chaos.md from what a campaign recorded."""

import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aims import NUM_KILLS

if TYPE_CHECKING:
    from campaign import Campaign

Event = dict[str, Any]
EXIT_CODES = (4, -9)
"""Of a driver whose run lost a process, and of one that was killed itself."""


def page(campaign: "Campaign") -> tuple[str, bool]:
    """The text, and whether all is as it should be."""
    (begun,) = campaign.events("begin")
    kills, runs, references = (campaign.events(kind) for kind in ("kill", "whole", "reference"))
    surprises = campaign.events("surprise")
    expected = {event["engine"]: event["weights"] for event in references}
    different = [run["run"] for run in runs if run["weights"] != expected[run["engine"]]]
    recorded = [*kills, *runs, *surprises]
    lost = sum(event.get("lost_steps", 0) for event in recorded)
    again = sum(event.get("rollouts_made_again", 0) for event in recorded)
    fatal = [kill for kill in kills if not kill["went_on"]]
    unclean = [kill for kill in kills if kill["left"]]
    hanging = [kill for kill in kills if kill["exit_code"] is None and not kill["went_on"]]
    wrong = [kill for kill in fatal if kill["exit_code"] not in (None, *EXIT_CODES)]
    sound = bool(runs) and not (different or lost or again or unclean or hanging or wrong or surprises)
    lines = [
        "# Chaos: runs killed at random moments",
        "",
        _measured(begun),
        "",
        f"Machine: {_machine()}.",
        f"Command: `make chaos` (`--kills {len(kills)} --seed {campaign.seed}`). Tiny runs of all six stages "
        "(2 layers, 64 wide; fp32, synchronous), each from nothing to its end; every second one generates "
        "with vLLM, the others with the reference engine. Each kill is a SIGKILL of one process; then the "
        "same command again.",
        "",
        "| | |",
        "| --- | --- |",
        f"| kills | {len(kills)} |",
        f"| of them with an unfinished checkpoint on the disk | {sum(kill['inside'] for kill in kills)} |",
        f"| of processes that had done their work, so that the run went on | {len(kills) - len(fatal)} |",
        f"| runs that ended whole | {len(runs)} |",
        f"| launches that ended in an error without a kill | {len(surprises)} |",
        f"| runs that did not end in the undisturbed run's weights (blake3) | {len(different)} |",
        f"| committed steps that were taken a second time | {lost} |",
        f"| journaled rollouts that were written a second time | {again} |",
        f"| kills that left a process, shared memory or a directory behind (10 s later) | {len(unclean)} |",
        f"| kills after which the driver hung | {len(hanging)} |",
        f"| kills that the driver took for something else (exit code not {EXIT_CODES[0]}) | {len(wrong)} |",
        f"| planned kills whose moment did not come | {len(campaign.events('missed'))} |",
        "",
        "## Time to detect, and until nothing is left",
        "",
        "Seconds from the kill to the end of the driver (of the driver itself: 0), and until no process, "
        "shared memory or temporary directory of the run was left.",
        "",
        *_table(fatal, "victim", sorted({kill["victim"] for kill in fatal}), _times),
        "",
        "## Where",
        "",
        *_table(kills, "stage", list(NUM_KILLS), _by("victim")),
        "",
        *_table(kills, "moment", sorted({kill["moment"] for kill in kills}), _by("stage")),
        "",
    ]  # fmt: skip
    return "\n".join(lines), sound


def _measured(begun: Event) -> str:
    """When, and which code: with other code a campaign begins again."""
    day = time.strftime("%-d %B %Y", time.gmtime(begun["time"]))
    commit = begun["commit"] or "unknown"
    return f"Measured on {day} at commit {commit[:7]}{commit[40:]}; `make chaos` measures the present code."


def _table(
    kills: Sequence[Event], key: str, values: Sequence[str], rest: Callable[[Sequence[Event]], dict[str, str]]
) -> list[str]:
    rows = {
        value: rest(of_value)
        for value in values
        if (of_value := [kill for kill in kills if kill[key] == value])
    }
    names = list(next(iter(rows.values()), {}))
    head = [f"| {key} | kills | {' | '.join(names)} |", f"| --- {'| --- ' * (len(names) + 1)}|"]
    counts = Counter(kill[key] for kill in kills)
    return head + [
        f"| {value} | {counts[value]} | {' | '.join(row[name] for name in names)} |"
        for value, row in rows.items()
    ]


def _times(kills: Sequence[Event]) -> dict[str, str]:
    detect = [kill["detect_s"] for kill in kills]
    clean = [kill["clean_s"] for kill in kills if kill["clean_s"] is not None]
    return {
        "detect, median": f"{statistics.median(detect):.1f}",
        "detect, longest": f"{max(detect):.1f}",
        "nothing left, median": f"{statistics.median(clean):.1f}" if clean else "-",
        "nothing left, longest": f"{max(clean):.1f}" if clean else "-",
        "exit codes": ", ".join(sorted({str(kill["exit_code"]) for kill in kills})),
    }


def _by(key: str) -> Callable[[Sequence[Event]], dict[str, str]]:
    def row(kills: Sequence[Event]) -> dict[str, str]:
        counts = Counter(kill[key] for kill in kills)
        return {f"{key}": ", ".join(f"{value} {number}" for value, number in counts.most_common())}

    return row


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores of {', '.join(names)}, {gib:.0f} GiB, {platform.system()}, no GPU"
