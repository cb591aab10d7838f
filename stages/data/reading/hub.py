"""Hub datasets: `organisation/name` -> the commit it means -> rows, through the `datasets` library.

    id, revision --hub_commit--> commit --load, split--> Arrow batches --rows--> RawRow

Owns what is asked of the hub, how long it may take, and the error line when it does not answer. Does not own
what a row means (schemas). `datasets` is imported only when a hub dataset is read. Its rows come from a cache
on disk that is mapped, not loaded. Where `revision` is a whole commit, identity is known without asking.
"""

import logging
import queue
import re
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

from stages.config.data import DataSource
from stages.data.reading.arrow_rows import BATCH_ROWS, batch_rows
from stages.data.reading.files import has_data_suffix, one_line
from stages.data.reading.json_rows import RawRow
from stages.errors import DataError

REQUEST_TIMEOUT_S = 5.0
"""For a connection, and for an answer, of the hub."""
DEADLINE_S = 10.0
"""For the hub to say which commit is meant, whatever names and addresses have to be tried."""
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_ADDRESS = re.compile(
    r"(?:hf://|https?://(?:[\w-]+\.)*(?:hugging|hf)[^/]*/)(?:datasets/|models/)?(\w[\w.-]*/\w[\w.-]*)",
    re.ASCII,
)
"""Of a dataset or model of the hub, as a browser or the hub's own library names it."""
_NAME_ALONE = re.compile(r"\w[\w-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FILE_ENDING = re.compile(
    r"\.(?:7z|avro|bin|bz2|ckpt|docx?|feather|ggml|gguf|gz|h5|hdf5|html?|lz4|md|npy|npz|onnx|orc|pdf"
    r"|pickle|pkl|pq|pt|pth|rar|rst|safetensors|sqlite3?|tar|tfrecords?|tgz|xlsx?|xml|xz|ya?ml|zip|zst)",
    re.IGNORECASE,
)
"""Of files that nobody names a repository like, beside those that are read."""
NOTHING_HERE = " (there is no such directory here)"
_AN_ID = "; a hub id is organisation/name"
Kind = Literal["dataset", "model"]


def is_hub_id(path: str) -> bool:
    """Whether `path` is a dataset of the hub: looks like `organisation/name`, and is nothing local."""
    return _HUB_ID.fullmatch(path) is not None and not names_a_file(path) and not Path(path).exists()


def names_a_file(path: str) -> bool:
    """Whether the path ends like a file of data or weights, so that it can be no id of the hub."""
    return has_data_suffix(path) or _FILE_ENDING.fullmatch(Path(path).suffix) is not None


def meant_id(path: str, kind: Kind) -> str:
    """What to add about a path where nothing lies, and that may be meant as an id of the hub: its address, or
    the name of a dataset alone. Empty: it looks like neither.
    """
    if found := _ADDRESS.match(path):
        return f"{_AN_ID}: write {found[1]}"
    return _AN_ID if kind == "dataset" and _NAME_ALONE.fullmatch(path) else ""


def hub_commit(source: DataSource) -> str:
    """The commit that a hub source means now; the same all through this process. Raises DataError."""
    if source.revision is not None and _COMMIT.fullmatch(source.revision):
        return source.revision
    return _asked_commit("dataset", source.path, source.revision)


def model_problem(path: str, revision: str | None) -> str | None:
    """Why the hub does not give a model, in one line; None: it has it."""
    try:
        _asked_commit("model", path, revision)
    except DataError as error:
        return str(error).removesuffix(NOTHING_HERE)
    return None


