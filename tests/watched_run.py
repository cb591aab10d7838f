"""One real run of the whole tiny chain, watched from outside: its sockets, its command lines, its secrets.

    rlhf run tiny.yaml, secrets planted in its environment --> WatchedRun: what it left, and what was seen

It takes minutes, so another process watches it beside the first tests: `python watched_run.py DIRECTORY`.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
from cli_runs import CONFIG, RLHF

SECRET_VARIABLES = (
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_KEY"),
    *("GOOGLE_API_KEY", "GITHUB_TOKEN", "DATABASE_URL", "PGPASSWORD", "REDIS_URL", "SLACK_BOT_TOKEN"),
    *(
        "SSH_PASSPHRASE",
        "MLFLOW_TRACKING_PASSWORD",
        "KUBE_TOKEN",
        "VLLM_API_KEY",
        "RAY_MY_SECRET",
        "MY_SECRET",
    ),
)
WITHOUT_TOKEN = """
import sys
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
try:
    print("nodes:", len(GcsClient(address=sys.argv[1]).get_all_node_info(timeout=30)))
except AuthenticationError:
    print("refused")
"""
VLLM_CACHE = os.environ.get("VLLM_CACHE_ROOT", str(Path.home() / ".cache/vllm"))
"""What vLLM keeps of each architecture: with an empty one it inspects the model in one more process."""
POLL_S = 1.0  # each look costs a tenth of a second of the two cores that the run computes on


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """A listening socket of the run."""

    pid: int
    owner: str  # name of its process: "raylet", "ray::ppo", "VLLM::Worker", ...
    address: str
    port: int
    auth_mode: str | None  # RAY_AUTH_MODE as the process was started with


@dataclass(slots=True, kw_only=True)
class WatchedRun:
    """A finished run, and what was seen of it."""

    directory: Path  # its working directory: tiny.yaml, outputs, out, err, home
    secrets: dict[str, str]
    tokens: set[str] = field(default_factory=set)  # RAY_AUTH_TOKEN of its processes
    environments: dict[psutil.Process, dict[str, str]] = field(default_factory=dict)
    listeners: set[Listener] = field(default_factory=set)
    command_lines: set[str] = field(default_factory=set)
    to_cluster: dict[str, str] = field(default_factory=dict)  # token given -> what Ray answered
    to_agent: int | None = None  # HTTP status of a request to Ray's agent without a token
    code: int | None = None


def watch(run: WatchedRun) -> None:
    """Run the tiny chain and look at it until it ends."""
    directory = run.directory
    (directory / "tiny.yaml").write_text(CONFIG)
    (directory / "home").mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "RAY_AUTH_TOKEN"}
    with (directory / "out").open("w") as out, (directory / "err").open("w") as err:
        driver = subprocess.Popen(
            [RLHF, "run", "tiny.yaml"],
            cwd=directory,
            env=environment | run.secrets | {"HOME": str(directory / "home"), "VLLM_CACHE_ROOT": VLLM_CACHE},
            stdout=out,
            stderr=err,
        )
        try:
            while driver.poll() is None:
                _look(driver.pid, run)
                time.sleep(POLL_S)
        finally:
            driver.terminate()
            run.code = driver.wait()


def started_in(directory: Path) -> "subprocess.Popen[bytes]":
    """A process that watches a run in this new directory."""
    directory.mkdir()
    return subprocess.Popen([sys.executable, __file__, str(directory)])


def finished_in(directory: Path) -> WatchedRun:
    """What that process has seen, once it has ended."""
    seen = _seen_in(directory)
    while not seen.exists():
        time.sleep(POLL_S)
    told = json.loads(seen.read_text())
    sets = {name: set(told[name]) for name in ("tokens", "command_lines")}
    listeners = {Listener(**item) for item in told["listeners"]}
    return WatchedRun(directory=directory, **(told | sets | {"listeners": listeners}))


def _main(directory: Path) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the tests end early: so does the run
    secrets = {
        name: f"planted{index:02}-{os.urandom(8).hex()}" for index, name in enumerate(SECRET_VARIABLES)
    }
    run = WatchedRun(directory=directory, secrets=secrets)
    try:
        watch(run)
    finally:  # somebody waits
        _tell(run)


def _tell(run: WatchedRun) -> None:
    told = {
        "secrets": run.secrets,
        "tokens": list(run.tokens),
        "listeners": [asdict(listener) for listener in run.listeners],
        "command_lines": list(run.command_lines),
        "to_cluster": run.to_cluster,
        "to_agent": run.to_agent,
        "code": run.code,
    }
    unfinished = run.directory.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(told))
    unfinished.rename(_seen_in(run.directory))


def _seen_in(directory: Path) -> Path:
    """Beside the directory, whose files must not hold what this one does."""
    return directory.with_suffix(".json")


def _look(driver: int, run: WatchedRun) -> None:
    try:
        family = [psutil.Process(driver), *psutil.Process(driver).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in family:
        if process not in run.environments:  # later it may hide them: Ray's and vLLM's rename themselves
            with contextlib.suppress(psutil.Error):  # it ended meanwhile
                run.environments[process] = process.environ()
                run.command_lines.add(" ".join(process.cmdline()))
                if token := run.environments[process].get("RAY_AUTH_TOKEN"):
                    run.tokens.add(token)
    members = {process.pid: process for process in family if process in run.environments}
    for connection in psutil.net_connections(kind="inet"):
        if connection.status == psutil.CONN_LISTEN and connection.pid in members:
            with contextlib.suppress(psutil.Error):
                run.listeners.add(
                    Listener(
                        pid=connection.pid,
                        owner=members[connection.pid].name(),
                        address=connection.laddr.ip,
                        port=connection.laddr.port,
                        auth_mode=run.environments[members[connection.pid]].get("RAY_AUTH_MODE"),
                    )
                )
    if not run.to_cluster and any(listener.owner == "ray::sft" for listener in run.listeners):
        _knock(run)


def _knock(run: WatchedRun) -> None:
    """Ask Ray's servers something, with a token and without."""
    ports = {listener.owner: listener.port for listener in run.listeners}
    agent = next(item for item in run.listeners if item.owner.startswith("ray::RuntimeEnvAgent"))
    try:
        with urllib.request.urlopen(
            f"http://{agent.address}:{agent.port}/get_or_create_runtime_env"
        ) as answer:
            run.to_agent = answer.status
    except urllib.error.HTTPError as error:
        run.to_agent = error.code
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    (token,) = run.tokens
    for given in ("", "f" * 64, token):
        login = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": given} if given else {}
        answer = subprocess.run(
            [sys.executable, "-c", WITHOUT_TOKEN, f"{agent.address}:{ports['gcs_server']}"],
            env=clean | login | {"HOME": str(run.directory / "home")},
            capture_output=True,
            text=True,
            check=False,
        )
        run.to_cluster["the run's" if given == token else given] = answer.stdout.strip() or answer.stderr


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
