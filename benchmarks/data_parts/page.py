"""The page of results: figures in, Markdown out. Verdicts are computed from the figures."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from data_parts.tokenise import PACKINGS

GIB = 1024  # MiB
MAX_RATIO, MIN_SHARE, MAX_MEMORY = 0.9, 0.95, 2 * GIB
"""What is asked for: of the bare tokenizer's speed; recall and precision; MiB of prepare."""

INTRODUCTION = """# The data path, beside what others do with the same text

Written by `benchmarks/data.py`; figures: [data.json](data.json). Times are of this machine, ratios travel.
Each part names its command; `--text` takes any text (the files here: State of the Union addresses, the
validation text of WikiText-2, Tiny Shakespeare). Seconds are medians of interleaved rounds, after one that
warms up.
"""


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Of the parts that have been measured."""
    sections = [_SECTIONS[name](results[name]) for name in _SECTIONS if name in results]
    return "\n".join([INTRODUCTION, *sections])


def _section(title: str, result: Mapping[str, Any], lines: Iterable[str]) -> str:
    head = [f"## {title}", "", f"`{result['command']}`", ""]
    others = result["others_percent"]
    load = (
        "Load by others was not measured"
        if others is None
        else f"Others used {others} % of the CPUs meanwhile"
    )
    around = f"{result['machine']}. {load}."
    return "\n".join([*head, around, "", *lines, ""])


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def _asked(is_met: bool, what: str) -> str:
    return f"{what}: {'met' if is_met else '**not met**'}."


def _spread(times: Mapping[str, float]) -> str:
    """Seconds: median, fastest and slowest."""
    return f"{times['median']:.2f} ({times['min']:.2f} to {times['max']:.2f})"


# Tokenise and pack


def _tokenise(result: Mapping[str, Any]) -> str:
    figures = result["figures"]
    lines = [
        "Prepare's path (blocks of documents on the disk -> `encode_block` -> packer -> shards on the disk, "
        "all digests and fsyncs included) against the bare tokenizer's `encode_batch` of the same documents, "
        "in memory, its ids thrown away. Byte-level BPE of 8,192 entries trained on the text; one tokenizer "
        "thread per process.",
    ]
    for name, title in (("long", "One thread"), ("short", "Short documents"), ("threads", "Two threads")):
        lines += ["", *_speeds(title, figures[name])]
    ratios = [_ratio(figures[name], packing) for name in ("long", "short") for packing in PACKINGS]
    lines += [
        "",
        _asked(
            min(ratios) >= MAX_RATIO, f"At least {MAX_RATIO} of `encode_batch` (lowest {min(ratios):.2f})"
        ),
        "",
        "`encode_batch_fast` keeps no offsets; prepare calls it, and `encode_batch` is what its time is held "
        "against.",
        "",
        *_scaling(figures["long"]),
    ]
    return _section("Tokenise and pack", result, lines)


def _speeds(title: str, figures: Mapping[str, Any]) -> list[str]:
    seconds = figures["seconds"]
    names = [name for name in seconds if not name.endswith(" x2")]
    about = (
        f"{title}: {figures['documents']:,} documents (median {figures['median_chars']:,} characters), "
        f"{figures['megabytes']:.1f} MB, {figures['tokens']:,} tokens, rows of {figures['context_length']:,}."
    )
    rows = [
        [
            name,
            _spread(seconds[name]),
            f"{figures['tokens'] / seconds[name]['median']:,.0f}",
            f"{figures['megabytes'] / seconds[name]['median']:.2f}",
            f"{_ratio(figures, name):.2f}",
        ]
        for name in names
    ]
    return [about, "", *_table(["variant", "s", "tokens/s", "MB/s", "of encode_batch"], rows)]


def _ratio(figures: Mapping[str, Any], name: str, processes: str = "") -> float:
    """Of the bare tokenizer's speed."""
    seconds = figures["seconds"]
    return float(seconds[f"encode_batch{processes}"]["median"] / seconds[f"{name}{processes}"]["median"])


def _scaling(figures: Mapping[str, Any]) -> list[str]:
    seconds = figures["seconds"]
    rows = [
        [
            name,
            _spread(seconds[name]),
            _spread(seconds[f"{name} x2"]),
            f"{figures['tokens'] / seconds[f'{name} x2']['median']:,.0f}",
            f"{seconds[name]['median'] / seconds[f'{name} x2']['median']:.2f}",
            f"{_ratio(figures, name, ' x2'):.2f}",
        ]
        for name in ("encode_batch", *PACKINGS)
    ]
    header = ["variant", "1 process, s", "2 processes, s", "tokens/s of 2", "speed-up", "of encode_batch x2"]
    return [
        "Two processes of one thread each, as prepare's workers are; packing and writing stay in one:",
        "",
        *_table(header, rows),
    ]


# Near duplicates


