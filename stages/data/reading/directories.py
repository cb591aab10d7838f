"""Directories: which of the files below a directory are its data, and why the others are not.

    names --no_data--> data files --state.json--> in their order --splits--> Found(files, left_out)

Three rules, in this order. What a name says is no data (a README, a licence, the metadata of a dataset or of
a model) is left out. Of a directory that `datasets.save_to_disk` wrote, its state.json lists the data. Where
names tell several splits, `split:` picks one of them; dataset_dict.json says which folders are splits, else
words in names tell.
Owns these rules. Does not own walking (places) or kinds (files). Light import.

Example: of README.md, data/train-00000-of-00001.parquet and data/test-00000-of-00001.parquet, the split
`train` is the second one; the first is left out as `no data by its name`, the last as `split test`.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.config.data import DataSource
from stages.data.reading.files import has_data_suffix, one_line, reading, shown
from stages.errors import DataError

SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("test", "testing", "heldout", "holdout"), "test"),
}
"""A word of its own in the name of a file or folder -> the split it tells."""
DEFAULT_SPLIT = DataSource.model_fields["split"].default
_WORD = re.compile(r"[^\W\d_]+")
_INNER_CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_HELD_OUT = re.compile(r"(?<![^\W\d_])(held|hold)[-_ ]out(?![^\W\d_])", re.IGNORECASE)

NO_DATA, NOT_READ = "no data by its name", "its ending is not read"
_DOCUMENTATION = r"read[-_]?me|licen[cs]es?"
_OF_A_LICENCE = (
    r"(?:mit|apache|bsd|[al]?gpl|mpl|isc|cc|odc|openrail|llama|model|data|dataset|code|software"
    r"|third[-_ ]?party)"
)
_NO_DATA = re.compile(
    rf"(?:{_DOCUMENTATION})(?:\..*)?"  # README.jsonl too: whoever means it can name it
    rf"|(?:{_DOCUMENTATION})[-_. ].*\.(?:txt|md|rst)"  # LICENSE-MIT.txt
    rf"|{_OF_A_LICENCE}(?:[-_. ].*)?[-_. ]licen[cs]es?(?:\.(?:txt|md|rst))?"  # MIT-LICENSE.txt
    r"|(?:acknowledge?ments?|attributions?|authors|changelog|citation|code_of_conduct|contributing"
    r"|contributors|copying|copyright|disclaimer|notices?|requirements|robots"
    r"|terms(?:[-_ ]of[-_ ](?:use|service))?|(?:acceptable[-_ ])?use[-_ ]policy)(?:\.(?:txt|md|rst|cff))?"
    r"|(?:(?:sha|b|blake)[-_]?\d+[-_]?sums?|sha[-_]?\d+|md5(?:[-_]?sums?)?|checksums?)(?:\.(?:txt|json))?"
    r"|requirements[-_.].*\.txt"
    r"|cache-[0-9a-f]+.*\.arrow"  # what `datasets` remembers beside its data
)
_METADATA = frozenset(
    f"{name}.json"
    for name in (
        # of datasets, and of what serves them
        *("dataset_info", "dataset_infos", "dataset_dict", "state", "metadata", "dataset-metadata"),
        *("croissant", "datapackage", "dataset_config"),
        # of models and training runs that lie beside them
        *("config", "generation_config", "adapter_config", "preprocessor_config", "processor_config"),
        *("tokenizer", "tokenizer_config", "special_tokens_map", "added_tokens", "vocab"),
        *("model.safetensors.index", "trainer_state", "training_args"),
        *("all_results", "train_results", "eval_results", "test_results"),
        # of projects
        *("package", "package-lock", "tsconfig", "pyrightconfig", "manifest"),
    )
) | {"merges.txt", "vocab.txt"}
_STATE, _DICT = "state.json", "dataset_dict.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A file of a directory that is not read."""

    path: Path
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a path means."""

    files: tuple[Path, ...]  # in the order in which they are read
    left_out: tuple[LeftOut, ...]  # of a directory, in path order

    def reasons(self, directory: Path, most: int = 8) -> str:
        """What is left out and why, on one line, at most `most` names for each reason.

        Example: `test.jsonl (split test); README.md, LICENSE (no data by its name)`.
        """
        names: dict[str, list[str]] = {}
        for one in self.left_out:
            names.setdefault(one.why, []).append(one_line(one.path.relative_to(directory)))
        parts = []
        for why, group in names.items():
            more = f" and {len(group) - most} more" if len(group) > most else ""
            parts.append(f"{', '.join(group[:most])}{more} ({why})")
        return "; ".join(parts)


def chosen(directory: Path, below: Sequence[tuple[Path, Collection[str]]], split: str) -> Found:
    """The data of `split` among the files of a directory. `below`: each directory at and below it, with the
    names of its files. Raises DataError for a split that its names do not tell, or that holds no row.
    """
    places: dict[Path, tuple[str, ...]] = {}  # file -> what it is sorted by
    left_out: list[LeftOut] = []
    stated: dict[Path, str] = {}
    empty: list[Path] = []
    for place, names in below:
        listed = _listed_in_state(place, names)
        if listed is not None and not listed:
            empty.append(place)
        stated.update({place / name: name for name in _stated_splits(place, names)})
        for name in names:
            path = place / name
            why = _why_no_data(name) if listed is None else _why_not_listed(name, listed)
            if why:
                left_out.append(LeftOut(path=path, why=why))
            else:
                places[path] = (*place.parts, name if listed is None else f"{listed[name]:09d}")
    files = sorted(places, key=places.__getitem__)
    splits = _Splits(directory=directory, stated=stated, empty=empty)
    taken = splits.picked(files, split)
    others = {*files} - {*taken}
    left_out += [LeftOut(path=path, why=_told(splits.of(path))) for path in others]
    return Found(files=tuple(taken), left_out=tuple(sorted(left_out, key=lambda one: one.path)))


def _why_no_data(name: str) -> str:
    """Why a file of this name is left out; empty: it is data."""
    if name.lower() in _METADATA or _NO_DATA.fullmatch(name.lower()):
        return NO_DATA
    return "" if has_data_suffix(name) else NOT_READ


# What `datasets.save_to_disk` wrote


def _listed_in_state(place: Path, names: Collection[str]) -> Mapping[str, int] | None:
    """File name -> its place in the order of state.json; None: the directory is not one of save_to_disk."""
    if _STATE not in names:
        return None
    state = _json_in(place / _STATE)
    listed = state.get("_data_files") if isinstance(state, dict) else None
    if not isinstance(listed, list):
        return None
    where = shown(place / _STATE)
    order: dict[str, int] = {}
    for entry in listed:
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(name, str) or name not in names:
            raise DataError(
                f"{where}: names {one_line(str(name))}, which is not there; save the dataset again"
            )
        order[name] = len(order)
    if isinstance(state, dict) and state.get("_indices_data_files"):
        raise DataError(f"{where}: written with an index by an old `datasets`; load it and save it again")
    return order


def _stated_splits(place: Path, names: Collection[str]) -> list[str]:
    """The splits of a saved DatasetDict, each with a folder of its name; none where there is none."""
    stated = _json_in(place / _DICT) if _DICT in names else None
    splits = stated.get("splits") if isinstance(stated, dict) else None
    return [name for name in splits if isinstance(name, str)] if isinstance(splits, list) else []


def _json_in(path: Path) -> object:
    """What a JSON file holds; None for what is no JSON."""
    with reading(path):
        data = path.read_bytes()
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _why_not_listed(name: str, listed: Mapping[str, int]) -> str:
    if name in listed:
        return ""
    return _why_no_data(name) or f"not listed in {_STATE}"


# Splits


def split_of(path: Path, directory: Path) -> str | None:
    """The split that a file's name tells, or else that of the nearest folder below `directory`; None where no
    name does, or one tells two.

    Example: `train` for data/train-00000-of-00002.parquet and train/part-1.jsonl, `test` for my_test.jsonl,
    None for contest.jsonl and train_test.jsonl.
    """
    for name in reversed(path.relative_to(directory).parts):
        told = {SPLIT_OF[word] for word in _words(name) if word in SPLIT_OF}
        if len(told) == 1:
            return told.pop()
    return None


def _words(name: str) -> list[str]:
    """The words of a name, lower-cased: what stands between signs, digits and inner capitals; `held_out` is
    one word.
    """
    spaced = _HELD_OUT.sub(r"\1out", _INNER_CAPITAL.sub(" ", name))
    return [word.lower() for word in _WORD.findall(spaced)]


def _told(split: str | None) -> str:
    return "no split in its name" if split is None else f"split {split}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Splits:
    """What tells the splits of a directory."""

    directory: Path
    stated: Mapping[Path, str]  # folder -> the split that it is by dataset_dict.json; else names tell
    empty: Sequence[Path]  # folders that `save_to_disk` wrote for no row at all

    def of(self, path: Path) -> str | None:
        """The split of a file."""
        folder = next((folder for folder in path.parents if folder in self.stated), None)
        return split_of(path, self.directory) if folder is None else self.stated[folder]

    def picked(self, files: Sequence[Path], split: str) -> list[Path]:
        """The files of a split such as `train`, `train_sft` or `train+test`; all of them where one split is
        told or none, and `split` is not set.
        """
        nowhere = [folder / _STATE for folder in self.empty]
        if not files and nowhere:
            raise DataError(f"{shown(self.directory)}: no rows")
        known = {self.of(path) for path in (*files, *nowhere)} | {*self.stated.values()}
        known.discard(None)
        if not files or (split == DEFAULT_SPLIT and len(known) < 2):
            return [*files]
        if "[" in split:
            raise DataError(
                f"{shown(self.directory)}: split: {one_line(split)}: only a split of the hub can be cut"
            )
        taken: set[Path] = set()
        for part in split.split("+"):
            own = self._files_of(part, files)
            if not own:
                if without_rows := self._files_of(part, nowhere):
                    raise DataError(f"{shown(without_rows[0].parent)}: no rows")
                names = ", ".join(sorted(map(one_line, filter(None, known)))) or "none"
                raise DataError(
                    f"{shown(self.directory)}: split: no file of split '{one_line(part)}' by its name; "
                    f"splits are {names} - set split: to one of them, or name the files"
                )
            taken.update(own)
        return [path for path in files if path in taken]

    def _files_of(self, part: str, files: Sequence[Path]) -> list[Path]:
        """Those below the folders that are stated to be of a split by this name; where none is, those whose
        names tell it.
        """
        folders = {folder for folder, split in self.stated.items() if split == part}
        if folders:
            return [path for path in files if not folders.isdisjoint(path.parents)]
        return [path for path in files if _is_of(path, self.directory, part)]


def _is_of(path: Path, directory: Path, split: str) -> bool:
    """Whether the file is of a split by this name: of one that SPLIT_OF knows, or one whose words stand in
    its name, as in train_sft-00000-of-00001.parquet.
    """
    words = _words(split)
    if len(words) == 1 and words[0] in SPLIT_OF:
        return split_of(path, directory) == SPLIT_OF[words[0]]
    return any(_holds(_words(name), words) for name in path.relative_to(directory).parts)


def _holds(words: Sequence[str], part: Sequence[str]) -> bool:
    """Whether `part` stands in `words`, word for word."""
    return bool(part) and any(window == tuple(part) for window in _windows(words, len(part)))


def _windows(words: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
    for start in range(len(words) - length + 1):
        yield tuple(words[start : start + length])
