"""What of a config's section is identity."""

from pathlib import Path
from typing import Any

from pydantic import Field

from rollout.ground.section import EXECUTION, Section, as_before, by_content, sections_in


class Inner(Section):
    rate: float = 1.0
    newer: int | None = Field(default=None, json_schema_extra=as_before(None))


class Outer(Section):
    name: str = Field(default="x", json_schema_extra=EXECUTION)
    code: Path | None = Field(default=None, json_schema_extra=by_content())
    words: Path | None = Field(default=None, json_schema_extra=by_content("first.json", "second.json"))
    mode: str = Field(default="plain", json_schema_extra=as_before("plain"))
    inner: Inner = Inner()
    items: list[Inner] = Field(default_factory=list)


def identity(**settings: Any) -> dict[str, Any]:
    return Outer(**settings).identity()


def test_a_name_a_path_and_a_newer_setting_that_does_as_before_are_no_identity():
    assert identity() == {"inner": {"rate": 1.0}, "items": []}
    assert identity(name="y", code="a.py", words="dir") == identity()


def test_a_newer_setting_with_another_value_is_identity_at_any_depth():
    assert identity(mode="odd") == {"mode": "odd", **identity()}
    assert identity(inner={"newer": 3}) == {**identity(), "inner": {"rate": 1.0, "newer": 3}}
    assert identity(items=[{}, {"newer": 0}])["items"] == [{"rate": 1.0}, {"rate": 1.0, "newer": 0}]


def test_files_are_those_that_are_stated_with_what_counts_in_them():
    assert list(Outer().files()) == []
    assert list(Outer(code="a.py", words="dir").files()) == [
        (("code",), Path("a.py"), []),
        (("words",), Path("dir"), ["first.json", "second.json"]),
    ]


def test_every_section_is_found_with_its_path():
    outer = Outer(items=[{}, {"rate": 2.0}])
    assert [path for path, _ in sections_in(outer)] == [(), ("inner",), ("items", 0), ("items", 1)]


class Judge(Section):
    code: Path = Field(json_schema_extra=by_content())


class Several(Section):
    judges: dict[str, Judge] = Field(default_factory=dict)
    listed: list[Path] = Field(default_factory=list, json_schema_extra=by_content())
    named: dict[str, Path] = Field(default_factory=dict, json_schema_extra=by_content("first.json"))


def test_sections_in_a_mapping_are_found_as_their_identity_is():
    several = Several(judges={"fair": {"code": "a.py"}})
    assert several.identity() == {"judges": {"fair": {}}}
    found = dict(sections_in(several))
    assert list(found) == [(), ("judges", "fair")]
    assert list(found["judges", "fair"].files()) == [(("code",), Path("a.py"), [])]


def test_of_a_list_or_a_mapping_of_files_each_is_one():
    assert list(Several(listed=["a.py", "b.py"], named={"de": "d"}).files()) == [
        (("listed", 0), Path("a.py"), []),
        (("listed", 1), Path("b.py"), []),
        (("named", "de"), Path("d"), ["first.json"]),
    ]
