"""The session's engines: each starts once, at its first use."""

from collections.abc import Callable, Iterator

import pytest
from rigs import Rig, start_rig

from rollout.loop import LoopThread


@pytest.fixture(scope="session")
def rigs(
    loop: LoopThread,
    start_ray: Callable[[], None],
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., Rig]]:
    """(kind, tied) -> its rig, started at the first call. Kinds: vllm, hf, actor (vllm in a Ray actor),
    fake.
    """
    started: dict[tuple[str, bool], Rig] = {}

    def get(kind: str, *, tied: bool) -> Rig:
        if (kind, tied) not in started:
            model_dir = request.getfixturevalue("tied_model_dir" if tied else "untied_model_dir")
            if kind == "actor":
                start_ray()
            started[kind, tied] = start_rig(kind, loop, model_dir, tmp_path_factory.mktemp(kind))
        return started[kind, tied]

    yield get
    for rig in started.values():
        rig.close()
