"""`model.path`: the local directory behind it, or the hub id that is fetched for it.

Owns: finding and fetching. Does not own: what may be loaded (model_files), what it counts as (artifacts).
Light import.
"""

import os
import re
from pathlib import Path

from pipeline.model_files import PICKLES, check_model_directory
from rollout.ground.errors import EnvironmentProblem
from stages.errors import DataError

MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
HUB_ID = r"[\w-][\w.-]*(/[\w.-]+)?"
HUB_REVISION = r"\w[\w./-]*"
"""It becomes part of a path of the hub's cache."""


def model_directory(path: str, revision: str | None) -> Path:
    """The local directory behind `model.path`; a hub id is fetched (safetensors only).

    Raises DataError for a path that is not there, EnvironmentProblem when the hub gives nothing.
    """
    local = Path(path)
    if revision is not None and (".." in revision or not re.fullmatch(HUB_REVISION, revision)):
        raise DataError(f"model.revision {revision!r}: not a commit, branch or tag of a hub id")
    if local.is_dir():
        check_model_directory(local, named=f"model.path {path}")
        return Path(os.path.abspath(local))
    if not re.fullmatch(HUB_ID, path):
        raise DataError(
            f"model.path {path}: no such directory; give a model directory or a hub id (`owner/name`)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        fetched = Path(snapshot_download(path, revision=revision, allow_patterns=list(MODEL_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise EnvironmentProblem(
            f"model.path {path}: no such directory, and not reachable as a hub id either "
            f"({type(error).__name__}); give a local model directory, or check the name and the network"
        ) from error
    check_model_directory(fetched, named=f"model.path {path}", in_hub_cache=True)
    return fetched


def model_at_hand(path: str | None, revision: str | None) -> bool:
    """False for a hub id (`model.path`) whose weights are not in the local cache yet. Asks nobody."""
    if path is None or Path(path).is_dir() or not re.fullmatch(HUB_ID, path):
        return True
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            path, revision=revision, allow_patterns=list(MODEL_FILES), local_files_only=True
        )
    except (HFValidationError, LocalEntryNotFoundError):
        return False
    # other programs fetch the config alone
    return any(file.suffix in (".safetensors", *PICKLES) for file in Path(found).iterdir())
