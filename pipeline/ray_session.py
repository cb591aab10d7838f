"""The connection to Ray: a local cluster of the run's own, or somebody else's that it joins.

    ray_session --token, ray.init--> connected: check() while a run goes on --> ray.shutdown
    ask_every_node --the same, joined--> answers_of_nodes: `cluster.report` of every node

Owns: how Ray starts, proves who it is, and where its messages go. Does not own: tasks (executor), what is
asked of a node (cluster), the end of Ray's processes (janitor).
`import ray` happens inside functions: the cli stays light.
"""

import contextlib
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline import cluster
from pipeline.experiment import ExperimentConfig
from pipeline.signals import deaf
from rollout.ground.errors import GO_ON, EnvironmentProblem, ProcessDied
from rollout.run_mark import RUN_ID_VARIABLE

NODE_TIMEOUT_S = 60.0
"""For every node of a cluster to say what it has; a first task there starts a process."""
ROOT = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def ray_session(config: ExperimentConfig, directory: Path, log_dir: Path) -> Iterator[Callable[[], None]]:
    """A Ray connection for one run. Yields a check: EnvironmentProblem when the local cluster is dying.

    A local cluster has a token of its own, and its session in the run's temporary `directory`.
    """
    if config.resources.address is not None:
        with _joined_cluster(config.resources.address, log_dir):
            yield lambda: None
        return
    _authenticate_local_cluster()
    with _ray_connected(log_dir, address="local", include_dashboard=False, _temp_dir=str(directory)):
        yield lambda: _check_local_cluster(log_dir)


def ask_every_node(file: Path, address: str) -> list[cluster.Answer]:
    """Joins the cluster at `address`; what each node of it answers when asked for a report on `file`.

    Raises EnvironmentProblem.
    """
    log_dir = Path(tempfile.mkdtemp(prefix="rlhf-doctor-"))
    try:
        with _joined_cluster(address, log_dir):
            return answers_of_nodes(file)
    finally:
        shutil.rmtree(log_dir, ignore_errors=True)


def answers_of_nodes(file: Path) -> list[cluster.Answer]:
    """What each node of the cluster that this process is connected to answers; an error by its name."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(cluster.report)
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    calls = {
        node: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(file)
        for node in nodes
    }
    ray.wait(list(calls.values()), num_returns=len(calls), timeout=NODE_TIMEOUT_S)
    answers: list[cluster.Answer] = []
    for node, call in calls.items():
        try:
            answers.append((nodes[node], ray.get(call, timeout=0)))
        except ray.exceptions.RayError as error:
            answers.append((nodes[node], type(error).__name__))
    return answers


@contextlib.contextmanager
def _joined_cluster(address: str, log_dir: Path) -> Iterator[None]:
    """Connected to somebody else's cluster, with its token. The environment of its workers is set per job: on
    this machine the run's mark tells the janitor which of them, and of their children, are the run's.
    """
    cluster.require_token(address)
    cluster.require_answer(address)
    _authenticate(RAY_AUTH_MODE="token")
    mark = {name: os.environ[name] for name in (RUN_ID_VARIABLE,) if name in os.environ}
    environment = {"OMP_WAIT_POLICY": "passive", "PYTHONSAFEPATH": "1", **mark}
    with _ray_connected(log_dir, address=address, runtime_env={"env_vars": environment}):
        yield


@contextlib.contextmanager
def _ray_connected(log_dir: Path, **options: Any) -> Iterator[None]:
    import ray

    _quieten_ray(log_dir)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        try:
            with (
                _hangups_wait(),
                _stderr_to(log_dir / "ray-messages.log"),
            ):  # a refused token is complained of every second
                ray.init(
                    log_to_driver=False, logging_level=logging.ERROR, job_config=_job_config(), **options
                )
        except (
            ray.exceptions.RayError,
            RuntimeError,
            ConnectionError,
            TimeoutError,
            ValueError,
            OSError,
        ) as error:
            first_line = next(iter(str(error).splitlines()), "")
            reason = f"{type(error).__name__}: {first_line}"
            raise EnvironmentProblem(
                f"Ray did not start ({reason}); see {log_dir} and `rlhf doctor`, or set "
                "pipeline.executor=inline"
                if options["address"] == "local"
                else f"resources.address {options['address']}: not joined ({reason}); is the token the "
                "cluster's, and is this machine one of its nodes?"
            ) from error
        except SystemExit as error:  # Ray's own SIGTERM handler, in force during its start
            raise KeyboardInterrupt from error
        signal.signal(signal.SIGTERM, on_sigterm)
        yield
    finally:
        with deaf():
            ray.shutdown()


def _job_config() -> Any:
    """Of workers that look for modules where this process does. Ray would put the working directory and
    that of the script first, and a `stages/` there in place of ours.
    """
    from ray.job_config import JobConfig

    class WithoutWorkingDirectory(JobConfig):
        def _runtime_env_has_working_dir(self) -> bool:  # asked for nothing but that
            return True

    comes_first = os.path.realpath(sys.path[0]) == str(ROOT)  # see rlhf_pipeline
    return WithoutWorkingDirectory(_py_driver_sys_path=[str(ROOT)] if comes_first else [])


@contextlib.contextmanager
def _hangups_wait() -> Iterator[None]:
    """Inside, SIGHUP is delivered later; processes that start here never get it. A closed terminal sends it
    to all of them, and the stages have their state to save. (Ray does the same for SIGINT.)
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _stderr_to(log: Path) -> Iterator[None]:
    """At the level of file descriptors: Ray's client writes from C++."""
    sys.stderr.flush()
    before, to_log = os.dup(2), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(to_log, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(before, 2)
        os.close(before)
        os.close(to_log)


def _quieten_ray(log_dir: Path) -> None:
    """Ray's messages about dying processes go to a file: a thread prints them even with log_to_driver off."""
    import ray._private.worker as worker

    def to_file(data: Mapping[str, Any], ignore_prefix: bool) -> None:
        with contextlib.suppress(OSError), (log_dir / "ray-messages.log").open("a") as log:
            log.write("\n".join(data["lines"]) + "\n")

    assert callable(worker.print_to_stdstream)
    worker.print_to_stdstream = to_file


def _authenticate_local_cluster() -> None:
    """A token nobody else has, for a cluster whose servers listen on every interface."""
    _authenticate(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


def _authenticate(**variables: str) -> None:
    """Nothing phoned home, and how Ray proves who it is. The environment carries it to Ray's own processes;
    this one may have read its environment already.

    The autoscaler's metrics are the one server that asks for no token: with this port it does not start.
    """
    os.environ.update(
        RAY_USAGE_STATS_ENABLED="0",
        AUTOSCALER_METRIC_PORT="-1",
        RAY_IGNORE_UNHANDLED_ERRORS="1",
        OMP_WAIT_POLICY="passive",
        **variables,
    )
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # a C extension

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _check_local_cluster(log_dir: Path) -> None:
    from ray._private.worker import _global_node

    dead: list[tuple[str, Any]] = [] if _global_node is None else _global_node.dead_processes()
    if dead:
        raise ProcessDied(f"Ray's {dead[0][0]} died; logs in {log_dir}; {GO_ON}")
