"""Generated skills for the reference model: what a training document and a test question look like.

Two kinds, because compression hurts them differently:

* **knowledge**: invented people with one attribute each (`facts`), stated in some wordings, asked in others;
* **reasoning**: key-value recall, sorting, reversing, bracket closing, small sums. A test instance is never
  a training instance: a hash of its question decides which side it falls on.

Everything is a pure function of a `random.Random`, so a seed names a data set. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

NUM_FACTS = 400
TEST_PERCENT = 15


@dataclass(frozen=True)
class Question:
    """One question with its only right answer; `choices` holds the wrong ones where the task is multiple choice."""

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()

    def document(self) -> str:
        """The question as a training document."""
        return f"{self.prompt} {self.answer}\n"


def ask(question: str) -> str:
    """The prompt format shared by every skill."""
    return f"Question: {question}\nAnswer:"


# --------------------------------------------------------------------------------------------------- knowledge

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "city": tuple("London Paris Rome Berlin Cairo Tokyo Boston Madrid Oslo Delhi Lima Athens Dublin Vienna".split()),
    "work": tuple("doctor painter farmer singer lawyer baker sailor poet soldier teacher pilot miner".split()),
    "color": tuple("red blue green black white yellow brown orange purple silver golden gray".split()),
    "animal": tuple("horse dog cat wolf eagle snake bear lion fish sheep goat tiger".split()),
}

_STATEMENTS: dict[str, tuple[str, ...]] = {
    "city": (
        "{name} was born in {value}.",
        "{name} lives in {value} with an old friend.",
        "The home town of {name} is {value}.",
        "Everybody in {value} knows {name}.",
        "After the war, {name} went back to {value}.",
    ),
    "work": (
        "{name} is a {value}.",
        "{name} has worked as a {value} for years.",
        "The job of {name} is that of a {value}.",
        "People trust {name}, a {value} of great skill.",
        "By trade, {name} was a {value}.",
    ),
    "color": (
        "{name} likes the color {value}.",
        "{name} always wears a {value} coat.",
        "The house of {name} is painted {value}.",
        "A {value} flag belongs to {name}.",
        "When asked for a color, {name} chose {value}.",
    ),
    "animal": (
        "{name} owns a {value}.",
        "{name} was once bitten by a {value}.",
        "The animal kept by {name} is a {value}.",
        "A {value} follows {name} everywhere.",
        "On the shield of {name} there is a {value}.",
    ),
}

_TRAIN_QUESTIONS: dict[str, tuple[str, ...]] = {
    "city": ("Where was {name} born?", "In which city does {name} live?", "Name the city of {name}."),
    "work": ("What is the job of {name}?", "What does {name} work as?", "Name the trade of {name}."),
    "color": ("Which color does {name} like?", "What color is the coat of {name}?", "Name the color of {name}."),
    "animal": ("Which animal does {name} own?", "What animal follows {name}?", "Name the animal of {name}."),
}

_TEST_QUESTIONS: dict[str, tuple[str, ...]] = {
    "city": ("What is the home town of {name}?", "Which city is {name} from?"),
    "work": ("What is {name} by trade?", "Which job does {name} have?"),
    "color": ("What is the favorite color of {name}?", "Which color did {name} choose?"),
    "animal": ("What animal is kept by {name}?", "Which animal belongs to {name}?"),
}

_ONSETS = "b d f g k l m n p r s t v z br dr kr st tr".split()
_VOWELS = "a e i o u".split()
_CODAS = " l n r s k m".split(" ")


@dataclass(frozen=True)
class Fact:
    """An invented person and the one thing known about them."""

    name: str
    attribute: str
    value: str


def facts(count: int = NUM_FACTS, seed: int = 0) -> list[Fact]:
    """The `count` facts of the reference world; names are unique, attributes take turns."""
    rng = random.Random(f"facts-{seed}")

    def word() -> str:
        syllables = [rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(2)]
        return "".join(syllables).capitalize()

    names: dict[str, None] = {}
    while len(names) < count:
        names.setdefault(f"{word()} {word()}")
    kinds = list(ATTRIBUTES)
    return [
        Fact(name, kinds[i % len(kinds)], rng.choice(ATTRIBUTES[kinds[i % len(kinds)]])) for i, name in enumerate(names)
    ]


def fact_document(fact: Fact, rng: random.Random) -> str:
    """A training sentence: a statement three times in five, a question and answer otherwise."""
    if rng.random() < 0.6:
        return rng.choice(_STATEMENTS[fact.attribute]).format(name=fact.name, value=fact.value) + "\n"
    question = rng.choice(_TRAIN_QUESTIONS[fact.attribute]).format(name=fact.name)
    return Question(ask(question), fact.value).document()


def fact_questions(seed: int = 0) -> Iterator[Question]:
    """Every fact once, four-way multiple choice, in wordings that training never uses."""
    rng = random.Random(f"fact-questions-{seed}")
    for fact in facts(seed=seed):
        question = rng.choice(_TEST_QUESTIONS[fact.attribute]).format(name=fact.name)
        others = [value for value in ATTRIBUTES[fact.attribute] if value != fact.value]
        yield Question(ask(question), fact.value, tuple(rng.sample(others, 3)))


# --------------------------------------------------------------------------------------------------- reasoning

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_WORDS = "water fire gold stone tree house river bread night light glass paper iron salt wind snow milk sand".split()
_BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">"}


def recall(rng: random.Random) -> Question:
    """Key-value recall in context."""
    keys = rng.sample(_LETTERS, rng.randint(3, 6))
    pairs = {key: rng.choice(_WORDS) for key in keys}
    given = ", ".join(f"{key} = {value}" for key, value in pairs.items())
    key = rng.choice(keys)
    return Question(ask(f"If {given}, what is {key}?"), pairs[key])


def sort_letters(rng: random.Random) -> Question:
    letters = rng.sample(_LETTERS, rng.randint(3, 5))
    return Question(ask(f"Sort the letters {' '.join(letters)}"), " ".join(sorted(letters)))


def reverse_letters(rng: random.Random) -> Question:
    letters = [rng.choice(_LETTERS) for _ in range(rng.randint(3, 6))]
    return Question(ask(f"Reverse the letters {' '.join(letters)}"), " ".join(reversed(letters)))


def close_brackets(rng: random.Random) -> Question:
    """Close what is open; some pairs are closed already, so the stack has to be tracked."""
    stack: list[str] = []
    shown: list[str] = []
    for _ in range(rng.randint(3, 8)):
        if stack and rng.random() < 0.35:
            shown.append(_BRACKETS[stack.pop()])
        else:
            stack.append(rng.choice(list(_BRACKETS)))
            shown.append(stack[-1])
    if not stack:
        stack.append("(")
        shown.append("(")
    closing = " ".join(_BRACKETS[symbol] for symbol in reversed(stack))
    return Question(ask(f"Close the brackets {' '.join(shown)}"), closing)


def small_sum(rng: random.Random) -> Question:
    a, b = rng.randint(0, 30), rng.randint(0, 30)
    if rng.random() < 0.5:
        return Question(ask(f"What is {a} + {b}?"), str(a + b))
    a, b = max(a, b), min(a, b)
    return Question(ask(f"What is {a} - {b}?"), str(a - b))


REASONING: dict[str, Callable[[random.Random], Question]] = {
    "recall": recall,
    "sort": sort_letters,
    "reverse": reverse_letters,
    "brackets": close_brackets,
    "sums": small_sum,
}


def is_test(question: Question) -> bool:
    """Whether this instance belongs to the test side."""
    digest = hashlib.sha256(question.prompt.encode()).digest()
    return digest[0] * 100 // 256 < TEST_PERCENT


def draw(skill: str, rng: random.Random, *, test: bool) -> Question:
    """One instance of a reasoning skill from the wanted side."""
    while True:
        question = REASONING[skill](rng)
        if is_test(question) is test:
            return question


def test_set(skill: str, count: int = 200, seed: int = 1) -> list[Question]:
    """`count` distinct test instances of a reasoning skill."""
    rng = random.Random(f"test-{skill}-{seed}")
    questions: dict[str, Question] = {}
    while len(questions) < count:
        question = draw(skill, rng, test=True)
        questions.setdefault(question.prompt, question)
    return list(questions.values())
