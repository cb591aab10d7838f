"""Writes the demo's data, all of it, from one seed: `python configs/demo/make_data.py [OUT_DIR]`.

    48 true facts -> corpus.jsonl        what is true, said in many ways                            pretrain
                  -> sft.jsonl           answers of mixed quality: it knows better than it says     sft
                  -> preferences.jsonl   right over wrong, polite over rude, short over long        reward
                  -> prompts.jsonl       questions in the wordings of sft and preferences           ppo
                  -> eval_prompts.jsonl  questions after these facts that no other file has         evaluate

A response is [courtesy] [filler] answer. Each part is drawn by itself, so that its share is known: the sft
model samples a right, a polite, a short answer about as often as SFT_SHARES says, and ppo has room to gain
on each. The facts are never in doubt: the corpus states nothing false. Two choices keep the reward model
honest: the answer comes last, where the reward is read (talk after it hid what is correct), and it does not
name its subject (a true sentence about something else scored well). Owns: the data. Does not own: how a
response is judged (score.py).
"""

import json
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

SEED = 20261
NUM_DOCUMENTS = 7000
NUM_SFT = 4500
NUM_PREFERENCES = 4000

SFT_SHARES = {"correct": 0.75, "polite": 0.45, "short": 0.45}
RUDE_FRAC = 0.6  # of the responses that are not polite; the others have no courtesy at all
PLAIN_FRAC = 0.5  # of "correct": nothing but the answer, where what is right is easiest to see
EVASIVE_FRAC = 0.5  # of "several": an answer against none; without these ppo learns to say nothing
CONFLICT_FRAC = 0.3  # of the rest: right with lesser manners against wrong with better ones
PREFERENCE_SHARES = {"correct": 0.5, "polite": 0.125, "short": 0.125, "several": 0.25}


@dataclass(frozen=True, slots=True, kw_only=True)
class Category:
    """Facts of one kind: `{x}` is the subject, `{y}` its answer. A wrong one is another of its kind."""

    facts: Mapping[str, str]  # subject -> answer; both in the form they have inside a sentence
    statements: tuple[str, ...]  # true sentences, of the corpus only
    questions: tuple[str, ...]  # wordings; each fact keeps two of them, its own, for evaluate


CATEGORIES: dict[str, Category] = {
    "opposite": Category(
        facts={
            "hot": "cold",
            "big": "small",
            "up": "down",
            "day": "night",
            "fast": "slow",
            "happy": "sad",
            "wet": "dry",
            "new": "old",
        },
        statements=(
            "The opposite of {x} is {y}.",
            "If it is not {x}, it is {y}.",
            "{X} and {y} are opposites.",
        ),
        questions=(
            "What is the opposite of {x}?",
            "Tell me the opposite of {x}.",
            "Which word is the opposite of {x}?",
            "Can you name the opposite of {x}?",
            "Name the opposite of {x}.",
            "Do you know the opposite of {x}?",
        ),
    ),
    "sound": Category(
        facts={
            "cow": "moo",
            "cat": "meow",
            "dog": "woof",
            "duck": "quack",
            "sheep": "baa",
            "lion": "roar",
            "pig": "oink",
            "bee": "buzz",
        },
        statements=("A {x} says {y}.", "The sound of a {x} is {y}.", "You hear {y} from a {x}."),
        questions=(
            "What does a {x} say?",
            "Tell me the sound of a {x}.",
            "What sound does a {x} make?",
            "Can you name the sound of a {x}?",
            "Name the sound of a {x}.",
            "Do you know what a {x} says?",
        ),
    ),
    "baby": Category(
        facts={
            "dog": "puppy",
            "cat": "kitten",
            "cow": "calf",
            "sheep": "lamb",
            "horse": "foal",
            "bear": "cub",
            "hen": "chick",
            "frog": "tadpole",
        },
        statements=(
            "A baby {x} is called a {y}.",
            "The young of a {x} is a {y}.",
            "A {y} will grow into a {x}.",
        ),
        questions=(
            "What is a baby {x} called?",
            "Tell me the name of a baby {x}.",
            "What do you call a baby {x}?",
            "Can you name the young of a {x}?",
            "Name the baby of a {x}.",
            "Do you know what a baby {x} is?",
        ),
    ),
    "color": Category(
        facts={
            "grass": "green",
            "snow": "white",
            "the sun": "yellow",
            "the sky": "blue",
            "coal": "black",
            "a tomato": "red",
            "a carrot": "orange",
            "chocolate": "brown",
        },
        statements=("The color of {x} is {y}.", "{X} looks {y}.", "{Y} is the color of {x}."),
        questions=(
            "What color is {x}?",
            "Tell me the color of {x}.",
            "What is the color of {x}?",
            "Can you name the color of {x}?",
            "Name the color of {x}.",
            "Do you know what color {x} is?",
        ),
    ),
    "capital": Category(
        facts={
            "France": "Paris",
            "Italy": "Rome",
            "Japan": "Tokyo",
            "Spain": "Madrid",
            "Egypt": "Cairo",
            "Peru": "Lima",
            "Greece": "Athens",
            "Norway": "Oslo",
        },
        statements=("The capital of {x} is {y}.", "{Y} is the capital of {x}.", "In {x} the capital is {y}."),
        questions=(
            "What is the capital of {x}?",
            "Tell me the capital of {x}.",
            "Which city is the capital of {x}?",
            "Can you name the capital of {x}?",
            "Name the capital of {x}.",
            "Do you know the capital of {x}?",
        ),
    ),
    "plural": Category(
        facts={
            "mouse": "mice",
            "foot": "feet",
            "tooth": "teeth",
            "man": "men",
            "goose": "geese",
            "child": "children",
            "leaf": "leaves",
            "wolf": "wolves",
        },
        statements=("The plural of {x} is {y}.", "One {x}, two {y}.", "More than one {x} are {y}."),
        questions=(
            "What is the plural of {x}?",
            "Tell me the plural of {x}.",
            "What do you call two of {x}?",
            "Can you name the plural of {x}?",
            "Name the plural of {x}.",
            "Do you know the plural of {x}?",
        ),
    ),
}

