"""Whether what was found is right, and the table of it. Light import."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Finding = Mapping[str, Any]

MUST_HOLD: Finding = {
    "gate_holds": True,
    "policy_is_reference": True,
    "weights_restored": True,
    "same_next_loss": True,
    "first_kl": 0.0,
    "first_ratio": 0.0,
    "exit_code": 0,
}
"""Figures with one right value, wherever they appear."""
MAX_RELATIVE_ERROR = {"bfloat16": 1e-2, "float32": 1e-5}
"""Of the norm of attention's outputs against float64: some roundings of 2^-9, or of 2^-24."""
WAYS_THAT_MUST_RUN = ("mask", "ours")
"""Of attending: the others may be refused by a card or a torch that does not have them."""
VARIANT_THAT_MUST_RUN = "as it is"


def is_wrong(finding: Finding) -> bool:
    """Whether a check ended in an error or before its time, what has to run was refused, or a figure is not
    what it has to be.
    """
    refused = [way for way in WAYS_THAT_MUST_RUN if isinstance(finding.get(way), str)]
    if "failed" in finding and finding["variant"] == VARIANT_THAT_MUST_RUN:
        refused.append(VARIANT_THAT_MUST_RUN)
    is_other = any(finding[name] != right for name, right in MUST_HOLD.items() if name in finding)
    return "error" in finding or bool(refused) or is_other or not _is_exact(finding)


def _is_exact(finding: Finding) -> bool:
    """Whether every way of attending is as near to float64 as its dtype allows; None: not compared."""
    errors = [way["relative_error"] for way in finding.values() if isinstance(way, Mapping)]
    limit = MAX_RELATIVE_ERROR[finding["dtype"]] if errors else math.inf
    return all(error is None or error <= limit for error in errors)


def table(findings: Sequence[Finding]) -> str:
    """One line per finding: its mark, its check, its figures."""
    lines = []
    for finding in findings:
        figures = "  ".join(f"{name}={_short(value)}" for name, value in finding.items() if name != "check")
        lines.append(f"{'WRONG' if is_wrong(finding) else 'ok':5} {finding['check']:9} {figures}")
    return "\n".join(lines)


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{name} {_short(part)}" for name, part in value.items()) + ")"
    return str(value)
