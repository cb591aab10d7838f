"""Processes that begin where others still import: forked from a server that has loaded the heavy modules.

    multiprocessing's spawn --order: code, environment, files--> server --fork--> a child of the caller
                                                                                    |--fork--> its spare

A spawned Python process imports torch and vLLM for ten seconds before it does anything. The server does
that once, and every later process is a fork of it. Such a process has the environment, the files and the
parent of a spawned one, and runs the same code. It forks a spare at once, which becomes the first process
that it spawns itself: with vLLM, the scheduler's worker. Whatever forks here has one thread, because a lock
that another thread holds would stay locked in the child.

    raylet --starts--> ray_worker.py --the same order--> server of Ray's workers --fork--> a worker
"""

import contextlib
import fcntl
import importlib
import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from ctypes import CDLL
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import util
from pathlib import Path
from typing import Any

MARK = "--multiprocessing-fork"
PR_SET_CHILD_SUBREAPER = 36
STANDARD_FILES = (0, 1, 2)
PLACE = "RLHF_TESTS_FORK_SERVER"
"""The variable that tells Ray's workers-to-be the socket of their server."""
SPAWN = util.spawnv_passfds


@dataclass(slots=True)
class ForkServer:
    """Forks what `multiprocessing` would spawn. It starts at the first of these processes, because by then
    vLLM has named in the environment the libraries that they load first. It ends with this process.
    """

    modules: Sequence[str]
    connection: socket.socket | None = field(default=None, init=False)
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @contextlib.contextmanager
    def forking(self) -> Iterator[None]:
        """Inside, spawned processes of this one are forked."""
        util.spawnv_passfds = self._spawn
        try:
            yield
        finally:
            util.spawnv_passfds = SPAWN

    def _spawn(self, path: bytes, arguments: Sequence[str], files: Sequence[int]) -> int:
        if not _is_a_process(arguments):
            return SPAWN(path, arguments, files)
        if self.connection is None:
            self._start()
        assert self.connection is not None
        with _adopting_orphans():
            _send(self.connection, arguments[-2], files)
            pid = int.from_bytes(self.connection.recv(4, socket.MSG_WAITALL))
            adopted = self.connection.recv(1)
        assert adopted, "the server of forks is gone"
        return pid

    def _start(self) -> None:
        self.connection, theirs = socket.socketpair()
        self.process = _server(theirs, self.modules)
        theirs.close()


@dataclass(slots=True)
class RayWorkers:
    """Forks the workers of this process's own Ray. The server ends with this process."""

    modules: Sequence[str]
    life: socket.socket | None = field(default=None, init=False)
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @contextlib.contextmanager
    def forking(self, place: Path) -> Iterator[None]:
        """A Ray that starts inside forks its workers. `place`: a short path, for the server's socket."""
        from ray._private import parameter

        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(place))
            listener.listen()
            self.life, theirs = socket.socketpair()
            self.process = _server(theirs, self.modules, listener)
            theirs.close()
        assert self.life.recv(1), "the server of forks is gone"  # Ray waits for a worker, but not for imports
        os.environ[PLACE] = str(place)
        worker = str(Path(__file__).with_name("ray_worker.py"))
        parameters = parameter.RayParams
        parameter.RayParams = partial(parameters, worker_path=worker)
        try:
            yield
        finally:
            parameter.RayParams = parameters


