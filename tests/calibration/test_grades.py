"""Grades of acceptance: importers state their own, older manifests are never graded upwards, the lowest counts."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from graded import from_answers, from_counters
from rich.console import Console

from calibration.importers.aggregates import acceptance_law, synthesize
from calibration.importers.origin import Origin
from calibration.traces import TraceSet, bundled, bundled_names
from calibration.traces.grades import (
    ACCEPTANCE_GRADES,
    PER_ROUND,
    RECORDED,
    SYNTHESISED,
    acceptance_grade,
    grade_of,
    lowest_grade,
    replay_exactness,
    told_grade,
)
from calibration.traces.show import show


def test_what_was_recorded_here_is_recorded() -> None:
    assert {acceptance_grade(bundled(name).manifest) for name in bundled_names()} == {RECORDED}


def test_importers_state_their_grain(tmp_path: Path) -> None:
    rounds, histogram = (from_answers(tmp_path, detailed=detailed).manifest for detailed in (True, False))
    aggregate = from_counters(tmp_path).manifest
    grains = [one.import_grain for one in (rounds, histogram, aggregate)]
    assert grains == ["round", "histogram", "aggregate"]
    assert [acceptance_grade(one) for one in (rounds, histogram, aggregate)] == [PER_ROUND, PER_ROUND, SYNTHESISED]


@pytest.mark.parametrize(
    ("import_format", "grade"),
    [
        ("vllm per-request metrics (metrics.speculative_decoding)", PER_ROUND),
        ("sglang per-request histograms", PER_ROUND),
        ("aiperf records", PER_ROUND),
        ("specdecode-bench (exact alignment)", PER_ROUND),
        ("hsd-eagle3-rounds", PER_ROUND),
        ("ltd-eagle3-rounds", PER_ROUND),
        ("aiperf (synthesised from aggregates)", SYNTHESISED),
        ("sglang per-request means (synthesised from mean accepted lengths)", SYNTHESISED),
        ("vllm prometheus counters (synthesised from aggregates)", SYNTHESISED),
        ("vllm log lines (synthesised from aggregates)", SYNTHESISED),
        ("something that nobody has heard of", SYNTHESISED),
        (None, SYNTHESISED),
    ],
)
def test_older_manifests_are_graded_by_their_format_and_never_upwards(import_format: str | None, grade: str) -> None:
    assert grade_of("imported", import_format) == grade
    assert told_grade({"acceptance": f"imported: {import_format}"}) == grade  # of a summary that states no grade


def test_results_of_before_and_unknown_words() -> None:
    assert told_grade({"acceptance": "recorded"}) == RECORDED
    assert told_grade({"acceptance_grade": "imported per round", "acceptance": "recorded"}) == PER_ROUND
    assert told_grade({}) == SYNTHESISED
    assert told_grade({"acceptance_grade": "splendid"}) == SYNTHESISED


def test_the_lowest_grade_counts() -> None:
    for at, grade in enumerate(ACCEPTANCE_GRADES):
        assert lowest_grade(ACCEPTANCE_GRADES[: at + 1]) == grade
    assert lowest_grade([SYNTHESISED, RECORDED]) == SYNTHESISED


def test_a_manifest_keeps_its_grain_and_leaves_out_what_is_not_said(tmp_path: Path) -> None:
    from_counters(tmp_path).write(tmp_path / "t")
    told = json.loads((tmp_path / "t" / "manifest.json").read_text(encoding="utf-8"))
    assert told["import_grain"] == "aggregate"
    assert TraceSet.read(tmp_path / "t").manifest.import_grain == "aggregate"
    recorded = bundled(bundled_names()[0]).manifest
    assert "import_grain" not in json.loads(recorded.model_dump_json())


def test_exactness_says_what_is_replayed(tmp_path: Path) -> None:
    aggregate = from_counters(tmp_path).manifest
    told = replay_exactness(aggregate, ["drafter"], drawn=False)
    assert "exact (recorded" not in told
    for words in ("in mean only", "synthesised rounds", "drafts of 3 tokens", "the spread between requests"):
        assert words in told
    rounds = from_answers(tmp_path).manifest
    told = replay_exactness(rounds, ["small"], drawn=False)
    assert told == "exact for the imported rounds at their own draft lengths; an estimate at other draft lengths"
    recorded = bundled("smollm2-135m-cpu-greedy").manifest
    assert replay_exactness(recorded, ["prompt-lookup"], drawn=False) == "exact (recorded run lengths)"
    sampled = bundled("smollm2-135m-cpu-sampled").manifest
    assert replay_exactness(sampled, sampled.drafter_names, drawn=True) == "exact in distribution (sampled)"


def test_show_names_the_grade(tmp_path: Path) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(show(from_counters(tmp_path)))
    assert "synthesised from aggregates: no round was measured" in console.export_text()


def test_made_up_rounds_are_synthesised_whoever_makes_them() -> None:
    law = acceptance_law([0.5], "here")
    rng = np.random.default_rng(0)
    made = synthesize(
        [(5, 20)], [law], "a format of tomorrow", origin=Origin(), seed=0, rng=rng, prompts=(), domain="chat"
    )
    assert acceptance_grade(made.manifest) == SYNTHESISED
