"""The bytes of a weight update, from host to host over gloo: a pair per engine, no default process group.

    sender: serving(location, data) <--joins-- receive(location) of each engine process
               `--gloo pair (sender 0, receiver 1), chunk by chunk--> bytes on the engine's host --> ack

Owns: the rendezvous, the pairs and their deadlines. Does not own: what the bytes mean and whether they are
right (weight_file: the manifest came by another way, with a digest of every tensor). The sender need not know
how many receivers there are: who has the location may take the bytes, and the location holds a secret.
"""

import contextlib
import datetime
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

from rollout.errors import WeightSyncError

SCHEME = "gloo"
CHUNK_BYTES = 256 * 2**20
SENDER, RECEIVER = 0, 1
POLL_S = 0.005
"""Between looks for receivers that have come."""


class GlooSender:
    """The sending end, for any number of updates and receivers."""

    def __init__(self, host: str, *, timeout_s: float) -> None:
        """`host`: this machine's address as the engines see it. `timeout_s`: deadline of one transfer."""
        self._host = host
        self._timeout_s = timeout_s
        self._store: TCPStore | None = _store(host, 0, is_master=True, timeout_s=timeout_s)

    def new_location(self) -> str:
        """Where the next update can be had: `gloo://host:port/secret`."""
        assert self._store is not None, "closed"
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{SCHEME}://{host}:{self._store.port}/{secrets.token_hex(16)}"

    def close(self) -> None:
        """Listen no more. Idempotent."""
        if self._store is not None:
            _idle.pop((self._host, self._store.port), None)
            self._store = None  # the last reference ends the server

    @contextlib.contextmanager
    def serving(self, location: str, data: torch.Tensor) -> Iterator[None]:
        """While inside, whoever comes to `location` gets `data` (bytes, on the CPU). On threads of its own: a
        receiver that is gone is its engine's failure to report, and holds up nobody.
        """
        assert self._store is not None, "closed"
        done = threading.Event()
        arguments = (self._store, location, data, done)
        thread = threading.Thread(target=self._welcome, args=arguments, name="gloo-sender", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _welcome(self, store: TCPStore, location: str, data: torch.Tensor, done: threading.Event) -> None:
        served, key = 0, _joined_key(location)
        while not done.wait(POLL_S):
            for peer in range(served, store.add(key, 0)):
                served += 1
                threading.Thread(target=self._send, args=(location, peer, data), daemon=True).start()

    def _send(self, location: str, peer: int, data: torch.Tensor) -> None:
        deadline = time.monotonic() + self._timeout_s
        # gone, or too slow: the engine says so, for its side of the pair fails too
        with contextlib.suppress(RuntimeError, OSError):
            with _connected(location, deadline) as store:
                group = _pair(store, location, peer, SENDER, self._host, deadline)
            for chunk in data.split(CHUNK_BYTES):
                group.send([chunk], RECEIVER, 0).wait(_left(deadline))
            group.recv([torch.empty(1, dtype=torch.uint8)], RECEIVER, 0).wait(_left(deadline))


def receive(location: str, num_bytes: int, *, timeout_s: float) -> torch.Tensor:
    """The bytes that the sender serves at `location`. Raises WeightSyncError within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    data = torch.empty(num_bytes, dtype=torch.uint8)
    address = urlsplit(location)
    assert address.scheme == SCHEME and address.hostname and address.port, location
    try:
        own_host = _address_facing(address.hostname, address.port)
        # the sender is there already: who does not meet it in half the time never will
        met_by = deadline - timeout_s / 2
        with _connected(location, met_by) as store:
            peer = store.add(_joined_key(location), 1) - 1
            group = _pair(store, location, peer, RECEIVER, own_host, met_by)
        for chunk in data.split(CHUNK_BYTES):
            group.recv([chunk], SENDER, 0).wait(_left(deadline))
        group.send([torch.zeros(1, dtype=torch.uint8)], SENDER, 0).wait(_left(deadline))
    except (RuntimeError, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise WeightSyncError(
            f"the weights did not arrive from {address.hostname}:{address.port} ({reason})"
        ) from error
    return data


def _pair(store: TCPStore, location: str, peer: int, rank: int, own_host: str, deadline: float) -> Any:
    """A process group of two that nothing else knows of, bound to the interface of `own_host`."""
    gloo: Any = ProcessGroupGloo  # torch types neither its options nor its calls
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=own_host)]
    options._timeout = _left(deadline)
    return gloo(PrefixStore(f"{urlsplit(location).path}/{peer}", store), rank, 2, options)


_idle: dict[tuple[str, int], list[TCPStore]] = {}
"""Connections to rendezvous, kept from update to update: each new one costs two reverse look-ups of names."""


@contextlib.contextmanager
def _connected(location: str, deadline: float) -> Iterator[TCPStore]:
    """A connection to the rendezvous of `location` that nobody else uses meanwhile."""
    address = urlsplit(location)
    assert address.hostname is not None and address.port is not None
    idle = _idle.setdefault((address.hostname, address.port), [])
    timeout = _left(deadline)
    try:
        store = idle.pop()
    except IndexError:
        seconds = timeout.total_seconds()
        # told at once when nobody listens; a TCPStore would try until its deadline
        socket.create_connection((address.hostname, address.port), timeout=seconds).close()
        store = _store(address.hostname, address.port, is_master=False, timeout_s=seconds)
    store.set_timeout(timeout)
    yield store
    idle.append(store)  # after an error it is left to be collected


def _address_facing(host: str, port: int) -> str:
    """This machine's address on the way to `host`. Nothing is sent."""
    family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def _store(host: str, port: int, *, is_master: bool, timeout_s: float) -> TCPStore:
    """A client, or a server that listens on `host` alone (TCPStore's own takes every interface)."""
    timeout = datetime.timedelta(seconds=timeout_s)
    if not is_master:
        return TCPStore(host, port, None, False, timeout=timeout, wait_for_workers=False)
    listener = socket.create_server((host, port), family=socket.getaddrinfo(host, port)[0][0])
    port = listener.getsockname()[1]
    return TCPStore(
        host,
        port,
        None,
        True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def _joined_key(location: str) -> str:
    return f"{urlsplit(location).path}/joined"


def _left(deadline: float) -> datetime.timedelta:
    """Never zero, which means for ever."""
    return datetime.timedelta(seconds=max(0.001, deadline - time.monotonic()))
