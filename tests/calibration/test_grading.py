"""Items and tables of graded quality; no model needed."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from calibration.common.errors import CalibrationError
from calibration.grading.builtin import Item, builtin_items, digest, near_misses, read_items, to_jsonl
from calibration.grading.table import COLUMNS, Grade, grade, paired, summary, to_csv, wilson

ITEMS = builtin_items()


def test_builtin_items_are_well_formed() -> None:
    assert len(ITEMS) >= 600
    assert min(Counter(item.domain for item in ITEMS).values()) >= 50
    assert len({item.id for item in ITEMS}) == len({item.question for item in ITEMS}) == len(ITEMS)
    for item in ITEMS:
        assert len(set(item.options)) == 4
        assert item.options[item.right] == item.answer
    assert len({item.domain for item in ITEMS}) == 12


def test_the_right_option_stands_anywhere() -> None:
    places = Counter(item.right for item in ITEMS)
    assert set(places) == {0, 1, 2, 3}
    # Four equal places: 739 / 4 = 185, standard deviation 12.
    assert all(abs(n - len(ITEMS) / 4) < 48 for n in places.values())


def test_items_depend_on_the_seed_alone() -> None:
    assert digest(builtin_items(7)) == digest(builtin_items(7)) != digest(ITEMS)


@pytest.mark.parametrize(
    ("pattern", "result"),
    [
        (r"What is (\d+) \+ (\d+)\?", lambda a, b: a + b),
        (r"What is (\d+) - (\d+)\?", lambda a, b: a - b),
        (r"What is (\d+) times (\d+)\?", lambda a, b: a * b),
        (r"There are (\d+) boxes with (\d+) .*", lambda a, b: a * b),
        (r".* has (\d+) \w+ and gets (\d+) more.*", lambda a, b: a + b),
        (r".* had (\d+) \w+ and gave away (\d+)\..*", lambda a, b: a - b),
        (r".* has (\d+) \w+, finds (\d+) more and then loses (\d+)\..*", lambda a, b, c: a + b - c),
    ],
)
def test_arithmetic_answers_are_right(pattern: str, result: object) -> None:
    found = [(match, item) for item in ITEMS if (match := re.fullmatch(pattern, item.question))]
    assert len(found) >= 5
    for match, item in found:
        assert int(item.answer) == result(*map(int, match.groups()))  # type: ignore[operator]


def test_comparisons_and_series_are_right() -> None:
    for item in ITEMS:
        numbers = [int(n) for n in re.findall(r"\d+", item.question)]
        if item.domain == "comparison":
            best = max if "largest" in item.question else min
            assert int(item.answer) == best(numbers)
            assert sorted(map(int, item.options)) == sorted(numbers)
        if item.domain == "series":
            a, b, c, d = numbers
            doubled = (b, c, d) == (2 * a, 2 * b, 2 * c)
            assert int(item.answer) == (2 * d if doubled and c - b != b - a else d + b - a)


@pytest.mark.parametrize("right", [0, 1, 9, 10, 12, 99, 100, 547])
def test_near_misses_are_three_other_numbers(right: int) -> None:
    wrong = near_misses(right, np.random.default_rng(1))
    assert len(set(wrong)) == 3
    assert right not in wrong
    assert min(wrong) >= 0
    if right >= 12 and right not in (99, 100):
        assert {len(str(n)) for n in wrong} == {len(str(right))}


def test_items_survive_a_file(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text("\n" + to_jsonl(ITEMS), encoding="utf-8")
    assert read_items(path) == ITEMS


GOOD = {"id": "a", "domain": "x", "question": "1 + 1?", "options": ["2", "3"], "answer": "2"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"items.jsonl: line 2: must be a JSON object"),
        ("[1]", r"line 2: must be a JSON object, got \[1\]"),
        (json.dumps(GOOD | {"anser": "2"}), r"line 2: key not known, got 'anser'; did you mean 'answer'"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "domain"}), r"line 2: domain: must be given"),
        (json.dumps(GOOD | {"question": " "}), r"line 2: question: must be a text that is not empty, got ' '"),
        (json.dumps(GOOD | {"options": "23"}), r"line 2: options: must be a list of texts, got '23'"),
        (json.dumps(GOOD | {"options": ["2", "2"]}), r"line 2: options: must be at least two different texts"),
        (json.dumps(GOOD | {"answer": "4"}), r"line 2: answer: must be one of the options .*, got '4'"),
        (json.dumps(GOOD), r"items.jsonl: id: must be unique, got 'a' twice"),
    ],
)
def test_faults_of_a_file_name_the_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{line}\n", encoding="utf-8")
    with pytest.raises(CalibrationError, match=message):
        read_items(path)


def test_a_file_must_be_there_and_hold_items(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"none.jsonl: must be a JSONL file of items \(No such file"):
        read_items(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(CalibrationError, match=r"empty.jsonl: must hold an item a line, got none"):
        read_items(tmp_path / "empty.jsonl")


ITEM = Item("a", "x", "?", ("p", "q", "r"), "q")


def test_signals_by_hand() -> None:
    # Probabilities 1/2, 1/3, 1/6 after the softmax, whatever their common factor.
    told = grade(ITEM, "s", np.log([0.05, 0.1 / 3, 0.1 / 6]), exact=False, prompt_tokens=9)
    assert not told.correct
    assert told.confidence == pytest.approx(1 / 2)
    assert told.margin == pytest.approx(1 / 6)
    entropy = np.log(2) / 2 + np.log(3) / 3 + np.log(6) / 6
    assert told.entropy == pytest.approx(entropy)
    assert grade(ITEM, "s", np.log([0.1, 0.3, 0.2]), exact=False, prompt_tokens=9).correct


def made(stage: str, right: list[int]) -> list[Grade]:
    return [
        Grade(Item(str(i), "xy"[i % 2], "?", ("p", "q"), "p"), stage, bool(r), False, 0.9, 0.8, 0.1, 5)
        for i, r in enumerate(right)
    ]


def test_the_table_has_its_columns_and_rows() -> None:
    text = to_csv([*made("s", [1, 0])], {"s": 0.123456789})
    rows = list(csv.DictReader(io.StringIO(text)))
    assert tuple(rows[0]) == COLUMNS
    assert [row["correct"] for row in rows] == ["1", "0"]
    assert rows[0]["cost"] == "0.12346"
    assert rows[1]["item_prompt_tokens"] == "5"


def test_summary_by_hand() -> None:
    told = summary(made("s", [1, 1, 1, 0]), ["s"])["s"]
    assert (told["items"], told["quality"], told["chance"]) == (4, 0.75, 0.5)
    assert told["domains"]["x"]["quality"] == 1.0
    assert told["domains"]["y"]["quality"] == 0.5


def test_wilson_interval_of_published_examples() -> None:
    # Newcombe (1998), table I: 81 of 263 and 15 of 148.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0, 20)[0] == 0.0


def test_neighbouring_stages_are_compared_on_the_same_items() -> None:
    grades = [*made("a", [1, 0, 0, 0]), *made("b", [0, 1, 1, 0])]
    (told,) = paired(grades, ["a", "b"])
    assert (told["gained_items"], told["lost_items"], told["gain"]) == (2, 1, 0.25)
    # Variance of differences -1, 1, 1, 0: (3 - 1/4) / 16; its root times 1.96 is 0.8126.
    assert told["gain_95"] == pytest.approx([0.25 - 0.8126, 0.25 + 0.8126], abs=1e-3)
