"""The packaged corpus: short stories about the people of a village, and instructions about them.

The text is generated from the word lists and sentences in ``ktops/cli/finetune/data/``; the same seed gives
the same text on every machine. Each person has one home, one job, one animal and so on. The stories repeat
these facts often enough for a small model to learn them. The instructions ask for them, and the held-out
instructions ask for facts that no training instruction asks for.
"""

import json
import random
from collections.abc import Iterator
from importlib import resources
from types import SimpleNamespace

ATTRIBUTES = {
    "job": "jobs",
    "home": "homes",
    "pet": "pets",
    "food": "foods",
    "colour": "colours",
    "hobby": "hobbies",
}
"""Attribute of a person -> its word list in village.json."""

HELD_OUT = 1 / 8
"""Fraction of the facts that is held out for evaluation."""


def _read(name: str) -> dict:
    return json.loads((resources.files("ktops.cli.finetune") / "data" / name).read_text(encoding="utf-8"))


def _people(village: dict) -> list[SimpleNamespace]:
    rng = random.Random("people")
    people = []
    for they, their in (("she", "her"), ("he", "his")):
        for name in village[they]:
            traits = {attribute: rng.choice(village[words]) for attribute, words in ATTRIBUTES.items()}
            people.append(SimpleNamespace(name=name, they=they, their=their, **traits))
    return people


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _count(rng: random.Random, village: dict) -> dict[str, str]:
    numbers = village["numbers"]
    first = rng.randrange(len(numbers) - 4)
    words = numbers[first : first + rng.randint(3, 5)]
    return {"first": words[0], "last": words[-1], "count": ", ".join(words)}


def _three(rng: random.Random, village: dict) -> dict[str, str]:
    category = rng.choice(list(village["categories"]))
    c0, c1, c2 = rng.sample(village["categories"][category], 3)
    return {"category": category, "c0": c0, "c1": c1, "c2": c2}


def stories(num_stories: int, seed: int = 0) -> list[str]:
    """Returns documents of 30 to 120 words for pretraining: stories, portraits of a person, lists, questions.

    Example:
        >>> stories(1)[0]
        'Early on Sunday Greta left the cottage by the river with a map. ...'
    """
    village, grammar = _read("village.json"), _read("stories.json")
    people, rng = _people(village), random.Random(f"stories {seed}")

    def fill(pattern: str, a, b) -> str:
        x, y = rng.sample(rng.choice(village["opposites"]), 2)
        thing, place, day, feeling, weather, n = (
            rng.choice(village[words])
            for words in ("things", "places", "days", "feelings", "weather", "steps")
        )
        words = {"thing": thing, "place": place, "day": day, "feeling": feeling, "weather": weather, "n": n}
        text = pattern.format(a=a, b=b, x=x, y=y, **words, **_count(rng, village), **_three(rng, village))
        return _sentence(text)

    def story(a, b) -> list[str]:
        facts = [rng.choice(grammar["facts"][attribute]) for attribute in rng.sample(list(ATTRIBUTES), 2)]
        turns = rng.sample(grammar["middle"], 2) + rng.sample(grammar["dialogue"], 2)
        return [rng.choice(grammar["opening"]), *facts, *turns, rng.choice(grammar["ending"])]

    def portrait(a, b) -> list[str]:
        return [
            rng.choice(grammar["facts"][attribute])
            for attribute in rng.sample(list(ATTRIBUTES), len(ATTRIBUTES))
        ]

    def lists(a, b) -> list[str]:
        return rng.choices(grammar["lists"], k=6)

    def questions(a, b) -> list[str]:
        return rng.sample(grammar["questions"], 5)

    documents = []
    for _ in range(num_stories):
        a, b = rng.sample(people, 2)
        kind = rng.choices((story, portrait, lists, questions), weights=(8, 8, 3, 1))[0]
        documents.append(" ".join(fill(pattern, a, b) for pattern in kind(a, b)))
    return documents


def _subjects(kind: str, village: dict, rng: random.Random) -> Iterator[dict]:
    """Yields the possible slot values for instructions of one kind."""
    if kind == "person":
        yield from ({"a": person} for person in _people(village))
    elif kind == "opposite":
        for x, y in village["opposites"]:
            yield from ({"x": x, "y": y}, {"x": y, "y": x})
    elif kind == "category":
        yield from (_three(rng, village) for _ in range(60))
    else:
        yield from (_count(rng, village) for _ in range(30))


def instructions(seed: int = 0) -> tuple[list[dict], list[dict]]:
    """Returns the instruction set in the alpaca layout, split into (training, held-out).

    Returns:
        Two lists of ``{"instruction": str, "input": str, "output": str}``. Every phrasing of a
        question about a held-out fact is held out.

    Example:
        >>> instructions()[0][0]
        {'instruction': 'Where does Mira live?', 'input': '', 'output': 'The home is the boat in ...'}
    """
    village, rng = _read("village.json"), random.Random(f"instructions {seed}")
    train: list[dict[str, str]] = []
    held_out: list[dict[str, str]] = []
    seen: set[tuple[str, str]] = set()
    for kind, questions in _read("instructions.json").items():
        subjects = list(_subjects(kind, village, rng))
        for question in questions:
            for subject in subjects:
                target = held_out if rng.random() < HELD_OUT else train
                for pattern in question["ask"]:
                    instruction, _, context = pattern.format(**subject).partition("|")
                    if (instruction, context) in seen:
                        continue
                    seen.add((instruction, context))
                    answer = _sentence(question["answer"].format(**subject))
                    target.append({"instruction": instruction, "input": context, "output": answer})
    return train, held_out
