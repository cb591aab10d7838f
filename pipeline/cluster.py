"""Whether a Ray cluster can do a run: the token, and what every node has to have.

    require_token, require_answer --(ray_session connects)--> report(file) on every node --> problems(...)

Owns: what is asked of a node and the line for each wrong answer. Does not own: the connection and the remote
calls (ray_session), bundles (placement). A node needs the same code, the same packages and the same
`outputs/`.
"""

import contextlib
import os
import secrets
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import blake3

from pipeline.experiment import host_and_port
from pipeline.provenance import package_versions
from rollout.foreign_environment import take_out
from rollout.ground.disk import disk_problems
from rollout.ground.errors import EnvironmentProblem

TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
ANSWER_TIMEOUT_S = 10.0
"""For a TCP connection to the cluster; Ray's own attempt takes minutes to give up."""
PACKAGES = ("pipeline", "stages", "rollout")
CODE_CHARS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """What one node says of itself."""

    text: str | None  # of the file it was asked for; None: it does not see it
    code: str  # version and digest of the project's code there
    packages: Mapping[str, str]
    foreign_settings: tuple[str, ...] = ()  # variables of its environment that the config beats


Answer = tuple[str, NodeReport | str]
"""A node's address, which several may have, and its report, or why there is none."""


def require_token(address: str) -> None:
    """A cluster is joined with its token or not at all: without one, whoever reaches its ports runs code on
    it. Raises EnvironmentProblem.
    """
    if not any(os.environ.get(name) for name in TOKEN_VARIABLES):
        raise EnvironmentProblem(
            f"resources.address {address}: a cluster is joined with its token; set "
            f"{' or '.join(TOKEN_VARIABLES)} to the one it was started with under RAY_AUTH_MODE=token"
        )


def require_answer(address: str) -> None:
    """Something listens at `host:port`. Raises EnvironmentProblem."""
    listener = host_and_port(address)
    if listener is None:  # Ray looks for it, and fails at once
        return
    try:
        socket.create_connection(listener, timeout=ANSWER_TIMEOUT_S).close()
    except OSError as error:
        raise EnvironmentProblem(
            f"resources.address {address}: no answer ({error.strerror or error}); is the cluster up?"
        ) from error


@contextlib.contextmanager
def nonce_in(directory: Path) -> Iterator[tuple[Path, str]]:
    """A file with a random text, while inside: what a node has to read back. Raises EnvironmentProblem."""
    nonce = secrets.token_hex(16)
    file = Path(os.path.abspath(directory)) / f".nonce-{nonce[:8]}"
    with disk_problems(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(nonce)
    try:
        yield file, nonce
    finally:
        file.unlink(missing_ok=True)


def report(file: Path) -> NodeReport:
    """Runs on every node."""
    text = None
    with contextlib.suppress(OSError):
        text = file.read_text()
    foreign = tuple(take_out(dict(os.environ)))
    return NodeReport(text=text, code=code_version(), packages=package_versions(), foreign_settings=foreign)


def problems(answers: Iterable[Answer], file: Path, nonce: str) -> Iterator[tuple[str, str]]:
    """(address of a node, what is wrong there and how to mend it)."""
    here = report(file)
    for node, answer in answers:
        if isinstance(answer, str):
            yield node, f"does not answer ({answer}); is this project installed there, and the node alive?"
            continue
        if answer.text != nonce:
            yield (
                node,
                f"does not see {file.parent}; put `outputs` on a filesystem that all nodes share",
            )
        if answer.code != here.code:
            yield node, f"has {answer.code}, not {here.code} as here; install the same version on every node"
        for name, version in here.packages.items():
            if name not in answer.packages:
                yield node, f"has no {name}, which is {version} here; install the same on every node"
            elif answer.packages[name] != version:
                there = answer.packages[name]
                yield node, f"has {name} {there}, not {version} as here; install the same on every node"


@cache
def code_version() -> str:
    """Example: "rlhf-pipeline 0.1.0 (code 5d41402abc4b)". The digest covers every source file."""
    digest, root = blake3.blake3(), Path(__file__).parents[1]
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    try:
        version = metadata.version("rlhf-pipeline")
    except metadata.PackageNotFoundError:
        version = "not installed"
    return f"rlhf-pipeline {version} (code {digest.hexdigest()[:CODE_CHARS]})"
