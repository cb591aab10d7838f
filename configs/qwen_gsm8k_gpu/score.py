"""The judge of grade-school arithmetic: is the last number of the response the solution's?

row["answer"] "... #### 72" -> 72;  response -> its last number -> 1.0 when equal, else 0.0
"""

import re
from collections.abc import Mapping
from typing import Any

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def score(prompt: str, response: str, row: Mapping[str, Any]) -> float:
    """Judge one response; `row` is the prompt's data row, whose `answer` ends in "#### <number>".

    Example: score("2 and 3?", "2 + 3 = 5, so 5.", {"answer": "2+3=5\\n#### 5"}) -> 1.0
    """
    given, right = NUMBER.findall(response), NUMBER.findall(row["answer"].rpartition("####")[2])
    return float(bool(given) and bool(right) and _value(given[-1]) == _value(right[-1]))


def _value(number: str) -> float:
    return float(number.replace(",", ""))
