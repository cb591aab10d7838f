"""The demo's data and its judge: reproducible, disjoint where it must be, in the promised shares."""

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pipeline.config import load
from stages.data.corpus.decontamination import num_too_short
from stages.prepare import evaluation_texts

DEMO = Path(__file__).parents[2] / "configs" / "demo"
FILES = ("corpus.jsonl", "sft.jsonl", "preferences.jsonl", "prompts.jsonl", "eval_prompts.jsonl")


def load_module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"demo_{name}", DEMO / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


make_data = load_module("make_data")
judge = load_module("score").score
COW = {"answer": "moo", "other_answers": ["meow", "baa"]}
FILLER = make_data.FILLERS[0]


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DEMO / name).read_text(encoding="utf-8").splitlines()]


def fact_rows() -> dict[str, dict[str, Any]]:
    """Every question of the data, and what its judge has to know about it."""
    return {row["prompt"]: row for name in ("prompts.jsonl", "eval_prompts.jsonl") for row in rows(name)}


def test_the_generator_writes_the_committed_files_byte_for_byte(tmp_path: Path) -> None:
    make_data.main(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes(), f"{name}: run make_data.py"
    assert sum((DEMO / name).stat().st_size for name in FILES) < 3_100_000


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("Glad to help! A cow says moo.", (1.0, 1.0, 1.0, 1.0)),
        ("A cow says moo.", (0.75, 1.0, 0.0, 1.0)),
        ("Obviously. A cow says moo.", (0.75, 1.0, 0.0, 1.0)),
        (
            "Glad to help! Obviously. A cow says moo.",
            (0.75, 1.0, 0.0, 1.0),
        ),  # politeness is undone by rudeness
        (f"Glad to help! {FILLER} A cow says moo.", (0.75, 1.0, 1.0, 0.0)),
        (f"Obviously. {FILLER} A cow says moo.", (0.5, 1.0, 0.0, 0.0)),
        ("Glad to help! As you know, a cow says moo.", (1.0, 1.0, 1.0, 1.0)),  # ten words: still short
        ("Glad to help! As you may well know, a cow says moo.", (0.875, 1.0, 1.0, 0.5)),  # twelve: half short
        ("Glad to help! A cow says baa.", (0.0, 0.0, 1.0, 1.0)),  # a wrong answer earns nothing
        ("Glad to help! A cow says moo or baa.", (0.0, 0.0, 1.0, 1.0)),  # nor does naming all of them
        ("Glad to help! MOO.", (1.0, 1.0, 1.0, 1.0)),
        ("Glad to help!", (0.0, 0.0, 0.0, 0.0)),  # polite and short about nothing
        ("", (0.0, 0.0, 0.0, 0.0)),
        ("Moo moo moo moo.", (0.0, 0.0, 0.0, 0.0)),
        ("Glad to help! Glad to help! Glad to help! A cow says moo.", (0.0, 0.0, 0.0, 0.0)),
        ("A cow smooths.", (0.0, 0.0, 0.0, 0.0)),  # whole words only
    ],
)
def test_score_of_a_hand_example(response: str, expected: tuple[float, float, float, float]) -> None:
    assert tuple(judge("What does a cow say?", response, COW).values()) == pytest.approx(expected)


def test_the_best_response_to_every_fact_scores_one_and_each_lesser_part_scores_less() -> None:
    for fact in make_data.FACTS:
        row = {"answer": fact.answer, "other_answers": fact.other_answers}
        for form in make_data.FORMS:
            for polite in make_data.POLITE:
                best = make_data.Response(
                    fact=fact, answer=fact.answer, form=form, courtesy=polite, filler=""
                )
                assert judge("", best.render(), row)["score"] == 1.0, best.render()
                for lesser in (
                    *[{"courtesy": rude} for rude in ("", *make_data.RUDE)],
                    *[{"filler": filler} for filler in make_data.FILLERS],
                    *[{"answer": other} for other in fact.other_answers],
                ):
                    text = make_data.replace(best, **lesser).render()
                    assert judge("", text, row)["score"] < 1.0, text


def test_no_evaluation_prompt_occurs_in_any_other_file() -> None:
    evaluated = {row["prompt"] for row in rows("eval_prompts.jsonl")}
    assert len(evaluated) == len(rows("eval_prompts.jsonl")) >= 200
    for name in ("sft.jsonl", "preferences.jsonl", "prompts.jsonl"):
        assert not evaluated & {row["prompt"] for row in rows(name)}
    corpus = (DEMO / "corpus.jsonl").read_text(encoding="utf-8")
    assert not [prompt for prompt in evaluated if prompt in corpus]


def test_every_evaluation_text_is_shorter_than_the_runs_of_words_that_prepare_looks_for() -> None:
    """As README and docs/results/demo.md say: of the demo's texts it checks none."""
    config = load(DEMO.with_suffix(".yaml")).config
    assert config.evaluate is not None and config.prepare is not None
    texts = evaluation_texts(config.evaluate.prompts)
    assert num_too_short(texts, config.prepare.decontaminate_ngram) == len(texts) == 864


def test_every_fact_is_evaluated_in_two_wordings_and_trained_in_the_others() -> None:
    for fact in make_data.FACTS:
        trained, evaluated = make_data.questions(fact), make_data.questions(fact, held_out=True)
        assert (len(trained), len(evaluated)) == (4 * len(make_data.PREFIXES), 2 * len(make_data.PREFIXES))
        assert not set(trained) & set(evaluated)


def test_every_sft_and_preference_prompt_is_one_of_the_ppo_prompts() -> None:
    known = {row["prompt"] for row in rows("prompts.jsonl")}
    assert {row["prompt"] for name in ("sft.jsonl", "preferences.jsonl") for row in rows(name)} == known


def test_sft_completions_have_the_promised_share_of_every_component() -> None:
    facts = fact_rows()
    scores = [judge(row["prompt"], row["completion"], facts[row["prompt"]]) for row in rows("sft.jsonl")]
    for component, share in make_data.SFT_SHARES.items():
        good = sum(score[component] > 0.99 for score in scores) / len(scores)
        assert good == pytest.approx(share, abs=0.02), component


def test_preference_pairs_differ_in_what_they_say_they_differ_in() -> None:
    facts = fact_rows()
    for row in rows("preferences.jsonl"):
        prompt = row["prompt"]
        chosen, rejected = (judge(prompt, row[side], facts[prompt]) for side in ("chosen", "rejected"))
        differing = {name for name in ("correct", "polite", "short") if chosen[name] != rejected[name]}
        if row["differs"] == "several":
            assert chosen["score"] > rejected["score"], row
        else:
            assert differing == {row["differs"]}, row
            assert chosen[row["differs"]] > rejected[row["differs"]], row


def test_preference_kinds_come_in_their_shares_and_length_does_not_give_the_answer_away() -> None:
    pairs = rows("preferences.jsonl")
    kinds = Counter(row["differs"] for row in pairs)
    shares = {kind: count / len(pairs) for kind, count in kinds.items()}
    assert shares == pytest.approx(make_data.PREFERENCE_SHARES)
    sizes = [(len(row["chosen"]), len(row["rejected"])) for row in pairs]
    longer_wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in sizes) / len(sizes)
    assert 0.4 < longer_wins < 0.6
