"""Rendering conversations beside transformers: rows per second of CPU, ours and theirs in turn.

python benchmarks/render_chat.py --data FILES... [--model DIRECTORY] [--earlier CHECKOUT]

    conversations --template process, turns, tokenizer--> ids, mask      ours: every prompt and every answer
                  --apply_chat_template(tokenize=True)--> ids            transformers: the whole text, no mask

The CPU time of our template process counts. `--earlier` measures the `ChatTokenizer.render` of another
checkout of this project too, in a process of its own.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from stages.config.data import DataSource
from stages.data.chat import templates
from stages.data.chat.messages import Talk
from stages.data.chat.special import CHATML
from stages.data.chat.tokenizer import ChatTokenizer
from stages.data.corpus.vocabulary import train_tokenizer
from stages.data.reading.readers import read_conversations
from stages.data.reading.records import Conversation

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    arguments = _parsed()
    sources = [DataSource(path=str(path), on_bad_row="skip") for path in arguments.data]
    rows = read_conversations(sources, seed=0).records
    chat = _chat(arguments.model, rows)
    if arguments.is_earlier:
        print(_rate(lambda: [chat.render(row.messages) for row in rows], len(rows)))
        return
    talks = [Talk(messages=row.messages, tools=row.tools) for row in rows]
    plain = [[{"role": one.role, "content": one.content} for one in row.messages] for row in rows]
    measured: dict[str, Callable[[], float]] = {
        "ours": lambda: _rate(lambda: list(chat.examples(talks)), len(rows)),
        "transformers": lambda: _rate(
            lambda: [chat.tokenizer.apply_chat_template(messages, tokenize=True) for messages in plain],
            len(rows),
        ),
    }
    if arguments.earlier is not None:
        measured["earlier"] = lambda: _earlier(arguments.earlier)
    rates: dict[str, list[float]] = {name: [] for name in measured}
    for _ in range(arguments.repeats):
        for name, measure in measured.items():
            rates[name].append(measure())
    ours = median(rates["ours"])
    print(f"{len(rows)} conversations, {sum(len(row.messages) for row in rows)} messages")
    for name, found in rates.items():
        print(f"{name}: {median(found):.0f} rows per second of CPU; ours is {ours / median(found):.2f} of it")


def _chat(model: Path | None, rows: Sequence[Conversation]) -> ChatTokenizer:
    if model is not None:
        return ChatTokenizer.load(model)
    texts = (message.content for row in rows for message in row.messages)
    return ChatTokenizer(train_tokenizer(texts, 8000, 1), template=CHATML)


def _rate(work: Callable[[], Any], number: int) -> float:
    before = _cpu_seconds()
    work()
    return number / (_cpu_seconds() - before)


def _cpu_seconds() -> float:
    """Of this process and of the one that renders templates."""
    process = templates._renderer._process
    of_templates = 0.0
    if process is not None and process.poll() is None:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        of_templates = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return time.process_time() + of_templates


def _earlier(checkout: Path) -> float:
    """The rate of the code in `checkout`, on the same arguments."""
    ran = subprocess.run(
        [sys.executable, checkout / "benchmarks/render_chat.py", *sys.argv[1:], "--is-earlier"],
        env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(ran.stdout.split()[-1])


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, nargs="+", default=[ROOT / "configs/demo/sft.jsonl"])
    parser.add_argument(
        "--model", type=Path, help="with tokenizer and template; else one is trained on the data"
    )
    parser.add_argument("--earlier", type=Path, help="a checkout of this project to compare with")
    parser.add_argument("--is-earlier", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
