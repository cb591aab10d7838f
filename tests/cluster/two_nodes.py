"""A real Ray cluster of two nodes on one machine: two raylets, each with an address of its own, and a token.

Where the tests may make them, the nodes are two network namespaces joined by a veth pair, so that whatever
binds to or advertises a loopback address is found out; elsewhere they are two loopback addresses. A node may
also see another file system (`hidden`): what is there on the first node is not on the second.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")
START_TIMEOUT_S = 120.0
CPUS_PER_NODE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoNodes:
    """A running cluster; commands run on its first node."""

    port: int
    token: str
    hosts: tuple[str, str]
    namespaces: tuple[str, str] | None  # None: loopback addresses
    hidden: Path | None  # a directory whose content the second node does not see; None: cannot be made here
    session: Path  # where the nodes keep what they write

    @property
    def address(self) -> str:
        return f"{self.hosts[0]}:{self.port}"

    def rlhf(
        self, directory: Path, *arguments: str, token: str | None = None, timeout_s: float = 600
    ) -> subprocess.CompletedProcess[str]:
        """The cli on the first node, with the cluster's token unless another is given ("" for none)."""
        token = self.token if token is None else token
        return subprocess.run(
            [*_inside(self.namespaces, 0), sys.executable, "-m", "pipeline.cli", *arguments],
            cwd=directory,
            env=_environment(token),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )


@contextlib.contextmanager
def two_nodes(*, namespaces: bool) -> Iterator[TwoNodes]:
    """`namespaces`: in network namespaces if the machine lets us make them."""
    with contextlib.ExitStack() as stack:
        names = stack.enter_context(_joined_namespaces()) if namespaces else None
        session = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rlhf-nodes-", dir="/tmp")))
        (session / "hidden").mkdir()
        cluster = TwoNodes(
            port=_free_port(),
            token=secrets.token_hex(32),
            hosts=("10.77.0.1", "10.77.0.2") if names else ("127.0.0.2", "127.0.0.3"),
            namespaces=names,
            hidden=session / "hidden" if _may_unshare() else None,
            session=session,
        )
        stack.callback(_end_all_with, str(session))
        head = ["--head", f"--port={cluster.port}", f"--temp-dir={session}/ray", "--include-dashboard=false"]
        _start(cluster, 0, [*head, "--ray-client-server-port", str(_free_port())])
        _start(cluster, 1, [f"--address={cluster.address}"])
        yield cluster


@contextlib.contextmanager
def another_raylet(cluster: TwoNodes) -> Iterator[None]:
    """A third node, at the address of the first."""
    process = _start(cluster, 0, [f"--address={cluster.address}"])
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def _start(cluster: TwoNodes, index: int, options: list[str]) -> "subprocess.Popen[bytes]":
    command = [
        *_inside(cluster.namespaces, index),
        *(_without(cluster.hidden) if index == 1 else []),
        *(RAY, "start", "--block", "--disable-usage-stats"),
        *(f"--node-ip-address={cluster.hosts[index]}", f"--num-cpus={CPUS_PER_NODE}"),
        *options,
    ]
    path = cluster.session / f"node-{index}-{len(list(cluster.session.glob('*.log')))}.log"
    with path.open("w") as log:
        process = subprocess.Popen(
            command, env=_environment(cluster.token), stdout=log, stderr=log, start_new_session=True
        )
    deadline = time.monotonic() + START_TIMEOUT_S
    while "runtime started" not in path.read_text():
        assert process.poll() is None and time.monotonic() < deadline, path.read_text()
        time.sleep(0.2)
    return process


def _environment(token: str) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {}
    return ours | auth | {"OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(REPOSITORY)}


def _inside(namespaces: tuple[str, str] | None, index: int) -> list[str]:
    return [] if namespaces is None else ["ip", "netns", "exec", namespaces[index]]


def _without(hidden: Path | None) -> list[str]:
    """In a mount namespace with an empty file system over `hidden`."""
    if hidden is None:
        return []
    return ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {hidden} && exec "$@"', "sh"]


@contextlib.contextmanager
def _joined_namespaces() -> Iterator[tuple[str, str] | None]:
    """Two network namespaces with 10.77.0.1 and 10.77.0.2; None where that is not permitted."""
    mark = secrets.token_hex(3)
    names, links = (f"rlhf-{mark}-0", f"rlhf-{mark}-1"), (f"rl{mark}0", f"rl{mark}1")
    setup = [
        *(f"netns add {name}" for name in names),
        f"link add {links[0]} type veth peer name {links[1]}",
        *(f"link set {link} netns {name}" for link, name in zip(links, names, strict=True)),
        *(f"-n {names[i]} addr add 10.77.0.{i + 1}/24 dev {links[i]}" for i in (0, 1)),
        *(f"-n {names[i]} link set {device} up" for i in (0, 1) for device in ("lo", links[i])),
    ]
    try:
        done = shutil.which("ip") is not None and all(_ip(command) for command in setup)
        yield names if done else None
    finally:
        if shutil.which("ip") is not None:
            for name in names:
                _ip(f"netns del {name}")


def _ip(command: str) -> bool:
    return subprocess.run(["ip", *command.split()], capture_output=True, check=False).returncode == 0


def _may_unshare() -> bool:
    if shutil.which("unshare") is None:
        return False
    with tempfile.TemporaryDirectory() as directory:
        command = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", directory]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _end_all_with(mark: str) -> None:
    """Every process of the cluster, by the session directory in its command line; Ray's own `stop` would end
    other clusters of this machine too.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(mark in argument for argument in process.cmdline()):
                found += [process, *process.children(recursive=True)]
    for process in found:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(found, timeout=10)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