def become_a_fork(code: str) -> None:
    """Have the server of Ray's workers run `code`, with what this process inherited, until that ends."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[PLACE])
        _send(connection, code, ())
        connection.recv(1)


RAY_WORKERS = RayWorkers(("torch.distributed.checkpoint", "stages.training.distributed", "rollout.hf_engine"))
"""Not ray itself: it reads its environment once, when it is loaded."""
RANKS = ForkServer(("torch.distributed.checkpoint", "stages.training.distributed"))
"""Of the processes in which tests train."""
ENGINES = ForkServer(
    (
        "vllm.v1.engine.core",
        "vllm.v1.executor.multiproc_executor",
        "vllm.v1.worker.cpu_worker",
        "vllm.v1.worker.cpu_model_runner",
        "vllm.model_executor.models.llama",
        "rollout.vllm_receiver",
    )
)
"""Of the two processes of a vLLM engine."""


def _server(
    life: socket.socket, modules: Sequence[str], listener: socket.socket | None = None
) -> "subprocess.Popen[bytes]":
    passed = [life.fileno(), -1 if listener is None else listener.fileno()]
    alone = {"OPENBLAS_NUM_THREADS": "1"}  # numpy's library starts its threads when it is loaded
    return subprocess.Popen(
        [sys.executable, __file__, *map(str, passed), *modules],
        env=os.environ | alone,
        pass_fds=[number for number in passed if number >= 0],
    )


def _is_a_process(arguments: Sequence[str]) -> bool:
    """Not so: the tracker of shared memory, which multiprocessing starts in the same way."""
    return arguments[-1] == MARK


@contextlib.contextmanager
def _adopting_orphans() -> Iterator[None]:
    """Inside, a process whose parent ends becomes a child of this one: so a grandchild becomes a child."""
    prctl = CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _send(connection: socket.socket, code: str, files: Sequence[int]) -> None:
    """An order: run the code of `python -c`, with this process's environment, files and directory."""
    passed = sorted({*STANDARD_FILES, *map(int, files)})
    order = {"code": code, "files": passed, "environment": dict(os.environ), "cwd": os.getcwd()}
    message = json.dumps(order).encode()
    socket.send_fds(connection, [len(message).to_bytes(4)], passed)
    connection.sendall(message)


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """An order and its files, by numbers of this process; None when nobody can order any more."""
    size, files, _, _ = socket.recv_fds(connection, 4, 64)
    if not size:
        return None
    return json.loads(connection.recv(int.from_bytes(size), socket.MSG_WAITALL)), files


def _serve(connection: socket.socket) -> dict[str, Any] | None:
    """Fork for every order. Returns in each fork, with its order; and in the server at its end, with None."""
    while (received := _receive(connection)) is not None:
        order, files = received
        ended, until = os.pipe()
        if between := os.fork():
            for file in (ended, until, *files):
                os.close(file)
            os.waitpid(between, 0)
            connection.sendall(b"!")
            continue
        if child := os.fork():
            connection.sendall(child.to_bytes(4))
            os._exit(0)
        os.close(until)
        os.read(ended, 1)  # until the process between has ended: now the caller is the parent
        os.close(ended)
        connection.close()
        _settle(order, files)
        return order
    return None


def _serve_all(life: socket.socket, listener: socket.socket) -> dict[str, Any] | None:
    """The same for whoever connects. The fork holds its connection until it ends: so the other side knows."""
    life.sendall(b"!")  # ready
    while life not in select.select([life, listener], [], [])[0]:
        connection, _ = listener.accept()
        received = _receive(connection)
        assert received is not None
        order, files = received
        if os.fork() == 0:
            life.close()
            listener.close()
            order["connection"] = connection
            _settle(order, files)
            return order
        connection.close()
        for file in files:
            os.close(file)
        with contextlib.suppress(ChildProcessError):  # there is none
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    return None


def _with_spare(order: dict[str, Any]) -> dict[str, Any] | None:
    """Fork a spare. Returns the order; in the spare, when this process spawns one, that one's."""
    ours, theirs = socket.socketpair()
    if spare := os.fork():
        theirs.close()

        def spawn(path: bytes, arguments: Sequence[str], files: Sequence[int]) -> int:
            if not _is_a_process(arguments):
                return SPAWN(path, arguments, files)
            util.spawnv_passfds = SPAWN
            _send(ours, arguments[-2], files)
            ours.close()
            return spare

        util.spawnv_passfds = spawn
        return order
    ours.close()
    received = _receive(theirs)
    theirs.close()
    if received is None:
        return None
    _settle(*received)
    return received[0]


def _settle(order: dict[str, Any], files: Sequence[int]) -> None:
    """Take over what the order says that a process inherits."""
    above = max(order["files"]) + 1
    held = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, above) for file in files]
    for file in files:
        os.close(file)
    for file, number in zip(held, order["files"], strict=True):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["cwd"])
    if "torch" in sys.modules and "OMP_NUM_THREADS" in os.environ:  # torch read it when it was loaded
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def _main(life: socket.socket, listener: socket.socket | None, modules: Sequence[str]) -> None:
    for module in modules:
        importlib.import_module(module)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads: a fork would not have them"
    if listener is not None:
        order = _serve_all(life, listener)
    elif (order := _serve(life)) is not None:
        order = _with_spare(order)
    if order is not None:
        sys.argv = ["-c", MARK]
        exec(order["code"], {"__name__": "__main__"})


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # not this folder, whose `rollout` and `stages` hold tests
    numbers = [int(number) for number in sys.argv[1:3]]
    life, listener = (socket.socket(fileno=number) if number >= 0 else None for number in numbers)
    assert life is not None
    _main(life, listener, sys.argv[3:])
