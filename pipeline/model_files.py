"""Whether a directory that a user names may be loaded: judged by its files, before any library opens them.

    directory --> config.json, *config*.json: objects without code --> weights: whole safetensors, no pickles

Owns: what is refused in a model directory and why. Does not own: what it counts as (artifacts), whether its
weights fit its architecture (training.models). Light import.

Pickled weights can run code when they are loaded, `auto_map` names Python code and an adapter names another
model: all are refused wherever they stand, although nothing here would follow them. Only in the cache of the
hub pickles are let be: none is fetched, but other programs fetch them into the same directory.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import MissingStage
from rollout.ground.disk import disk_problems
from rollout.safetensors_header import BadHeader, read_header
from stages.data.reading.files import one_line
from stages.data.reading.lfs import POINTER, first_pointer, is_lfs_pointer

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
TRAINING_STATE = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "random_states")
"""How the names of pickles begin that trainers leave beside weights and that no model is loaded from."""
IF_BOTH = "remove it: weights are read from *.safetensors only"
IF_PICKLES_ONLY = (
    "convert it to safetensors: load it with transformers where you trust it, and give the directory that "
    "save_pretrained writes"
)
FETCHED = (".json", ".safetensors", ".model", ".jinja")
"""Endings of what a model is made of: none of these may be a pointer to a file that was not fetched."""
MAX_CONFIG_BYTES = 16 * 2**20
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MODELS_BELOW = ("*", "snapshots/*", "models--*/snapshots/*")
"""Where a model lies in what holds several: a trainer's output, a model in the hub's cache, that cache."""
QUANTISED_KEYS = ("quantization_config", "compression_config")
DEQUANTISED = ("fp8", "mxfp4")
"""Ways to store weights that transformers turns into plain ones as it reads them, on CPU at least."""


def check_model_directory(directory: Path, *, named: str, in_hub_cache: bool = False) -> None:
    """Raises MissingStage unless `directory` holds config.json and whole safetensors weights, and neither
    pickled weights nor anything that names code, another model or a file elsewhere.
    """
    with disk_problems(directory):
        if (pointer := first_pointer(directory, FETCHED)) is not None:
            raise MissingStage(f"{named}: {pointer.name} is {POINTER}")
        _check_no_adapter(directory, named)
        if not (directory / "config.json").is_file():
            raise MissingStage(f"{named}: no config.json; {_what_to_give(directory)}")
        check_configs(directory, named=named)
        weights = sorted(directory.glob("*.safetensors"))
        if not (weights and in_hub_cache):
            _check_no_pickles(directory, named, is_beside_weights=bool(weights))
        if not weights:
            raise MissingStage(f"{named}: no *.safetensors in it; give a directory with weights")
        for path in weights:
            _check_weights(path, named)
        _check_index(directory, named)
        if not ((directory / WEIGHTS).is_file() or (directory / INDEX).is_file()):
            raise MissingStage(
                f"{named}: neither {WEIGHTS} nor {INDEX}, by which weights are found, beside "
                f"{one_line(weights[0].name)}; fetch the index too, or save the model again"
            )


def _what_to_give(directory: Path) -> str:
    """Instead of a directory without a config.json: the model that lies below it, the last by its number."""
    below = [path.parent for pattern in MODELS_BELOW for path in directory.glob(f"{pattern}/config.json")]
    if not below:
        return "give an artifact or a model directory (save_pretrained)"
    last = max(below, key=lambda path: [int(number) for number in re.findall(r"\d{1,18}", path.name)])
    others = f", one of {len(below)} models below it" if len(below) > 1 else ""
    return f"give {one_line(last)}{others}"


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that hold the weights: those of the index, where there is one. Raises OSError."""
    stated = _json_object(directory / INDEX, str(directory)) if (directory / INDEX).exists() else {}
    match stated.get("weight_map"):
        case dict() as files:
            return sorted({directory / str(name) for name in files.values()})
    return sorted(directory.glob("*.safetensors"))


def check_configs(directory: Path, *, named: str) -> None:
    """Raises MissingStage for a configuration file that is not valid JSON, that names code or another model,
    or that describes weights which cannot be trained.
    """
    _check_no_adapter(directory, named)
    for path in sorted(directory.glob("*config*.json")):
        config = _json_object(path, named)
        if "auto_map" in _keys(config):
            raise MissingStage(
                f"{named}: {path.name} has auto_map, which names Python code to run; give a model of an "
                "architecture that transformers has itself"
            )
        if path.name == "config.json":
            _check_not_quantised(config, named)


def _check_no_adapter(directory: Path, named: str) -> None:
    if (directory / "adapter_config.json").exists():
        raise MissingStage(f"{named}: adapter_config.json: an adapter, not a model; merge it into its model")


def _check_not_quantised(config: dict[str, Any], named: str) -> None:
    """Of the model, or of a part of it (`text_config`)."""
    for part in (config, *config.values()):
        for key in QUANTISED_KEYS if isinstance(part, dict) else ():
            match part.get(key):
                case {"quant_method": str(method)} if method in DEQUANTISED:
                    continue
                case {**stated} if stated:
                    method = one_line(str(stated.get("quant_method", "of a method that it does not name")))
                    raise MissingStage(
                        f"{named}: config.json: {key} ({method}): quantised weights, which cannot be "
                        "trained; give the unquantised model"
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


def _check_no_pickles(directory: Path, named: str, *, is_beside_weights: bool) -> None:
    for path in sorted(directory.iterdir()):
        is_pickle = path.suffix.lower() in PICKLES and not path.name.startswith(TRAINING_STATE)
        if not is_pickle or path.is_dir():
            continue
        if not is_beside_weights and path.is_file() and is_lfs_pointer(path):
            raise MissingStage(f"{named}: {path.name} is {POINTER}")
        remedy = IF_BOTH if is_beside_weights else IF_PICKLES_ONLY
        raise MissingStage(f"{named}: {path.name} is a pickle, which can run code; {remedy}")


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