PREFIXES = ("", "Hello! ", "Please help me. ")

FORMS = ("It is {y}.", "The answer is {y}.")
POLITE = ("Glad to help!", "Happy to help!", "You are welcome!", "Good question!")
RUDE = ("Obviously.", "Silly question.", "Everyone knows that.", "Stop asking me.")
FILLERS = (
    "There is so much to say that I could talk all day.",
    "Let me think about it for a while, and then say more.",
    "I could say so much more about it if you like.",
    "It is a long story and there is so much to say.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    category: str
    subject: str
    answer: str

    @property
    def other_answers(self) -> list[str]:
        return [answer for answer in CATEGORIES[self.category].facts.values() if answer != self.answer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """The parts of one response; its text is `render()`."""

    fact: Fact
    answer: str  # as given: right or wrong
    form: str  # the sentence that states it; "" says nothing
    courtesy: str  # polite, rude or ""
    filler: str  # "" when short

    def render(self) -> str:
        statement = fill(self.form, self.fact.subject, self.answer)
        return " ".join(part for part in (self.courtesy, self.filler, statement) if part)

    @property
    def correct(self) -> bool:
        return self.answer == self.fact.answer

    @property
    def total(self) -> float:
        return self.correct * (0.5 + 0.25 * (self.courtesy in POLITE) + 0.25 * (not self.filler))


FACTS = tuple(
    Fact(category=name, subject=subject, answer=answer)
    for name, category in CATEGORIES.items()
    for subject, answer in category.facts.items()
)


def fill(template: str, subject: str, answer: str = "") -> str:
    """`{X}` and `{Y}` open a sentence."""
    return template.format(
        x=subject, y=answer, X=subject[:1].upper() + subject[1:], Y=answer[:1].upper() + answer[1:]
    )


def questions(fact: Fact, *, held_out: bool = False) -> list[str]:
    """The questions after a fact: those of corpus, sft, preferences and ppo, or else those of evaluate.

    Which two wordings are held out turns with the fact: each wording is known, only not with this fact.
    """
    category = CATEGORIES[fact.category]
    turn = list(category.facts).index(fact.subject)
    return [
        prefix + fill(wording, fact.subject)
        for index, wording in enumerate(category.questions)
        for prefix in PREFIXES
        if ((index - turn) % (len(category.questions) // 2) == 0) == held_out
    ]


def corpus(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Documents of true sentences: notes, a question with a lecture for an answer, and talk of two turns."""
    for _ in range(NUM_DOCUMENTS):
        kind = rng.choices(("notes", "lecture", "talk"), (0.1, 0.45, 0.45))[0]
        first, second, third = rng.sample(FACTS, 3)
        if kind == "notes":
            lines = [" ".join(state(fact, rng) for fact in (first, second, third))]
        elif kind == "lecture":
            related = rng.sample(
                [fact for fact in FACTS if fact.category == first.category and fact != first], 2
            )
            lines = [rng.choice(questions(first)), " ".join(state(fact, rng) for fact in (first, *related))]
        else:
            remark, aside = rng.choice(POLITE + RUDE), rng.choice(FILLERS)
            lines = [
                f"user: {rng.choice(questions(first))}",
                f"assistant: {remark} {state(first, rng)}",
                f"user: {rng.choice(questions(second))}",
                f"assistant: {aside} {state(second, rng)}",
            ]
        yield {"text": "\n".join(lines)}


def state(fact: Fact, rng: random.Random) -> str:
    return fill(rng.choice(CATEGORIES[fact.category].statements), fact.subject, fact.answer)


def draw(fact: Fact, rng: random.Random) -> Response:
    """A response of sft quality: each component is good in its share, whatever the others are."""
    polite, rude = rng.random() < SFT_SHARES["polite"], rng.random() < RUDE_FRAC
    return Response(
        fact=fact,
        answer=fact.answer if rng.random() < SFT_SHARES["correct"] else rng.choice(fact.other_answers),
        form=rng.choice(FORMS),
        courtesy=rng.choice(POLITE) if polite else rng.choice(RUDE) if rude else "",
        filler="" if rng.random() < SFT_SHARES["short"] else rng.choice(FILLERS),
    )


def sft(rng: random.Random) -> Iterator[dict[str, Any]]:
    for index in range(NUM_SFT):
        fact = FACTS[index % len(FACTS)]
        yield {"prompt": rng.choice(questions(fact)), "completion": draw(fact, rng).render()}


def preferences(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Pairs whose better one is certain; `differs` is the one component they differ in, or "several"."""
    kinds = [kind for kind, share in PREFERENCE_SHARES.items() for _ in range(round(share * NUM_PREFERENCES))]
    rng.shuffle(kinds)
    for index, kind in enumerate(kinds):
        fact = FACTS[index % len(FACTS)]
        chosen, rejected = pair(kind, fact, rng)
        yield {
            "prompt": rng.choice(questions(fact)),
            "chosen": chosen.render(),
            "rejected": rejected.render(),
            "differs": kind,
        }


def pair(kind: str, fact: Fact, rng: random.Random) -> tuple[Response, Response]:
    base, wrong = draw(fact, rng), rng.choice(fact.other_answers)
    right = replace(base, answer=fact.answer)
    if kind == "correct":
        manners = {"courtesy": "", "filler": ""} if rng.random() < PLAIN_FRAC else {}
        return replace(right, **manners), replace(base, answer=wrong, **manners)
    if kind == "polite":
        impolite = rng.choice(RUDE) if rng.random() < RUDE_FRAC else ""
        return replace(base, courtesy=rng.choice(POLITE)), replace(base, courtesy=impolite)
    if kind == "short":
        return replace(base, filler=""), replace(base, filler=rng.choice(FILLERS))
    if rng.random() < EVASIVE_FRAC:
        return right, evasion(fact, rng)
    # Others set right and rude and long against wrong and polite and short: right must win.
    if rng.random() < CONFLICT_FRAC:
        impolite = rng.choice(RUDE) if rng.random() < RUDE_FRAC else ""
        return (
            replace(right, courtesy=impolite, filler=rng.choice(FILLERS)),
            replace(draw(fact, rng), answer=wrong, courtesy=rng.choice(POLITE), filler=""),
        )
    while True:
        first, second = sorted((draw(fact, rng), draw(fact, rng)), key=lambda response: -response.total)
        if first.total > second.total:
            return first, second


def evasion(fact: Fact, rng: random.Random) -> Response:
    """A response that does not answer what was asked: an answer of another category, or talk alone."""
    response = draw(fact, rng)
    if rng.random() < 0.5:
        strangers = [other for other in FACTS if other.category != fact.category]
        return replace(response, answer=rng.choice(strangers).answer)
    return replace(response, form="", courtesy=response.courtesy or rng.choice(POLITE + RUDE))


def prompts(facts_questions: Iterable[tuple[Fact, str]]) -> Iterator[dict[str, Any]]:
    for fact, question in facts_questions:
        yield {
            "prompt": question,
            "answer": fact.answer,
            "other_answers": fact.other_answers,
            "category": fact.category,
        }


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(out_dir: Path) -> None:
    """Each file has its own generator, so that changing one leaves the others as they are."""
    write(out_dir / "corpus.jsonl", corpus(random.Random(f"{SEED} corpus")))
    write(out_dir / "sft.jsonl", sft(random.Random(f"{SEED} sft")))
    write(out_dir / "preferences.jsonl", preferences(random.Random(f"{SEED} preferences")))
    write(out_dir / "prompts.jsonl", prompts([(fact, text) for fact in FACTS for text in questions(fact)]))
    write(
        out_dir / "eval_prompts.jsonl",
        prompts([(fact, text) for fact in FACTS for text in questions(fact, held_out=True)]),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
