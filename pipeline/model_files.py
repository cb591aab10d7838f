"""Whether a directory that a user names may be loaded: judged by its files, before any library opens them.

    directory --> config.json, *config*.json: objects without code --> weights: whole safetensors --> loadable

Owns: what is refused in a model directory and why. Does not own: what it counts as (artifacts), whether its
weights fit its architecture (training.models). Light import.

Pickled weights beside safetensors are let be (many hub models have both): every load here asks for
safetensors, and only those are fetched and identified. `auto_map` names Python code and an adapter names
another model: both are refused wherever they stand, although nothing here would follow them.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import MissingStage
from rollout.safetensors_header import BadHeader, read_header
from stages.data.durable import disk_problems

PICKLED_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_CONFIG_BYTES = 16 * 2**20
INDEX = "model.safetensors.index.json"


def check_model_directory(directory: Path, *, named: str) -> None:
    """Raises MissingStage unless `directory` holds config.json and whole safetensors weights, and nothing
    that names code, another model or a file elsewhere.
    """
    with disk_problems(directory):
        if not (directory / "config.json").is_file():
            raise MissingStage(
                f"{named}: no config.json; give an artifact or a model directory (save_pretrained)"
            )
        check_configs(directory, named=named)
        weights = sorted(directory.glob("*.safetensors"))
        if not weights:
            raise MissingStage(_without_weights(directory, named))
        for path in weights:
            _check_weights(path, named)
        _check_index(directory, named)


def check_configs(directory: Path, *, named: str) -> None:
    """Raises MissingStage for a configuration file that is none, or that names code or another model."""
    if (directory / "adapter_config.json").exists():
        raise MissingStage(f"{named}: adapter_config.json: an adapter, not a model; merge it into its model")
    for path in sorted(directory.glob("*config*.json")):
        if "auto_map" in _keys(_json_object(path, named)):
            raise MissingStage(
                f"{named}: {path.name} has auto_map, which names Python code to run; give a model of an "
                "architecture that transformers has itself"
            )


def _check_weights(path: Path, named: str) -> None:
    try:
        read_header(path)
    except BadHeader as error:
        raise MissingStage(
            f"{named}: {path.name} is not a whole safetensors file ({error}); fetch or save it again"
        ) from error


def _check_index(directory: Path, named: str) -> None:
    """The index of sharded weights names files of this directory and no others."""
    path = directory / INDEX
    if not path.exists():
        return
    files = _json_object(path, named).get("weight_map")
    if not isinstance(files, dict):
        raise MissingStage(f"{named}: {INDEX} has no weight_map; save the model again")
    for name in files.values():
        if not isinstance(name, str) or Path(name).name != name or not (directory / name).is_file():
            raise MissingStage(f"{named}: {INDEX} names {name!r}, which is no file of this directory")


def _without_weights(directory: Path, named: str) -> str:
    pickled = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLED_WEIGHTS)
    if pickled:
        return f"{named}: {pickled[0]} is a pickle, which can run code; convert the weights to safetensors"
    return f"{named}: no *.safetensors in it; give a directory with weights"


def _json_object(path: Path, named: str) -> dict[str, Any]:
    if not path.is_file() or path.stat().st_size > MAX_CONFIG_BYTES:
        raise MissingStage(f"{named}: {path.name}: no configuration file; give a model directory")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise MissingStage(f"{named}: {path.name} is not JSON; fetch or save it again") from error
    if not isinstance(value, dict):
        raise MissingStage(f"{named}: {path.name} is not a JSON object; fetch or save it again")
    return value


def _keys(value: Any) -> Iterator[str]:
    """Every key, at any depth."""
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _keys(item)
