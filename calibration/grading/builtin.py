"""The built-in items: twelve domains, written for this package, the same ones for the same seed.

Arithmetic items of graded difficulty, drawn by rules: sums, differences, products, comparisons, series, stories.

Wrong options are near misses: off by one, by two, by ten, or with two digits swapped, of as many digits as the right
answer where there are enough of them, so that length alone gives nothing away.

Items to grade models on: a question, its options, and which of them is right. No torch needed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibration.common.errors import CalibrationError, did_you_mean

_KEYS = ("id", "domain", "question", "options", "answer")


@dataclass(frozen=True)
class Item:
    """One graded question. `options` are distinct and stand in the order shown; `answer` is the right one of them."""

    id: str
    domain: str
    question: str
    options: tuple[str, ...]
    answer: str

    @property
    def right(self) -> int:
        """Index of the right option."""
        return self.options.index(self.answer)

    @property
    def chance(self) -> float:
        """Probability that a blind guess is right."""
        return 1.0 / len(self.options)


def read_items(path: str | os.PathLike[str]) -> tuple[Item, ...]:
    """Read items from a JSONL file: one object a line with id, domain, question, options (a list) and answer.

    Raises:
        CalibrationError: the file cannot be read, is empty, or a line breaks a rule; names the line.
    """
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as fault:
        reason = fault.strerror if isinstance(fault, OSError) else "not UTF-8"
        raise CalibrationError(f"{file.name}: must be a JSONL file of items ({reason})") from None
    items = [_parsed(f"{file.name}: line {n}", line) for n, line in enumerate(lines, 1) if line.strip()]
    if not items:
        raise CalibrationError(f"{file.name}: must hold an item a line, got none")
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise CalibrationError(f"{file.name}: id: must be unique, got '{item.id}' twice")
        seen.add(item.id)
    return tuple(items)


def _parsed(place: str, line: str) -> Item:
    """Give the item of one line."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as fault:
        raise CalibrationError(f"{place}: must be a JSON object ({fault.msg})") from None
    if not isinstance(row, dict):
        raise CalibrationError(f"{place}: must be a JSON object, got {line.strip()[:60]}")
    for key in row:
        if key not in _KEYS:
            raise CalibrationError(f"{place}: key not known, got '{key}'{did_you_mean(key, _KEYS)}")
    for key in _KEYS:
        if key not in row:
            raise CalibrationError(f"{place}: {key}: must be given")
    for key in ("id", "domain", "question", "answer"):
        if not isinstance(row[key], str) or not row[key].strip():
            raise CalibrationError(f"{place}: {key}: must be a text that is not empty, got {row[key]!r}")
    return Item(row["id"], row["domain"], row["question"], _options(place, row), row["answer"])


def _options(place: str, row: dict[str, Any]) -> tuple[str, ...]:
    """Give the options of one line, which must be at least two different texts, the answer among them."""
    options = row["options"]
    if not isinstance(options, list) or not all(isinstance(option, str) and option.strip() for option in options):
        raise CalibrationError(f"{place}: options: must be a list of texts, got {options!r}")
    if len(options) < 2 or len(set(options)) < len(options):
        raise CalibrationError(f"{place}: options: must be at least two different texts, got {options!r}")
    if row["answer"] not in options:
        raise CalibrationError(f"{place}: answer: must be one of the options {options!r}, got {row['answer']!r}")
    return tuple(options)


def to_jsonl(items: Iterable[Item]) -> str:
    """Give `items` as the text of a JSONL file that `read_items` reads."""
    return "".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items)


def digest(items: Sequence[Item]) -> str:
    """Give the sha256 of `items`, with which a table says what it was graded on."""
    return hashlib.sha256(to_jsonl(items).encode()).hexdigest()


Draw = np.random.Generator
WRONG = 3
"""Wrong options of an item."""
_NAMES = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lucy", "Max", "Emma")
_THINGS = ("apples", "books", "coins", "pencils", "stamps", "marbles", "cards", "shells")


def arithmetic_items(per_domain: int, generator: Draw) -> Iterator[Item]:
    """Give `per_domain` items of each of the six domains, the easy ones first; all questions differ."""
    makers: dict[str, Callable[[Draw, int], tuple[str, int | tuple[int, ...]]]] = {
        "addition": _addition,
        "subtraction": _subtraction,
        "multiplication": _multiplication,
        "comparison": _comparison,
        "series": _series,
        "word-problems": _story,
    }
    for domain, make in makers.items():
        asked: set[str] = set()
        while len(asked) < per_domain:
            level = len(asked) * 4 // per_domain
            question, given = make(generator, level)
            if question in asked:
                continue
            asked.add(question)
            numbers = given if isinstance(given, tuple) else (given, *near_misses(given, generator))
            options = tuple(str(numbers[i]) for i in generator.permutation(len(numbers)))
            yield Item(f"{domain}-{len(asked):03d}", domain, question, options, str(numbers[0]))


