"""`rlhf check` of every config we ship, as a user types it: without a network, without their real data."""

import os
import subprocess
from pathlib import Path

import pytest
from cli_runs import REPOSITORY, RLHF

pytestmark = pytest.mark.process

CONFIGS = sorted(path.stem for path in (REPOSITORY / "configs").glob("*.yaml"))
TRANSCRIPTS = REPOSITORY / "configs/llama_hh_cluster/transcripts.jsonl"
THEIR_DATA = {
    "smollm2_hh": (
        f"sft.data.0.path={REPOSITORY}/configs/demo/sft.jsonl",
        *(f"{key}.path={TRANSCRIPTS}" for key in ("reward.data.0", "ppo.data.0", "evaluate.prompts.0")),
    )
}
"""Overrides for configs whose data users bring; the others have rows beside them."""
ON_GPUS = ("llama_hh_cluster", "qwen_gsm8k_gpu")
UNREACHABLE = "http://127.0.0.1:9"


def checked(directory: Path, config: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    """The real command, on a machine that has fetched nothing and reaches nobody."""
    without_hub = {"HF_HOME": str(directory / "hub"), "HF_ENDPOINT": UNREACHABLE, "HTTPS_PROXY": UNREACHABLE}
    return subprocess.run(
        [RLHF, "check", REPOSITORY / "configs" / f"{config}.yaml", *overrides],
        cwd=directory,
        env=os.environ | without_hub,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("config", CONFIGS)
def test_a_shipped_config_passes_check_offline(config: str, tmp_path: Path):
    answer = checked(tmp_path, config, *THEIR_DATA.get(config, ()))
    assert (answer.returncode, answer.stderr) == (0, "")
    for stage in ("sft", "reward", "ppo", "evaluate"):
        assert f"\n  {stage}: 1 x {{" in answer.stdout or f"\n  {stage}: 8 x {{" in answer.stdout, (
            "its bundles"
        )
    if config in ON_GPUS:
        assert "GPU: 1" in answer.stdout and "GiB: fp32 weights" in answer.stdout
    assert not (tmp_path / "outputs").exists(), "a check leaves nothing behind"
