"""docs/models.md: rendered from the figures of the versions we pin, and yes where it has to be."""

import re
from pathlib import Path

import pytest
from families.figures import COLUMNS, PACKAGES, PAGE, REQUIRED, Figure, has_to_say_yes, load, markdown, record
from families.table import FAMILIES, Family

PINS = (Path(__file__).parents[2] / "requirements/cpu.txt").read_text(encoding="utf-8")


def test_the_page_is_what_its_figures_render_to():
    assert PAGE.read_text(encoding="utf-8") == markdown(load())


def test_the_figures_are_those_of_the_pinned_versions():
    pinned = dict(re.findall(r"^([a-z-]+)==([^ \n+]+)", PINS, re.MULTILINE))
    measured = {name: number.partition("+")[0] for name, number in load()["versions"].items()}
    assert measured == {package: pinned[package] for package in PACKAGES}


def test_every_family_was_measured_packed_and_nothing_else_is_on_the_page():
    families = load()["families"]
    assert families.keys() == FAMILIES.keys()
    assert all("packed" in figures for figures in families.values())


@pytest.mark.parametrize("family", REQUIRED, ids=lambda family: family.name)
def test_the_page_says_yes_in_every_column_that_applies(family: Family):
    measured = load()["families"][family.name]
    for name, column in COLUMNS.items():
        if has_to_say_yes(family, name):
            figure = measured.get(name)
            assert isinstance(figure, float), f"{family.name}: {column.title} is {figure or 'not measured'}"


def test_a_figure_beyond_the_limit_is_never_recorded():
    with pytest.raises(AssertionError, match=r"llama: packed is off by 0\.1"):
        record("llama", "packed", 0.1)


@pytest.mark.parametrize(
    ("family", "figure"),
    [
        ("llama", "sequences see each other"),
        ("bloom", "another reason than the page gives"),
        ("bloom", 1e-6),
        ("llama", 9e-5),  # within the limit, and far from what rounding is
    ],
)
def test_an_answer_other_than_the_committed_one_is_noticed(family: str, figure: Figure):
    with pytest.raises(AssertionError, match="run make models-page"):
        record(family, "packed", figure)


def test_rounding_of_another_machine_is_no_other_answer():
    committed = load()["families"]["llama"]["packed"]
    for factor in (0.1, 1.0, 10.0):
        record("llama", "packed", factor * committed)
