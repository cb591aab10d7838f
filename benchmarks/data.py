"""The data path measured beside what others do with the same text in the same run: docs/results/data.md.

python benchmarks/data.py --text FILES... [--parts tokenise dedup memory peers]

    each part --measure--> docs/results/data.json (its last figures) --page--> docs/results/data.md

A part runs in processes of its own. Times are of this machine, the ratios travel.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_parts import memory, near_dedup, peers, tokenise
from data_parts.page import page
from data_parts.processes import OthersLoad, surroundings

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "docs/results/data.json", ROOT / "docs/results/data.md"


def main() -> None:
    arguments = _parsed()
    parts: dict[str, Callable[[], Any]] = {
        "tokenise": lambda: tokenise.measure(arguments.text, arguments.repeats),
        "dedup": lambda: near_dedup.measure(arguments.text, arguments.documents),
        "memory": lambda: memory.measure(
            arguments.text,
            arguments.gigabytes,
            arguments.executors,
            near_dedup=arguments.near_dedup,
            quality=arguments.quality,
        ),
        "peers": lambda: peers.measure(arguments.text, arguments.peer_megabytes, arguments.repeats),
    }
    for name in arguments.parts:
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        others = OthersLoad()
        figures = parts[name]()
        results[name] = {
            "command": _command(name, arguments),
            **surroundings(),
            "others_percent": others.percent(),
            "figures": figures,
        }
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        PAGE.write_text(page(results))
        print(json.dumps(results[name]["figures"], indent=1), flush=True)


def _parsed() -> argparse.Namespace:
    names = ("tokenise", "dedup", "memory", "peers")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", type=Path, nargs="+", default=[ROOT / "configs/demo/corpus.jsonl"])
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--repeats", type=int, default=5, help="rounds over all variants")
    parser.add_argument("--documents", type=int, default=100_000, help="of dedup")
    parser.add_argument("--peer-megabytes", type=float, default=40.0, help="input of peers")
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.0, 2.0], help="inputs of memory")
    parser.add_argument("--executors", nargs="+", choices=("inline", "ray"), default=["inline", "ray"])
    parser.add_argument("--near-dedup", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--quality", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def _command(part: str, arguments: argparse.Namespace) -> str:
    """What makes this part again; files by their names, for where they lie is of no interest."""
    given = [*sys.argv[1:]]
    if "--parts" in given:
        start = given.index("--parts")
        end = next((at for at in range(start + 1, len(given)) if given[at].startswith("--")), len(given))
        del given[start:end]
    names = [Path(word).name if Path(word) in arguments.text else word for word in given]
    return " ".join(["python benchmarks/data.py --parts", part, *names])


if __name__ == "__main__":
    main()