def near_misses(right: int, generator: Draw) -> tuple[int, ...]:
    """Give `WRONG` different numbers close to `right` (>= 0), none of them `right` or negative."""
    swapped = int(str(right)[::-1]) if str(right)[-1] != "0" else right
    near = [right + step for step in (-10, -2, -1, 1, 2, 10)] + [swapped]
    near = [n for n in dict.fromkeys(near) if n >= 0 and n != right]
    alike = [n for n in near if len(str(n)) == len(str(right))]
    others = [n for n in near if n not in alike]
    chosen = [*generator.permutation(alike).tolist(), *generator.permutation(others).tolist()][:WRONG]
    return tuple(int(n) for n in chosen)


def _operands(generator: Draw, level: int) -> tuple[int, int]:
    """Draw two numbers of one digit, of one and two, of two, or of three digits."""
    low, high = ((2, 10), (2, 10), (11, 100), (101, 1000))[level]
    first = int(generator.integers(low, high)) if level != 1 else int(generator.integers(11, 100))
    return first, int(generator.integers(low, high))


def _addition(generator: Draw, level: int) -> tuple[str, int]:
    a, b = _operands(generator, level)
    return f"What is {a} + {b}?", a + b


def _subtraction(generator: Draw, level: int) -> tuple[str, int]:
    a, b = sorted(_operands(generator, level), reverse=True)
    return f"What is {a} - {b}?", a - b


def _multiplication(generator: Draw, level: int) -> tuple[str, int]:
    low, high = ((2, 6), (2, 10), (3, 10), (11, 30))[level]
    a = int(generator.integers(low, high)) if level != 2 else int(generator.integers(11, 100))
    b = int(generator.integers(low, high))
    return f"What is {a} times {b}?", a * b


def _comparison(generator: Draw, level: int) -> tuple[str, tuple[int, ...]]:
    low, high = ((1, 10), (1, 100), (10, 100), (100, 1000))[level]
    numbers = [int(n) for n in generator.choice(np.arange(low, high), size=WRONG + 1, replace=False)]
    word = ("largest", "smallest")[int(generator.integers(2))]
    right = max(numbers) if word == "largest" else min(numbers)
    listed = ", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}"
    return f"Which is the {word} of the numbers {listed}?", (right, *(n for n in numbers if n != right))


def _series(generator: Draw, level: int) -> tuple[str, int]:
    start, step = int(generator.integers(1, 20)), int(generator.integers(1, 4 + 3 * level))
    if level == 3 and step % 2:  # doubling
        numbers = [start * 2**i for i in range(5)]
    elif level == 2 and step % 2:  # down
        numbers = [start + 5 * step - i * step for i in range(5)]
    else:
        numbers = [start + i * step for i in range(5)]
    listed = ", ".join(map(str, numbers[:-1]))
    return f"Which number comes next: {listed}?", numbers[-1]


def _story(generator: Draw, level: int) -> tuple[str, int]:
    name = _NAMES[int(generator.integers(len(_NAMES)))]
    thing = _THINGS[int(generator.integers(len(_THINGS)))]
    high = (10, 20, 60, 100)[level]
    a, b = (int(n) for n in generator.integers(2, high, size=2))
    c = int(generator.integers(2, 10))
    match int(generator.integers(4)):
        case 0:
            return f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?", a + b
        case 1:
            return f"{name} had {a + b} {thing} and gave away {b}. How many {thing} are left?", a
        case 2:
            return f"There are {c} boxes with {a} {thing} in each. How many {thing} are there in all?", a * c
        case _:
            told = f"{name} has {a} {thing}, finds {b} more and then loses {c}."
            return f"{told} How many {thing} does {name} have now?", a + b - min(c, a + b)


_FACTS = Path(__file__).resolve().parent / "facts.txt"
PER_ARITHMETIC_DOMAIN = 60


def builtin_items(seed: int = 0, per_arithmetic_domain: int = PER_ARITHMETIC_DOMAIN) -> tuple[Item, ...]:
    """Give the built-in items, four options each: six domains of arithmetic drawn from `seed`, six of knowledge.

    `seed` draws the arithmetic, the wrong answers that a list of facts leaves open, and the order of options.
    """
    generator = np.random.default_rng(seed)
    return (*arithmetic_items(per_arithmetic_domain, generator), *_facts(_FACTS.read_text("utf-8"), generator))


def _facts(text: str, generator: np.random.Generator) -> Iterator[Item]:
    """Give the items of a list of facts (the format stands at its top)."""
    sections: dict[str, list[tuple[str, str, list[str]]]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("["):
            rows = sections.setdefault(line.strip("[] "), [])
        elif line and not line.startswith("#"):
            parts = [part.strip() for part in line.split("|")]
            if len(parts) != 3:
                raise CalibrationError(f"facts: line {number}: must be question | right | wrong; wrong, got {line}")
            rows.append((parts[0], parts[1], [wrong.strip() for wrong in parts[2].split(";") if wrong.strip()]))
    for domain, rows in sections.items():
        drawn = sorted({right for _, right, wrong in rows if not wrong})
        for index, (question, right, given) in enumerate(rows, 1):
            others = [other for other in drawn if other != right and other.lower() not in question.lower().split()]
            wrong = given or [others[i] for i in generator.choice(len(others), WRONG, replace=False)]
            options = [right, *wrong]
            shuffled = tuple(options[i] for i in generator.permutation(len(options)))
            yield Item(f"{domain}-{index:03d}", domain, question, shuffled, right)
