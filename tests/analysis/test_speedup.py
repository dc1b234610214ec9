"""Speed-ups: closed forms of hand-made runs, and of simulations whose every second is known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from drawn import clustered, drawn_runs, given_runs, partly, played

from analysis.common.bootstrap import ClusterBootstrap
from analysis.speedup.grid import Cell, CellRun, baselines, grid_cells, run_cell, run_grid, weighted_mean
from analysis.speedup.speedup import best_lengths, crossovers, falling, schedules, speedup_cells
from calibration.common.errors import CostError

LINEAR = {
    "verifier": {"kind": "linear", "base_s": 1.0},
    "drafter": {"kind": "linear", "base_s": 0.25},
}


def made(
    draft_tokens: int, batch: int, seconds: np.ndarray | float, requests: int = 8, extrapolated: float = 0.0
) -> CellRun:
    """A run in which every request has 100 tokens in 99 / 2 rounds and takes these seconds."""
    return CellRun(
        "drafter",
        draft_tokens,
        batch,
        output_tokens=np.full(requests, 100.0),
        engine_seconds=np.broadcast_to(np.asarray(seconds, dtype=float), requests),
        rounds=np.full(requests, 49.5),
        prefill_s=0.0,
        draft_s=0.0,
        verify_s=1.0,
        overhead_s=0.0,
        extrapolated_share=extrapolated,
        warnings=(),
    )


def bootstrap(requests: int = 8) -> ClusterBootstrap:
    return ClusterBootstrap(["chat"] * requests, np.random.default_rng(0), draws=300)


SELF = {"drafter": "drafter"}


def test_a_run_that_takes_half_the_time_is_twice_as_fast() -> None:
    rng = np.random.default_rng(4)
    plain = rng.uniform(5, 20, 8)
    (cell,) = speedup_cells([made(0, 1, plain), made(3, 1, plain / 2)], SELF, bootstrap(), [None])
    # Paired: requests differ by a factor of four, their ratio does not.
    assert (cell.speedup.value, cell.speedup.low, cell.speedup.high) == (2.0, 2.0, 2.0)
    assert cell.tokens_per_round == 2.0
    assert cell.break_even_tokens == 1.0
    assert not cell.extrapolated


def test_extrapolation_of_either_run_marks_the_cell() -> None:
    runs = [made(0, 1, 10.0, extrapolated=0.5), made(3, 1, 5.0)]
    (cell,) = speedup_cells(runs, SELF, bootstrap(), [None])
    assert cell.extrapolated
    (best,) = best_lengths(runs, SELF, bootstrap(), [None])
    assert best.extrapolated


def test_best_length_and_the_lengths_as_good() -> None:
    noisy = np.array([4.0, 6.0] * 4)
    runs = [made(0, 1, 10.0), made(1, 1, noisy), made(2, 1, noisy[::-1] * 1.01), made(4, 1, 8.0)]
    (best,) = best_lengths(runs, SELF, bootstrap(), [None])
    assert best.draft_tokens == best.speculative_tokens == 1
    assert best.speedup.value == 2.0
    assert best.indistinct == (1, 2)
    assert best.pays


def test_where_nothing_pays_the_best_length_is_none() -> None:
    runs = [made(0, 1, 10.0), made(1, 1, 12.5), made(2, 1, 20.0)]
    (best,) = best_lengths(runs, SELF, bootstrap(), [None])
    assert (best.draft_tokens, best.speculative_tokens, best.indistinct) == (0, 1, (0,))
    assert best.speedup.value == 0.8
    assert not best.pays


def test_a_domain_without_requests_of_the_drafter_has_no_row() -> None:
    domains = ["chat"] * 4 + ["code"] * 4
    served = np.array([1.0] * 4 + [0.0] * 4)
    runs = [made(0, 1, 10.0), made(2, 1, 5.0)]
    columns = ("output_tokens", "engine_seconds", "rounds")
    runs = [dataclasses.replace(run, **{name: getattr(run, name) * served for name in columns}) for run in runs]
    shared = ClusterBootstrap(domains, np.random.default_rng(0), draws=300)
    assert [c.domain for c in speedup_cells(runs, SELF, shared, [None, "chat", "code"])] == [None, "chat"]
    assert [b.domain for b in best_lengths(runs, SELF, shared, [None, "chat", "code"])] == [None, "chat"]


@pytest.mark.parametrize(
    ("seconds", "pays", "loses", "batch"),
    [
        ([5.0, 8.0, 12.5], (1, 2), (4,), np.exp(np.log(2) + 0.25 / 0.45 * np.log(2))),
        ([5.0, 8.0, 9.0], (1, 2, 4), (), None),
        ([20.0, 20.0, 20.0], (), (1, 2, 4), None),
        ([5.0, 12.5, 5.0], (1, 4), (2,), np.exp(np.log(2) * 1.0 / 1.2)),
        ([5.0, 10.0, 5.0], (1, 4), (), 2.0),
    ],
)
def test_every_batch_size_pays_loses_or_shows_neither(
    seconds: list[float], pays: tuple[int, ...], loses: tuple[int, ...], batch: float | None
) -> None:
    runs = [made(0, b, 10.0) for b in (1, 2, 4)] + [made(2, b, s) for b, s in zip((1, 2, 4), seconds, strict=True)]
    (found,) = crossovers(best_lengths(runs, SELF, bootstrap(), [None]))
    rest = tuple(b for b in (1, 2, 4) if b not in pays and b not in loses)
    assert (found.pays, found.loses, found.not_shown, found.within_costs) == (pays, loses, rest, ())
    assert found.batch == (None if batch is None else pytest.approx(batch, rel=1e-5))


def test_a_sure_length_is_named_before_a_faster_unsure_one() -> None:
    """Draft 2 is faster on average, but only because of two requests; draft 1 gains on every one."""
    unsure = np.array([1.0, 1.0] + [9.8, 10.2] * 7)
    runs = [made(0, 1, 10.0, requests=16), made(1, 1, 9.0, requests=16), made(2, 1, unsure, requests=16)]
    (best,) = best_lengths(runs, SELF, bootstrap(16), [None])
    assert (best.draft_tokens, best.speculative_tokens, best.pays) == (2, 1, True)
    assert best.speedup.value == pytest.approx(10 / 9, rel=1e-5)
    cells = speedup_cells(runs, SELF, bootstrap(16), [None])
    assert [cell.pays for cell in cells] == [True, False]


def test_families_of_more_candidates_and_of_domains_widen_the_bounds() -> None:
    rng = np.random.default_rng(2)
    runs = [made(0, 1, 10.0, requests=24)]
    runs += [made(k, 1, 9 * np.exp(rng.normal(0, 0.2, 24)), requests=24) for k in (1, 2, 3, 4)]
    shared = ClusterBootstrap(["a", "b"] * 12, np.random.default_rng(0), draws=1000)
    alone = speedup_cells(runs[:2], SELF, shared, [None])[0]
    pooled, *domains = (c for c in speedup_cells(runs, SELF, shared, [None, "a", "b"]) if c.draft_tokens == 1)
    assert alone.speedup == pooled.speedup
    for narrow, wide in ((alone.speedup, alone.simultaneous), (alone.simultaneous, pooled.simultaneous)):
        assert narrow.low is not None
        assert wide.low is not None
        assert wide.low < narrow.low * 1.02
    assert pooled.simultaneous.low < alone.simultaneous.low  # type: ignore[operator]
    assert all(d.simultaneous.low < pooled.simultaneous.low for d in domains)  # type: ignore[operator]
    assert pooled.with_costs is None
    assert pooled.pays_with_costs is None


@pytest.mark.parametrize(
    ("regrets", "keys", "broken"),
    [
        ([{2: 0.0}, {0: 0.1, 2: 0.0}, {8: 0.0, 2: 0.2}], (2, 2, 2), ()),
        ([{2: 0.0, 4: 0.1}, {4: 0.0, 1: 0.2}], (4, 4), ()),
        ([{2: 0.0, 4: 0.3}, {4: 0.0, 1: 0.2}], (2, 1), ()),
        ([{2: 0.0}, {4: 0.0, 6: 0.1}, {1: 0.0}], (2, 4, 1), (0,)),
        ([{0: 0.0}, {3: 0.0}, {3: 0.1, 2: 0.0}], (0, 3, 2), (0,)),
        ([{1: 0.0, 2: 0.0}], (1,), ()),
    ],
)
def test_schedules_fall_at_the_least_regret_or_say_what_breaks_them(
    regrets: list[dict[int, float]], keys: tuple[int, ...], broken: tuple[int, ...]
) -> None:
    assert falling(regrets) == (keys, broken)


def test_a_schedule_smooths_what_the_data_cannot_tell_and_keeps_what_they_can() -> None:
    """At batch 1 draft 2 is surely best; at batch 2 longer drafts look best, by noise; at batch 4 nothing pays."""
    rng = np.random.default_rng(3)
    noise = np.exp(rng.normal(0, 0.15, 24))
    runs = [made(0, b, 10.0 * noise, requests=24) for b in (1, 2, 4)]
    for b, seconds in ((1, (5.0, 7.0)), (2, (7.0, 6.95)), (4, (12.0, 14.0))):
        for k, s in zip((2, 4), seconds, strict=True):
            runs.append(made(k, b, s * noise * np.exp(rng.normal(0, 0.01, 24)), requests=24))
    runs[5] = dataclasses.replace(runs[5], engine_seconds=6.98 * noise * np.tile([0.9, 1.1], 12))
    best = best_lengths(runs, SELF, bootstrap(24), [None])
    (found,) = schedules(best, speedup_cells(runs, SELF, bootstrap(24), [None]))
    assert (found.batches, found.breaks) == ((1, 2, 4), ())
    assert found.draft_tokens == (2, 2, 0)
    assert found.regrets[0] == found.regrets[2] == 0


@pytest.mark.parametrize("k", [1, 3, 8])
def test_simulated_speedup_is_the_one_counted_by_hand(k: int) -> None:
    """Batch 1, a verifier step of 1 s, a draft step of a quarter: seconds follow from rounds played by hand."""
    rng = np.random.default_rng(6)
    runs = [drawn_runs(rng, int(rng.integers(20, 60))) for _ in range(6)]
    traces = given_runs(runs)
    rounds = [played(row, k) for row in runs]
    plain = run_cell(traces, Cell("drafter", 0, 1), LINEAR, 0)
    fast = run_cell(traces, Cell("drafter", k, 1), LINEAR, 0)
    assert plain.engine_seconds == pytest.approx([len(row) for row in runs])  # prefill, then a step a token
    assert fast.rounds.tolist() == [len(r) for r in rounds]
    assert fast.engine_seconds == pytest.approx([1 + len(r) * (1 + 0.25 * k) for r in rounds])
    (cell,) = speedup_cells([plain, fast], SELF, bootstrap(6), [None])
    tokens, steps = sum(map(len, runs)), sum(map(len, rounds))
    assert cell.speedup.value == pytest.approx(tokens / (6 + steps * (1 + 0.25 * k)), rel=1e-5)
    assert cell.tokens_per_round == pytest.approx((tokens - 6) / steps, rel=1e-5)


def test_engine_time_is_shared_out_whole() -> None:
    """Every counted request is served once whatever the batch, and time per token falls as the batch grows."""
    traces = clustered(np.random.default_rng(1), sequences=9, tokens=30)
    rates = []
    for batch in (1, 2, 4):
        run = run_cell(traces, Cell("slow", 2, batch), {}, 0)
        assert run.output_tokens.tolist() == [30.0] * 9
        rates.append(run.throughput)
    assert rates == sorted(rates)


def test_results_do_not_depend_on_the_number_of_workers() -> None:
    traces = clustered(np.random.default_rng(1), sequences=6, tokens=20)
    cells = grid_cells(traces, (1, 2), (1, 2))
    steps: list[tuple[int, int]] = []
    alone = run_grid(traces, cells, workers=1, progress=lambda done, total: steps.append((done, total)))
    pooled = run_grid(traces, cells, workers=2)
    assert steps[-1] == (10, 10)
    assert [step for step, _ in steps] == list(range(1, 11))
    for one, other in zip(alone, pooled, strict=True):
        assert (one.drafter, one.draft_tokens, one.batch) == (other.drafter, other.draft_tokens, other.batch)
        assert one.engine_seconds.tobytes() == other.engine_seconds.tobytes()
        assert one.verify_s == other.verify_s


def test_a_fault_in_a_worker_reaches_the_caller() -> None:
    traces = given_runs([[0] * 5] * 2)  # no timings
    with pytest.raises(CostError, match="no"):
        run_grid(traces, [Cell("drafter", 0, 1), Cell("drafter", 1, 1)], workers=2)


def test_each_drafter_is_compared_on_its_own_requests() -> None:
    whole = clustered(np.random.default_rng(1), sequences=6, tokens=20, drafters=("a", "b", "c"))
    traces = partly(whole, "b", ["s0", "s3"])
    assert baselines(traces) == {"a": "a", "b": "b", "c": "a"}
    plain = [cell for cell in grid_cells(traces, (2,), (1,)) if cell.draft_tokens == 0]
    assert plain == [Cell("a", 0, 1), Cell("b", 0, 1)]
    assert run_cell(traces, Cell("b", 0, 1), {}, 0).output_tokens.tolist() == [20, 0, 0, 20, 0, 0]


def test_lengths_beyond_the_recording_are_not_simulated() -> None:
    traces = given_runs([[2, 1, 0, 0]], cap=2)
    assert {cell.draft_tokens for cell in grid_cells(traces, (1, 2, 4), (1,))} == {0, 1, 2}


def test_steps_of_equal_numbers_have_exactly_that_number() -> None:
    """Rounding must not make a plain step one of more than one token: it would be priced as another."""
    rng = np.random.default_rng(0)
    weights = rng.random(20_000)
    assert weighted_mean(np.full(20_000, 3.0), weights) == 3.0
    assert weighted_mean(np.array([1.0, 2.0]), np.array([3.0, 1.0])) == pytest.approx(1.25, rel=1e-15)
