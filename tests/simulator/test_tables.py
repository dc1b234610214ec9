"""Tables for the terminal: every number is shown, labelled, with its unit, and what it is worth is said."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scenarios import random_runs, scenario, traces_of

from calibration.common.errors import ReplicationWarning, ScenarioError
from calibration.traces import TraceSet
from paceline.terminal.runs import (
    comparison_table,
    estimate_text,
    half_text,
    interval_text,
    labelled,
    number_text,
    replications_table,
    summary_table,
    sweep_table,
)
from simulator import Scenario, simulate
from simulator.experiments.compare import compare
from simulator.experiments.replicate import Estimate, replicate
from simulator.experiments.sweep import sweep

POISSON = {"kind": "poisson", "rate_rps": 2.0, "requests": 30, "order": "shuffled"}


def traces() -> TraceSet:
    rng = np.random.default_rng(0)
    return traces_of([random_runs(rng, int(n)) for n in rng.integers(5, 30, 20)])


def loaded(draft_tokens: int | None = 2, **settings: Any) -> Scenario:
    return scenario(draft_tokens, **{"workload": POISSON, "name": f"draft {draft_tokens}", **settings})


def printed(table: Any) -> list[str]:
    """The lines of a table on a wide terminal, without its frame, spaces made one."""
    console = Console(width=240, file=io.StringIO(), color_system=None)
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return [" ".join(line.replace("│", "|").strip(" |").split()) for line in text.splitlines()]


def test_a_summary_shows_every_number_once_under_its_group() -> None:
    result = simulate(loaded(slo={"ttft_ms": 300.0}, measure={"warmup_requests": 3}), traces())
    lines = printed(summary_table(result.summary))
    assert lines[0] == "draft 2: simulated"
    numbers = [v for k, v in result.summary.items() if isinstance(v, int | float) and k != "seed"]
    headings = [line for line in lines if line in ("requests", "throughput", "latency", "speculation", "engine time")]
    assert headings == ["requests", "throughput", "latency", "speculation", "engine time"]
    assert sum(1 for line in lines if line.count("|") == 2 or line.count("|") == 1) >= len(numbers)
    assert f"TTFT p99 | {number_text(result.summary['p99_ttft_ms'])} | ms" in lines
    assert f"output tokens | {number_text(result.summary['output_throughput'])} | tokens/s" in lines
    assert "left out as warm-up | 3" in lines
    assert f"share within all SLOs | {number_text(result.summary['slo_attainment'])}" in lines
    rates = " ".join(f"{rate:.2f}" for rate in result.summary["spec_decode_per_position_acceptance_rates"])
    assert f"accepted at position 1, 2, .. of all drafts | {rates}" in lines
    assert "replay exact (recorded run lengths)" in " ".join(lines)
    assert "step costs stated linear constants" in " ".join(lines)


def test_every_number_of_a_run_has_a_label() -> None:
    summary = simulate(loaded(slo={"ttft_ms": 300.0}, measure={"warmup_requests": 3}), traces()).summary
    names = [name for name, value in summary.items() if isinstance(value, int | float) and name != "seed"]
    assert [name for name in names if labelled(name)[0] == name] == []


def test_captions_name_all_that_took_part() -> None:
    found = compare(loaded(None), loaded(3), replications=2, traces=traces(), workers=1)
    text = " ".join(printed(comparison_table(found)))
    assert "replay none: nothing is drafted / exact (recorded run lengths)" in text
    assert "drafter none / drafter" in text


def test_unknown_numbers_are_shown_last_under_their_own_name() -> None:
    lines = printed(summary_table({"name": "x", "completed": 3, "novel_thing": 1.5}))
    assert lines.index("other") < lines.index("novel_thing | 1.5")
    assert lines.index("requests measured | 3") < lines.index("other")


def test_names_are_never_read_as_markup() -> None:
    named = loaded(name="[red]fast[/red]")
    assert printed(summary_table(simulate(named, traces()).summary))[0] == "[red]fast[/red]: simulated"


def test_replications_show_mean_interval_and_how_many() -> None:
    runs = replicate(loaded(), 3, traces(), workers=1)
    lines = printed(replications_table(runs))
    assert lines[0] == "draft 2: 3 replications, 95% Student's t intervals"
    found = runs.estimates["mean_tpot_ms"]
    assert found.sd is not None
    expected = f"TPOT mean | {number_text(found.mean)} | {interval_text(found)} | {number_text(found.sd)} | ms"
    assert expected in lines


def test_equal_replications_say_so() -> None:
    closed = loaded(workload={"kind": "closed", "concurrency": 2})
    with pytest.warns(ReplicationWarning):
        lines = printed(replications_table(replicate(closed, 2, traces(), workers=1)))
    assert lines[0] == "draft 2: 2 replications, all equal: nothing is random, no interval"
    assert any(line.startswith("TPOT mean") and "| - | 0 | ms" in line for line in lines)


def test_a_comparison_shows_difference_ratio_and_verdict() -> None:
    found = compare(loaded(1), loaded(3), loaded(5), replications=3, traces=traces(), workers=1)
    lines = printed(comparison_table(found))
    assert lines[0].startswith("against 'draft 1': 3 replications on common random numbers")
    assert lines.index("draft 3") < lines.index("draft 5")
    c = found.contrasts[1]["p99_ttft_ms"]
    assert c.ratio is not None
    row = f"TTFT p99, ms | {number_text(c.a.mean)} | {number_text(c.b.mean)} | {estimate_text(c.difference)}"
    assert any(line.startswith(f"{row} | {estimate_text(c.ratio)}") and line.endswith(c.verdict) for line in lines)
    chosen = printed(comparison_table(found, ["iterations"]))
    assert sum(line.startswith("engine iterations") for line in chosen) == 2
    with pytest.raises(ScenarioError, match=r"metric 'iteration': not in these results; did you mean 'iterations'"):
        comparison_table(found, ["iteration"])


def test_a_sweep_shows_a_row_per_point() -> None:
    grid = {"stopping": [{"policy": "none"}, {"policy": "fixed", "draft_tokens": 2}], "engine.max_num_seqs": [2, 4]}
    result = sweep(loaded(), grid, traces=traces(), workers=1, replications=2)
    lines = printed(sweep_table(result, ["mean_tpot_ms", "spec_decode_acceptance_rate"]))
    assert lines[0].startswith("4 scenarios, 2 replications each: mean +- half the 95% interval; 0 of 8 cells")
    point, found = result.estimates()[3]
    assert point["engine.max_num_seqs"] == 4
    both = f"{half_text(found['mean_tpot_ms'])} | {half_text(found['spec_decode_acceptance_rate'])}"
    assert f'{{"policy": "fixed", "draft_tokens": 2}} | 4 | {both}' in lines
    assert any(line.startswith('{"policy": "none"} | 2 |') and line.endswith("| -") for line in lines)
    with pytest.raises(ScenarioError, match="metric 'speed': not in these results"):
        sweep_table(result, ["speed"])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (12345, "12,345"), (12345.6, "12,346"), (1.23456, "1.235"), (0.000123456, "0.0001235"), (-2.0, "-2")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number_text(value) == text


def test_estimates_without_interval_are_only_a_mean() -> None:
    assert estimate_text(Estimate(1, 2.5)) == "2.5"
    assert half_text(Estimate(1, 2.5)) == "2.5"
    assert half_text(None) == "-"
    assert estimate_text(Estimate(3, 2.0, 1.0, 1.5, 2.5)) == "2 [1.5, 2.5]"
    assert half_text(Estimate(3, 2.0, 1.0, 1.5, 2.5)) == "2 +- 0.5"
