"""The digest cache: digests of files, remembered on this host, so that an unchanged file is read once.

    path, size, times --known?--> digest        else: read the file and remember it

Owns: the file of what is known. Does not own: what digests are compared with (manifest, artifacts).
"""

import json
import os
import time
from pathlib import Path
from typing import Any, Self

from rollout.ground.whole import file_digest


class DigestCache:
    """blake3 of files, remembered on this host by path, size and times: an unchanged file is read once.

    Example:
        with DigestCache(path) as digest_of:
            digest_of(Path("model.safetensors"))
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = self._load()
        self._added = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._added:
            self._save()

    def __call__(self, path: Path) -> str:
        """Digest of the file's bytes."""
        key = os.path.realpath(path)
        status = os.stat(key)
        stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        known = self._known.get(key)
        if known is not None and known[:-1] == stamp:
            return str(known[-1])
        digest = file_digest(path)
        if (
            time.time_ns() - status.st_mtime_ns > 2 * 10**9
        ):  # a fresh file may change again within one clock tick
            self._known[key] = [*stamp, digest]
            self._added = True
        return digest

    def _load(self) -> dict[str, list[Any]]:
        try:
            known = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def _save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        unfinished.write_text(json.dumps(self._known))
        os.replace(unfinished, self._path)
