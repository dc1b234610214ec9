"""The bundled recordings keep what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.prompts import DOMAINS, load_prompts
from calibration.traces import TraceSet, bundled, bundled_names, bundled_path

NAMES = ("smollm2-135m-cpu-greedy", "smollm2-135m-cpu-sampled")


@pytest.fixture(scope="module", params=NAMES)
def traces(request: pytest.FixtureRequest) -> TraceSet:
    return bundled(request.param)


def test_they_are_there_and_small() -> None:
    assert set(NAMES) <= set(bundled_names())
    for name in NAMES:
        assert sum(file.stat().st_size for file in bundled_path(name).iterdir()) <= 8_000_000


def test_recorded_by_the_command_with_every_prompt(traces: TraceSet) -> None:
    manifest = traces.manifest
    assert manifest.kind == "recorded"
    assert manifest.command.startswith("paceline calibrate smollm2-135m --drafter prompt-lookup ")
    paradigms = [info.paradigm for info in manifest.drafters]
    assert paradigms.count("prompt-lookup") == 1
    assert paradigms.count("early-exit") >= 2
    assert paradigms.count("layer-skip") >= 1
    files = load_prompts()
    assert {source.domain for source in manifest.prompts} == set(DOMAINS)
    assert traces.sequences.num_rows == sum(len(file.prompts) for file in files) >= 60
    # The texts that were run are the texts that come with the package.
    assert {source.sha256 for source in manifest.prompts} == {file.sha256 for file in files}


def test_the_second_reading_agreed_with_the_text(traces: TraceSet) -> None:
    (note,) = [note for note in traces.manifest.notes if note.startswith("rounding")]
    assert "disagrees with 0 of" in note


def test_every_model_was_timed(traces: TraceSet) -> None:
    timed = traces.frame("timings").groupby("model")["operation"].agg(set)
    assert timed["smollm2-135m"] == {"prefill", "verify"}
    assert all(timed[name] == {"draft"} for name in traces.manifest.drafter_names)


def test_greedy_run_lengths_of_token_driven_drafters_follow_from_match_bits() -> None:
    frame = bundled(NAMES[0]).frame("positions")
    for drafter in ("exit-24", "skip-13-17"):
        for _, rows in frame[frame["drafter"] == drafter].groupby("sequence_id", sort=False):
            match = rows["emitted_rank"].to_numpy() == 0
            run = rows["run_length"].to_numpy()
            expected = np.zeros(len(match) + 1, dtype=int)
            for t in range(len(match) - 1, -1, -1):
                expected[t] = expected[t + 1] + 1 if match[t] else 0
            assert (run == expected[:-1]).all()


def test_sampled_acceptance_agrees_with_the_overlap() -> None:
    """Over the emitted token, E[min(1, q/p)] = sum of min(p, q): Leviathan et al. 2023, theorem 3.5."""
    frame = bundled(NAMES[1]).frame("positions")
    for name in ("exit-16", "exit-20", "exit-24", "exit-28", "skip-13-17"):
        rows = frame[frame["drafter"] == name]
        by_request = (rows["accept_probability"] - rows["overlap"]).groupby(rows["sequence_id"]).agg(["sum", "size"])
        mean = by_request["sum"].sum() / by_request["size"].sum()
        residual = by_request["sum"] - mean * by_request["size"]
        error = np.sqrt((residual**2).sum()) / by_request["size"].sum()
        assert abs(mean) < 3.5 * error
