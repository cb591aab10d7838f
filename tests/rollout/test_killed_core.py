"""A vLLM scheduler that is killed while a control call waits for it: an error at once."""

import asyncio
import signal
import time

import pytest
from rigs import start_rig

from rollout.errors import EngineError

pytestmark = pytest.mark.engine


def test_a_scheduler_killed_during_a_call_is_told_long_before_the_deadline(
    loop, tied_model_dir, tmp_path_factory
):
    """Frozen first, so that the call is surely under way."""
    rig = start_rig("vllm", loop, tied_model_dir, tmp_path_factory.mktemp("log"))
    core = rig.engine._processes[0]

    async def call_and_kill() -> float:
        core.send_signal(signal.SIGSTOP)
        call = asyncio.ensure_future(rig.engine.resume())
        await asyncio.sleep(1)
        assert not call.done()
        core.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        with pytest.raises(EngineError, match=r"engine-0: .*(gone|dead|died)"):
            await call
        return time.monotonic() - killed

    try:
        assert rig.run(call_and_kill()) < rig.config.sync_timeout_s / 2
    finally:
        rig.run(rig.engine.close())
        rig.sync.close()