def is_cached_model(path: str, revision: str | None) -> bool:
    """Whether a model of the hub was fetched before, as far as its config.json shows. Asks nobody."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(path, "config.json", revision=revision), str)


@cache
def _asked_commit(kind: Kind, path: str, revision: str | None) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,  # of the http library it was built with
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def ask() -> str | None:
        info = HfApi().model_info if kind == "model" else HfApi().dataset_info
        return info(path, revision=revision, timeout=REQUEST_TIMEOUT_S).sha

    try:
        commit = _within(DEADLINE_S, ask)
    except RevisionNotFoundError:
        raise DataError(f"{path}: revision: no commit, tag or branch '{revision}'") from None
    except GatedRepoError:
        raise DataError(f"{path}: its owner must grant access; ask on the hub, and log in there") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise DataError(
            f"{path}: no such file or directory, and no {kind} of the hub either (a private one needs a "
            "login)"
        ) from None
    except HfHubHTTPError as error:
        raise DataError(
            f"cannot reach the hub for {path}: it answered {error.response.status_code}; try again later, "
            f"or give a local path{NOTHING_HERE}"
        ) from error
    except (HTTPError, OSError, ValueError) as error:  # no connection, HF_HUB_OFFLINE, a page instead of JSON
        raise _offline(path) from error
    if commit is None:
        raise DataError(f"{path}: the hub names no commit for it; set revision:")
    return commit


def _offline(path: str) -> DataError:
    return DataError(f"cannot reach the hub for {path}: offline; give a local path{NOTHING_HERE}")


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """What `call` returns or raises; TimeoutError after `seconds`, for looking up a name heeds no timeout."""
    outcome: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()

    def run() -> None:
        try:
            outcome.put((call(), None))
        except BaseException as error:  # raised again by the caller
            outcome.put((None, error))

    threading.Thread(target=run, daemon=True, name="hub").start()
    try:
        value, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return value


def hub_rows(source: DataSource) -> Iterator[RawRow]:
    """The rows of the source's split, numbered from 1. Raises DataError."""
    dataset = _loaded(source, hub_commit(source))
    row = 1
    for table in dataset.with_format("arrow").iter(batch_size=BATCH_ROWS):
        for batch in table.to_batches():
            yield from batch_rows(batch, first_row=row)
            row += batch.num_rows


def _loaded(source: DataSource, commit: str) -> Any:
    """The `datasets.Dataset` of the source's subset and split at `commit`, from the hub or the cache."""
    import datasets
    import huggingface_hub
    from datasets.exceptions import DatasetsError

    datasets.disable_progress_bars()
    for logger in (datasets.logging, huggingface_hub.logging):  # what they log is in the error they raise
        logger.set_verbosity(logging.CRITICAL)
    try:
        builder = _builder(source, commit)
        _check_split(builder, source)
        builder.download_and_prepare()
        return builder.as_dataset(split=source.split)
    except (DatasetsError, ValueError, RuntimeError, OSError, ImportError) as error:
        raise DataError(f"{source.path}: {one_line(str(error.__cause__ or error))}") from error


def _builder(source: DataSource, commit: str) -> Any:
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    _asked_commit("dataset", source.path, commit)  # `datasets` would try for half a minute
    try:
        builder = datasets.load_dataset_builder(source.path, name=source.subset, revision=commit)
    except ConnectionError as error:
        raise _offline(source.path) from error
    except ValueError as error:
        names = re.search(r"\[(.*?)\]", str(error), re.DOTALL)
        if "onfig" not in str(error) or names is None:
            raise
        wrong = "name one" if source.subset is None else f"no subset '{source.subset}'"
        available = ", ".join(re.findall(r"'([^']*)'", names[1]))
        raise DataError(f"{source.path}: subset: {wrong}; subsets are {available}") from None
    if isinstance(builder, Cache):  # `datasets` takes any commit it once read when it reaches no hub
        raise _offline(source.path)
    return builder


def _check_split(builder: Any, source: DataSource) -> None:
    names = [str(name) for name in builder.config.data_files]
    wanted = re.split(r"[\[+]", source.split)[0]  # of train[:10%] or train+test
    if wanted not in names:
        raise DataError(f"{source.path}: split: no split '{source.split}'; splits are {', '.join(names)}")
