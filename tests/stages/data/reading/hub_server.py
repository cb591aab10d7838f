"""A hub of one dataset on this machine: the few routes that `datasets` asks when it loads `org/name`.

tests --HF_ENDPOINT--> HubServer: commit of a revision, list of files, files
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

API = "/api/datasets/org/name"


class HubServer:
    """Serves `files` as the dataset org/name, at one commit; `requests` holds what was asked, in order."""

    def __init__(
        self, files: dict[str, bytes], *, commit: str, revisions: tuple[str, ...] = ("main",)
    ) -> None:
        self.files, self.commit, self.revisions = files, commit, revisions
        self.requests: list[str] = []
        self.status = 200  # another one: the hub is out of order
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                status, headers, body = hub.answer(self.path.partition("?")[0])
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *args: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) for a path."""
        if self.status != 200:
            return self.status, {}, b""
        if path == API or path.startswith(f"{API}/revision/"):
            return self._dataset_info(path.removeprefix(API).removeprefix("/revision/"))
        if path.startswith(f"{API}/tree/"):
            folder = path.removeprefix(f"{API}/tree/").partition("/")[2]
            return self._json([] if folder else [self._entry(name) for name in self.files])
        if path.startswith("/datasets/org/name/resolve/"):
            return self._file(path.split("/resolve/")[1].partition("/")[2])
        return 404, {"X-Error-Code": "RepoNotFound"}, b""

    def _dataset_info(self, revision: str) -> tuple[int, dict[str, str], bytes]:
        if revision and revision not in (*self.revisions, self.commit):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        siblings = [{"rfilename": name} for name in self.files]
        return self._json(
            {"_id": "1", "id": "org/name", "sha": self.commit, "private": False, "gated": False,
             "disabled": False, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings}
        )  # fmt: skip

    def _entry(self, name: str) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(self.files[name]), "oid": "0" * 40}

    def _file(self, name: str) -> tuple[int, dict[str, str], bytes]:
        commit = {"X-Repo-Commit": self.commit}
        if name not in self.files:
            return 404, {**commit, "X-Error-Code": "EntryNotFound"}, b""
        return 200, {**commit, "ETag": f'"{self.commit}-{name}"'}, self.files[name]

    def _json(self, value: Any) -> tuple[int, dict[str, str], bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()