def _dedup(result: Mapping[str, Any]) -> str:
    figures = result["figures"]
    ours = figures["sides"]["this project"]
    lines = [
        f"{figures['documents']:,} documents ({figures['megabytes']:.0f} MB), each of "
        f"{figures['passages_per_document']} passages of the text; any two originals share at most "
        f"{figures['most_shared']} passages. A tenth are copies with 1 to 6 words replaced or left out: "
        f"{figures['pairs_above']:,} at a Jaccard similarity of 0.8 or more (runs of five words, counted "
        f"exactly), {figures['pairs_below']:,} below. 128 hash functions, one thread.",
        "",
        f"Signatures: {figures['seconds_signatures']:.1f} s "
        f"({figures['documents'] / figures['seconds_signatures']:,.0f} documents/s). Both sides then start "
        "from the same ones, in a process each:",
        "",
    ]
    names = list(ours["recall"])
    header = ["", "bands x rows", "s", "peak MiB (at start)", "dropped", "precision"]
    rows = [
        [
            side,
            " x ".join(map(str, one["bands"])),
            f"{one['seconds']:.1f}",
            f"{one['peak_mib']:.0f} ({one['start_mib']:.0f})",
            f"{one['dropped']:,}",
            f"{one['right'] / max(1, one['dropped']):.3f}",
            *(f"{_share(one['recall'][name]):.3f}" for name in names),
        ]
        for side, one in figures["sides"].items()
    ]
    lines += _table([*header, *(f"recall, {name}" for name in names)], rows)
    recall, precision = _share(ours["recall"][names[0]]), ours["right"] / max(1, ours["dropped"])
    asked = f"Recall and precision of {MIN_SHARE} at 0.8 (here {recall:.3f} and {precision:.3f})"
    lines += [
        "",
        f"This project's time is {ours['seconds_bands']:.2f} s for band keys, the rest for buckets and for "
        "the true similarity of what shares one, read from texts on the disk; datasketch's is one query and "
        "one insertion per document, and it verifies nothing.",
        "",
        _asked(min(recall, precision) >= MIN_SHARE, asked),
    ]
    return _section("Near duplicates", result, lines)


def _share(counted: Sequence[int]) -> float:
    found, wanted = counted
    return found / max(1, wanted)


# Memory


def _memory(result: Mapping[str, Any]) -> str:
    runs = result["figures"]
    header = [
        "executor",
        "GB",
        "s",
        "documents",
        "tokens",
        "peak RSS, MiB",
        "peak of the tree, MiB",
        "processes",
    ]
    rows = [
        [
            run["executor"],
            f"{run['gigabytes']:.2f}",
            f"{run['seconds']:.0f}",
            f"{run['metrics']['documents_kept']:,.0f} of {run['metrics']['documents']:,.0f}",
            f"{run['metrics']['tokens_train']:,.0f}",
            f"{run['peak_main']:.0f}",
            f"{run['peak_tree']:.0f} ({run['peak_tree_private']:.0f} private)",
            f"{run['peak_processes']}",
        ]
        for run in runs
    ]
    tenths = [
        [run["executor"], f"{run['gigabytes']:.2f}", *(f"{peak:.0f}" for peak in run["tree_by_tenth"])]
        for run in runs
    ]
    first = runs[0]
    most = max(max(run["peak_main"], run["peak_tree"]) for run in runs)
    lines = [
        "`rlhf prepare` as a user runs it, on a jsonl file made of passages of the text: "
        "`pipeline.executor=inline`, and on Ray with `resources.prepare.num_workers=2`. A tokenizer of 8,192 "
        f"entries is trained; near duplicates {_on(first['near_dedup'])}, gopher_quality "
        f"{_on(first['quality'])}. Peak RSS is the kernel's count for the process that the user starts, an "
        "upper bound (the benchmark's own size, which it is forked from, counts in it); that of the tree is "
        "proportional (PSS), sampled four times a second, Ray's own processes included.",
        "",
        *_table(header, rows),
        "",
        "The largest tree of each tenth of the time, MiB:",
        "",
        *_table(["executor", "GB", *(f"{tenth}" for tenth in range(1, 11))], tenths),
        "",
        _asked(most < MAX_MEMORY, f"Below {MAX_MEMORY / GIB:.0f} GiB (largest {most:.0f} MiB)"),
        *_growth(runs),
    ]
    return _section("Memory", result, lines)


def _on(is_on: bool) -> str:
    return "on" if is_on else "off"


def _growth(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """How much more the largest input took than the smallest, per executor."""
    lines = []
    for executor in dict.fromkeys(run["executor"] for run in runs):
        own = sorted((run for run in runs if run["executor"] == executor), key=lambda run: run["gigabytes"])
        if len(own) > 1:
            size = own[-1]["gigabytes"] / own[0]["gigabytes"]
            main = own[-1]["peak_main"] / own[0]["peak_main"]
            tree = own[-1]["peak_tree"] / own[0]["peak_tree"]
            lines += [
                "",
                f"{executor}: {size:.1f} times the input took {main:.2f} times the peak RSS, {tree:.2f} "
                "times that of the tree.",
            ]
    return lines


# Peers


def _peers(result: Mapping[str, Any]) -> str:
    figures = result["figures"]
    seconds, tokens = figures["seconds"], figures["tokens"]
    rows = []
    for name, times in seconds.items():
        peer, _, processes = name.rpartition(" x")
        speed = tokens[peer] / times["median"]
        rows.append(
            [
                peer,
                processes,
                _spread(times),
                f"{speed:,.0f}",
                f"{figures['megabytes'] / times['median']:.2f}",
                f"{times['median'] / seconds[f'this project x{processes}']['median']:.2f}",
            ]
        )
    header = ["", "processes", "s", "tokens/s", "MB/s", "time of this project's"]
    lines = [
        f"A jsonl input of {figures['megabytes']:.0f} MB in, its documents' ids on the disk out, same "
        "tokenizer, one tokenizer thread per process; the time holds reading and, for two, forking workers. "
        "This project: normal form, exact duplicates out, held-out share, ids, rows, a digest of every file "
        "(prepare's steps under a pool of processes, for Ray's start is not what is compared). datatrove: "
        "`DocumentTokenizer`, not shuffled; rows read by the standard library's json. datasets: "
        "`load_dataset`, `map` to tokenise, `map` to concatenate and chunk.",
        "",
        *_table(header, rows),
    ]
    return _section("Peers on the same work", result, lines)


_SECTIONS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "tokenise": _tokenise,
    "dedup": _dedup,
    "memory": _memory,
    "peers": _peers,
}
