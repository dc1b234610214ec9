"""Tables of per-item correctness: both forms, and what is refused with its place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cascade_made import graded_by_difficulty, write_long

from analysis.cascade import bundled_tables, read_quality_table
from calibration.common.errors import TraceError

LONG = """item,domain,stage,correct,cost,confidence,margin,item_prompt_tokens
a,math,13B,0,1.6,0.4,,12
a,math,70B,1,8.8,0.9,0.5,12
b,code,13B,0.25,1.7,,,30
b,code,70B,true,8.9,0.8,0.1,30
"""
WIDE = "item,domain,13B,70B,item_prompt_tokens\na,math,0,1,12\nb,code,1,1,30\n"


def saved(folder: Path, text: str) -> Path:
    path = folder / "answers.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_long_form(tmp_path: Path) -> None:
    table = read_quality_table(saved(tmp_path, LONG))
    assert (table.items, table.domains, table.stages) == (("a", "b"), ("math", "code"), ("13B", "70B"))
    assert table.correct.tolist() == [[0, 1], [0.25, 1]]
    assert table.cost.tolist() == [[1.6, 8.8], [1.7, 8.9]]
    np.testing.assert_equal(table.signals["confidence"], [[0.4, 0.9], [np.nan, 0.8]])
    np.testing.assert_equal(table.signals["margin"], [[np.nan, 0.5], [np.nan, 0.1]])
    assert table.item_features["item_prompt_tokens"].tolist() == [12, 30]


def test_parquet_holds_the_same(tmp_path: Path) -> None:
    path = tmp_path / "answers.parquet"
    frame = pd.read_csv(saved(tmp_path, LONG))
    frame["correct"] = [0.0, 1.0, 0.25, 1.0]
    frame.to_parquet(path)
    read, text = read_quality_table(path), read_quality_table(tmp_path / "answers.csv")
    np.testing.assert_array_equal(read.correct, text.correct)
    np.testing.assert_array_equal(read.signals["margin"], text.signals["margin"])


def test_the_wide_form_and_costs_by_hand(tmp_path: Path) -> None:
    table = read_quality_table(saved(tmp_path, WIDE), costs={"13B": 1.6, "70B": 8.8})
    assert table.correct.tolist() == [[0, 1], [1, 1]]
    assert table.cost.tolist() == [[1.6, 8.8], [1.6, 8.8]]
    assert list(table.item_features) == ["item_prompt_tokens"]


def test_given_costs_and_order_go_before_those_of_the_file(tmp_path: Path) -> None:
    table = read_quality_table(saved(tmp_path, LONG), costs={"13B": 5.0}, stages=("70B", "13B"))
    assert table.stages == ("70B", "13B")
    assert table.cost.tolist() == [[8.8, 5.0], [8.9, 5.0]]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    made = graded_by_difficulty(np.random.default_rng(0), 20)
    read = read_quality_table(write_long(made, tmp_path / "made.csv"))
    np.testing.assert_array_equal(read.correct, made.correct)
    np.testing.assert_array_equal(read.signals["confidence"], made.signals["confidence"])


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("b,code,13B,0.25", "b,code,13B,1.5", ["row 4", "'correct'", "0..1", "'1.5'"]),
        ("b,code,13B,0.25", "b,code,13B,", ["row 4", "'correct'", "empty"]),
        ("70B,1,8.8", "70B,1,0", ["row 3", "'cost'", "above 0", "'0'"]),
        ("0.9,0.5", "high,0.5", ["row 3", "'confidence'", "'high'"]),
        ("b,code,70B", "b,math,70B", ["row 5", "'domain'", "same", "math"]),
        ("b,code,70B", "b,code,13B", ["row 5", "'stage'", "once", "'13B' again for 'b'"]),
        ("b,code,70B,true,8.9,0.8,0.1,30\n", "", ["item 'b'", "every stage", "'70B'"]),
        ("8.9,0.8,0.1,30", "8.9,0.8,0.1,31", ["'item_prompt_tokens'", "same", "'b'"]),
        ("item,domain,stage", "item,topic,stage", ["column 'domain'"]),
        ("stage,correct,cost", "stage,right,cost", ["column 'correct'"]),
        ("a,math,13B", ",math,13B", ["row 2", "'item'", "empty"]),
    ],
)
def test_what_breaks_the_contract_is_refused_with_its_place(
    tmp_path: Path, old: str, new: str, words: list[str]
) -> None:
    assert old in LONG
    with pytest.raises(TraceError) as fault:
        read_quality_table(saved(tmp_path, LONG.replace(old, new)))
    assert all(word in str(fault.value) for word in ["answers.csv", *words]), str(fault.value)


@pytest.mark.parametrize(
    ("text", "costs", "words"),
    [
        (WIDE, {}, "needs a column 'stage', or the cost"),
        (WIDE, {"13B": 1.0}, "column '70B': must be a stage with a cost"),
        (WIDE, {"13B": 1.0, "70B": 2.0, "34B": 3.0}, "cost of '34B': no such stage"),
        (LONG, {"13b": 1.0}, "did you mean '13B'"),
        (LONG, {"13B": -1.0}, "must be above 0, got -1.0"),
        (WIDE.replace("b,code", "a,math"), {"13B": 1.0, "70B": 2.0}, "row 3, column 'item': must be there once"),
        (LONG.replace("70B", "13B").replace("a,math,13B,1,8.8", "c,math,13B,1,8.8"), {}, "once"),
        ("item,domain,stage,correct,cost\n", {}, "holds no rows"),
        ("item,domain,stage,correct,cost\na,x,13B,1,2\n", {}, "two stages or more, got 1"),
    ],
)
def test_costs_and_stages_that_do_not_fit(tmp_path: Path, text: str, costs: dict[str, float], words: str) -> None:
    with pytest.raises(TraceError, match=r"answers\.csv") as fault:
        read_quality_table(saved(tmp_path, text), costs=costs)
    assert words in str(fault.value), str(fault.value)


@pytest.mark.parametrize(
    ("stages", "words"),
    [(("70B",), "two stages or more"), (("70B", "13b"), "did you mean '13B'"), (("70B", "70B"), "once each")],
)
def test_stages_that_do_not_fit(tmp_path: Path, stages: tuple[str, ...], words: str) -> None:
    with pytest.raises(TraceError) as fault:
        read_quality_table(saved(tmp_path, LONG), stages=stages)
    assert words in str(fault.value)


def test_what_lies_beside_a_table_says_where_it_comes_from(tmp_path: Path) -> None:
    path = saved(tmp_path, LONG)
    assert read_quality_table(path).label == "given"
    path.with_suffix(".json").write_text('{"label": "measured"}', encoding="utf-8")
    assert read_quality_table(path).label == "measured"


def test_costs_of_stages_that_go_on_from_each_other(tmp_path: Path) -> None:
    """From nothing they add; continued, what has run is not paid again."""
    both = np.array([True, True])
    path = saved(tmp_path, LONG)
    assert read_quality_table(path).spent(both) == pytest.approx([10.4, 10.6])
    continued = read_quality_table(path, continued=True)
    assert continued.spent(both) == pytest.approx([8.8, 8.9])
    assert continued.spent_in_order().tolist() == [[1.6, 8.8], [1.7, 8.9]]


def test_no_such_table() -> None:
    with pytest.raises(TraceError, match="no such file or bundled table"):
        read_quality_table("nowhere")


@pytest.mark.parametrize("name", bundled_tables())
def test_bundled_tables_keep_the_contract(name: str) -> None:
    table = read_quality_table(name)
    assert table.label == "measured"
    assert len(table.items) >= 60
