"""The size study: made-up families with known answers, and the bundled family from end to end."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from builders import iid_traces
from sized import VERIFY_S, known_speedup, sized_traces

from analysis.common.records import from_json, to_json
from analysis.size import Place, SizeFindings, SizeSettings, main_curve, study_size
from analysis.size.extrapolated import extrapolate
from analysis.size.facts import Facts, MeasuredSpeedup, SizedPair
from analysis.size.findings import Extrapolation, SizeCurve, common_region, discrepancy_words, existing_words
from analysis.size.measured import OwnLaw, study_family
from analysis.size.settings import RECORDED, Prices, Requests, drafted_seconds, plain_seconds, played
from analysis.size.sweetspot import family_by_size, made_shape, shape_of
from analysis.speedup.grid import Cell, run_cell
from calibration.common.errors import CostError, ReplayError, ScenarioError
from calibration.shapes.shapes import get_shape
from calibration.traces import TraceSet, bundled
from simulator.pricing.fitted import fit_step

SMALL = SizeSettings(batches=(1, 2), draft_tokens=4, catalogue=(), draws=300)


@pytest.fixture(scope="module")
def family() -> TraceSet:
    return bundled("smollm2-135m-cpu-distilled")


@pytest.fixture(scope="module")
def findings(family: TraceSet) -> SizeFindings:
    return study_size(family, SizeSettings(draws=500))


def own_curve(rates: tuple[float, ...], draft_s: tuple[float, ...], seed: int = 0) -> SizeCurve:
    traces = sized_traces(np.random.default_rng(seed), rates, draft_s)
    found, _ = study_family(traces, SMALL, np.random.default_rng(seed))
    return next(c for c in found.curves if c.domain is None and c.batch == 1)


def test_with_like_acceptance_the_cheapest_is_best_and_with_like_cost_the_most_accepted() -> None:
    cheapest = own_curve((0.6, 0.6, 0.6), (0.001, 0.003, 0.006))
    assert cheapest.spot.best.value == pytest.approx(0.01)
    assert cheapest.spot.best_of["size-0"] == 1
    most = own_curve((0.4, 0.6, 0.8), (0.002, 0.002, 0.002))
    assert most.spot.best.value == pytest.approx(0.16)
    assert most.spot.still_gaining == 1


def test_intervals_cover_a_made_up_truth() -> None:
    """Speed-ups by the formula lie inside nearly all of the 95% intervals, and the best size always in its own."""
    rates, draft_s = (0.4, 0.7, 0.75), (0.001, 0.001, 0.004)
    truth = [known_speedup(a, s, 4) for a, s in zip(rates, draft_s, strict=True)]
    assert int(np.argmax(truth)) == 1
    inside = []
    for seed in range(10):
        curve = own_curve(rates, draft_s, seed)
        for point, true in zip(curve.points, truth, strict=True):
            assert point.speedup.low is not None
            assert point.speedup.high is not None
            # 0.6%: what the end of a text of 200 tokens takes from its last round.
            inside.append(point.speedup.low * 0.994 <= true <= point.speedup.high * 1.006)
        assert (curve.spot.best.low or 1) <= 0.04 <= (curve.spot.best.high or 0)
    assert sum(inside) >= 26  # of 30; below 26 has a chance of 2% at a coverage of 95%


def test_a_flat_family_has_an_interval_over_all_its_sizes() -> None:
    same = own_curve((0.6, 0.6, 0.6), (0.002, 0.002, 0.002))
    assert (same.spot.low.value, same.spot.high.value) == pytest.approx((0.01, 0.16))
    assert min(same.spot.flat_of.values()) > 0.5


def test_the_curve_in_proportion_prices_a_draft_step_by_parameters_alone() -> None:
    traces = sized_traces(np.random.default_rng(2), (0.6, 0.6, 0.6), (0.009, 0.002, 0.001))
    found, _ = study_family(traces, SMALL, np.random.default_rng(0))
    curve = next(c for c in found.proportional if c.batch == 1)
    assert [p.cost_ratio for p in curve.points] == pytest.approx([0.01, 0.04, 0.16])
    assert curve.spot.best.value == pytest.approx(0.01)
    speedup = curve.points[1].speedup.value
    assert speedup == pytest.approx(known_speedup(0.6, 0.04 * VERIFY_S, 4), rel=0.05)
    own = next(c for c in found.curves if c.batch == 1 and c.domain is None)
    assert own.spot.best.value == pytest.approx(0.16)


def test_latency_is_told_apart_into_a_fixed_part_and_layers() -> None:
    traces = sized_traces(np.random.default_rng(2), (0.5, 0.6, 0.7), (0.003, 0.0035, 0.004))
    found, _ = study_family(traces, SMALL, np.random.default_rng(0))
    line = found.latency[0]
    assert line.base_s.value == pytest.approx(0.0025)
    assert line.layer_s.value == pytest.approx(0.0005)
    assert line.at_no_depth == pytest.approx(0.25)
    assert line.proportional_error == pytest.approx(0.003 / (0.01 * VERIFY_S))


@pytest.mark.parametrize(("batch", "tolerance"), [(1, 5e-4), (4, 0.01), (8, 0.02)])
def test_seconds_are_those_of_the_simulator(family: TraceSet, batch: int, tolerance: float) -> None:
    """Alone, a request differs only in where its rounds lie; in a batch the schedule is left out as well."""
    name, drafter = "smollm2-135m", "size-6.7"
    steps = {op: fit_step(family.timings, name, op) for op in ("prefill", "verify")}
    prices = Prices(steps["prefill"], steps["verify"], {drafter: fit_step(family.timings, drafter, "draft")})
    requests, rounds = Requests.of(family), played(family, drafter, 3)
    simulated = run_cell(family, Cell(drafter, 3, batch), {}, 0)
    assert rounds.rounds[2] == pytest.approx(simulated.rounds)
    seconds = drafted_seconds(requests, prices, rounds, batch)[2]
    assert seconds.sum() == pytest.approx(simulated.engine_seconds.sum(), rel=tolerance)
    plain = run_cell(family, Cell(drafter, 0, batch), {}, 0)
    assert plain_seconds(requests, prices, batch).sum() == pytest.approx(plain.engine_seconds.sum(), rel=tolerance)


def test_the_bundled_family_is_its_six_students(family: TraceSet) -> None:
    students = family_by_size(family)
    assert [s.name for s in students] == ["size-0.7", "size-1.6", "size-3.3", "size-6.7", "size-10", "size-20"]
    assert [round(100 * s.share, 1) for s in students] == [0.7, 1.6, 3.3, 6.7, 10.0, 20.0]


def test_a_manifest_gives_back_the_shape_that_was_published(family: TraceSet) -> None:
    assert dataclasses.replace(
        shape_of(family.manifest.verifier), source="", rope_theta=0.0, max_positions=0
    ) == dataclasses.replace(get_shape("smollm2-135m"), source="", rope_theta=0.0, max_positions=0)
    for info in family.manifest.drafters:
        shape = shape_of(info, 64)
        assert shape.parameters == info.parameters


def test_made_up_shapes_have_the_parameters_and_layers_asked_for() -> None:
    for parameters, layers in itertools.product((1e8, 8e8, 7e9), (2, 28)):
        shape = made_shape(parameters, layers, 128_256)
        assert shape.layers == layers
        assert shape.parameters == pytest.approx(parameters, rel=0.08)
        assert shape.heads * shape.head_dim == shape.hidden


def test_the_bundled_family_answers_on_every_device_batch_and_domain(findings: SizeFindings) -> None:
    family = findings.measured
    assert family.requests == 72
    assert len(family.curves) == 2 * 3 * 7
    assert len(family.proportional) == 2 * 3
    for curve in family.curves:
        spot = curve.spot
        assert spot.low.value is not None
        assert spot.best.value is not None
        assert spot.high.value is not None
        assert spot.low.value <= spot.best.value <= spot.high.value
        assert sum(spot.best_of.values()) == pytest.approx(1)
        assert len(curve.points) == 6
        rates = [p.acceptance.value or 0.0 for p in curve.points]
        assert rates[-1] > rates[0]
        assert str(curve.batch) in curve.statement
        assert curve.label == ("simulated" if curve.latency == RECORDED else "extrapolated")


def test_on_the_processor_no_student_pays_and_the_answer_says_so(findings: SizeFindings) -> None:
    own = [c for c in findings.measured.curves if c.latency == RECORDED and c.domain is None]
    assert own
    assert all(c.spot.costs and not c.spot.pays for c in own)
    assert all("costs time" in c.statement for c in own)
    assert "no size pays" in findings.answer
    assert main_curve(findings.measured) is own[0]


def test_extrapolated_numbers_are_marked_and_their_bands_are_wider_than_measured_ones(findings: SizeFindings) -> None:
    large = findings.extrapolated
    assert len(large.scale) == len(large.priced) == len(large.published) == 2 * 3
    for curve in (*large.scale, *large.published):
        assert curve.label == "extrapolated"
        assert "(extrapolated)" in curve.statement
    points = large.priced[0].points
    width = [(p.speedup.high or 0) - (p.speedup.low or 0) for p in points]
    near = int(np.argmin([abs(p.share - 0.1) for p in points]))
    assert width[0] > 2 * width[near]
    assert [p.share for p in points] == sorted({p.share for p in points})
    low, high = common_region(points, large.priced[0].spot)
    assert low <= high
    for wide, narrow in zip(large.scale, large.priced, strict=True):
        assert (wide.spot.speedup.low or 9) < (narrow.spot.speedup.low or 0)
        assert (wide.spot.speedup.high or 0) > (narrow.spot.speedup.high or 9)
        assert (wide.spot.best.low or 1) <= (narrow.spot.best.low or 0)
        assert (wide.spot.best.high or 0) >= (narrow.spot.best.high or 1)


def test_the_view_of_latency_moves_the_best_size(findings: SizeFindings) -> None:
    proportional, shallow, usual, host = findings.extrapolated.assumptions
    assert proportional.shift.value == 1
    assert proportional.larger == 0
    assert (proportional.best.value or 0) < (shallow.best.value or 0) < (usual.best.value or 0)
    assert usual.larger > 0.6
    assert (host.speedup.value or 9) < (usual.speedup.value or 0) < (shallow.speedup.value or 0)
    # The published rule of one in 200 and its example of one in 370 follow from their own view of latency.
    assert (proportional.divisor.low or 999) < 200 < 370 < (proportional.divisor.high or 0)


def test_depth_costs_speed_and_must_be_paid_in_acceptance(findings: SizeFindings) -> None:
    for study in findings.extrapolated.depth:
        steps = [p.draft_step_s for p in study.points]
        assert steps == sorted(steps)
        speeds = [p.speedup.value or 0.0 for p in study.points]
        assert speeds == sorted(speeds, reverse=True)
        needed = [p.rate_needed for p in study.points]
        assert needed[0] == 0
        assert all(a is not None and b is not None and a < b for a, b in itertools.pairwise(needed))
        assert all(p.parameters == pytest.approx(study.parameters, rel=0.02) for p in study.points)


def test_published_speedups_are_held_against_the_prices(findings: SizeFindings) -> None:
    agrees, overhead = findings.extrapolated.checks
    assert (agrees.predicted.low or 9) <= agrees.published <= (agrees.predicted.high or 0)
    assert (overhead.predicted.low or 0) > overhead.published
    assert (overhead.implied_draft_s or 0) > 5 * overhead.predicted_draft_s
    found = findings.extrapolated.discrepancy
    assert (found.checks, found.largest) == (2, overhead)
    assert found.log_error == pytest.approx(np.sqrt(np.mean([agrees.log_error**2, overhead.log_error**2])), rel=1e-5)
    assert found.factor == pytest.approx(np.exp(4.3027 * found.log_error), rel=1e-3)  # Student's, 2 degrees
    assert "0.46 measured against 2.1" in findings.answer


def test_families_left_out_lie_within_their_bands_but_for_one(findings: SizeFindings) -> None:
    checks = findings.extrapolated.band_checks
    assert len(checks) == 7
    assert [c.family for c in checks if not c.inside] == ["T5-XXL 11B, summaries, sampled"]
    own = checks[-1]
    assert own.family == "smollm2-135m, recorded"
    assert own.measured == main_curve(findings.measured).points[0].acceptance.value


def test_a_family_far_above_the_anchors_does_not_bend_the_extrapolation() -> None:
    """Early exits have half of the verifier and more: they tell nothing about drafters of a hundredth."""
    settings = SizeSettings(draws=100, batches=(1,), large_batches=(1,), catalogue=())
    large = study_size(bundled("smollm2-135m-cpu-greedy"), settings).extrapolated
    assert large.families == ("LaMDA 137B", "T5-XXL 11B")
    assert large.behind == "22 published pairs"
    assert len(large.band_checks) == 6


def made_check(speedup: float, source: str = "an engine") -> MeasuredSpeedup:
    return MeasuredSpeedup(source, "llama-3.1-70b", "llama-3.2-1b", "h100-sxm", 4, "bf16", speedup, 3, 2.6, "quoted")


def extrapolated(facts: Facts | None = None, **changes: object) -> Extrapolation:
    settings = SizeSettings(draws=400, large_batches=(1,), places=(Place("h100-sxm", 4),), **changes)
    own = OwnLaw("own", (), (SizedPair("own", "d", 1.0, 0.5, "recorded", 0.7, "here", "file"),))
    return extrapolate(own, settings, np.random.default_rng(5), facts)


def test_a_drafter_of_another_vocabulary_never_competes() -> None:
    """Foreign ones are small, large or padded alike; where none is left that is said, and nothing fails."""
    mixed = extrapolated(published=("qwen2.5-0.5b", "llama-2-7b", "llama-3.2-1b", "qwen3-8b", "llama-3.1-8b", "tiny"))
    (curve,) = mixed.published
    assert [p.drafter for p in curve.points] == ["llama-3.2-1b", "llama-3.1-8b"]
    assert set(curve.spot.best_of) == {"llama-3.2-1b", "llama-3.1-8b"}
    reasons = {each.drafter: each.reason for each in mixed.excluded}
    assert set(reasons) == {"qwen2.5-0.5b", "llama-2-7b", "qwen3-8b", "tiny"}
    assert reasons["llama-2-7b"] == "it has the vocabulary of llama-2, llama-3.1-70b that of llama-3"
    assert reasons["tiny"] == "whose vocabulary it has is not known"
    other = extrapolated(verifier="qwen2.5-72b", published=("qwen2.5-0.5b", "qwen2.5-7b", "llama-3.2-1b"))
    assert {p.drafter for p in other.published[0].points} == {
        "qwen2.5-0.5b",
        "qwen2.5-7b",
    }  # 151,936 and 152,064 rows
    none = extrapolated(published=("qwen2.5-0.5b",))
    assert none.published == ()
    assert all(each.favourite is None for each in none.sensitivity)


def test_a_check_that_is_missed_by_more_widens_what_is_said() -> None:
    """A check that agrees, one that is half of what is predicted, and one that is a tenth of it."""
    agreeing = extrapolated(Facts(speedups=(made_check(2.0),))).checks[0].predicted.value
    assert agreeing is not None
    found = [
        extrapolated(Facts(speedups=tuple(made_check(agreeing * f) for f in (1.0, miss))))
        for miss in (0.999, 0.5, 0.1)
    ]
    widths = [np.log((e.scale[0].spot.speedup.high or 0) / (e.scale[0].spot.speedup.low or 1)) for e in found]
    assert widths == sorted(widths)
    assert widths[2] > widths[1] + 1 > widths[0] + 1.2
    sure = [max(e.published[0].spot.best_of.values()) for e in found]
    assert sure[0] > 0.95 > sure[1] > sure[2]
    assert found[0].scale[0].spot.speedup.low == pytest.approx(found[0].priced[0].spot.speedup.low, rel=0.05)
    assert [e.discrepancy.largest.published for e in found] == [  # type: ignore[union-attr]
        pytest.approx(agreeing * miss) for miss in (0.999, 0.5, 0.1)
    ]
    more = extrapolated(Facts(speedups=tuple(made_check(agreeing * f) for f in (2, 0.5) * 6)))
    few = extrapolated(Facts(speedups=tuple(made_check(agreeing * f) for f in (2, 0.5))))
    assert more.discrepancy.log_error == pytest.approx(few.discrepancy.log_error, rel=0.02)
    assert (more.discrepancy.factor or 9) < (few.discrepancy.factor or 0)  # twelve checks tell it better than two


def test_without_checks_the_error_of_engines_is_said_to_be_left_out() -> None:
    found = extrapolated(Facts(speedups=()))
    assert (found.discrepancy.checks, found.discrepancy.factor) == (0, None)
    assert found.scale[0].spot.speedup == found.priced[0].spot.speedup
    assert "error of engines is not in the interval" in discrepancy_words(found.discrepancy)


def test_no_engine_commits_more_than_a_round_holds() -> None:
    found = extrapolated(Facts(speedups=(made_check(0.05),)))
    for curve in (*found.scale, *found.published):
        for point in curve.points:
            rate = point.acceptance.high or 1.0
            assert (point.speedup.high or 0.0) <= 1 / (1 - rate)


def test_the_largest_miss_and_what_is_left_out_stand_in_the_answer(findings: SizeFindings) -> None:
    said = existing_words(findings.extrapolated)
    assert "3 published shapes with its vocabulary (3 with another vocabulary left out)" in said
    assert "cannot be told: llama-3.2-1b in" in said
    assert said in findings.answer
    spot = findings.extrapolated.published[0].spot
    sure = dataclasses.replace(spot, best_of={"llama-3.2-1b": 0.97, "llama-3.2-3b": 0.03, "llama-3.1-8b": 0.0})
    curve = dataclasses.replace(findings.extrapolated.published[0], spot=sure)
    changed = dataclasses.replace(findings.extrapolated, published=(curve,), excluded=())
    assert existing_words(changed).endswith("vocabulary llama-3.2-1b is best in 97% of scenarios.")


def test_quoted_families_weigh_as_they_are_said_to(findings: SizeFindings) -> None:
    """Where the family at hand alone has weight, the curve is what it alone would give; all weights are shown."""
    large = findings.extrapolated
    names = [each.assumption for each in large.sensitivity]
    assert "quoted families weigh 0 (reported: 0.5)" in names
    assert "quoted families weigh 1 (reported: 0.5)" in names
    priced = next(each for each in large.sensitivity if each.assumption.startswith("prices alone"))
    assert (priced.speedup.high or 9) < (large.sensitivity[0].speedup.high or 0)
    assert all(p.read == "quoted" for p in large.pairs if p.role == "family")
    with pytest.raises(ReplayError, match="families: one must have a weight above 0"):
        extrapolated(quoted_weight=0.0)


def test_findings_survive_json_and_a_second_run(findings: SizeFindings, family: TraceSet) -> None:
    assert from_json(SizeFindings, to_json(findings), "size.json") == findings
    settings = SizeSettings(draws=100, batches=(1,), large_batches=(1,), catalogue=(), places=(Place("h200", 2),))
    first, second = (to_json(study_size(family, settings)) for _ in range(2))
    assert first == second


def test_without_timings_a_catalogued_device_must_price_the_family() -> None:
    traces = sized_traces(np.random.default_rng(0), (0.5, 0.6, 0.7), (1.0, 1.0, 1.0), timed=False)
    with pytest.raises(CostError, match="needs timings of every model, or a catalogued device"):
        study_size(traces, SMALL)
    with pytest.raises(CostError, match="a roofline price needs its whole shape"):
        study_size(traces, dataclasses.replace(SMALL, catalogue=(Place("h100-sxm"),)))


def test_faults_are_told_in_a_sentence(family: TraceSet) -> None:
    with pytest.raises(ReplayError, match=r"got 'size-7'; did you mean"):
        study_size(family, SizeSettings(drafters=("size-7", "size-10", "size-20")))
    with pytest.raises(ReplayError, match="at least 3 sizes, got 1"):
        study_size(family, SizeSettings(drafters=("specialist-code", "specialist-science")))
    with pytest.raises(ReplayError, match="needs parameters_non_embedding"):
        study_size(iid_traces(0.5, np.random.default_rng(0)))
    with pytest.raises(ScenarioError, match="batches must be increasing"):
        SizeSettings(batches=(4, 1))
    with pytest.raises(ScenarioError, match="quoted_weight must lie between 0 and 1, got 2"):
        SizeSettings(quoted_weight=2)
    with pytest.raises(ScenarioError, match="shared_doublings must be above 0, got 0"):
        SizeSettings(shared_doublings=0)
    with pytest.raises(ScenarioError, match="draws must be at least 100, got 5"):
        SizeSettings(draws=5)
    with pytest.raises(CostError, match="not known"):
        study_size(family, SizeSettings(published=("llama-9-1b",), draws=100))
